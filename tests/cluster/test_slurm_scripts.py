"""Rendered scripts, run under stand-ins for Slurm's commands: what they start, and what they do with each way a run can end."""

from __future__ import annotations

import subprocess

import pytest
from stub_cluster import summary

from megactl.config.schema import Run
from megactl.config.settings import replace
from megactl.config.slurm import master_port


def train_words(call: list[str]) -> list[str]:
    """The trainer's part of one call of srun."""
    return call[call.index("train") + 1 :]


def test_one_task_a_gpu_with_the_command_behind_srun(cluster, rendered):
    ran = cluster.run(rendered("--tp", "2", "--cpus-per-task", "6", "--lr", "3e-4"))
    assert ran.code == 0, ran.stderr
    (call,) = ran.of("srun")
    options = call[: call.index("megactl")]
    assert options == [
        "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=6", "--distribution=block", "--kill-on-bad-exit=1", "--wait=60",
    ]  # fmt: skip
    assert train_words(call) == [
        "--preset", "gpt-tiny", "--tp", "2", "--device", "cuda", "--lr", "0.0003", "--mock-data", "--run-dir=runs/gpt-tiny-job4711",
    ]  # fmt: skip


def test_master_and_port_are_what_megactl_would_find_itself(cluster, rendered):
    text = rendered()
    for job in (1, 4711, 20_000, 123_456_789):
        environment = cluster.run(text, SLURM_JOB_ID=job).environment
        assert environment["MASTER_ADDR"] == "node1"
        assert int(environment["MASTER_PORT"]) == master_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0"})


def test_the_environment_of_the_ranks(cluster, rendered):
    ran = cluster.run(rendered("--env", 'A_B=it\'s $HOME `x` "q" \\', "--env", "EMPTY="), SLURM_CPUS_PER_TASK=5)
    assert ran.environment["A_B"] == 'it\'s $HOME `x` "q" \\'
    assert ran.environment["EMPTY"] == ""
    assert ran.environment["OMP_NUM_THREADS"] == "5"
    assert ran.environment["NCCL_DEBUG"] == "WARN"
    assert cluster.run(rendered(), NCCL_DEBUG="INFO").environment["NCCL_DEBUG"] == "INFO"
    assert "NCCL_DEBUG" not in rendered("--gpus-per-node", "0", "--ntasks-per-node", "2")


def test_modules_and_virtual_environment_come_before_the_run(cluster, rendered):
    activate = cluster.folder / "my env" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("export ACTIVATED=yes\n")
    ran = cluster.run(rendered("--module", "cuda/12.8", "--module", "openmpi", "--venv", str(cluster.folder / "my env")))
    assert [call[0] for call in ran.calls] == ["module", "scontrol", "srun"]
    assert ran.of("module") == [["load", "cuda/12.8", "openmpi"]]
    assert ran.environment["ACTIVATED"] == "yes"


def test_a_module_that_is_missing_ends_the_job_before_the_run(cluster, rendered):
    (cluster.bin / "module").write_text("#!/bin/bash\nexit 1\n")
    ran = cluster.run(rendered("--module", "cuda"))
    assert ran.code == 1 and not ran.of("srun")


def test_container_options_are_words_of_srun_alone(cluster, rendered):
    text = rendered(
        "--container-image", "/images/my train.sqsh", "--container-mount", "/data:/data:ro", "--container-mount", "/scratch:/scratch",
        "--container-workdir", "/w", "--srun", "no-container-mount-home", "--srun", "mpi=pmix",
    )  # fmt: skip
    (call,) = cluster.run(text).of("srun")
    assert call[7 - 1 : call.index("megactl")] == [
        "--container-image=/images/my train.sqsh", "--container-mounts=/data:/data:ro,/scratch:/scratch", "--container-workdir=/w",
        "--no-container-mount-home", "--mpi=pmix",
    ]  # fmt: skip
    assert not [line for line in text.splitlines() if line.startswith("#SBATCH") and "container" in line]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("megactl", ["torchrun", "--no-python", "megactl"]),
        ("/env/bin/megactl", ["/env/bin/torchrun", "--no-python", "/env/bin/megactl"]),
        ("/env/bin/python -m megactl", ["/env/bin/python", "-m", "torch.distributed.run", "-m", "megactl"]),
    ],
)
def test_torchrun_is_one_task_a_node(cluster, rendered, command, words):
    text = rendered("--launcher", "torchrun", "--cpus-per-task", "3", "--command", command, "--time", "60")
    (call,) = cluster.run(text, SLURM_RESTART_COUNT=2).of("srun")
    assert call[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"]
    options = ["--nnodes=2", "--nproc-per-node=2", "--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:14711",
               "--rdzv-id=4711-2"]  # fmt: skip
    assert [word for word in call[call.index("--wait=60") + 1 : call.index("train")] if word not in options] == words
    assert set(options) < set(call)
    # The signal would end torchrun without a save, so the ranks watch the time: 60 minutes less 180 s.
    assert "--signal" not in text
    assert train_words(call)[train_words(call).index("--exit-duration") + 1] == "57"


def test_a_saved_run_is_requeued_and_runs_the_same_command_again(cluster, rendered):
    text = rendered()
    first = cluster.run(text, SRUN_CODE=75, SUMMARY=summary("saved", 20))
    assert first.code == 75
    assert first.of("scontrol")[-1] == ["requeue", "4711"]
    assert "saved after iteration 20; requeued, start 2 follows" in first.stderr
    second = cluster.run(text, SRUN_CODE=0, SUMMARY=summary("completed", 30), SLURM_RESTART_COUNT=1)
    assert second.code == 0 and ["requeue", "4711"] not in second.of("scontrol")
    assert first.of("srun") == second.of("srun")


@pytest.mark.parametrize(
    ("code", "status"), [(0, "completed"), (1, "failed"), (2, "failed"), (130, "interrupted"), (137, "failed"), (1, None)]
)
def test_what_did_not_save_is_not_requeued_and_keeps_its_code(cluster, rendered, code, status):
    ran = cluster.run(rendered(), SRUN_CODE=code, SUMMARY=summary(status, 5) if status else None)
    assert ran.code == code
    assert [call for call in ran.of("scontrol") if call[0] == "requeue"] == []


def test_a_completed_run_is_not_requeued_whatever_srun_says(cluster, rendered):
    ran = cluster.run(rendered(), SRUN_CODE=75, SUMMARY=summary("completed", 30))
    assert ran.code == 0 and ["requeue", "4711"] not in ran.of("scontrol")


def test_a_save_counts_where_srun_killed_a_slower_rank(cluster, rendered):
    ran = cluster.run(rendered(), SRUN_CODE=137, SUMMARY=summary("saved", 20))
    assert ran.of("scontrol")[-1] == ["requeue", "4711"]


def test_the_summary_of_an_earlier_start_does_not_count(cluster, rendered):
    text = rendered("--run-dir", "my runs/a")
    (cluster.folder / "my runs" / "a").mkdir(parents=True)
    (cluster.folder / "my runs" / "a" / "summary.json").write_text(summary("saved", 20))
    ran = cluster.run(text, SRUN_CODE=1)
    assert ran.code == 1 and ["requeue", "4711"] not in ran.of("scontrol")


def test_where_the_summary_cannot_be_seen_the_exit_code_decides(cluster, rendered):
    assert cluster.run(rendered(), SRUN_CODE=75).of("scontrol")[-1] == ["requeue", "4711"]


def test_the_limit_of_restarts(cluster, rendered):
    text = rendered("--max-requeues", "3")
    allowed = cluster.run(text, SRUN_CODE=75, SUMMARY=summary("saved", 2), SLURM_RESTART_COUNT=2)
    assert allowed.of("scontrol")[-1] == ["requeue", "4711"]
    ended = cluster.run(text, SRUN_CODE=75, SUMMARY=summary("saved", 3), SLURM_RESTART_COUNT=3)
    assert ended.code == 75 and ["requeue", "4711"] not in ended.of("scontrol")
    assert "restarted 3 times" in ended.stderr


def test_starts_that_finish_no_iteration_stop_the_loop(cluster, rendered):
    text = rendered()
    requeued = []
    for start in range(6):
        ran = cluster.run(text, SRUN_CODE=75, SUMMARY=summary("saved", 7), SLURM_RESTART_COUNT=start)
        requeued.append(["requeue", "4711"] in ran.of("scontrol"))
    assert requeued == [True, True, True, False, False, False]
    ran = cluster.run(text, SRUN_CODE=75, SUMMARY=summary("saved", 8), SLURM_RESTART_COUNT=7)
    assert ["requeue", "4711"] in ran.of("scontrol")


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_cancelled_job_does_not_come_back(cluster, rendered, state):
    ran = cluster.run(rendered(), SRUN_CODE=75, SUMMARY=summary("saved", 20), JOB_STATE=state)
    assert ran.code == 75 and ["requeue", "4711"] not in ran.of("scontrol")
    assert "cancelled" in ran.stderr


def test_a_requeue_that_slurm_refuses_is_said(cluster, rendered):
    ran = cluster.run(rendered(), SRUN_CODE=75, SUMMARY=summary("saved", 20), REQUEUE_CODE=1)
    assert ran.code == 75 and "scontrol requeue failed" in ran.stderr


def test_without_requeue_the_job_ends_with_75(cluster, rendered):
    text = rendered("--no-requeue")
    assert "#SBATCH --no-requeue" in text and "--open-mode" not in text
    ran = cluster.run(text, SRUN_CODE=75, SUMMARY=summary("saved", 20))
    assert ran.code == 75 and ["requeue", "4711"] not in ran.of("scontrol")


def test_a_chain_is_one_run_over_many_jobs(cluster, rendered):
    text = rendered("--array", "0-9%1")
    assert "#SBATCH --array=0-9%1" in text and "#SBATCH --no-requeue" in text and "%A_%a" in text
    folders = set()
    for task in (0, 1):
        (call,) = cluster.run(text, SRUN_CODE=75, SLURM_ARRAY_JOB_ID=99, SLURM_ARRAY_TASK_ID=task, SLURM_JOB_ID=100 + task).of("srun")
        folders.add(call[-1])
    assert folders == {"--run-dir=runs/gpt-tiny-job99"}


def test_the_signal_reaches_the_ranks_and_not_a_shell(cluster, rendered):
    text = rendered("--time", "1:00:00", "--signal", "TERM@300")
    assert "#SBATCH --signal=TERM@300" in text and "bash -c '" not in text.replace("(bash -c '...')", "")


def test_a_sigterm_waits_for_the_last_save(cluster, rendered, tmp_path):
    """A batch shell that dies of SIGTERM at once would not live to see the ranks' exit code."""
    ready = tmp_path / "ready"
    (cluster.bin / "srun").write_text(
        f'#!/bin/bash\nprintf \'%s\\0\' srun "" >> "$CALLS"\n: > {ready}\nwhile [ ! -e {ready}.go ]; do sleep 0.05; done\nexit 75\n'
    )
    path = cluster.folder / "job.sh"
    path.write_text(rendered())
    environ = {
        "PATH": f"{cluster.bin}:/usr/bin:/bin", "CALLS": str(cluster.folder / "calls"), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node1",
        "ENVIRONMENT": str(cluster.folder / "environment"),
    }  # fmt: skip
    with subprocess.Popen(["bash", str(path)], cwd=cluster.folder, env=environ, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if ready.exists():
                break
            subprocess.run(["sleep", "0.05"], check=True)
        process.terminate()
        ready.with_name("ready.go").touch()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "requeued" in err


def test_a_sweep_is_an_array_with_a_folder_a_point(cluster, rendered):
    text = rendered("--sweep", "lr=1e-4,3e-4", "--sweep", "training.seed=1,2", "--array-limit", "2")
    assert "#SBATCH --array=0-3%2" in text
    seen = {}
    for task in range(4):
        (call,) = cluster.run(text, SLURM_ARRAY_JOB_ID=50, SLURM_ARRAY_TASK_ID=task).of("srun")
        words = train_words(call)
        (index,) = (number for number, word in enumerate(words) if word.startswith("--run-dir="))
        seen[words[index].partition("=")[2]] = words[index + 1 :]
    assert seen == {
        f"runs/gpt-tiny-job50/lr-{lr}_seed-{seed}": ["--lr", lr, "--seed", str(seed)] for lr in ("1e-4", "3e-4") for seed in (1, 2)
    }
    ran = cluster.run(text, SLURM_ARRAY_JOB_ID=50, SLURM_ARRAY_TASK_ID=3, SLURM_JOB_ID=50, SRUN_CODE=75)
    assert ran.of("scontrol")[-1] == ["requeue", "50_3"], "50 alone would requeue every task of the array"
    ran = cluster.run(text, SLURM_ARRAY_JOB_ID=50, SLURM_ARRAY_TASK_ID=9)
    assert ran.code == 2 and not ran.of("srun") and "no point 9" in ran.stderr


def test_a_swept_switch_is_on_and_off(cluster, rendered):
    text = rendered("--sweep", "data.mock_data=true", "--sweep", "overlap_grad_reduce=true,false", "--sweep", "zero=1,none")
    options = []
    for task in range(4):
        (call,) = cluster.run(text, SLURM_ARRAY_JOB_ID=50, SLURM_ARRAY_TASK_ID=task).of("srun")
        options.append(call[call.index("--mock-data") + 1 :])
    assert options == [
        ["--overlap-grad-reduce", "--zero", "1"], ["--overlap-grad-reduce", "--set", "parallel.zero=none"],
        ["--no-overlap-grad-reduce", "--zero", "1"], ["--no-overlap-grad-reduce", "--set", "parallel.zero=none"],
    ]  # fmt: skip


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (3, 1), (2, 2)])
def test_what_srun_starts_is_what_megactl_takes_it_for(cluster, rendered, nodes, gpus):
    """A task a node may also mean "start this node's ranks": on nodes with more GPUs than were asked for, one a node must stay one."""
    from megactl.config.start import start_info

    (call,) = cluster.run(rendered("--nodes", str(nodes), "--gpus-per-node", str(gpus))).of("srun")
    words = train_words(call)
    nproc = int(words[words.index("--nproc") + 1]) if "--nproc" in words else None
    run = replace(Run(), {"training.nproc": nproc})
    tasks = int(call[1].removeprefix("--ntasks="))
    environ = {
        "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1", "SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(nodes),
        "SLURM_STEP_NODELIST": f"n[1-{nodes}]", "SLURM_STEP_TASKS_PER_NODE": f"{gpus}(x{nodes})", "SLURM_NODEID": "0", "SLURM_LOCALID": "0",
    }  # fmt: skip
    assert start_info(run, environ, gpus=8).world_size == nodes * gpus == tasks


def test_an_interactive_script_asks_for_nodes_and_runs_in_them(cluster, rendered):
    text = rendered("--interactive", "--time", "30", "--constraint", "a&b")
    assert "#SBATCH" not in text
    ran = cluster.run(text, SLURM_JOB_ID=None)
    (call,) = ran.of("salloc")
    assert call[:2] == ["--job-name=gpt-tiny", "--nodes=2"] and call[-2:] == ["bash", str(cluster.folder / "script.sh")]
    assert "--constraint=a&b" in call and "--time=00:30:00" in call and "--requeue" not in call
    inside = cluster.run(text, SRUN_CODE=75, SUMMARY=summary("saved", 3))
    assert len(inside.of("srun")) == 1 and not inside.of("salloc") and inside.code == 75
    assert ["requeue", "4711"] not in inside.of("scontrol")


HOSTILE = [
    "$(touch canary)", "`touch canary`", "; touch canary", "' ; touch canary #", '" ; touch canary', "a\\", "*", "~", "${HOME}", "-x",
    "--wrap=x", "#SBATCH --uid=0", "é ü 漢", "a  b", "!!", "&& touch canary", "| touch canary", "<(touch canary)", "a'b\"c",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_any_text_is_one_word_of_the_command(cluster, rendered, value):
    text = rendered(f"--run-dir={value}", f"--wandb-project={value}", "--env", f"A={value}")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    ran = cluster.run(text)
    (call,) = ran.of("srun")
    words = train_words(call)
    assert f"--run-dir={value}" in words
    assert f"--wandb-project={value}" in words or words[words.index("--wandb-project") + 1] == value
    assert ran.environment["A"] == value
    assert not (cluster.folder / "canary").exists()
