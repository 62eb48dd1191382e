"""`megactl train` up to the launch: what is refused, what is printed, what the launcher is handed."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest

from megactl.cli import main
from megactl.config.flags import all_flags
from megactl.config.settings import all_settings
from megactl.config.store import read
from megactl.storage.dataset_metadata import DatasetMetadata, write_metadata

BASE = ["train", "--preset", "gpt-tiny", "--mock-data", "--device", "cpu"]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No launcher's or user's variables, and a folder of its own."""
    for name in list(os.environ):
        if name.startswith(("MEGACTL_", "SLURM_", "CUDA_VISIBLE")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def launched(monkeypatch):
    """The calls that would have started ranks; the code to return is `code`."""
    calls = types.SimpleNamespace(seen=[], code=0, text="")

    def launch(run, resolved, start):
        calls.seen.append((run, resolved, start))
        os.write(1, calls.text.encode())
        return calls.code

    monkeypatch.setitem(sys.modules, "megactl.engine.launch", types.SimpleNamespace(launch=launch))
    return calls


def plan(capsys, *arguments: str) -> dict:
    assert main([*BASE, *arguments, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def all_settings_of(section: str) -> list[str]:
    return [setting.key for setting in all_settings().values() if setting.section == section]


def test_every_flag_reaches_its_setting(capsys):
    values = {
        bool: [],
        int: ["1"],
        float: ["0.5"],
        str: ["1"],
    }
    special = {
        "model.hidden_size": ["128"],
        "model.num_heads": ["4"],
        "model.num_layers": ["4"],
        "model.vocab_size": ["300"],
        "training.precision": ["fp32"],
        "training.device": ["cpu"],
        "optimizer.min_lr": ["1e-5"],
        "model.max_positions": ["4096"],
        "parallel.zero": ["0"],
        "parallel.pipeline_split": ["1,3"],
        "parallel.schedule": ["gpipe"],
        "model.rope_scaling_factor": ["8"],
        "model.rope_high_frequency": ["5"],
        "memory.offload": ["optimizer"],
    }
    refused_alone = {
        "data.data",
        "data.data_cache",
        "data.split",
        "checkpoint.load_weights",
        "training.rampup_batch_size",
        "optimizer.wsd_decay_iterations",
        "data.tokenizer",
    }
    # Settings that mean something beside another one alone.
    of_bert = {"model.sentence_head", *(f"data.{name}" for name in ("mask_probability", "mask_ngrams", "whole_word_masking"))}
    of_bert |= {"data.short_seq_probability", "data.sentence_task"}
    rope = {"rope_base", "rotary_percent", "rope_scaling_factor"}
    scaled = {"rope_original_positions", "rope_low_frequency", "rope_high_frequency"}
    beside_others = {
        **{f"model.{name}": ["--position-embedding", "rope"] for name in rope},
        **{f"model.{name}": ["--position-embedding", "rope", "--rope-scaling-factor", "8"] for name in scaled},
        "parallel.context_method": ["--cp", "2"],
        **{f"parallel.{name}": ["--zero", "3", "--dp", "2"] for name in ("persistence_threshold", "split_layers", "zero_prefetch", "tile")},
        **{key: ["--model", "bert"] for key in of_bert},
        **{f"training.{name}": ["--precision", "fp16"] for name in all_settings_of("training") if "loss_scale" in name},
        "parallel.sequence_parallel": ["--tp", "2"],
        "parallel.pipeline_split": ["--pp", "2"],
        "memory.recompute_method": ["--recompute", "full"],
        "memory.recompute_layers": ["--recompute", "full"],
        "memory.partition_activations": ["--tp", "2", "--recompute", "full"],
    }
    checked = 0
    for flag in all_flags():
        setting = flag.setting
        beside = beside_others.get(setting.name, [])
        if setting.name in refused_alone:
            continue
        value = special.get(setting.name) or ([setting.choices[-1]] if setting.choices else values[setting.type])
        if flag.name == "--swiglu":
            value = []  # Megatron's switch for one value of --activation
        if setting.name == "checkpoint.resume":
            value = ["never"]
        origin = plan(capsys, flag.name, *value, *beside)["settings"][setting.name]["origin"]
        assert (
            origin == f"flag {flag.name}" or setting.name == "data.mock_data" or (setting.name == "training.device" and flag.name in origin)
        )
        checked += 1
    assert checked == sum(flag.setting.name not in refused_alone for flag in all_flags()) > 80


def test_no_form_takes_back(capsys, tmp_path):
    (tmp_path / "run.toml").write_text("[model]\nuntie_embeddings = true\n[parallel]\noverlap_grad_reduce = true\n")
    settings = plan(capsys, "--config", "run.toml", "--no-untie-embeddings", "--no-overlap-grad-reduce")["settings"]
    assert settings["model.untie_embeddings"] == {"value": False, "origin": "flag --no-untie-embeddings"}
    assert settings["parallel.overlap_grad_reduce"]["value"] is False


def test_plan_has_ranks_layout_batch_model_memory_and_reasons(capsys):
    document = plan(capsys, "--tp", "2", "--pp", "2", "--dp", "2", "--gbs", "16", "--warmup", "1%")
    assert document["world_size"] == 8 and document["layout"] == {"tp": 2, "cp": 1, "dp": 2, "pp": 2}
    assert document["ranks"][5] == {"rank": 5, "tp": 1, "cp": 0, "dp": 0, "pp": 1}
    assert len({tuple(list(rank.values())[1:]) for rank in document["ranks"]}) == 8
    assert document["batch"]["micro_batches"] == 8 and document["batch"]["warmup_iterations"] == 10
    assert document["model"]["parameters"] == 842_496 and len(document["model"]["parameters_per_rank"]) == 2
    assert document["memory"]["largest_rank_bytes"] == max(stage["total"] for stage in document["memory"]["stages"])
    assert {item["key"] for item in document["derived"]} >= {"parallel.zero", "num_micro_batches", "logging.run_dir"}
    assert document["settings"]["parallel.zero"]["origin"].startswith("derived: dp > 1")
    assert document["settings"]["model.num_layers"]["origin"] == "preset gpt-tiny"


def test_plan_as_text(capsys):
    assert main([*BASE, "--tp", "2", "--dp", "16", "--gbs", "64", "--rampup-batch-size", "16 16 1000", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for piece in (
        "32 = tp 2 x cp 1 x dp 16 x pp 1, started by this command, on cpu",
        "64 sequences of 128 tokens, 4 micro-batches of 1 on each replica, from 16 on",
        "842.5K parameters",
        "parallel.zero",
        "each replica keeps a share of the optimizer",
        "flag --rampup-batch-size",
        "... 16 more",
    ):
        assert piece in text


def test_a_dry_run_writes_nothing(tmp_path):
    assert main([*BASE, "--dry-run", "--run-dir", "out"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_launch_gets_the_resolved_run_and_the_run_directory_its_config(launched, capsys, tmp_path):
    launched.code = 75
    assert main([*BASE, "--tp", "2", "--run-dir", "out", "--set", "optimizer.lr=1e-4"]) == 75
    ((run, resolved, start),) = launched.seen
    assert run == resolved.run and run.parallel.data_parallel == 1 and run.model.vocab_size == 256
    assert (start.kind, start.world_size) == ("self", 2)
    written = read(tmp_path / "out")
    assert written.run.optimizer.lr == 1e-4 and written.run.parallel.tensor_parallel == 2 and written.run.model.vocab_size is None
    assert main(["train", "--config", "out/config.toml"]) == 75
    assert launched.seen[1][0] == run


def test_other_ranks_write_no_config(launched, monkeypatch, tmp_path):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([*BASE, "--run-dir", "out"]) == 0
    assert launched.seen[0][2].kind == "torchrun" and not (tmp_path / "out").exists()


def test_json_of_a_run_is_its_summary_alone(launched, capfd, tmp_path):
    launched.text = "iteration 1/ 1\n"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text('{"status": "completed"}')
    assert main([*BASE, "--run-dir", "out", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"status": "completed", "exit_code": 0, "run_dir": "out"}
    assert captured.err == "iteration 1/ 1\n"
    assert main([*BASE, "--run-dir", "out2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["status"] == "failed"


def test_a_crowd_of_processes_must_be_meant(launched, capsys):
    assert main([*BASE, "--dp", "1000"]) == 2
    assert "would start 1000 processes" in capsys.readouterr().err and not launched.seen
    assert main([*BASE, "--dp", "1000", "--nproc", "1000"]) == 0
    assert main([*BASE, "--dp", "1000", "--dry-run"]) == 0


def corpus(tmp_path, name: str, vocabulary: int | None, tokenizer: str = "byte", eod: int | None = 256) -> None:
    for ending in ("bin", "idx"):
        (tmp_path / f"{name}.{ending}").write_bytes(b"")
    if vocabulary is not None:
        metadata = DatasetMetadata(
            tokenizer=tokenizer,
            tokenizer_sha256=None,
            vocab_size=vocabulary,
            eod=eod,
            append_eod=True,
            dtype="uint16",
            documents=1,
            sequences=1,
            tokens=1,
        )
        write_metadata(tmp_path / name, metadata)


def settings_of(capsys, *arguments: str) -> dict:
    assert main(["train", "--layers", "2", "--hidden", "64", "--heads", "4", "--device", "cpu", *arguments, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["settings"]


def error_of(capsys, *arguments: str) -> str:
    assert main(["train", "--device", "cpu", *arguments, "--dry-run"]) == 2
    return capsys.readouterr().err


def test_vocabulary_and_tokenizer_come_with_the_data(capsys, tmp_path):
    corpus(tmp_path, "c_text_document", 257)
    for prefix in ("c_text_document", "c", "c_text_document.bin", str(tmp_path / "c")):
        settings = settings_of(capsys, "--data", prefix)
        assert settings["model.vocab_size"]["value"] == 257 and settings["data.tokenizer"]["value"] == "byte"
        assert settings["data.data"]["value"].endswith("c_text_document")
    assert settings_of(capsys, "--data", "c", "--vocab", "512")["model.vocab_size"]["value"] == 512
    assert settings_of(capsys, "--data", "c", "--eod-mask-loss")["data.eod_mask_loss"]["value"] is True
    assert "--vocab 100: is smaller than the 257 tokens of the data (tokenizer byte); use --vocab 257" in error_of(
        capsys, "--data", "c", "--vocab", "100"
    )


def test_blended_data(capsys, tmp_path):
    corpus(tmp_path, "a_text_document", 257)
    corpus(tmp_path, "b b", 257)
    settings = settings_of(capsys, "--data", "0.7 a 0.3 'b b'")
    assert (
        settings["data.data"]["value"].replace("0.69999999999999996", "0.7").replace("0.29999999999999999", "0.3")
        == "0.7 a_text_document 0.3 'b b'"
    )
    assert settings_of(capsys, "--data", "a 'b b'")["data.data"]["value"] == "a_text_document 'b b'"
    corpus(tmp_path, "x", 300, tokenizer="t")
    assert "preprocess them with one tokenizer" in error_of(capsys, "--data", "a x")


def test_data_without_a_record(capsys, tmp_path):
    corpus(tmp_path, "plain", None)
    assert "--vocab: the size of the vocabulary is not known: there is no plain.json" in error_of(capsys, "--data", "plain")
    assert settings_of(capsys, "--data", "plain", "--vocab", "300")["model.vocab_size"]["value"] == 300
    assert settings_of(capsys, "--data", "plain", "--tokenizer", "byte")["model.vocab_size"]["value"] == 257


def test_missing_and_damaged_data_are_reported_with_the_other_mistakes(capsys, tmp_path):
    text = error_of(capsys, "--data", "nowhere", "--tp", "5", "--lr", "-1")
    assert "3 problems" in text and "--data nowhere: there is no nowhere.idx and no nowhere_text_document.idx" in text and "--tp 5" in text
    corpus(tmp_path, "d", 257)
    (tmp_path / "d.json").write_text("{")
    assert "d.json: cannot be read" in error_of(capsys, "--data", "d")
    assert "tokenizer 'missing.json': does not exist" in error_of(capsys, "--data", "d", "--tokenizer", "missing.json")
