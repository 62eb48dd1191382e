"""What users of other systems reported of whole runs: losses they could not read under a pipeline, checkpoints they could not go on from.

The counterpart of `tests/parity/test_upstream_issues.py`, where layouts are compared with plain PyTorch, for what only a run shows.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from train_harness import TINY, Runs, assert_same_tensors, checkpoint, evaluations, losses, merged, records, summary, tensors

# 6 sequences: what one, two and three replicas share. The embedding is tied, which is the default.
EVERY = (
    "--layers", "4", "--precision", "fp64", "--save-interval", "3", "--keep-checkpoints", "0", "--global-batch-size", "6",
    "--eval-interval", "2", "--eval-iterations", "2",
)  # fmt: skip
WHOLE = {
    "one": (),
    "pp2": ("--pp", "2"),
    "zb-v": ("--pp", "2", "--schedule", "zb-v"),
    "dp2 pp2 vpp2": ("--dp", "2", "--pp", "2", "--vpp", "2"),
    "tp2": ("--tp", "2"),
    "tp4": ("--tp", "4"),
    "dp2 zero1": ("--dp", "2", "--zero", "1"),
}


@pytest.fixture(scope="module")
def whole(zygote, tmp_path_factory):
    """The directory of a run of six iterations with a checkpoint in the middle, by layout; each is made where it is first asked for."""
    runs, made = Runs(zygote, tmp_path_factory.mktemp("whole")), {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = runs(name, *EVERY, *WHOLE[name]).must(0)
        return runs.folder / name

    of.out = lambda name: of(name) and made[name].out
    return of


def assert_goes_on(run_dir: Path, one: Path) -> None:
    """Losses of iterations 4 to 6 and every weight and moment after them are those of one rank that was never stopped."""
    found, expected = losses(run_dir)[-3:], losses(one)[3:]
    assert [iteration for iteration, _ in found] == [4, 5, 6]
    for (_, loss), (_, wanted) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-9)
    theirs = tensors(checkpoint(one, 6))
    ours = tensors(checkpoint(run_dir, 6))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor - theirs[key]).norm() <= 1e-9 * max(theirs[key].norm(), 1e-3), key


@pytest.mark.parametrize("name", ["pp2", "zb-v", "dp2 pp2 vpp2"])
def test_torchtitan_931_the_loss_on_the_console_is_the_loss(whole, name):
    """The console of a pipeline said "loss: -1.0000", for the rank that prints did not have it (#547, #550, #1232).

    In metrics.jsonl, on the console and in summary.json stands the loss of one rank, whichever stage the printing rank holds.
    """
    expected = losses(whole("one"))
    for (iteration, loss), (_, wanted) in zip(losses(whole(name)), expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-9), iteration
    printed = [float(text) for text in re.findall(r"\| lm loss: (\S+) \|", whole.out(name))]
    assert printed == pytest.approx([loss for _, loss in expected], rel=1e-6)
    assert summary(whole(name))["final_loss"] == pytest.approx(summary(whole("one"))["final_loss"], rel=1e-9)


def test_nanotron_405_a_pipeline_logs_each_iteration_and_evaluation(whole):
    """With pp > 1 the average of the losses for the log failed after the first line, for the earlier stages have none."""
    name = "dp2 pp2 vpp2"
    assert len(re.findall(r"\| lm loss: \d", whole.out(name))) == 6
    found, expected = evaluations(whole(name)), evaluations(whole("one"))
    assert [iteration for iteration, _ in found] == [2, 4, 6]
    for (_, loss), (_, wanted) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-9)


def test_torchtitan_771_micro_batches_follow_from_the_batch_not_from_the_pipeline(train):
    """The number of micro-batches was by default the pipeline's ranks, where its stages were meant.

    Here the batch alone says how many there are, and a dry run says what bubble that makes of the stages.
    """
    place = TINY.index("--global-batch-size")
    base = (*merged((*TINY[:place], *TINY[place + 2 :]), ("--layers", "4")), "--pp", "2", "--vpp", "2", "--dry-run")
    for flags, batch, bubble in ((), 1, "100.0"), (("--global-batch-size", "6"), 6, "8.3"):
        done = train("none", *flags, base=base).must(0)
        assert f"{batch} micro-batches of 1 on each replica" in done.out and f"bubble of {bubble} % of the computing time" in done.out


def test_nanotron_221_a_pipeline_resumes(train, whole, tmp_path):
    """The same command failed the second time with pp > 1. Here it goes on as if it had never stopped, bit for bit."""
    train.copy(whole("pp2"), "run", only_step=3)
    train("run", *EVERY, *WHOLE["pp2"]).must(0, "resuming from", "at iteration 3")
    assert losses(tmp_path / "run") == losses(whole("pp2"))
    assert_same_tensors(checkpoint(tmp_path / "run", 6), checkpoint(whole("pp2"), 6))


MOVES = {
    "tp2 to tp1 (nanotron 106)": ("tp2", ()),
    "pp2 to tp2 dp2 zero1, tied (nanotron PR 68)": ("pp2", ("--tp", "2", "--dp", "2", "--zero", "1")),
    "tp4 to tp2 dp2 zero0 (nanotron PR 37)": ("tp4", ("--tp", "2", "--dp", "2", "--zero", "0")),
    "dp2 to dp3, zero1 (Megatron-LM 659, nanotron PR 263)": ("dp2 zero1", ("--dp", "3", "--zero", "1")),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.nightly if "PR 37" in name else ()) for name in MOVES])
def test_nanotron_106_a_run_resumes_at_another_layout(train, whole, tmp_path, name):
    """Optimizer states were looked for by the new ranks' file names (106), a tied weight's under the name that has none (PR 68), merged in
    an order that differed between ranks (PR 37), or could not be shared by another number of replicas (659).

    A checkpoint says which part of which tensor it holds. The next steps, weights and moments are those of a run that was never stopped.
    """
    saved, flags = MOVES[name]
    train.copy(whole(saved), "run", only_step=3)
    train("run", *EVERY, *flags).must(0, "resuming from", "at iteration 3")
    assert_goes_on(tmp_path / "run", whole("one"))


def test_megatron_lm_7207_an_evaluation_weighs_every_token_alike(train, tmp_path):
    """The losses of an evaluation's batches were averaged, however many tokens counted in each.

    With weights that hardly move, the same eight pairs give the same loss of masked tokens in one batch and in four.
    """
    still = ("--model", "bert", "--eval-interval", "2", "--iterations", "2", "--lr", "1e-12", "--precision", "fp64", "--seq-length", "32")
    found = []
    for count, size in (1, 8), (4, 2):
        train(f"of {size}", *still, "--eval-iterations", count, "--global-batch-size", size).must(0)
        found += [line["lm_loss"] for line in records(tmp_path / f"of {size}") if line.get("kind") == "eval"]
    assert len(found) == 2 and found[0] == pytest.approx(found[1], rel=1e-9)
