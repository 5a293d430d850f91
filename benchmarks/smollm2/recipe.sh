#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From prompts to drafts that are served, on one GPU with SGLang: docs/recipes.md tells what comes of it.
#   benchmarks/smollm2/recipe.sh MATERIAL OUTPUT [key=value ...]     MATERIAL: of material.py; the keys are for training
# Every step goes on where a killed one stopped. The drafts are trained side by side: the target is small, and leaves the GPU to all of them.
set -euo pipefail
material=$1 output=$2
config=(configs/one-gpu.yaml "target.path=$material/model")
engine=(target.sglang.attention_backend=triton target.sglang.memory_fraction=0.5)
mkdir -p "$output"

# Greedy, as it will be served. The held-out prompts are answered, too: those answers are what drafts are evaluated on.
specdist generate "${config[@]}" "${engine[@]}" target.engine=sglang run.dir="$output/answers" generate.temperature=0 generate.max_new_tokens=256 \
    "prompts.files=[$material/train.jsonl]" "prompts.holdout=[$material/mt-bench.jsonl,$material/humaneval.jsonl]"

held=$output/answers/answers
train() { # NAME PROMPTS key=value ...
    specdist train "${config[@]}" run.dir="$output/$1" "prompts.files=[$2]" "prompts.holdout=[$held/mt-bench.jsonl,$held/humaneval.jsonl]" \
        train.steps=600 optimizer.lr=1e-3 evaluate.every=150 evaluate.draft_tokens=7 "${@:3}" > "$output/$1.log" 2>&1
}
block=mask_token_id=16 # <empty_output>, which no conversation has
train eagle3 "$held/train.jsonl" "${@:3}" &
train eagle3-off-policy "$material/train.jsonl" "${@:3}" &
train dflash "$held/train.jsonl" draft.algorithm=dflash "draft.dflash.$block" "${@:3}" &
train dspark "$held/train.jsonl" draft.algorithm=dspark "draft.dspark.$block" "${@:3}" &
wait

serve_check() { # NAME SECONDS
    sleep "$2"
    specdist serve-check "$output/$1" --engine sglang target.sglang.attention_backend=triton target.sglang.memory_fraction=0.2 \
        evaluate.max_new_tokens=256 "evaluate.prompts=[$material/mt-bench.jsonl,$material/humaneval.jsonl]" > "$output/$1.served" 2>&1
}
# SGLang sizes its memory by what it finds free, so the engines do not start at once.
serve_check eagle3 0 &
serve_check dflash 25 &
serve_check dspark 50 &
wait
grep -H -A12 "acceptance length" "$output"/*.served
