#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Two target and two draft ranks on two GPUs over NCCL, hesitant at random, with 8, 1 and 32 hardware queues, then with a target of two ranks.
#   [STEPS=150] bash benchmarks/offline/soak.sh      steps.sh has the other variables
. "$(dirname "$0")/steps.sh"
export NCCL_SOCKET_NTHREADS=4 NCCL_NSOCKS_PERTHREAD=4
if [ -n "$DRY" ]; then
    model=examples/bard/model words=(channel.transport=gloo channel.memory=64MiB draft.compile=false draft.eagle3.vocab_size=null world.device=cpu)
else
    model=$OUT/qwen3-8b words=(draft.eagle3.vocab_size=2048)
    limited model 90 python3 -m benchmarks.shapes qwen3-8b "$model" --layers 8
fi
soak() { # NAME SECONDS CONNECTIONS key=value ...
    limited "soak-$1" "$2" python3 -m benchmarks.soak --model "$model" --connections "$3" --steps "${STEPS:-150}" metrics.every=10 "${words[@]}" "${@:4}"
}
soak 8 240 8
soak 1 240 1
soak 32 240 32
soak tp2 240 8 target.tp=2 target.replicas=1
