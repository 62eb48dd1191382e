#!/usr/bin/env bash
# Sets up what is needed and runs the tests: ./test.sh [pytest arguments], for example ./test.sh tests/ops -k dropout
# The whole suite is spread over the cores, a test file to a process; tests that are chosen run in one, where -s and --pdb work.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scripts/setup.sh
# Missing compiled modules are an error here, and tests that start several processes must not take all cores in each of them.
export MEGACTL_OPS=compiled OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

chosen=
for argument in "$@"; do
    case $argument in
        -s | --pdb | --collect-only | -n* | -p | -k* | -m*) chosen=1 ;;
        -*) ;;
        *) chosen=1 ;;
    esac
done
spread=()
if [ -z "$chosen" ] && .venv/bin/python -c 'import xdist' 2>/dev/null; then
    # One more than there are cores, as tests of stops and timeouts wait; each process holds torch, and up to eight ranks of it.
    cores=$(nproc)
    spread=(-n "$((cores < 4 ? cores + 1 : 4))" --dist loadfile)
fi
exec .venv/bin/python -m pytest "${spread[@]}" "$@"
