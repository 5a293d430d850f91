# SPDX-License-Identifier: Apache-2.0
"""How SGLang runs the target: the settings that users tune, and a checked way through to all others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specdist.core.errors import ConfigError, check_range
from specdist.target.config import TargetConfig

OWNED = {
    "model_path": "target.path",
    "dtype": "target.dtype",
    "trust_remote_code": "target.trust_remote_code",
    "tp_size": "target.tp",
    "device": "world.device",
    "ep_size": "target.sglang.ep",
    "mem_fraction_static": "target.sglang.memory_fraction",
    "attention_backend": "target.sglang.attention_backend",
    "quantization": "target.sglang.quantization",
    "max_total_tokens": "target.sglang.prefill_tokens",
    "max_prefill_tokens": "target.sglang.prefill_tokens",
    "chunked_prefill_size": "target.sglang.prefill_tokens",
}
"""SGLang's arguments that have a key of their own here."""

FIXED: dict[str, Any] = {
    # One process a rank, started by torchrun: nothing else is spawned, and all parallelism is the replica's.
    "pp_size": 1,
    "dp_size": 1,
    "nnodes": 1,
    "enable_dp_attention": False,
    # The decoder is called as it is written: a graph would replay it past the point where features are taken.
    "disable_cuda_graph": True,
    # Every row of every document is computed: what another document had in common would have no row.
    "disable_radix_cache": True,
    # The window of sliding layers would get a smaller cache, in which a whole prefill has no room.
    "disable_hybrid_swa_memory": True,
    "chunked_prefill_size": -1,
    # There is no scheduler, no tokenizer and no sampling.
    "disable_overlap_schedule": True,
    "skip_tokenizer_init": True,
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "speculative_algorithm": None,
    # Both put their own communicators beside the replica's group, and the second lets mixture-of-experts layers leave
    # the sum over ranks to the next layer, after the point where features are taken.
    "disable_custom_all_reduce": True,
    "enforce_disable_flashinfer_allreduce_fusion": True,
}
"""SGLang's arguments that the engine depends on."""

DOCUMENTS = 256
"""Documents of one forward at most: SGLang keeps a table of the longest sequence's size for each."""
STATES = 32
"""The same of a target with layers that keep a state of each document (3 MiB a layer in Qwen3.5-27B)."""


@dataclass(frozen=True)
class SglangConfig:
    """The settings of `target.engine: sglang`."""

    prefill_tokens: int | None = None
    """Tokens of one forward at most: a batch of more runs as several forwards of whole documents. The KV cache has room
    for that many (null: for a whole batch), so lower it when memory is short; no document may be longer."""

    memory_fraction: float | None = None
    """Share of a GPU's memory for weights and KV cache (SGLang's mem_fraction_static); null lets SGLang decide. The KV
    cache never takes more than prefill_tokens need."""

    attention_backend: str | None = None
    """SGLang's attention kernels: triton, fa3, flashinfer, ...; null lets SGLang choose (torch_native on the CPU)."""

    quantization: str | None = None
    """Quantise the weights while they are loaded: fp8, ...; null takes the checkpoint as it is, quantised or not."""

    ep: int = 1
    """Expert-parallel ranks of a mixture-of-experts target; must divide target.tp. 1 splits every expert instead."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Any other of SGLang's server arguments, by its name in Python: {moe_runner_backend: triton}."""

    def __post_init__(self) -> None:
        check_range("target.sglang", self, "prefill_tokens", "ep", least=1)
        check_range("target.sglang", self, "memory_fraction", above=0, below=1)
        for name in self.arguments:
            if name in OWNED:
                raise ConfigError.at("target.sglang.arguments", f": {name} is set by {OWNED[name]}")
            if name in FIXED:
                raise ConfigError.at(
                    "target.sglang.arguments", f": {name} is always {FIXED[name]}: the engine depends on it"
                )


def settings_of(config: TargetConfig) -> SglangConfig:
    return getattr(config, "sglang", SglangConfig())


def arguments(config: TargetConfig, path: str, dtype: str, device: str) -> dict[str, Any]:
    """SGLang's arguments for the prefill and for generating alike; None leaves one to SGLang."""
    own = settings_of(config)
    return {
        "model_path": path,
        "dtype": dtype,
        "trust_remote_code": config.trust_remote_code,
        "tp_size": config.tp,
        "ep_size": own.ep,
        "device": device,
        "mem_fraction_static": own.memory_fraction,
        "attention_backend": own.attention_backend or ("torch_native" if device == "cpu" else None),
        "quantization": own.quantization,
    }
