#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prefill and memory of published shapes on one GPU, in transformers and SGLang: real_sizes.py, each shape a step.
#   [SHAPES="qwen3.5-27b ..."] bash benchmarks/offline/sizes.sh      steps.sh has the other variables
. "$(dirname "$0")/steps.sh"
packages sglang
if [ -n "$DRY" ]; then
    limited size-tiny 60 python3 -m specdist_launch.cli bench target --model examples/bard/model --engines hf --items 128 --sequences 64 --device cpu --repeats 1 target.dtype=float32
else
    for shape in ${SHAPES:-$(python3 -c "from benchmarks.real_sizes import LAYERS; print(*LAYERS)")}; do
        limited "size-$shape" 330 python3 -m benchmarks.real_sizes "$shape" target.sglang.attention_backend=triton
    done
fi
