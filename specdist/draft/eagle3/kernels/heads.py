# SPDX-License-Identifier: Apache-2.0
"""`ops.heads` and its backward: one program per row, over all its heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _heads(  # type: ignore[no-untyped-def]
    product, entry, cos, sin, active, positions, q, k, v, step, width, entry_width,
    Q: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, H)[:, None], tl.arange(0, D)[None, :]
    is_pair = pair < HALF
    inside = (head < Q + 2 * KV) & is_pair
    here = row * width + head * 2 * HALF + pair
    there = (tl.load(active + row) + 1 + step) * entry_width + head * 2 * HALF + pair
    first = tl.load(product + here, mask=inside, other=0.0).to(tl.float32)
    first += tl.load(entry + there, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(product + here + HALF, mask=inside, other=0.0).to(tl.float32)
    second += tl.load(entry + there + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = (tl.load(positions + row) + step) * HALF + pair
    is_turned = head < Q + KV
    c = tl.where(is_turned, tl.load(cos + angle, mask=is_pair, other=0.0), 1.0)
    s = tl.where(is_turned, tl.load(sin + angle, mask=is_pair, other=0.0), 0.0)
    low, high = first * c - second * s, second * c + first * s
    to_q = q + (row * Q + head) * 2 * HALF + pair
    tl.store(to_q, low, mask=is_pair & (head < Q))
    tl.store(to_q + HALF, high, mask=is_pair & (head < Q))
    if KV > 0:
        to_k = k + (row * KV + head - Q) * 2 * HALF + pair
        is_key = is_pair & (head >= Q) & is_turned
        tl.store(to_k, low, mask=is_key)
        tl.store(to_k + HALF, high, mask=is_key)
        to_v = v + (row * KV + head - Q - KV) * 2 * HALF + pair
        is_value = inside & (head >= Q + KV)
        tl.store(to_v, low, mask=is_value)
        tl.store(to_v + HALF, high, mask=is_value)


@triton.jit
def _heads_backward(  # type: ignore[no-untyped-def]
    d_q, more, d_k, d_v, cos, sin, active, positions, d_product, entry_grad, step, width, entry_width,
    MORE: tl.constexpr, Q: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, H)[:, None], tl.arange(0, D)[None, :]
    is_pair = pair < HALF
    inside = (head < Q + 2 * KV) & is_pair
    from_q, is_q = (row * Q + head) * 2 * HALF + pair, is_pair & (head < Q)
    low = tl.load(d_q + from_q, mask=is_q, other=0.0).to(tl.float32)
    high = tl.load(d_q + from_q + HALF, mask=is_q, other=0.0).to(tl.float32)
    if MORE:
        low += tl.load(more + from_q, mask=is_q, other=0.0).to(tl.float32)
        high += tl.load(more + from_q + HALF, mask=is_q, other=0.0).to(tl.float32)
    is_turned = head < Q + KV
    if KV > 0:
        from_k, is_k = (row * KV + head - Q) * 2 * HALF + pair, is_pair & (head >= Q) & is_turned
        low += tl.load(d_k + from_k, mask=is_k, other=0.0).to(tl.float32)
        high += tl.load(d_k + from_k + HALF, mask=is_k, other=0.0).to(tl.float32)
        from_v, is_v = (row * KV + head - Q - KV) * 2 * HALF + pair, inside & (head >= Q + KV)
        low += tl.load(d_v + from_v, mask=is_v, other=0.0).to(tl.float32)
        high += tl.load(d_v + from_v + HALF, mask=is_v, other=0.0).to(tl.float32)
    angle = (tl.load(positions + row) + step) * HALF + pair
    c = tl.where(is_turned, tl.load(cos + angle, mask=is_pair, other=0.0), 1.0)
    s = tl.where(is_turned, tl.load(sin + angle, mask=is_pair, other=0.0), 0.0)
    first, second = low * c + high * s, high * c - low * s
    here = d_product + row * width + head * 2 * HALF + pair
    tl.store(here, first, mask=inside)
    tl.store(here + HALF, second, mask=inside)
    there = entry_grad + (tl.load(active + row) + 1 + step) * entry_width + head * 2 * HALF + pair
    first += tl.load(there, mask=inside, other=0.0).to(tl.float32)
    second += tl.load(there + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(there, first, mask=inside)
    tl.store(there + HALF, second, mask=inside)


def _sizes(parts: list[Tensor], cos: Tensor) -> dict[str, int]:
    q, kv, half = parts[0].shape[1], parts[1].shape[1] if len(parts) > 1 else 0, cos.shape[1]
    rooms = {"H": triton.next_power_of_2(q + 2 * kv), "D": triton.next_power_of_2(half)}
    return {"Q": q, "KV": kv, "HALF": half, **rooms}


def heads(
    product: Tensor, entry: Tensor, cos: Tensor, sin: Tensor, active: Tensor, positions: Tensor, step: int,
    parts: list[Tensor],
) -> None:  # fmt: skip
    """`ops.heads`. Contiguous tensors."""
    q, k, v = (parts * 3)[:3]
    _heads[(len(active),)](
        product, entry, cos, sin, active, positions, q, k, v, step, product.shape[1], entry.shape[1],
        **_sizes(parts, cos), num_warps=8,
    )  # fmt: skip


def heads_backward(
    grads: list[Tensor], more: Tensor | None, cos: Tensor, sin: Tensor, active: Tensor, positions: Tensor, step: int,
    entry_grad: Tensor,
) -> Tensor:  # fmt: skip
    """`ops.heads_backward`. Contiguous tensors."""
    grads = [grad.contiguous() for grad in grads]
    q, k, v = (grads * 3)[:3]
    width = sum(grad[0].numel() for grad in grads)
    d_product = entry_grad.new_empty(len(active), width)
    _heads_backward[(len(active),)](
        q, q if more is None else more, k, v, cos, sin, active, positions, d_product, entry_grad, step, width,
        entry_grad.shape[1], MORE=more is not None, **_sizes(grads, cos), num_warps=8,
    )  # fmt: skip
    return d_product
