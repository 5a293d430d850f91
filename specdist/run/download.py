# SPDX-License-Identifier: Apache-2.0
"""The target's weights on every host of a world, where `target.path` is a repository of the Hugging Face Hub."""

from pathlib import Path

from specdist.core import hub
from specdist.core.errors import DataError
from specdist.core.team import SILENCE_S, Team
from specdist.world.groups import World


def fetch_target(path: str, world: World, silence_s: float = SILENCE_S) -> None:
    """Have the first rank of every host download what its host lacks; returns when all hosts have it. Raises DataError:
    see `hub.resolve`, or hosts have different commits in their caches; on all ranks. WorldError: a rank that downloads
    has come no further for `silence_s` seconds."""
    rank, hosts, commits = world.facts.rank, world.hosts, dict[str, str]()
    firsts = sorted({hosts.index(host) for host in set(hosts)})
    team = Team(world.store, "target", f"downloads {path}", rank, hosts, silence_s)
    with team.telling_errors():
        if rank in firsts:
            progress = rank == 0
            found = hub.resolve(
                path, "target.path", weights=True, progress=progress, say=lambda _, text: team.tell(text)
            )
            team.put(str(rank), "a directory" if found == Path(path).expanduser() else found.name)
        for first in firsts:
            commits[hosts[first]] = team.wait(str(first), first)
    if len(set(commits.values())) > 1:
        listed = ", ".join(f"{host} has {commit}" for host, commit in commits.items())
        raise DataError.at("target.path", f"={path}: the hosts have different ones ({listed}): name ORG/NAME@COMMIT")
