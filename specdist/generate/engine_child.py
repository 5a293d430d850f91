# SPDX-License-Identifier: Apache-2.0
"""What the processes of engines have in common: requests in, replies out, a line of JSON each (`engine_process.py`).

They end at the end of their standard input, and when who has started them is gone. The first line says that the model
is loaded; a last one may tell what the engine counts of the drafts of all answers together.
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from specdist.core.stop import end_with_launcher

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
