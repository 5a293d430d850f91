# SPDX-License-Identifier: Apache-2.0
"""The process in which SGLang's offline engine runs (see `engine_process.py`).

python -m specdist.generate.sglang_process '{"model_path": ...}'
"""

import json
import sys
from functools import partial
from itertools import accumulate
from typing import Any

from specdist.generate.engine_process import begin, serve
from specdist.target.sglang.versions import known_configs_may_come_again

_FOR_GOOD = known_configs_may_come_again()
_FOR_GOOD.__enter__()  # here, for the processes that SGLang starts import this module before SGLang, too


async def generate(engine: Any, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    """What SGLang's engine writes after `prompt`, as the fields of a reply."""
    found = await engine.async_generate(input_ids=prompt, sampling_params=sampling)
    about = found["meta_info"]
    ended = about["finish_reason"]
    kind = ended["type"] if ended["type"] in ("stop", "length") else "error"
    matched = ended.get("matched")
    return {
        "finish_reason": kind,
        "token_ids": list(found["output_ids"]),
        "text": "" if kind != "error" else str(ended.get("message", ended)),
        "end": matched if isinstance(matched, int) else None,
        "drafted": drafted(about),
    }


def drafted(about: dict[str, Any]) -> dict[str, Any] | None:
    """What became of the drafts, by the `meta_info` of an answer: `spec_accept_histogram` counts the forwards that
    accepted 0, 1, ... of them, also those behind an answer's end."""
    if "spec_verify_ct" not in about:
        return None
    histogram = about.get("spec_accept_histogram")
    at_least = list(accumulate(reversed(histogram)))[::-1][1:] if histogram else None
    return {"forwards": about["spec_verify_ct"], "accepted": at_least}


def main() -> None:
    replies = begin()
    import sglang

    # Its own loop is the one that is current here, and its processes must not inherit the requests.
    engine = sglang.Engine(**json.loads(sys.argv[1]))
    try:
        engine.loop.run_until_complete(serve(partial(generate, engine), replies))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
