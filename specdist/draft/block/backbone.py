# SPDX-License-Identifier: Apache-2.0
"""A draft that fills blocks: fuse the captured features, run the layers over the blocks. Algorithms add their loss."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdist.core.records import Features, LogitMap, PackedTokens, TargetVocabulary
from specdist.draft.base import DraftModel, Drafts, Replayed, Supervision
from specdist.draft.block.attention import BlockAttention, KeysValues, eager_attention, flex_attention
from specdist.draft.block.blocks import Blocks
from specdist.draft.block.layer import PLAIN, attention_of, compiled_ops
from specdist.draft.block.loss import SUMS, ChunkedLoss, Terms
from specdist.draft.block.options import BlockDims, BlockOptions
from specdist.draft.block.proposer import BlockProposer, check_count
from specdist.draft.common.flex import takes_flex
from specdist.draft.common.layers import Rotary
from specdist.draft.common.losses import chances
from specdist.draft.common.vocabulary import DraftVocabulary


class BlockDraft(DraftModel):
    """Lives on the device of `target`; the frozen tensors do not follow `.to()`.

    Computes in the precision its parameters have inside `forward` (FSDP2's mixed precision sets it).

    Attributes:
        target: the target's embedding and head, on the draft's device. Neither it nor `rotary`, the RoPE frequencies,
            is a parameter or a buffer: plain objects are seen by neither FSDP nor state_dict.
        vocabulary: the tokens that are drafted; fewer than the target's come with a head of their own, `lm_head`.
        logit_map: from `products` to the draft's logits; they are these unless the algorithm says otherwise.
        parts: what of the loss is among the metrics (`learn`).
    """

    fc: nn.Linear
    hidden_norm: nn.RMSNorm
    norm: nn.RMSNorm
    layers: nn.ModuleList
    logit_map: LogitMap
    config: BlockOptions
    parts: tuple[str, ...] = ("weighted",)

    def __init__(
        self,
        options: BlockOptions,
        dims: BlockDims,
        target: TargetVocabulary,
        vocabulary: DraftVocabulary,
        compiled: bool,
    ) -> None:
        super().__init__()
        assert options.mask_token_id is not None, "the configuration was not completed"
        self.config, self.dims, self.mask_token = options, dims, options.mask_token_id
        self.target, self.rotary, self.scale = target, Rotary.of(dims, target.head.device), dims.head_dim**-0.5
        self.logit_map, self.vocabulary = LogitMap(), vocabulary
        self.make(target.head.device, self.modules_of, options, dims)
        self._layer_ops = compiled_ops() if compiled else PLAIN
        self.flex = takes_flex(options.attention, True, dims.head_dim)
        drafts = range(1, options.drafts + 1)
        self.metric_names = ("total", *self.parts, *(f"{name}/{k}" for k in drafts for name in SUMS))
        self.prepare(compiled)

    @staticmethod
    @abstractmethod
    def modules_of(config: Any, dims: BlockDims) -> dict[str, nn.Module]:
        """All that is trained, by name."""

    @abstractmethod
    def prepare(self, compiled: bool) -> None:
        """The rest of the construction: what the loss is made of."""

    @abstractmethod
    def total(self, blocks: Blocks) -> Tensor:
        """What the loss of the step is divided by, of these blocks' share: float64 [1]."""

    @property
    def head(self) -> Tensor:
        """The output head [V_d, H]."""
        own = getattr(self, "lm_head", None)
        return self.target.head if own is None else own.weight

    def initial(self, name: str) -> Tensor | None:
        return self.target.head[self.vocabulary.ids] if name == "lm_head.weight" else None

    @property
    def heads(self) -> list[nn.Module]:
        """What is trained beside the layers and what leads to them."""
        before = self.fc, self.hidden_norm, self.norm, self.layers
        return [part for part in self.children() if part not in before]

    @property
    def late(self) -> list[nn.Module]:
        return [*self.layers, *self.heads]

    def factors(self, states: Tensor, before: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the drafts' logits are products of, [N, D, c] with [V_d, c] each: the normed states [N, D, H] with the
        head, and what an algorithm adds; `before` int64 [N, D], the tokens before the drafts."""
        return [(states, self.head)]

    @abstractmethod
    def fill(self, states: Tensor, first: Tensor, temperature: float, generator: torch.Generator | None) -> Drafts:
        """The drafts of normed states [n, k, H] that follow the tokens `first`, int64 [n]."""

    def supervise(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, draw: int = 0
    ) -> Supervision:
        blocks = Blocks.draw(host_batch, self.config, draw, self.share).to(features.rows.device)
        if not self.vocabulary.whole:
            blocks = replace(blocks, valid=blocks.valid & (self.vocabulary.to_draft[blocks.labels] >= 0))
        total, lengths, filled = self.total(blocks), tuple(host_batch.lengths), 0
        if (tokens := len(host_batch.tokens)) <= self.fixed_tokens and len(blocks.anchors):
            filled = self.fixed_tokens
            blocks, lengths = blocks.filled(filled, self.config.most(filled)), (*lengths, filled - tokens)
        return Supervision(total, {"blocks": blocks, "lengths": lengths}, filled)

    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        if (found := self.filled_up(batch, features, supervision, totals)) is not None:
            return found
        blocks, lengths = supervision.data["blocks"], supervision.data["lengths"]
        assert isinstance(blocks, Blocks)
        assert isinstance(lengths, tuple)
        if not len(blocks.anchors):
            return self.nothing(totals)
        states = self.states(batch, blocks, self.verified(batch, features), self.attention(blocks, lengths))
        divisor = totals.clamp(min=torch.finfo(torch.float32).tiny)  # the draft vocabulary may lack all that is drafted
        loss, own, sums = self.learn(batch, features, blocks, states, divisor)
        return loss, torch.cat([supervision.counts, own.detach().double() * totals, sums.flatten()])

    @abstractmethod
    def learn(
        self, batch: PackedTokens, features: Features, blocks: Blocks, states: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the blocks' normed states [N, D, H]: the loss, with a graph, its `parts`, and the sums [D, 6] in the order
        of `SUMS`."""

    def chunked(
        self, blocks: Blocks, states: Tensor, batch: PackedTokens, terms: Terms
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of normed states [N, D, H], with a graph, every draft's chance to be accepted [N, D] and the sums
        [D, 6] in the order of `SUMS`."""
        self.ready(*self.heads)
        pairs = self.factors(states, batch.tokens[blocks.rows])
        how = blocks.valid, blocks.served, terms, self.config.loss_chunk, torch.is_grad_enabled()
        return ChunkedLoss.apply(*how, *(t.to(states.dtype) for pair in pairs for t in pair))

    def labels(self, blocks: Blocks) -> Tensor:
        """Draft ids [N, D] of what is to be drafted; any where the vocabulary lacks it."""
        return self.vocabulary.to_draft[blocks.labels].clamp(min=0)

    def products(self, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """[..., V_d] in the precision of the target's head, of `factors` [..., c] with tables."""
        (first, table), *others = ((f.to(self.target.head.dtype), t.to(self.target.head.dtype)) for f, t in factors)
        products = first @ table.T
        for factor, other in others:
            products += factor @ other.T
        return products

    def taught(self, features: Features, rows: Tensor) -> Tensor:
        """Products [..., V] of the target's last hidden states at `rows`, int64 [...], with its head."""
        return features.final[rows].to(self.target.head.dtype) @ self.target.head.T

    def verified(self, batch: PackedTokens, features: Features) -> Iterator[KeysValues]:
        """Each layer's keys and values of the T packed tokens, made when they are asked for: the forward comes to the
        weights of a layer late, and the backward is done with them early."""
        context, rotation = self.context(features.captured), self.rotary(batch.positions)
        for layer in self.layers:
            self.ready(layer)
            yield attention_of(layer).keys_values(context, rotation, self._layer_ops)

    def states(
        self, batch: PackedTokens, blocks: Blocks, verified: Iterable[KeysValues], attend: Sequence[BlockAttention]
    ) -> Tensor:
        """The normed states [N, D, H] of the slots that draft."""
        tokens = self.masked(batch.tokens[blocks.anchors])
        places = blocks.positions[:, None] + torch.arange(blocks.size, device=tokens.device)
        rotation = self.rotary(places.flatten())
        hidden = self.embed(tokens.flatten())
        for layer, context, attention in zip(self.layers, verified, attend, strict=True):
            hidden = layer(hidden, rotation, context, attention, self._layer_ops)
        return self.norm(hidden).unflatten(0, (-1, blocks.size))[:, self.config.silent :]

    def masked(self, first: Tensor) -> Tensor:
        """int64 [n, B]: blocks that begin with the tokens `first` [n] and are to be filled."""
        tokens = first.new_full((len(first), self.config.block_size), self.mask_token)
        tokens[:, 0] = first
        return tokens

    def context(self, captured: Tensor) -> Tensor:
        """What keys and values of verified tokens are made of, [T, H], from the captured layers side by side."""
        return self.hidden_norm(self.fc(captured.to(self.fc.weight.dtype)))

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embeddings [n, H] of tokens [n]."""
        return functional.embedding(tokens, self.target.embedding).to(self.fc.weight.dtype)

    def attention(self, blocks: Blocks, lengths: tuple[int, ...]) -> list[BlockAttention]:
        """Each layer's attention of a micro-batch; masks are made here, once for all layers that see the same."""
        views, flex = self.config.views, takes_flex(self.config.attention, blocks.anchors.is_cuda, self.dims.head_dim)
        made = {
            view: flex_attention(blocks, sum(lengths), self.scale, view)
            if flex
            else eager_attention(blocks, lengths, self.scale, view)
            for view in set(views)
        }
        return [made[view] for view in views]

    def proposer(self) -> BlockProposer:
        return BlockProposer(self)

    @torch.no_grad()
    def replay(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, count: int, temperature: float = 0.0
    ) -> Replayed:
        """A block is filled at every token from which serving could draft: as many at one time as training fills, and
        `loss_chunk` rows of logits are held. A draft counts only where all drafts before it equal the text, so those
        that follow from the tokens before them follow from the text. Raises ValueError: a block has fewer drafts."""
        options = self.config
        check_count(count, options)
        accepted = torch.zeros_like(batch.tokens)
        expected = torch.zeros(len(accepted), count, device=accepted.device) if temperature else None
        anchors = Blocks.candidates(host_batch)[self.share.index :: self.share.of]
        if not len(anchors):
            return Replayed(accepted, expected)
        verified, lengths = list(self.verified(batch, features)), tuple(host_batch.lengths)
        for part in anchors.split(options.most(len(host_batch.tokens))):
            blocks = Blocks.at(part, host_batch, options).to(accepted.device)
            states = self.states(batch, blocks, verified, self.attention(blocks, lengths))[:, :count]
            rows, labels, valid = (t[:, :count] for t in (blocks.rows, blocks.labels, blocks.served))
            found, likely = [], []
            factors = [(factor.flatten(0, 1), table) for factor, table in self.factors(states, batch.tokens[rows])]
            for chunk, before in enumerate(rows.flatten().split(options.loss_chunk)):
                some = slice(chunk * options.loss_chunk, (chunk + 1) * options.loss_chunk)
                products = self.products([(factor[some], table) for factor, table in factors])
                found.append(self.vocabulary.ids[products.argmax(-1)])
                if temperature:
                    taught = self.target.logit_map(self.taught(features, before))
                    likely.append(chances(taught, self.logit_map(products), self.vocabulary, temperature))
            right = (torch.cat(found).view_as(labels) == labels) & valid
            accepted[blocks.anchors - 1] = right.long().cumprod(1).sum(1)
            if expected is not None:
                expected[blocks.anchors - 1] = torch.cat(likely).float().view_as(labels).where(valid, 0.0)
        return Replayed(accepted, expected)
