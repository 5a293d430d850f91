# SPDX-License-Identifier: Apache-2.0
"""`ops.merge` and its backward: one program per row and key head, in one pass over its queries, keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    out, lse, q, keys, values, merged, total, count, stride, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, dim = tl.arange(0, G), tl.arange(0, D)
    is_dim = dim < DIM
    head = (row * KV_HEADS + kv_head) * GROUP + group
    at, inside = head[:, None] * DIM + dim[None, :], (group < GROUP)[:, None] & is_dim[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
    mixed = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    peak = tl.load(lse + head, mask=group < GROUP, other=0.0).to(tl.float32)
    mass = tl.full([G], 1.0, tl.float32)
    own = (row * KV_HEADS + kv_head) * DIM + dim
    for k in range(count):
        key = tl.load(keys + k * stride + own, mask=is_dim, other=0.0).to(tl.float32)
        value = tl.load(values + k * stride + own, mask=is_dim, other=0.0).to(tl.float32)
        score = tl.sum(queries * key[None, :], axis=1) * scale
        higher = tl.maximum(peak, score)
        kept, share = tl.exp(peak - higher), tl.exp(score - higher)
        mixed = mixed * kept[:, None] + share[:, None] * value[None, :]
        mass, peak = mass * kept + share, higher
    tl.store(merged + at, mixed / mass[:, None], mask=inside)
    tl.store(total + head, peak + tl.log(mass), mask=group < GROUP)


@triton.jit
def _merge_backward(  # type: ignore[no-untyped-def]
    grad, merged, total, out, lse, q, keys, values, key_grads, value_grads, d_out, d_lse, d_q, count, stride, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, dim = tl.arange(0, G), tl.arange(0, D)
    is_head, is_dim = group < GROUP, dim < DIM
    head = (row * KV_HEADS + kv_head) * GROUP + group
    at, inside = head[:, None] * DIM + dim[None, :], is_head[:, None] & is_dim[None, :]
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    inner = tl.sum(d * tl.load(merged + at, mask=inside, other=0.0).to(tl.float32), axis=1)
    sums = tl.load(total + head, mask=is_head, other=0.0)
    share = tl.exp(tl.load(lse + head, mask=is_head, other=0.0).to(tl.float32) - sums)
    from_out = tl.sum(d * tl.load(out + at, mask=inside, other=0.0).to(tl.float32), axis=1)
    tl.store(d_out + at, d * share[:, None], mask=inside)
    tl.store(d_lse + head, share * (from_out - inner), mask=is_head)
    queries = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
    query_grad = tl.zeros([G, D], tl.float32)
    own = (row * KV_HEADS + kv_head) * DIM + dim
    for k in range(count):
        here = k * stride + own
        key = tl.load(keys + here, mask=is_dim, other=0.0).to(tl.float32)
        value = tl.load(values + here, mask=is_dim, other=0.0).to(tl.float32)
        p = tl.exp(tl.sum(queries * key[None, :], axis=1) * scale - sums)
        p = tl.where(is_head, p, 0.0)
        ds = p * (tl.sum(d * value[None, :], axis=1) - inner) * scale
        query_grad += ds[:, None] * key[None, :]
        key_grad = tl.load(key_grads + here, mask=is_dim, other=0.0) + tl.sum(ds[:, None] * queries, axis=0)
        value_grad = tl.load(value_grads + here, mask=is_dim, other=0.0) + tl.sum(p[:, None] * d, axis=0)
        tl.store(key_grads + here, key_grad, mask=is_dim)
        tl.store(value_grads + here, value_grad, mask=is_dim)
    tl.store(d_q + at, query_grad, mask=inside)


def _sizes(q: Tensor, keys: Tensor) -> dict[str, int]:
    kv_heads, dim = keys.shape[2:]
    group = q.shape[1] // kv_heads
    block, room = triton.next_power_of_2(group), triton.next_power_of_2(dim)
    return {"KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "G": block, "D": room}


def merge(out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`ops.merge`. Contiguous tensors; `keys` and `values` may be the first k of more."""
    out, lse = out.contiguous(), lse.contiguous()
    merged, total = torch.empty_like(q), torch.empty_like(lse, dtype=torch.float32)
    grid, sizes = (len(q), keys.shape[2]), _sizes(q, keys)
    _merge[grid](out, lse, q, keys, values, merged, total, len(keys), keys.stride(0), scale, **sizes, num_warps=1)
    return merged, total


def merge_backward(
    grad: Tensor, merged: Tensor, total: Tensor, out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, values: Tensor,
    scale: float, key_grads: Tensor, value_grads: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.merge_backward`. Contiguous tensors; those of k own keys may be the first k of more."""
    d_out, d_lse, d_q = torch.empty_like(q), torch.empty_like(total), torch.empty_like(q)
    out, lse = out.contiguous(), lse.contiguous()
    _merge_backward[(len(q), keys.shape[2])](
        grad, merged, total, out, lse, q, keys, values, key_grads, value_grads, d_out, d_lse, d_q,
        len(keys), keys.stride(0), scale, **_sizes(q, keys), num_warps=1,
    )  # fmt: skip
    return d_out, d_lse, d_q
