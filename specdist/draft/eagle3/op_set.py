# SPDX-License-Identifier: Apache-2.0
"""The functions between the matrix products of a training step: as they are, or made into few kernels each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from specdist.core import argmax_lse
from specdist.draft.common import losses
from specdist.draft.common.compiling import compiled
from specdist.draft.eagle3 import fp8, ops

Op = Callable[..., Any]


@dataclass(frozen=True)
class Eagle3Ops:
    """One of each, see the functions of those names in `ops`, `fp8`, `losses` and `specdist.core.argmax_lse`.
    `kl_row_terms` is `row_terms` for the losses kl and mixed."""

    norm: Op = ops.norm
    norm_backward: Op = ops.norm_backward
    state: Op = ops.state
    state_backward: Op = ops.state_backward
    state_grad: Op = ops.state_grad
    swiglu: Op = ops.swiglu
    swiglu_backward: Op = ops.swiglu_backward
    heads: Op = ops.heads
    heads_backward: Op = ops.heads_backward
    merge: Op = ops.merge
    merge_backward: Op = ops.merge_backward
    row_terms: Op = losses.row_terms
    kl_row_terms: Op = losses.row_terms
    hard_row_terms: Op = losses.hard_row_terms
    argmax_lse: Op = argmax_lse.argmax_lse
    quantise: Op = fp8.quantise
    quantise_both_ways: Op = fp8.quantise_both_ways
    rounded_norm: Op = fp8.rounded_norm
    rounded_swiglu: Op = fp8.rounded_swiglu
    rounded_swiglu_backward: Op = fp8.rounded_swiglu_backward


PLAIN = Eagle3Ops()


def compiled_ops(device: torch.device) -> Eagle3Ops:
    """Each is compiled to one graph for all lengths and steps. On CUDA Triton kernels take the place of those that the
    compiler makes several passes of."""
    row_terms = compiled(losses.row_terms, "student", "teacher", "log_sum_exp", "argmax", "weights")
    made = Eagle3Ops(
        norm=compiled(ops.norm, "x"),
        norm_backward=compiled(ops.norm_backward, "grad", "x", "carry"),
        state=compiled(ops.state, "place", "x", "rows"),
        state_backward=compiled(ops.state_backward, "grads", "which", "x", "carry"),
        state_grad=compiled(ops.state_grad, "grads", "which", "carry"),
        swiglu=compiled(ops.swiglu, "gate", "up"),
        swiglu_backward=compiled(ops.swiglu_backward, "grad", "gate", "up"),
        heads=compiled(ops.heads),
        heads_backward=compiled(ops.heads_backward),
        merge=compiled(ops.merge),
        merge_backward=compiled(ops.merge_backward),
        row_terms=row_terms,
        kl_row_terms=row_terms,
        hard_row_terms=compiled(losses.hard_row_terms, "student", "argmax", "weights"),
        argmax_lse=compiled(argmax_lse.argmax_lse, "products"),
        quantise=compiled(fp8.quantise, "x"),
        quantise_both_ways=compiled(fp8.quantise_both_ways),
        rounded_norm=compiled(fp8.rounded_norm, "x"),
        rounded_swiglu=compiled(fp8.rounded_swiglu, "gate", "up"),
        rounded_swiglu_backward=compiled(fp8.rounded_swiglu_backward, "grad", "gate", "up"),
    )
    if device.type != "cuda":
        return made
    # Here, because Triton comes with torch for CUDA only.
    from specdist.core import argmax_lse_kernel
    from specdist.draft.eagle3.kernels import heads, logits, own_keys, rounded_swiglu

    return replace(
        made,
        kl_row_terms=logits.kl_row_terms,
        hard_row_terms=logits.hard_row_terms,
        argmax_lse=argmax_lse_kernel.argmax_lse,
        heads=heads.heads,
        heads_backward=heads.heads_backward,
        merge=own_keys.merge,
        merge_backward=own_keys.merge_backward,
        rounded_swiglu_backward=rounded_swiglu.rounded_swiglu_backward,
    )
