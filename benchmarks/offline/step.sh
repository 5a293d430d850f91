#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The training step on one GPU that does nothing else: headline.py's table, then other batches, on an idle and on a busy host.
#   [PEERS=DIR] [RUNS=3] [WARM=] bash benchmarks/offline/step.sh      steps.sh has the other variables
# PEERS: with SpecForge/ and TorchSpec/ in it. WARM= where all has been compiled before.
. "$(dirname "$0")/steps.sh"
headline=(python3 -m benchmarks.headline --only step --runs 1 --batch "$batch" "${size[@]}")
[ -n "${PEERS:-}" ] && headline+=(--specforge "$PEERS/SpecForge" --torchspec "$PEERS/TorchSpec")
[ -n "${WARM-1}" ] && limited warm 420 "${headline[@]}" --warm 4
for run in $(seq "${RUNS:-3}"); do # each a step, so that a limit costs one run at most
    limited "headline-$run" 420 "${headline[@]}"
done
for name in "${cases[@]}"; do
    bench=(python3 -m specdist_launch.cli bench step --bare --busy "${size[@]}" ${step[$name]})
    limited "step-$name" 120 "${bench[@]}" --batch "${other[@]}"
    limited "step-$name-half" 90 "${bench[@]}" --batch "$batch" --supervised 0.5
done
