# SPDX-License-Identifier: Apache-2.0
"""What a target's forward costs."""

from __future__ import annotations

from collections.abc import Sequence

from specdist.target.facts import TargetFacts


def flops(facts: TargetFacts, lengths: Sequence[int]) -> float:
    """Floating-point operations of the layers for sequences of these lengths, causal attention counted by half.

    The layers' weights are all parameters but the embedding and the head: for a dense model.
    """
    tables = (1 if facts.tied else 2) * facts.vocab_size * facts.hidden_size
    text = facts.text_config
    head = getattr(text, "head_dim", None) or facts.hidden_size // (facts.heads or 1)
    attention = 2.0 * facts.layers * (facts.heads or 0) * head * sum(n * n for n in lengths)
    return 2.0 * (facts.parameters - tables) * sum(lengths) + attention
