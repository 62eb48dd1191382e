"""`megactl tflops` as it is typed: figures of the seeds and of publications, contradictions, tables in files."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megactl.cli import main
from megactl.config.schema import Model
from megactl.costmodel.flops import sc21_flops

SHARED = Path(__file__).resolve().parents[3] / "shared"
SEED = "--ms 52 --gbs 1024 --sec 127"
needs_seeds = pytest.mark.skipif(not SHARED.exists(), reason="the seeds are not beside the repository")


@pytest.fixture
def command(capsys):
    """Run `megactl tflops LINE`: (exit code, stdout, stderr)."""

    def run(line: str) -> tuple[int, str, str]:
        code = main(["tflops", *line.split()])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def document(command):
    """The JSON document of a command that must succeed with `code`."""

    def run(line: str, code: int = 0) -> dict[str, Any]:
        found, out, err = command(f"{line} --json")
        assert found == code, err
        return json.loads(out)

    return run


@pytest.fixture
def mistakes(command):
    """The lines of the one message of a command that must exit 2."""

    def run(line: str) -> list[str]:
        code, out, err = command(line)
        assert code == 2 and out == "" and "Traceback" not in err and err.startswith("error: ")
        lines = err.removeprefix("error: ").splitlines()
        return [line.removeprefix("  - ") for line in lines if not line.endswith("problems:")]

    return run


def test_the_seeds_example(command, document) -> None:
    code, out, err = command(SEED)
    assert code == 0 and err == "" and out.splitlines()[0] == "53.7 TFLOP/s per GPU"
    assert "assumed:   --ng 64, --seq 1024, --factor 4" in out and "n/a" in out
    found = document(SEED)
    assert found["tflops_per_gpu"] == pytest.approx(53.66727559, abs=1e-8)
    assert found["assumed"] == {"ng": 64, "seq": 1024, "factor": 4} and found["exact"] is None


@pytest.mark.parametrize(
    "line",
    [
        "--ms 52B --mbs 4 --dp 1 --pp-chunks 256 --nodes 16 --gpus-per-node 4 --time-ms 122000",
        "--model-size 52 --micro-batch-size 4 --data-parallel 1 --gas 256 --ng 64 --seconds 122s",
        "--ms 52 --mbs 4 --tp 4 --pp 16 --gas 256 --ng 64 --sec 122",
        "--ms 52 --mbs 4 --gas 256 --sec 122 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 16 --dp 1",
        "--ms 52 --global-batch-size 1024 --sec 122 --seq-length 1024 --recompute full --world-size 64",
        "--ms 0.052T --gbs 1024 --sec 122 --factor 4",
    ],
)
def test_every_way_of_saying_the_worked_example(line: str, document) -> None:
    assert document(line)["tflops_per_gpu"] == pytest.approx(55.86675409836066, rel=1e-12)


@needs_seeds
def test_the_listings_of_seed_003(document) -> None:
    rows = [row for row in csv.DictReader((SHARED / "data/seed-tables/003_tflops_check.csv").open())]
    for row in rows[::6]:
        line = f"--ms {row['model_size_b']} --gbs {row['global_batch_size']} --sec {row['speed_s']} --ng {row['gpus']}"
        assert f"{document(line)['tflops_per_gpu']:.2f}" == row["tflops_formula"]


@pytest.mark.parametrize(
    ("seconds", "gpus", "published"),
    [
        ("105.22", 384, 149.02), ("215.82", 192, 145.31), ("261.08", 192, 120.12), ("199.82", 192, 156.95), ("155.71", 288, 134.26),
        ("141.22", 288, 148.04),
    ],
)  # fmt: skip
def test_the_published_lines_of_bloom(seconds: str, gpus: int, published: float, document) -> None:
    shape = "--layers 70 --hidden 14336 --heads 112 --vocab 250880 --seq 2048"
    found = document(f"{shape} --gbs 2048 --ng {gpus} --sec {seconds}")
    assert found["exact"]["hfu_tflops"] == pytest.approx(published, abs=0.0101)
    assert found["exact"]["recompute"] == "full" and found["assumed"] == {"factor": 4}
    # By the rule of thumb, with the size people name.
    by_label = document(f"--ms 176 --seq 2048 --gbs 2048 --ng {gpus} --sec {seconds}")["tflops_per_gpu"]
    assert by_label / found["exact"]["hfu_tflops"] == pytest.approx(0.981, abs=0.001)


@needs_seeds
@pytest.mark.parametrize("row", range(10))
def test_sc21_table_1_from_the_architecture(row: int, document) -> None:
    """The paper prints speeds, not times: the time is what its own closed form needs at the aggregate speed it prints."""
    seed = list(csv.DictReader((SHARED / "data/seed-tables/001_sc21_table1_weak_scaling.csv").open()))[row]
    text = (SHARED / "data/planner/sc21_table1.csv").read_text().splitlines()
    paper = list(csv.DictReader(line for line in text if not line.startswith("#")))[row]
    shape = {"num_layers": int(paper["layers"]), "hidden_size": int(paper["hidden"]), "num_heads": int(paper["heads"])}
    batch, gpus, aggregate = int(paper["global_batch"]), int(paper["gpus"]), float(paper["aggregate_pflops"])
    seconds = sc21_flops(Model(**shape, vocab_size=51200), 2048, batch, recompute=True) / (aggregate * 1e15)
    name = seed["model_size"].lower()
    line = f"--preset gpt-{name} --tp {seed['tp']} --pp {seed['pp']} --dp {seed['dp']} --gbs {batch} --sec {seconds:.9f} --gpu a100-80"
    found = document(line)
    exact = found["exact"]
    assert found["inputs"]["ng"] == gpus == int(seed["gpus"])
    assert abs(exact["parameters"] / 1e9 - float(paper["params_B"])) <= 0.05 * (1 if gpus < 3072 else 10)
    assert abs(exact["hfu_tflops"] - int(seed["tflops_per_gpu"])) <= 0.51 and seed["tflops_per_gpu"] == paper["tflops_per_gpu"]
    assert exact["hfu_tflops"] * gpus / 1e3 == pytest.approx(aggregate, rel=1e-6)
    assert abs(100 * exact["hfu"] - int(seed["pct_of_peak_312"])) <= 0.51 and exact["peak_tflops"] == 312
    assert exact["causal_mfu"] < exact["mfu"] < exact["hfu"] and exact["mfu"] > 0.32


def test_training_time_as_sc21_estimates_it(document) -> None:
    """8 T P / (n X): 300e9 tokens of a 175B model at 140 TFLOP/s on 1024 GPUs take 34 days, 450e9 of a 1T model on 3072 take 84."""
    for billions, tokens, speed, gpus, days in ((175, 300e9, 140, 1024, 34), (1008, 450e9, 163, 3072, 84)):
        found = document(f"--ms {billions} --seq 2048 --gbs 2048 --ng {gpus} --sec 1")["tflops_per_gpu"]
        assert tokens / (2048 * 2048) * found / speed / 86400 == pytest.approx(days, abs=0.5)


def test_recomputation_and_the_exact_figures(command, document) -> None:
    found = {kind: document(f"--preset gpt-52b --gbs 1024 --sec 127 --recompute {kind}") for kind in ("none", "selective", "full")}
    mfu = [item["exact"]["mfu_tflops"] for item in found.values()]
    assert mfu == [mfu[0]] * 3 and found["none"]["exact"]["hfu_tflops"] == mfu[0]
    assert [item["inputs"]["factor"] for item in found.values()] == [3, 3, 4]
    selective = found["selective"]["exact"]
    assert mfu[0] < selective["hfu_tflops"] < selective["published_selective_hfu_tflops"] < found["full"]["exact"]["hfu_tflops"]
    assert found["full"]["tflops_per_gpu"] == pytest.approx(53.63, abs=0.01)
    text = command("--preset gpt-52b --gbs 1024 --sec 127 --recompute selective --gpu v100-32")[1]
    assert all(word in text for word in ("HFU", "MFU", "causal MFU", "forward:", "125 TFLOP/s (V100 SXM, dense fp16)", "Korthikanti"))


def test_the_formula_of_a_llama(document) -> None:
    found = document("--preset llama-8b --gbs 128 --sec 20")
    forward = found["exact"]["formula"]["forward"]
    assert forward == "F = 2 T (l (2 h^2 + 2 h k + 3 h f) + h v) + 4 T s h l, with k 1024"
    tokens, layers, h, k, f, v, s = 128 * 8192, 32, 4096, 1024, 14336, 128256, 8192
    by_hand = 2 * tokens * (layers * (2 * h * h + 2 * h * k + 3 * h * f) + h * v) + 4 * tokens * s * h * layers
    assert found["exact"]["model_flops"] == 3 * by_hand


def test_bert_looks_both_ways(document) -> None:
    exact = document("--preset bert-large --gbs 256 --ng 8 --sec 0.5 --recompute none --gpu H100")["exact"]
    assert exact["mfu"] == exact["causal_mfu"] == exact["hfu"] and exact["peak_tflops"] == 989


def test_a_figure_above_the_peak_exits_1_and_names_what_was_assumed(command, document) -> None:
    code, out, err = command("--ms 52 --gbs 1024 --sec 12 --gpu v100")
    assert code == 1 and out.startswith("568.0") and "above the peak of 125" in err and "--ng 64 (assumed)" in err
    found = document("--ms 52 --gbs 1024 --sec 12 --peak 125", code=1)
    assert found["above_peak"] and "something in the input is wrong" in found["warnings"][0]
    # A causal kernel skips half of the square: HFU by convention may pass the peak where the GPU did not.
    long = "--layers 4 --hidden 256 --vocab 1000 --seq 65536 --gbs 8 --ng 1 --recompute none"
    exact = document(f"{long} --sec 1")["exact"]
    seconds = exact["hfu_tflops"] / 130
    found = document(f"{long} --sec {seconds} --peak 125")
    assert found["exact"]["hfu"] > 1 > found["exact"]["causal_hfu"] and not found["above_peak"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [("mi300x", "mi300x is not in the list"), ("a100", "A100, dense bf16"), ("TESLA V100-SXM2-32GB", "V100 SXM, dense fp16")],
)
def test_gpus_by_the_names_people_type(name: str, shown: str, capsys) -> None:
    assert main(["tflops", *SEED.split(), "--gpu", name]) == 0
    out = capsys.readouterr().out
    assert shown in out and ("n/a" in out) == ("not in" in shown)


def test_a_rate_the_gpu_does_not_have_is_no_number(document) -> None:
    found = document(f"{SEED} --gpu v100 --precision bf16")
    assert found["gpu"]["peak_tflops"] is None and found["share_of_peak"] is None and "no bf16 rate" in found["warnings"][0]
    assert document(f"{SEED} --gpu v100 --precision fp32", code=1)["gpu"]["peak_tflops"] == 15.7


def test_a_size_by_the_old_scripts_is_recognised(document, mistakes) -> None:
    found = document("--preset gpt-52b --ms 48 --gbs 1024 --sec 127")
    assert "divided by 2^30" in found["warnings"][0] and found["tflops_per_gpu"] == pytest.approx(49.54, abs=0.01)
    assert document("--preset gpt-52b --ms 52 --gbs 1024 --sec 127")["warnings"] == []
    assert "-4.7%" in document("--preset gpt-7.5b --ms 7.12 --gbs 512 --sec 10")["warnings"][0]
    assert mistakes("--preset gpt-52b --ms 7.5 --gbs 1024 --sec 127") == [
        "--ms 7.5: is not the architecture's 51.97 billion parameters; leave it out, or correct the architecture"
    ]


def test_a_settings_file_says_what_it_says(tmp_path, document) -> None:
    path = tmp_path / "run.toml"
    path.write_text('preset = "gpt-52b"\n[training]\nglobal_batch_size = 1024\n')
    assert document(f"--config {path} --sec 127")["tflops_per_gpu"] == document("--preset gpt-52b --gbs 1024 --sec 127")["tflops_per_gpu"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ["--sec: is not set", "--gbs: is not set;", "--ms: is not set"]),
        ("--ms 52 --gbs 1024 --sec 127 --time-ms 127000", ["--sec 127 with --time-ms 127000: are two times; leave one out"]),
        (
            "--ms 52 --gbs 1000 --mbs 4 --dp 1 --gas 256 --sec 1 --factor 3 --recompute full",
            ["--recompute full: contradicts --factor 3", "--gbs 1000: contradicts --mbs 4 x --dp 1 x --gas 256 = 1024; leave one out"],
        ),
        (f"{SEED} --mbs 3", ["--gbs 1024: must be a multiple of --mbs 3 = 3; use --gbs 1026"]),
        ("--ms 52 --mbs 4 --gas 256 --sec 127", ["--gbs: is not set, and --mbs 4 x --gas 256 leaves --dp open"]),
        (f"{SEED} --ng 60 --nodes 16 --gpus-per-node 4", ["--ng 60: contradicts --nodes 16 x --gpus-per-node 4, which are 64 GPUs"]),
        (f"{SEED} --nodes 16", ["--nodes 16: says nothing of the GPUs without --gpus-per-node"]),
        (f"{SEED} --ng 60 --tp 4 --pp 16", ["--ng 60: must be a multiple of --tp 4 --pp 16 = 64; use --ng 64"]),
        (f"{SEED} --ng 60 --dp 8", ["--ng 60: must be a multiple of --dp 8 = 8; use --ng 64"]),
        ("--ms 52000000000 --gbs 1024 --sec 127", ["--ms 52000000000: is above 100,000; --ms counts billions: use --ms 52"]),
        ("--ms nan --gbs 1.5 --sec -1 --ng 0", ["--gbs 1.5", "--ms nan", "--sec -1", "--ng 0"]),
        ("--ms inf --gbs 0 --sec 1e9 --ng 1e12 --seq -5", ["--seq-length -5", "--global", "--ms inf", "--sec 1e9", "--ng 1e12"]),
        ("--ms 1e-12 --gbs 1024 --sec 1e-9", ["--ms 1e-12: is below", "--sec 1e-9: is below"]),
        (f"--ms 52 --sec {'9' * 5000} --gbs {'9' * 5000}", ["--gbs 999", "--sec 999"]),
        (f"{SEED} --recompute selctive", ["--recompute selctive: must be one of none, selective, full; did you mean selective?"]),
        (f"{SEED} --factor 5", ["--factor 5: must be 4 with full recomputation, else 3"]),
        (f"{SEED} --preset gpt-52c --gpu v100 --peak -3", ["--preset gpt-52c: no such preset; did you mean gpt-52b?", "--peak -3"]),
        (f"{SEED} --layers 64", ["--hidden: is not set", "--vocab: is not set"]),
        (f"{SEED} --precision bf16", ["--precision bf16: says which peak of the GPU is meant; give --gpu too"]),
        (f"{SEED} --in-place", ["--in-place: has no file to write; give --table FILE.md"]),
        (f"{SEED} --gbs 1024 --global-batch-size 2048", ["--gbs 1024: is the same setting as --global-batch-size 2048; leave one out"]),
    ],
)
def test_mistakes_are_one_message(line: str, expected: list[str], mistakes) -> None:
    found = mistakes(line)
    assert len(found) == len(expected), found
    assert all(any(start in text for text in found) for start in expected), found


TABLE = """# Notes

| GPUs | Size |  GBS | Speed | TFlops |
| ---: | ---: | ---: | ----: | -----: |
|   64 | 52B  | 1024 | 137s  |   46.7 |
|   64 | 52B  | 1024 | OOM   |        |
A byte that is no UTF-8: \udcff
"""
FIXED = TABLE.replace("46.7", "49.7")


@pytest.fixture
def notes(tmp_path) -> Path:
    path = tmp_path / "notes.md"
    path.write_bytes(TABLE.encode("utf-8", "surrogateescape"))
    return path


def test_a_table_goes_to_stdout_and_its_lists_to_stderr(notes: Path, capfdbinary) -> None:
    assert main(["tflops", "--table", str(notes)]) == 0
    out, err = capfdbinary.readouterr()
    assert out == FIXED.encode("utf-8", "surrogateescape")
    assert b"1 table with TFLOPs, 1 rows computed, 1 cells changed" in err and b"do not match: 1" in err and b"'OOM'" in err
    assert notes.read_bytes() == TABLE.encode("utf-8", "surrogateescape")


def test_in_place_keeps_permissions_and_links(notes: Path, tmp_path, command) -> None:
    os.chmod(notes, 0o640)
    link = tmp_path / "link.md"
    link.symlink_to(notes)
    code, out, _ = command(f"--table {link} --in-place")
    assert code == 0 and "rows explained by rounding: none" in out
    assert notes.read_bytes() == FIXED.encode("utf-8", "surrogateescape")
    assert notes.stat().st_mode & 0o777 == 0o640 and link.is_symlink()
    before = notes.stat()
    assert command(f"--table {notes} --in-place")[0] == 0
    assert notes.stat().st_ino == before.st_ino, "an unchanged file is not written"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["link.md", "notes.md"]


def test_a_table_as_json_and_with_options(notes: Path, document) -> None:
    found = document(f"--table {notes} --factor 3 --seq 2048 --tp 4")
    assert found["rows"] == 1 and found["changed"] == 1 and found["assumed"] == {}
    (row,) = found["mismatches"]
    assert row["line"] == 5 and row["old"] == "46.7" and row["new"] == f"{49.7518 * 2 * 3 / 4:.1f}"
    assert found["rounding"] == [] and found["inconsistent"] == [] and "\ufffd" in found["text"]


def test_a_table_from_stdin(monkeypatch, document) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FIXED.encode("utf-8", "surrogateescape"))))
    assert document("--table -")["changed"] == 0


@needs_seeds
def test_the_table_of_seed_003(document) -> None:
    (path,) = (SHARED / "seeds").glob("003_*.txt")
    found = document(f"--table {path}")
    assert (len(found["mismatches"]), len(found["rounding"]), len(found["inconsistent"])) == (3, 3, 10)
    assert found["rows"] == 83 and found["tables"] == 16


def test_files_that_hold_no_table(tmp_path, mistakes) -> None:
    (tmp_path / "empty.md").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"| a |\n| - |\n\x00")
    (tmp_path / "utf16.md").write_bytes(FIXED.replace("\udcff", "").encode("utf-16"))
    (tmp_path / "other.md").write_text("| a | b |\n| - | - |\n| 1 | 2 |\n")
    os.mkfifo(tmp_path / "pipe")
    expected = {
        "empty.md": "no table has a TFLOPs column", "other.md": "no table has a TFLOPs column", "binary": "is not UTF-8 text",
        "utf16.md": "is not UTF-8 text", "none.md": "cannot be read: No such file", "": "cannot be read: Is a directory",
        "pipe": "not a plain file",
    }  # fmt: skip
    for name, message in expected.items():
        assert message in mistakes(f"--table {tmp_path / name}")[0]


def test_what_a_table_cannot_use_is_refused_together(notes: Path, mistakes) -> None:
    found = mistakes("--table - --in-place --sec 3 --preset gpt-52b --mbs 4 --gas 2 --ms x")
    assert [text.partition(":")[0] for text in found] == ["--ms x", "--in-place", "--sec 3", "--gas 2", "--preset gpt-52b", "--mbs"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_failure_and_no_mistake(notes: Path, command) -> None:
    os.chmod(notes.parent, 0o555)
    code, _, err = command(f"--table {notes} --in-place")
    os.chmod(notes.parent, 0o755)
    assert code == 1 and "cannot be written" in err
