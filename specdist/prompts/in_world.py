# SPDX-License-Identifier: Apache-2.0
"""The prompts in a world: one rank prepares them, or one of every host, and the others open what it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from specdist.core.errors import DataError
from specdist.core.host_work import SILENCE_S, await_result, finish, telling
from specdist.prompts.config import PromptsConfig
from specdist.prompts.corpus import Corpus, make_corpus
from specdist.prompts.prepare import prepare_corpus
from specdist.prompts.store import PromptStore, is_store


def prepare_in_world(
    config: PromptsConfig,
    tokenizer_dir: str | Path,
    store: dist.Store,
    hosts: Sequence[str],
    rank: int,
    silence_s: float = SILENCE_S,
) -> Corpus:
    """The configured prompts on every rank of a world, whose `hosts` are given in rank order.

    Rank 0 prepares them and shows its progress. Where `prompts.cache_dir` is not shared, the first rank of every other
    host does so after it, for its host. Returns when all hosts have theirs: what comes next is collective, and its
    limits are not made for a preparation.

    Raises:
        ConfigError, DataError: see `prepare_corpus`, or the hosts have different prompts; on all ranks.
        WorldError: the rank that is waited for has come no further for `silence_s` seconds, more than one piece may
            take.
    """
    firsts = sorted({hosts.index(host) for host in set(hosts)})
    prompts, own, fingerprints = None, hosts.index(hosts[rank]), {}
    for preparing in firsts:
        name = f"prompts/{preparing}"
        if preparing == rank:
            prompts = prompts or _prepare(config, tokenizer_dir, store, rank)
            stores = [(str(prepared.directory), prepared.files) for prepared in prompts.stores]
            finish(store, name, {"stores": stores, "fingerprint": prompts.fingerprint})
            continue
        found = await_result(store, name, preparing, hosts, "prepares the prompts", silence_s)
        stores, fingerprints[hosts[preparing]] = found["stores"], found["fingerprint"]
        if prompts is None and preparing in (0, own) and all(is_store(Path(directory)) for directory, _ in stores):
            share = config.holdout if isinstance(config.holdout, float) else None
            prompts = make_corpus([PromptStore.open(*opened) for opened in stores], share)
    prompts = prompts or _prepare(config, tokenizer_dir, store, rank)
    if other := [host for host, fingerprint in fingerprints.items() if fingerprint != prompts.fingerprint]:
        raise DataError.at(
            "prompts.files",
            f": hosts {hosts[rank]} and {other[0]} have different ones: give both the same files, or name the revision "
            "of a data set",
        )
    return prompts


def _prepare(config: PromptsConfig, tokenizer_dir: str | Path, store: dist.Store, rank: int) -> Corpus:
    """Prepare them here; the other ranks learn how far it is, and the error."""
    with telling(store, f"prompts/{rank}") as tell:
        return prepare_corpus(config, tokenizer_dir, progress=rank == 0, on_progress=tell)
