# SPDX-License-Identifier: Apache-2.0
"""What a training step has to compute."""

from __future__ import annotations

from specdist.core.records import PackedTokens
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.draft.eagle3.rows import Rows


def flops(config: Eagle3Config, dims: Eagle3Dims, batch: PackedTokens) -> float:
    """Floating-point operations that a step over `batch`, on the CPU, needs.

    What is trained costs three times its forward. Once, on all tokens: the fusion of the captured layers, the step-0
    keys and values, and the embeddings' half of the projections. In every TTT step, on the rows that a loss depends on:
    the state's half of the projections, the output projection and the MLP, attention over the keys of the document so
    far, and the head where something is taught. The teacher, the target's whole head where the draft runs it and the
    draft's part of it, costs a forward.
    """
    rows, tokens, whole_head = Rows.of(batch, config.ttt_length), len(batch.tokens), config.teacher_head == "draft"
    hidden, active, taught = dims.hidden_size, len(rows.active), len(rows.taught)
    pairs = int((rows.student >= 0).sum())
    queries, keys = dims.num_attention_heads * dims.head_dim, dims.num_key_value_heads * dims.head_dim
    once = 2 * hidden * (dims.num_captured * hidden + 2 * keys + queries + 2 * keys) * tokens
    layer = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden + 3 * 2 * hidden * dims.intermediate_size
    attention = 4 * queries * int((rows.positions + 1).sum())
    trained = once + rows.steps * (layer * active + attention) + 2 * hidden * dims.draft_vocab_size * pairs
    teacher = dims.draft_vocab_size + (dims.vocab_size if whole_head else 0)
    return 3.0 * trained + 2.0 * hidden * teacher * taught
