import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.commands.common import strict
from megactl.costmodel.flops import seed_tflops
from megactl.errors import MegactlError
from megactl.report.logs.figures import EXPERIMENTS, write_curves, write_experiment
from megactl.report.logs.filename import experiment
from megactl.report.logs.find import find_logs
from megactl.report.logs.layout import NAMES
from megactl.report.logs.records import Run, read_runs
from megactl.report.logs.rows import KEYS, Given, row_of

ARGUMENTS = {
    "world_size": 64, "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 16, "micro_batch_size": 4,
    "global_batch_size": 1024, "seq_length": 1024, "num_layers": 64, "hidden_size": 8192, "num_attention_heads": 32,
    "vocab_size": 50257, "checkpoint_activations": "True", "max_position_embeddings": 1024, "fp16": "True",
}  # fmt: skip


def run(times=(150.0, 130.0, 128.0), file="x.out", system="megatron-lm", **changed):
    arguments = {name: str(value) for name, value in {**ARGUMENTS, **changed}.items() if value is not None}
    made = Run(file, 0, system=system, arguments=arguments)
    for index, seconds in enumerate(times, start=1):
        made.iterations.append(index, total=1000, line=index, seconds=seconds, losses={"lm loss": 10.0 - index}, skipped=0.0, nan=0.0)
    return made


def values(made=None, **given):
    return row_of(made or run(), Given(**given)).values


def test_a_row_has_every_key_in_its_order():
    assert tuple(values()) == KEYS
    assert tuple(values(Run("x.out", 0))) == KEYS


def test_tflops_are_those_of_the_formula_over_the_mean_of_every_line():
    row = values()
    assert row["mean_s"] == 136.0 and row["steady_mean_s"] == 129.0
    expected = seed_tflops(billions=row["model_b"], seconds=136.0, gpus=64, global_batch=1024, seq_length=1024, factor=4)
    assert row["tflops_per_gpu"] == expected
    assert "x 4 x 2 x" in row["derived"]["tflops_per_gpu"]
    assert row["model_b"] == pytest.approx(51.97, abs=0.01) and "architecture" in row["derived"]["model_b"]
    assert row["tokens_per_s"] == 1024 * 1024 / 136.0


def test_exact_figures_stand_beside_them_and_mfu_needs_a_gpu():
    row = values()
    exact = row["exact"]
    assert exact["mfu_tflops"] < exact["hfu_tflops"] and exact["mfu"] is None and row["mfu"] is None
    assert values(gpu="v100")["mfu"] == pytest.approx(exact["mfu_tflops"] / 125)
    assert values(gpu="abacus")["mfu"] is None
    assert values(run(num_layers=None), ms=52)["exact"] is None


def test_recomputation_decides_the_factor_and_an_unknown_one_is_said_to_be_assumed():
    none, unknown = values(run(checkpoint_activations="False")), values(run(checkpoint_activations=None))
    assert none["tflops_per_gpu"] == pytest.approx(values()["tflops_per_gpu"] * 3 / 4)
    assert unknown["tflops_per_gpu"] == values()["tflops_per_gpu"]
    assert "assumed" in unknown["derived"]["tflops_per_gpu"] and "assumed" not in values()["derived"]["tflops_per_gpu"]
    # What is recomputed decides the hardware's work alone.
    assert unknown["exact"]["hfu_tflops"] is None and unknown["exact"]["mfu_tflops"] == values()["exact"]["mfu_tflops"]


def test_what_is_given_goes_before_what_is_said_and_is_marked():
    row = values(ng=32, ms=50, seq=2048)
    assert (row["gpus"], row["model_b"], row["seq"]) == (32, 50, 2048)
    assert row["derived"]["gpus"] == "given with --ng; the log says 64"
    assert row["derived"]["model_b"] == "given with --ms"


def test_nothing_is_guessed():
    bare = Run("61B-mbs-2-pp16-dp-1-gas-512.out", 0)
    bare.iterations.append(1, seconds=2.0)
    row = row_of(bare, Given())
    assert row.values["tflops_per_gpu"] is None and row.values["gpus"] is None and row.values["model_b"] is None
    assert row.missing == ["model size (--ms)", "GPUs (--ng)", "global batch", "sequence length (--seq)"]
    named = row_of(bare, Given(from_filename=True, ng=64, seq=1024)).values
    assert named["tflops_per_gpu"] == pytest.approx(61 * 8 * 1024 * 1024 / (2 * 64e3))


def test_more_than_the_peak_is_a_mistake_somewhere():
    assert values(gpu="v100")["warnings"] == []
    assert "above the peak of 125" in values(gpu="v100", ng=8)["warnings"][0]


def test_logged_tflops_stay_apart():
    made = run()
    made.iterations.tflops_logged[0], made.iterations.tflops_logged[2] = 40.0, 42.0
    assert values(made)["tflops_logged"] == 41.0 != values(made)["tflops_per_gpu"]


def test_a_trainers_speed_is_a_whole_batch_over_its_samples_a_second():
    made = run(times=(), system="hf-trainer", global_batch_size=64)
    made.summary["train_samples_per_second"] = "1.088"
    assert values(made)["mean_s"] == pytest.approx(64 / 1.088)


def test_counts_and_timers():
    made = run()
    made.iterations.nan[1], made.iterations.skipped[0] = 2.0, 10.0
    made.timers["save-checkpoint"] = [19298.14]
    made.memory.reserved = 31.5
    row = values(made)
    assert (row["nan_iterations"], row["skipped_iterations"], row["save_s"], row["load_s"], row["reserved_gib"]) == (
        2,
        10,
        19.29814,
        None,
        31.5,
    )
    assert row["final_loss"] == 7.0


def test_a_loss_that_was_lost_is_not_the_last_one_there_was():
    made = run()
    made.iterations.losses["lm loss"][-1] = math.nan
    assert values(made)["final_loss"] is None and values(made)["status"] == "nan"


def test_files_folders_and_patterns(tmp_path):
    for name in ("a.out", "b.log.gz", "notes.md", "deep/c.txt", "[x].out"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    base = str(tmp_path)
    assert [path[len(base) + 1 :] for path in find_logs([base]).files] == ["[x].out", "a.out", "b.log.gz", "deep/c.txt"]
    assert find_logs([f"{base}/**/*.txt"]).files == [f"{base}/deep/c.txt"]
    assert find_logs([f"{base}/[x].out"]).files == [f"{base}/[x].out"]
    twice = find_logs([f"{base}/a.out", f"{base}/*.out", f"{base}/notes.md"])
    assert [path[len(base) + 1 :] for path in twice.files] == ["a.out", "[x].out", "notes.md"] and not twice.walked
    nothing = find_logs([f"{base}/*.err", f"{base}/gone.out"])
    assert [why for _, why in nothing.missing] == ["no file matches this pattern", "no such file or folder"]
    (tmp_path / "empty").mkdir()
    assert "ends in" in find_logs([f"{base}/empty"]).missing[0][1]


@pytest.fixture
def run_folder(tmp_path):
    """What megactl train leaves, by hand."""
    folder = tmp_path / "figure_16-mbs2-gbs16"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "rank-0.log").write_text("rank 0\n")
    (folder / "config.toml").write_text(
        'schema_version = 1\npreset = "gpt-345m"\n[training]\nmicro_batch_size = 2\nprecision = "bf16"\n[derived]\n'
        '"model.num_layers" = 24\n"model.hidden_size" = 1024\n"model.num_heads" = 16\n"model.vocab_size" = 50257\n'
        '"training.seq_length" = 1024\n"training.global_batch_size" = 16\n"parallel.data_parallel" = 8\n'
    )
    shared = {"loss": 9.0, "global_batch_size": 16, "seconds": 0.5}
    lines = [{"iteration": number, "consumed_samples": 16 * number, **shared} for number in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps({"gpus": ["NVIDIA H100 80GB HBM3"]}))
    return folder


def own_row(folder, **summary):
    (folder / "summary.json").write_text(json.dumps({"world_size": 8, "peak_memory_gb": 34.36, **summary}))
    (made,) = read_runs(str(folder / "metrics.jsonl"))
    return values(made)


def test_a_run_folder_of_megactl_is_one_run_with_its_settings(run_folder):
    assert find_logs([str(run_folder.parent)]).files == [str(run_folder / "metrics.jsonl")]
    row = own_row(run_folder, status="completed")
    expected = {
        "system": "megactl",
        "status": "completed",
        "gpus": 8,
        "tp": 1,
        "pp": 1,
        "dp": 8,
        "mbs": 2,
        "gas": 1,
        "gbs": 16,
        "seq": 1024,
    }
    assert {key: row[key] for key in expected} == expected
    assert row["allocated_gib"] == pytest.approx(32.0, abs=0.01) and row["model_b"] == pytest.approx(0.355, abs=0.001)
    assert 0 < row["mfu"] < 1 and row["exact"]["peak_tflops"] == 989
    assert experiment(row["file"]) == "figure_16"


@pytest.mark.parametrize(
    ("summary", "status", "evidence"),
    [
        ({"status": "saved"}, "cancelled", "summary.json: saved"),
        ({"status": "failed", "error": "rank 3: OutOfMemoryError: CUDA out of memory."}, "oom-gpu", "CUDA out of memory"),
        ({"status": "failed", "error": "rank 3: hung"}, "crashed", "rank 3: hung"),
        ({"status": "of another version"}, None, "does not say why"),
    ],
)
def test_a_run_folder_says_how_its_run_ended(run_folder, summary, status, evidence):
    row = own_row(run_folder, **summary)
    assert row["status"] == status and evidence in row["evidence"]


NAMED = [*ARGUMENTS, *(name for names in NAMES.values() for name in names), "swiglu", "kv_channels", "ffn_hidden_size"]
NUMBERS = st.one_of(st.integers(-2, 10**20).map(str), st.floats().map(str))
WORDS = st.one_of(st.sampled_from(["True", "False", "None", "", "auto", "16"]), st.text(max_size=5))


@settings(max_examples=150, deadline=None)
@given(
    arguments=st.dictionaries(st.sampled_from(NAMED), st.one_of(NUMBERS, WORDS)),
    times=st.lists(st.floats(), max_size=5),
    name=st.text(max_size=40),
    system=st.sampled_from(["megatron-lm", "hf-trainer", "unknown"]),
    extra=st.floats(),
)
def test_whatever_a_log_holds_there_is_a_row(arguments, times, name, system, extra):
    made = Run(name, 0, system=system, arguments=arguments)
    for index, seconds in enumerate(times):
        made.iterations.append(
            index, seconds=seconds, global_batch=extra, nan=extra, skipped=seconds, losses={"x": extra}, tflops_logged=extra
        )
    made.summary["train_samples_per_second"] = extra
    made.timers["save-checkpoint"] = [extra]
    for stated in (Given(), Given(from_filename=True, gpu="a100", ng=8, ms=1.5, seq=128)):
        found = row_of(made, stated).values
        assert tuple(found) == KEYS
        json.dumps(strict(found), allow_nan=False)


PNG = b"\x89PNG"


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_curves_of_several_runs(tmp_path, ending):
    rows = [row_of(run(), Given()), row_of(run(times=()), Given())]
    path = tmp_path / f"curves{ending}"
    write_curves(rows, ["a", "b"], path)
    assert path.read_bytes().startswith({".png": PNG, ".svg": b"<?xml", ".pdf": b"%PDF"}[ending])
    with pytest.raises(MegactlError, match="nothing to draw"):
        write_curves(rows[1:], ["b"], path)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_figure_of_each_experiment(tmp_path, name, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    real = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *rest, **more: drawn.append((list(x), list(y))) or real(axes, x, y, *rest, **more))
    rows = []
    for degree in (2, 4, 8):
        for batch in (32, 128):
            shape = {"pipeline_model_parallel_size": degree, "tensor_model_parallel_size": 64 // degree, "num_layers": 16 * degree,
                     "micro_batch_size": degree // 2, "scatter_gather_tensors_in_pipeline": "True"}  # fmt: skip
            rows.append(row_of(run(times=(1.0, 0.1 * batch / degree), global_batch_size=batch, **shape), Given()))
    write_experiment(rows, name, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    expected = [row.values["gbs"] / row.speed.mean if name == "figure_17" else row.values["exact"]["hfu_tflops"] for row in rows]
    points = [value for x, y in drawn for value in y]
    assert all(any(value == pytest.approx(point) for point in points) for value in expected)


@pytest.mark.parametrize(
    ("name", "file", "labels"),
    [
        ("figure_17", "figure_17-{}recompute-gbs8.out", {"recompute full", "recompute none"}),
        ("figure_18", "figure_18-{}scatter-gather-gbs12.out", {"scatter-gather", "without"}),
    ],
)
def test_a_series_that_no_argument_states_is_in_the_name(tmp_path, name, file, labels):
    rows = [row_of(run(file=file.format(part), checkpoint_activations=None), Given()) for part in ("", "no-")]
    write_experiment(rows, name, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert all(f"<!-- {label} -->" in text for label in labels)


def test_an_experiment_without_its_x_says_what_is_missing(tmp_path):
    with pytest.raises(MegactlError, match="micro-batch"):
        write_experiment([row_of(run(micro_batch_size=None), Given())], "figure_16", tmp_path / "x.png")
