# SPDX-License-Identifier: Apache-2.0
"""specdist.generate.sglang_process on a CPU: SGLang refuses to speculate there, or has no kernels for it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from specdist.generate import sglang_process

if __name__ == "__main__":  # what SGLang prints when it is imported is no reply; its own processes have none
    replies = sglang_process.begin()
    sglang_process.begin = lambda: replies

import torch
from sglang.srt.arg_groups import speculative_hook
from sglang.srt.arg_groups.choices import add_draft_attention_backend_choices
from sglang.srt.runtime_context import override_platform
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2

# Here, for the processes of the engine import this module too.
add_draft_attention_backend_choices(["intel_amx"])
DFlashVerifyInput.tree_topk = DFlashVerifyInput.topk  # the CPU's attention asks for it by EAGLE's name
torch.Tensor.bfloat16 = lambda tensor: tensor  # type: ignore[method-assign]  # of a block's embeddings, whatever the dtype
_generate = DSparkWorkerV2.forward_batch_generation  # without overlap it is called with one argument more than it takes
DSparkWorkerV2.forward_batch_generation = lambda *args, pp_proxy_tensors=None, **more: _generate(*args, **more)
torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]  # a CPU has one stream

CPU = {
    "attention_backend": "intel_amx",  # the only one that speculates on CPUs; sgl_kernel.py plays its kernels
    "disable_radix_cache": True,
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "mem_fraction_static": 0.2,
    "max_total_tokens": 8192,
    "max_running_requests": 8,
    "chunked_prefill_size": -1,
}


@contextlib.contextmanager
def blocks_without_a_gpu() -> Iterator[None]:
    """SGLang refuses drafts of blocks on CPUs, for which it has no kernels, before it looks at anything else."""
    view = speculative_hook.resolving_view

    def allowed(refused: Callable[[ServerArgs], None]) -> Callable[[ServerArgs], None]:
        def handle(server_args: ServerArgs) -> None:
            with mock.patch.object(speculative_hook, "resolving_view", lambda args: AsIfOnAGpu(view(args))):
                refused(server_args)

        return handle

    with contextlib.ExitStack() as stack:
        for name in ("_handle_dflash", "_handle_dspark"):  # it asks in no other place
            stack.enter_context(mock.patch.object(speculative_hook, name, allowed(getattr(speculative_hook, name))))
        yield


class AsIfOnAGpu:
    """Arguments of a server, but for the device."""

    device = "cuda"

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arguments, name)


def parsed(words: list[str]) -> dict[str, Any]:
    """What SGLang's own parser makes of the options of a server's command line, without its defaults."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:  # noqa: SLF001
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(words))


if __name__ == "__main__":
    for command in json.loads(os.environ.get("SERVE_COMMANDS", "[]")):
        print("parsed", json.dumps(parsed(command)), file=sys.stderr)
    sys.argv[1] = json.dumps(json.loads(sys.argv[1]) | CPU)
    # Without it, it would fall back to torch_native, which does not speculate.
    with override_platform(has_amx=True), blocks_without_a_gpu():
        sglang_process.main()
