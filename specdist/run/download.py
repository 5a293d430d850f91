# SPDX-License-Identifier: Apache-2.0
"""The target's weights on every host of a world, where `target.path` is a repository of the Hugging Face Hub."""

from __future__ import annotations

from specdist.core import hub
from specdist.core.host_work import SILENCE_S, await_result, finish, telling
from specdist.world.groups import World


def fetch_target(path: str, world: World, silence_s: float = SILENCE_S) -> None:
    """Have the first rank of every host download what its host lacks; returns when all hosts have it.

    Raises:
        DataError: see `hub.resolve`; on all ranks.
        WorldError: a rank that downloads has come no further for `silence_s` seconds.
    """
    rank, firsts = world.facts.rank, sorted({world.hosts.index(host) for host in set(world.hosts)})
    if rank in firsts:
        with telling(world.store, f"target/{rank}") as tell:
            hub.resolve(path, "target.path", weights=True, progress=rank == 0, say=lambda _, text: tell(text))
        finish(world.store, f"target/{rank}", {})
    for first in firsts:
        await_result(world.store, f"target/{first}", first, world.hosts, f"downloads {path}", silence_s)
