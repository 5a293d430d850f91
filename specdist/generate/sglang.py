# SPDX-License-Identifier: Apache-2.0
"""SGLang's offline engine: its arguments, and the process that runs it."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from specdist.generate.engine_process import EngineProcess
from specdist.target.config import TargetConfig
from specdist.target.sglang import versions
from specdist.target.sglang.config import arguments, settings_of

PROCESS = "specdist.generate.sglang_process"


def server_arguments(config: TargetConfig, device: torch.device, seed: int) -> dict[str, Any]:
    """The engine's arguments: those of `target` and `target.sglang` that concern generating, too."""
    shared = arguments(config, config.path, config.dtype, device.type)
    own = {
        "base_gpu_id": device.index or 0,
        "random_seed": seed,
        "grammar_backend": "none",
        "skip_tokenizer_init": True,
        "log_level": "warning",
        **({"sampling_backend": "pytorch"} if device.type == "cpu" else {}),
    }
    return {k: v for k, v in shared.items() if v is not None} | own | settings_of(config).arguments


def sglang_engine(
    config: TargetConfig,
    device: torch.device,
    concurrency: int,
    ends: Collection[int],
    seed: int,
    more: Mapping[str, Any] | None = None,
) -> EngineProcess:
    """One replica of the target on `target.tp` GPUs of this host, from `device` on. Raises ConfigError: SGLang is not
    installed here, or is one that is not known. `ends`: the tokens that end an answer. `more`: arguments in the place
    of the target's, or beside them: those of a draft."""
    versions.require()
    cores = "|".join(map(str, range(config.tp)))  # SGLang asks for one a rank
    cpu = {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": cores} if device.type == "cpu" else {}
    given = server_arguments(config, device, seed) | dict(more or {})
    return EngineProcess("SGLang", PROCESS, given, concurrency, ends, cpu)
