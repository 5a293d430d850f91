# SPDX-License-Identifier: Apache-2.0
"""Serve an exported draft with a real SGLang engine on the CPU: does it load, and what is its acceptance length?

    PYTHONPATH=.:tests/serving/cpu_kernels SGLANG_USE_CPU_ENGINE=1 python -m tests.serving.load_with_sglang \
        --target examples/bard/model --draft runs/quickstart/export/sglang --prompts examples/bard/heldout.jsonl

needs an environment of its own with SGLang in it (tests/serving/README.md); no GPU. It decodes the prompts greedily,
plainly and with the draft, and prints as JSON what `specdist eval` calls the acceptance length, and how many of the
texts are the same. It fails if the engine did not take the draft's weights whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import sglang
import torch
from sglang.srt.arg_groups import speculative_hook
from sglang.srt.arg_groups.choices import add_draft_attention_backend_choices
from sglang.srt.runtime_context import override_platform
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from transformers import AutoTokenizer

from specdist.evaluate.prompts import read_prompts

# Here, for the processes of the engine import this module too.
add_draft_attention_backend_choices(["intel_amx"])
DFlashVerifyInput.tree_topk = DFlashVerifyInput.topk  # the CPU's attention asks for it by EAGLE's name
torch.Tensor.bfloat16 = lambda tensor: tensor  # type: ignore[method-assign]  # of a block's embeddings, whatever the dtype
torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]  # a CPU has one stream


def engine(target: str, **more: Any) -> sglang.Engine:
    # Without it, it would fall back to torch_native, which does not speculate.
    with override_platform(has_amx=True), dflash_without_a_gpu():
        return _engine(model_path=target, **more)


@contextlib.contextmanager
def dflash_without_a_gpu() -> Iterator[None]:
    """SGLang refuses DFlash on CPUs, for which it has no kernels, before it looks at anything else."""
    refused = speculative_hook._handle_dflash  # noqa: SLF001 - it asks in no other place

    def handle(server_args: ServerArgs) -> None:
        with mock.patch.object(speculative_hook, "resolving_view", lambda args: AsIfOnAGpu(view(args))):
            refused(server_args)

    view = speculative_hook.resolving_view
    with mock.patch.object(speculative_hook, "_handle_dflash", handle):
        yield


class AsIfOnAGpu:
    """Arguments of a server, but for the device."""

    device = "cuda"

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arguments, name)


def _engine(**more: Any) -> sglang.Engine:
    return sglang.Engine(
        device="cpu",
        dtype="float32",
        attention_backend="intel_amx",  # the only one that speculates on CPUs; sgl_kernel.py plays its kernels
        sampling_backend="pytorch",
        grammar_backend="none",
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        mem_fraction_static=0.2,
        max_total_tokens=8192,
        max_running_requests=8,
        chunked_prefill_size=-1,
        log_level="warning",
        **more,
    )


def generate(serving: sglang.Engine, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    try:
        return list(serving.generate(input_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": tokens}))
    finally:
        serving.shutdown()


def speculation(draft: str, drafted: int) -> dict[str, Any]:
    """The arguments for a draft of its algorithm."""
    architectures = json.loads((Path(draft) / "config.json").read_text())["architectures"]
    if architectures == ["DFlashDraftModel"]:
        return {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": draft}
    return {
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": draft,
        "speculative_num_steps": drafted,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": drafted + 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, metavar="DIR")
    parser.add_argument("--draft", required=True, metavar="DIR")
    parser.add_argument("--prompts", required=True, metavar="FILE")
    parser.add_argument("--limit", type=int, default=32, metavar="N", help="prompts (default 32)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="new tokens of each (default 64)")
    parser.add_argument("--drafted", type=int, default=5, metavar="N", help="EAGLE-3: drafts a step (default 5)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = [list(prompt.tokens) for prompt in read_prompts([args.prompts], tokenizer, args.limit)]
    plain = generate(engine(args.target), prompts, args.tokens)
    drafted = generate(engine(args.target, **speculation(args.draft, args.drafted)), prompts, args.tokens)
    tokens = sum(len(answer["output_ids"]) for answer in drafted)
    forwards = sum(answer["meta_info"]["spec_verify_ct"] for answer in drafted)
    same = sum(a["output_ids"] == b["output_ids"] for a, b in zip(plain, drafted, strict=True))
    report = {
        "sglang": sglang.__version__,
        "prompts": len(prompts),
        "tokens": tokens,
        "target_forwards": forwards,
        "acceptance_length": round((tokens - len(prompts)) / forwards, 3),  # the first token is the prefill's
        "same_as_plain": same,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
