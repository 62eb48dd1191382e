"""scripts/bench_gpu on the CPU with tiny models: the plain PyTorch twin, the comparison of losses, speed in turn, text, the suite."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench_gpu"
TINY = ["--mock-data", "--layers", "2", "--hidden", "32", "--heads", "4", "--seq", "16", "--mbs", "2", "--gbs", "8", "--device", "cpu"]


@pytest.fixture
def script(monkeypatch):
    """Import one of the scripts as its neighbours see it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def run(*words, code=0):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
    environment |= {"PYTHONPATH": str(SCRIPTS.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def train(run_dir, *words):
    run("-m", "megactl", "train", "--preset", "gpt-tiny", *TINY, "--iterations", "5", "--run-dir", run_dir, *words)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


WAYS = [
    ["--tp", "2", "--eod-mask-loss", "--tokenizer", "byte"],
    pytest.param(["--untie-embeddings", "--gelu", "erf"], marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("words", WAYS)
def test_plain_pytorch_follows_a_run_to_the_last_digits(tmp_path, script, words):
    train(tmp_path / "run", "--precision", "fp64", *words)
    script("plain_loss").main([str(tmp_path / "run"), "--output", str(tmp_path / "plain.jsonl")])
    ours, plain = records(tmp_path / "run" / "metrics.jsonl"), records(tmp_path / "plain.jsonl")
    assert [item["iteration"] for item in plain] == [1, 2, 3, 4, 5]
    for one, other in zip(ours, plain, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-10)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-9)
        assert other["learning_rate"] == one["learning_rate"]


@pytest.mark.parametrize("words", [[], pytest.param(["--norm-position", "post", "--gelu", "erf", "--tp", "2"], marks=pytest.mark.nightly)])
def test_plain_bert_follows_a_run_to_the_last_digits(tmp_path, script, words):
    if "bert" not in importlib.import_module("megactl.engine.models").MODELS:
        pytest.skip("this version has no BERT")
    train(tmp_path / "run", "--model", "bert", "--precision", "fp64", *words)
    script("plain_loss").main([str(tmp_path / "run"), "--output", str(tmp_path / "plain.jsonl")])
    ours, plain = records(tmp_path / "run" / "metrics.jsonl"), records(tmp_path / "plain.jsonl")
    assert len(plain) == 5
    for one, other in zip(ours, plain, strict=True):
        for name in ("loss", "lm_loss", "sentence_loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-9)


CONFIG = """schema_version = 1
preset = "gpt-tiny"

[model]
num_layers = 2
hidden_size = 32
hidden_dropout = DROPOUT

[training]
seq_length = 16
micro_batch_size = 2
iterations = 5
precision = "bf16"

[data]
mock_data = true

[derived]
"training.global_batch_size" = 4
"""


def test_jitter_is_small_and_iterations_may_be_fewer(tmp_path, script):
    (tmp_path / "config.toml").write_text(CONFIG.replace("DROPOUT", "0.0"))
    found = []
    for words in ([], ["--jitter", "1e-3"], ["--jitter", "1e-3", "--jitter-seed", "1"]):
        script("plain_loss").main([str(tmp_path), "--device", "cpu", "--output", str(tmp_path / "a.jsonl"), "--iterations", "3", *words])
        found.append([item["loss"] for item in records(tmp_path / "a.jsonl")])
    plain, jitter, other = found
    assert len(plain) == 3 and plain != jitter != other
    assert jitter == pytest.approx(plain, abs=2e-2)


def test_a_run_with_dropout_is_refused(tmp_path, script):
    (tmp_path / "config.toml").write_text(CONFIG.replace("DROPOUT", "0.1"))
    with pytest.raises(SystemExit, match="dropout"):
        script("plain_loss").main([str(tmp_path), "--device", "cpu", "--output", str(tmp_path / "a.jsonl")])


def test_distance_of_curves(script):
    compare = script("compare_loss")
    one = {iteration: 1.0 for iteration in range(1, 9)}
    other = {iteration: 1.0 + 0.1 * iteration for iteration in range(3, 12)}
    found = compare.distance(one, other)
    assert (found.iterations, found.largest_at) == (6, 8) and found.largest == pytest.approx(0.8)
    assert found.mean == found.bias == pytest.approx(0.55) and found.last_bias == pytest.approx(0.8)
    falling = compare.distance(one, {1: 0.5, 2: 1.5})
    assert falling.mean == pytest.approx(0.5) and falling.bias == 0.0
    with pytest.raises(SystemExit, match="in common"):
        compare.distance(one, {100: 1.0})


def test_curves_are_laid_over_each_other(tmp_path, script, capsys):
    for name, shift in {"a": 0.0, "b": 0.01, "c": 0.03}.items():
        lines = [json.dumps({"iteration": i, "loss": 5 - i / 10 + shift * (-1) ** i}) for i in range(1, 25)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    compare, curves = script("compare_loss"), [f"{name}={tmp_path / name}.jsonl" for name in "abc"]
    compare.main([*curves, "--noise", "a", "b", "--output", str(tmp_path / "loss"), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["reference"] == "a" and figures["noise"]["mean"] == pytest.approx(0.01)
    assert figures["distances"]["c"]["largest"] == pytest.approx(0.03)
    text = (tmp_path / "loss.md").read_text()
    assert re.search(r"^\| c \| 24 \| 0\.03 .* 3\.00 \|$", text, flags=re.M) and "| 1 to 4 |" in text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for wrong in ([curves[0]], [*curves, "--key", "lm_loss"], [*curves, "--noise", "a", "d"]):
        with pytest.raises(SystemExit):
            compare.main([*wrong, "--output", str(tmp_path / "x")])


def test_speed_reads_a_run_and_a_peer_and_says_what_failed(tmp_path):
    peer = """p=echo '{"s_per_iter": 1}'; echo '{"s_per_iter": 0.5, "tok_s": 256, "peak_GiB": 2.5}'; echo end"""
    ours = f"ours=--preset gpt-tiny {' '.join(TINY)}"
    words = ["--rounds", "1", "--iterations", "4", "--warm-up", "1", "--peer", peer, "--peer", "bad=echo no figures"]
    run(SCRIPTS / "speed.py", "--output", tmp_path / "speed", "--ours", ours, *words, code=1)
    first, second, third = records(tmp_path / "speed.jsonl")
    assert first["seconds"] > 0 and first["tokens_per_s"] == pytest.approx(8 * 16 / first["seconds"]) and first["peak_gib"] > 0.1
    assert (second["seconds"], second["tokens_per_s"], second["peak_gib"]) == (0.5, 256, 2.5)
    assert third["seconds"] is None and "printed no JSON line" in third["problem"]
    text = (tmp_path / "speed.md").read_text()
    assert "| p | 0.5000 | 0.5000 | 256 | 2.5 | 1.000 |" in text
    assert "printed no JSON line with s_per_iter" in text and f"`megactl train {ours[5:]}`" in text


def test_speed_takes_turns(tmp_path, script, monkeypatch):
    speed, order = script("speed"), []

    def outcome(contestant, turn, arguments):
        order.append(contestant.name)
        return speed.Outcome(contestant.name, turn, {"a": 1.0, "b": 2.0, "c": 4.0}[contestant.name] * turn, 100.0)

    monkeypatch.setattr(speed, "run_contestant", outcome)
    monkeypatch.setattr(speed, "facts", lambda: {"gpus": ["a GPU"]})
    assert speed.main(["--output", str(tmp_path / "s"), "--ours", "a=x", "--peer", "b=x", "--peer", "c=x", "--rounds", "3"]) == 0
    assert "".join(order) == "abcbcacab"
    assert "| a | 2.0000 | 1.0000, 2.0000, 3.0000 | 100 | - | 2.000 | 4.000 |" in (tmp_path / "s.md").read_text()
    with pytest.raises(SystemExit):
        speed.main(["--output", str(tmp_path / "s"), "--ours", "a=x", "--peer", "a=y"])


def test_the_median_of_a_run_leaves_the_warm_up_out(tmp_path, script):
    speed = script("speed")
    seconds = [9.0, 8.0, 1.0, 3.0, 2.0]
    lines = [json.dumps({"iteration": i, "seconds": s, "tokens_per_s": 64 / s}) for i, s in enumerate(seconds, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps({"peak_memory_gb": 2**31 / 1e9}))
    assert speed.read_run(tmp_path, 2) == {"seconds": 2.0, "tokens_per_s": 32.0, "peak_gib": pytest.approx(2.0)}
    with pytest.raises(ValueError, match="first 5"):
        speed.read_run(tmp_path, 5)


def test_a_command_that_hangs_is_ended_with_its_children(script):
    code, output = script("speed").execute("echo started; sleep 300 & sleep 300; wait", 0.5)
    assert code == 124 and "started" in output


def test_prose_of_a_source_file(tmp_path, script):
    make_data = script("make_data")
    source = tmp_path / "a.py"
    source.write_text(
        '"""One sentence.\n\n>>> 1 + 1\n2\n"""\n\nclass A:\n    """Another.\n\n    And more.\n    """\n\ndef f():\n    x = "none"\n'
    )
    assert make_data.prose(source) == "One sentence.\n\n2\n\nAnother.\n\nAnd more."
    source.write_text("x = 1\n")
    assert make_data.prose(source) is None and make_data.read(source) == "x = 1\n"
    source.write_text("def broken(:\n")
    assert make_data.prose(source) is None


def test_the_corpus_keeps_each_document_once_until_it_is_large_enough(tmp_path, script, monkeypatch):
    make_data = script("make_data")
    texts = {"a.py": "x" * 400, "b.txt": "y" * 500, "c.txt": "y" * 500, "d.md": "z" * 300, "e.txt": "w" * 5000, "short.txt": "v"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(make_data, "files", lambda: iter(sorted(tmp_path.glob("*.*"))))
    make_data.write_corpus(tmp_path / "out.jsonl", 0.0012, sentences=False)
    assert [item["text"][0] for item in records(tmp_path / "out.jsonl")] == ["x", "y", "z"]


def test_make_data_for_the_gpt(tmp_path):
    run(SCRIPTS / "make_data.py", tmp_path, "--megabytes", "0.3", "--only", "gpt", "--gpt-vocab", "400")
    assert (tmp_path / "gpt_text_document.bin").stat().st_size > 10_000
    # A second time nothing is made anew.
    before = (tmp_path / "gpt_text_document.bin").stat().st_mtime_ns
    run(SCRIPTS / "make_data.py", tmp_path, "--megabytes", "0.3", "--only", "gpt", "--gpt-vocab", "400")
    assert (tmp_path / "gpt_text_document.bin").stat().st_mtime_ns == before


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(tmp_path, script):
    suite, log = script("gpu_suite"), tmp_path / "suite.log"
    log.write_text("")
    patient = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('1 passed in 3s')"
    commands = {"fails": ["-c", "print('so'); raise SystemExit(3)"], "hangs": ["-u", "-c", patient], "works": ["-c", "print('fine')"]}
    made = [suite.Step(name, [sys.executable, *words], {"X": "1"}, suite._last_line) for name, words in commands.items()]
    made.append(suite.Step("absent", ["/no/such/program"], {}, suite._last_line))
    outcomes = [suite.run(step, 3.0 if step.name == "hangs" else 60.0, log) for step in made]
    assert [item.status for item in outcomes] == ["FAILED (3)", "cut after 3 s", "ok", "FAILED (127)"]
    assert [item.note for item in outcomes[:3]] == ["so", "1 passed in 3s", "fine"]
    assert suite.summary(outcomes).count("\n") == 6 and "== works (" in log.read_text()


def test_notes_of_the_suite(tmp_path, script):
    suite = script("gpu_suite")
    output = "FAILED tests/ops/test_a.py::test_b[1] - assert\n== 1 failed, 3 passed, 9 deselected in 4.21s ==\n"
    assert suite._pytest_note(output) == "1 failed, 3 passed, 9 deselected in 4.21s; tests/ops/test_a.py::test_b[1]"
    sanitized = f"{output}========= ERROR SUMMARY: 2 errors\n"
    assert suite._sanitizer_note(sanitized).startswith("ERROR SUMMARY: 2 errors; 1 failed")
    verdicts = [("faster", False), ("slower than torch", True), ("faster", False)]
    row = {"op": "a", "variant": "", "direction": "forward"}
    rows = [row | {"verdict": verdict, "slower_than_eager": slow} for verdict, slow in verdicts]
    (tmp_path / "ops.json").write_text(json.dumps({"rows": rows}))
    assert suite._bench_note(tmp_path / "ops.json")("") == "2 faster, 1 slower than torch; slower than eager torch: a  forward"
    assert suite._bench_note(tmp_path / "none.json")("error: x\n") == "error: x"


def test_the_steps_of_the_suite_take_less_than_eight_minutes(tmp_path, script):
    suite = script("gpu_suite")
    made = suite.steps(tmp_path, "90a", 0.5)
    assert [step.name for step in made] == list(suite.LIMITS) and sum(suite.LIMITS.values()) < 480
    assert made[0].environment["MEGACTL_ARCHS"] == "90a"


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.glob("*.py") if path.name != "plain_models.py"))
def test_each_script_says_what_it_does(name, script):
    module = script(name.removesuffix(".py"))
    assert f"scripts/bench_gpu/{name}" in module.__doc__
    assert argparse.ArgumentParser(description=module.__doc__).format_help()


@pytest.mark.parametrize(("limit", "layers"), [(99, 8), (100, 10), (9, None), (10**9, 20)])
def test_the_deepest_model_that_fits(script, limit, layers):
    module = script("max_size")
    sizes = lambda depth: module.Size("x", depth, 0, 10 * depth, 0)  # noqa: E731
    found = module.deepest(sizes, lambda size: size.device_bytes <= limit, 2, most=20)
    assert (found and found.layers) == layers


def test_the_largest_model_grows_with_what_is_in_host_memory(tmp_path, script, monkeypatch):
    module = script("max_size")
    monkeypatch.setattr(module, "train", lambda arguments, size, left: module.Outcome(size, 1.0, 0.9 * size.device_bytes))
    words = ["--output", str(tmp_path / "max"), "--gpu-gib", "80", "--host-gib", "1000"]
    assert module.main(words) == 0
    rows = records(tmp_path / "max.jsonl")
    fitting, above = rows[::2], rows[1::2]
    depths = [row["size"]["layers"] for row in fitting]
    assert [row["size"]["setting"] for row in fitting] == list(module.SETTINGS) and depths == sorted(depths) and len(set(depths)) >= 4
    for one, other in zip(fitting, above, strict=True):
        assert one["size"]["device_bytes"] <= 0.94 * 80 * 2**30 < other["size"]["device_bytes"]
    # A host that is too small ends the search where the GPU would not, and what it cannot hold is not started.
    assert module.main([*words, "--host-gib", "120"]) == 0
    rows = records(tmp_path / "max.jsonl")
    assert rows[5]["problem"] == "not started: host memory" and rows[5]["seconds"] is None
    assert "| trains" in (tmp_path / "max.md").read_text()


def test_a_size_is_trained_in_a_process_of_its_own(tmp_path, script):
    module = script("max_size")
    arguments = argparse.Namespace(hidden=32, heads=4, seq=16, vocab=256, device="cpu")
    found = module.train(arguments, module.predicted(arguments, "optimizer and parameters", 2), 200)
    assert found.problem is None and found.seconds > 0 and found.peak_bytes is None
    assert module.reason(None, "") == "took too long"
    assert module.reason(1, "torch.OutOfMemoryError: CUDA out of memory. Tried") == "out of GPU memory"
