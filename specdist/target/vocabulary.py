# SPDX-License-Identifier: Apache-2.0
"""The target's input embedding and output head, read from its checkpoint without loading the model.

Every draft rank calls this: the two tensors are all that the drafts borrow from the target's weights. Where the target
side computes the argmax of its logits, its ranks take the head from here as well.
"""

import re
from typing import Any

import torch
from torch import Tensor

from specdist.core.errors import DataError
from specdist.core.model_config import read
from specdist.core.records import LogitMap, TargetVocabulary
from specdist.target.description import TargetDescription
from specdist.target.weights import StoredTensor

EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte", "embed_in", "embeddings", "embedding")
"""Last module name of the input embedding: Llama and most; Mistral's own; Bloom, Falcon; GPT-2, MPT; GPT-NeoX; Mamba;
ChatGLM. What stands before it (`model.`, `transformer.`, `language_model.model.`, nothing) does not matter."""

HEADS = ("lm_head", "embed_out", "output", "output_layer", "head")
"""Last module name of the output head: Llama and most; GPT-NeoX; Mistral's own; ChatGLM; others."""

ELSEWHERE = re.compile(r"(^|\.)(layers|h|blocks|vision\w*|visual|audio\w*|encoder|mtp\w*)\.")
"""Modules whose tensors are not the language model's ends, for all their names: layers (DeepSeek stores copies of the
embedding and the head with its multi-token-prediction layer), encoders of images and sound."""

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Keys of the configuration that multiply the logits (Cohere, Falcon-H1)."""

DIVISORS = ("logits_scaling",)
"""Keys that divide them (Granite)."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Gemma 2 and its kin; RecurrentGemma."""

LOGIT_KEY = re.compile(r"^(?!.*(attn|attention|router)).*(logit|lm_head|output).*(scal|mult|cap)")
"""Keys that look as if they changed the logits: one that is not known here is refused rather than ignored."""


def load_target_vocabulary(target: TargetDescription, dtype: torch.dtype | None = None) -> TargetVocabulary:
    """Embedding and head [V, H] of the target, on the CPU, in `dtype` (None: the checkpoint's).

    A checkpoint whose tables are padded beyond the configuration's `vocab_size` is cut to it. Raises DataError when
    the tensors are not found (naming what was looked for and what is there) or the head does more than a matrix.
    """
    stored_embedding, stored_head = _ends(target)
    embedding = _load(stored_embedding, target, dtype)
    head = embedding if stored_head is stored_embedding else _load(stored_head, target, dtype)
    return TargetVocabulary(embedding, head, logit_map(target))


def load_target_head(target: TargetDescription, dtype: torch.dtype | None = None) -> tuple[Tensor, LogitMap]:
    """The head alone, as `load_target_vocabulary` gives it, and how logits follow from its products."""
    return _load(_ends(target)[1], target, dtype), logit_map(target)


def _ends(target: TargetDescription) -> tuple[StoredTensor, StoredTensor]:
    """The stored input embedding and output head: one tensor where they are tied."""
    embedding, head = _find("input embedding", EMBEDDINGS, target), _find("output head", HEADS, target)
    if target.tied:  # stored once, under either name
        embedding, head = embedding or head, head or embedding
    if embedding is None:
        raise DataError(_not_found("input embedding", EMBEDDINGS, target))
    if head is None:
        raise DataError(_not_found("output head", HEADS, target))
    bias = head.name.removesuffix("weight") + "bias"
    if head is not embedding and bias in target.tensors:
        raise DataError(
            f"{target.path}: the output head has a bias ({bias}); drafts for such targets are not supported"
        )
    return embedding, head


def logit_map(target: TargetDescription) -> LogitMap:
    """What the target makes of its head's products. Raises DataError for a key that is not known."""
    values: dict[str, Any] = target.config.to_dict() | target.text_config.to_dict()
    values = {key: value for key, value in values.items() if LOGIT_KEY.search(key) and value is not None}
    known = (*MULTIPLIERS, *DIVISORS, *SOFTCAPS)
    strange = {k: v for k, v in values.items() if k not in known or not isinstance(v, int | float)}
    if strange:
        raise DataError(
            f"{target.path / 'config.json'}: {strange} may change the logits in a way that is not known here "
            f"(known, as numbers: {', '.join(known)})"
        )
    scale = _minicpm_scale(target)
    for key in MULTIPLIERS:
        scale *= values.get(key, 1.0)
    for key in DIVISORS:
        # HyperCLOVA X took the name from Granite and multiplies
        scale *= values.get(key, 1.0) ** (1 if "hyperclovax" in target.text_config.model_type else -1)
    softcaps = [float(values[key]) for key in SOFTCAPS if key in values]
    return LogitMap(float(scale), softcaps[0] if softcaps else None)


def _minicpm_scale(target: TargetDescription) -> float:
    """MiniCPM divides the last state by the width over that of the model whose training it took."""
    base = read(target.config, "dim_model_base")
    return base / target.hidden_size if base else 1.0


def _find(what: str, names: tuple[str, ...], target: TargetDescription) -> StoredTensor | None:
    def fits(tensor: StoredTensor) -> bool:
        *_, module, last = ("", *tensor.name.split("."))
        named = module in names and last == "weight" and not ELSEWHERE.search(tensor.name)
        height, width = tensor.shape if len(tensor.shape) == 2 else (0, 0)
        return named and height >= target.vocab_size and width == target.hidden_size

    found = [t for t in target.tensors.values() if fits(t)]
    if len(found) > 1:
        raise DataError(f"{target.path}: several tensors could be the {what}: {', '.join(t.name for t in found)}")
    return found[0] if found else None


def _not_found(what: str, names: tuple[str, ...], target: TargetDescription) -> str:
    tensors = target.tensors.values()
    tables = [f"{t.name} {list(t.shape)}" for t in tensors if len(t.shape) == 2 and max(t.shape) >= target.vocab_size]
    others = [t.name for t in tensors if not re.search(r"\.\d+\.", t.name)]
    return (
        f"{target.path}: no {what} of shape [{target.vocab_size}, {target.hidden_size}] (vocab_size, hidden_size) "
        f"found. Looked for names that end in {', '.join(f'{n}.weight' for n in names)}; of that height the "
        f"checkpoint holds: {', '.join(tables) or 'nothing'}; outside its layers: "
        f"{', '.join(others[:20]) or 'nothing'}"
    )


def _load(stored: StoredTensor, target: TargetDescription, dtype: torch.dtype | None) -> Tensor:
    if stored.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise DataError(f"{stored.file}: {stored.name} is quantised ({stored.dtype}), which is not supported")
    table = stored.load()[: target.vocab_size]
    return table.to(dtype or stored.dtype).contiguous()
