# SPDX-License-Identifier: Apache-2.0
"""What serving engines would read otherwise than it was trained, or refuse: told by file and key before it is served.

Here stands what holds for every algorithm; the rest is in the algorithms' own `faults`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from specdist.core.errors import DataError
from specdist.draft.common.yarn import engine_factors
from specdist.draft.registry import ALGORITHMS
from specdist.export.config_json import CONFIG
from specdist.export.directory import WEIGHTS, read_directory


def check_directory(directory: Path) -> str:
    """Check a draft that is exported already, ours or another's; returns the algorithm's name. Raises DataError: it
    cannot be read, or an engine would load it wrongly; the message names file and key."""
    from specdist.export import understand

    config, tensors = read_directory(directory)
    algorithm = understand(directory, config, tensors).algorithm
    check_contents(directory, config, tensors)
    return algorithm


def check_contents(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The same of what is to be written. Raises DataError."""
    found = [f"{CONFIG}: {fault}" for fault in _of_layers(config)]
    found += [f"{WEIGHTS}: {fault}" for fault in _of_vocabulary(config, tensors)]
    for algorithm in ALGORITHMS.values():
        if algorithm.recognises(config):
            found += [f"{CONFIG}: {fault}" for fault in algorithm.faults(config, tensors)]
            break
    if found:
        raise DataError(f"serving engines would not load {directory} as it was trained:\n  " + "\n  ".join(found))


def _of_layers(config: Mapping[str, Any]) -> list[str]:
    where = "transformer_layer_config" if "speculators_model_type" in config else ""
    stack, found = config.get(where) or config if where else config, []
    at = f"{where}." if where else ""
    for key in ("rope_parameters", "rope_scaling"):
        rope = stack.get(key) or {}
        if (rope.get("rope_type") or rope.get("type")) != "yarn" or stack.get("kv_lora_rank"):  # DeepSeek's own
            continue
        factors = engine_factors(rope)
        if not all(math.isclose(factor, max(factors.values()), rel_tol=1e-6) for factor in factors.values()):
            told = ", ".join(f"{factor:.6g} in {engine}" for engine, factor in factors.items())
            found.append(
                f"{at}{key}: cosines and sines are multiplied by {told}; write attention_factor and attn_factor"
            )
    theta = (stack.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and stack.get("rope_theta") not in (None, theta):
        found.append(f"{at}rope_theta is {stack['rope_theta']}, and rope_parameters.rope_theta {theta}")
    return found


def _of_vocabulary(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    whole = (config.get("transformer_layer_config") or config).get("vocab_size")
    own = config.get("draft_vocab_size") or whole
    if own == whole and "d2t" in tensors:
        return [f"d2t: the draft has the target's whole vocabulary ({whole}), and vLLM refuses the map since 0.30"]
    if own != whole and "d2t" not in tensors:
        return [f"d2t is missing: the draft has {own} of {whole} tokens"]
    return []
