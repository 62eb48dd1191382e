import pytest

from megactl.cluster.scripts import job_name_from_file, rename_by_steps, set_time
from megactl.storage.file_changes import apply

SCRIPT = """#!/bin/bash
#SBATCH --job-name=old name-that-stays
#SBATCH --nodes=16
#SBATCH --time=20:00:00           # maximum execution time
##SBATCH --time=1:00
#SBATCH --time-min=1:00
PP_CHUNKS=128
echo "#SBATCH --time=9"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "61B-megatron-mbs-2-pp16-dp-1.sh").write_text(SCRIPT)
    (tmp_path / "61B-megatron-mbs-2-pp16-dp-1.18488.out").write_text("log")
    (tmp_path / "61B-megatron-mbs-2-pp16-dp-1-200977.out").write_text("log")
    (tmp_path / "61B-megatron-mbs-2-pp16-dp-16.sh").write_text(SCRIPT.replace("128", "8"))
    (tmp_path / "61B-megatron-mbs-2-pp16-dp-16.1.out").write_text("log")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "undo.json")


def test_scripts_and_their_logs_get_the_steps_into_their_names(folder):
    plan = rename_by_steps(sorted(folder.glob("*.sh")))
    assert not plan.problems
    apply(plan.changes, folder / "undo.json")
    # dp-1 is no beginning of dp-16.
    assert names(folder) == [
        "61B-megatron-mbs-2-pp16-dp-1-gas-128-200977.out",
        "61B-megatron-mbs-2-pp16-dp-1-gas-128.18488.out",
        "61B-megatron-mbs-2-pp16-dp-1-gas-128.sh",
        "61B-megatron-mbs-2-pp16-dp-16-gas-8.1.out",
        "61B-megatron-mbs-2-pp16-dp-16-gas-8.sh",
    ]
    again = rename_by_steps(sorted(folder.glob("*.sh")))
    assert not again.changes and not again.problems and all("already" in note for note in again.notes)


def test_a_longer_name_of_another_experiment_is_not_its_log(folder):
    (folder / "61B-megatron-mbs-2-pp16-dp-1-test.sh").write_text(SCRIPT)
    plan = rename_by_steps([folder / "61B-megatron-mbs-2-pp16-dp-1.sh"])
    assert "61B-megatron-mbs-2-pp16-dp-1-test.sh" not in {change.source.name for change in plan.changes}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x-dp-1.sh", "PP_CHUNKS=1\nGAS=2\n", "more than one value (1, 2)"),
        ("x.sh", "GAS=2\n", "no dp-N"),
        ("x-dp-1-gas-4.sh", "GAS=2\n", "named after 4 steps and sets 2"),
        ("x-dp-1.sh", "GAS=2\n\0", "not a text file"),
    ],
)
def test_what_cannot_be_renamed_says_why(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    plan = rename_by_steps([tmp_path / name])
    assert not plan.changes and words in str(plan.problems[0])


@pytest.mark.parametrize("line", ["# PP_CHUNKS=4", "PP_CHUNKS=$X", "+ PP_CHUNKS=4", "echo PP_CHUNKS=4", "MYGAS=4"])
def test_what_is_no_assignment_is_not_read_as_one(tmp_path, line):
    (tmp_path / "x-dp-1.sh").write_text(f"{line}\n")
    plan = rename_by_steps([tmp_path / "x-dp-1.sh"])
    assert not plan.changes and not plan.problems and len(plan.notes) == 1


@pytest.mark.parametrize("line", ["PP_CHUNKS=4", "  export GAS='4'   # steps", 'GAS="4";', "GAS=4\r"])
def test_assignments_as_people_write_them(tmp_path, line):
    (tmp_path / "x-dp-1.sh").write_bytes(f"{line}\n".encode())
    (change,) = rename_by_steps([tmp_path / "x-dp-1.sh"]).changes
    assert change.target.name == "x-dp-1-gas-4.sh"


def test_only_the_time_changes(folder):
    path = folder / "61B-megatron-mbs-2-pp16-dp-1.sh"
    (change,) = set_time([path, path], "00:20:00").changes
    assert change.after.decode() == SCRIPT.replace("--time=20:00:00 ", "--time=00:20:00 ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("#SBATCH -t 10", "#SBATCH -t 5"),
        ("#SBATCH -t10", "#SBATCH -t5"),
        ("#SBATCH --time 10", "#SBATCH --time 5"),
        ("#SBATCH --nodes=2 --time=10 --qos=x", "#SBATCH --nodes=2 --time=5 --qos=x"),
        ("#SBATCH --time='1-00' # a day", "#SBATCH --time=5 # a day"),
        ("#SBATCH --time=10\r", "#SBATCH --time=5\r"),
    ],
)
def test_the_forms_of_an_option(tmp_path, line, expected):
    path = tmp_path / "x.sh"
    path.write_bytes(f"#!/bin/sh\n{line}\n".encode())
    (change,) = set_time([path], "5").changes
    assert change.after.decode() == f"#!/bin/sh\n{expected}\n"


@pytest.mark.parametrize("line", ["# SBATCH --time=1", "##SBATCH --time=1", " #SBATCH --time=1", "#SBATCH --nodes=1 # --time=1"])
def test_what_slurm_does_not_read_is_left_alone(tmp_path, line):
    path = tmp_path / "x.sh"
    path.write_text(f"{line}\n")
    plan = set_time([path], "5")
    assert not plan.changes and "no line #SBATCH --time" in plan.notes[0]


@pytest.mark.parametrize("limit", ["20", "20:00", "1:20:00", "2-0", "2-12:30", "2-12:30:00", "unlimited"])
def test_times_of_slurm(tmp_path, limit):
    assert not set_time([], limit).problems


@pytest.mark.parametrize("limit", ["", "0", "20m", "1:2:3:4", "1-", "-1", "10\n#SBATCH --wrap=x", "1d", "1 2"])
def test_what_is_no_time(limit):
    plan = set_time([], limit)
    assert plan.problems and not plan.changes


def test_the_job_is_named_after_its_file(folder):
    path = folder / "61B-megatron-mbs-2-pp16-dp-1.sh"
    (change,) = job_name_from_file([path]).changes
    assert change.after.decode().splitlines()[1] == "#SBATCH --job-name=61B-megatron-mbs-2-pp16-dp-1 name-that-stays"
    slurm = folder / "run.slurm"
    slurm.write_text("#SBATCH -J run\n")
    assert "already" in job_name_from_file([slurm]).notes[0]


@pytest.mark.parametrize("name", ["a b.sh", "a\n.sh", "$(x).sh", "a;b.sh", "é.sh"])
def test_a_name_that_a_shell_would_read_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("#SBATCH --job-name=x\n")
    plan = job_name_from_file([path])
    assert not plan.changes and "cannot stand" in str(plan.problems[0])


def test_every_file_that_cannot_be_read_is_named(tmp_path):
    plan = set_time([tmp_path / "one.sh", tmp_path / "two.sh"], "5")
    assert len(plan.problems) == 2
