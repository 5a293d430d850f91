# SPDX-License-Identifier: Apache-2.0
"""The prompts in a world: one rank of a host prepares them, the others open what it has."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from specdist.core.errors import WorldError
from specdist.prompts.config import PromptsConfig
from specdist.prompts.prepare import prepare
from specdist.prompts.store import PromptStore

SILENCE_S = 900.0
"""Seconds in which the preparing rank must come further: as long as one piece may take, and the search in the cache."""
TELL_S, LOOK_S = 3.0, 2.0


def prepare_in_world(
    config: PromptsConfig,
    tokenizer_dir: str | Path,
    store: dist.Store,
    hosts: Sequence[str],
    rank: int,
    silence_s: float = SILENCE_S,
) -> PromptStore:
    """The store of the configured prompts on every rank of a world, whose `hosts` are given in rank order.

    Rank 0 prepares them first and shows its progress; then the first rank of every other host does, which finds them
    done where the hosts share `prompts.cache_dir`. The other ranks open what the first one of their host has.

    Raises:
        ConfigError, DataError: see `prepare`.
        WorldError: the rank that is waited for has come no further for `silence_s` seconds.
    """
    first = hosts.index(hosts[rank])
    if rank not in (0, first):
        directory, files = json.loads(_await(store, first, hosts, silence_s))
        return PromptStore.open(directory, files)
    if rank:
        _await(store, 0, hosts, silence_s)
    last = 0.0

    def tell(text: str) -> None:
        nonlocal last
        if time.monotonic() - last > TELL_S:
            last = time.monotonic()
            store.set(f"prompts/{rank}/progress", text)

    prompts = prepare(config, tokenizer_dir, progress=rank == 0, told=tell)
    store.set(f"prompts/{rank}", json.dumps([str(prompts.directory), prompts.files]))
    return prompts


def _await(store: dist.Store, rank: int, hosts: Sequence[str], silence_s: float) -> bytes:
    """What `rank` says of its prompts when they are prepared."""
    said, since = b"nothing yet", time.monotonic()
    try:
        while not store.check([f"prompts/{rank}"]):
            if store.check([f"prompts/{rank}/progress"]) and (told := store.get(f"prompts/{rank}/progress")) != said:
                said, since = told, time.monotonic()
            if time.monotonic() - since > silence_s:
                raise WorldError(
                    f"rank {rank} (host {hosts[rank]}) prepares the prompts and has come no further for "
                    f"{silence_s:.0f} s; its last word: {said.decode()}",
                    culprit=rank,
                )
            _sleep_until(store, f"prompts/{rank}")
        return store.get(f"prompts/{rank}")
    except dist.DistError as error:
        raise WorldError(f"the world's store was lost while rank {rank} prepared the prompts: {error}") from error


def _sleep_until(store: dist.Store, key: str) -> None:
    try:
        store.wait([key], timedelta(seconds=LOOK_S))
    except dist.DistStoreError:  # not yet
        return
