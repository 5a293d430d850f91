# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the training step against the plain functions of the same names.

On a GPU; with TRITON_INTERPRET=1 and a Triton beside torch they run, slowly, on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specdist.core.argmax_lse import argmax_lse
from specdist.core.records import LogitMap
from specdist.draft.common import losses
from specdist.draft.common.loss_kind import LossKind
from specdist.draft.eagle3 import fp8, ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
SHAPES = [(5, 4, 2, 16), (7, 6, 2, 80), (3, 5, 1, 64)] if INTERPRETED else [(300, 32, 8, 128), (77, 6, 2, 80)]


def randoms(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """`expected` in fp32 from the same inputs."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(found, expected, strict=True):
        scale = float(b.float().abs().max())
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * max(scale, 1e-3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("later", [1, 2, 6])
def test_own_keys(later: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from specdist.draft.eagle3.kernels import own_keys

    n, q_heads, kv_heads, dim = shape
    heads, own = (n, q_heads, dim), (6, n, kv_heads, dim)
    out, q, grad, keys, values = randoms(dtype, heads, heads, heads, own, own)
    lse = torch.randn(q_heads, n, device=DEVICE).T  # not contiguous, as FlexAttention's
    inputs = (out, lse, q, keys[:later], values[:later], 0.3)
    found = own_keys.merge(*inputs)
    expected = ops.merge(*(t.float() for t in inputs[:-1]), 0.3)  # type: ignore[union-attr]
    assert_close(found, expected, dtype)
    sums = [torch.randn(own, device=DEVICE) for _ in range(2)]
    others = [t.clone() for t in sums]
    arguments = (grad, *found, *inputs)
    found_grads = own_keys.merge_backward(*arguments, *(t[:later] for t in sums))
    wide = (t.float() if isinstance(t, Tensor) else t for t in arguments)
    expected_grads = ops.merge_backward(*wide, *(t[:later] for t in others))  # type: ignore[arg-type]
    assert_close([*found_grads, *sums], [*expected_grads, *others], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", [0, 1, 3])
def test_heads(step: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from specdist.draft.eagle3.kernels import heads

    n, q_heads, kv_heads, dim = shape
    sizes = [(n, q_heads, dim), (n, kv_heads, dim), (n, kv_heads, dim)][: 3 if step else 1]
    width = sum(h * d for _, h, d in sizes)
    active = torch.arange(n, device=DEVICE) * 2
    positions = torch.arange(n, device=DEVICE) * 2 % 31
    product, entry, entry_grad, more = randoms(
        dtype, (n, width), (2 * n + 8, (q_heads + 2 * kv_heads) * dim), (2 * n + 8, (q_heads + 2 * kv_heads) * dim),
        sizes[0],
    )  # fmt: skip
    angles = torch.randn(40, dim // 2, device=DEVICE)
    rest = (angles.cos(), angles.sin(), active, positions, step)
    found, expected = ([torch.zeros(s, device=DEVICE, dtype=t) for s in sizes] for t in (dtype, torch.float32))
    heads.heads(product, entry, *rest, found)
    ops.heads(product.float(), entry.float(), *rest, expected)
    assert_close(found, expected, dtype)
    wide_grad = entry_grad.float().clone()
    grads = [found[0], *(part.float() for part in found[1:])]  # those of own keys and values are sums in fp32
    for extra in (None, more):
        d_product = heads.heads_backward(grads, extra, *rest, entry_grad)
        others = ops.heads_backward(
            [g.float() for g in grads], None if extra is None else extra.float(), *rest, wide_grad
        )
        assert_close([d_product, entry_grad], [others, wide_grad], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 5008])
def test_rounded_swiglu(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdist.draft.eagle3.kernels import rounded_swiglu

    if INTERPRETED:  # its casts to e4m3 do not carry into the exponent: the last rounding is torch's
        monkeypatch.setattr(rounded_swiglu, "FORMAT", torch.float32)
    found = randoms(dtype, (7, width), (7, width), (7, width))
    found[0][3] = 0.0  # no gradient at all
    found[0][4] *= 1e-6
    wide = [t.float().clone() for t in found]
    rounded = rounded_swiglu.rounded_swiglu_backward(*found)
    expected = fp8.rounded_swiglu_backward(*wide)
    assert_close(found, wide, dtype)
    for (values, scales), (other_values, other_scales) in zip(rounded, expected, strict=True):
        assert INTERPRETED or values.dtype == fp8.FORMAT
        assert (values.shape, scales.shape) == ((7, width), (7, 1))
        torch.testing.assert_close(scales, other_scales, rtol=1e-5, atol=0)
        a, b = values.to(fp8.FORMAT).float(), other_values.float()
        assert float((a - b).abs().max()) <= 32  # the neighbour, where arithmetic falls on the other side
        assert float((a != b).float().mean()) < 1e-3
        assert not a[3].any()
        assert (a.abs().amax(1) == 448).tolist() == [True, True, True, False, True, True, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(0.5, 3.0)], ids=str)
@pytest.mark.parametrize("vocabulary", [1000, 5003])
def test_logits(vocabulary: int, logit_map: LogitMap, dtype: torch.dtype) -> None:
    from specdist.core import argmax_lse_kernel as kernel
    from specdist.draft.eagle3.kernels import logits

    rows, steps = 9, 7
    whole, student, products = randoms(dtype, (rows, 2 * vocabulary), (rows, steps, vocabulary), (rows, vocabulary))
    found = kernel.argmax_lse(whole, logit_map)
    expected = argmax_lse(whole.float(), logit_map)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)

    choice = products.argmax(-1)
    choice[2] = -1
    student[1, 2] = products[1] * 3  # agrees
    log_sum_exp = logit_map(products).logsumexp(-1) + 0.3
    weights = torch.rand(rows, steps, device=DEVICE)
    before = student
    for kind in (LossKind("kl"), LossKind("mixed")):
        student, wide = before.clone(), before.float().clone()
        terms = losses.row_terms(wide, products.float(), logit_map, log_sum_exp, choice, weights, kind)
        others = logits.kl_row_terms(student, products, logit_map, log_sum_exp, choice, weights, kind)
        assert bool(terms[2][1, 2])
        torch.testing.assert_close(others, terms, rtol=1e-4, atol=1e-4)
        assert_close([student], [wide], dtype)

    student, wide = before.clone(), before.float().clone()
    terms = losses.hard_row_terms(wide, choice, weights)
    torch.testing.assert_close(logits.hard_row_terms(student, choice, weights), terms, rtol=1e-4, atol=1e-4)
    assert_close([student], [wide], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 4096, 5000])
def test_rows_of_a_table_on_the_host(width: int, dtype: torch.dtype) -> None:
    from specdist.draft.eagle3.kernels.host_rows import host_rows

    table = torch.randn(300, width).to(dtype)
    if not INTERPRETED:
        table = table.pin_memory()
    for count in (0, 1, 700):
        ids = torch.randint(300, (count,), device=DEVICE)
        assert torch.equal(host_rows(table, ids).cpu(), table[ids.cpu()])
