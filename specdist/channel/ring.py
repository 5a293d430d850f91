# SPDX-License-Identifier: Apache-2.0
"""A ring of equal slots of feature rows, allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from specdist.core.errors import ConfigError
from specdist.core.records import FeatureLayout


class Ring:
    """`slots` buffers of `rows` feature rows each. `memory`: all of them, [slots, rows, layout.width]."""

    def __init__(self, layout: FeatureLayout, slots: int, rows: int, device: torch.device, pinned: bool = False):
        self.slots, self._rows, shape = slots, rows, (slots, rows, layout.width)
        self.memory = torch.empty(shape, dtype=layout.dtype, device=device, pin_memory=pinned)
        self._slots = self.memory.unbind()

    def slot(self, number: int, rows: int) -> Tensor:
        """The first `rows` rows of a slot, contiguous."""
        assert rows <= self._rows, f"{rows} rows do not fit into a slot of {self._rows}"
        return self._slots[number][:rows]

    def number(self, rows: Tensor) -> int:
        """The slot that `rows` are of, which `slot` has given."""
        return rows.storage_offset() // self.memory.stride(0)


def ring_slots(memory: int, rows: int, bytes_per_row: int, needed: int) -> int:
    """How many slots of `rows` rows fit into `memory` bytes. Raises ConfigError: they are fewer than `needed`."""
    slot = rows * bytes_per_row
    slots = memory // slot
    if slots < needed:
        raise ConfigError.at(
            "channel.memory",
            f" = {memory:,} B holds {slots} micro-batches of prompts.tokens_per_rank = {rows:,} tokens x "
            f"{bytes_per_row:,} B = {slot:,} B, but {needed} are needed (train.accumulation micro-batches of a step, "
            f"and one more to overlap): set channel.memory to at least {-(-needed * slot // 1024)}KiB or lower "
            "prompts.tokens_per_rank",
            "prompts.tokens_per_rank train.accumulation",
        )
    return int(slots)
