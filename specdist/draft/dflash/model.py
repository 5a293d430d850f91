# SPDX-License-Identifier: Apache-2.0
"""The DFlash draft under training: fuse the captured features, fill the blocks, compare with the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdist.core.records import FeatureLayout, Features, PackedTokens, TargetVocabulary
from specdist.draft.base import DraftModel, Replayed, Supervision
from specdist.draft.common.flex import takes_flex
from specdist.draft.common.rotary import Rotary
from specdist.draft.dflash.attention import BlockAttention, KeysValues, eager_attention, flex_attention
from specdist.draft.dflash.blocks import Blocks
from specdist.draft.dflash.config import DFlashConfig, DFlashDims
from specdist.draft.dflash.layer import attention_of, modules
from specdist.draft.dflash.loss import SUMS, BlockLoss, DFlashLossInputs, Weighing, metrics
from specdist.draft.dflash.ops import PLAIN, compiled_ops
from specdist.draft.dflash.proposer import DFlashProposer
from specdist.draft.dflash.replay import replay


@dataclass(frozen=True)
class DFlashFrozen:
    """Tensors the draft reads and never trains. A plain object, so that neither FSDP nor state_dict sees them.

    Attributes:
        target: the target's embedding and head, on the draft's device.
        rotary: the RoPE frequencies.
        weighing: of the slots of a block.
    """

    target: TargetVocabulary
    rotary: Rotary
    weighing: Weighing


class DFlashDraft(DraftModel):
    """DFlash. Lives on the device of `target`; the frozen tensors do not follow `.to()`.

    Computes in the precision its parameters have inside `forward` (FSDP2's mixed precision sets it).
    """

    fc: nn.Linear
    hidden_norm: nn.RMSNorm
    norm: nn.RMSNorm
    layers: nn.ModuleList

    def __init__(
        self,
        config: DFlashConfig,
        dims: DFlashDims,
        layout: FeatureLayout,
        target: TargetVocabulary,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        device = target.head.device
        assert config.mask_token_id is not None, "the configuration was not completed"
        self.config, self.dims, self.layout, self.mask_token = config, dims, layout, config.mask_token_id
        self.frozen = DFlashFrozen(target, Rotary.of(dims, device), Weighing.of(config, device))
        self.scale = dims.head_dim**-0.5
        slots = range(1, config.block_size)
        self.metric_names = ("total", "weighted", *(f"{name}/{k}" for k in slots for name in SUMS))
        for name, module in modules(dims, device, dtype).items():
            self.add_module(name, module)
        self._ops = compiled_ops() if compiled else PLAIN

    def supervise(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, draw: int = 0
    ) -> Supervision:
        """`counts` is what the weighted losses are divided by: see `Weighing.total`."""
        blocks = Blocks.draw(host_batch, self.config.block_size, self.config.anchors, draw, self.share)
        blocks = blocks.to(features.rows.device)
        return Supervision(
            self.frozen.weighing.total(blocks.valid), {"blocks": blocks, "lengths": tuple(host_batch.lengths)}
        )

    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        blocks, lengths = supervision.data["blocks"], supervision.data["lengths"]
        assert isinstance(blocks, Blocks)
        assert isinstance(lengths, tuple)
        if not len(blocks.anchors):
            return self.nothing(totals)
        verified = self.verified(batch, features)
        states = self.states(batch, blocks, verified, self.attention(blocks, lengths))
        inputs = DFlashLossInputs(
            blocks=blocks,
            head=self.frozen.target.head.to(states.dtype),
            logit_map=self.frozen.target.logit_map,
            weighing=self.frozen.weighing,
            total=totals,
            chunk=self.config.loss_chunk,
            terms=self._ops.block_terms,
        )
        loss, sums = BlockLoss.apply(inputs, states[:, 1:])
        return loss, torch.cat([supervision.counts, sums])

    def replay(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, count: int, temperature: float = 0.0
    ) -> Replayed:
        if temperature:
            raise ValueError("a DFlash draft is not taught by distributions: it can be replayed greedily alone")
        return replay(self, batch, host_batch, features, count)

    def verified(self, batch: PackedTokens, features: Features) -> list[KeysValues]:
        """Each layer's keys and values of the T packed tokens."""
        context, rotation = self.context(features.captured), self.frozen.rotary(batch.positions)
        return [attention_of(layer).keys_values(context, rotation, self._ops) for layer in self.layers]

    def states(
        self, batch: PackedTokens, blocks: Blocks, verified: Sequence[KeysValues], attend: BlockAttention
    ) -> Tensor:
        """The normed states [N, B, H] of the blocks. The first of each, its anchor's, teaches nothing."""
        tokens = blocks.anchors.new_full((len(blocks.anchors), blocks.size), self.mask_token)
        tokens[:, 0] = batch.tokens[blocks.anchors]
        places = blocks.positions[:, None] + torch.arange(blocks.size, device=tokens.device)
        rotation = self.frozen.rotary(places.flatten())
        hidden = self.embed(tokens.flatten())
        for layer, context in zip(self.layers, verified, strict=True):
            hidden = layer(hidden, rotation, context, attend, self._ops)
        return self.norm(hidden).unflatten(0, (-1, blocks.size))

    def context(self, captured: Tensor) -> Tensor:
        """What keys and values of verified tokens are made of, [T, H], from the captured layers side by side."""
        return self.hidden_norm(self.fc(captured.to(self.fc.weight.dtype)))

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embeddings [n, H] of tokens [n]."""
        return functional.embedding(tokens, self.frozen.target.embedding).to(self.fc.weight.dtype)

    def attention(self, blocks: Blocks, lengths: tuple[int, ...]) -> BlockAttention:
        """The attention of a micro-batch; its mask is made here, once for all layers."""
        if takes_flex(self.config.attention, blocks.anchors.is_cuda, self.dims.head_dim):
            return flex_attention(blocks, sum(lengths), self.scale)
        return eager_attention(blocks, lengths, self.scale)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return metrics(sums, self.config.block_size - 1)

    def proposer(self) -> DFlashProposer:
        return DFlashProposer(self)
