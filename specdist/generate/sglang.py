# SPDX-License-Identifier: Apache-2.0
"""Answers by SGLang's offline engine, in a process of its own beside the rank.

`sglang.Engine` starts processes for its tensor-parallel ranks and handles signals, and its import changes transformers.
In its own process none of this reaches the rank, and when that ends all of its memory is free.
Requests and replies are lines of JSON on its standard input and output.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import Collection
from typing import Any

import torch

from specdist.core.errors import WorldError
from specdist.core.launch_env import without_world
from specdist.generate.engine import Reply, Request
from specdist.target.config import TargetConfig
from specdist.target.sglang import versions
from specdist.target.sglang.config import settings_of

_END_S = 90.0
"""How long the engine may take to end; it waits up to 60 s for its own processes."""


def server_arguments(config: TargetConfig, device: torch.device, seed: int) -> dict[str, Any]:
    """The engine's arguments: those of `target` and `target.sglang` that concern generating, too."""
    own = settings_of(config)
    cpu = device.type == "cpu"
    given = {
        "mem_fraction_static": own.memory_fraction,
        "attention_backend": own.attention_backend or ("torch_native" if cpu else None),
        "sampling_backend": "pytorch" if cpu else None,
        "quantization": own.quantization,
    }
    return {
        "model_path": config.path,
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "tp_size": config.tp,
        "ep_size": own.ep,
        "device": device.type,
        "base_gpu_id": device.index or 0,
        "random_seed": seed,
        "grammar_backend": "none",
        "skip_tokenizer_init": True,
        "log_level": "warning",
        **{name: value for name, value in given.items() if value is not None},
        **own.arguments,
    }


class SglangEngine:
    """One replica of the target on `target.tp` GPUs of this host, from `device` on."""

    def __init__(
        self, config: TargetConfig, device: torch.device, concurrency: int, ends: Collection[int], seed: int
    ) -> None:
        versions.require()
        self.concurrency = concurrency
        self._arguments, self._ends = server_arguments(config, device, seed), sorted(ends)
        cores = "|".join(map(str, range(config.tp)))  # SGLang asks for one a rank
        own = {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": cores}
        self._on_cpu = own if device.type == "cpu" else {}
        self._process: asyncio.subprocess.Process | None = None
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._said: deque[str] = deque(maxlen=20)
        self._readers: list[asyncio.Task[None]] = []
        self._asked = 0

    async def open(self) -> None:
        """Start the process; the model is loaded while the first requests wait."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "specdist.generate.sglang_process", json.dumps(self._arguments),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=without_world(os.environ) | self._on_cpu, limit=1 << 26,
        )  # fmt: skip
        self._readers = [asyncio.create_task(self._read_replies()), asyncio.create_task(self._read_words())]

    async def write(self, request: Request) -> Reply:
        assert self._process is not None
        assert self._process.stdin is not None
        if self._readers[0].done():
            raise self._lost()
        how, self._asked = request.sampling, self._asked + 1
        given = {
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k or None,
            "min_p": how.min_p,
            "repetition_penalty": how.repetition_penalty,
        }
        sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        sampling |= {"max_new_tokens": request.limit, "stop_token_ids": self._ends}
        asked = {"id": self._asked, "input_ids": request.prompt, "sampling_params": sampling}
        reply = self._waiting[self._asked] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return await reply

    async def close(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()  # which asks it to end
        try:
            await asyncio.wait_for(self._process.wait(), _END_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _read_replies(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            self._waiting.pop(told.pop("id")).set_result(Reply(**told))
        await self._process.wait()
        await asyncio.sleep(0.5)  # for the last of its words
        for reply in self._waiting.values():
            reply.set_exception(self._lost())
        self._waiting.clear()

    async def _read_words(self) -> None:
        """Its log goes to the rank's, and the last lines of it into an error."""
        assert self._process is not None
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            self._said.append(text)
            print(text, file=sys.stderr, flush=True)

    def _lost(self) -> WorldError:
        assert self._process is not None
        said = "\n".join(self._said)
        return WorldError(
            f"SGLang's engine ended with status {self._process.returncode} while it wrote answers:\n{said}"
        )
