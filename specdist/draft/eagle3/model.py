# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 draft under training: fuse the captured features, unroll the TTT steps, compare with the target."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdist.core.errors import ConfigError
from specdist.core.records import Features, LogitMap, PackedTokens, TargetVocabulary
from specdist.draft.base import DraftModel, Replayed, Supervision
from specdist.draft.common.flex import takes_flex
from specdist.draft.common.layers import Rotary, rotate
from specdist.draft.common.losses import chances
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.eagle3.attention import DocumentAttention, eager_attention, flex_attention
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims, turned
from specdist.draft.eagle3.fp8 import check_device
from specdist.draft.eagle3.layer import Eagle3Attention, MidLayer, modules
from specdist.draft.eagle3.loss import SUMS, ChunkedLoss, metrics
from specdist.draft.eagle3.matmul import Fp8Matmul, Matmul
from specdist.draft.eagle3.op_set import PLAIN, compiled_ops
from specdist.draft.eagle3.proposer import Eagle3Proposer
from specdist.draft.eagle3.rows import Rows
from specdist.draft.eagle3.stack import Stack
from specdist.draft.eagle3.teacher import Teacher, teach
from specdist.draft.eagle3.unroll import Unroll, UnrollTask, Weights


@dataclass(frozen=True)
class Eagle3Frozen:
    """Tensors the draft reads and never trains. A plain object, so that neither FSDP nor state_dict sees them.

    Attributes:
        embedding: [V, H], the target's input embedding.
        head: [V_d, H], the target's head rows of the draft vocabulary; not on the device where the loss is on the
            argmax alone: then it is no more than what a new draft starts from.
        whole_head: [V, H], the target's head; None where the target side runs it.
        logit_map: the target's, from products with its head to logits.
        vocabulary: the draft vocabulary.
        rotary: the RoPE frequencies.
    """

    embedding: Tensor
    head: Tensor
    whole_head: Tensor | None
    logit_map: LogitMap
    vocabulary: DraftVocabulary
    rotary: Rotary

    @classmethod
    def of(
        cls, config: Eagle3Config, target: TargetVocabulary, vocabulary: DraftVocabulary, rotary: Rotary
    ) -> Eagle3Frozen:
        """What the draft needs of the target, on the device of `vocabulary`. Raises ConfigError: no Triton."""
        device, tied = vocabulary.ids.device, target.head is target.embedding
        host = config.embedding == "host" and device.type == "cuda"
        if host and importlib.util.find_spec("triton") is None:
            raise ConfigError.at("draft.eagle3.embedding", "=host needs Triton, which is not installed: use device")
        embedding = target.embedding.cpu().pin_memory() if host else target.embedding.to(device)
        here, hard, whole = config.teacher_head == "draft", config.loss_kind.hard, None
        if here or (vocabulary.whole and not hard):
            whole = embedding if tied and not host else target.head.to(device)
        if vocabulary.whole:
            head = target.head if whole is None else whole
        else:
            head = target.head[vocabulary.ids.to(target.head.device)]
            head = head if hard else head.to(device)
        return cls(embedding, head, whole if here else None, target.logit_map, vocabulary, rotary)


class Eagle3Draft(DraftModel):
    """EAGLE-3. Lives on the device of the draft vocabulary; the frozen tensors do not follow `.to()`.

    Computes in the precision its parameters have inside `forward` (FSDP2's mixed precision sets it).
    """

    fc: nn.Linear
    input_norm: nn.RMSNorm
    fc_norm: nn.ModuleList
    midlayer: MidLayer
    layers: nn.ModuleDict
    norm: nn.RMSNorm
    lm_head: nn.Linear

    def __init__(
        self,
        config: Eagle3Config,
        dims: Eagle3Dims,
        target: TargetVocabulary,
        vocabulary: DraftVocabulary,
        compiled: bool,
    ) -> None:
        super().__init__()
        device = vocabulary.ids.device
        self.config, self.dims = config, dims
        self.frozen = Eagle3Frozen.of(config, target, vocabulary, Rotary.of(turned(dims), device))
        self.scale = dims.scale
        self.metric_names = tuple(f"{name}/{k}" for k in range(config.ttt_length) for name in (*SUMS, "positions"))
        self.make(device, modules, config, dims)
        self.ops = compiled_ops(device) if compiled else PLAIN
        self.flex = takes_flex(config.attention, True, dims.value_dim)

    def initial(self, name: str) -> Tensor | None:
        return self.frozen.head if name == "lm_head.weight" and self.config.init_head == "target" else None

    @property
    def late(self) -> list[nn.Module]:
        return [self.lm_head]

    def supervise(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, draw: int = 0
    ) -> Supervision:
        """`counts` is N_k for k = 0..K-1: supervised positions whose target argmax the draft can propose."""
        rows = Rows.of(host_batch, self.config.ttt_length, self.share, self.config.pairs == "served")
        lengths, filled = tuple(host_batch.lengths), 0
        if (tokens := len(host_batch.tokens)) <= self.fixed_tokens and len(rows.taught):
            filled = self.fixed_tokens
            rows, lengths = rows.filled(filled), (*lengths, filled - tokens)
        teacher = teach(self, rows.to(features.rows.device), features)
        return Supervision(teacher.counts(), {"teacher": teacher, "lengths": lengths}, filled)

    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        if totals.dtype != torch.float64:
            raise TypeError(f"totals must be float64, not {totals.dtype} (FSDP2: cast_forward_inputs=False)")
        if (found := self.filled_up(batch, features, supervision, totals)) is not None:
            return found
        teacher, lengths = supervision.data["teacher"], supervision.data["lengths"]
        assert isinstance(teacher, Teacher)
        assert isinstance(lengths, tuple)
        if not len(teacher.rows.taught):
            return self.nothing(totals)
        states, with_grad = self.states(batch, features, teacher.rows, lengths), torch.is_grad_enabled()
        self.ready(self.lm_head)
        steps = torch.arange(len(totals), dtype=totals.dtype, device=totals.device)
        weights = self.config.step_decay**steps / totals.clamp(min=1.0)
        found, sums = ChunkedLoss.apply(self, features, teacher, weights, with_grad, self.lm_head.weight, states)
        return found.float(), torch.cat([sums, teacher.positions()[:, None]], dim=1).flatten()

    @property
    def stack(self) -> list[MidLayer]:
        """The decoder layers, in their order."""
        return [self.midlayer, *(self.layers.values() if self.config.num_layers > 1 else ())]

    def states(
        self, batch: PackedTokens, features: Features, rows: Rows, lengths: tuple[int, ...], served: bool = False
    ) -> Tensor:
        """The normed states [P, K, H] of the unrolled steps. `served`: as they are served, never in FP8. Raises
        ConfigError: the GPU has no FP8 products, and they are asked for."""
        if self.config.stacked:
            return Stack(self, batch, features, rows, lengths).run()
        device, fp8 = rows.active.device, self.config.products == "fp8" and not served
        if fp8:
            check_device(device)
        cos, sin = self.frozen.rotary(torch.arange(sum(lengths) + rows.steps, device=device))
        matmul = Fp8Matmul if fp8 else Matmul
        task = UnrollTask(self, rows, self.attention(rows, lengths), cos[:, 0], sin[:, 0], matmul)
        return Unroll.apply(task, torch.is_grad_enabled(), *self.inputs(batch, features, rows))

    def inputs(self, batch: PackedTokens, features: Features, rows: Rows) -> tuple[Tensor, ...]:
        """What the unrolled steps differentiate: see `Unroll`."""
        layer, attention, hidden_size = self.midlayer, self.midlayer.self_attn, self.dims.hidden_size
        assert isinstance(attention, Eagle3Attention)
        joint = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        # The embeddings' half of the products, the same whichever of the steps meets the token; those past the end of
        # the batch count nowhere.
        entry = self.embed(functional.pad(batch.tokens, (0, rows.steps))) @ joint[:, :hidden_size].T
        hidden = self.fuse(features.captured)
        key, value = self.first_keys(batch.positions, hidden, entry, joint)
        weights = Weights(
            hidden_norm=layer.hidden_norm.weight,
            qkv=joint[:, hidden_size:],
            o=attention.o_proj.weight,
            post_norm=layer.post_attention_layernorm.weight,
            gate=layer.mlp.gate_proj.weight,
            up=layer.mlp.up_proj.weight,
            down=layer.mlp.down_proj.weight,
            norm=self.norm.weight,
        )
        return hidden.index_select(0, rows.active), entry, key, value, *weights

    def first_keys(self, positions: Tensor, hidden: Tensor, entry: Tensor, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The step-0 keys and values of all rows, each [T, Hkv, D], from their states [T, H]. `joint`: the weights of
        queries, keys and values one below the other; `entry`: what embeddings contribute to them."""
        queries, keys, head_dim = self.dims.query_width, self.dims.key_width, self.dims.head_dim
        weight = joint[queries:, self.dims.hidden_size :]
        product = self.midlayer.hidden_norm(hidden) @ weight.T + entry[1 : 1 + len(positions), queries:]
        key, value = (part.unflatten(-1, (-1, head_dim)) for part in product.split(keys, -1))
        return rotate(key, *self.frozen.rotary(positions)), value

    def embed(self, tokens: Tensor) -> Tensor:
        """The normed target embeddings [n, H] of tokens [n]."""
        table = self.frozen.embedding
        if tokens.is_cuda and table.is_cpu:  # Triton comes with torch for CUDA only
            from specdist.draft.eagle3.kernels.host_rows import host_rows

            embeddings = host_rows(table, tokens)
        else:
            embeddings = functional.embedding(tokens, table)
        return self.midlayer.input_layernorm(embeddings.to(self.fc.weight.dtype))

    def fuse(self, captured: Tensor) -> Tensor:
        """g = h^0 [T, H] of the captured layer outputs side by side, [T, L * H]."""
        captured = captured.to(self.fc.weight.dtype)
        if self.config.norm_before_fc:
            captured = self.input_norm(captured)
        if self.config.fc_norm:
            parts = captured.split(self.dims.hidden_size, dim=-1)
            captured = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(captured)

    def attention(
        self, rows: Rows, lengths: tuple[int, ...], window: int | None = None, step: int = 0
    ) -> DocumentAttention:
        """The attention over the step-0 keys of a micro-batch; its mask is made here, once. Only with a sliding window
        it depends on the step."""
        behind = None if window is None else window - step
        if takes_flex(self.config.attention, rows.active.is_cuda, self.dims.value_dim):
            return flex_attention(rows, sum(lengths), self.scale, behind)
        return eager_attention(lengths, rows, self.scale, behind)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return metrics(sums, self.config.ttt_length, self.config.step_decay)

    def proposer(self) -> Eagle3Proposer:
        return Eagle3Proposer(self)

    @torch.no_grad()
    def replay(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, count: int, temperature: float = 0.0
    ) -> Replayed:
        """By the unrolled steps, with the products of serving, never FP8; `loss_chunk` rows of logits are held. A draft
        counts only where all drafts before it equal the text. So whatever is drafted at row i, the step that drafts
        x_{i+2+k} has met x_{i+1} .. x_{i+1+k} if its draft counts: the steps of training are those of serving."""
        device, tokens = features.rows.device, len(batch.tokens)
        rows = Rows.of(host_batch, count, self.share, served=True).to(device)
        accepted = torch.zeros(tokens, dtype=torch.int64, device=device)
        expected = torch.zeros(tokens, count, device=device) if temperature else None
        if not len(rows.active):
            return Replayed(accepted, expected)

        states = self.states(batch, features, rows, tuple(host_batch.lengths), served=True)
        parts = states.flatten(0, 1).split(self.config.loss_chunk)
        best = torch.cat([(part @ self.lm_head.weight.T).argmax(-1) for part in parts]).view(states.shape[:2])
        right = self.frozen.vocabulary.ids[best] == batch.tokens[rows.taught + 1, None]
        accepted[rows.active] = _by_row(right, rows).cumprod(1).sum(1)
        if expected is not None:
            expected[rows.active] = _by_row(self._chances(features.final[rows.taught], states, temperature), rows)
        return Replayed(accepted, expected)

    def _chances(self, final: Tensor, states: Tensor, temperature: float) -> Tensor:
        """`chances` [P, K] from the target's last hidden states [P, H] at the positions and normed states [P, K, H]."""
        frozen, head = self.frozen, self.frozen.whole_head
        if head is None:
            raise ValueError(
                "a replay with a temperature needs the target's whole head (draft.eagle3.teacher_head=draft)"
            )
        size, found = max(self.config.loss_chunk * len(frozen.head) // len(head) // states.shape[1], 1), []
        for z, normed in zip(final.to(head.dtype).split(size), states.split(size), strict=True):
            taught = frozen.logit_map(z @ head.T)[:, None]
            found.append(chances(taught, normed @ self.lm_head.weight.T, frozen.vocabulary, temperature))
        return torch.cat(found).float()


def _by_row(found: Tensor, rows: Rows) -> Tensor:
    """From what was found of each taught position by each step, [P, K], to that of each active row, [n, K]: 0 where it
    reaches none."""
    steps = torch.arange(rows.steps, device=found.device)
    return torch.where(rows.teacher >= 0, found[rows.teacher.clamp(min=0), steps], 0)
