# SPDX-License-Identifier: Apache-2.0
"""What the scheduler makes of target replicas of unequal speed, and what a work item costs the rank that hosts it.

    specdist bench scheduler                                                # the cases of docs/benchmarks.md
    specdist bench scheduler --speeds 1x7 0.5 --slots 16 --jitter 0.1       # one of your own
    specdist bench scheduler --speeds 1x64 --slots 8 --pods 8               # draft ranks in pods
    specdist bench scheduler --draft-ranks 1024 --replicas 128              # the cost of a larger world

The first table is a simulation with the real state machine and a clock of its own: the time of a forward at speed 1 is
1. `share` is what is trained, as a share of what the replicas would do if all had speed 1 and none ever waited; `ideal`
is what their speeds allow.

The second is processor time of one thread. `protocol_ms` is everything but the sockets: decoding and applying a
Computed, a Sent and one Released per draft rank of a pod, deciding and encoding the orders and the delivery.
`server_ms` is the whole server thread, its socket calls included, with real connections over loopback; it takes time
from the hosting rank's own Python code.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace

import zmq

from benchmarks.flow import CASES, Case, Times, World
from benchmarks.measure import as_command, command_line, count, count_or_none, table
from specdist.core.topology import Topology, reach
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.coordinator import Coordinator
from specdist.scheduler.messages import (
    PROTOCOL_VERSION,
    Computed,
    Deliver,
    Dispatch,
    Goodbye,
    Hello,
    Message,
    Ready,
    Released,
    Send,
    Sent,
    Stop,
    decode,
    encode,
)
from specdist.scheduler.scheduler import Scheduler
from specdist.scheduler.server import ControlServer
from specdist.scheduler.wire import identity, numbered, prove, split

_CONFIG = ControlConfig(heartbeat_s=60.0, silence_s=600.0)


@dataclass(frozen=True)
class SchedulerCost:
    """Cost per work item; see the module's docstring."""

    draft_ranks: int
    replicas: int
    items: int
    messages_per_item: int
    """Of the scheduler: Dispatch, Computed, Send, Sent, and a Deliver and a Released per draft rank of a pod."""
    protocol_ms: float
    protocol_us_per_release: float
    server_draft_ranks: int
    """Connections of the measurement with sockets; 0 if it was left out."""
    server_ms: float
    server_us_per_message: float


def measure(
    draft_ranks: int = 1024, replicas: int = 128, items: int = 200, connections: int = 128, pods: int = 1
) -> SchedulerCost:
    """Measure both costs; `connections` draft ranks take part over loopback (3 file descriptors each; 0: none do)."""
    protocol = protocol_seconds(draft_ranks, replicas, items, pods) / items
    server = server_seconds(connections, items, pods) / items if connections else 0.0
    return SchedulerCost(
        draft_ranks,
        replicas,
        items,
        messages_per_item=2 * draft_ranks // pods + 4,
        protocol_ms=protocol * 1e3,
        protocol_us_per_release=protocol * pods / draft_ranks * 1e6,
        server_draft_ranks=connections,
        server_ms=server * 1e3,
        server_us_per_message=server / (2 * connections // pods + 4) * 1e6,
    )


def measure_case(case: Case, items: int = 4000, seed: int = 0) -> float:
    """The share of a case, over the half of `items` items in the middle."""
    rng, replicas = random.Random(seed), len(case.speeds)
    scheduler = Scheduler(
        draft_ranks=case.pods,
        pods=case.pods,
        slots=case.slots,
        queue_depth=case.queue_depth,
        timeout=float("inf"),
        end_item=items,
    )
    for replica, pods in enumerate(reach(replicas, case.pods)):
        scheduler.add_replica(replica, pods)
    world = World(scheduler, replicas, Times.of(case, rng), case.send_buffers, end=items)
    world.run()
    begin, end = items // 4, items * 3 // 4
    return (end - begin) / (world.released_at[end] - world.released_at[begin]) / replicas


def protocol_seconds(draft_ranks: int, replicas: int, items: int, pods: int = 1) -> float:
    """Processor seconds in which the coordinator takes `items` items from dispatch to release, without sockets."""
    topology, scheduler = _world(draft_ranks, replicas, items, pods)
    outbox: list[bytes] = []

    def send(ranks: Iterable[int], payload: bytes) -> list[int]:
        outbox.append(payload)
        return []

    coordinator = Coordinator(scheduler, topology, _CONFIG, send, join_timeout_s=600.0, now=0.0)
    for rank in range(topology.world_size):
        coordinator.receive(rank, encode(Hello(PROTOCOL_VERSION, 0)), 0.0)
        coordinator.receive(rank, encode(Ready()), 0.0)
    coordinator.advance(0.0)
    replica_of = dict[int, int]()
    seconds = 0.0
    for item in range(items):
        replica_of |= {m.item: m.replica for m in map(decode, outbox) if isinstance(m, Dispatch)}
        rank = topology.replicas[replica_of[item]][0]
        computed, sent = encode(Computed(item)), encode(Sent(item))
        releases = [(r, encode(Released(item))) for (r,) in topology.pod(item % pods)]
        outbox.clear()
        begin = time.thread_time()
        for payload in (computed, sent):
            coordinator.receive(rank, payload, 0.0)
            coordinator.advance(0.0)
        for rank, payload in releases:
            coordinator.receive(rank, payload, 0.0)
        coordinator.advance(0.0)
        seconds += time.thread_time() - begin
    assert scheduler.finished
    return seconds


def server_seconds(draft_ranks: int, items: int, pods: int = 1) -> float:
    """Processor seconds of the server's thread for `items` items between real sockets of this machine."""
    topology, scheduler = _world(draft_ranks, 1, items, pods)
    token = bytes(16)
    server = ControlServer("127.0.0.1", token, topology, scheduler, _CONFIG, join_timeout_s=60.0)
    peers = threading.Thread(target=_play_ranks, args=(server.address, token, topology), daemon=True)
    peers.start()
    begin = time.thread_time()
    server.run()
    seconds = time.thread_time() - begin
    peers.join()
    server.close()
    assert scheduler.finished
    return seconds


def _world(draft_ranks: int, replicas: int, items: int, pods: int) -> tuple[Topology, Scheduler]:
    size = replicas + draft_ranks
    targets, drafts = tuple((r,) for r in range(replicas)), tuple((r,) for r in range(replicas, size))
    topology = Topology("split", ("host",) * size, targets, drafts, draft_ranks // pods, pods=pods)
    scheduler = Scheduler(
        draft_ranks=draft_ranks,
        pods=pods,
        slots=2 * replicas,
        queue_depth=2,
        timeout=600.0,
        end_item=items,
    )
    return topology, scheduler


def _play_ranks(address: str, token: bytes, topology: Topology) -> None:
    """All ranks of `topology` in one thread, each with its own connection, answering at once."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * topology.world_size + 16)
    poller, ranks = zmq.Poller(), dict[zmq.Socket[bytes], int]()
    sent = Counter[int]()

    def send(dealer: zmq.Socket[bytes], message: Message) -> None:
        dealer.send(numbered(sent[ranks[dealer]], encode(message)))
        sent[ranks[dealer]] += 1

    for rank in range(topology.world_size):
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.IDENTITY, identity(rank))
        prove(dealer, token)
        dealer.connect(address)
        ranks[dealer] = rank
        send(dealer, Hello(PROTOCOL_VERSION, 0))
        send(dealer, Ready())
        poller.register(dealer, zmq.POLLIN)
    left = set(ranks)
    while left:
        for dealer, _ in poller.poll():
            message = decode(split(dealer.recv())[1])
            if isinstance(message, Dispatch):
                send(dealer, Computed(message.item))
            elif isinstance(message, Send):
                send(dealer, Sent(message.item))
            elif isinstance(message, Deliver):
                send(dealer, Released(message.item))
            elif isinstance(message, Stop):
                send(dealer, Goodbye())
                left.remove(dealer)
    context.destroy(linger=2000)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("scheduler", __doc__)
    parser.add_argument("--speeds", nargs="+", default=[], help="of the replicas, such as 1x7 0.5; without: all cases")
    for field in fields(Case)[1:]:
        name, kind = "--" + field.name.replace("_", "-"), count if type(field.default) is int else float
        told = "" if name == "--pods" else "with --speeds; "
        parser.add_argument(name, type=kind, default=field.default, help=f"{told}default: %(default)s")
    parser.add_argument("--draft-ranks", type=count, default=1024)
    parser.add_argument("--replicas", type=count, default=128)
    parser.add_argument("--items", type=count, default=200)
    parser.add_argument("--connections", type=count_or_none, default=128, help="draft ranks over real sockets; 0: none")
    given = vars(parser.parse_args(arguments))
    own = {field.name: given.pop(field.name) for field in fields(Case)}
    try:
        cases = [Case.of(own.pop("speeds"), **own)] if own["speeds"] else CASES
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --speeds: SPEED or SPEEDxN: {error}")
    found = [{**asdict(case), "name": str(case), "share": measure_case(case), "ideal": case.ideal} for case in cases]
    print(json.dumps(found))
    columns: dict[str, str] = {"replicas": "name", "slots": "slots", "share": "share:.3f", "ideal": "ideal:.3f"}
    print(table(columns, [SimpleNamespace(**row) for row in found]))
    if own.get("speeds") == []:
        _report_cost(measure(**given, pods=own["pods"]))


def _report_cost(cost: SchedulerCost) -> None:
    print(json.dumps(asdict(cost)))
    columns = {
        "draft ranks": "draft_ranks", "protocol, ms per item": "protocol_ms:.3f",
        "us per release": "protocol_us_per_release:.3f", "over sockets": "server_draft_ranks",
        "server thread, ms per item": "server_ms:.3f", "us per message": "server_us_per_message:.3f",
    }  # fmt: skip
    print(table(columns, [cost]))


if __name__ == "__main__":
    as_command(main)
