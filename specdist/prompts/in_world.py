# SPDX-License-Identifier: Apache-2.0
"""The prompts in a world: one rank prepares them, or one of every host, and the others open what it has."""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from specdist.core.errors import DataError
from specdist.core.team import SILENCE_S, Team
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
    limits are not made for a preparation. Raises ConfigError, DataError: see `prepare_corpus`, or the hosts have
    different prompts; on all ranks. WorldError: the rank that is waited for has come no further for `silence_s`
    seconds, more than one piece may take.
    """
    team = Team(store, "prompts", "prepares the prompts", rank, hosts, silence_s)
    prompts, own, fingerprints = None, hosts.index(hosts[rank]), {}

    def prepared() -> Corpus:
        return prepare_corpus(config, tokenizer_dir, progress=rank == 0, on_progress=team.tell)

    with team.telling_errors():
        for preparing in sorted({hosts.index(host) for host in set(hosts)}):
            if preparing == rank:
                prompts = prompts or prepared()
                stores = [(str(side.directory), side.files) for side in prompts.stores]
                team.put(str(rank), {"stores": stores, "fingerprint": prompts.training.fingerprint})
                continue
            found = team.wait(str(preparing), preparing)
            stores, fingerprints[hosts[preparing]] = found["stores"], found["fingerprint"]
            if prompts is None and preparing in (0, own) and all(is_store(Path(directory)) for directory, _ in stores):
                share = config.holdout if isinstance(config.holdout, float) else None
                prompts = make_corpus([PromptStore.open(*opened) for opened in stores], share)
        prompts = prompts or prepared()
    if other := [host for host, fingerprint in fingerprints.items() if fingerprint != prompts.training.fingerprint]:
        raise DataError.at(
            "prompts.files",
            f": hosts {hosts[rank]} and {other[0]} have different ones: give both the same files, or name the revision "
            "of a data set",
        )
    return prompts
