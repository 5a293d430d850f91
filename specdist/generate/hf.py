# SPDX-License-Identifier: Apache-2.0
"""Answers by transformers: batches of `model.generate`, for the CPU and for targets that one GPU holds."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from specdist.core.errors import ConfigError
from specdist.generate.engine import Reply, Request, Sampling
from specdist.target.config import TargetConfig
from specdist.target.description import compute_dtype, describe
from specdist.target.loading import load_model

_WINDOW = 4
"""Conversations in flight a batch: the longer the queue, the less do prompts of a batch differ in length."""


class HfEngine:
    """The whole target on one device.

    Args:
        ends: the tokens that end an answer.
        alive: called after every token.
    """

    def __init__(
        self,
        config: TargetConfig,
        device: torch.device,
        batch: int,
        ends: Collection[int],
        alive: Callable[[], None],
    ) -> None:
        self.concurrency = _WINDOW * batch
        self._config, self._device, self._batch, self._ends, self._alive = config, device, batch, sorted(ends), alive
        self._model: Any = None
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Raises DataError or ConfigError where the target cannot be loaded."""
        target = describe(self._config.path, self._config.trust_remote_code)
        dtype = compute_dtype(self._config, target)
        try:
            self._model = load_model(target, dtype, self._device)
        except torch.OutOfMemoryError as error:
            raise ConfigError.at(
                "target.engine",
                f"={self._config.engine}: the whole target does not fit on one GPU to write answers: "
                f"target.engine=sglang divides it among target.tp, or give generate.endpoint ({error})",
            ) from error
        self._model.generation_config = GenerationConfig()  # whatever the model's own says is in the requests

    async def write(self, request: Request) -> Reply:
        reply = asyncio.get_running_loop().create_future()
        self._waiting.append((request, reply))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await reply

    async def close(self) -> None:
        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # whoever has been answered asks again before the next batch is chosen
            self._waiting.sort(key=lambda asked: (asked[0].sampling.greedy, len(asked[0].prompt)))
            how = self._waiting[-1][0].sampling
            chosen = [asked for asked in self._waiting[-self._batch :] if asked[0].sampling == how]
            del self._waiting[-len(chosen) :]
            try:
                for (_, future), reply in zip(chosen, self._generate([r for r, _ in chosen], how), strict=True):
                    future.set_result(reply)
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
                for _, future in [*chosen, *self._waiting]:
                    future.set_exception(error)
                self._waiting.clear()
        self._runner = None

    @torch.no_grad()
    def _generate(self, requests: list[Request], how: Sampling) -> list[Reply]:
        longest = max(len(request.prompt) for request in requests)
        ids = torch.full((len(requests), longest), self._ends[0] if self._ends else 0)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        torch.manual_seed(requests[0].seed)
        output = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._settings(how, max(request.limit for request in requests)),
            stopping_criteria=StoppingCriteriaList([_Alive(self._alive)]),
        )
        return [self._reply(row, r.limit) for r, row in zip(requests, output[:, longest:].tolist(), strict=True)]

    def _settings(self, how: Sampling, limit: int) -> GenerationConfig:
        sampled = (
            {}
            if how.greedy
            else {
                "temperature": how.temperature if how.temperature is not None else 1.0,
                "top_p": how.top_p if how.top_p is not None else 1.0,
                "top_k": how.top_k if how.top_k is not None else 0,
                "min_p": how.min_p or None,
            }
        )
        return GenerationConfig(
            do_sample=not how.greedy,
            max_new_tokens=limit,
            eos_token_id=self._ends or None,
            pad_token_id=self._ends[0] if self._ends else 0,
            repetition_penalty=how.repetition_penalty or 1.0,
            **sampled,
        )

    def _reply(self, ids: list[int], limit: int) -> Reply:
        """`ids`: of a row of the output, padded after its end."""
        for place, token in enumerate(ids[:limit], start=1):
            if token in self._ends:
                return Reply("stop", ids[:place])
        return Reply("length", ids[:limit])


class _Alive(StoppingCriteria):
    def __init__(self, alive: Callable[[], None]) -> None:
        self._tell = alive

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._tell()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
