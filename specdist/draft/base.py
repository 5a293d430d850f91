# SPDX-License-Identifier: Apache-2.0
"""What every draft algorithm gives the trainer, the exporter and the evaluator. None of them knows which one it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specdist.core.records import FeatureLayout, Features, PackedTokens


@dataclass(frozen=True)
class Supervision:
    """What one micro-batch supervises, found before any gradient is computed.

    `counts` is what the loss is divided by after a sum over every micro-batch and rank of the optimizer step: a float64
    vector of fixed length (one entry per TTT step, for instance). `data` is the algorithm's own and only it reads it.
    """

    counts: Tensor
    data: Mapping[str, object]


@dataclass(frozen=True)
class Replayed:
    """What serving would accept of a text, at every row i of T packed ones: by the drafts made once x_0 .. x_{i+1} are
    verified and the features 0 .. i are known. It is exact for the target's own greedy text.

    Each row is filled by the one context-parallel rank that computes it and zero on the others, so these sum up.

    Attributes:
        accepted: int64 [T], how many of K drafts equal x_{i+2}, x_{i+3}, ... in turn, none past the end of the answer
            (`PackedTokens.places`). 0 where x_{i+1} and x_{i+2} are not in one answer.
        agreed: bool [T], whether x_{i+1} is in an answer and the target's own argmax at i; None where the features do
            not tell.
        expected: fp32 [T, K], with a temperature: of each of these drafts sum_v min(p'_v, q_v), the chance that it is
            accepted, with p' the target's distribution and q the draft's. It is exact for the first draft; a later one
            stands after drafts, of which the text is one possibility. 0 where there is no draft, and at the end.
    """

    accepted: Tensor
    agreed: Tensor | None
    expected: Tensor | None = None


@dataclass(frozen=True)
class ContextShare:
    """Which of the `of` ranks that share the sequences of a micro-batch this one is (context parallelism)."""

    index: int = 0
    of: int = 1


WHOLE = ContextShare()
"""Without context parallelism."""


class DraftModel(nn.Module, ABC):
    """A draft under training. Its `state_dict` uses the tensor names of the exported checkpoint.

    Frozen tensors borrowed from the target are not parameters or buffers: they are neither sharded nor saved.
    """

    layout: FeatureLayout
    share: ContextShare = WHOLE
    """Set before training. Every rank gets the whole micro-batch, and the losses of the ranks add up to its loss."""
    metric_names: tuple[str, ...]
    """The names of the sums `forward` returns, in a fixed order that is the same on every rank."""

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights: what `initial` gives, norms one, others normal with standard deviation 1 / sqrt(inputs).

        `generator` lives on the CPU, so that they do not depend on the device.
        """
        for name, parameter in self.named_parameters():
            if (given := self.initial(name)) is not None:
                parameter.copy_(given)
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)

    def initial(self, name: str) -> Tensor | None:
        """What a parameter starts as, where it is not drawn at random."""
        return None

    @abstractmethod
    def supervise(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, draw: int = 0
    ) -> Supervision:
        """Find what counts in a micro-batch; no gradients.

        Args:
            host_batch: the same batch on the CPU: index arithmetic that only needs tokens and masks is done there, so
                nothing waits for the device.
            draw: what an algorithm draws at random follows from the batch and this number, which is another one for
                every micro-batch and the same whenever that is trained again.
        """

    @abstractmethod
    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of one micro-batch and its metric sums.

        `totals` is `Supervision.counts` summed over the whole optimizer step, so the losses of all micro-batches and
        ranks add up to the step's loss. Returns the scalar loss (fp32, with a graph even when nothing is supervised)
        and a detached float64 vector of sums, one per entry of `metric_names`, to add over micro-batches and ranks.
        """

    def nothing(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns where nothing is supervised: a zero loss that touches every trainable parameter, so
        that a rank without data still joins the collectives."""
        loss = sum((p.float().sum() * 0.0 for p in self.parameters() if p.requires_grad), torch.zeros(()))
        return loss, torch.zeros(len(self.metric_names), dtype=torch.float64, device=totals.device)

    @abstractmethod
    def replay(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, count: int, temperature: float = 0.0
    ) -> Replayed:
        """What serving would accept of the text of a micro-batch; no gradients.

        Args:
            host_batch: the same batch on the CPU.
            count: K, the drafts that serving makes for each forward of the target.
            temperature: that of serving; where it is not 0, `Algorithm.check_replay` has allowed it.
        """

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What a person reads (loss and acceptance rate per TTT step, ...) from summed `metric_names`."""

    @abstractmethod
    def proposer(self) -> Proposer:
        """A fresh proposer of this draft, for one sequence."""


class Proposer(ABC):
    """Drafts tokens for one sequence, in eval mode, from the target's features of the verified tokens."""

    length = 0
    """Verified positions taken so far."""

    def extend(self, features: Features, next_tokens: Tensor) -> None:
        """Take the features of n newly verified positions and, int64 [n], the token that follows each of them."""
        count = len(next_tokens)
        if count != len(features.rows):
            raise ValueError(f"{len(features.rows)} positions of features, but {count} next tokens")
        if count:
            positions = torch.arange(self.length, self.length + count, device=features.rows.device)
            with torch.no_grad():
                self.take(features, next_tokens, positions)
            self.length += count

    @abstractmethod
    def take(self, features: Features, next_tokens: Tensor, positions: Tensor) -> None:
        """`extend` by at least one position; `positions` int64 [n] are theirs in the sequence."""

    @abstractmethod
    def propose(self, count: int) -> list[int]:
        """`count` greedy draft tokens (target ids) that continue the sequence after the last of `next_tokens`."""


def ratio(numerator: float, denominator: float) -> float:
    """Of two sums; 0 where nothing was summed."""
    return numerator / denominator if denominator else 0.0
