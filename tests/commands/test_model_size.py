"""`megactl model-size` as it is typed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megactl.cli import main

SHARED = Path(__file__).resolve().parents[3] / "shared"
SEED = "--hidden 4096 --layers 36 --seq 512 --vocab 50257"
needs_seeds = pytest.mark.skipif(not SHARED.exists(), reason="the seeds are not beside the repository")


@pytest.fixture
def command(capsys):
    """Run `megactl model-size LINE`: (exit code, stdout, stderr)."""

    def run(line: str) -> tuple[int, str, str]:
        code = main(["model-size", *line.split()])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def document(command):
    """The JSON document of a command that must succeed."""

    def run(line: str) -> dict[str, Any]:
        code, out, err = command(f"{line} --json")
        assert code == 0 and err == "", err
        return json.loads(out)

    return run


def test_the_seeds_example(command, document) -> None:
    code, out, err = command(SEED)
    assert code == 0 and err == "" and out.splitlines()[0] == "7.46 B parameters (7,457,632,256)"
    found = document(SEED)
    h, layers, s, v = 4096, 36, 512, 50257
    assert found["parameters"] == layers * (12 * h**2 + 13 * h) + v * h + s * h + 2 * h == found["formula"]["parameters"]
    assert found["billions"] == 7.457632256 and sum(found["parts"].values()) == found["parameters"] and found["beyond_formula"] == {}
    assert found["assumed"] == {"precision": "bf16"}
    assert found["bytes"] == {
        "precision": "bf16", "weights": 2 * found["parameters"], "gradients": 4 * found["parameters"],
        "optimizer": 12 * found["parameters"], "total": 18 * found["parameters"],
    }  # fmt: skip
    # No padding of the vocabulary but on the GPUs.
    assert found["per_gpu"]["parameters"] == found["parameters"] + 47 * h == found["parameters"] + found["padding"]["parameters"]


@needs_seeds
def test_every_published_architecture(document) -> None:
    for row in csv.DictReader((SHARED / "data/seed-tables/aux_msize_architectures.csv").open()):
        found = document(
            f"--hidden {row['hidden']} --layers {row['layers']} --heads {row['heads']} --seq {row['seq']} --vocab {row['vocab']}"
        )
        assert found["parameters"] == int(row["params_formula"])
        assert abs(found["billions"] - float(row["msize_label_b"])) < 1.1 and found["assumed"] == {"precision": "bf16"}


@needs_seeds
def test_the_sizes_of_sc21(document) -> None:
    text = (SHARED / "data/planner/sc21_table1.csv").read_text().splitlines()
    for row in csv.DictReader(line for line in text if not line.startswith("#")):
        shape = f"--layers {row['layers']} --hidden {row['hidden']} --heads {row['heads']} --vocab 51200 --seq 2048"
        found = document(f"{shape} --tp {row['tp']} --pp {row['pp']} --dp {row['dp']}")
        digits = len(row["params_B"].partition(".")[2])
        assert round(found["billions"], digits) == float(row["params_B"]) or float(row["params_B"]) == 1008.0 == round(found["billions"])
        assert len(found["per_gpu"]["stages"]) == int(row["pp"]) and found["per_gpu"]["zero"] == 1


def test_the_old_unit_is_shown_where_it_changes_the_name(command, document) -> None:
    assert document("--preset gpt-52b")["billions_2_30"] == pytest.approx(48.40, abs=0.01)
    assert "48.40, which old scripts printed as B" in command("--preset gpt-52b")[1]
    assert "2^30" not in command("--preset gpt-345m")[1]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--preset gpt-345m --untie-embeddings", {"output_head"}),
        ("--preset gpt-345m --ffn 1024", {"mlp"}),
        ("--preset gpt-345m --max-positions 2048", {"position_embeddings"}),
        ("--preset gpt-345m --norm-position post", {"final_layernorm"}),
        ("--preset bert-345m", {"token_type_embeddings", "mlm_head", "sentence_head", "output_bias"}),
        ("--preset bert-345m --no-sentence-head", {"token_type_embeddings", "mlm_head", "output_bias"}),
    ],
)
def test_what_the_formula_does_not_know_is_said_apart(line: str, parts: set[str], command, document) -> None:
    found = document(line)
    assert {part for part, number in found["beyond_formula"].items() if number} == parts
    assert found["formula"]["parameters"] + sum(found["beyond_formula"].values()) == found["parameters"] == sum(found["parts"].values())
    assert all(part in command(line)[1] for part in parts)


def test_bert_base_is_the_published_size(document) -> None:
    assert document("--preset bert-base")["parameters"] == 110_106_428


def test_stages_and_shares(command, document) -> None:
    line = "--preset gpt-52b --tp 4 --pp 16 --dp 2"
    found = document(line)
    gpu = found["per_gpu"]
    assert (gpu["tp"], gpu["pp"], gpu["dp"], gpu["zero"]) == (4, 16, 2, 1) and found["assumed"] == {"precision": "bf16", "zero": 1}
    assert [stage["layers"] for stage in gpu["stages"]] == [4] * 16
    assert gpu["parameters"] == max(stage["parameters"] for stage in gpu["stages"]) == gpu["stages"][gpu["stage"]]["parameters"]
    assert (gpu["weights"], gpu["gradients"], gpu["optimizer"]) == tuple(gpu["parameters"] * share for share in (2, 4, 6))
    assert document(f"{line} --zero 0")["per_gpu"]["optimizer"] == 12 * gpu["parameters"]
    assert document(f"{line} --precision fp32")["bytes"]["total"] == 16 * found["parameters"]
    out = command(line)[1]
    assert "GPU of stages 1 to 14" in out and "padded by 47 rows to 50304" in out


def test_the_rule_of_thumb_gives_every_row_of_table_1(document) -> None:
    rows = [(1, 32), (2, 64), (4, 128), (8, 256), (16, 512), (32, 1024), (64, 1536), (128, 1920), (280, 2520), (512, 3072)]
    names = ["1.7b", "3.6b", "7.5b", "18b", "39b", "76b", "145b", "310b", "530b", "1t"]
    for name, (mp, gpus) in zip(names, rows, strict=True):
        found = document(f"--preset gpt-{name} --suggest-layout --gpus {gpus} --gpus-per-node 8 --mp {mp}")
        layout = found["suggested_layout"]
        assert (layout["tp"], layout["pp"], layout["dp"]) == (min(mp, 8), max(1, mp // 8), gpus // mp)
        assert {key: found["per_gpu"][key] for key in ("tp", "pp", "dp")} == {key: layout[key] for key in ("tp", "pp", "dp")}


def test_a_suggestion_fits_and_says_what_it_assumed(command, document) -> None:
    line = "--preset gpt-18b --suggest-layout --gpus 64"
    found = document(line)
    layout = found["suggested_layout"]
    assert found["assumed"] == {"precision": "bf16", "gpus-per-node": 8, "gpu-memory": 79.0, "mbs": 1, "zero": 1}
    assert layout["fits"] and layout["needed_gib"] < 79 and layout["tp"] * layout["pp"] * layout["dp"] == 64
    assert layout["needed_gib"] == pytest.approx(layout["memory"]["total"] * 1.06 / 2**30 + 2)
    small = document(f"{line} --gpu v100-32 --gpus-per-node 4 --mbs 2")
    assert small["suggested_layout"]["mp"] > layout["mp"] and small["suggested_layout"]["tp"] == 4
    assert small["suggested_layout"]["gpu_memory_gib"] == 31 and small["assumed"] == {"precision": "bf16", "zero": 1}
    assert "suggested layout: --tp" in command(line)[1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ["--layers: is not set", "--hidden: is not set", "--vocab: is not set"]),
        ("--preset gpt-52b --tp 3 --pp 15", ["--tp 3: must divide --heads 32", "--pp 15: must divide --layers 64"]),
        ("--preset gpt-52b --gpus 64 --mp x", ["--gpus 64: is for --suggest-layout", "--mp x: is for", "--mp x: must be a whole number"]),
        ("--preset gpt-52b --suggest-layout", ["--suggest-layout: needs the number of GPUs; give --gpus N"]),
        ("--preset gpt-52b --suggest-layout --gpus 64 --tp 4", ["--tp 4: is what --suggest-layout chooses"]),
        (
            "--preset gpt-18b --suggest-layout --gpus 100 --mp 12",
            ["--mp 12: must be a multiple of the 8", "--mp 12: must divide --gpus 100"],
        ),
        ("--preset gpt-1t --suggest-layout --gpus 64", ["--gpus 64: are too few: tp 8 pp 8 dp 1 needs"]),
        ("--preset gpt-18b --suggest-layout --gpus 64 --gpu a100", ["--gpu a100: A100 is sold with several amounts of memory"]),
        ("--preset gpt-18b --suggest-layout --gpus 64 --gpu foo", ["--gpu foo: is not in the list of GPUs; give --gpu-memory GIB"]),
        ("--preset gpt-18b --suggest-layout --gpus 64 --gpu h100 --gpu-memory 80", ["--gpu h100 with --gpu-memory 80: are two memories"]),
        ("--preset gpt-18b --mbs 4", ["--mbs 4: changes activations only"]),
        ("--preset gpt-18b --zero 4 --dp -2", ["--zero 4: ZeRO has the stages 0 to 3", "--dp -2: must be at least 1"]),
    ],
)
def test_mistakes_are_one_message(line: str, expected: list[str], command) -> None:
    code, out, err = command(line)
    assert code == 2 and out == "" and "Traceback" not in err
    assert all(start in err for start in expected), err
    assert err.count("\n  - ") == (len(expected) if len(expected) > 1 else 0)


def test_gpus_of_stages_that_are_not_one_equal_run_each(document) -> None:
    line = "--preset gpt-345m --pp 4"
    plain, chunks, folded, uneven = (
        document(f"{line} {more}")["per_gpu"] for more in ("", "--vpp 3", "--schedule zb-v", "--pp-split embedding,head")
    )
    assert plain["chunks"] == uneven["chunks"] == 1 and chunks["chunks"] == 3 and folded["chunks"] == 2
    # Interleaving changes which layers a rank holds, not how many; the V brings the head to the first rank.
    assert [stage["parameters"] for stage in chunks["stages"]] == [stage["parameters"] for stage in plain["stages"]]
    ends = plain["stages"][0]["parameters"] + plain["stages"][3]["parameters"] - plain["stages"][1]["parameters"]
    assert [stage["parameters"] for stage in folded["stages"]] == [ends, *[plain["stages"][1]["parameters"]] * 3]
    assert [stage["layers"] for stage in uneven["stages"]] == [5, 7, 7, 5]
    assert uneven["total"] < plain["total"]


def test_a_suggested_layout_has_one_equal_stage_a_rank(command) -> None:
    line = "--preset gpt-345m --suggest-layout --gpus 8"
    code, _, err = command(f"{line} --schedule gpipe")
    assert code == 2 and "--schedule gpipe: is no part of --suggest-layout: one equal stage a rank" in err
    assert [command(f"{line} {more}")[0] for more in ("--pp-split embedding", "--schedule zb-v", "--vpp 2")] == [2, 2, 2]
