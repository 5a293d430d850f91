# SPDX-License-Identifier: Apache-2.0
"""What a micro-batch needs of a draft rank's memory, by what `unroll.py` and `loss.py` keep and when.

The peak is at the beginning of the backward, when everything that the steps have kept is there and the gradients of the
weights as well; or in the loss, where logits are.
"""

from __future__ import annotations

from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.dims import Eagle3Dims

WIDE = 4
"""Bytes of what is added up in fp32."""


def needs_head(config: Eagle3Config, vocab_size: int) -> bool:
    """Whether the target's whole head lies on a draft rank's device."""
    return config.teacher_head == "draft" or (config.vocab_size or vocab_size) >= vocab_size


def frozen_rows(config: Eagle3Config, vocab_size: int, tied: bool) -> int:
    """Rows of the target's tables on a draft rank's device: its embedding, its head, and that of the draft's tokens."""
    head, own = needs_head(config, vocab_size), config.vocab_size or vocab_size
    embedding = config.embedding == "device" and not (tied and head)
    return (head + embedding) * vocab_size + (own if own < vocab_size else 0)


def step_bytes(config: Eagle3Config, dims: Eagle3Dims, tokens: int, active: int, itemsize: int) -> dict[str, int]:
    """The parts of the peak in bytes, without weights, optimizer and features.

    Args:
        tokens: of the micro-batch.
        active: rows that a loss depends on, on this rank: about the supervised ones.
        itemsize: bytes of a number in the compute dtype.
    """
    hidden, inner, steps = dims.hidden_size, dims.intermediate_size, config.ttt_length
    queries, keys = dims.num_attention_heads * dims.head_dim, dims.num_key_value_heads * dims.head_dim
    joint = queries + 2 * keys
    kept_mlp = steps - config.recompute
    # Embeddings raw and normed, fused state and its norm, the entry and its gradient, step-0 keys and values.
    once = tokens * ((4 * hidden + 2 * joint + 4 * keys) * itemsize + 2 * keys * WIDE)
    # State before the attention, normed state for the loss, queries, attention output; own keys and values.
    kept = active * steps * (2 * hidden + 2 * queries) * itemsize + active * hidden * itemsize
    kept += active * kept_mlp * (hidden + 2 * inner) * itemsize  # the state after it, the MLP
    kept += active * (steps - 1) * 2 * keys * (itemsize + WIDE)
    # The MLP's backward of one step: activations, what is computed again, attention output, and four states.
    again = 2 * inner + hidden if config.recompute == steps else 0
    working = active * (inner + again + queries + 4 * hidden) * itemsize
    weights = 3 * inner * hidden + queries * hidden + joint * hidden
    layer = weights * WIDE + (2 * (weights + queries * hidden) if config.products == "fp8" else 0)
    head = dims.draft_vocab_size * hidden
    backward = working + layer + head * itemsize
    logits = config.loss_chunk * dims.draft_vocab_size * (steps + 1) // steps * itemsize
    return {
        f"inputs of {tokens:,} tokens": once + 2 * joint * 2 * hidden * itemsize,
        f"kept of {steps} TTT steps": kept,
        "the backward, or the loss": max(backward, head * WIDE + logits),
    }
