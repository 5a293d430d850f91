# SPDX-License-Identifier: Apache-2.0
"""Hidden states of earlier epochs: each sequence's in a file of its own, whatever it is packed with.

A file has the bits that were computed, under a name made of the tokens, in a folder named by all else that decides
them. What other runs have left makes room, the oldest first; what this run has read or written stays, for in a shuffled
epoch every sequence is as likely to be next, and what does not fit any more is computed. A directory that fails, or is
slower than computing, is left: one line says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from specdist.core.device_timer import DeviceTimer
from specdist.core.errors import say
from specdist.core.files import of_full_disk, unwritable
from specdist.core.records import PackedTokens
from specdist.target.base import TargetModel
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription
from specdist.target.weights import weight_files

PATIENCE_S = 20.0
"""A batch whose files are not read within this time ends the use of the directory."""
PENDING_BYTES = 2**30
"""What may wait to be written; sequences beyond are not kept this time."""
JUDGED_S = 5.0
"""Seconds of reading and of computing after which the two are compared."""
_READERS = 8


@dataclass(frozen=True)
class CacheDirectory:
    """Where a rank keeps hidden states.

    Attributes:
        limit: bytes that all ranks of this host keep there.
        index: this rank's number among the `of` ranks of the host that write there; None: it only reads.
    """

    path: Path
    limit: int
    index: int | None = 0
    of: int = 1

    @classmethod
    def shared(
        cls, path: Path, limit: int, rank: int, replicas: Sequence[Sequence[int]], hosts: Sequence[str]
    ) -> CacheDirectory:
        """That of `rank`. `hosts`: of every rank; on each the first rank of a replica writes what the others read."""
        here = ([member for member in ranks if hosts[member] == hosts[rank]] for ranks in replicas)
        writers = [ranks[0] for ranks in here if ranks]
        return cls(path, limit, writers.index(rank) if rank in writers else None, len(writers))


def name_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class CacheFiles:
    """The files of one rank's target. Reads wait; what is to be kept is written by a thread.

    Attributes:
        reading, writing: whether the directory is still used.
        pending: bytes that wait to be written.
    """

    def __init__(self, where: CacheDirectory, key: str, row_bytes: int) -> None:
        """`row_bytes`: of a token."""
        self._where, self._folder, self._row_bytes = where, where.path / key, row_bytes
        self._room, self._used, self.pending = where.limit // where.of, 0, 0
        self._old: dict[Path, int] = {}
        self._lock, self._read_s, self._read_tokens = threading.Lock(), 0.0, 0
        self._readers = ThreadPool(_READERS)
        self._jobs: queue.SimpleQueue[tuple[torch.cuda.Event | None, str, Tensor]] = queue.SimpleQueue()
        self.reading = self.writing = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if (error := unwritable(self._folder)) is not None:
                raise error
            self._look()
        except OSError as error:
            self._leave(f"cannot be used ({error})")
        threading.Thread(target=self._write_all, name="specdist-cache", daemon=True).start()

    def _look(self) -> None:
        """What earlier runs have left, the oldest first; each rank looks after its part."""
        entries = []
        for file in self._where.path.glob("*/*"):
            if int(name_of(file.name.encode()), 16) % self._where.of == self._where.index:
                with contextlib.suppress(FileNotFoundError):
                    entries.append((file.stat().st_mtime, file, file.stat().st_size))
        self._old = {file: size for _, file, size in sorted(entries)}
        self._used = sum(self._old.values())

    def read(self, names: Sequence[str], lengths: Sequence[int]) -> list[Tensor | None]:
        """The bytes of each sequence, uint8 on the CPU; None of those that are not there."""
        nothing: list[Tensor | None] = [None] * len(names)
        if not self.reading:
            return nothing
        began = time.monotonic()
        try:
            found = self._readers.starmap_async(self._one, zip(names, lengths, strict=True)).get(PATIENCE_S)
        except multiprocessing.TimeoutError:
            self._leave(f"did not answer within {PATIENCE_S:.0f} s")
            return nothing
        except OSError as error:
            self._leave(f"cannot be read ({error})")
            return nothing
        if tokens := sum(n for n, held in zip(lengths, found, strict=True) if held is not None):
            self._read_s, self._read_tokens = self._read_s + time.monotonic() - began, self._read_tokens + tokens
        return found

    def _one(self, name: str, tokens: int) -> Tensor | None:
        file = self._folder / name
        try:
            data = np.fromfile(file, dtype=np.uint8)
        except FileNotFoundError:
            return None
        with self._lock:
            self._old.pop(file, None)  # it is used, so it stays
        return torch.from_numpy(data) if len(data) == tokens * self._row_bytes else None

    def judge(self, tokens: int, seconds: float) -> None:
        """Leave a directory from which tokens come slower than they are computed: so many in that time."""
        if self.reading and min(self._read_s, seconds) > JUDGED_S:
            read, computed = self._read_tokens / self._read_s, tokens / seconds
            if read < computed:
                self._leave(f"is slow: {read:,.0f} tokens/s are read, {computed:,.0f} computed")

    def keep(self, sequences: Sequence[tuple[str, Tensor]]) -> None:
        """Keep rows of sequences, by name, once the device has done what is queued on its current stream."""
        for name, rows in sequences:
            with self._lock:
                if not self.writing or self.pending + rows.nbytes > PENDING_BYTES:
                    return
                self.pending += rows.nbytes
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
            host.copy_(rows, non_blocking=True)
            copied = torch.cuda.Event() if rows.is_cuda else None
            if copied is not None:
                copied.record()
            self._jobs.put((copied, name, host))

    def _write_all(self) -> None:
        while True:
            copied, name, rows = self._jobs.get()
            if copied is not None:
                copied.synchronize()
            if self.writing:
                self._write(self._folder / name, rows)
            with self._lock:
                self.pending -= rows.nbytes

    def _write(self, file: Path, rows: Tensor) -> None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            if file.exists() or not self._make_room(rows.nbytes):
                return
            temporary.write_bytes(rows.view(torch.uint8).numpy().data)
            temporary.rename(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if of_full_disk(error):
                self._stop(f"takes no more ({error.strerror})")
            else:
                self._leave(f"cannot be written ({error})")

    def _make_room(self, size: int) -> bool:
        with self._lock:
            while self._old and self._used + size > self._room:
                file = next(iter(self._old))
                file.unlink(missing_ok=True)
                self._used -= self._old.pop(file)
            if self._used + size <= self._room:
                self._used += size
                return True
        self._stop(f"is full: this run uses the {self._room:,} B that are this rank's (channel.cache_bytes)")
        return False

    def _stop(self, why: str) -> None:
        self.writing = False
        self._tell(f"{why}: what is there is read, and the rest computed")

    def _leave(self, why: str) -> None:
        self.reading = self.writing = False
        self._tell(f"{why}: the run goes on without it")

    def _tell(self, what: str) -> None:
        say(f"channel.cache={self._where.path} {what}")


_BOOT = Path("/proc/sys/kernel/random/boot_id")


def cache_key(config: TargetConfig, target: TargetDescription, model: TargetModel) -> str:
    """A name of what decides hidden states beside tokens: the target's files, how its engine is set and what it runs
    on, all that is installed. A file that was being written when the host went down may hold anything, so every boot
    has names of its own."""
    own = {*weight_files(target.path), *target.path.glob("*.py")}
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(own)]
    installed = sorted((found.name, found.version) for found in metadata.distributions())
    settings = replace(config, path="", replicas=1, verify=0, verify_against="auto")
    boot = _BOOT.read_text() if _BOOT.exists() else ""
    decisive = settings, model.device.type, model.dtype, replace(model.layout, argmax_lse=False), installed, files, boot
    return name_of(f"{target.config.to_json_string(use_diff=False)}{decisive}".encode())


class CachedTarget(TargetModel):
    """A target whose `forward` computes only sequences that it has not kept."""

    def __init__(self, model: TargetModel, where: CacheDirectory, key: str, group: ProcessGroup | None = None) -> None:
        """`group`: the replica's, where it has several ranks: they compute what one of them lacks."""
        self.model, self.layout, self.device, self.dtype = model, model.layout, model.device, model.dtype
        self._group, self._writes = group, where.index is not None
        self.files = CacheFiles(where, key, self.layout.states_width * self.layout.dtype.itemsize)
        self._computing, self._computed = DeviceTimer(self.device), 0

    def uncached(self) -> TargetModel:
        return self.model

    @torch.no_grad()
    def forward(self, batch: PackedTokens, out: Tensor, final: Tensor | None = None) -> None:
        if final is not None and not self.layout.final:  # an evaluation's, which is not kept
            self.model.forward(batch, out, final)
            return
        lengths, states = batch.lengths, out[:, : self.layout.states_width]
        rows = states.split(lengths)
        names = [name_of(document.numpy().tobytes()) for document in batch.tokens.split(lengths)]
        found = self.files.read(names, lengths)
        there = self._agreed([held is not None for held in found])
        for held, to, use in zip(found, rows, there, strict=True):
            if held is not None and use:
                to.copy_(held.view(to.dtype).view(to.shape))
        absent = [i for i, use in enumerate(there) if not use and lengths[i]]
        if absent:
            with self._computing.timed():
                self._compute(batch, absent, states)
            self._computed += sum(lengths[i] for i in absent)
        if self._writes:
            self.files.keep([(names[i], rows[i]) for i in absent])
        self.files.judge(self._computed, self._computing.seconds)

    def _compute(self, batch: PackedTokens, absent: list[int], states: Tensor) -> None:
        """Compute the documents `absent` of a batch into their rows of `states`."""
        lengths = batch.lengths
        if len(absent) == len([n for n in lengths if n]):
            self.model.forward(batch, states)
            return
        tokens, marks, rows = batch.tokens.split(lengths), batch.supervised.split(lengths), states.split(lengths)
        part = PackedTokens.from_documents([tokens[i] for i in absent], [marks[i] for i in absent])
        made = states.new_empty(len(part.tokens), states.shape[1])
        self.model.forward(part, made)
        for i, own in zip(absent, made.split(part.lengths), strict=True):
            rows[i].copy_(own)

    def _agreed(self, there: list[bool]) -> list[bool]:
        """Of every document whether all ranks of the replica have it. Waits for the device where they are several."""
        if self._group is None:
            return there
        flags = torch.tensor(there, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MIN, group=self._group)
        return [bool(flag) for flag in flags.tolist()]
