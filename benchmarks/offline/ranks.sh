#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The training step of several draft ranks, a GPU each: how much of their communication is exposed. Three times each, in one run.
#   [RANKS=2] bash benchmarks/offline/ranks.sh      steps.sh has the other variables
. "$(dirname "$0")/steps.sh"
bench() { # NAME SECONDS BATCH ...
    local case=${1#*-}
    limited "$1" "$2" python3 -m specdist_launch.cli bench step --ranks "${RANKS:-2}" --micro-batches 2 "${size[@]}" ${step[$case]} --batch "${@:3}"
}
for name in "${cases[@]}"; do bench "warm-$name" 150 "$batch" & done # all is compiled, beside each other
wait
for name in "${cases[@]}"; do bench "ranks-$name" 120 "$batch" "$batch" "$batch"; done
