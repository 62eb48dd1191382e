"""Starting from a checkpoint at another layout, in another precision, with other weights, and what must be refused."""

from __future__ import annotations

import pytest
from train_harness import checkpoint, header, losses, steps, tensors

EVERY = ("--save-interval", "3", "--keep-checkpoints", "0", "--pp", "2", "--tp", "2", "--layers", "4")
LAYOUTS = {
    "one rank": ("--tp", "1", "--pp", "1"),
    "tp4": ("--tp", "4", "--pp", "1"),
    "pp4": ("--tp", "1", "--pp", "4"),
    "dp2 zero1": ("--tp", "1", "--pp", "1", "--dp", "2", "--zero", "1"),
    "dp2 zero1 tp2 small buckets": ("--tp", "2", "--pp", "1", "--dp", "2", "--zero", "1", "--bucket-size", "3000"),
}


@pytest.fixture(scope="module")
def saved(zygote, tmp_path_factory):
    """Runs of six iterations at tp 2, pp 2 with a checkpoint at iteration 3, by precision; made where first asked for."""
    from train_harness import Runs

    runs, made = Runs(zygote, tmp_path_factory.mktemp("saved")), set()

    def of(precision):
        if precision not in made:
            runs(precision, *EVERY, "--precision", precision).must(0)
            made.add(precision)
        return runs.folder / precision

    return of


TOLERANCES = {"fp64": 1e-9, "fp32": 1e-6}
DAILY = (("one rank", "fp64"), ("pp4", "fp64"), ("dp2 zero1 tp2 small buckets", "fp64"), ("dp2 zero1", "fp32"))
PAIRS = [
    pytest.param(name, precision, marks=() if (name, precision) in DAILY else pytest.mark.nightly)
    for name in LAYOUTS
    for precision in TOLERANCES
]


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_a_run_goes_on_at_another_layout(train, tmp_path, saved, name, precision):
    whole = saved(precision)
    flags = (*EVERY, *LAYOUTS[name], "--precision", precision, "--load", checkpoint(whole, 3))
    flags = tuple(word for index, word in enumerate(flags) if not shadowed(flags, index))
    train("other", *flags).must(0, "starting from", "at iteration 3")
    found, expected = losses(tmp_path / "other"), losses(whole)[3:]
    assert [iteration for iteration, _ in found] == [4, 5, 6]
    for (_, loss), (_, wanted) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=TOLERANCES[precision])
    if precision == "fp64":
        theirs = tensors(checkpoint(whole, 6))
        for key, tensor in tensors(checkpoint(tmp_path / "other", 6)).items():
            assert (tensor - theirs[key]).norm() <= 1e-9 * max(theirs[key].norm(), 1e-3), key


def shadowed(flags, index):
    """Whether the option at `index`, or the one whose value stands there, is given again later: the last one counts here."""
    name = index if str(flags[index]).startswith("--") else index - 1
    return flags[name] in flags[name + 1 :]


def test_a_run_directory_resumes_at_another_layout(train, tmp_path, saved):
    import shutil

    shutil.copytree(saved("fp64"), tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path / "run", 6))
    train("run", "--layers", "4", "--precision", "fp64", "--dp", "2", "--zero", "1").must(0, "resuming from", "at iteration 3")
    for (_, loss), (_, wanted) in zip(losses(tmp_path / "run"), losses(saved("fp64")), strict=True):
        assert loss == pytest.approx(wanted, rel=1e-9)
    assert header(tmp_path / "run", 6)["layout"] == {"tp": 1, "cp": 1, "dp": 2, "pp": 1, "zero": 1}


def test_load_takes_a_run_directory_and_prefers_the_own_checkpoint(train, tmp_path, saved):
    other = saved("fp32")
    train("run", "--layers", "4", "--load", other, "--iterations", "7").must(0, "at iteration 6")
    assert [iteration for iteration, _ in losses(tmp_path / "run")] == [7]
    train("run", "--layers", "4", "--load", other, "--iterations", "8").must(0, "resuming from", "at iteration 7")


def test_load_weights_starts_at_iteration_0_with_a_fresh_optimizer(train, tmp_path, saved):
    import torch

    flags = ("--layers", "4", "--load", saved("fp32"), "--load-weights", "--iterations", "1", "--warmup", "0", "--lr", "1e-9")
    train("run", *flags).must(0, "at iteration 0")
    assert header(tmp_path / "run", 1)["state"]["adam_step"] == 1.0
    assert header(tmp_path / "run", 1)["consumed_samples"] == 4
    loaded, began = tensors(checkpoint(saved("fp32"), 6)), tensors(checkpoint(tmp_path / "run", 1))
    assert loaded.keys() == began.keys()
    for name, kind in began:
        if kind == "weight":
            torch.testing.assert_close(began[name, kind], loaded[name, kind], rtol=0, atol=1e-7)
            # After one update from zero the moments are 0.1 g and 0.05 g^2; with the loaded run's in them they would not be.
            square = began[name, "exp_avg"].square() * 5
            torch.testing.assert_close(began[name, "exp_avg_sq"], square, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("stored", "wanted"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_fp32_and_bf16_read_each_others_checkpoints(train, tmp_path, saved, stored, wanted):
    """Both keep fp32 masters and moments, so nothing is lost in either direction."""
    flags = ("--layers", "4", "--precision", wanted, "--load", checkpoint(saved(stored), 3))
    train("run", *flags).must(0, "at iteration 3")
    for (_, loss), (_, expected) in zip(losses(tmp_path / "run"), losses(saved(stored))[3:], strict=True):
        assert loss == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("more", [(), ("--load-weights",)], ids=["all", "weights"])
def test_fp64_is_read_by_fp64_alone_unless_only_the_weights_are_wanted(train, tmp_path, saved, more):
    done = train("run", "--layers", "4", "--precision", "fp32", "--load", checkpoint(saved("fp64"), 3), *more)
    if more:
        done.must(0, "at iteration 0")
    else:
        done.must(2, "stored as float64, the run has float32")


MISFITS = {
    ("--layers", "2"): "--layers 2 (the checkpoint has 4)",
    ("--hidden", "64"): "--hidden 64 (the checkpoint has 32)",
    ("--heads", "2"): "--heads 2 (the checkpoint has 4)",
    ("--vocab", "100"): "--vocab 100 (the checkpoint has 64)",
    ("--seq-length", "32"): "--max-positions 32 (the checkpoint has 16)",
    ("--gelu", "erf"): "--gelu erf (the checkpoint has tanh)",
    ("--untie-embeddings",): "--untie-embeddings True (the checkpoint has False)",
}


NIGHTLY = ("--layers", "--hidden", "--gelu")


@pytest.mark.parametrize(
    "flags", [pytest.param(flags, marks=pytest.mark.nightly if flags[0] in NIGHTLY else (), id=" ".join(flags)) for flags in MISFITS]
)
def test_another_model_is_refused_by_the_names_of_its_settings(train, tmp_path, saved, flags):
    base = () if flags[0] == "--layers" else ("--layers", "4")
    done = train("run", *base, *flags, "--dp", "2", "--load", saved("fp32")).must(2, "is of another model", MISFITS[flags])
    assert done.err.count("error:") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_all_differing_settings_are_named(train, saved):
    flags = ("--layers", "2", "--hidden", "64", "--heads", "8", "--load", saved("fp32"))
    train("run", *flags).must(2, "--layers 2 (the", "--hidden 64 (the", "--heads 8 (the", "--ffn 256 (the checkpoint has 128)")


def test_a_resume_with_another_model_is_refused_and_keeps_what_is_there(train, tmp_path):
    train("run").must(0)
    before = tensors(checkpoint(tmp_path / "run", 6))
    train("run", "--hidden", "64", "--iterations", "8").must(2, "--hidden 64 (the checkpoint has 32)")
    assert steps(tmp_path / "run") == [6] and len(losses(tmp_path / "run")) == 6
    after = tensors(checkpoint(tmp_path / "run", 6))
    assert all(bool((after[key] == tensor).all()) for key, tensor in before.items())


def test_dropout_may_change_on_the_way(train, tmp_path):
    train("run").must(0)
    train("run", "--hidden-dropout", "0.1", "--iterations", "7").must(0, "at iteration 6")


def test_another_seed_is_said(train, tmp_path):
    train("run").must(0)
    train("run", "--seed", "1", "--iterations", "7").must(0, "was saved with --seed 1234")


def test_load_without_a_checkpoint(train, tmp_path):
    (tmp_path / "empty").mkdir()
    train("run", "--load", tmp_path / "empty").must(2, "holds no complete checkpoint")
    train("run", "--load", tmp_path / "nowhere").must(2, "nowhere")


def test_a_refused_continuation_leaves_the_runs_settings_alone(train, tmp_path):
    """config.toml is written before the ranks start; a resume that they refuse must not leave another model's settings behind."""
    train("one", "--iterations", "2").must(0)
    config = next(tmp_path.rglob("config.toml"))
    before = config.read_bytes()
    train("one", "--iterations", "4", "--hidden", "64").must(2, "hidden")
    assert config.read_bytes() == before
