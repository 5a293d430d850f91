# SPDX-License-Identifier: Apache-2.0
"""A rank's end of the control plane.

One thread owns the socket: it sends what other threads put into its outbox, keeps what arrives until it is polled,
and shows the scheduler every few seconds that this process lives and what it is doing. A failure anywhere in the world,
or a scheduler that has gone silent, ends every wait here with a WorldError that names the culprit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from specdist.core.attempts import Failure
from specdist.core.clock import ClockReading
from specdist.core.errors import UserError, WorldError
from specdist.core.launch_env import TOKEN
from specdist.core.stop import StopFlag, StopReason
from specdist.core.worker import Worker
from specdist.scheduler import messages
from specdist.scheduler.awake import AwakeClock
from specdist.scheduler.config import ControlConfig
from specdist.scheduler.wire import HANDSHAKE_FAILED, identity, inproc_pair, numbered, prove, split

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer", messages.Welcome, messages.StartWork, messages.Reports, messages.ClockProbe)

_CLOSE = b""
_LINGER_MS = 2000
_LINGER_AFTER_ABORT_MS = 300
_STOP_POLL_S = 0.5
_HELD_S = 2.0
"""The loop looks up as often as it sends heartbeats: after a pause that is so much longer it was suspended."""
_PHASE_S = 1.0
"""A new phase is sent at once, but not more often than this: heartbeats carry it anyway."""


class ControlClient:
    """Connects a rank to the scheduler. Everything but `close` may be used from any thread, but nothing from a signal
    handler (set a flag there).

    Args:
        address: `ControlServer.address`, as handed out by rank 0.
        scheduler: how errors name the rank at the other end.
        on_abort: called once, in the client's thread, when the world has failed: to end the process if the main thread
            is stuck in a collective. It does not wait for anything.
        stop: this process's request to stop; the client passes it on, whatever the main thread is busy with.
        place: of a rank of a target world, which is not one of the scheduler's; `rank` is then its number in its own
            world until `Welcome` gives it another.
    """

    def __init__(
        self,
        address: str,
        token: bytes,
        rank: int,
        config: ControlConfig,
        *,
        scheduler: str = "rank 0",
        on_abort: Callable[[UserError], None] | None = None,
        stop: StopFlag | None = None,
        place: messages.RemotePlace | None = None,
    ):
        self._hello = messages.Hello(messages.PROTOCOL_VERSION, os.getpid(), place)
        self.rank, self.statistics = -2 if place else rank, messages.Statistics()  # -2: not to blame for anything yet
        self.step = -1
        """Optimizer steps done, for the scheduler's reports; free to set."""
        self.trouble = ""
        """What is wrong with saving, for the same; free to set."""
        self._stop, self._stop_sent = stop, False
        self._config, self._on_abort = config, on_abort
        self._scheduler = f"{scheduler}, the scheduler at {address},"
        self._phase, self._phase_sent = ("starting", time.monotonic()), 0.0
        self._error: BaseException | None = None
        self._failed = threading.Event()
        self.abort: messages.Abort | None = None
        """The world's failure as rank 0 has sent it."""
        self.stop: messages.Stop | None = None
        """The end of the work, once the scheduler has sent it; what breaks after it does not matter any more."""
        self.rings: dict[int, str] = {}
        """Target worlds: where the memory of each draft rank is, as far as the scheduler has sent it."""
        # None in one of these: the world has failed.
        self._inbox: queue.SimpleQueue[messages.Message | None] = queue.SimpleQueue()
        kinds = (messages.Welcome, messages.StartWork, messages.ClockProbe, messages.Reports)
        self._answers: dict[type, queue.SimpleQueue[Any]] = {kind: queue.SimpleQueue() for kind in kinds}
        self._lock = threading.Lock()
        self._open = True
        self._context = zmq.Context()
        self._outbox, self._outgoing = inproc_pair(self._context)
        self._dealer = self._context.socket(zmq.DEALER)
        prove(self._dealer, token)
        self._monitor = self._dealer.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILED
        )
        self._dealer.setsockopt(zmq.IDENTITY, identity(rank, place.world if place else ""))
        for option, value in ((zmq.SNDHWM, 0), (zmq.RCVHWM, 0), (zmq.IPV6, int("[" in address))):
            self._dealer.setsockopt(option, value)
        self._dealer.connect(address)
        self._lost_at: float | None = None
        self._refused = False
        self._sent = self._received = 0
        self._thread = Worker("specdist-control-client", self._loop, self._ended)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the world has failed, or its scheduler is gone."""
        return self._error is not None

    @property
    def phase(self) -> str:
        """What this rank is doing, in words, for errors of ranks that wait for it; free to set."""
        return self._phase[0]

    @phase.setter
    def phase(self, text: str) -> None:
        now = time.monotonic()
        self._phase = (text, now)
        if now - self._phase_sent >= _PHASE_S:
            self._phase_sent = now
            self._post(self._heartbeat(now))

    def ready(self) -> None:
        """This rank can take its part; nothing is dispatched before all ranks said so."""
        self.phase = "waiting for the other ranks"
        self.send(messages.Ready())

    def send(self, message: messages.Message) -> None:
        """Hand a message to the scheduler, in order, without waiting. Raises WorldError: the world has failed."""
        self.check()
        self._post(message)

    def poll(self, timeout_s: float) -> list[messages.Message]:
        """All messages that are there, in order; waits up to `timeout_s` for the first, and returns none if none came.
        Raises WorldError: the world has failed; names the rank, its role and host."""
        self.check()
        come: list[messages.Message] = []
        try:
            message = self._inbox.get(timeout=timeout_s)
            while message is not None:
                come.append(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass  # everything that was there is taken
        self.check()
        return come

    def expect(self, kind: type[Answer], timeout_s: float | None = None) -> Answer | None:
        """The next message of one of the kinds that `poll` leaves out: `Welcome`, `StartWork` (the scheduler names the
        ranks that are not ready in time), `Reports` or `ClockProbe`. None after `timeout_s` seconds. Raises WorldError:
        the world has failed."""
        self.check()
        try:
            answer: Answer | None = self._answers[kind].get(timeout=timeout_s)
        except queue.Empty:
            return None
        self.check()
        return answer

    def ask_clock(self, timeout_s: float) -> ClockReading:
        """What rank 0's clock says. One thread asks at a time. Raises WorldError: no answer in `timeout_s` seconds."""
        asked, deadline = time.time_ns(), time.monotonic() + timeout_s
        self.send(messages.ClockProbe(asked))
        while True:
            answer = self.expect(messages.ClockProbe, max(deadline - time.monotonic(), 0.0))
            if answer is None:
                raise WorldError(f"{self._scheduler} did not say what time it is within {timeout_s:.0f} s")
            if answer.asked == asked:  # else the late answer to a question that was given up
                return ClockReading(asked, answer.told, answer.answered)

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """Tell everyone that this rank failed. Does not raise: the caller's own error is the one to show here."""
        self._post(self._heartbeat(time.monotonic()))  # what it was doing
        failure, shorten = Failure.of(error), messages.shorten
        failure = replace(failure, message=shorten(failure.message), traceback=shorten(failure.traceback))
        self._post(messages.Failed(failure))

    def close(self) -> None:
        """Leave: what was sent still goes out. Safe to call twice."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            self._outbox.send(messages.encode(messages.Goodbye()))
            self._outbox.send(_CLOSE)
        self._thread.join()
        self._outbox.close(0)
        self._outgoing.close(0)
        self._context.term()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """After an error of this rank's own: say so, and raise the world's failure instead if another rank began it.

        Until the verdict is there the process stays, so that no connection of it breaks before the others know why.
        """
        if error is not None and error is not self._error:
            self.fail(error)
            self._failed.wait(2 * self._config.heartbeat_s)
        self.close()
        own = isinstance(self._error, WorldError) and self._error.culprit == self.rank
        if isinstance(error, Exception) and self._error is not None and not own:
            raise self._error from error

    def _heartbeat(self, now: float) -> messages.Heartbeat:
        text, since = self._phase
        return messages.Heartbeat(now - since, self.step, text, messages.shorten(self.trouble))

    def _post(self, message: messages.Message) -> None:
        with self._lock:
            if self._open:
                self._outbox.send(messages.encode(message))

    def _ended(self, error: BaseException | None) -> None:
        try:
            if error is not None:
                logger.error("rank %d: the control client failed", self.rank, exc_info=error)
                self._break(error)
        finally:
            self._dealer.disable_monitor()
            self._monitor.close(0)
            self._dealer.close(_LINGER_MS if self._error is None else _LINGER_AFTER_ABORT_MS)

    def _loop(self) -> None:
        poller = zmq.Poller()
        for socket in (self._outgoing, self._dealer, self._monitor):
            poller.register(socket, zmq.POLLIN)
        clock = AwakeClock(self._config.heartbeat_s + _HELD_S)
        heard = now = next_beat = clock()
        self._put(messages.encode(self._hello))
        while True:
            wake = next_beat if self._lost_at is None else min(next_beat, self._lost_at + self._config.heartbeat_s)
            if self._stop is not None and not self._stop_sent:
                wake = min(wake, now + _STOP_POLL_S)  # a signal handler can only set a flag
            poller.poll(math.ceil(max(wake - now, 0.0) * 1000))
            if self._stop and not self._stop_sent:  # before what the main thread said after it: Ready may be among it
                self._stop_sent = True
                self._put(messages.encode(messages.StopRequest(self._stop.reason or StopReason.ANOTHER_RANK)))
            if self._send_all():
                return
            received = self._receive_all()
            now = clock()
            if received:
                heard = now
            if now >= next_beat:
                self._put(messages.encode(self._heartbeat(time.monotonic())))
                next_beat = now + self._config.heartbeat_s
            self._watch_connection(now)
            if self._error is None:
                self._check_scheduler(now, heard)
            else:
                self._lost_at = None

    def _put(self, payload: bytes) -> None:
        """Send, or drop it where what came from the other end was no message: ZeroMQ then gives the connection up, and
        a blocking send would wait for another one for ever."""
        with contextlib.suppress(zmq.Again):
            self._dealer.send(numbered(self._sent, payload), zmq.NOBLOCK)
        self._sent += 1

    def _watch_connection(self, now: float) -> None:
        """Note since when the connection is down; ZeroMQ restores one that a network broke by itself."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._lost_at, self._refused = None, False
                continue
            self._refused = self._refused or bool(event & HANDSHAKE_FAILED)
            self._lost_at = now if self._lost_at is None else self._lost_at

    def _check_scheduler(self, now: float, heard: float) -> None:
        if self._lost_at is not None and now - self._lost_at >= self._config.heartbeat_s:
            what = f"is gone: the connection to it from rank {self.rank} is lost"
            if self._refused:
                what = f"does not let rank {self.rank} in: the secret ({TOKEN}) is another one there"
        elif now - heard > self._config.silence_s:
            limit = f"{self._config.silence_s:.0f} s (control.silence_s)"
            what = f"has sent rank {self.rank} nothing for more than {limit}"
        else:
            return
        self._break(WorldError(f"{self._scheduler} {what}", culprit=0))

    def _send_all(self) -> bool:
        """Pass on the outbox; whether the client is to close."""
        while self._outgoing.poll(0):
            payload = self._outgoing.recv()
            if payload == _CLOSE:
                return True
            self._put(payload)
        return False

    def _receive_all(self) -> bool:
        """Take what has arrived; whether there was anything."""
        received = False
        while self._dealer.poll(0):
            number, payload = split(self._dealer.recv())
            if number != self._received and self._error is None and self.stop is None:
                what = f"has sent messages that did not reach rank {self.rank}: they were lost with the connection"
                lost = WorldError(f"{self._scheduler} {what}", culprit=0)
                self._put(messages.encode(messages.Failed(Failure.of(lost))))
                self._break(lost)
            self._received = number + 1
            self._take(messages.decode(payload))
            received = True
        return received

    def _take(self, message: messages.Message) -> None:
        match message:
            case messages.Pulse(statistics):
                self.statistics = statistics
            case messages.Abort():
                self.abort = message
                self._break(message.error())
            case messages.ClockProbe():
                self._answers[messages.ClockProbe].put(msgspec.structs.replace(message, answered=time.time_ns()))
            case messages.RingAddress(draft, endpoint):
                self.rings[draft] = endpoint
            case messages.Welcome() | messages.StartWork() | messages.Reports():
                self.rank = message.rank if isinstance(message, messages.Welcome) else self.rank
                self._answers[type(message)].put(message)
            case _:
                self.stop = message if isinstance(message, messages.Stop) else self.stop
                self._inbox.put(message)

    def _break(self, error: BaseException) -> None:
        """Remember the world's failure, the first one, and wake all threads that wait."""
        if self._error is not None:
            return
        self._error = error
        if self._on_abort is not None:  # before any thread goes on of it
            self._on_abort(error if isinstance(error, UserError) else WorldError(f"{type(error).__name__}: {error}"))
        self._failed.set()
        for inbox in (self._inbox, *self._answers.values()):
            inbox.put(None)
