"""`megactl checkpoint inspect` as it is typed: output, JSON, exit codes, several paths, and a machine without torch."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megactl.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def weights(tmp_path):
    """A plain pickle and a safetensors file, made without torch."""
    (tmp_path / "w.safetensors").write_bytes(safetensors({"a": ("F32", [2, 3]), "b": ("BF16", [4])}))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"iteration": 3}))
    return tmp_path


def safetensors(tensors: dict) -> bytes:
    width, at, table = {"F32": 4, "BF16": 2}, 0, {}
    for name, (dtype, shape) in tensors.items():
        size = width[dtype]
        for number in shape:
            size *= number
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["checkpoint", "inspect", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_file(capsys, weights):
    code, out, err = run(capsys, weights / "w.safetensors", "--per-parameter", "--per-file")
    assert code == 0 and err == ""
    assert "single file (safetensors)" in out and "32 B" in out and "2x3" in out and "bfloat16" in out


def test_json_is_one_document(capsys, weights):
    code, out, err = run(capsys, weights / "w.safetensors", "--json", "--per-parameter")
    document = json.loads(out)
    assert code == 0 and err == "" and document["errors"] == [] and document["prediction"] is None
    (found,) = document["checkpoints"]
    assert found["parts"]["weights"] == {"bytes": 32, "elements": 10, "dtypes": {"float32": 24, "bfloat16": 8}}
    assert found["bytes"] == (weights / "w.safetensors").stat().st_size == sum(part["bytes"] for part in found["parts"].values())
    assert {row["name"] for row in found["parameters"]} == {"a", "b"}


def test_damage_is_exit_code_1_and_the_others_are_shown(capsys, weights):
    os.truncate(weights / "w.safetensors", 100)
    code, out, _ = run(capsys, weights / "plain.pkl", weights / "w.safetensors")
    assert code == 1 and "problem: w.safetensors" in out and "iteration 3" in out
    code, out, err = run(capsys, weights / "plain.pkl", weights / "gone")
    assert code == 1 and "iteration 3" in out and "does not exist" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/at/all"], "does not exist"),
        ([], "PATH"),
        (["/tmp", "--layers", "4"], "--layers"),
        (["--predict"], "--layers"),
        (["--predict", "--preset", "gpt-181"], "gpt-181b"),
        (["--predict", "--preset", "gpt-345m", "--tp", "3"], "tensor_parallel"),
        (["--per-tensor", "x"], "--per-tensor"),
    ],
)
def test_wrong_requests_are_exit_code_2(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and words in err.replace("--tp", "tensor_parallel"), err


def test_prediction(capsys):
    arguments = ["--predict", "--preset", "gpt-181b", "--tp", "4", "--pp", "64", "--precision", "fp16"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "181,994,419,200" in out and "2.548 TB" in out and "2.32 TiB" in out and "1.4G" in out and "8.0G" in out
    code, out, _ = run(capsys, *arguments, "--json")
    prediction = json.loads(out)["prediction"]
    assert prediction["bytes"] == 14 * prediction["parameters"] and prediction["optimizer"] == 12 * prediction["parameters"]


def test_prediction_against_a_file(capsys, weights):
    code, out, _ = run(capsys, weights / "w.safetensors", "--predict", "--layers", "1", "--hidden", "64", "--vocab", "100", "--seq", "8")
    assert code == 0 and "found 10 (" in out and "not of the expected size" in out


def test_a_hostile_file_is_named_and_cannot_write_to_the_terminal(capsys, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"cos\nsystem\n(X\x04\x00\x00\x00trueX\x05\x00\x00\x00\x1b]0;xtR.")
    (tmp_path / "y\x1b[31m.pt").write_bytes(b"cos\nsy\x1b[31mstem\n)R.")
    code, out, err = run(capsys, tmp_path)
    assert code == 1 and "os.system" in out and "neither imported nor called" in out
    assert "\x1b" not in out + err


def test_own_checkpoints(capsys, tmp_path):
    pytest.importorskip("torch")
    flags = "--preset gpt-tiny --layers 2 --hidden 32 --mock-data --device cpu --iterations 2 --save-interval 1 --tp 2"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    train = [sys.executable, "-m", "megactl", "train", *flags.split(), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(train, capture_output=True, text=True, env=environ, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    code, out, _ = run(capsys, tmp_path / "run", "--json")
    (found,) = json.loads(out)["checkpoints"]
    assert code == 0 and found["system"] == "megactl" and found["iteration"] == 2 and found["layout"]["tp"] == 2
    for part in found["comparison"]["parts"].values():
        assert part["expected_elements"] == part["found_elements"]
    assert set(found["parts"]) == {"weights", "exp_avg", "exp_avg_sq", "overhead"}
    shard = next(Path(found["path"]).glob("rank-*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    code, out, _ = run(capsys, found["path"])
    assert code == 1 and "the manifest says" in out
    shard.unlink()
    code, out, _ = run(capsys, found["path"], "--json")
    assert code == 1 and json.loads(out)["checkpoints"][0]["missing"] == [shard.name]


def test_without_torch(weights):
    """In a process in which torch, numpy and the engine cannot be imported."""
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        assert name.split('.')[0] not in ('torch', 'numpy', 'pandas') and not name.startswith('megactl.engine'), name\n"
        "sys.meta_path.insert(0, Block())\n"
        "from megactl.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", block, "checkpoint", "inspect", str(weights / "w.safetensors"), str(weights / "plain.pkl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and "safetensors" in done.stdout, done.stderr
