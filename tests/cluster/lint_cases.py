"""A script that breaks each rule and one, as near as can be, that does not. `{...}` is put into the frame below at its place."""

from __future__ import annotations

from dataclasses import dataclass

FRAME = """#!/bin/bash
#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=20:00:00
#SBATCH --output=%x-%j.out
{directives}
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=1 SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
{commands}
srun --kill-on-bad-exit=1 python train.py --layers 24
"""


@dataclass(frozen=True)
class Case:
    """One rule: `bad` has it in line `line` and names `value`; `good` does not have it."""

    rule: str
    bad: str
    good: str
    line: int
    value: str = ""


def framed(directives: str = "", commands: str = "", *, drop: str = "", last: str = "") -> str:
    """The frame with lines added, the lines that begin with `drop` taken out, and another last command."""
    text = FRAME.format(directives=directives, commands=commands)
    if last:
        text = text[: text.index("srun --kill")] + last + "\n"
    drops = [item for item in drop.split("|") if item]
    return "".join(row for row in text.splitlines(keepends=True) if not (drops and row.startswith(tuple(drops))))


def d(text: str) -> str:
    """The frame with one more directive line (line 10)."""
    return framed(text)


def c(text: str, **options: str) -> str:
    """The frame with one more command (line 15)."""
    return framed("#", text, **options)


def last(text: str, **options: str) -> str:
    """The frame with another way to start training (line 16)."""
    return framed("#", "#", last=text, **options)


EN_DASH, QUOTE = "\u2013", "\u201c"

CASES = (
    Case("crlf", framed().replace("\n", "\r\n"), framed(), 1, "carriage return"),
    Case("bom", "\ufeff" + framed(), framed(), 1),
    Case("nul", c("echo \0"), c("echo 0"), 15),
    Case("shebang", framed().replace("#!/bin/bash\n", "\n", 1), framed(), 1),
    Case("interpreter", framed().replace("/bin/bash", "/bin/sh", 1), framed().replace("#!/bin/bash", "#!/usr/bin/env bash"), 1),
    Case("pasted-characters", d(f"#SBATCH {EN_DASH}{EN_DASH}qos=high"), c(f'echo "2 {EN_DASH} 3"  # {QUOTE}quoted'), 10, "U+2013"),
    Case("pasted-characters", c(f"cd {QUOTE}/data"), c("cd /data"), 15, "U+201C"),
    Case("broken-continuation", c("echo a \\ \n  b"), c("echo a \\\n  b"), 15),
    Case("comment-in-command", c("echo a \\\n  # b \\\n  c"), c("echo a \\\n  c  # b"), 16),
    Case("option-as-command", c("echo a\n  --wd 2"), c("echo a \\\n  --wd 2"), 16, "--wd"),
    Case("unclosed", c("echo 'it"), c("echo \"it's\""), 15, "'"),
    Case("unclosed", c("cat <<-END\n  END"), c("cat <<-END\n\tEND"), 15, "<<END"),
    Case("unclosed", c("A=(1 2"), c("A=(1 2)"), 15, "("),
    Case("unclosed", c("A=$(date"), c("A=$(date)"), 15, "$("),
    Case("placeholder", d("#SBATCH --account=<your account>"), d("#SBATCH --account=six@gpu"), 10, "<your account>"),
    Case("placeholder", c("DATA=<...>"), c("cat <in >out; diff <(ls a) <(ls b)"), 15, "<...>"),
    Case("placeholder", d("#SBATCH --account=CHANGE_ME"), d("#SBATCH --account=changes"), 10, "CHANGE_ME"),
    Case("directive-after-command", c("#SBATCH --requeue"), d("#SBATCH --no-requeue"), 15, "#SBATCH --requeue"),
    Case("no-directive", d("#SBTACH --qos=high"), d("# a note on SBATCH -- nothing more"), 10, "#SBTACH"),
    Case("no-directive", d("#sbatch --qos=high"), d("#SBATCH --qos=high"), 10),
    Case("no-directive", d(" #SBATCH --qos=high"), d("#SBATCH\t--qos=high"), 10),
    Case("switched-off-directive", d("##SBATCH --qos=high"), d("## SBATCH lines follow"), 10),
    Case("switched-off-directive", d("# SBATCH --qos=high"), d("#SBATCH --qos=high # was --qos=low"), 10),
    Case("no-space", d("#SBATCH--qos=high"), d("#SBATCH  --qos=high"), 10),
    Case("unknown-option", d("#SBATCH --partitionn=gpu"), d("#SBATCH --part=gpu"), 10, "--partitionn"),
    Case("unknown-option", d("#SBATCH --kill-on-bad-exit=1"), d("#SBATCH --kill-on-invalid-dep=yes"), 10, "--kill-on-bad-exit=1"),
    Case("unknown-option", d("#SBATCH -job-name=gpt"), d("#SBATCH -J gpt"), 10, "-job-name=gpt"),
    Case("malformed-directive", d("#SBATCH -partition=gpu"), d("#SBATCH -pgpu"), 10, "-partition=gpu"),
    Case("unknown-option", d("#SBATCH --gpu=8"), d("#SBATCH --gpu-b=none"), 10, "--gpu=8"),
    Case("site-option", d("#SBATCH --fabric-lanes=4"), d("#SBATCH --container-image=/img/train.sqsh"), 10),
    Case("malformed-directive", d("#SBATCH partition=gpu"), d("#SBATCH --partition gpu"), 10, "partition=gpu"),
    Case("malformed-directive", d("#SBATCH --comment=my run"), d("#SBATCH --comment='my run'"), 10, "run"),
    Case("malformed-directive", d("#SBATCH --partition"), d("#SBATCH --exclusive"), 10),
    Case("malformed-directive", d("#SBATCH --reboot=1"), d("#SBATCH --reboot"), 10),
    Case("malformed-directive", d("#SBATCH -p=gpu"), d("#SBATCH -pgpu"), 10, "-p=gpu"),
    Case("malformed-directive", d("#SBATCH --partition= gpu"), d("#SBATCH --partition=gpu"), 10),
    Case("malformed-directive", d('#SBATCH --comment="a'), d('#SBATCH --comment="a b"'), 10),
    Case("malformed-directive", d("#SBATCH: --partition=gpu"), d("#SBATCH --partition=gpu"), 10),
    Case("cut-by-comment", d("#SBATCH --comment=run#12"), d("#SBATCH --comment='run#12' # twelfth"), 10, "--comment=run#12"),
    Case("variable-in-directive", d("#SBATCH --error=$HOME/%j.err"), d("#SBATCH --error=/home/me/%j.err"), 10, "$HOME"),
    Case("variable-in-directive", d("#SBATCH --chdir=~/runs"), d("#SBATCH --chdir=/runs"), 10),
    Case("repeated-option", d("#SBATCH --nodes=4"), d("#SBATCH --nodes=2"), 10, "--nodes=4"),
    Case("repeated-option", d("#SBATCH --requeue --open-mode=append\n#SBATCH --no-requeue"), d("#SBATCH --no-requeue"), 11),
    Case("time-format", d("#SBATCH --time=20h"), d("#SBATCH --time=1-12"), 10),
    Case("time-units", d("#SBATCH --time=20"), d("#SBATCH --time=0:20:00"), 10, "--time=20"),
    Case("time-units", d("#SBATCH -t 20:00"), d("#SBATCH -t 20:00:00"), 10),
    Case("no-time", framed(drop="#SBATCH --time"), framed(), 1),
    Case("memory", d("#SBATCH --mem=1.5T"), d("#SBATCH --mem=1500G"), 10),
    Case("memory", d("#SBATCH --mem-per-gpu=64G"), d("#SBATCH --mem=512G"), 10),
    Case("memory-units", d("#SBATCH --mem=512"), d("#SBATCH --mem=512GB"), 10),
    Case("exclusive-memory", framed("#SBATCH --exclusive", drop="#SBATCH --mem"), d("#SBATCH --exclusive"), 9),
    Case("gpus-twice", d("#SBATCH --gres=gpu:4"), d("#SBATCH --gres=nvme:1"), 10),
    Case("gpus-twice", d("#SBATCH --gpus=8"), d("#SBATCH --gpus=16"), 10),
    Case("no-cpus", framed(drop="#SBATCH --cpus"), framed("#SBATCH --exclusive", drop="#SBATCH --cpus"), 1),
    Case("no-threads", framed(drop="export OMP"), framed(), 15),
    Case("output-folder", d("#SBATCH --error=nowhere/%j.err"), d("#SBATCH --error=here/%j.err"), 10, "nowhere"),
    Case("log-overwritten", d("#SBATCH --error=gpt.err"), d("#SBATCH --error=gpt.err --open-mode=append"), 10),
    Case("log-overwritten", d("#SBATCH --array=0-3 --output=%A.out"), d("#SBATCH --array=0-3 --output=%A_%a.out"), 10),
    Case("requeue-log", d("#SBATCH --requeue"), d("#SBATCH --requeue --open-mode=append"), 10),
    Case("requeue-resume", d("#SBATCH --requeue --open-mode=append"), last("srun -K python train.py --resume"), 10),
    Case("requeue-resume", last("srun -K megactl train --resume never || scontrol requeue $SLURM_JOB_ID"),
         last("srun -K megactl train --run-dir a || scontrol requeue $SLURM_JOB_ID"), 16, "--resume never"),
    Case("requeue-loop", c("scontrol requeue $SLURM_JOB_ID"), c("[ $code != 75 ] || scontrol requeue $SLURM_JOB_ID"), 15),
    Case("signal-trap", d("#SBATCH --requeue --signal=B:USR1@60"), d("#SBATCH --requeue --signal=USR1@60"), 10, "--signal=B:USR1@60"),
    Case("signal-trap", framed("#SBATCH --signal=B:USR1@60", "trap 'save' USR1"),
         framed("#SBATCH --signal=B:USR1@60", "trap 'save' SIGUSR1", last="srun -K python train.py &\nwait $!"), 16),
    Case("signal-torchrun", framed("#SBATCH --signal=USR1@60", last="srun torchrun train.py"), d("#SBATCH --signal=USR1@60"), 10),
    Case("signal-requeue", d("#SBATCH --signal=USR1@60"), d("#SBATCH --signal=USR1@60 --requeue"), 10),
    Case("signal-format", d("#SBATCH --signal=SAVE@60"), d("#SBATCH --signal=12@60"), 10),
    Case("signal-format", d("#SBATCH --time=1 --signal=USR1@60"), d("#SBATCH --time=5 --signal=USR1@60"), 10),
    Case("launcher-tasks", last("srun -K torchrun --nproc-per-node=8 train.py"),
         last("srun -K --ntasks-per-node=1 torchrun train.py"), 16, "torchrun"),
    Case("one-task", last("srun -K --ntasks-per-node=1 python train.py"),
         last("srun -K --ntasks-per-node=1 megactl train --mock-data"), 16),
    Case("tasks-and-gpus", last("srun -K --ntasks-per-node=4 python train.py"), last("srun -K --ntasks-per-node=8 python train.py"), 16),
    Case("no-srun", last("torchrun train.py"), last("mpirun python train.py"), 16, "torchrun"),
    Case("layout", c("NNODES=16"), c("NNODES=2"), 15, "NNODES=16"),
    Case("layout", c("GPUS_PER_NODE=4"), c("GPUS_PER_NODE=8"), 15),
    Case("layout", last("srun -K -N2 -n2 torchrun --nnodes=4 train.py"),
         last("srun -K -N2 -n2 torchrun --nnodes=2 train.py"), 16, "--nnodes=4"),
    Case("early-expansion", c("export RANK=$SLURM_PROCID"), c("export RANKS=$SLURM_NTASKS"), 15, "$SLURM_PROCID"),
    Case("early-expansion", last('srun -K bash -c "RANK=$SLURM_PROCID python train.py"'),
         last('srun -K bash -c "RANK=\\$SLURM_PROCID python train.py"'), 16),
    Case("early-expansion", last("srun -K python train.py --rank ${SLURM_PROCID:-0}"),
         last("srun -K bash -c 'python train.py --rank ${SLURM_PROCID:-0}'"), 16),
    Case("early-heredoc", c("cat >rank.sh <<END\n#!/bin/bash\npython a.py --rank $SLURM_PROCID\nEND"),
         c("cat >rank.sh <<'END'\n#!/bin/bash\npython a.py --rank $SLURM_PROCID\nEND"), 17),
    Case("early-heredoc", c("sbatch <<END\n#!/bin/bash\n#SBATCH --time=1:00:00\necho $SLURM_JOB_ID\nEND"),
         c("sbatch <<END\n#!/bin/bash\n#SBATCH --time=1:00:00\necho \\$SLURM_JOB_ID $HOME\nEND"), 18),
    Case("local-address", c("export MASTER_ADDR=localhost"), c("export REDIS_ADDR=localhost"), 15),
    Case("local-address", last("srun -K python train.py --master_addr=127.0.0.1"),
         last("srun -K python train.py --master_addr=$MASTER_ADDR"), 16),
    Case("own-address", last("srun -K bash -c 'MASTER_ADDR=$(hostname) python train.py'"),
         last('srun -K bash -c "MASTER_ADDR=$(hostname) python train.py"'), 16),
    Case("random-port", last("srun -K bash -c 'MASTER_PORT=$((20000 + RANDOM % 1000)) python train.py'"),
         c("MASTER_PORT=$((20000 + RANDOM % 1000))"), 16),
    Case("fixed-port", c("MASTER_PORT=29500"), c("MASTER_PORT=$((29500 + SLURM_JOB_ID % 100))"), 15, "MASTER_PORT=29500"),
    Case("fixed-port", last("srun -K -n2 -N2 torchrun --rdzv_endpoint=$MASTER_ADDR:29500 train.py"),
         last("srun -K -n2 -N2 torchrun --rdzv_endpoint=$MASTER_ADDR:$MASTER_PORT train.py"), 16),
    Case("nodes-by-hand", c("HEAD=$(echo $SLURM_NODELIST | cut -d, -f1)"),
         c("HEAD=$(scontrol show hostnames $SLURM_NODELIST | head -1)"), 15),
    Case("nodes-by-hand", c("HEAD=${SLURM_JOB_NODELIST%%,*}"), c("NODES_USED=$SLURM_JOB_NODELIST"), 15),
    Case("visible-devices", c("export CUDA_VISIBLE_DEVICES=0,1,2,3"), c("echo $CUDA_VISIBLE_DEVICES"), 15),
    Case("srun-option", last("srun -K --requeue python train.py"), last("srun -K --label python train.py"), 16, "--requeue"),
    Case("srun-option", last("srun --kill-on-bad-exits=1 python train.py"), last("srun --kill-on-bad-exit=1 python train.py"), 16),
    Case("kill-on-bad-exit", last("srun --label python train.py"), last("srun -K1 python train.py"), 16),
    Case("kill-on-bad-exit", last('RUN=(srun --label)\n"${RUN[@]}" python train.py'),
         last('RUN=(srun --label)\nRUN+=(-K)\n"${RUN[@]}" python train.py'), 17),
    Case("kill-on-bad-exit", last("srun -K0 python train.py"), last("ARGS='--label -K'\nsrun $ARGS python train.py"), 16),
    Case("srun-cpus", framed(drop="export OMP"), last("srun -K -c 12 python train.py", drop="export OMP"), 15),
    Case("environment-lost", d("#SBATCH --export=NONE"), d("#SBATCH --export=ALL,A=1"), 10),
    Case("background", last("srun -K python train.py &"), last("srun -K python train.py &\nwait"), 16),
    Case("tee", last("srun -K python train.py | tee log", drop="set -"), last("srun -K python train.py | tee log"), 15),
    Case("exit-code", last("srun -K python train.py\necho done", drop="set -"), last("srun -K python train.py\necho done"), 15),
    Case("errexit", last("srun -K python train.py\ncode=$?"), last("code=0\nsrun -K python train.py || code=$?"), 17),
)  # fmt: skip
