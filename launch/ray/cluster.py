# SPDX-License-Identifier: Apache-2.0
"""A running Ray cluster: which one, how to reach it, and equal shares of its GPU hosts, reserved all at once."""

import contextlib
import importlib.util
import ipaddress
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from specdist.core.errors import ConfigError, UserError, say

_PORT_S = 5.0
"""How long a cluster's port may take to accept a connection."""
_CONNECT_S = 30.0
"""How long Ray may take to join a cluster."""
_SILENT_S = 5.0
"""How long a wait for GPUs is not worth a word."""
_SLICE_S = 1.0
"""No signal is handled during Ray's waits, so they are cut into slices of this length."""


@dataclass(frozen=True)
class GpuHost:
    node: str
    """Ray's id of the node."""
    address: str
    name: str
    gpus: int
    strategy: Any = None
    """Ray's scheduling strategy that puts a task onto the GPUs that are reserved here."""


class Shape(NamedTuple):
    """What a job asks of a cluster: hosts with GPUs, the same number on each, one rank a GPU."""

    hosts: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.hosts} x {self.gpus} GPUs"


def cluster_address(option: str | None, environment: Mapping[str, str]) -> str:
    """HOST:PORT of the cluster that the user named; never one that happens to run on this host. `option`: what the
    command line says; then RAY_ADDRESS counts, then what KubeRay tells the pods of a cluster. Raises UserError: there
    is none, or it is none that a job can be started through."""
    service = environment.get("FQ_RAY_IP")
    kubernetes = f"{service}:{environment.get('RAY_PORT', '6379')}" if service else None
    address = option or environment.get("RAY_ADDRESS") or kubernetes
    if not address:
        raise UserError(
            "no Ray cluster is named, and none is joined by accident: give --address HOST:6379 or set RAY_ADDRESS; "
            "`specdist train` starts the job on this machine"
        )
    if address.startswith("ray://"):
        host = address.removeprefix("ray://").rpartition(":")[0]
        raise UserError(
            f"{address} is the address of a Ray client, which cannot stream a job's output: start the job on a host of "
            f"the cluster, with `ray job submit --address http://{host}:8265 -- specdist launch ray ...` or `kubectl "
            "exec` (docs/ray.md)"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"a Ray cluster's address is HOST:PORT (its head's, mostly port 6379), not '{address}'")
    return address


def connect(address: str) -> None:
    """Join the cluster as a driver. Raises UserError: it does not answer in time, or does not take this driver."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("starting a job on a Ray cluster needs Ray: pip install -e '.[ray]'")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PORT_S).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}): if it was stopped or has moved, start it with "
            "`ray start --head`, or correct --address or RAY_ADDRESS"
        ) from error
    # In a process of its own first: where Ray cannot join, it waits for minutes and then aborts its process.
    program = f"import ray; ray.init({address!r}, log_to_driver=False)"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_CONNECT_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{address} accepts connections, but Ray has not joined it within {_CONNECT_S:.0f} s: is that the port of "
            "the head (`ray start --head --port`), and does this host belong to the cluster?"
        ) from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise UserError(f"Ray does not join {address}: {lines[-1]}")
    import ray

    # Ray lowers the priority of its tasks (niceness 15), and ranks, their children, would wait for any busy process.
    priority = {"env_vars": {"RAY_worker_niceness": "0"}}
    ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env=priority)


def gpu_hosts() -> list[GpuHost]:
    """The living hosts of the cluster that have GPUs, taken or not, in the order of their addresses."""
    import ray

    hosts = []
    for node in ray.nodes():
        gpus = int(node["Resources"].get("GPU", 0))
        if node["Alive"] and gpus > 0:
            hosts.append(GpuHost(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"], gpus))
    return in_order(hosts)


def in_order(hosts: Sequence[GpuHost]) -> list[GpuHost]:
    """Hosts by address, so that a job's ranks are on the same hosts however often it is started."""

    def key(host: GpuHost) -> tuple[int, int, str, str]:
        try:
            address = ipaddress.ip_address(host.address)
        except ValueError:  # a name
            return 0, 0, host.address, host.node
        return address.version, int(address), "", host.node

    return sorted(hosts, key=key)


def choose_shape(ranks: int | None, hosts: int | None, gpus: int | None, cluster: Sequence[GpuHost]) -> Shape:
    """The hosts and the GPUs of each that a job of `ranks` ranks takes; None: as many as there are. `hosts`, `gpus`:
    what the user asks for; what is None follows from the ranks, or from the cluster as it is. Raises ConfigError: with
    the arithmetic that does not come out."""
    if ranks is None:
        gpus = gpus or _largest(cluster)
        return Shape(hosts or max(sum(host.gpus >= gpus for host in cluster), 1), gpus)
    if hosts is None and gpus is None:
        hosts = next(n for n in range(-(-ranks // _largest(cluster)), ranks + 1) if ranks % n == 0)
    hosts = hosts or max(ranks // (gpus or 1), 1)
    shape = Shape(hosts, gpus or max(ranks // hosts, 1))
    if shape.hosts * shape.gpus != ranks:
        raise ConfigError(
            f"{shape} are not the job's {ranks} ranks (target.replicas x target.tp + draft.dp x draft.cp): change "
            "--nodes, --gpus-per-node or one of those",
            "target.replicas target.tp draft.dp draft.cp",
        )
    return shape


def _largest(cluster: Sequence[GpuHost]) -> int:
    if not cluster:
        raise ConfigError(
            "the Ray cluster has no GPU host yet: say what to wait for with --nodes and --gpus-per-node (on machines "
            "without GPUs, `ray start --num-gpus=N` declares the ranks that a host may have)"
        )
    return max(host.gpus for host in cluster)


@contextlib.contextmanager
def reserve(shape: Shape, wait_s: float) -> Iterator[list[GpuHost]]:
    """Hold the GPUs of a job's hosts, in rank order; all or none, so that two jobs cannot hold half of them each.
    Raises UserError: they were not free within `wait_s` seconds; says what there is."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"GPU": shape.gpus}] * shape.hosts, strategy="STRICT_SPREAD")
    try:
        start, announced = time.monotonic(), False
        while not group.wait(min(_SLICE_S, wait_s)):
            waited = time.monotonic() - start
            have = describe_cluster(shape, gpu_hosts(), ray.available_resources().get("GPU", 0.0))
            if waited >= wait_s:
                raise UserError(
                    f"{have}; the job needs {shape.hosts} hosts with {shape.gpus} free GPUs each, and they did not "
                    f"come within {wait_s:.0f} s (--wait): start more Ray nodes, or ask for fewer (--nodes, "
                    "--gpus-per-node)"
                )
            if waited >= _SILENT_S and not announced:
                say(f"{have}; waiting up to {wait_s:.0f} s for {shape}")
                announced = True
        bundles = {node: bundle for bundle, node in ray.util.placement_group_table(group)["bundles_to_node_id"].items()}
        yield [
            replace(host, strategy=PlacementGroupSchedulingStrategy(group, bundles[host.node]))
            for host in gpu_hosts()
            if host.node in bundles
        ]
    finally:
        remove_placement_group(group)


def describe_cluster(shape: Shape, cluster: Sequence[GpuHost], free: float) -> str:
    total = sum(host.gpus for host in cluster)
    hosts = ", ".join(f"{host.address} ({host.gpus})" for host in cluster) or "none"
    taken = f", {total - free:g} of them taken by others" if total > free else ""
    return f"have {total} of {shape.hosts * shape.gpus} GPUs, hosts {hosts}{taken}"
