# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine: its arguments, and the process that runs it."""

from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

from specdist.core.errors import UserError
from specdist.generate.engine_process import EngineProcess
from specdist.target.config import TargetConfig

PROCESS = "specdist.generate.vllm_process"


def installed() -> str | None:
    """The version of vLLM in this environment, None if there is none."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return None


def vllm_engine(
    config: TargetConfig, concurrency: int, ends: Collection[int], seed: int, more: Mapping[str, Any] | None = None
) -> EngineProcess:
    """One replica of the target on the first `target.tp` GPUs of this host. Raises UserError: vLLM is not installed
    here. `ends`: the tokens that end an answer. `more`: further arguments, which go before these: those of a draft."""
    if installed() is None:
        raise UserError("vLLM is not installed here: pip install vllm")
    arguments = {
        "model": config.path,
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "tensor_parallel_size": config.tp,
        "seed": seed,
        "skip_tokenizer_init": True,
        **(more or {}),
    }
    return EngineProcess("vLLM", PROCESS, arguments, concurrency, ends)
