# SPDX-License-Identifier: Apache-2.0
"""The prompts in a world: one rank prepares them, or one of every host, and the others open what it has."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from specdist.core.errors import DataError, InputError, WorldError
from specdist.prompts.config import PromptsConfig
from specdist.prompts.corpus import Corpus, make_corpus
from specdist.prompts.prepare import prepare_corpus
from specdist.prompts.store import PromptStore, is_store

SILENCE_S = 900.0
"""Seconds in which the preparing rank must come further: more than one piece may take."""
PUBLISH_S, LOOK_S = 3.0, 2.0


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
        ConfigError, DataError: see `prepare_corpus`; on all ranks.
        WorldError: the rank that is waited for has come no further for `silence_s` seconds.
    """
    firsts = sorted({hosts.index(host) for host in set(hosts)})
    prompts, own = None, hosts.index(hosts[rank])
    for preparing in firsts:
        if preparing == rank:
            prompts = prompts or _prepare(config, tokenizer_dir, store, rank)
            found = [(str(prepared.directory), prepared.files) for prepared in prompts.stores]
            store.set(f"prompts/{rank}", json.dumps({"stores": found}))
            continue
        found = json.loads(_await(store, preparing, hosts, silence_s))
        if "error" in found:  # on every rank, so that it does not matter whose is recorded first
            raise DataError(found["error"], found["keys"])
        stores = found["stores"]
        if prompts is None and preparing in (0, own) and all(is_store(Path(directory)) for directory, _ in stores):
            share = config.holdout if isinstance(config.holdout, float) else None
            prompts = make_corpus([PromptStore.open(*opened) for opened in stores], share)
    return prompts or _prepare(config, tokenizer_dir, store, rank)


def _prepare(config: PromptsConfig, tokenizer_dir: str | Path, store: dist.Store, rank: int) -> Corpus:
    """Prepare them here; the other ranks learn how far it is, and the error."""
    published_at = 0.0

    def publish(text: str) -> None:
        nonlocal published_at
        if time.monotonic() - published_at > PUBLISH_S:
            published_at = time.monotonic()
            store.set(f"prompts/{rank}/progress", text)

    try:
        return prepare_corpus(config, tokenizer_dir, progress=rank == 0, on_progress=publish)
    except InputError as error:
        store.set(f"prompts/{rank}", json.dumps({"error": str(error), "keys": error.keys}))
        raise


def _await(store: dist.Store, rank: int, hosts: Sequence[str], silence_s: float) -> bytes:
    """What `rank` publishes of its prompts when they are prepared."""
    done, progress = f"prompts/{rank}", f"prompts/{rank}/progress"
    said, since = b"nothing yet", time.monotonic()
    while True:
        try:
            store.wait([done], timedelta(seconds=LOOK_S))
            return store.get(done)
        except dist.DistStoreError:  # not yet
            if store.check([progress]) and (text := store.get(progress)) != said:
                said, since = text, time.monotonic()
        except dist.DistError as error:
            raise WorldError(f"the world's store was lost while rank {rank} prepared the prompts: {error}") from error
        if time.monotonic() - since > silence_s:
            raise WorldError(
                f"rank {rank} (host {hosts[rank]}) prepares the prompts and has come no further for {silence_s:.0f} s; "
                f"its last word: {said.decode()}",
                culprit=rank,
            )
