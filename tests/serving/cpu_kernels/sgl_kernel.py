# SPDX-License-Identifier: Apache-2.0
"""Plays SGLang's compiled `sgl_kernel` on CPUs without AMX, for which SGLang publishes none.

Plain torch, written for clarity: the attention of one request after the other, and the bookkeeping of speculative
decoding. Everything above it (scheduler, memory, EAGLE worker, models, weight loading) is SGLang's own. Chains only:
a tree of drafts (--speculative-eagle-topk above 1) is refused.
"""

from __future__ import annotations

import ctypes

import psutil
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_OPS = torch.library.Library("sgl_kernel", "DEF")
_CHAIN, _FREE = 1, -1

# Ranks compare what is free with each other, and take what has gone of it since they began for their own, as if each
# had a GPU: of this memory others take, too.
_MEMORY = psutil.virtual_memory()
_HALF = _MEMORY._replace(available=_MEMORY.total // 2)
psutil.virtual_memory = lambda: _HALF


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> Tensor:
    """The last len(q) positions of a sequence over all of it, or each over what is before it; q, k, v are [tokens,
    heads, dim]."""
    mask = torch.ones(len(q), len(k), dtype=torch.bool)
    mask = mask.tril(len(k) - len(q)) if causal else mask
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _plain(scales: tuple[float, float], logit_cap: float, cross: bool, window: int, rest: tuple[object, ...]) -> None:
    if scales != (1.0, 1.0) or logit_cap or cross or window > 0 or any(x is not None for x in rest):
        raise NotImplementedError("plain attention over all positions only")


def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: float, v_scale: float, out: Tensor, k: Tensor | None,
    v: Tensor | None, loc: Tensor, logits: Tensor, req_to_token: Tensor, requests: Tensor, seq_lens: Tensor,
    scale: float, logit_cap: float, cross: bool, window: int, encoder_lens: Tensor | None, sinks: Tensor | None,
) -> None:  # fmt: skip
    """One new token a request: put it into the cache, and attend to everything up to it."""
    _plain((k_scale, v_scale), logit_cap, cross, window, (encoder_lens, sinks))
    if k is not None and v is not None:
        k_cache[loc], v_cache[loc] = k.view(-1, *k_cache.shape[1:]), v.view(-1, *v_cache.shape[1:])
    for i, (request, length) in enumerate(zip(requests.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[request, :length]
        out[i : i + 1] = _attend(q[i : i + 1], k_cache[slots], v_cache[slots], scale)


def _extend_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: float, v_scale: float,
    req_to_token: Tensor, requests: Tensor, seq_lens: Tensor, extend_lens: Tensor, extend_starts: Tensor,
    max_extend: int, scale: float, logit_cap: float, cross: bool, window: int, encoder_lens: Tensor | None,
    sinks: Tensor | None, tree_mask: Tensor | None, causal: bool,
) -> None:  # fmt: skip
    """Some new tokens a request (prefill, verification): over the cached ones before them, and causally each other, or
    all (a block of DFlash)."""
    _plain((k_scale, v_scale), logit_cap, cross, window, (encoder_lens, sinks, tree_mask))
    sizes = zip(requests.tolist(), seq_lens.tolist(), extend_lens.tolist(), extend_starts.tolist(), strict=True)
    for request, length, new, start in sizes:
        slots, rows = req_to_token[request, : length - new], slice(start, start + new)
        keys, values = torch.cat([k_cache[slots], k[rows]]), torch.cat([v_cache[slots], v[rows]])
        out[rows] = _attend(q[rows], keys, values, scale, causal)


_OPS.define(
    "decode_attention_cpu(Tensor q, Tensor(a!) kc, Tensor(b!) vc, float ks, float vs, Tensor(c!) out, Tensor? k, "
    "Tensor? v, Tensor loc, Tensor logits, Tensor req_to_token, Tensor requests, Tensor seq_lens, float scale, "
    "float cap, bool cross, int window, Tensor? encoder_lens, Tensor? sinks) -> ()"
)
_OPS.define(
    "extend_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor kc, Tensor vc, float ks, float vs, "
    "Tensor req_to_token, Tensor requests, Tensor seq_lens, Tensor extend_lens, Tensor starts, int max_extend, "
    "float scale, float cap, bool cross, int window, Tensor? encoder_lens, Tensor? sinks, Tensor? tree_mask, "
    "bool causal) -> ()"
)
_OPS.impl("decode_attention_cpu", _decode_attention, "CPU")
_OPS.impl("extend_attention_cpu", _extend_attention, "CPU")


def build_tree_kernel_efficient_cpu(
    parents: Tensor, selected: Tensor, seq_lens: Tensor, mask: Tensor, positions: Tensor, index: Tensor,
    next_token: Tensor, next_sibling: Tensor, topk: int, depth: int, tokens: int, mask_mode: int,
) -> None:  # fmt: skip
    """The tree of one chain a request: each token follows the one before it."""
    if topk != _CHAIN:
        raise NotImplementedError("chains only: --speculative-eagle-topk 1")
    batch, steps = len(seq_lens), torch.arange(tokens)
    positions.copy_((seq_lens[:, None] + steps).flatten())
    index.copy_(torch.arange(batch * tokens).view(batch, tokens))
    next_token.copy_(torch.where(steps + 1 < tokens, steps + 1, _FREE).expand(batch, tokens))
    next_sibling.fill_(_FREE)
    mask.copy_(torch.ones(tokens, tokens, dtype=torch.bool).tril().flatten().repeat(batch))


def verify_tree_greedy_cpu(
    predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor, retrive_index: Tensor,
    retrive_next_token: Tensor, retrive_next_sibling: Tensor, target_predict: Tensor,
) -> None:  # fmt: skip
    """Accept drafted tokens while they are what the target would have said; then comes the target's own token."""
    said = target_predict.flatten()
    for i, (chain, index) in enumerate(zip(candidates.tolist(), retrive_index.tolist(), strict=True)):
        accepted = 0
        accept_index[i, 0] = index[0]
        while accepted + 1 < accept_index.shape[1] and chain[accepted + 1] == said[index[accepted]]:
            predicts[index[accepted]] = said[index[accepted]]
            accepted += 1
            accept_index[i, accepted] = index[accepted]
        accept_token_num[i] = accepted
        predicts[index[accepted]] = said[index[accepted]]


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, requests: Tensor, seq_lens: Tensor, topk: int, steps: int, pool_len: int
) -> Tensor:
    """The slots of each request and of its drafted tokens, which follow them."""
    return req_to_token[requests].repeat_interleave(topk, 0)


def assign_req_to_token_pool_cpu(
    requests: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, pool_len: int
) -> None:
    done = 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        req_to_token[request, start:end] = slots[done : done + end - start].to(req_to_token.dtype)
        done += end - start


def assign_extend_cache_locs_cpu(
    requests: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, pool_len: int
) -> None:
    spans = zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True)
    slots.copy_(torch.cat([req_to_token[request, start:end] for request, start, end in spans]))


def assign_draft_cache_locs_contiguous_cpu(
    requests: Tensor, req_to_token: Tensor, seq_lens: Tensor, slots: Tensor, pool_len: int, topk: int, steps: int
) -> None:
    assign_extend_cache_locs_cpu(requests, req_to_token, seq_lens, seq_lens + topk * steps, slots, pool_len)


def fill_bonus_tokens_cpu(accepted: Tensor, lengths: Tensor, bonus: Tensor, stride: int) -> None:
    """The last accepted token of each request."""
    bonus.copy_(accepted.flatten()[torch.arange(len(lengths)) * stride + lengths - 1])


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, slots: Tensor, accepted_slots: Tensor, size: int) -> None:
    chosen = accept_index.flatten()[:size]
    chosen = chosen[chosen != _FREE].long()
    accepted_slots[: len(chosen)] = slots[chosen]


def rotate_input_ids_cpu(
    input_ids: Tensor, starts: Tensor, lengths: Tensor, new: Tensor, select: Tensor | None = None
) -> None:
    """Shift each request's tokens one to the left and put a new one at the end, or where `select` says."""
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if length:
            input_ids[start : start + length - 1] = input_ids[start + 1 : start + length].clone()
            input_ids[start + length - 1 if select is None else int(select[i])] = new[i]


def copy_all_layer_kv_cache_cpu(buffers: Tensor, strides: Tensor, targets: Tensor, sources: Tensor) -> None:
    """In every buffer (an address, and the bytes of a slot) copy some slots over others."""
    for address, stride in zip(buffers.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(address + source * stride, stride) for source in sources.tolist()]
        for target, row in zip(targets.tolist(), rows, strict=True):
            ctypes.memmove(address + target * stride, row, stride)
