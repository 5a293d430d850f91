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
import json
from typing import Any

import sglang
from sglang.srt.runtime_context import override_platform
from transformers import AutoTokenizer

from specdist.evaluate_prompts import read_prompts


def engine(target: str, **more: Any) -> sglang.Engine:
    with override_platform(has_amx=True):  # it would fall back to torch_native, which does not speculate
        return _engine(model_path=target, **more)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, metavar="DIR")
    parser.add_argument("--draft", required=True, metavar="DIR")
    parser.add_argument("--prompts", required=True, metavar="FILE")
    parser.add_argument("--limit", type=int, default=32, metavar="N", help="prompts (default 32)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="new tokens of each (default 64)")
    parser.add_argument("--drafted", type=int, default=5, metavar="N", help="drafted tokens a step (default 5)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = [list(prompt.tokens) for prompt in read_prompts([args.prompts], tokenizer, args.limit)]
    plain = generate(engine(args.target), prompts, args.tokens)
    speculation = {
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": args.draft,
        "speculative_num_steps": args.drafted,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": args.drafted + 1,
    }
    drafted = generate(engine(args.target, **speculation), prompts, args.tokens)
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
