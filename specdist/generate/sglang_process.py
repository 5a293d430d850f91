# SPDX-License-Identifier: Apache-2.0
"""The process in which SGLang's offline engine runs (see `sglang.py`): requests in, replies out, a line of JSON each.

python -m specdist.generate.sglang_process '{"model_path": ...}'

It ends at the end of its standard input, and when who has started it is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from specdist.core.stop import end_with_launcher


async def serve(engine: Any, replies: Any) -> None:
    """Answer the lines of standard input until it ends."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    answering = set()
    async for line in lines:
        task = asyncio.create_task(answer(engine, json.loads(line), replies))
        answering.add(task)
        task.add_done_callback(answering.discard)


async def answer(engine: Any, asked: dict[str, Any], replies: Any) -> None:
    """One request; what SGLang refuses (a prompt that is too long, say) is told as an error of that request."""
    number = asked.pop("id")
    try:
        found = await engine.async_generate(**asked)
    except ValueError as error:
        told: dict[str, Any] = {"finish_reason": "error", "text": str(error)}
    else:
        ended = found["meta_info"]["finish_reason"]
        kind = ended["type"] if ended["type"] in ("stop", "length") else "error"
        matched = ended.get("matched")
        told = {
            "finish_reason": kind,
            "token_ids": list(found["output_ids"]),
            "text": "" if kind != "error" else str(ended.get("message", ended)),
            "end": matched if isinstance(matched, int) else None,
        }
    replies.write(json.dumps({"id": number, **told}) + "\n")
    replies.flush()


def main() -> None:
    end_with_launcher()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no reply
    import sglang

    # Its own loop is the one that is current here, and its processes must not inherit the requests.
    engine = sglang.Engine(**json.loads(sys.argv[1]))
    try:
        engine.loop.run_until_complete(serve(engine, replies))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
