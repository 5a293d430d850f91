# SPDX-License-Identifier: Apache-2.0
"""Answers by an engine in a process of its own beside this one: SGLang's (`sglang.py`) or vLLM's (`vllm.py`).

Such engines start processes for their tensor-parallel ranks and handle signals, and their import changes transformers.
In its own process none of this reaches the rank, and when that ends all of its memory is free.
Requests and replies are lines of JSON on its standard input and output; both ends are here.
"""

import asyncio
import json
import os
import re
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from specdist.core.errors import WorldError, say
from specdist.core.launch_env import without_world
from specdist.core.stop import end_with_launcher
from specdist.generate.engine import Drafted, Reply, Request

_END_S, _WORDS_S = 90.0, 5.0
"""How long the engine may take to end, and to have said all then; SGLang's waits up to 60 s for its own processes."""


_CAUSE, _CAUSES = re.compile(r"\b\w+(?:Error|Exception): .+"), 3
"""What an exception says, and how many of them are kept: the first, for engines go on to tell what these led to."""


class EngineProcess:
    """One replica of the target.

    Args:
        name: the engine's, for errors.
        module: what the process runs, as `python -m MODULE ARGUMENTS`.
        arguments: the engine's keyword arguments.
        ends: the tokens that end an answer.
        environment: variables of the process alone.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Mapping[str, Any],
        concurrency: int,
        ends: Collection[int],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.concurrency = name, concurrency
        self.drafted: Drafted | None = None
        """Of all answers together, where the engine says so only at its end: known after `close`."""
        self._command = [sys.executable, "-m", module, json.dumps(arguments)]
        self._ends, self._environment = sorted(ends), dict(environment or {})
        self._process: Any = None
        """asyncio's, once it is open."""
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._said: deque[str] = deque(maxlen=20)
        self._causes: dict[str, None] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._asked = 0
        self._ready = asyncio.Event()

    async def open(self) -> None:
        """Start the process; the model is loaded while the first requests wait."""
        pipe = asyncio.subprocess.PIPE
        environment = without_world(os.environ) | self._environment
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, limit=1 << 26
        )
        self._ended = asyncio.create_task(self._end())
        self._readers = [asyncio.create_task(self._read_replies()), asyncio.create_task(self._read_words())]

    async def ready(self) -> None:
        """Returns when the model is loaded. Raises WorldError: the engine ended before."""
        await self._ready.wait()
        if self._process.returncode is not None:
            raise self._lost()

    async def write(self, request: Request) -> Reply:
        if self._ended.done():
            raise self._lost()
        self._asked += 1
        sampling = {**request.sampling.given, "max_new_tokens": request.limit, "stop_token_ids": self._ends}
        asked = {"id": self._asked, "input_ids": request.prompt, "sampling_params": sampling}
        reply = self._waiting[self._asked] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return await reply

    async def close(self) -> None:
        """Takes a minute or two at most."""
        if self._process is None:
            return
        self._process.stdin.close()  # which asks it to end
        if not (await asyncio.wait([self._ended], timeout=_END_S))[0]:
            self._process.kill()
        tasks = [self._ended, *self._readers]
        await asyncio.wait(tasks, timeout=_WORDS_S)  # what it has started may outlive it, and hold its output
        for task in tasks:
            task.cancel()
        self._process._transport.close()  # noqa: SLF001 - closes the pipes that such processes hold
        if self._process.returncode is None:
            say(f"{self.name}'s engine (process {self._process.pid}) was killed, and does not end")

    async def _read_replies(self) -> None:
        try:
            async for line in self._process.stdout:
                self._take(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            self._said.append(f"a line of its replies cannot be read: {error!r}")
            self._process.kill()

    async def _end(self) -> None:
        """Wait for its end, then tell who waits for a reply."""
        while self._process.returncode is None:  # its `wait` ends with the last process that has its output
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)  # for the last of its words
        self._ready.set()
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(self._lost())
        self._waiting.clear()

    def _take(self, told: dict[str, Any]) -> None:
        if "ready" in told:
            self._ready.set()
            return
        drafted = told.pop("drafted", None)
        drafted = drafted and Drafted(**drafted)
        if "id" not in told:
            self.drafted = drafted
            return
        reply = self._waiting.pop(told.pop("id"))
        if not reply.done():  # else nobody waits for it any more
            reply.set_result(Reply(**told, drafted=drafted))

    async def _read_words(self) -> None:
        """Its log goes to the rank's; the last lines of it, and what went wrong first, into an error."""
        async for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            self._said.append(text)
            if len(self._causes) < _CAUSES and (cause := _CAUSE.search(text)):
                self._causes[cause[0]] = None
            print(text, file=sys.stderr, flush=True)

    def _lost(self) -> WorldError:
        tail = "\n".join(self._said)
        said = "\n".join([*(cause for cause in self._causes if cause not in tail), tail])
        return WorldError(
            f"{self.name}'s engine ended with status {self._process.returncode} while it wrote answers:\n{said}"
        )


Generate = Callable[[list[int], dict[str, Any]], Awaitable[dict[str, Any]]]
"""From a prompt and SGLang's sampling parameters to a reply's fields. Raises ValueError of a request it refuses."""


def begin() -> Any:
    """Where replies go; whatever else is printed from here on is none."""
    end_with_launcher()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


async def serve(generate: Generate, replies: Any) -> None:
    """Answer the lines of standard input until it ends."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    tell(replies, {"ready": True})
    async with asyncio.TaskGroup() as group:  # an engine that fails ends the process, whose words are then told
        tasks: set[asyncio.Task[None]] = set()
        async for line in lines:
            tasks.add(task := group.create_task(_answer(generate, json.loads(line), replies)))
            task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()  # whoever has ended the input waits for no answer


async def _answer(generate: Generate, asked: dict[str, Any], replies: Any) -> None:
    """One request; what the engine refuses (a prompt that is too long, say) is told as an error of that request."""
    try:
        told = await generate(asked["input_ids"], asked["sampling_params"])
    except ValueError as error:
        told = {"finish_reason": "error", "text": str(error)}
    tell(replies, {"id": asked["id"], **told})


def tell(replies: Any, what: dict[str, Any]) -> None:
    replies.write(json.dumps(what) + "\n")
    replies.flush()
