# SPDX-License-Identifier: Apache-2.0
"""The arithmetic between products: every written-out backward is that of its forward; the merge is one softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdist.draft.eagle3 import ops

N, HIDDEN, HQ, HKV, D, EPS, SCALE = 7, 12, 4, 2, 6, 1e-5, 0.3


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gradients(output: Tensor | list[Tensor], inputs: list[Tensor], grad: Tensor | list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad)  # type: ignore[arg-type]


def test_norm() -> None:
    x, weight, grad, carry = randoms((N, HIDDEN), (HIDDEN,), (N, HIDDEN), (N, HIDDEN))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = ops.norm(x, weight, EPS)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (HIDDEN,), weight, EPS))
    d_x, d_weight = gradients(out, leaves, grad)
    with torch.no_grad():
        found = ops.norm_backward(grad, x, weight, EPS, carry)
    torch.testing.assert_close(found, (carry + d_x, d_weight))


def test_the_gradients_of_states_reach_their_rows() -> None:
    x, weight, grads, carry, states = randoms((N, HIDDEN), (HIDDEN,), (4, HIDDEN), (N, HIDDEN), (4, 2, HIDDEN))
    rows = torch.tensor([5, 2, 3, 0])
    which = torch.tensor([-1, -1, 1, 2, -1, 0, -1])  # the inverse of rows, but the last of them has no loss
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = ops.norm(x[rows], weight, EPS)
    with torch.no_grad():
        ops.state(states[:, 1], x, rows, weight, EPS)
    torch.testing.assert_close(states[:, 1], out)
    d_x, d_weight = gradients(out[:3], leaves, grads[:3])
    with torch.no_grad():
        found = ops.state_backward(grads, which, x, weight, EPS, carry)
        unnormed = ops.state_grad(grads, which, carry)
    torch.testing.assert_close(found, (carry + d_x, d_weight))
    torch.testing.assert_close(unnormed, carry.index_add(0, rows[:3], grads[:3]))


def test_swiglu() -> None:
    gate, up, grad = randoms((N, HIDDEN), (N, HIDDEN), (N, HIDDEN))
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    out = ops.swiglu(gate, up)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)
    expected = gradients(out, leaves, grad)
    with torch.no_grad():
        ops.swiglu_backward(grad, gate, up)
    torch.testing.assert_close((grad, gate, up), (out, *expected))


@pytest.mark.parametrize("count", [1, 3], ids=["queries", "queries, keys and values"])
def test_heads(count: int) -> None:
    sizes = [(HQ, D), (HKV, D), (HKV, D)][:count]
    width = sum(heads * dim for heads, dim in sizes)
    product, entry, angles = randoms((N, width), (3 * N, (HQ + 2 * HKV) * D), (30, D // 2))
    active, positions = torch.tensor([0, 1, 3, 4, 5, 8, 11]), torch.tensor([0, 1, 3, 0, 1, 4, 7])
    cos, sin = angles.cos(), angles.sin()
    leaves = [product.requires_grad_(), entry.requires_grad_()]

    def expected() -> list[Tensor]:
        total = product + entry[active + 3, :width]
        parts = [p.unflatten(-1, (-1, D)) for p in total.split([h * d for h, d in sizes], -1)]
        c, s = cos[positions + 2][:, None], sin[positions + 2][:, None]
        turned = [torch.cat([p[..., :3] * c - p[..., 3:] * s, p[..., 3:] * c + p[..., :3] * s], -1) for p in parts]
        return [*turned[:2], *parts[2:]]

    out = expected()
    with torch.no_grad():
        found = [torch.empty_like(part) for part in out]
        ops.heads(product, entry, cos, sin, active, positions, 2, found)
    torch.testing.assert_close(found, out)
    grads, more = [part + 1 for part in out], torch.ones(N, HQ, D, dtype=torch.float64)
    d_product, d_entry = gradients(out, leaves, [grads[0] + more, *grads[1:]])
    with torch.no_grad():
        entry_grad = torch.ones_like(entry)
        result = ops.heads_backward(grads, more, cos, sin, active, positions, 2, entry_grad)
    torch.testing.assert_close(result, d_product)
    torch.testing.assert_close(entry_grad, 1 + d_entry)


@pytest.mark.parametrize("later", [1, 6])
def test_merging_own_keys_is_one_softmax_over_both(later: int) -> None:
    q, k, v, *own = randoms((N, HQ, D), (N, HKV, D), (N, HKV, D), (later, N, HKV, D), (later, N, HKV, D))
    scores = torch.einsum("ihd,jhd->ihj", q, k.repeat_interleave(HQ // HKV, 1)) * SCALE
    scores = scores.masked_fill(torch.arange(N) > torch.arange(N)[:, None, None], float("-inf"))
    out, lse = torch.einsum("ihj,jhd->ihd", scores.softmax(-1), v.repeat_interleave(HQ // HKV, 1)), scores.logsumexp(-1)
    merged, total = ops.merge(out, lse, q, *own, SCALE)
    for i in range(N):
        keys, values = (torch.cat([t[: i + 1], o[:, i]]) for t, o in zip((k, v), own, strict=True))
        for head in range(HQ):
            scores = keys[:, head // 2] @ q[i, head] * SCALE
            torch.testing.assert_close(merged[i, head], scores.softmax(0) @ values[:, head // 2])
            torch.testing.assert_close(total[i, head], scores.logsumexp(0))


@pytest.mark.parametrize("later", [1, 6])
def test_merging_backwards(later: int) -> None:
    shapes = ((N, HQ, D), (N, HQ), (N, HQ, D), (later, N, HKV, D), (later, N, HKV, D), (N, HQ, D))
    out, lse, q, keys, values, grad = randoms(*shapes)
    leaves = [t.requires_grad_() for t in (out, lse, q, keys, values)]
    merged, total = ops.merge(*leaves, SCALE)
    expected = gradients(merged, leaves, grad)
    with torch.no_grad():
        sums = torch.ones_like(keys), torch.ones_like(values)
        found = ops.merge_backward(grad, merged, total, *leaves, SCALE, *sums)
    torch.testing.assert_close((*found, *(s - 1 for s in sums)), expected)
