# SPDX-License-Identifier: Apache-2.0
"""The arithmetic between the matrix products of a TTT step, forward and backward: one pass over memory each.

Plain functions of tensors without autograd, compiled by `op_set.py`; the tests compare every backward with autograd's
of the forward. All compute in fp32 (fp64 for fp64 inputs) and round once, when they return.

Shapes: n rows, H hidden, I intermediate, Hq and Hkv heads of D, k own keys of earlier steps.
"""

import torch
from torch import Tensor

from specdist.draft.common.layers import rotate
from specdist.draft.common.precision import at_least_fp32


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [n, H]."""
    wide = at_least_fp32(x)
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, carry: Tensor) -> tuple[Tensor, Tensor]:
    """`carry` [n, H] plus the gradient of `norm` with respect to x; and to the weight, [H] in fp32."""
    wide, grad = at_least_fp32(x), at_least_fp32(grad)
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, weighted = wide * scale, grad * weight
    inner = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return (carry + inner).to(x.dtype), (grad * normed).sum(0)


def state(place: Tensor, x: Tensor, rows: Tensor, weight: Tensor, eps: float) -> None:
    """Writes `norm` of x[rows] to `place` [P, H]."""
    place.copy_(norm(x[rows], weight, eps))


def chosen(rows: Tensor, which: Tensor) -> Tensor:
    """rows[which], and zero where `which` is -1."""
    return torch.where((which >= 0)[:, None], at_least_fp32(rows[which.clamp(min=0)]), 0.0)


def state_backward(
    grads: Tensor, which: Tensor, x: Tensor, weight: Tensor, eps: float, carry: Tensor
) -> tuple[Tensor, Tensor]:
    """`norm_backward` for rows whose gradient is `chosen` of `grads` [P, H]: the rows that have a loss."""
    return norm_backward(chosen(grads, which), x, weight, eps, carry)


def state_grad(grads: Tensor, which: Tensor, carry: Tensor) -> Tensor:
    """`carry` [n, H] plus `chosen` of `grads`."""
    return (carry + chosen(grads, which)).to(carry.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [n, I]."""
    wide = at_least_fp32(gate)
    return (wide * wide.sigmoid() * up).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """`swiglu` again, in the place of its gradient; and its gradients with respect to gate and up, in theirs."""
    d, g, u = (at_least_fp32(t) for t in (grad, gate, up))
    share = g.sigmoid()
    silu = g * share
    found = silu * u, d * u * share * (1 + g * (1 - share)), d * silu
    for place, values in zip((grad, gate, up), found, strict=True):
        place.copy_(values)


def heads(
    product: Tensor, entry: Tensor, cos: Tensor, sin: Tensor, active: Tensor, positions: Tensor, step: int,
    parts: list[Tensor],
) -> None:  # fmt: skip
    """Writes to `parts` the heads of a step's projections: queries [n, Hq, D] and, in all but the first step, keys and
    values [n, Hkv, D].

    `product` [n, width of the parts] is what the states contribute; the token that active row i meets contributes
    entry[active[i] + 1 + step]. Queries and keys are turned by the angles of position positions[i] + step, whose `cos`
    and `sin` [positions, D/2] are given.
    """
    total = at_least_fp32(product) + entry[active + (1 + step), : product.shape[1]]
    angles = positions + step
    turn = cos[angles][:, None], sin[angles][:, None]
    widths = [part[0].numel() for part in parts]
    for i, (part, wide) in enumerate(zip(parts, total.split(widths, dim=-1), strict=True)):
        wide = wide.unflatten(-1, part.shape[1:])
        part.copy_(rotate(wide, *turn) if i < 2 else wide)


def heads_backward(
    grads: list[Tensor], more: Tensor | None, cos: Tensor, sin: Tensor, active: Tensor, positions: Tensor, step: int,
    entry_grad: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient of `heads` with respect to `product`, from those of its parts; `more` is added to the first. The
    gradient with respect to `entry` is added to `entry_grad`, in place."""
    angles = positions + step
    turn = cos[angles][:, None], -sin[angles][:, None]
    wide = [at_least_fp32(grad) for grad in grads]
    if more is not None:
        wide[0] = wide[0] + more
    total = torch.cat([(rotate(g, *turn) if i < 2 else g).flatten(1) for i, g in enumerate(wide)], dim=-1)
    at, width = active + (1 + step), total.shape[1]
    entry_grad[at, :width] = (entry_grad[at, :width] + total).to(entry_grad.dtype)
    return total.to(entry_grad.dtype)


def merge(out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Add each row's own keys and values [k, n, Hkv, D] of later steps to an attention `out` [n, Hq, D] with its `lse`.

    softmax over both sets = the two softmaxes weighted by their shares of exp(log-sum-exp): exact. Returns the merged
    output [n, Hq, D] and log-sum-exp [n, Hq].
    """
    queries, base = _grouped(q, keys), lse.unflatten(1, (keys.shape[2], -1))
    scores = (queries * at_least_fp32(keys)[:, :, :, None]).sum(-1) * scale  # [k, n, Hkv, G]
    total = torch.cat([base[None], scores]).logsumexp(0)
    merged = _grouped(out, keys) * (base - total).exp()[..., None]
    merged = merged + ((scores - total).exp()[..., None] * values[:, :, :, None]).sum(0)
    return merged.flatten(1, 2).to(q.dtype), total.flatten(1, 2)


def merge_backward(
    grad: Tensor,
    merged: Tensor,
    total: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    key_grads: Tensor,
    value_grads: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `merge` with respect to out, lse and q; adds those to keys and values to `key_grads` and
    `value_grads` [k, n, Hkv, D], in place. `merged` and `total` are what `merge` returned."""
    d, queries, parts = (_grouped(t, keys) for t in (grad, q, out))
    wide_keys, wide_values = (at_least_fp32(t)[:, :, :, None] for t in (keys, values))
    sums = total.unflatten(1, (keys.shape[2], -1))
    share = (lse.unflatten(1, (keys.shape[2], -1)) - sums).exp()  # of the document's keys
    shares = ((queries * wide_keys).sum(-1) * scale - sums).exp()  # [k, n, Hkv, G], of the own keys
    inner = (d * _grouped(merged, keys)).sum(-1)
    score_grads = shares * ((d * wide_values).sum(-1) - inner) * scale
    key_grads.add_((score_grads[..., None] * queries).sum(3).to(key_grads.dtype))
    value_grads.add_((shares[..., None] * d).sum(3).to(value_grads.dtype))
    d_q = (score_grads[..., None] * wide_keys).sum(0)
    d_lse = share * ((d * parts).sum(-1) - inner)
    d_out = d * share[..., None]
    return d_out.flatten(1, 2).to(out.dtype), d_lse.flatten(1, 2), d_q.flatten(1, 2).to(q.dtype)


def _grouped(heads_of_rows: Tensor, keys: Tensor) -> Tensor:
    """[n, Hq, D] as [n, Hkv, G, D] in at least fp32: the queries that share a key side by side."""
    return at_least_fp32(heads_of_rows).unflatten(1, (keys.shape[2], -1))
