import math

import pytest

from megactl.report.logs.records import Event, Run
from megactl.report.logs.status import STATUSES, status_of


def run(*events, iterations=3, total=1000, **last):
    """A run whose iteration lines are 10, 20, ...; `events` are (kind, line, text)."""
    made = Run("x.out", 0, events=[Event(*event) for event in events], last_line=999)
    for kind, _, _ in events:
        made.event_counts[kind] = made.event_counts.get(kind, 0) + 1
    for index in range(1, iterations + 1):
        values = {"seconds": 1.0, "skipped": 0.0, "nan": 0.0, **(last if index == iterations else {})}
        loss = values.pop("loss", 5.0)
        made.iterations.append(index, total=total, line=10 * index, losses={"lm loss": loss}, **values)
    return made


@pytest.mark.parametrize(
    ("kind", "text", "status"),
    [
        ("oom-gpu", "RuntimeError: CUDA out of memory.", "oom-gpu"),
        ("oom-host", "slurmstepd: error: Detected 1 oom-kill event(s)", "oom-host"),
        ("time-limit", "slurmstepd: error: *** JOB 1 CANCELLED DUE TO TIME LIMIT ***", "time-limit"),
        ("cancelled", "slurmstepd: error: *** JOB 1 CANCELLED ***", "cancelled"),
        ("nccl", "NCCL error in: ProcessGroupNCCL.cpp:825", "nccl"),
        ("config", "AssertionError: Check batch related parameters.", "config"),
        ("crash", "Traceback (most recent call last):", "crashed"),
        ("hardware", "CUDA error: uncorrectable ECC error", "crashed"),
        ("node-failure", "CANCELLED DUE TO NODE FAILURE", "crashed"),
        ("completed", "[after training is done] datetime: 2021", "completed"),
        ("stopped", "[exiting program after 60.2 minutes] datetime: 2021", "time-limit"),
        ("stopped", "[exiting program at iteration 500] datetime: 2021", "completed"),
        ("stopped", "[exiting program after receiving SIGTERM.] datetime: 2021", "cancelled"),
    ],
)
@pytest.mark.parametrize("iterations", [0, 3])
def test_each_end_has_its_status_and_its_line(kind, text, status, iterations):
    found = status_of(run((kind, 50, text), iterations=iterations))
    assert (found.status, found.evidence) == (status, f"line 50: {text}")
    assert status in STATUSES


def test_out_of_memory_explains_what_came_first_and_what_came_after():
    events = [("nccl", 48, "NCCL error"), ("oom-gpu", 50, "CUDA out of memory"), ("cancelled", 60, "CANCELLED")]
    assert status_of(run(*events)).status == "oom-gpu"


def test_the_earliest_end_counts():
    assert status_of(run(("time-limit", 50, "DUE TO TIME LIMIT"), ("nccl", 55, "NCCL"), ("crash", 56, "Traceback"))).status == "time-limit"
    assert status_of(run(("completed", 50, "done"), ("cancelled", 60, "CANCELLED"))).status == "completed"


def test_a_traceback_says_less_than_the_error_under_it():
    assert status_of(run(("crash", 50, "Traceback"), ("nccl", 55, "NCCL error"), ("cancelled", 60, "CANCELLED"))).status == "nccl"
    assert status_of(run(("crash", 50, "Traceback"), ("cancelled", 60, "CANCELLED"))).status == "crashed"


def test_what_the_run_survived_is_not_its_end():
    assert status_of(run(("oom-gpu", 5, "CUDA out of memory"), ("crash", 15, "Traceback"))).status is None
    # The line of the last rank may come behind the error of another one.
    assert status_of(run(("oom-gpu", 25, "CUDA out of memory"))).status == "oom-gpu"


def test_the_last_iteration_completes_a_run_that_says_nothing_more():
    found = status_of(run(total=3))
    assert found.status == "completed" and "iteration 3 of 3" in found.evidence
    assert status_of(run(("time-limit", 50, "DUE TO TIME LIMIT"), total=3)).status == "time-limit"


def test_a_trainer_that_states_its_runtime_is_done():
    made = run(total=-1)
    made.summary["train_runtime"] = 559.1
    assert status_of(made).status == "completed" and "559.1 s" in status_of(made).evidence
    made.events.append(Event("cancelled", 50, "CANCELLED"))
    assert status_of(made).status == "cancelled"


def test_a_log_that_just_ends_is_not_judged():
    found = status_of(run())
    assert found.status is None and "line 30" in found.evidence and "does not say why" in found.evidence


def test_no_iterations():
    found = status_of(run(iterations=0))
    assert found.status == "no-iterations" and "lines 1 to 999" in found.evidence


def test_processes_that_were_killed_without_a_word():
    made = run(("killed-subprocess", 50, "Killing subprocess 7"))
    made.event_counts["killed-subprocess"] = 64
    found = status_of(made)
    assert found.status == "oom-host" and "line 50" in found.evidence and "64 times" in found.evidence
    assert status_of(run(("cancelled", 49, "CANCELLED"), ("killed-subprocess", 50, "Killing"))).status == "cancelled"


@pytest.mark.parametrize("last", [{"nan": 1.0}, {"loss": math.nan}, {"loss": math.inf}, {"grad_norm": math.inf}])
def test_numbers_that_are_lost(last):
    found = status_of(run(("time-limit", 50, "DUE TO TIME LIMIT"), **last))
    assert found.status == "nan" and "line 30: iteration 3 of 1000" in found.evidence


def test_a_skipped_line_without_a_loss_is_not_lost():
    assert status_of(run(loss=math.nan, skipped=10.0)).status is None
    assert status_of(run(loss=math.nan, skipped=math.nan)).status is None
