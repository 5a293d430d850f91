# SPDX-License-Identifier: Apache-2.0
"""What a training step has to compute, and what a micro-batch needs of a draft rank's memory, by what `unroll.py` and
`loss.py` keep and when.

The peak is at the beginning of the backward, when everything that the steps have kept is there and the gradients of the
weights as well; or in the loss, where logits are.
"""

from dataclasses import dataclass

from specdist.core.records import PackedTokens
from specdist.draft.algorithm import WIDE, Cost
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims


def needs_head(config: Eagle3Config, vocab_size: int) -> bool:
    """Whether the target's whole head lies on a draft rank's device."""
    whole = (config.vocab_size or vocab_size) >= vocab_size
    return config.teacher_head == "draft" or (whole and not config.loss_kind.hard)


@dataclass(frozen=True)
class Eagle3Cost(Cost):
    config: Eagle3Config
    dims: Eagle3Dims

    @property
    def _hard(self) -> bool:
        return self.config.loss_kind.hard

    def flops(self, batch: PackedTokens) -> float:
        """What is trained costs three times its forward. Once, on all tokens: the fusion of the captured layers, the
        step-0 keys and values, and the embeddings' half of the projections. In every TTT step, on the rows that a loss
        depends on: the state's half of the projections, the output projection and the MLP, attention over the keys of
        the document so far, and the head where something is taught. The teacher, the target's whole head where the
        draft runs it and, unless the loss is on the argmax alone, the draft's part of it, costs a forward."""
        from specdist.draft.eagle3.rows import Rows  # it imports FlexAttention

        rows = Rows.of(batch, self.config.ttt_length, served=self.config.pairs == "served")
        layers, steps = self.config.num_layers, rows.steps
        tokens, dims = len(batch.tokens), self.dims
        hidden, queries, keys = dims.hidden_size, dims.query_width, dims.key_width
        active, taught = len(rows.active), len(rows.taught)
        pairs = int((rows.student >= 0).sum())
        once = 2 * hidden * (dims.num_captured * hidden + 2 * keys + queries + 2 * keys) * tokens
        layer = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden + 3 * 2 * hidden * dims.intermediate_size
        attention = 4 * queries * int((rows.positions + 1).sum())
        if self.config.stacked:  # step 0 runs for all tokens but in the last layer
            once = 2 * hidden * dims.num_captured * hidden * tokens
            output = 2 * dims.num_attention_heads * dims.value_dim * hidden + 3 * 2 * hidden * dims.intermediate_size
            first, later = 2 * dims.projection_weights(2 * hidden), 2 * dims.projection_weights(hidden)
            layer = first + (layers - 1) * later + layers * output
            once += (first + (layers - 1) * (later + output)) * (tokens - active)
            attention *= layers
        trained = once + steps * (layer * active + attention) + 2 * hidden * dims.draft_vocab_size * pairs
        teacher = (0 if self._hard else dims.draft_vocab_size) + (
            dims.vocab_size if self.config.teacher_head == "draft" else 0
        )
        return 3.0 * trained + 2.0 * hidden * teacher * taught

    def frozen_rows(self, tied: bool) -> int:
        """Those of its embedding, its head, and the head's of the draft's tokens."""
        whole = self.dims.vocab_size
        head, own = needs_head(self.config, whole), self.config.vocab_size or whole
        embedding = self.config.embedding == "device" and not (tied and head)
        return (head + embedding) * whole + (own if own < whole and not self._hard else 0)

    def step_bytes(self, tokens: int, share: int, itemsize: int, compiled: bool) -> dict[str, int]:
        config, dims = self.config, self.dims
        hidden, inner, steps = dims.hidden_size, dims.intermediate_size, config.ttt_length
        queries, keys = dims.query_width, dims.key_width
        joint = queries + 2 * keys
        kept_mlp = steps - config.recompute
        # Embeddings raw and normed, fused state and its norm, the entry and its gradient, step-0 keys and values.
        once = tokens * ((4 * hidden + 2 * joint + 4 * keys) * itemsize + 2 * keys * WIDE)
        # State before the attention, normed state for the loss, queries, attention output; own keys and values.
        kept = share * steps * (2 * hidden + 2 * queries) * itemsize + share * hidden * itemsize
        kept += share * kept_mlp * (hidden + 2 * inner) * itemsize  # the state after it, the MLP
        kept += share * (steps - 1) * 2 * keys * (itemsize + WIDE)
        if config.stacked:  # by autograd: what a layer keeps of a row, between all its operations
            heads = 5 * queries + 3 * keys + config.qk_norm * (queries + keys)
            row = (8 * hidden + heads + 5 * inner) * itemsize + 3 * keys * WIDE
            recomputed = share * config.recompute * (hidden + 2 * keys * config.num_layers) * itemsize
            all_rows = (config.num_layers - 1) * (tokens - share)
            kept = (share * kept_mlp * config.num_layers + all_rows) * row + recomputed
        # The MLP's backward of one step: activations, what is computed again, attention output, and four states.
        again = 2 * inner + hidden if config.recompute == steps else 0
        working = share * (inner + again + queries + 4 * hidden) * itemsize
        weights = 3 * inner * hidden + queries * hidden + joint * hidden * config.num_layers
        layer = weights * WIDE + (2 * (weights + queries * hidden) if config.products == "fp8" else 0)
        head = dims.draft_vocab_size * hidden
        backward = working + layer + head * itemsize
        rows = config.loss_chunk if self._hard else config.loss_chunk * (steps + 1) // steps  # the teacher's too
        logits = rows * dims.draft_vocab_size * itemsize
        return {
            f"inputs of {tokens:,} tokens": once + 2 * joint * 2 * hidden * itemsize,
            f"kept of {steps} TTT steps": kept,
            "the backward, or the loss": max(backward, head * WIDE + logits),
        }
