# SPDX-License-Identifier: Apache-2.0
"""Attention over packed documents, as an attention function of transformers.

It is registered under `NAME` and reaches every model that takes its attention from transformers' AttentionInterface.
No mask is registered beside it, which tells transformers to build none: the documents travel as the keyword argument
`documents` through the model's forward, and each is attended to on its own. Sliding windows, score soft caps and
attention sinks are keyword arguments that the models hand to any attention function.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from transformers import AttentionInterface

NAME = "specdist_packed"

GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""torch 2.11's varlen_attn takes fewer key/value heads as they are, later ones need the flag."""


class NotPackable(Exception):
    """The model does not use the packed attention function as it must for packing to be right; the text says how."""


@dataclass
class Documents:
    """The documents of one packed forward, as the attention function needs them."""

    lengths: list[int]
    cu_seqlens: Tensor
    """int32 [D + 1], on the device of the forward."""
    attended: int = 0
    """How often the attention function ran with these documents: once per layer, or the model attends elsewhere too."""


def register() -> str:
    """Make the packed attention function known to transformers; returns its name for `attn_implementation`."""
    AttentionInterface.register(NAME, packed_attention)
    return NAME


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document. Returns [1, T, Hq, Dv] and None, as transformers expects it.

    Args:
        query: [1, Hq, T, D], key: [1, Hkv, T, D], value: [1, Hkv, T, Dv], the documents end to end along T.
        scaling: of the scores; 1/sqrt(D) if None.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: [Hq], a logit per head that takes part in the softmax and carries no value (attention sink).
    """
    if documents is None:
        raise NotPackable("it does not hand its keyword arguments on to its attention")
    if attention_mask is not None or position_bias is not None:
        raise NotPackable("it builds an attention mask or bias of its own")
    documents.attended += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and _fits_varlen(query, value):
        return _varlen(query, key, value, documents, scale, sliding_window, s_aux), None
    outputs = []
    for q, k, v in zip(*(x.split(documents.lengths, dim=2) for x in (query, key, value)), strict=True):
        window = sliding_window if sliding_window is not None and sliding_window < q.shape[2] else None
        if softcap is None and s_aux is None:
            mask = None if window is None else _causal(q.shape[2], window, q.device)
            gqa = q.shape[1] != k.shape[1]
            o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
        else:
            o = _by_formula(q, k, v, scale, window, softcap, s_aux)
        outputs.append(o.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _fits_varlen(query: Tensor, value: Tensor) -> bool:
    """FlashAttention-2's conditions: half precision, head dimension a multiple of 8 up to 256, Ampere or newer."""
    head = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and head % 8 == 0
        and head <= 256
        and value.shape[-1] <= head
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    longest = max(documents.lengths)
    value_dim = v.shape[-1]
    if value_dim < q.shape[-1]:  # latent attention (DeepSeek) has narrower values; the kernel wants equal widths
        v = F.pad(v, (0, q.shape[-1] - value_dim))
    output, lse = varlen_attn(
        q[0].transpose(0, 1),
        k[0].transpose(0, 1),
        v[0].transpose(0, 1),
        documents.cu_seqlens,
        documents.cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None or window >= longest else window - 1, 0),
        return_aux=AuxRequest(lse=True),
        **GROUPED,
    )
    output = output[None, ..., :value_dim]
    return output if sinks is None else beside_sinks(output, lse.T, sinks)  # lse is [Hq, T], whatever torch says


def beside_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """What is left of attention once each head's sink has its share of the softmax: exp(lse) of exp(lse) + exp(sink).

    Args:
        output: [1, T, Hq, Dv], of attention without sinks; lse: fp32 [T, Hq], the log-sum-exp of its scores.
        sinks: [Hq].
    """
    return (output * torch.sigmoid(lse - sinks.float())[..., None]).to(output.dtype)


def _by_formula(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of one document written out, for the scores that no fused kernel here computes: [1, Hq, L, Dv]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~_causal(q.shape[2], window, q.device), -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]]
    return weights.to(v.dtype) @ v


def _causal(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length], true where row may see column."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)
