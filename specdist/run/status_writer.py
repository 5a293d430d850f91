# SPDX-License-Identifier: Apache-2.0
"""What rank 0 reports of a run: status.json every few seconds, long silences on the terminal, the first failure."""

import contextlib
import logging
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait

from specdist.core.attempts import Ending, Failure
from specdist.core.errors import say
from specdist.core.files import to_json
from specdist.core.stop import StopReason
from specdist.job.resume_plan import ResumePlan
from specdist.run.context import WorldContext
from specdist.run.status import Status
from specdist.scheduler.coordinator import Observer
from specdist.scheduler.messages import Statistics
from specdist.scheduler.peers import Peers, Phase
from specdist.scheduler.scheduler import Scheduler
from specdist.training.profile import NO_PROFILE, Profile

logger = logging.getLogger(__name__)

_QUIET_S = 20.0
"""Seconds without progress after which the terminal shows what the ranks are doing; then twice as many, and so on."""
_STALLED_S = 60.0
"""Seconds without progress in training after which the status says that the run has stalled."""
_CLOSE_S = 10.0
"""Seconds at the end for the last status, which a file server that does not answer would keep for ever."""
_SHOWN = 3
"""Phases that are shown at once, at most."""


class StatusWriter(Observer):
    """Writes on rank 0, in the control server's thread, also the file that `specdist status` reads, at every pulse."""

    def __init__(self, context: WorldContext, resume: ResumePlan, profile: Profile = NO_PROFILE):
        self._run_dir, self._record, self._attempt = context.run_dir, context.record, context.start.attempt
        self._resume, self._profile = resume, profile
        self._silent_s = 4 * context.job.control.heartbeat_s
        """Without a sign of life for longer a rank has stalled."""
        self._told = context.start.told
        self._writer = ThreadPoolExecutor(1, "specdist-status")
        self._writing: Future[None] | None = None
        self._unwritten: str | None = None
        self._moved_at = 0.0
        self._progress = -1
        self._quiet_s = _QUIET_S

    def failed(self, failure: Failure) -> None:
        self._told.set()  # this rank may have left the control plane before, and not hear of it there
        self._record.tell(failure, sys.stderr)

    def dismissed(self, rank: int, reason: StopReason) -> None:
        step = self._resume.progress.step
        ending = Ending("stopped", step, reason, f" on rank {rank}, before the first step")
        with contextlib.suppress(OSError):  # there is nothing that is lost with it
            self._record.end(ending)
        say(f"stopped at step {step} ({ending.why}); the same command goes on from there.")

    def pulse(self, peers: Peers, statistics: Statistics, started: bool, now: float) -> None:
        phases, step = peers.phases(now), max(peers.step, self._resume.progress.step)
        quiet_s = self._quiet_for(step, statistics.released, started, now)
        status = Status(
            attempt=self._attempt.name,
            deadline=self._attempt.deadline,
            hosts=peers.hosts,
            started=started,
            step=step,
            total_steps=self._resume.total_steps,
            statistics=statistics,
            phases=tuple(phases),
            places=peers.places,
            dropped=peers.refused + peers.malformed,
            stalled=self._stalled(peers, phases, quiet_s if started else 0, now),
            trouble=peers.trouble,
        )
        self._write(to_json(status))
        if quiet_s >= self._quiet_s:
            self._break_the_silence(phases, started, quiet_s)

    def advanced(self, scheduler: Scheduler, now: float) -> None:
        """Give the timeline the items at the targets, and the slots of a ring."""
        if not self._profile.on:
            return
        s, first = scheduler.statistics(now), self._resume.progress.next_item
        counts = {"computing": s.computing, "queued": s.queued, "held": s.held}
        counts |= {"delivered": s.delivered - s.released, "free": s.free}
        self._profile.count_slots(first + s.released, first + s.dispatched, counts)

    def _write(self, text: str) -> None:
        """Replace the status file, in a thread: a slow file system must not hold up the scheduler. A text that comes
        while it is still busy with an earlier one waits for the next pulse."""
        self._unwritten = text
        if self._writing is not None:
            if not self._writing.done():
                return
            error = self._writing.exception()
            if error is not None:
                logger.warning("%s cannot be written: %s", self._run_dir.status, error)
        self._unwritten = None
        self._writing = self._writer.submit(self._run_dir.write, self._run_dir.status, text)

    def close(self) -> None:
        if self._unwritten is not None:
            self._writing = self._writer.submit(self._run_dir.write, self._run_dir.status, self._unwritten)
        self._writer.shutdown(wait=False)
        if self._writing is not None and wait([self._writing], _CLOSE_S).not_done:
            say(f"{self._run_dir.status} was not written within {_CLOSE_S:.0f} s: its file system does not answer")

    def _quiet_for(self, step: int, released: int, started: bool, now: float) -> float:
        """Seconds since the last progress; 0 once all is trained: an evaluation shows progress of its own."""
        progress = step + released
        if progress != self._progress:
            self._progress, self._moved_at, self._quiet_s = progress, now, _QUIET_S
        return 0.0 if started and step >= self._resume.total_steps else now - self._moved_at

    def _stalled(self, peers: Peers, phases: list[Phase], quiet_s: float, now: float) -> str:
        if silent := peers.silent(now, self._silent_s):
            seconds = now - peers[silent[0]].heard_at
            return f"{seconds:.0f} s: {peers.name(silent[0])} silent for {seconds:.0f} s"
        return f"{quiet_s:.0f} s: no step done, {_describe(phases[0])}" if phases and quiet_s >= _STALLED_S else ""

    def _break_the_silence(self, phases: list[Phase], started: bool, quiet_s: float) -> None:
        self._quiet_s *= 2
        what = "no step done for" if started else "starting,"
        doing = "; ".join(_describe(phase) for phase in phases[:_SHOWN])
        say(f"{what} {quiet_s:.0f} s: {doing}")


def _describe(phase: Phase) -> str:
    who = f"{phase.count} {phase.role} rank{'s' if phase.count > 1 else ''}"
    return f"{who} {phase.what} (rank {phase.rank} on {phase.host} for {phase.seconds:.0f} s)"
