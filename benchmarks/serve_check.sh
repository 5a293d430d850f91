#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Is what an engine serves what was evaluated? On one GPU, with the engine installed: trains the quickstart's draft and checks it. About five minutes.
#   benchmarks/serve_check.sh [sglang|vllm] [eagle3|dflash|dspark] [key=value ...]
# Without FlashInfer and FlashAttention: benchmarks/serve_check.sh sglang eagle3 target.sglang.attention_backend=triton
set -euo pipefail
cd "$(dirname "$0")/.."
engine=${1:-sglang} algorithm=${2:-eagle3}
config=(configs/quickstart.yaml)
[ "$algorithm" = eagle3 ] || config+=("configs/quickstart-$algorithm.yaml")
run=runs/serve-check-$algorithm
bard=examples/bard
# One rank has both roles; what is served in bf16 is evaluated in bf16.
specdist train "${config[@]}" run.dir="$run" world.device=cuda world.mode=colocated draft.dp=1 target.dtype=bfloat16
# Answers of these models are short: 300 prompts of each file give more than the 5,000 tokens that a verdict needs.
specdist serve-check "$run" --engine "$engine" evaluate.prompts="[$bard/heldout.jsonl,$bard/train.jsonl]" evaluate.limit=300 \
    target.sglang.memory_fraction=0.3 "${@:3}"
