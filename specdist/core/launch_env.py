# SPDX-License-Identifier: Apache-2.0
"""The launch environment: the variables by which a launcher describes a world to its ranks.

Torchrun's own variables say which rank this is. A few of ours, which `launch/agent.py` sets, say which start of which
job it is; a world started by plain torchrun lacks them and gets the defaults below. Nothing else in `specdist/` reads
the environment.
"""

import argparse
import contextlib
import hashlib
import ipaddress
import os
import platform
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from specdist.core.errors import ConfigError, WorldError
from specdist.core.files import unwritable

Role = Literal["target", "draft"]

JOB, RESTART, DEADLINE, NODE_ROLE, HOST, TOKEN = (
    f"SPECDIST_{name}" for name in ("JOB", "RESTART", "DEADLINE", "NODE_ROLE", "HOST", "TOKEN")
)


def rank_arguments(module: str, text: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=text)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; several are merged")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override single keys")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class RankFacts:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    node_role: Role | None = None
    """The role that every rank of this node takes, where the launcher decides it (a heterogeneous job)."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the torchrun contract (RANK, WORLD_SIZE, LOCAL_RANK, ...). Raises WorldError: a variable is missing: the
        process was not started by a launcher."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [n for n in names if n not in os.environ]
        if missing:
            raise WorldError(
                f"{', '.join(missing)} not set: start the world with `specdist train CONFIG` on this machine, or with "
                "`torchrun --nproc-per-node N -m specdist.train --config CONFIG`"
            )
        env = os.environ
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
            host=env.get(HOST) or socket.gethostname(),
            node_role=parse_role(env.get(NODE_ROLE)),
        )


def parse_role(text: str | None) -> Role | None:
    """A node's role as the launcher writes it; raises ConfigError for anything but target, draft or nothing."""
    roles: dict[str, Role] = {"target": "target", "draft": "draft"}
    if text and text not in roles:
        raise ConfigError(f"a node's role ({NODE_ROLE}) is target or draft, not '{text}'")
    return roles[text] if text else None


@dataclass(frozen=True)
class Attempt:
    """One start of a job. A job that is preempted, or that fails in a way that a restart may mend, has several."""

    job: str
    """The batch system's job id, or one that the launcher made up; unique among the jobs of a run directory."""
    restart: int = 0
    """How often this job was started before."""
    deadline: float | None = None
    """When the batch system ends it, in seconds since the epoch; None: never."""

    @classmethod
    def from_environment(cls) -> Self:
        """Which attempt this rank is part of. Started by plain torchrun: its run id, or that of the Slurm job."""
        env = os.environ
        run_id = env.get("TORCHELASTIC_RUN_ID")
        run_id = None if run_id == "none" else run_id  # the default, which all runs share
        job = env.get(JOB) or env.get("SLURM_JOB_ID") or run_id or f"pid{os.getppid()}"
        restart = env.get(RESTART) or env.get("SLURM_RESTART_COUNT") or env.get("TORCHELASTIC_RESTART_COUNT") or "0"
        deadline = env.get(DEADLINE) or env.get("SLURM_JOB_END_TIME")
        return cls(job, int(restart), float(deadline) if deadline else None)

    def environment(self) -> dict[str, str]:
        deadline = {} if self.deadline is None else {DEADLINE: str(self.deadline)}
        return {JOB: self.job, RESTART: str(self.restart), **deadline}

    @property
    def name(self) -> str:
        return f"{self.job}.{self.restart}"

    def directory(self, run_dir: Path) -> Path:
        """Where this attempt's logs, its failure.json and its outcome.json are."""
        return run_dir / "logs" / self.name


def run_token() -> bytes:
    """The secret that admits a rank to this run's control plane; raises ConfigError where the environment has none."""
    text = os.environ.get(TOKEN, "")
    if not re.fullmatch("[0-9a-fA-F]{32}", text):
        raise ConfigError(
            f"{TOKEN}, the secret that admits ranks to a run, is not {'32 hexadecimal digits' if text else 'set'}. "
            "`specdist` makes one for what it starts; who starts torchrun or agents sets the same on all hosts, and "
            f"with world.scheduler in both worlds: export {TOKEN}=$(openssl rand -hex 16)"
        )
    return bytes.fromhex(text)


def make_token() -> None:
    """Give what this process starts a secret, unless the user has."""
    os.environ.setdefault(TOKEN, secrets.token_hex(16))


def rendezvous_address() -> tuple[str, int]:
    """The host and port of the world's store (MASTER_ADDR, MASTER_PORT)."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def launcher_serves_store() -> bool:
    """Whether the launcher serves the world's store, as torchrun's agent does; under srun, say, rank 0 has to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def local_address() -> str:
    """The IP address under which the other hosts of this world reach this one: that of the route to the rendezvous."""
    return address_towards(*rendezvous_address())


def reachable_address() -> str:
    """The IP address under which hosts of other worlds reach this one: where the rendezvous does not leave this
    machine, that of its default route (without one, nobody else can reach it)."""
    address = local_address()
    if not ipaddress.ip_address(address).is_loopback:
        return address
    try:
        return address_towards("203.0.113.1", 9)  # an address for documentation: only the route to it is looked up
    except OSError:
        return address


def address_towards(host: str, port: int) -> str:
    """The IP address of this host on the route to another one."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # a datagram socket sends nothing by connecting; it only picks the route
        return str(probe.getsockname()[0])


def variable(name: str) -> str | None:
    """What an environment variable holds that the configuration names, as the one of a key does, or a convention does;
    None where it is empty."""
    return os.environ.get(name) or None


def keep_compiled(directory: str | None, torch_version: str) -> None:
    """Have torch's compiler and Triton keep what they compile in `place_of_compiled`. Raises ConfigError as that does;
    where the default place cannot be written they keep to their own."""
    place = place_of_compiled(directory, torch_version)
    if place is None:
        return
    for name, folder in {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}.items():
        if _chosen_by_torch(os.environ.get(name)):
            os.environ[name] = str(place / folder)


def _chosen_by_torch(directory: str | None) -> bool:
    """Whether nobody has set the variable. When torch._dynamo is imported it sets it to its default, and what a
    launcher has imported its ranks inherit."""
    place = None if directory is None else Path(directory)
    temporary = (Path(tempfile.gettempdir()), Path("/tmp"))  # a batch system may set another one on the node
    return place is None or (place.name.startswith("torchinductor_") and place.parent in temporary)


def place_of_compiled(directory: str | None, torch_version: str) -> Path | None:
    """A folder of `directory` (`run.compile_cache`) for what compiled code depends on beside what the compilers tell
    apart themselves: the processor, for which C++ is compiled as it is here. It is made. Raises ConfigError: nothing
    can be written there; None where that is so of the default directory."""
    try:
        cache = Path(directory or "~/.cache/specdist/compiled").expanduser()
        place = cache / f"torch-{torch_version}-{_processor()}"
        place.mkdir(parents=True, exist_ok=True)
        if (reason := unwritable(place)) is not None:
            raise reason
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        if directory is not None:
            raise ConfigError.at(
                "run.compile_cache", f"={directory} cannot be written ({error}): set it to a directory that can be"
            ) from error
        return None
    return place


def _processor() -> str:
    """Stands for the instructions that this host's processor has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def without_world(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that a rank starts and that is no rank, but may start a world of its own."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", TOKEN)
    own_prefixes = ("TORCHELASTIC_", "ROLE_", "GROUP_WORLD")
    return {name: value for name, value in environment.items() if name not in own and not name.startswith(own_prefixes)}


def interface_towards(host: str, port: int) -> str | None:
    """The interface on the route to `host`; None where that is this host itself, or no interface has the address.

    On a host with several networks NCCL and gloo would guess, and each host of a job might guess another one.
    """
    own = ipaddress.ip_address(address_towards(host, port).partition("%")[0])
    if own.is_loopback:
        return None
    import psutil  # here, so that who only reads starts quickly

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == str(own) for address in addresses):
            return str(name)
    return None


def listening_addresses() -> tuple[str, ...]:
    """ADDRESS:PORT of every TCP port on which this process, or the launcher that started it, listens."""
    import psutil

    found = set()
    for process in (psutil.Process(), psutil.Process().parent()):
        with contextlib.suppress(psutil.Error):  # the launcher is another user's, or gone
            for connection in process.net_connections("tcp") if process is not None else ():
                if connection.status == psutil.CONN_LISTEN:
                    found.add(f"{connection.laddr.ip}:{connection.laddr.port}")
    return tuple(sorted(found))
