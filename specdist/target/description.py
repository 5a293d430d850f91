# SPDX-License-Identifier: Apache-2.0
"""What a model directory says about the target, read on any machine: no weights are loaded, no GPU is asked for.

The weights need not be there yet: what is asked of them then follows from config.json, or is an error.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from specdist.core import hub, model_config
from specdist.core.errors import ConfigError, DataError, first_line
from specdist.core.imports import uncollected
from specdist.target.config import TargetConfig
from specdist.target.weights import StoredTensor, stored_tensors, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BESIDE_TEXT = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|mtp\w*)\.")
"""Names of tensors that no token of text meets."""


@dataclass(frozen=True)
class TargetDescription:
    """The target as its config.json and the headers of its weight files describe it."""

    path: Path
    architectures: tuple[str, ...]
    layers: int
    hidden_size: int
    vocab_size: int
    heads: int | None
    """Attention heads; None for a model without attention."""
    kv_heads: int | None
    """Where layers differ, what divides the number of all."""
    max_positions: int | None
    """Longest sequence the model was built for, if it says so."""
    tied: bool
    """Whether the output head is the input embedding."""
    has_tp_plan: bool
    """Whether transformers knows how to split this architecture over tensor-parallel ranks."""
    config: PretrainedConfig
    """The whole configuration, as transformers read it."""
    trust_remote_code: bool = False

    def blank(self) -> PreTrainedModel:
        """The model without its weights, on the meta device. Raises ConfigError: it is not a causal language model.
        DataError: it cannot be made."""
        import transformers

        config = copy.deepcopy(self.config)  # some classes change it (Kimi-K2.5)
        # The class that the checkpoint was saved with: an auto class may pick the language model's alone, which the
        # whole configuration does not fit.
        named = getattr(transformers, self.architectures[0], None) if self.architectures else None
        auto: Any = transformers.AutoModelForCausalLM
        if named is not None and not self.trust_remote_code and hasattr(named, "prepare_inputs_for_generation"):
            make: Callable[[PretrainedConfig], PreTrainedModel] = named
        elif type(self.config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or self.trust_remote_code:
            make = partial(auto.from_config, trust_remote_code=self.trust_remote_code)
        elif type(self.config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            make = transformers.AutoModelForImageTextToText.from_config
        else:
            raise ConfigError.at(
                "target.path", f"={self.path}: {self.config.model_type} is not a causal language model"
            )
        try:
            with torch.device("meta"):
                return make(config)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            told = f"transformers cannot make such a model: {type(e).__name__}: {first_line(e)}"
            raise DataError(f"{self.path / 'config.json'}: {told}") from e

    @property
    def text_config(self) -> PretrainedConfig:
        """The language model's part of the configuration (multimodal models nest it)."""
        return model_config.text_part(self.config)

    @property
    def streams(self) -> int:
        """Hidden states of a token between layers: see `residual_streams`."""
        return model_config.residual_streams(self.config)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Of the checkpoint, by name. Raises DataError where weights are missing."""
        return stored_tensors(self.path)

    @property
    def complete(self) -> bool:
        try:
            return bool(weight_files(self.path))
        except DataError:
            return False

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's own: config.json's, or else that of most of its bytes."""
        said = model_config.read(self.config, "dtype")
        if isinstance(said, torch.dtype):
            return said
        if not self.complete:
            raise ConfigError.at(
                "target.dtype", f"=auto: {self.path / 'config.json'} does not say a dtype and there are no weights yet"
            )
        bytes_per_dtype = Counter[torch.dtype]()
        for tensor in self.tensors.values():
            bytes_per_dtype[tensor.dtype] += tensor.bytes
        return bytes_per_dtype.most_common(1)[0][0]

    @cached_property
    def _sizes(self) -> list[tuple[str, int]]:
        """Names and numbers of the parameters: of the checkpoint, or, where it is not there or holds codes of them, of
        the model that config.json describes."""
        if self.complete and not self.quantised:
            return [(name, tensor.elements) for name, tensor in self.tensors.items()]
        return [(name, p.numel()) for name, p in self.blank().named_parameters()]

    @property
    def parameters(self) -> int:
        return sum(elements for _, elements in self._sizes)

    @property
    def decoder_parameters(self) -> int:
        """Without the output head and what is beside the text: those that features need."""
        text = sum(elements for name, elements in self._sizes if not BESIDE_TEXT.search(name))
        return text - (0 if self.tied else self.vocab_size * self.hidden_size)

    @property
    def checkpoint_bytes(self) -> int:
        """Where it is not there, what config.json says of it."""
        if self.complete:
            return sum(tensor.bytes for tensor in self.tensors.values())
        size = self.dtype.itemsize
        stored = model_config.stored_bytes
        return int(sum(elements * (stored(self.config, name) or size) for name, elements in self._sizes))

    @property
    def quantised(self) -> bool:
        return model_config.quantisation(self.config) is not None

    @property
    def mlp_width(self) -> int:
        """The model's own, or the customary four times its hidden size where it does not say."""
        return int(model_config.read(self.config, "intermediate_size") or 4 * self.hidden_size)

    @property
    def head_dim(self) -> int:
        return int(model_config.read(self.config, "head_dim") or self.hidden_size // (self.heads or 1))

    def flops(self, lengths: Sequence[int]) -> float:
        """Floating-point operations of the layers for sequences of these lengths, causal attention counted by half.

        The layers' weights are all parameters but the embedding, the head, encoders of images and sound, and layers
        that predict further tokens; of experts, those that a token goes to.
        """
        tables = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        attention = 2.0 * self.layers * (self.heads or 0) * self.head_dim * sum(n * n for n in lengths)
        share = model_config.expert_share(self.config)
        met = sum(n * (share if ".experts." in name else 1) for name, n in self._sizes if not BESIDE_TEXT.search(name))
        return 2.0 * (met - tables) * sum(lengths) + attention

    def kv_values_per_token(self, tp: int) -> int:
        """Numbers that one of `tp` ranks keeps of a token for attention, in all layers."""
        latent = model_config.read(self.config, "kv_lora_rank")
        if latent:  # latent attention: one vector for all heads, on every rank
            return int(self.layers * (latent + model_config.read(self.config, "qk_rope_head_dim")))
        if not self.heads or not self.kv_heads:
            return 0
        heads = model_config.per_layer(self.config, "num_key_value_heads")
        sizes = model_config.per_layer(self.config, "head_dim")
        return sum(2 * (d or self.head_dim) * -(-(n or self.kv_heads) // tp) for n, d in zip(heads, sizes, strict=True))


def describe(path: str | Path, trust_remote_code: bool = False, weights: bool = True) -> TargetDescription:
    """Read the configuration, and the weights' headers, of the model that `path` names: a directory, or a repository of
    the Hub, of which only small files are fetched. `weights`: whether a directory without them is an error. Raises
    DataError: naming the file or the key that is missing; see `hub.resolve` too."""
    given, path = str(path), hub.resolve(path, "target.path")
    if not (path / "config.json").is_file():
        raise DataError.at("target.path", f"={given}: it has no config.json, so it is not a model directory")
    try:
        own = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError.at("target.path", f"={given}: its config.json is no JSON: {e}") from e
    if not trust_remote_code and "auto_map" in own and own.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError.at(
            "target.path",
            f"={given}: transformers does not know {own.get('model_type')}, whose code comes with it: read that, and "
            "set target.trust_remote_code=true",
            "target.trust_remote_code",
        )
    try:
        with uncollected():  # some of its modules import most of transformers
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, StrictDataclassError) as e:
        raise DataError(f"{path / 'config.json'}: transformers cannot read it: {' '.join(str(e).split())}") from e
    text = model_config.text_part(config)
    needed = ("num_hidden_layers", "hidden_size", "vocab_size")
    absent = [key for key in needed if not hasattr(text, key)]
    if absent:
        raise DataError(f"{path / 'config.json'} ({text.model_type}): no {', '.join(absent)}: not a causal LM?")
    if wrong := model_config.impossible_sizes(config):
        raise DataError(f"{path / 'config.json'}: {wrong}")
    heads = model_config.read(config, "num_attention_heads")
    kv_heads = [n for n in model_config.per_layer(config, "num_key_value_heads") if n]
    described = TargetDescription(
        path=path,
        architectures=tuple(config.architectures or ()),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        heads=heads,
        kv_heads=math.gcd(*kv_heads) or heads,
        max_positions=model_config.read(config, "max_position_embeddings"),
        tied=model_config.is_tied(config),
        has_tp_plan=bool(text.base_model_tp_plan),
        config=config,
        trust_remote_code=trust_remote_code,
    )
    if weights and Path(given).expanduser().is_dir():
        _ = described.tensors  # what is missing, or is none, is said at once
    return described


def compute_dtype(config: TargetConfig, target: TargetDescription) -> torch.dtype:
    """The type of the target's weights and computation under `target.dtype`."""
    if config.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[config.dtype]
    if target.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError.at(
            "target.dtype",
            f"=auto: the checkpoint in {target.path} is {target.dtype}, which features cannot travel in: "
            "set target.dtype to bfloat16, float16 or float32",
        )
    return target.dtype
