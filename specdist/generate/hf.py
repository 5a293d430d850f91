# SPDX-License-Identifier: Apache-2.0
"""Answers by transformers: batches of `model.generate`, for the CPU and for targets that one GPU holds."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from specdist.core.errors import ConfigError
from specdist.generate.engine import Reply, Request, Sampling
from specdist.target.config import TargetConfig
from specdist.target.description import compute_dtype, describe
from specdist.target.loading import load_model

_WINDOW = 4
"""Conversations in flight a batch: the longer the queue, the less do prompts of a batch differ in length."""


class HfEngine:
    """The whole target on one device. `ends`: the tokens that end an answer. `alive`: called after every
    token with how many answers got one."""

    def __init__(
        self,
        config: TargetConfig,
        device: torch.device,
        batch: int,
        ends: Collection[int],
        alive: Callable[[int], None],
    ) -> None:
        self.concurrency = _WINDOW * batch
        self._config, self._device, self._batch, self._ends, self._alive = config, device, batch, sorted(ends), alive
        self._model: Any = None
        self._waiting: list[_Asked] = []
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
        asked = _Asked(request, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        runner = self._runner = self._runner or asyncio.create_task(self._run())
        both: set[asyncio.Future[Any]] = {asked.reply, runner}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not asked.reply.done():
            runner.result()  # raises
        return asked.reply.result()

    async def close(self) -> None:
        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # whoever has been answered asks again before the next batch is chosen
            self._waiting.sort(key=lambda asked: (asked.request.sampling.greedy, len(asked.tokens)))
            how, longest = self._waiting[-1].request.sampling, len(self._waiting[-1].tokens)
            chosen = [
                asked
                for asked in self._waiting[-self._batch :]
                if asked.request.sampling == how and 2 * len(asked.tokens) > longest
            ]
            del self._waiting[-len(chosen) :]
            self._generate(chosen, how)
            for asked in chosen:
                reply = asked.written(self._ends)
                if reply is None:
                    self._waiting.append(asked)
                else:
                    asked.reply.set_result(reply)
        self._runner = None

    @torch.no_grad()
    def _generate(self, chosen: list[_Asked], how: Sampling) -> None:
        """Have a batch go on until all are done or, where others wait, half of them are."""
        longest = max(len(asked.tokens) for asked in chosen)
        ids = torch.full((len(chosen), longest), self._ends[0] if self._ends else 0)
        mask = torch.zeros_like(ids)
        for row, asked in enumerate(chosen):
            ids[row, longest - len(asked.tokens) :] = torch.tensor(asked.tokens)
            mask[row, longest - len(asked.tokens) :] = 1
        left = torch.tensor([asked.left for asked in chosen], device=self._device)
        enough = (len(chosen) + 1) // 2 if self._waiting else len(chosen)
        torch.manual_seed(chosen[0].request.seed + longest)
        output = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._settings(how, int(left.max())),
            stopping_criteria=StoppingCriteriaList([_Enough(self._alive, left, longest, self._ends, enough)]),
        )
        for asked, row in zip(chosen, output[:, longest:].tolist(), strict=True):
            asked.tokens += row[: asked.left]

    def _settings(self, how: Sampling, limit: int) -> GenerationConfig:
        given = {name: value for name, value in vars(how).items() if value}
        sampled: dict[str, Any] = {} if how.greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **given}
        return GenerationConfig(
            do_sample=not how.greedy,
            max_new_tokens=limit,
            eos_token_id=self._ends or None,
            pad_token_id=self._ends[0] if self._ends else 0,
            **{"repetition_penalty": how.repetition_penalty or 1.0, **sampled},
        )


@dataclass
class _Asked:
    """An answer in the making; `tokens`: its prompt and what is written of it, padded after its end."""

    request: Request
    reply: asyncio.Future[Reply]
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def left(self) -> int:
        return self.request.limit - len(self.tokens) + len(self.request.prompt)

    def written(self, ends: Collection[int]) -> Reply | None:
        answer = self.tokens[len(self.request.prompt) :]
        place = next((place for place, token in enumerate(answer, start=1) if token in ends), None)
        if place is not None:
            return Reply("stop", answer[:place])
        return None if self.left else Reply("length", answer)


class _Enough(StoppingCriteria):
    """Ends a batch when `enough` of its rows have ended or have no tokens `left`: few rows would take as long as many,
    and what is written is read again in a moment."""

    def __init__(
        self, alive: Callable[[int], None], left: Tensor, prompt: int, ends: Collection[int], enough: int
    ) -> None:
        self._alive, self._left, self._prompt, self._enough = alive, left, prompt, enough
        self._ends = torch.tensor(sorted(ends), dtype=torch.long, device=left.device)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        new = input_ids[:, self._prompt :]
        done = torch.isin(new, self._ends).any(dim=1) | (self._left <= new.shape[1])
        ended = int(done.sum())
        self._alive(len(new) - ended)
        return torch.full_like(done, ended >= self._enough)
