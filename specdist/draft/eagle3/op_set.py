# SPDX-License-Identifier: Apache-2.0
"""The functions between the matrix products of a training step: as they are, or made into few kernels each."""

from collections.abc import Callable
from dataclasses import dataclass
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

_VARIED = {
    "norm": "x",
    "norm_backward": "grad x carry",
    "state": "place x rows",
    "state_backward": "grads which x carry",
    "state_grad": "grads which carry",
    "swiglu": "gate up",
    "swiglu_backward": "grad gate up",
    "row_terms": "student teacher log_sum_exp argmax weights",
    "hard_row_terms": "student argmax weights",
    "argmax_lse": "products",
    "quantise": "x",
    "rounded_norm": "x",
    "rounded_swiglu": "gate up",
    "rounded_swiglu_backward": "grad gate up",
}
"""By function, the arguments that have another first size in every call; every size of the others may change."""


def compiled_ops(device: torch.device) -> Eagle3Ops:
    """Each is compiled to one graph for all lengths and steps. On CUDA Triton kernels take the place of those that the
    compiler makes several passes of."""
    made = {name: compiled(op, *_VARIED.get(op.__name__, "").split()) for name, op in vars(PLAIN).items()}
    if device.type == "cuda":
        # Here, because Triton comes with torch for CUDA only. A kernel has the name of what it takes the place of.
        from specdist.core import argmax_lse_kernel
        from specdist.draft.eagle3.kernels import heads, logits, own_keys, rounded_swiglu

        for module in (argmax_lse_kernel, heads, logits, own_keys, rounded_swiglu):
            made |= {name: op for name, op in vars(module).items() if name in made}
    return Eagle3Ops(**made)
