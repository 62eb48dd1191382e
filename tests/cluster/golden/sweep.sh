#!/bin/bash
# gpt-tiny: 4 ranks = tp 1 x cp 1 x dp 4 x pp 1, 2 nodes of 2 GPUs
# Made by megactl slurm render. Relative paths start where it is submitted.
#SBATCH --job-name=gpt-tiny
#SBATCH --array=0-1
#SBATCH --output=%x-%A_%a.out
# A requeued job writes on, it does not start the log anew.
#SBATCH --open-mode=append
#SBATCH --nodes=2
# Tasks: torchrun starts the ranks of its node.
#SBATCH --ntasks-per-node=1
# Every task of a node sees all its GPUs and takes its own: bound to one each, NCCL could not use NVLink on some systems.
#SBATCH --gpus-per-node=2
#SBATCH --time=01:00:00
# Also after a node has failed.
#SBATCH --requeue

set -euo pipefail

# Threads of a rank: its own CPUs. Left to itself each rank would take every core of the node.
export OMP_NUM_THREADS=1
# Lines reach the log when they are written, also those of a rank that dies.
export PYTHONUNBUFFERED=1
# NCCL says why a connection failed, and nothing while all is well. Where nodes have several networks, choose one with
# --env NCCL_SOCKET_IFNAME=NAME; InfiniBand adapters are chosen with NCCL_IB_HCA.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Each task of the array runs one point of the sweep, in a folder of its own.
case "$SLURM_ARRAY_TASK_ID" in
    0) label=lr-1e-4 point=(--lr 1e-4) ;;
    1) label=lr-3e-4 point=(--lr 3e-4) ;;
    *) echo "there is no point $SLURM_ARRAY_TASK_ID in this sweep" >&2; exit 2 ;;
esac
# A later job goes on with MEGACTL_LOGGING_RUN_DIR=FOLDER sbatch SCRIPT, the folder without the point.
run_dir="${MEGACTL_LOGGING_RUN_DIR:-runs/gpt-tiny-job$SLURM_ARRAY_JOB_ID}/$label"

# Where the ranks meet: the first node of the list, which has rank 0, and a port made from the job's number, so that two jobs on one
# node differ. It lies below the ports that the kernel gives to outgoing connections. megactl finds both by the same rule; they are
# set here so that every process of the job, torchrun among them, goes by one value.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${hosts%%$'\n'*}"
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

launch=(
    srun
    # As the job has them, but said again: srun has not taken --cpus-per-task over from sbatch since Slurm 22.05.
    --nodes=2 --ntasks=2 --ntasks-per-node=1
    # Ranks of a node are neighbours, which tensor parallelism needs.
    --distribution=block
    # A rank that fails ends the others, which would wait for it in a collective.
    --kill-on-bad-exit=1 --wait=60
    torchrun --nnodes=2 --nproc-per-node=2 --max-restarts=0
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    --no-python megactl
)
train=(
    train
    --preset gpt-tiny
    --device cuda
    --exit-duration 57
    --mock-data
    --run-dir="$run_dir"
)
train+=("${point[@]}")

# A value of the run's summary.json: status is completed, saved or failed; iterations is a number.
field() { { sed -n "s/^  \"$1\": \"\{0,1\}\([a-z0-9]*\)\"\{0,1\},\{0,1\}\$/\1/p" < "$run_dir/summary.json"; } 2> /dev/null || true; }

# What an earlier attempt left must not pass for the end of this one. (The trainer removes it, too, but it may not come so far.)
rm -f -- "$run_dir/summary.json"
# A SIGTERM to the job reaches this shell as well. The trap, unlike ignoring it, is not handed down to srun, and lets this shell wait
# for the ranks' last save.
trap : TERM

code=0
"${launch[@]}" "${train[@]}" || code=$?
status=$(field status)
# 75 means: saved, run the same command again. Where srun ended a slower rank after the save, its own code hides the 75.
if [ "$code" -ne 0 ] && [ "$status" = saved ]; then code=75; fi
if [ "$code" -eq 75 ] && [ "$status" = completed ]; then code=0; fi
if [ "$code" -ne 75 ]; then exit "$code"; fi

# Requeue this job: it runs this script again, and the trainer goes on from its last save.
not_requeued() {
    echo "saved in $run_dir, but not requeued: $1" >&2
    exit 75
}

# Of an array this task alone: the number of one of its tasks is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
if [ "$restarts" -ge 100 ]; then not_requeued "the job was restarted $restarts times (--max-requeues)"; fi
# A job that somebody has cancelled also saves and ends with 75; it must not come back.
case $(scontrol --oneliner show job "$job" 2> /dev/null || true) in
    *JobState=CANCELLED* | *JobState=COMPLETING*) not_requeued "the job was cancelled" ;;
esac
# Time limits shorter than the start, or a save that asks for more time at once, would go round for ever.
iterations=$(field iterations)
if [ -n "$iterations" ]; then
    before=none idle=0
    { read -r before idle < "$run_dir/requeued"; } 2> /dev/null || true
    if [ "$before" = "$iterations" ]; then idle=$((idle + 1)); else idle=0; fi
    if [ "$idle" -ge 3 ]; then not_requeued "no iteration was finished in the last 3 starts"; fi
    echo "$iterations $idle" > "$run_dir/requeued"
fi
scontrol requeue "$job" || not_requeued "scontrol requeue failed"
echo "saved${iterations:+ after iteration $iterations}; requeued, start $((restarts + 2)) follows" >&2
exit 75
