#!/usr/bin/env bash
# Sets up everything megactl needs into .venv: Python packages, the compiled modules, an editable install. Safe to run again at any
# time, also after a kill -9 in the middle; a finished set-up is recognised by a hash of what it was made from and costs nothing.
#
#   scripts/setup.sh          set up, or do nothing where that is done
#   scripts/setup.sh --key    print the hash that says whether it is done
#
#   PYTHON=python3.12         the Python of a new .venv (default: the first of python3, python3.13, python3.12, python3.11 that is >= 3.11)
#   MEGACTL_SYSTEM_TORCH=1    use the torch of that Python instead of installing one (done by itself where no package index answers)
#   MEGACTL_CUDA, MEGACTL_ARCHS: see setup.py.  PIP_INDEX_URL, PIP_EXTRA_INDEX_URL: pip's own choice of index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
VENV_PYTHON=$VENV/bin/python
DONE_FILE=$VENV/.megactl-setup
LOG=build/setup.log
EXTRAS=train,plot,zstd,test

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit "${CODE:-1}"; }

# Runs a step with its output in the log, whose end is shown where the step fails.
run() {
    printf '\n$ %s\n' "$*" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1; then
        tail -n 25 "$LOG" >&2
        fail "this failed: $* (whole output: $LOG)"
    fi
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_torch() { "$1" -c 'import re, sys, torch; sys.exit(tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11))' 2>/dev/null; }

has_build_tools() { "$1" -c 'import sys, pybind11, setuptools; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    CODE=2 fail "no Python >= 3.11 found (tried ${PYTHON:-python3 python3.13 python3.12 python3.11}): apt-get install -y python3 python3-venv python3-dev"
}

# What the result depends on: the Python, the switches, and every file that says what to install or compile.
setup_key() {
    local python=$1
    {
        "$python" -c 'import sys; print(sys.version)'
        printf '%s\n' "$EXTRAS" "${MEGACTL_SYSTEM_TORCH:-}" "${MEGACTL_CUDA:-}" "${MEGACTL_ARCHS:-}"
        find pyproject.toml setup.py constraints.txt scripts/setup.sh megactl/_build.py megactl/csrc -type f -print0 | sort -z | xargs -0 sha256sum
    } | sha256sum | cut -d' ' -f1
}

is_done() {
    [ -x "$VENV_PYTHON" ] && [ -f "$DONE_FILE" ] && compgen -G 'megactl/_ops.*.so' >/dev/null &&
        [ "$(cat "$DONE_FILE")" = "$(setup_key "$VENV_PYTHON")" ]
}

# Names all missing Debian packages at once.
check_system() {
    local python=$1 missing=() base
    base=$(basename "$python")
    [[ $base == python3.* ]] || base=python3
    [ -x "$VENV_PYTHON" ] || "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$base-venv")
    command -v g++ >/dev/null || missing+=(g++)
    "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").is_file())' || missing+=("$base-dev")
    [ ${#missing[@]} -eq 0 ] || CODE=2 fail "missing on this machine: ${missing[*]}; run: apt-get update && apt-get install -y ${missing[*]}"
}

# A killed pip leaves packages behind that look installed: RECORD is the last file it writes, so without it the rest may be missing.
remove_half_installed() {
    local folder
    for folder in "$VENV"/lib/python3*/site-packages/*.dist-info; do
        if [ -d "$folder" ] && [ ! -s "$folder/RECORD" ]; then
            say "removing the unfinished installation of $(basename "$folder" .dist-info)"
            rm -rf "$folder"
        fi
    done
    rm -rf "$VENV"/lib/python3*/site-packages/~*
}

make_venv() {
    local python=$1
    shift
    remove_half_installed
    # The activate scripts are the last thing venv writes; run over what is there, it completes it and removes nothing.
    if [ $# -gt 0 ] || [ ! -f "$VENV/bin/activate" ] || ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        say "creating $VENV with $("$python" --version)${*:+, $*}"
        run "$python" -m venv "$@" "$VENV"
    fi
}

index_answers() {
    timeout 60 "$VENV_PYTHON" -m pip install --dry-run --quiet --no-deps --ignore-installed --retries 0 --timeout 10 \
        -c constraints.txt tabulate >>"$LOG" 2>&1
}

pip_install() { run "$VENV_PYTHON" -m pip install --disable-pip-version-check --quiet "$@"; }

# The compiled modules are built in the source tree (below), so the editable install must not compile them a second time.
install_project() { MEGACTL_SKIP_OPS=1 MEGACTL_SKIP_NATIVE=1 pip_install --no-build-isolation "$@"; }

install_online() {
    local constraints=constraints.txt
    if [ "${MEGACTL_SYSTEM_TORCH:-0}" = 1 ]; then
        constraints=build/constraints-without-torch.txt
        grep -v '^torch==' constraints.txt >"$constraints"
    fi
    say "installing packages (a new torch takes a minute or more)"
    pip_install -c "$constraints" setuptools wheel pybind11 ninja
    install_project -c "$constraints" -e ".[$EXTRAS]"
}

install_offline() {
    say "no package index answers: using the packages that are here, whatever their versions"
    has_torch "$VENV_PYTHON" || fail "offline, and no torch >= 2.11 is installed: connect to a package index, or set PIP_FIND_LINKS to a folder of wheels"
    # A new venv brings its own setuptools, which may hide a newer one of the system.
    has_build_tools "$VENV_PYTHON" || "$VENV_PYTHON" -m pip uninstall --yes setuptools >>"$LOG" 2>&1 || true
    has_build_tools "$VENV_PYTHON" || fail "offline, and setuptools >= 77 or pybind11 is not installed: both are needed to compile"
    install_project --no-index -e .
    "$VENV_PYTHON" - <<'END' >&2
import importlib.util
names = ["tokenizers", "matplotlib", "zstandard", "pytest", "pytest_timeout", "hypothesis", "ruff", "sentencepiece", "transformers"]
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    print("setup: optional packages that are not here:", ", ".join(missing))
END
}

install() {
    local python=$1
    if [ "${MEGACTL_SYSTEM_TORCH:-0}" = 1 ]; then
        has_torch "$python" || CODE=2 fail "MEGACTL_SYSTEM_TORCH=1, but $python has no torch >= 2.11: unset it to have one installed"
        make_venv "$python" --system-site-packages
    else
        make_venv "$python"
    fi
    if index_answers; then
        install_online
        return
    fi
    # The venv may hold everything from before; otherwise the system's torch is made visible in it.
    if ! has_torch "$VENV_PYTHON" && has_torch "$python"; then make_venv "$python" --system-site-packages; fi
    install_offline
}

compile() {
    say "compiling"
    run "$VENV_PYTHON" setup.py build_ext --inplace
}

main() {
    command -v flock >/dev/null || CODE=2 fail "flock is missing: apt-get install -y util-linux"
    if is_done; then return; fi
    local start=$SECONDS python
    mkdir -p build
    # A lock that the kernel holds goes away with the processes that hold it, killed or not; a lock file would stay.
    exec 9>build/setup.lock
    if ! flock -n 9; then
        say "waiting for another set-up of this folder"
        flock 9
        if is_done; then return; fi
    fi
    : >"$LOG"
    rm -f "$DONE_FILE"
    if [ -x "$VENV_PYTHON" ] && is_new_enough "$VENV_PYTHON" && [ "${MEGACTL_SYSTEM_TORCH:-0}" != 1 ]; then
        python=$(readlink -f "$VENV_PYTHON")
    else
        python=$(find_python)
    fi
    check_system "$python"
    install "$python"
    compile
    local built
    built=$(MEGACTL_OPS=compiled "$VENV_PYTHON" -c 'from megactl.engine import ops; print(ops.describe())' 2>>"$LOG") ||
        { tail -n 5 "$LOG" >&2; fail "the compiled modules do not load (whole output: $LOG)"; }
    setup_key "$VENV_PYTHON" >"$DONE_FILE.new"
    mv "$DONE_FILE.new" "$DONE_FILE"
    say "ready in $((SECONDS - start)) s: $built"
}

if [ "${1:-}" = --key ]; then
    if [ -x "$VENV_PYTHON" ]; then setup_key "$VENV_PYTHON"; else setup_key "$(find_python)"; fi
elif [ $# -gt 0 ]; then
    CODE=2 fail "unknown argument $1: the only one is --key"
else
    main
fi
