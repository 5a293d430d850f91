# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the sequences that are decoded together, of unequal lengths, for one layer of a draft."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


class KeyValueCache:
    """A key and a value for every position of every sequence. What lies past a sequence's end is left over from drafts
    or from longer ones: nothing reads it, and it is written over."""

    def __init__(self, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self._pair = torch.zeros(2, 0, 0, heads, head_dim, device=device, dtype=dtype)
        self._width = 0

    def reserve(self, sequences: int, width: int) -> None:
        """Have room for so many sequences, and in each for so many positions, of which `attend` reads no further."""
        _, count, room, _, _ = self._pair.shape
        more = max(64, width, 2 * room) - room if width > room else 0
        if more or sequences > count:
            self._pair = functional.pad(self._pair, (0, 0, 0, 0, 0, more, 0, max(sequences - count, 0)))
        self._width = width

    def keep(self, sequences: Sequence[int]) -> None:
        """Let go of all but these sequences."""
        self._pair = self._pair[:, torch.tensor(sequences, dtype=torch.int64, device=self._pair.device)]

    def write(self, sequences: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write T keys and values [T, Hkv, D]; `sequences` and `positions`, int64 [T], say where."""
        self._pair[:, sequences, positions] = torch.stack([keys, values])

    def attend(self, q: Tensor, seen: Tensor, scale: float, since: Tensor | None = None) -> Tensor:
        """What queries q [n, Q, Hq, D] of all n sequences attend to among the positions of theirs before `seen`, int64
        [n], or [n, Q] of each query, and from `since` on, likewise: [n, Q, Hq, D]."""
        keys, values = self._pair[:, :, : self._width].transpose(2, 3)
        kv_heads, queries = keys.shape[1], q.shape[1]
        places = torch.arange(self._width, device=q.device)
        visible = places < seen.view(len(seen), -1, 1)
        if since is not None:
            visible = visible & (places >= since.view(len(since), -1, 1))
        if visible.shape[1] > 1:  # the queries of a group stand one below the other
            visible = visible.repeat(1, q.shape[2] // kv_heads, 1)
        # The queries that share a key stand one below the other, so that no kernel has to know of groups.
        grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None], scale=scale)
        return out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)
