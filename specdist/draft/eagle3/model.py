# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 draft under training: fuse the captured features, unroll the TTT steps, compare with the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdist.draft.base import DraftModel, Supervision, empty_like_loss
from specdist.draft.eagle3.attention import (
    FLEX_LEAST_HEAD_DIM,
    DocumentAttention,
    eager_attention,
    flex_attention,
    merge_own_keys,
)
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.draft.eagle3.layer import MidLayer
from specdist.draft.eagle3.loss import SUMS, LossInputs, LossKind, chunked_loss, row_terms
from specdist.draft.eagle3.proposer import Eagle3Proposer
from specdist.draft.eagle3.rotary import Rotary
from specdist.draft.eagle3.summary import summarize
from specdist.draft.eagle3.teacher import Teacher, teach
from specdist.draft.vocabulary import DraftVocabulary
from specdist.records import FeatureLayout, Features, PackedTokens, TargetVocabulary

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Frozen:
    """Tensors the draft reads and never trains. A plain object, so that neither FSDP nor state_dict sees them.

    Attributes:
        target: the target's embedding and head.
        vocabulary: the draft vocabulary.
        head: [V_d, H], the target's head rows of the draft vocabulary.
        rotary: the RoPE frequencies.
    """

    target: TargetVocabulary
    vocabulary: DraftVocabulary
    head: Tensor
    rotary: Rotary


class Eagle3Draft(DraftModel):
    """EAGLE-3. Lives on the device of the target's embedding; the frozen tensors do not follow `.to()`.

    Computes in the precision its parameters have inside `forward` (FSDP2's mixed precision sets it).
    """

    def __init__(
        self,
        config: Eagle3Config,
        dims: Eagle3Dims,
        layout: FeatureLayout,
        target: TargetVocabulary,
        vocabulary: DraftVocabulary,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        device = target.embedding.device
        hidden = dims.hidden_size
        self.config, self.dims, self.layout = config, dims, layout
        head = target.head if vocabulary.whole else target.head[vocabulary.ids]
        self.frozen = Frozen(target, vocabulary, head, Rotary.of(dims, device))
        self.scale = dims.head_dim**-0.5
        self.loss_kind = LossKind(config.loss, config.lk_eta)
        self.metric_names = tuple(f"{name}/{k}" for k in range(config.ttt_length) for name in (*SUMS, "positions"))

        self.fc = nn.Linear(dims.num_captured * hidden, hidden, bias=False, device=device, dtype=dtype)
        if config.fc_norm:
            norms = (
                nn.RMSNorm(hidden, eps=dims.rms_norm_eps, device=device, dtype=dtype) for _ in layout.captured_layers
            )
            self.fc_norm = nn.ModuleList(norms)
        self.midlayer = MidLayer(dims, device, dtype)
        self.norm = nn.RMSNorm(hidden, eps=dims.rms_norm_eps, device=device, dtype=dtype)
        self.lm_head = nn.Linear(hidden, dims.draft_vocab_size, bias=False, device=device, dtype=dtype)
        # The hot functions: one graph for all lengths, and all steps (`merge`: one per step).
        self.project = _compiled(self.midlayer.project, compiled)
        self.finish = _compiled(self.midlayer.finish, compiled)
        self.merge = _compiled(merge_own_keys, compiled)
        self.terms = _compiled(row_terms, compiled)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights: normal with standard deviation 1 / sqrt(inputs), norms one, and the head as configured.

        `generator` lives on the CPU, so the weights do not depend on the device.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif name == "lm_head.weight" and self.config.init_head == "target":
                parameter.copy_(self.frozen.head)
            else:
                values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
                parameter.copy_(values)

    def supervise(self, batch: PackedTokens, host_batch: PackedTokens, features: Features) -> Supervision:
        """`counts` is N_k for k = 0..K-1: supervised positions whose target argmax the draft can propose."""
        teacher = teach(
            host_batch,
            features.final,
            self.frozen.target,
            self.frozen.vocabulary,
            self.config.ttt_length,
            self.config.loss_chunk,
        )
        return Supervision(teacher.counts(), {"teacher": teacher, "lengths": tuple(host_batch.lengths)})

    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        if totals.dtype != torch.float64:
            raise TypeError(f"totals must be float64, not {totals.dtype} (FSDP2: cast_forward_inputs=False)")
        teacher, lengths = supervision.data["teacher"], supervision.data["lengths"]
        assert isinstance(teacher, Teacher)
        assert isinstance(lengths, tuple)
        if not teacher.sizes[0]:
            empty = torch.zeros(len(self.metric_names), dtype=torch.float64, device=totals.device)
            return empty_like_loss(self), empty
        steps = torch.arange(self.config.ttt_length, device=totals.device, dtype=torch.float64)
        inputs = LossInputs(
            teacher=teacher,
            final=features.final,
            target=self.frozen.target,
            head=self.frozen.head,
            weights=self.config.step_decay**steps / totals.clamp(min=1.0),
            kind=self.loss_kind,
            chunk=self.config.loss_chunk,
            terms=self.terms,
        )
        states = self.unroll(batch, features, teacher, self.attention(batch, lengths))
        loss, sums = chunked_loss(inputs, self.lm_head.weight, states)
        return loss.float(), torch.cat([sums, teacher.positions[:, None]], dim=1).flatten()

    def unroll(
        self, batch: PackedTokens, features: Features, teacher: Teacher, attend: DocumentAttention
    ) -> list[Tensor]:
        """Per TTT step the normed states [sizes[k], H] at the rows i = p - 1 - k of the supervised positions p."""
        tokens = functional.pad(batch.tokens, (0, self.config.ttt_length))  # rows past the end count nowhere
        embedded = self.embed(tokens)
        hidden = self.fuse(features.captured)
        states: list[Tensor] = []
        first: tuple[Tensor, Tensor] | None = None
        own_keys: list[Tensor] = []
        own_values: list[Tensor] = []
        for step, size in enumerate(teacher.sizes):
            following = embedded[1 + step : 1 + step + len(batch.tokens)]
            q, key, value = self.project(following, hidden, *self.frozen.rotary(batch.positions + step))
            if first is None:
                first = key, value
            else:
                own_keys.append(key)
                own_values.append(value)
            out, lse = attend(q, *first)
            attended = self.merge(out, lse, q, own_keys, own_values, self.scale)
            hidden, state = self.advance(hidden, attended, teacher.rows[:size] - 1 - step)
            states.append(state)
        return states

    def embed(self, tokens: Tensor) -> Tensor:
        """The normed target embeddings [n, H] of tokens [n]."""
        embeddings = functional.embedding(tokens, self.frozen.target.embedding)
        return self.midlayer.input_layernorm(embeddings.to(self.fc.weight.dtype))

    def fuse(self, captured: Tensor) -> Tensor:
        """g = h^0 [T, H] of the captured layer outputs side by side, [T, L * H]."""
        captured = captured.to(self.fc.weight.dtype)
        if self.config.fc_norm:
            parts = captured.split(self.dims.hidden_size, dim=-1)
            captured = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(captured)

    def advance(self, hidden: Tensor, attended: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The state the next step takes, [T, H], and the normed states of `rows` that the head reads."""
        hidden = self.finish(hidden, attended)
        if self.config.norm_output:
            hidden = self.norm(hidden)
            return hidden, hidden.index_select(0, rows)
        return hidden, self.norm(hidden.index_select(0, rows))

    def attention(self, batch: PackedTokens, lengths: tuple[int, ...]) -> DocumentAttention:
        """The attention over the step-0 keys of a micro-batch; its mask is made here, once."""
        backend = self.config.attention
        fits_flex = batch.tokens.is_cuda and self.dims.head_dim >= FLEX_LEAST_HEAD_DIM
        if backend == "flex" or (backend == "auto" and fits_flex):
            return flex_attention(batch.positions, self.scale)
        return eager_attention(lengths, self.scale)

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        return summarize(sums, self.config.ttt_length, self.config.step_decay)

    def proposer(self) -> Eagle3Proposer:
        return Eagle3Proposer(self)


def _compiled(function: Callable[P, R], compiled: bool) -> Callable[P, R]:
    return torch.compile(function, dynamic=True) if compiled else function
