# SPDX-License-Identifier: Apache-2.0
# Sourced by ./quickstart and ./run-tests: makes .venv with the tested versions, once, and enters it.
#   source setup.sh EXTRA        one of the extras of pyproject.toml: base (none) or dev

_specdist_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        if [[ -n "$candidate" ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

_specdist_setup() {
    local extra="$1" stamp python compile
    stamp=".venv/specdist-${extra}-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
    if [[ ! -f "$stamp" ]]; then
        python="$(_specdist_python)" || return 1
        if [[ ! -x .venv/bin/pip ]] && ! "$python" -m venv .venv; then
            echo "setup: $python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 1
        fi
        echo "setup: installing into .venv (a few minutes the first time)" >&2
        .venv/bin/pip install -qq --upgrade pip || return 1
        # Most of these modules nobody imports: an import compiles what it needs, unless it was told to keep nothing.
        compile="${PYTHONDONTWRITEBYTECODE:+--compile}"
        .venv/bin/pip install -qq "${compile:---no-compile}" -c constraints.txt -e ".[$extra]" || return 1
        touch "$stamp"
    fi
    source .venv/bin/activate
}

_specdist_setup "$@"
