# SPDX-License-Identifier: Apache-2.0
# What the measurements beside it share, to be sourced. Every step has a limit, a log, and a line of the table at the end.
#   KIT=DIR     what unpack.sh has unpacked; none: everything is installed
#   OUT=DIR     what is written (default runs/offline)        LIMIT=SECONDS     of the whole (default an hour)
#   DRY=1       on a CPU, with a tiny model: the scripts are tried, nothing is measured
set -u
OUT=$(realpath -m "${OUT:-runs/offline}") KIT=${KIT:+$(realpath "$KIT")} LIMIT=${LIMIT:-3600} DRY=${DRY:-}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$OUT"
SECONDS=0
: > "$OUT/steps"
trap 'python3 -m benchmarks.offline.table "$OUT" | tee "$OUT/table.txt"' EXIT

packages() { # [ENGINE]: what Python finds from here on
    ENGINE=${1:-}
    if [ -n "$KIT" ]; then . "$KIT/env.sh"; else export PYTHONPATH=$PWD:$PWD/src; fi
}

limited() { # NAME SECONDS COMMAND ...: its output is OUT/NAME.out, all else it says OUT/NAME.log
    local name=$1 most=$2 begin=$SECONDS status=124
    shift 2
    [ -n "$DRY" ] && most=$((4 * most))
    [ $((LIMIT - SECONDS)) -lt "$most" ] && most=$((LIMIT - SECONDS))
    if [ "$most" -gt 0 ]; then
        timeout --kill-after=10 "$most" "$@" > "$OUT/$name.out" 2> "$OUT/$name.log"
        status=$?
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$begin" $((SECONDS - begin)) $status | tee -a "$OUT/steps"
    [ $status = 0 ] || tail -n 5 "$OUT/$name.log" 2> /dev/null | cut -c1-300
    return $status
}

packages
if [ -n "$DRY" ]; then
    size=(--device cpu --model examples/bard/model --repeats 1 draft.compile=false draft.eagle3.vocab_size=null) batch=2x64 other=(1x128 mixed:128)
else
    size=() batch=4x2048 other=(1x8192 mixed:8192)
fi
# the cases of a step, by name
declare -A step=([eagle3]="" [eagle3-target]="draft.eagle3.teacher_head=target" [dflash]="draft.algorithm=dflash" [dspark]="draft.algorithm=dspark")
cases=(eagle3 eagle3-target dflash dspark)
