"""The SC21 experiments: the parameters against the table they were read from, and what `render --experiment` writes."""

from __future__ import annotations

import csv
import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest

from megactl.cluster.experiments import COMMON, experiments

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TABLE = SHARED / "sc21_experiments.md"
needs_table = pytest.mark.skipif(not TABLE.exists(), reason="the table of the experiments is not beside the repository")


def table_rows():
    """The table of the shared file as dicts, header -> cell."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def numbers(text):
    """ "1, 2, 4, 8" or "12, 24, ... 60" or "1, 2, 4, ... 256" as a list: the dots go on as the numbers before them."""
    parts = [part.strip() for part in text.replace("...", ",...,").split(",") if part.strip()]
    if "..." not in parts:
        return [int(part) for part in parts]
    first = [int(part) for part in parts[: parts.index("...")]]
    last, doubles = int(parts[-1]), first[-1] == 2 * first[-2] == 4 * first[-3] if len(first) > 2 else False
    while first[-1] < last:
        first.append(first[-1] * 2 if doubles else first[-1] + first[1] - first[0])
    return first


def points(name):
    return [row.as_dict() for row in experiments()[name].rows]


def values(name, *fields):
    return [tuple(row[field] for field in fields) for row in points(name)]


@needs_table
def test_the_points_of_table_1():
    rows = [row for row in table_rows() if row["experiment"].startswith("table_1")]
    columns = ("layers", "hidden", "heads", "TP", "PP", "micro-batch", "global batch", "nodes")
    wanted = [
        (
            row["experiment"].split()[1], *(int(row[key]) for key in columns),
            None if row["layers per virtual stage"] == "-" else int(row["layers per virtual stage"]),
        )
        for row in rows
    ]  # fmt: skip
    fields = (
        "point",
        "layers",
        "hidden",
        "heads",
        "tp",
        "pp",
        "micro_batch_size",
        "global_batch_size",
        "nodes",
        "layers_per_virtual_stage",
    )
    assert len(wanted) == 10 and values("table_1", *fields) == wanted


@needs_table
def test_table_1_has_the_replicas_and_gpus_that_the_paper_prints():
    with (SHARED / "seed-tables" / "001_sc21_table1_weak_scaling.csv").open() as file:
        wanted = [(row["model_size"], int(row["dp"]), int(row["gpus"])) for row in csv.DictReader(file)]
    assert values("table_1", "point", "dp", "gpus") == wanted


@needs_table
@pytest.mark.parametrize("name", [f"figure_{number}" for number in range(11, 19)])
def test_the_points_of_a_figure(name):
    (row,) = [row for row in table_rows() if row["experiment"] == name]
    varied, batches = row["varied"], numbers(re.search(r"global batch ([\d, .]+)", row["varied"])[1].strip(" ,."))
    found = set(
        values(name, "pp", "tp", "dp", "layers", "micro_batch_size", "global_batch_size", "nodes", "vpp", "recompute", "scatter_gather")
    )
    expected = set()
    first = (
        numbers(re.search(r"(?:PP|TP|micro-batch) ([\d, ]+)", varied)[1].strip(" ,")) if re.match(r"PP|TP|micro-batch", varied) else [None]
    )
    switches = [True, False] if re.search(r"yes, no|on, off", varied) else [True]
    for value in first:
        for batch in batches:
            for on in switches:
                pp = value if row["PP"] == "PP" else int(row["PP"])
                tp = value if row["TP"] == "TP" else 64 // pp if row["TP"] == "64/PP" else int(row["TP"])
                nodes = value if row["nodes"] == "PP" else int(row["nodes"])
                layers = 3 * value if row["layers"] == "3 x PP" else int(row["layers"])
                micro = value if row["micro-batch"] == "1...8" else int(row["micro-batch"])
                interleaved = row["layers per virtual stage"] == "2" or (row["layers per virtual stage"].startswith("2 if") and on)
                recompute = on if name == "figure_17" else True
                scatter = on if name == "figure_18" else None
                expected.add(
                    (
                        pp,
                        tp,
                        nodes * 8 // (tp * pp),
                        layers,
                        micro,
                        batch,
                        nodes,
                        layers // (2 * pp) if interleaved else 1,
                        recompute,
                        scatter,
                    )
                )
    assert found == expected and len(points(name)) == len(expected)
    assert {(row["hidden"], row["heads"]) for row in points(name)} == {(int(row["hidden"]), int(row["heads"]))}


@needs_table
def test_what_all_points_have_in_common():
    text = TABLE.read_text(encoding="utf-8")
    stated = (
        "sequence 2048", "static loss scale 8192", "lr 1e-4 to 1e-5 cosine over 320", "1 % warm-up", "500 iterations", "log every 5",
        "clip 1.0", "split 969,30,1", "evaluation 100 iterations every 1000", "51,200",
    )  # fmt: skip
    for part in stated:
        assert part in text
    assert COMMON == {
        "model.vocab_size": 51200, "model.max_positions": 2048, "training.seq_length": 2048, "training.iterations": 500,
        "training.precision": "fp16", "training.loss_scale": 8192.0, "training.eval_interval": 1000, "training.eval_iterations": 100,
        "optimizer.lr": 1e-4, "optimizer.min_lr": 1e-5, "optimizer.lr_schedule": "cosine", "optimizer.lr_decay_iterations": 320,
        "optimizer.warmup": "1%", "optimizer.clip_grad": 1.0, "data.split": "969,30,1", "logging.log_interval": 5,
    }  # fmt: skip


def test_the_virtual_stages_are_those_of_the_paper():
    assert dict(values("table_1", "point", "vpp")) == {
        "1.7B": 1, "3.6B": 1, "7.5B": 1, "18B": 1, "39B": 1, "76B": 3, "145B": 2, "310B": 2, "530B": 3, "1T": 1
    }  # fmt: skip


def test_the_list_as_json(slurm):
    code, out, _ = slurm("experiments", "--json")
    document = json.loads(out)
    assert code == 0 and [item["experiment"] for item in document] == ["table_1", *(f"figure_{n}" for n in range(11, 19))]
    assert [len(item["rows"]) for item in document] == [10, 8, 10, 10, 10, 15, 8, 18, 10]
    assert document[3]["rows"][0]["point"] == "pp2-tp32-gbs32"
    code, out, _ = slurm("experiments", "figure_13")
    assert code == 0 and "pp32-tp2-gbs128" in out and "figure_14" not in out
    assert "did you mean figure_13?" in slurm("experiments", "figur_13")[2]


def test_techniques_are_given_up_by_name_only(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert slurm("render", "--experiment", "figure_13", "--mock-data", "--without", "recompute")[0] == 0
    texts = [path.read_text() for path in (tmp_path / "figure_13").glob("figure_13-*.sh")]
    assert len(texts) == 10 and all("goes without" in text and "--recompute" not in text for text in texts)
    code, _, err = slurm("render", "--experiment", "figure_17", "--mock-data", "--without", "recompute")
    assert code == 2 and "is what figure_17 compares" in err
    code, _, err = slurm("render", "--experiment", "figure_14", "--mock-data", "--recompute", "selective")
    assert code == 2 and "--recompute (flag --recompute): is what figure_14 sets" in err


@pytest.mark.parametrize("name", experiments())
def test_a_point_has_the_techniques_of_the_paper(slurm, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, _, err = slurm("render", "--experiment", name, "--mock-data")
    assert code == 0, err
    for row in experiments()[name].rows:
        text = (tmp_path / name / f"{name}-{row.point}.sh").read_text()
        assert ("--recompute full" in text, f"--vpp {row.vpp}" in text) == (row.recompute, row.vpp > 1)
        assert ("--no-scatter-gather" in text) == (row.scatter_gather is False)


FIELDS = {
    "--layers": "layers", "--hidden": "hidden", "--heads": "heads", "--tp": "tp", "--pp": "pp", "--dp": "dp",
    "--micro-batch-size": "micro_batch_size", "--global-batch-size": "global_batch_size",
}  # fmt: skip


def test_a_script_a_point_with_the_exact_parameters(slurm, tmp_path, monkeypatch, cluster):
    monkeypatch.chdir(tmp_path)
    words = ("--mock-data", "--without", "recompute,vpp", "--account", "a", "--output-dir", "out/t1")
    code, out, err = slurm("render", "--experiment", "table_1", *words)
    assert code == 0, err
    folder = tmp_path / "out" / "t1"
    index = json.loads((folder / "index.json").read_text())
    assert [point["point"] for point in index["points"]] == [row["point"] for row in points("table_1")]
    assert (folder / "logs").is_dir() and "10 scripts in out/t1" in out
    for point in index["points"]:
        text = (folder / point["script"]).read_text()
        assert f"#SBATCH --job-name=table_1-{point['point']}\n" in text and "#SBATCH --time=00:30:00\n" in text
        assert "#SBATCH --output=out/t1/logs/%x-%j.out\n" in text and "#SBATCH --no-requeue\n" in text and "--signal" not in text
        (call,) = cluster.run(text).of("srun")
        given = dict(itertools.pairwise(call))
        parameters = point["parameters"]
        for flag, field in FIELDS.items():
            assert int(given[flag]) == parameters[field]
        assert (given["--precision"], given["--loss-scale"], given["--lr"], given["--warmup"]) == ("fp16", "8192.0", "0.0001", "1%")
        assert f"--nodes={parameters['nodes']}" in call and f"--ntasks={parameters['gpus']}" in call
        assert "goes without" in text
    again = slurm("render", "--experiment", "table_1", *words)
    assert again[0] == 2 and "is not empty" in again[2]


def test_submit_all_submits_each_script(slurm, tmp_path, monkeypatch, cluster):
    monkeypatch.chdir(cluster.folder)
    assert slurm("render", "--experiment", "figure_14", "--mock-data", "--without", "recompute")[0] == 0
    text = (cluster.folder / "figure_14" / "submit-all.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    # dirname "$0" is where the stand-in writes the script, so the names alone are compared.
    calls = cluster.run(text, "--test-only").of("sbatch")
    assert [(call[0], Path(call[1]).name) for call in calls] == [
        ("--test-only", f"figure_14-{row['point']}.sh") for row in points("figure_14")
    ]
    (cluster.folder / "figure_14" / "logs").rmdir()
    ran = cluster.run(text)
    assert ran.code == 2 and "there is no folder figure_14/logs here" in ran.stderr and not ran.of("sbatch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pp", "2"), "is what figure_14 sets"),
        (("--preset", "gpt-tiny"), "is what figure_14 sets"),
        (("--nodes", "2"), "is what figure_14 sets"),
        (("--run-dir", "x"), "every point has its own"),
        (("--gpus-per-node", "7"), "must divide the ranks of every point"),
        (("--without", "recomputee"), "did you mean recompute?"),
        (("--sweep", "lr=1,2"), "an experiment is a folder of scripts"),
        (("--output", "x.sh"), "an experiment is a folder of scripts"),
        (("--output-dir", "a b"), "the jobs' logs go there"),
        (("--account", "<account>"), "error: --account <account>"),
    ],
)
def test_each_mistake_once(slurm, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = slurm("render", "--experiment", "figure_14", "--mock-data", "--without", "recompute", *words)
    assert code == 2 and message in err and err.count(message) == 1 and not list(tmp_path.iterdir())


def test_the_user_may_change_what_the_points_have_in_common(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--without", "recompute", "--iterations", "20", "--lr-decay-iterations", "20", "--precision", "bf16", "--loss-scale", "0")
    code, _, err = slurm("render", "--experiment", "figure_16", "--mock-data", *words, "--gpus-per-node", "4", "--time", "10")
    assert code == 0, err
    text = (tmp_path / "figure_16" / "figure_16-mbs1-gbs128.sh").read_text()
    assert "    --iterations 20\n" in text and "    --precision bf16\n" in text and "#SBATCH --time=00:10:00\n" in text
    assert "#SBATCH --nodes=16\n" in text and "#SBATCH --gpus-per-node=4\n" in text


SMALL = (
    "--tp", "1", "--hidden", "64", "--heads", "4", "--seq-length", "32", "--max-positions", "32", "--vocab", "64", "--precision", "fp32",
    "--loss-scale", "0", "--device", "cpu", "--gpus-per-node", "0", "--ntasks-per-node", "4", "--mock-data",
)  # fmt: skip


def test_an_experiment_of_another_size_says_so(slurm, tmp_path, monkeypatch, cluster):
    monkeypatch.chdir(tmp_path)
    code, _, err = slurm("render", "--experiment", "figure_11", *SMALL)
    assert code == 0, err
    index = json.loads((tmp_path / "figure_11" / "index.json").read_text())
    for point in index["points"]:
        text = (tmp_path / "figure_11" / point["script"]).read_text()
        for flag, paper, here in (("--tp", 8, 1), ("--hidden", 20480, 64)):
            assert f"# The paper's run had {flag} {paper}; this one has {here}.\n" in text
        assert point["changed"] == {"model.hidden_size": 64, "model.num_heads": 4, "parallel.tensor_parallel": 1}
        stages = point["parameters"]["pp"]
        (call,) = cluster.run(text).of("srun")
        assert f"--ntasks={stages}" in call and f"--nodes={-(-stages // 4)}" in call and f"--ntasks-per-node={min(4, stages)}" in call
    code, _, err = slurm("render", "--experiment", "figure_11", *SMALL, "--ntasks-per-node", "3", "--output-dir", "three")
    assert code == 2 and "--ntasks-per-node 3: must divide the ranks of every point" in err
