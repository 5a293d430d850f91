# SPDX-License-Identifier: Apache-2.0
"""Answers by an OpenAI-compatible server, which may die and come back.

`/v1/completions` is asked, with the prompt's token ids: what the target reads is then what training renders, whatever
template and parsers the server has, and what comes back is what it wrote. `return_token_ids` (SGLang, vLLM) gives its
tokens; other servers ignore it, and their text is tokenised.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specdist.core.errors import ConfigError
from specdist.core.launch_env import variable
from specdist.generate.config import GenerateConfig
from specdist.generate.engine import Reply, Request

_TRIES = 5
"""Answers of status 500, or that are none, to one request before a small one shows whether it is to blame."""
_PASSING, _TO_BLAME = (408, 409, 429), (400, 413, 422)
"""Statuses below 500 that a request is worth repeating for, and those of one that can have no answer."""
_NO_RIGHT = (401, 403)
_NO_API = (ValueError, TypeError, AttributeError, IndexError)
"""What the client raises where an answer is no JSON, and what comes of one that has other fields."""
_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 15.0


def check_installed() -> None:
    """Raise ConfigError, with what to install, where the client is missing."""
    if find_spec("openai") is None:
        raise ConfigError.at("generate.endpoint", "needs the openai client: pip install -e '.[endpoint]'")


class EndpointEngine:
    """The server at `generate.endpoint`.

    How long it may be gone is the caller's to say; what is wrong meanwhile is told to `trouble`.
    """

    def __init__(self, config: GenerateConfig, target: str, trouble: Callable[[str], None]) -> None:
        check_installed()
        import openai

        self.concurrency = config.concurrency
        self._openai, self._config, self._target, self._trouble = openai, config, target, trouble
        self._model = ""
        self._seen, self._answered = -1.0, False
        self._asking = asyncio.Lock()
        self._client: Any = None

    @property
    def _at(self) -> str:
        return f"generate.endpoint={self._config.endpoint}"

    async def open(self) -> None:
        """Raises ConfigError where there is no server, or it serves another model."""
        url = str(self._config.endpoint).rstrip("/")
        self._client = self._openai.AsyncOpenAI(
            base_url=url if url.endswith("/v1") else f"{url}/v1",
            api_key=variable(self._config.api_key_env) or "none",
            timeout=self._config.timeout_s,
            max_retries=0,
        )
        try:
            await self._await_server(time.monotonic())
        except (self._openai.APIConnectionError, self._openai.InternalServerError) as error:
            raise ConfigError(
                f"{self._at} is not reached: {_words(error)}: is the server running there?", "generate.endpoint"
            ) from error

    async def write(self, request: Request) -> Reply:
        openai, failures, pause = self._openai, 0, 0.0
        for tries in range(1_000_000):  # the caller ends it
            await asyncio.sleep(pause)
            began, pause = time.monotonic(), _pause(tries)
            try:
                return await self._ask(request)
            except openai.APIStatusError as error:
                words = _words(error)
                if error.status_code in _TO_BLAME:
                    return Reply("error", text=words)
                if error.status_code == 404 and self._answered:  # a proxy's, while its server is away
                    self._trouble(f"{self._at}: {words}")
                    await self._await_server(began)
                    continue
                if error.status_code < 500 and error.status_code not in _PASSING:
                    raise self._refused(error) from error
                failures += error.status_code == 500
                pause += self._asked_to_wait(error)
            except openai.APIConnectionError as error:  # timeouts too
                self._trouble(f"{self._at}: {_words(error)}")
                await self._await_server(began)
                continue
            except _NO_API as error:
                if not self._answered:
                    raise self._not_the_api("completions") from error
                words, failures = "what /v1/completions gives is no answer", failures + 1
            if failures == _TRIES:
                if await self._well(request):
                    return Reply("error", text=words)
                failures = 0
            self._trouble(f"{self._at}: {words}")
        raise AssertionError("nobody tries so often")

    async def _well(self, request: Request) -> bool:
        """Whether the server answers its first token: proxies say 500 while what is behind them is gone, and then the
        request is not to blame."""
        try:
            return (await self._ask(replace(request, prompt=request.prompt[:1], limit=1))).finish_reason != "error"
        except (self._openai.APIError, *_NO_API):
            return False

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _ask(self, request: Request) -> Reply:
        wanted = {"skip_special_tokens": False, "return_token_ids": True}
        answer = await self._client.completions.create(
            model=self._model,
            prompt=request.prompt,
            max_tokens=request.limit,
            seed=request.seed,
            extra_body={**wanted, **request.sampling.given},
        )
        choice: Any = answer.choices[0]
        self._answered = True
        found = choice.model_extra or {}
        matched = found.get("matched_stop", found.get("stop_reason"))
        return Reply(
            "length" if choice.finish_reason == "length" else "stop" if choice.finish_reason == "stop" else "error",
            found.get("token_ids"),
            choice.text if choice.finish_reason in ("stop", "length") else f"finish_reason {choice.finish_reason}",
            matched if isinstance(matched, int) else None,
        )

    async def _await_server(self, failed: float) -> None:
        """Return when the server is there again and serves the target. `failed`: when what failed was begun."""
        async with self._asking:
            tries, pause = 0, _pause(0) if self._model else 0.0
            while self._seen < failed:
                await asyncio.sleep(pause)
                tries, pause = tries + 1, _pause(tries)
                try:
                    await self._check_model()
                except self._openai.APIConnectionError as error:
                    if not self._model:
                        raise
                    self._trouble(f"{self._at}: {_words(error)}")
                except self._openai.APIStatusError as error:
                    if error.status_code not in _PASSING and (not self._model or error.status_code in _NO_RIGHT):
                        raise error if error.status_code >= 500 else self._refused(error) from error
                    self._trouble(f"{self._at}: {_words(error)}")
                    pause += self._asked_to_wait(error)

    async def _check_model(self) -> None:
        """Find what the server calls the target. Once it has been found, a server that lists nothing, or gives a page
        instead, is one that is not back yet; one that never lists any is believed to serve `generate.model`."""
        began, own = time.monotonic(), self._config.model
        try:
            served = [model async for model in self._client.models.list()]
        except self._openai.NotFoundError:
            if own is None:
                raise
            served = []
        except _NO_API as error:
            if not self._model:
                raise self._not_the_api("models") from error
            served = []
        if not served and own is not None:
            self._model, self._seen = own, began
            return
        if not served and self._model:
            self._trouble(f"{self._at} lists no model")
            return
        wanted = own or self._target
        for model in served:
            root = str((model.model_extra or {}).get("root") or model.id)
            if wanted in (model.id, root) or (own is None and _name(wanted) in (_name(model.id), _name(root))):
                self._model, self._seen = model.id, began
                return
        names = ", ".join(repr(model.id) for model in served) or "nothing"
        raise ConfigError(
            f"{self._at} serves {names}, and answers are wanted of {wanted}: start the server with the target, or give "
            "generate.model where that is its name there",
            "generate.endpoint generate.model target.path",
        )

    def _not_the_api(self, page: str) -> ConfigError:
        text = f"{self._at}: what /v1/{page} gives is not what an OpenAI-compatible server gives: is it the right URL?"
        return ConfigError(text, "generate.endpoint")

    def _refused(self, error: Any) -> ConfigError:
        hint = ""
        if error.status_code in _NO_RIGHT:
            hint = f" (its key is taken from the environment variable {self._config.api_key_env})"
        elif error.status_code == 404 and not self._model:
            hint = ": is it the right URL? Of a server that lists no models give generate.model"
        return ConfigError(f"{self._at} refuses: {_words(error)}{hint}", "generate.endpoint generate.model")

    def _asked_to_wait(self, error: Any) -> float:
        """The seconds of `Retry-After`, a number or a date (RFC 9110, 10.2.3): at most half of `generate.timeout_s`, so
        that the server is asked again before that is over. 0 where it says nothing that can be read."""
        asked = error.response.headers.get("retry-after", "")
        try:
            seconds = float(asked) if asked.isdigit() else parsedate_to_datetime(asked).timestamp() - time.time()
        except ValueError:
            return 0.0
        return min(max(seconds, 0.0), self._config.timeout_s / 2)


def _name(path: str) -> str:
    """The last part of a model's name or path; of a path in the Hub's cache, that of its repository."""
    parts = Path(path).parts
    cached = next((part.rpartition("--")[2] for part in parts if part.startswith("models--")), None)
    return (cached or (parts[-1] if parts else "")).lower()


def _pause(tries: int) -> float:
    return random.uniform(0.5, 1.0) * min(_PAUSE_S * 2 ** min(tries, 10), _LONGEST_PAUSE_S)


def _words(error: BaseException) -> str:
    """What an error of the client says, in one line, with its cause."""
    cause = f" ({error.__cause__})" if error.__cause__ is not None and str(error.__cause__) else ""
    return f"{' '.join(str(error).split())}{cause}"[:300]
