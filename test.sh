#!/usr/bin/env bash
# Sets up what is needed and runs the tests: ./test.sh [pytest arguments], for example ./test.sh tests/ops -k dropout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scripts/setup.sh
# Missing compiled modules are an error here, and tests that start several processes must not take all cores in each of them.
export MEGACTL_OPS=compiled OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest "$@"
