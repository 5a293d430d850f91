# SPDX-License-Identifier: Apache-2.0
"""The target's output head on the target side: the argmax and log-sum-exp of its logits beside the features, where the
draft asks for them, and whether a held-out text is the target's own.

Works with any engine: the last hidden state that it has written goes through the output head of the checkpoint. Each
rank of a replica has a part of the vocabulary, and the parts are put together for the supervised rows only.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from specdist.core.argmax_lse import argmax_lse_on
from specdist.core.records import PackedTokens, WorkItem, moved_to
from specdist.target.base import TargetModel
from specdist.target.description import TargetDescription
from specdist.target.vocabulary import load_target_head

CHUNK = 1024
"""Positions whose logits are held at one time."""


class WithHead(TargetModel):
    """A target with its head. Its rows also get the argmax and log-sum-exp that their layout may have room for."""

    def __init__(self, model: TargetModel, target: TargetDescription, group: ProcessGroup | None = None) -> None:
        """`group`: the replica's, where it has several ranks; all of them call this."""
        self.model, self.layout, self.device, self.dtype = model, model.layout, model.device, model.dtype
        self._group = group
        head, self._logit_map = load_target_head(target, model.dtype)
        index, of = (0, 1) if self._group is None else (dist.get_rank(self._group), dist.get_world_size(self._group))
        self._first = len(head) * index // of
        self._head = head[self._first : len(head) * (index + 1) // of].to(model.device)
        self._argmax_lse = argmax_lse_on(model.device)

    def forward(self, batch: PackedTokens, out: Tensor, final: Tensor | None = None) -> None:
        if self.layout.argmax_lse:
            self.forward_checked(batch, out)
        else:
            self.model.forward(batch, out, final)

    def uncached(self) -> TargetModel:
        other = copy.copy(self)
        other.model = self.model.uncached()
        return other

    @torch.no_grad()
    def forward_checked(self, batch: PackedTokens, out: Tensor) -> Tensor:
        """`forward`, which also tells, bool [T] on the device, of every row i whether x_{i+1} is an answer's token
        (`PackedTokens.places`) and the target's own argmax."""
        layout, own = self.layout, torch.zeros(len(out), dtype=torch.bool, device=self.device)
        final = layout.final_state(out) if layout.final else out.new_empty(len(out), layout.hidden_size)
        self.model.forward(batch, out, final)
        out[:, layout.states_width :].zero_()
        where = supervised_rows(batch)
        if not len(where):  # on all ranks alike
            return own
        follows = moved_to(batch.tokens[where + 1], self.device)
        for rows, tokens in zip(moved_to(where, self.device).split(CHUNK), follows.split(CHUNK), strict=True):
            argmax, log_sum_exp = self._of(final[rows])
            own[rows] = argmax == tokens
            if layout.argmax_lse:
                layout.write_argmax_lse(out, rows, argmax, log_sum_exp)
        return own

    def _of(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Argmax and log-sum-exp [n] over the whole vocabulary, of last hidden states [n, H]."""
        products = final.to(self._head.dtype) @ self._head.T
        argmax, log_sum_exp = self._argmax_lse(products, self._logit_map)
        if self._group is None:
            return argmax, log_sum_exp
        highest = self._logit_map(products.gather(1, argmax[:, None])[:, 0])
        return _combined(argmax + self._first, highest, log_sum_exp, self._group)


def forward_item(engine: TargetModel, item: WorkItem, batch: PackedTokens, out: Tensor) -> Tensor | None:
    """`TargetModel.forward` of an item's batch. Of an item that is evaluated it returns, int64 [shards] on the device,
    how many tokens of the answers in each shard are the target's own argmax. Items may be empty."""
    if not item.evaluated:
        if item.tokens:
            engine.forward(batch, out)
        return None
    if not item.tokens:
        return torch.zeros(len(item.shards), dtype=torch.int64, device=engine.device)
    assert isinstance(engine, WithHead)
    parts = engine.forward_checked(batch, out).split([shard.tokens for shard in item.shards])
    return torch.stack([part.sum() for part in parts])


def supervised_rows(batch: PackedTokens) -> Tensor:
    """int64 [n], on the CPU: the rows whose next token is supervised and of the same document."""
    return (batch.supervised[1:] & (batch.positions[1:] > 0)).nonzero().flatten()


def _combined(argmax: Tensor, highest: Tensor, log_sum_exp: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Of the whole vocabulary, from the parts of the ranks. Among equal logits the lowest token is taken, as
    argmax does: ranks have ascending parts."""
    mine = torch.stack([argmax.double(), highest.double(), log_sum_exp.double()])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    argmaxes, peaks, sums = torch.stack(parts, dim=1)  # each [ranks, n]
    best = peaks.argmax(0, keepdim=True)
    return argmaxes.gather(0, best)[0].long(), sums.logsumexp(0)
