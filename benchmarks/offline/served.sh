#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SmolLM2 on one GPU: EAGLE-3 and DSpark are trained beside each other, then engines, one after another, serve them: as they were evaluated?
#   [WHEELS=DIR] [STEPS=400] bash benchmarks/offline/served.sh      WHEELS: of material.py, default KIT/smollm2; steps.sh has the other variables
. "$(dirname "$0")/steps.sh"
material=$OUT/smollm2
served=(python3 -m specdist_launch.cli serve-check)
if [ -n "$DRY" ]; then
    train=(configs/quickstart.yaml world.mode=colocated draft.dp=1 export.dtype=float32) steps=${STEPS:-20} prompts=examples/bard/heldout.jsonl
    checked=(evaluate.limit=8 --tokens 100)
    mask=()
else
    limited material 180 python3 -m benchmarks.smollm2.material "${WHEELS:-$KIT/smollm2}" "$material" || exit
    train=(configs/one-gpu.yaml "target.path=$material/model" "prompts.files=[$material/train.jsonl]" prompts.holdout=0.01 optimizer.lr=1e-3)
    steps=${STEPS:-400} prompts=$material/mt-bench.jsonl,$material/humaneval.jsonl
    checked=(target.sglang.attention_backend=triton target.sglang.memory_fraction=0.3 evaluate.max_new_tokens=256)
    mask=(draft.dspark.mask_token_id=16) # see recipe.sh
fi
train() { # NAME key=value ...
    limited "train-$1" 300 python3 -m specdist_launch.cli train "${train[@]}" run.dir="$OUT/$1" train.steps="$steps" evaluate.every=$((steps / 2)) evaluate.draft_tokens=7 "${@:2}"
}
check() { # NAME ENGINE
    packages "$2"
    limited "served-$1-$2" 240 "${served[@]}" "$OUT/$1" --engine "$2" "${checked[@]}" "evaluate.prompts=[$prompts]"
}
train eagle3 &
train dspark draft.algorithm=dspark "${mask[@]}" &
wait
if [ -n "$DRY" ]; then # tests/serving/README.md has what that is
    served=(env PYTHONPATH="$PWD:$PWD/src:tests/serving/cpu_kernels:tests/sglang/stand_ins" .venv-sglang/bin/python -m tests.serving.sglang_on_cpu serve-check)
    packages() { :; }
fi
check eagle3 sglang
check dspark sglang
[ -n "$DRY" ] || check eagle3 vllm # DSpark from vLLM 0.26 on
