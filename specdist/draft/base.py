# SPDX-License-Identifier: Apache-2.0
"""What every draft algorithm gives the trainer, the exporter and the evaluator. None of them knows which one it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from specdist.core.errors import ConfigError
from specdist.core.records import FeatureLayout, Features, PackedTokens
from specdist.draft.common.cache import KeyValueCache
from specdist.draft.common.graphs import Graphed, Graphs, Results, padded, tensors_of, with_tensors


@dataclass(frozen=True)
class Supervision:
    """What one micro-batch supervises, found before any gradient is computed.

    `counts` is what the loss is divided by after a sum over every micro-batch and rank of the optimizer step: a float64
    vector of fixed length (one entry per TTT step, for instance). `data` is the algorithm's own and only it reads it.
    `filled`: the tokens that the micro-batch is filled up to where it is of a fixed size (`DraftModel.fixed_tokens`).
    """

    counts: Tensor
    data: Mapping[str, object]
    filled: int = 0


@dataclass(frozen=True)
class Replayed:
    """What serving would accept of a text, at every row i of T packed ones: by the drafts made once x_0 .. x_{i+1} are
    verified and the features 0 .. i are known. It is exact for the target's own greedy text.

    Each row is filled by the one context-parallel rank that computes it and zero on the others, so these sum up.
    `accepted`: int64 [T], how many of K drafts equal x_{i+2}, x_{i+3}, ... in turn, none past the end of the answer
    (`PackedTokens.places`). 0 where x_{i+1} and x_{i+2} are not in one answer. `expected`: fp32 [T, K], with a
    temperature: of each of these drafts sum_v min(p'_v, q_v), the chance that it is accepted, with p' the target's
    distribution and q the draft's. It is exact for the first draft; a later one stands after drafts, of which the text
    is one possibility. 0 where there is no draft, and at the end.
    """

    accepted: Tensor
    expected: Tensor | None = None


@dataclass(frozen=True)
class ContextShare:
    """Which of the `of` ranks that share the sequences of a micro-batch this one is (context parallelism)."""

    index: int = 0
    of: int = 1


FILL = 256
"""Tokens of micro-batches of fixed sizes are a multiple of it: whole blocks of any attention."""

WHOLE = ContextShare()
"""Without context parallelism."""


class DraftModel(nn.Module, ABC):
    """A draft under training. Its `state_dict` uses the tensor names of the exported checkpoint.

    Frozen tensors borrowed from the target are not parameters or buffers: they are neither sharded nor saved.
    """

    layout: FeatureLayout
    """Set by `build_draft`."""
    share: ContextShare = WHOLE
    """Set before training. Every rank gets the whole micro-batch, and the losses of the ranks add up to its loss."""
    flex: bool = False
    """Whether it makes micro-batches of fixed sizes, which takes FlexAttention on a GPU."""
    fixed_tokens: int = 0
    """Where micro-batches of up to so many tokens, which is set before training, are to be of fixed sizes: `supervise`
    then fills up what it finds, and `forward` gets filled up what it reads."""
    graphs: Graphs | None = None
    tables: tuple[str, ...] = ("lm_head.",)
    """How the names of weights with a row for every token begin."""
    ready: Callable[..., None] = staticmethod(lambda *parts: None)
    """Called with parts whose weights are used from there on: sharded, they may still be on their way."""
    metric_names: tuple[str, ...]
    """The names of the sums `forward` returns, in a fixed order that is the same on every rank."""

    def make(self, device: torch.device, modules: Callable[..., Mapping[str, nn.Module]], *arguments: Any) -> None:
        """Take all that is trained, by name, made on a device."""
        with device:
            for name, module in modules(*arguments).items():
                self.add_module(name, module)

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

    def matrices(self) -> list[str]:
        """The weights from states to states, which Muon may train: two dimensions of more than 1, and no `tables`."""
        return [
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 2 and min(parameter.shape) > 1 and not name.startswith(self.tables)
        ]

    @property
    def late(self) -> Sequence[nn.Module]:
        """Parts that `forward` computes without at first: it calls `ready` when it comes to them."""
        return ()

    @abstractmethod
    def supervise(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, draw: int = 0
    ) -> Supervision:
        """Find what counts in a micro-batch; no gradients. `host_batch`: the same batch on the CPU: index arithmetic
        that only needs tokens and masks is done there, so nothing waits for the device. `draw`: what an algorithm draws
        at random follows from the batch and this number, which is another one for every micro-batch and the same
        whenever that is trained again."""

    @abstractmethod
    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of one micro-batch and its metric sums.

        `totals` is `Supervision.counts` summed over the whole optimizer step, so the losses of all micro-batches and
        ranks add up to the step's loss. Returns the scalar loss (fp32, with a graph even when nothing is supervised)
        and a detached float64 vector of sums, one per entry of `metric_names`, to add over micro-batches and ranks.
        """

    def use_graphs(self, most_tokens: int, graphs: Graphs | None = None) -> None:
        """Train by CUDA graphs, on micro-batches of up to so many tokens. Raises ConfigError."""
        if not self.flex:
            raise ConfigError.at(
                "draft.cuda_graphs", "=true needs a draft whose attention is FlexAttention: leave it at false"
            )
        self.graphs, self.fixed_tokens = graphs or Graphs(), -(-most_tokens // FILL) * FILL

    def filled_up(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """What `forward` returns of a micro-batch of a fixed size: filled up, by a graph of its forward and backward
        where there is one. None: it is of no fixed size."""
        if not supervision.filled:
            return None
        count = supervision.filled
        tokens, supervised, positions = (padded(t, count) for t in (batch.tokens, batch.supervised, batch.positions))
        whole = PackedTokens(tokens, supervised, batch.cu_seqlens[:0], positions)  # documents are no matter by now
        record = whole, replace(features, rows=padded(features.rows, count)), replace(supervision, filled=0), totals
        if self.graphs is None or not torch.is_grad_enabled():
            return self.forward(*record)
        self.ready(*self.late)
        named = sorted(self.named_parameters(), key=lambda item: item[1].requires_grad)
        names, weights = [name for name, _ in named], [weight for _, weight in named]
        kept, given = sum(not weight.requires_grad for weight in weights), list(tensors_of(record))

        def step(*tensors: Tensor) -> Results:  # serves other micro-batches: it reads none of their tensors but these
            own = with_tensors(record, iter(tensors[: len(given)]))
            places = [nn.Parameter(t, requires_grad=i >= kept) for i, t in enumerate(tensors[len(given) :])]
            # torch.func.functional_call does this too, and the module's hooks, which are FSDP's.
            with torch.enable_grad(), _reparametrize_module(self, dict(zip(names, places, strict=True))):
                loss, sums = self.forward(*own)
            return (loss.detach(), sums), torch.autograd.grad(loss, places[kept:], materialize_grads=True)

        loss, sums = Graphed.apply(partial(self.graphs, step, *given, *weights[:kept]), *weights[kept:])
        return loss, sums

    def nothing(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns where nothing is supervised: a zero loss that touches every trainable parameter, so
        that a rank without data still joins the collectives."""
        self.ready(*self.late)
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
        """What a person reads (loss and acceptance rate per TTT step, ...) from summed `metric_names`. The progress
        line and the report look for `loss` and `simulated_acceptance_length`. A draft whose loss of a position is no
        less than a guess's, log V, has learnt nothing: a `loss` that is more than that of a position has it beside it
        as `loss_per_step`."""

    @abstractmethod
    def proposer(self) -> Proposer:
        """A fresh proposer of this draft, of no sequences yet."""


@dataclass(frozen=True)
class Drafts:
    """What is proposed for n sequences, `count` tokens each.

    Attributes:
        tokens: int64 [n, count], target ids.
        logits: [n, count, V_d]: the tokens are their argmax or, at a temperature T, drawn from softmax(logits / T). For
            a chain those of a token follow from the tokens before it.
        ids: int64 [V_d], the target id of every column of `logits`; None where the columns are the target's tokens.
    """

    tokens: Tensor
    logits: Tensor
    ids: Tensor | None = None


def draw(logits: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Tokens int64 [...] of logits [..., V]: their argmax or, at a temperature, drawn from softmax(logits / T)."""
    if not temperature:
        return logits.argmax(-1)
    chances = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])


def ragged(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For counts[i] rows of every i, laid end to end: of each row its i, and its number there; int64 [sum(counts)]."""
    sizes = torch.tensor(counts, dtype=torch.int64)
    owner = torch.arange(len(counts)).repeat_interleave(sizes)
    number = torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner]
    return owner.to(device), number.to(device)


class Proposer(ABC):
    """Drafts tokens for a batch of sequences, in eval mode, from the target's features of their verified tokens.

    Attributes:
        lengths: of every sequence, the verified positions taken so far.
        caches: the algorithm's, which are told what comes and goes.
        start: of every sequence what `take` gave of its last position, each [n, ...]: where drafting starts.
    """

    def __init__(self, caches: Sequence[KeyValueCache] = ()) -> None:
        self.lengths: list[int] = []
        self.caches = caches
        self.start: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def extend(self, features: Features, next_tokens: Tensor, counts: Sequence[int]) -> None:
        """Take the features of newly verified positions, counts[i] of sequence i, laid end to end, and, int64 [T], the
        token that follows each. Counts beyond those of the sequences there are begin new sequences."""
        if not len(next_tokens) == len(features.rows) == sum(counts):
            raise ValueError(
                f"{len(features.rows)} positions of features, but {len(next_tokens)} next tokens, of {sum(counts)}"
            )
        before, device = self.lengths + [0] * (len(counts) - len(self.lengths)), features.rows.device
        sequences, numbers = ragged(counts, device)
        positions = numbers + torch.tensor(before, device=device)[sequences]
        self.lengths = [old + new for old, new in zip(before, counts, strict=True)]
        self.reserve()
        made = self.take(features, next_tokens, sequences, positions)
        last = torch.tensor(counts).cumsum(0) - 1
        longer = torch.tensor(counts) > 0
        where, rows = longer.nonzero()[:, 0].to(device), last[longer].to(device)
        old = self.start or tuple(part.new_zeros(0, *part.shape[1:]) for part in made)
        self.start = tuple(
            torch.cat([state, state.new_zeros(len(counts) - len(state), *state.shape[1:])]).index_copy(
                0, where, part[rows]
            )
            for state, part in zip(old, made, strict=True)
        )

    def keep(self, sequences: Sequence[int]) -> None:
        """Let go of all but these sequences, which stand in this order from now on."""
        self.lengths = [self.lengths[i] for i in sequences]
        for cache in self.caches:
            cache.keep(sequences)
        self.start = tuple(state[list(sequences)] for state in self.start)

    def reserve(self, beyond: int = 0) -> None:
        """Have room in the caches for that many positions beyond the longest sequence."""
        for cache in self.caches:
            cache.reserve(len(self.lengths), max(self.lengths) + beyond)

    @torch.no_grad()
    def propose(self, count: int, temperature: float = 0.0, generator: torch.Generator | None = None) -> Drafts:
        """`count` >= 1 drafts that continue every sequence after the last of its `next_tokens`."""
        if not self.lengths or not all(self.lengths):
            raise ValueError("nothing to continue: extend the proposer with at least one verified position first")
        return self.draft_tokens(count, temperature, generator)

    @abstractmethod
    def take(self, features: Features, next_tokens: Tensor, sequences: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """`extend` by T positions: `sequences` and `positions`, int64 [T], say whose and which. Returns what drafting
        needs of a position if it is a sequence's last, each [T, ...]."""

    @abstractmethod
    def draft_tokens(self, count: int, temperature: float, generator: torch.Generator | None) -> Drafts:
        """`propose`, for sequences that all have verified positions."""


def ratio(part: float, whole: float) -> float:
    """Of two sums; 0 where nothing was summed."""
    return float(part / whole) if whole else 0.0
