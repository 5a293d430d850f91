# SPDX-License-Identifier: Apache-2.0
"""How the target is run: which model, by which engine, on how many ranks."""

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING

from specdist.core.errors import check_range

SECTIONS: dict[str, type | None] = {}
"""The dataclass of the settings of every engine, filled by the registry."""


@dataclass(frozen=True)
class TargetConfig:
    """The `target` section of a run's configuration, and, of each engine that has settings, a section in its name."""

    path: str = MISSING
    """Directory of the target model: its config.json and its weights (safetensors, or pytorch_model.bin). Or its id on
    the Hugging Face Hub, ORG/NAME or ORG/NAME@REVISION; a directory of that name wins."""

    engine: str = "hf"
    """What runs the forward: `hf` is transformers, the reference (CPU and GPU); `sglang` is SGLang, the fast one."""

    replicas: int = 1
    """Copies of the target; each is given batches of its own."""

    tp: int = 1
    """Tensor-parallel ranks of one replica; must divide the model's attention heads and key/value heads."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights and of the computation; `auto` takes the checkpoint's own, with world.device=cpu float32."""

    prefill: Literal["auto", "packed", "documents"] = "auto"
    """`packed` runs all documents of a batch in one forward, `documents` one after the other (slower, for models that
    carry state over document boundaries); `auto` tries out at load whether packing gives the same numbers (hf), or
    packs (sglang)."""

    verify: int = 1
    """Batches at the start of a run whose packed features are compared with a document-by-document forward."""

    verify_against: Literal["auto", "itself", "hf"] = "auto"
    """`hf` also compares a few short documents with transformers' own hidden states when the target is loaded, and the
    job ends where a layer or the last state differs, or is more like another. Beside another engine, transformers'
    layers are run first, as many at a time as fit, with weights read from disk: any size of target, FP8, MXFP4, AWQ,
    GPTQ and compressed-tensors checkpoints too. `auto` does so for architectures and versions of an engine that are not
    on the tested list (docs/targets.md)."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model directory."""

    @classmethod
    def registered(cls) -> dict[str, Any]:
        """The names of the engines, and their sections: see `core.config.complete`."""
        return {"engine": Literal[tuple(SECTIONS)]} | {name: own for name, own in SECTIONS.items() if own is not None}

    def __post_init__(self) -> None:
        check_range("target", self, "replicas", "tp", least=1, most=10**4)
        check_range("target", self, "verify", least=0)
