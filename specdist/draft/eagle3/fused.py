# SPDX-License-Identifier: Apache-2.0
"""The functions between the matrix products of a training step: as they are, or made into few kernels each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from specdist.core import argmax_lse as summary
from specdist.core.records import LogitMap
from specdist.draft.common import compiling
from specdist.draft.eagle3 import fp8, loss, pieces
from specdist.draft.eagle3.loss import LossKind
from specdist.draft.eagle3.products import PlainProducts

F = TypeVar("F", bound=Callable[..., object])


class Fused:
    """Each is compiled to one graph for all lengths and steps. On CUDA Triton kernels take the place of those that the
    compiler makes several passes of."""

    def __init__(self, compiled: bool, device: torch.device) -> None:
        fuse = compiling.compiled if compiled else _as_it_is
        self.norm = fuse(pieces.norm, "x")
        self.norm_backward = fuse(pieces.norm_backward, "grad", "x", "carry")
        self.state = fuse(pieces.state, "place", "x", "rows")
        self.state_backward = fuse(pieces.state_backward, "grads", "which", "x", "carry")
        self.state_grad = fuse(pieces.state_grad, "grads", "which", "carry")
        self.swiglu = fuse(pieces.swiglu, "gate", "up")
        self.swiglu_backward = fuse(pieces.swiglu_backward, "grad", "gate", "up")
        self.heads, self.heads_backward = fuse(pieces.heads), fuse(pieces.heads_backward)
        self.merge, self.merge_backward = fuse(pieces.merge), fuse(pieces.merge_backward)
        self.row_terms = fuse(loss.row_terms, "student", "teacher", "log_sum_exp", "choice", "weights")
        self._rounding = fp8.Rounding(
            fuse(fp8.quantise, "x"),
            fuse(fp8.quantise_both_ways),
            fuse(fp8.rounded_norm, "x"),
            fuse(fp8.rounded_swiglu, "gate", "up"),
            fuse(fp8.rounded_swiglu_backward, "grad", "gate", "up"),
        )
        self.summarise_logits = fuse(summary.summarise_logits, "products")
        if compiled and device.type == "cuda":
            self._take_kernels()

    def fp8_products(self, weights: Mapping[str, Tensor]) -> fp8.Fp8Products:
        return fp8.Fp8Products(weights, self._rounding)

    def plain_products(self, weights: Mapping[str, Tensor]) -> PlainProducts:
        return PlainProducts(weights, self)

    def _take_kernels(self) -> None:
        # Here, because Triton comes with torch for CUDA only.
        from specdist.core import argmax_lse_kernel as kernel
        from specdist.draft.eagle3.kernels import heads, logits, own_keys, rounded_swiglu

        any_row_terms = self.row_terms

        def row_terms(
            student: Tensor, products: Tensor, logit_map: LogitMap, log_sum_exp: Tensor, choice: Tensor,
            weights: Tensor, kind: LossKind,
        ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
            if kind.name == "kl":
                return logits.kl_row_terms(student, products, logit_map, log_sum_exp, choice, weights)
            return any_row_terms(student, products, logit_map, log_sum_exp, choice, weights, kind)

        self.row_terms = row_terms
        self.summarise_logits = kernel.summarise_logits
        self.heads, self.heads_backward = heads.heads, heads.heads_backward
        self.merge, self.merge_backward = own_keys.merge, own_keys.merge_backward
        self._rounding = replace(self._rounding, swiglu_backward=rounded_swiglu.rounded_swiglu_backward)


def _as_it_is(function: F, *_rows: str) -> F:
    return function
