# SPDX-License-Identifier: Apache-2.0
"""The target's weights on every host of a world, where `target.path` is a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from specdist.core import hub
from specdist.core.errors import DataError
from specdist.core.host_work import SILENCE_S, await_result, finish, telling
from specdist.world.groups import World


def fetch_target(path: str, world: World, silence_s: float = SILENCE_S) -> None:
    """Have the first rank of every host download what its host lacks; returns when all hosts have it.

    Raises:
        DataError: see `hub.resolve`, or hosts have different commits in their caches; on all ranks.
        WorldError: a rank that downloads has come no further for `silence_s` seconds.
    """
    rank, firsts = world.facts.rank, sorted({world.hosts.index(host) for host in set(world.hosts)})
    if rank in firsts:
        with telling(world.store, f"target/{rank}") as tell:
            found = hub.resolve(path, "target.path", weights=True, progress=rank == 0, say=lambda _, text: tell(text))
        commit = "a directory" if found == Path(path).expanduser() else found.name
        finish(world.store, f"target/{rank}", {"commit": commit})
    commits = {}
    for first in firsts:
        result = await_result(world.store, f"target/{first}", first, world.hosts, f"downloads {path}", silence_s)
        commits[world.hosts[first]] = result["commit"]
    if len(set(commits.values())) > 1:
        listed = ", ".join(f"{host} has {commit}" for host, commit in commits.items())
        raise DataError.at("target.path", f"={path}: the hosts have different ones ({listed}): name ORG/NAME@COMMIT")
