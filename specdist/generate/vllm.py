# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine: its arguments, and, run as a program, the process that it runs in (see `engine_process.py`).

python -m specdist.generate.vllm '{"model": ...}'

vLLM counts what became of drafts of all answers together, in its metrics, and is asked for them at the end.
"""

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from importlib import metadata
from typing import Any

from specdist.core.errors import UserError
from specdist.generate.engine_process import EngineProcess, begin, serve, tell
from specdist.target.config import TargetConfig

PROCESS = "specdist.generate.vllm"
_DRAFTS, _ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens_per_pos"


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


async def generate(engine: Any, kinds: Any, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's engine writes after `prompt`, as the fields of a reply. `kinds`: vllm.sampling_params."""
    params = kinds.SamplingParams(
        max_tokens=sampling.pop("max_new_tokens"),
        detokenize=False,
        output_kind=kinds.RequestOutputKind.FINAL_ONLY,
        **sampling,
    )
    completion: Any = None
    async for output in engine.generate({"prompt_token_ids": prompt}, params, request_id=uuid.uuid4().hex):
        completion = output.outputs[0]
    kind = completion.finish_reason if completion.finish_reason in ("stop", "length") else "error"
    return {
        "finish_reason": kind,
        "token_ids": list(completion.token_ids),
        "text": "" if kind != "error" else str(completion.finish_reason),
    }


def drafted(metrics: Iterable[Any]) -> dict[str, Any] | None:
    """What became of the drafts, by vLLM's metrics; None where it made none."""
    found = {metric.name: metric for metric in metrics}
    if _DRAFTS not in found:
        return None
    accepted = found.get(_ACCEPTED)
    return {"forwards": found[_DRAFTS].value, "accepted": accepted and list(accepted.values)}


ALONE = 0.95
"""The share of a GPU that is free at least, where nobody else is on it."""


def memory_share(gpus: int) -> float:
    """Of these first GPUs' memory, what vLLM may take, which by itself wants 92 % of all, free or not: most of what is
    free, and half of it where others are on the GPU, for they may take more before vLLM has started."""
    ask = f"import torch; print(min(free / all for free, all in map(torch.cuda.mem_get_info, range({gpus}))))"
    said = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, check=True)  # and leaves no context
    free = float(said.stdout)
    return free * (0.92 if free > ALONE else 0.5)


async def run(arguments: dict[str, Any], replies: Any) -> None:
    from vllm import sampling_params
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.reader import get_metrics_snapshot

    share = memory_share(arguments["tensor_parallel_size"])
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**{"gpu_memory_utilization": share, **arguments}))
    try:
        await serve(partial(generate, engine, sampling_params), replies)
        await asyncio.sleep(1)  # it counts the last forward after it has handed out the answer
        tell(replies, {"drafted": drafted(get_metrics_snapshot())})
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1]), begin()))
