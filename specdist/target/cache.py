# SPDX-License-Identifier: Apache-2.0
"""A target that reads what it has computed in earlier epochs: see `cache_files.py`."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from specdist.core.device_timer import DeviceTimer
from specdist.core.records import PackedTokens
from specdist.target.base import TargetModel
from specdist.target.cache_files import CacheDirectory, CacheFiles, name_of
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription
from specdist.target.weights import weight_files

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
