#!/usr/bin/env bash
# The main job from nothing: sets up .venv, turns text that every machine has (the source and documentation of Python's own standard
# library) into data, trains a small GPT on it over four processes (tensor parallel 2 x pipeline parallel 2), stops it once half way,
# resumes it, samples from it. Nothing is downloaded but the Python packages of the set-up. Leaves everything in runs/demo.
#
#   DEMO_ITERATIONS=N   optimizer steps (default 200, about a minute on two cores)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

RUN=runs/demo
DATA=$RUN/data
ITERATIONS=${DEMO_ITERATIONS:-200}

scripts/setup.sh
megactl() { .venv/bin/megactl "$@"; }
title() { printf '\n\033[1m%s\033[0m\n' "$*" | if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then cat; else sed 's/\x1b\[[0-9;]*m//g'; fi; }

# The library's modules and the text of its documentation, without the installed packages and the test suite.
corpus() {
    .venv/bin/python - <<'END'
import os
import sysconfig

root = sysconfig.get_path("stdlib")
skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
for folder, folders, files in os.walk(root):
    folders[:] = sorted(name for name in folders if name not in skipped)
    print(*(os.path.join(folder, name) for name in sorted(files) if name.endswith((".py", ".txt", ".rst"))), sep="\n")
END
}

mkdir -p "$DATA"
mapfile -t FILES < <(corpus | sed '/^$/d')

title "1. A tokenizer and the data, from ${#FILES[@]} files of Python's standard library"
if [ ! -s "$DATA/tokenizer.json" ]; then
    megactl data tokenizer train "${FILES[@]}" --as-text --vocab-size 2048 --output "$DATA/tokenizer.json"
fi
megactl data preprocess "${FILES[@]}" --as-text --skip-bad --append-eod --tokenizer "$DATA/tokenizer.json" --output-prefix "$DATA/stdlib"
megactl data inspect "$DATA/stdlib_text_document"

# A demo is watched from its beginning: an earlier one's checkpoints and logs go, the prepared data stays.
rm -rf "$RUN/checkpoints" "$RUN/logs" "$RUN"/*.json "$RUN"/*.jsonl "$RUN"/*.toml "$RUN"/*.html "$RUN"/*.png

TRAIN=(.venv/bin/megactl train --tp 2 --pp 2 --device cpu --run-dir "$RUN" --data "$DATA/stdlib"
    --layers 4 --hidden 128 --heads 4 --seq 128 --micro-batch-size 8 --global-batch-size 16
    --iterations "$ITERATIONS" --lr 3e-3 --min-lr 3e-4 --warmup 5% --log-interval 25 --eval-interval "$((ITERATIONS / 2))" --eval-iterations 4
    --split 95,5,0 --save-interval 100)

# Sends SIGTERM to the run once it has done half of its iterations, as a cluster's scheduler would.
stop_half_way() {
    local pid_file=$1 lines
    while sleep 0.2; do
        lines=0
        if [ -f "$RUN/metrics.jsonl" ]; then lines=$(wc -l <"$RUN/metrics.jsonl"); fi
        if [ "$lines" -ge "$((ITERATIONS / 2))" ]; then
            kill -TERM "$(cat "$pid_file")" 2>/dev/null || true
            return
        fi
    done
}

title "2. Training a GPT over 4 processes: tensor parallel 2 x pipeline parallel 2 (it is stopped half way)"
printf '%s ' "${TRAIN[@]}" && echo
PID_FILE=$(mktemp)
trap 'rm -f "$PID_FILE"; kill "${WATCHER:-}" 2>/dev/null || true' EXIT
stop_half_way "$PID_FILE" &
WATCHER=$!
status=0
bash -c 'echo $$ >"$0"; exec "$@"' "$PID_FILE" "${TRAIN[@]}" || status=$?
kill "$WATCHER" 2>/dev/null || true
if [ $status -ne 75 ] && [ $status -ne 0 ]; then exit $status; fi

title "3. The same command again: it resumes from its checkpoint (the stopped run's exit code was $status)"
"${TRAIN[@]}"

title "4. What it learned: samples"
megactl generate "$RUN" --prompt $'def read(self, ' --max-tokens 60 --num-samples 2 --temperature 0.7 --seed 1

title "5. The loss curve"
megactl report "$RUN"
echo "Everything is in $RUN: report.html, loss.png, metrics.jsonl, config.toml, checkpoints/"
