# SPDX-License-Identifier: Apache-2.0
"""A model directory on disk: config.json, model.safetensors and README.md, written whole or not at all."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdist.core.errors import ConfigError, DataError
from specdist.core.hub import named_weights
from specdist.draft.common.yarn import engine_factors
from specdist.draft.registry import algorithm_of
from specdist.export.card import CARD
from specdist.export.config_json import CONFIG, read_config

WEIGHTS = "model.safetensors"


def write_directory(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str, overwrite: bool = False
) -> Path:
    """Write the three files into a directory beside `directory`, then rename it: a kill leaves no half of an export.

    With `overwrite`, an earlier export makes way; anything else that is in the way stays, and is an error. Raises
    ConfigError: the directory is taken.
    """
    check_free(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    earlier = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        # safetensors writes for the owner alone; this one follows the umask
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)
        if directory.exists():
            directory.rename(earlier)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if earlier.exists() and not directory.exists():
            earlier.rename(directory)
    if earlier.exists():
        shutil.rmtree(earlier)
    return directory


def check_free(directory: Path, overwrite: bool) -> None:
    """Raise ConfigError if `directory` holds something that an export may not replace."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"{directory} is a file; an export needs a directory of its own")
    names = {path.name for path in directory.iterdir()}
    if not names:
        return
    if not overwrite:
        raise ConfigError(f"{directory} is not empty; export elsewhere, or replace what is there with overwrite=true")
    if foreign := names - {CONFIG, WEIGHTS, CARD}:
        raise ConfigError(
            f"{directory} holds more than an export ({', '.join(sorted(foreign)[:5])}); overwrite=true replaces "
            "exports only, so that nothing else is lost"
        )


def read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors, on the CPU. Raises DataError: a file is missing or damaged."""
    config = read_config(directory)
    names, tensors = named_weights(directory, [path.name for path in directory.iterdir()]), dict[str, Tensor]()
    if not names:
        raise DataError(f"there are no weights in {directory}: neither *.safetensors nor *.bin")
    if missing := [name for name in names if Path(name).name != name or not (directory / name).is_file()]:
        raise DataError(
            f"the index of weights in {directory} names {', '.join(missing)}, which are not in that directory"
        )
    try:
        for file in (directory / name for name in names):
            legacy = file.suffix == ".bin"
            tensors |= torch.load(file, map_location="cpu", weights_only=True) if legacy else load_file(file)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise DataError(f"the weights in {directory} cannot be read: {error}") from error
    return config, tensors


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
    if algorithm := algorithm_of(config):
        found += [f"{CONFIG}: {fault}" for fault in algorithm.faults(config, tensors)]
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
    asked = ((config.get("speculators_config") or {}).get("proposal_methods") or [{}])[0].get("speculative_tokens")
    if where and not isinstance(asked, int):
        found.append("speculators_config.proposal_methods[0].speculative_tokens is missing: vLLM drafts so many tokens")
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
