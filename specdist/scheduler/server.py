# SPDX-License-Identifier: Apache-2.0
"""The scheduler's end of the control plane: a ROUTER socket and a thread on rank 0, beside that rank's own role."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable

import zmq
from zmq.utils.monitor import recv_monitor_message

from specdist.core.errors import WorldError
from specdist.core.topology import Topology
from specdist.core.worker import Worker
from specdist.scheduler.awake import AwakeClock
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.coordinator import Coordinator, Observer
from specdist.scheduler.messages import MAX_MESSAGE_BYTES
from specdist.scheduler.replicas import RemoteRules
from specdist.scheduler.scheduler import Scheduler
from specdist.scheduler.wire import HANDSHAKE_FAILED, Doorkeeper, identity, inproc_pair, is_remote, numbered, split

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_HELD_S = 3.0
"""An idle server looks up every `_TICK_S`: after a longer pause its process was suspended, or held up."""
_BATCH = 4096
"""Messages applied before the scheduler may answer: a flood of releases must not hold up a dispatch."""
_LINGER_MS = 2000
# As plain numbers: combining pyzmq's flags costs as much as decoding a message.
_NOBLOCK, _IDENTITY_FRAME = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


class ControlServer:
    """Binds to a free port of one interface; `address` goes to the other ranks with the token.

    Args:
        interface: IP address to bind to, the one that the other hosts reach. Not a wildcard.
        token: the run's secret; who does not have it is not let in, and counted in `peers`.
        scheduler, observer, rules: see Coordinator.
        port: the port to bind to; 0: a free one.
        join_timeout_s: seconds from now until every rank must have said hello.
    """

    def __init__(
        self,
        interface: str,
        token: bytes,
        topology: Topology,
        scheduler: Scheduler | None,
        config: ControlConfig,
        *,
        join_timeout_s: float,
        observer: Observer | None = None,
        rules: RemoteRules | None = None,
        port: int = 0,
    ):
        self._config, self._remote = config, rules is not None
        self._identities = [identity(rank) for rank in range(topology.world_size)]
        self._ranks = {peer: rank for rank, peer in enumerate(self._identities)}
        self._received, self._sent = Counter[int](), Counter[int]()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._door = Doorkeeper(self._router, token)
        self._events = self._router.get_monitor_socket(HANDSHAKE_FAILED)
        self._bind(interface, port)
        self._wake, self._woken = inproc_pair(self._context)
        self._poller = zmq.Poller()
        for socket in (self._router, self._woken, self._door.socket, self._events):
            self._poller.register(socket, zmq.POLLIN)
        self._clock = AwakeClock(_HELD_S)
        self._coordinator = Coordinator(
            scheduler,
            topology,
            config,
            self._send,
            join_timeout_s=join_timeout_s,
            now=self._clock(),
            observer=observer,
            rules=rules,
        )
        self.peers = self._coordinator.peers
        self._next_tick = self._clock()
        self._closing = False
        self._thread = Worker("specdist-control-server", self.run, self._ended)

    def start(self) -> ControlServer:
        self._thread.start()
        return self

    def run(self) -> None:
        """Serve until every rank has left (or was given time to, after a failure)."""
        while not self._closing and not self._coordinator.done(self._clock()):
            self.step(_TICK_S)

    def step(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for messages, apply those that are there, answer."""
        wait_s = min(timeout_s, max(self._next_tick - self._clock(), 0.0))
        for socket, _ in self._poller.poll(math.ceil(wait_s * 1000)):
            if socket is self._door.socket:
                self._door.answer()
            elif socket is self._events:
                recv_monitor_message(self._events)
                self._coordinator.refuse("a connection without this run's secret")
        now = self._clock()
        drained = self._receive_batch(now)
        self._coordinator.advance(now)
        if drained and now >= self._next_tick:  # never call a rank silent whose words have not been read yet
            self._next_tick = now + _TICK_S
            self._coordinator.tick(now)

    def check(self) -> None:
        """Raise the world's failure, or what ended the server's thread, if there was one."""
        if self._thread.error is not None:
            raise self._thread.error
        if self._coordinator.aborted is not None:
            raise self._coordinator.aborted.error()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until every rank has left. Without `timeout_s` as long as all that have not show signs of life. Raises
        WorldError: the run failed, or some rank has not left within `timeout_s`."""
        self._thread.join(timeout_s)
        if timeout_s is not None and self._thread.is_alive():
            now = self._clock()
            listed = self.peers.describe_all(self.peers.present, now)
            raise WorldError(f"after {timeout_s:.0f} s these ranks have not left the control plane:\n{listed}")
        self.check()

    def close(self) -> None:
        """End the server, whatever state it is in, without a message to the ranks."""
        if self._thread.is_alive():
            self._closing = True
            self._wake.send(b"")
            self._thread.join()
        for socket in (self._wake, self._woken, self._router, self._events, self._door.socket):
            socket.close(0)  # the thread has closed the router already, if it ran
        self._context.term()

    def __enter__(self) -> ControlServer:
        return self.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """After an error: give the other ranks time to receive it. Else wait until they have left."""
        try:
            if error is None:
                self.join(self._config.silence_s)
            else:
                self._thread.join(2 * self._config.heartbeat_s)
        finally:
            self.close()

    def _ended(self, error: BaseException | None) -> None:
        try:
            if error is not None:
                logger.error("the scheduler failed", exc_info=error)
                self._coordinator.abort(0, f"the scheduler failed: {type(error).__name__}: {error}", self._clock())
        finally:
            self._router.disable_monitor()
            awaited = self.peers.present or self._remote  # a target world that has just come is told of the end, too
            self._router.close(_LINGER_MS if awaited else 0)

    def _bind(self, interface: str, port: int) -> None:
        if interface in ("*", "0.0.0.0", "::", ""):
            raise ValueError(f"the control socket binds to one interface address, not to '{interface}'")
        router = self._router
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a message to a lost peer is an error, not dropped
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects takes its place again
        router.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        router.setsockopt(zmq.SNDHWM, 0)  # credits bound what is queued
        router.setsockopt(zmq.RCVHWM, 0)
        router.setsockopt(zmq.LINGER, 0)  # of each connection: what is left for a peer that has gone is never sent
        router.setsockopt(zmq.IPV6, int(":" in interface))
        host = f"[{interface}]" if ":" in interface else interface
        try:
            if port:
                router.bind(f"tcp://{host}:{port}")
            else:
                port = router.bind_to_random_port(f"tcp://{host}")
        except zmq.ZMQError as error:
            self._context.destroy(0)
            where = f"{interface}, port {port}" if port else interface
            raise WorldError(f"rank 0 cannot open its control socket on {where}: {error}") from error
        self.address = f"tcp://{host}:{port}"

    def _receive_batch(self, now: float) -> bool:
        """Apply the messages that are there, up to a batch; whether these were all."""
        for _ in range(_BATCH):
            try:
                frames = self._router.recv_multipart(_NOBLOCK)
            except zmq.Again:
                return True
            self._receive(frames, now)
        return False

    def _receive(self, frames: list[bytes], now: float) -> None:
        rank = self._ranks.get(frames[0])
        if rank is None and self._remote and is_remote(frames[0]):
            rank = self._ranks[frames[0]] = self.peers.admit(now)
            self._identities.append(frames[0])
        if rank is None or len(frames) != 2:
            self._coordinator.refuse("a control message that is no rank's")
            return
        number, payload = split(frames[1])
        if number != self._received[rank]:
            self._coordinator.miss(rank, now)
        self._received[rank] = number + 1
        self._coordinator.receive(rank, payload, now)

    def _send(self, ranks: Iterable[int], payload: bytes) -> list[int]:
        lost = []
        for rank in ranks:
            frame = numbered(self._sent[rank], payload)
            self._sent[rank] += 1
            try:
                self._router.send(self._identities[rank], _IDENTITY_FRAME)
                self._router.send(frame, _NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                lost.append(rank)
        return lost
