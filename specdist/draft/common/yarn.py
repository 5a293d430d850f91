# SPDX-License-Identifier: Apache-2.0
"""The factor that YaRN puts on cosines and sines, for which engines read different keys.

With m(s) = 0.1 s ln(factor) + 1 (1 where factor <= 1), it is
- in transformers, and in vLLM from 0.30 on: `attention_factor`, else m(mscale) / m(mscale_all_dim), else m(1)
- in vLLM up to 0.28: m(1) * `attn_factor`
- in SGLang: m(mscale) / m(mscale_all_dim) where both are given, else m(1); times `attn_factor`

(`_compute_yarn_parameters` in transformers; `yarn_scaling_rope.py` in vLLM; `rotary_embedding/yarn.py` in SGLang.)
"""

import math
from collections.abc import Mapping
from typing import Any

NAMES = ("attention_factor", "attn_factor", "mscale", "mscale_all_dim")


def plain(rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope` with its factor, as transformers understands it, under `attention_factor` alone, or under no key where it
    follows from `factor`. RoPEs that turn alike are equal then, if they are of one of `SCALINGS`."""
    factor = _transformers(rope)
    rest = {key: value for key, value in rope.items() if key not in NAMES}
    return rest if math.isclose(factor, _magnitude(rope, 1)) else rest | {"attention_factor": factor}


def for_engines(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A `plain` RoPE in the words of all engines."""
    if "attention_factor" not in rope:
        return dict(rope)
    return {**rope, "attn_factor": rope["attention_factor"] / _magnitude(rope, 1)}


def from_engines(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The `plain` RoPE of a draft that was written for engines, which may say `attn_factor` alone."""
    if rope.get("attn_factor") is not None and rope.get("attention_factor") is None:
        return plain({**rope, "attention_factor": engine_factors(rope)["SGLang"]})
    return plain(rope)


def engine_factors(rope: Mapping[str, Any]) -> dict[str, float]:
    """What each engine makes of a `rope_type` yarn."""
    scale = rope.get("attn_factor") or 1.0
    pair = rope.get("mscale") is not None and rope.get("mscale_all_dim") is not None
    return {
        "SGLang": scale * (_ratio(rope) if pair else _magnitude(rope, 1)),
        "vLLM up to 0.28": scale * _magnitude(rope, 1),
        "vLLM from 0.30 on": _transformers(rope),
    }


def _transformers(rope: Mapping[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    return _ratio(rope) if rope.get("mscale") and rope.get("mscale_all_dim") else _magnitude(rope, 1)


def _ratio(rope: Mapping[str, Any]) -> float:
    return _magnitude(rope, rope["mscale"]) / _magnitude(rope, rope["mscale_all_dim"])


def _magnitude(rope: Mapping[str, Any], scale: float) -> float:
    return magnitude(rope.get("factor") or 1.0, scale)


def magnitude(factor: float, scale: float) -> float:
    """m(scale)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
