#!/bin/bash
# gpt-tiny: 4 ranks = tp 2 x cp 1 x dp 2 x pp 1, 2 nodes of 2 GPUs
# Made by megactl slurm render. Relative paths start where it is submitted.
#SBATCH --job-name=gpt-tiny
#SBATCH --output=%x-%j.out
# A requeued job writes on, it does not start the log anew.
#SBATCH --open-mode=append
#SBATCH --nodes=2
# Tasks: one task a rank.
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=6
# Every task of a node sees all its GPUs and takes its own: bound to one each, NCCL could not use NVLink on some systems.
#SBATCH --gpus-per-node=2
#SBATCH --account=proj
#SBATCH --time=12:00:00
# Before the time is up every rank gets this signal, saves and exits 75. Without B: it goes to the tasks of srun and not to
# this shell. Slurm may send it up to a minute early.
#SBATCH --signal=USR2@180
# Also after a node has failed.
#SBATCH --requeue

# A batch shell is no login shell: where the site defines `module` for login shells alone, its definition is read first.
type module > /dev/null 2>&1 || . /etc/profile
set -eo pipefail
module load cuda/12.8
. /opt/env/bin/activate
set -euo pipefail

export NCCL_SOCKET_IFNAME=ib0
# Threads of a rank: its own CPUs. Left to itself each rank would take every core of the node.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# Lines reach the log when they are written, also those of a rank that dies.
export PYTHONUNBUFFERED=1
# NCCL says why a connection failed, and nothing while all is well. Where nodes have several networks, choose one with
# --env NCCL_SOCKET_IFNAME=NAME; InfiniBand adapters are chosen with NCCL_IB_HCA.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

run_dir='runs/a b'

# Where the ranks meet: the first node of the list, which has rank 0, and a port made from the job's number, so that two jobs on one
# node differ. It lies below the ports that the kernel gives to outgoing connections. megactl finds both by the same rule; they are
# set here so that every process of the job, torchrun among them, goes by one value.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${hosts%%$'\n'*}"
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

launch=(
    srun
    # As the job has them, but said again: srun has not taken --cpus-per-task over from sbatch since Slurm 22.05.
    --nodes=2 --ntasks=4 --ntasks-per-node=2
    --cpus-per-task=6
    # Ranks of a node are neighbours, which tensor parallelism needs.
    --distribution=block
    # A rank that fails ends the others, which would wait for it in a collective.
    --kill-on-bad-exit=1 --wait=60
    --container-image=/images/train.sqsh
)
# srun starts megactl itself: a shell between them (bash -c '...') would die of the signal that asks for the save.
train=(
    megactl train
    --preset gpt-tiny
    --vocab 300
    --tp 2
    --device cuda
    --data corpus
    --no-mock-data
    --data-cache 'it'"'"'s here'
    --run-dir="$run_dir"
)

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
