#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On the machine without network: joins and checks the parts of a kit (pack.py), and unpacks its sets.
#   bash benchmarks/offline/unpack.sh KIT TO [SET ...]      without SET: all that the kit has
#   . TO/env.sh                            specdist and these benchmarks; with an engine's packages: ENGINE=vllm; . TO/env.sh
set -euo pipefail
mkdir -p "$2/bin"
kit=$(realpath "$1") to=$(realpath "$2") repository=$(realpath "$(dirname "$0")/../..")
shift 2
[ $# -gt 0 ] || set -- $(cd "$kit" && ls -- *.sha256 | sed 's/\.sha256$//')
for set in "$@"; do
    (cd "$kit" && sha256sum --quiet --check "$set.sha256")
    rm -rf "${to:?}/$set" && mkdir "$to/$set"
    cat "$kit/$set".tar.[0-9]* > "$to/$set.tar" && tar xf "$to/$set.tar" -C "$to/$set" && rm "$to/$set.tar"
    echo "$set: $(find "$to/$set" -type f | wc -l) files"
done
# An engine's own packages stand before the machine's; never two engines', which want different ones.
cat > "$to/env.sh" << EOF
export PATH=$to/bin:\${PATH#$to/bin:} PYTHONPATH=\${ENGINE:+$to/\$ENGINE:}$to/specdist:$repository:$repository/src
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export SPECDIST_SGLANG_ATTENTION=triton SGLANG_IS_FLASHINFER_AVAILABLE=false SGLANG_ENABLE_JIT_DEEPGEMM=false VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0
EOF
printf '#!/usr/bin/env bash\nexec python3 -m specdist_launch.cli "$@"\n' > "$to/bin/specdist"
chmod +x "$to/bin/specdist"
