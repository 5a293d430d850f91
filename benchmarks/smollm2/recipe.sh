#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From prompts to drafts that are served, on one GPU with SGLang: docs/recipes.md tells what comes of it.
#   [STAGES="answer train serve"] [DRAFTS="eagle3 eagle3-off-policy dflash dspark"] benchmarks/smollm2/recipe.sh MATERIAL OUTPUT [key=value ...]
# MATERIAL: of material.py; the keys are for training.
# Every step goes on where a killed one stopped. The drafts are trained side by side: the target is small, and leaves the GPU to all of them.
set -euo pipefail
material=$1 output=$2
config=(configs/one-gpu.yaml "target.path=$material/model")
stages=${STAGES:-answer train serve} drafts=${DRAFTS:-eagle3 eagle3-off-policy dflash dspark}
mkdir -p "$output"
has() { [[ " $1 " = *" $2 "* ]]; }
for word in $stages; do has "answer train serve" "$word" || { echo "STAGES: $word is none of answer, train, serve" >&2; exit 2; }; done
for word in $drafts; do has "eagle3 eagle3-off-policy dflash dspark" "$word" || { echo "DRAFTS: $word is none of eagle3, eagle3-off-policy, dflash, dspark" >&2; exit 2; }; done

# Greedy, as it will be served. One engine leaves most of the GPU idle, for its host has little time, so several write at once, each a
# part of the questions. SGLang sizes its memory by what it finds free: they start one after the other, and one that came too early goes on.
answer() { # NAME SECONDS PROMPTS [key=value ...]
    sleep "$2"
    for seconds in 30 60 0; do
        specdist generate "${config[@]}" target.engine=sglang target.sglang.attention_backend=triton target.sglang.memory_fraction=0.2 run.dir="$output/$1" \
            generate.temperature=0 generate.max_new_tokens=256 "prompts.files=[$3]" "${@:4}" > "$output/$1.log" 2>&1 && return
        sleep "$seconds"
    done
    echo "no answers: $output/$1.log" >&2
    return 1
}
parts=3 answers="" writing=()
[ -s "$output/questions-$parts.jsonl" ] || split -n "l/$parts" --numeric-suffixes=1 -a 1 --additional-suffix=.jsonl "$material/train.jsonl" "$output/questions-"
for part in $(seq $parts); do
    answers+="${answers:+,}$output/answers-$part/answers/questions-$part.jsonl"
    has "$stages" answer || continue
    # The held-out prompts are answered, too: those answers are what drafts are evaluated on.
    also=() && [ "$part" = 1 ] && also=("prompts.holdout=[$material/mt-bench.jsonl,$material/humaneval.jsonl]")
    answer "answers-$part" $((20 * (part - 1))) "$output/questions-$part.jsonl" "${also[@]}" &
    writing+=($!)
done
for process in "${writing[@]}"; do wait "$process"; done

held=$output/answers-1/answers
train() { # NAME PROMPTS key=value ...
    specdist train "${config[@]}" run.dir="$output/$1" "prompts.files=[$2]" "prompts.holdout=[$held/mt-bench.jsonl,$held/humaneval.jsonl]" \
        train.steps=600 optimizer.lr=1e-3 evaluate.every=150 evaluate.draft_tokens=7 "${@:3}" > "$output/$1.log" 2>&1
}
mask=${MASK_TOKEN_ID-16} # SmolLM2's <empty_output>, which no conversation has; MASK_TOKEN_ID= for targets with rows to spare
if has "$stages" train; then
    for name in $drafts; do
        case $name in
            eagle3) train eagle3 "$answers" "${@:3}" & ;;
            eagle3-off-policy) train eagle3-off-policy "$material/train.jsonl" "${@:3}" & ;;
            *) train "$name" "$answers" "draft.algorithm=$name" ${mask:+"draft.$name.mask_token_id=$mask"} "${@:3}" & ;;
        esac
    done
    wait
    python3 -m benchmarks.lengths $(dirname "$output"/*/summary.json)
fi

# One engine after another: beside each other they find too little memory.
if has "$stages" serve; then
    for name in ${drafts/eagle3-off-policy/}; do
        specdist serve-check "$output/$name" --engine sglang target.sglang.attention_backend=triton target.sglang.memory_fraction=0.3 \
            evaluate.max_new_tokens=256 "evaluate.prompts=[$material/mt-bench.jsonl,$material/humaneval.jsonl]" > "$output/$name.served" 2>&1 || true
    done
    grep -H -A12 "acceptance length" "$output"/*.served
fi
