"""Layers, origins, locations, and every mistake at once."""

from __future__ import annotations

import pytest

from megactl.config.load import load
from megactl.config.presets import PRESETS, preset_values
from megactl.config.schema import Run
from megactl.config.settings import all_settings
from megactl.errors import ConfigError


def messages(**arguments) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(**arguments)
    return [str(problem) for problem in error.value.problems]


def test_nothing_set_is_the_default_run():
    loaded = load()
    assert loaded.run == Run()
    assert set(loaded.origins.values()) == {"default"}


def test_each_layer_overrides_the_one_below(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[optimizer]\nlr = 3.0\n[model]\nnum_layers = 3\nnum_heads = 3\nhidden_size = 3\n")
    environ = {"MEGACTL_MODEL_NUM_HEADS": "4", "MEGACTL_MODEL_HIDDEN_SIZE": "4", "MEGACTL_OPS": "auto", "MEGACTL_MODEL_FFN_SIZE": ""}
    loaded = load(
        preset="gpt-345m",
        config=str(file),
        environ=environ,
        flags={"model.hidden_size": ("--hidden", "5")},
        assignments=["model.gelu=erf"],
    )
    run = loaded.run
    assert (run.training.seq_length, run.model.num_layers, run.model.num_heads, run.model.hidden_size) == (1024, 3, 4, 5)
    assert run.model.gelu == "erf" and run.optimizer.lr == 3.0 and run.preset == "gpt-345m" and run.model.ffn_size is None
    origins = loaded.origins
    assert origins["model.vocab_size"] == "preset gpt-345m"
    assert origins["model.num_layers"] == f"{file}:4"
    assert origins["model.num_heads"] == "env MEGACTL_MODEL_NUM_HEADS"
    assert origins["model.hidden_size"] == "flag --hidden"
    assert origins["model.gelu"] == "--set model.gelu"
    assert origins["training.seed"] == "default"
    assert loaded.is_set("model.num_heads") and not loaded.is_set("model.vocab_size") and not loaded.is_set("training.seed")


def test_preset_of_the_highest_layer_wins(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "gpt-1t"\n')
    assert load(config=str(file)).run.model.num_layers == 128
    assert load(config=str(file), environ={"MEGACTL_PRESET": "gpt-7.5b"}).run.preset == "gpt-7.5b"
    assert load(config=str(file), environ={"MEGACTL_PRESET": "gpt-7.5b"}, preset="gpt-tiny").run.preset == "gpt-tiny"


def test_all_mistakes_of_all_layers_at_once(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('speed = 1\n[modl]\nhidden_size = 1\n\n[optimizer]\nlr = "fast"\nbeta3 = 1\n[training]\nfp16 = true\n')
    found = messages(
        preset="gpt-345",
        config=str(file),
        environ={"MEGACTL_TRAINNG_LR": "1"},
        flags={"parallel.tensor_parallel": ("--tp", "two")},
        assignments=["nonsense"],
    )
    assert len(found) == 9
    text = "\n".join(found)
    for piece in (
        "--preset gpt-345: no such preset; did you mean gpt-345m?",
        f"{file}:1: speed: no such section",
        f"{file}:2: [modl]: no such section; did you mean [model]?",
        f"{file}:6: optimizer.lr = 'fast': must be a number, not text",
        f"{file}:7: optimizer.beta3: [optimizer] has no such setting; did you mean optimizer.beta",
        f"{file}:9: training.fp16: is a value of --precision here; use --precision fp16",
        "MEGACTL_TRAINNG_LR=1: no such setting; did you mean MEGACTL_OPTIMIZER_LR?",
        "--tp two: must be a whole number",
    ):
        assert piece in text


@pytest.mark.parametrize(
    ("text", "line", "rule"),
    [
        ("[model\n", 1, "is not TOML"),
        ("[model]\nhidden_size = \n", 2, "is not TOML"),
        ("[data]\ndata = corpus/text\n", 2, 'put text in quotes: "corpus/text"'),
        ("[model]\nnum_heads = 1\nnum_heads = 2\n", 3, "is not TOML"),
        ("schema_version = 9\n", 1, "reads schema_version 1"),
        ("schema_version = true\n", 1, "reads schema_version 1"),
        ("preset = 5\n", 1, "must be text"),
        ("model = 5\n", 1, "must be a table"),
        ("training.seed = 'x'\n", 1, "must be a whole number"),
        ("training = {seed = 'x'}\n", 1, "must be a whole number"),
        ("[[model]]\nhidden_size = 1\n", 1, "must be a table"),
        ("[model]\ntp = 2\n", 2, "did you mean parallel.tensor_parallel?"),
        ("lr = 1\n", 1, "write it as lr below [optimizer]"),
    ],
)
def test_files(tmp_path, text, line, rule):
    file = tmp_path / "run.toml"
    file.write_text(text)
    (message,) = messages(config=str(file))
    assert message.startswith(f"{file}:{line}: ") and rule in message


def test_unreadable_files(tmp_path):
    (tmp_path / "latin1.toml").write_bytes(b"# caf\xe9\n")
    assert "cannot be read: No such file" in messages(config=str(tmp_path / "none.toml"))[0]
    assert "cannot be read: Is a directory" in messages(config=str(tmp_path))[0]
    assert "is not UTF-8" in messages(config=str(tmp_path / "latin1.toml"))[0]


def test_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf[training]\nseed = 7\n")
    assert load(config=str(tmp_path / "bom.toml")).run.training.seed == 7


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("MEGACTL_TRAINNG_SEED", "MEGACTL_TRAINING_SEED"),
        ("MEGACTL_OPTIMIZER_LEARNING_RATE", None),
        ("MEGACTL_RUN_DIR", "MEGACTL_LOGGING_RUN_DIR"),
        ("MEGACTL_LR", "MEGACTL_OPTIMIZER_LR"),
        ("MEGACTL_MODEL_HIDDENSIZE", "MEGACTL_MODEL_HIDDEN_SIZE"),
    ],
)
def test_misspelt_variables(variable, meant):
    (message,) = messages(environ={variable: "1"})
    assert message.startswith(f"{variable}=1: no such setting") and (meant is None or f"did you mean {meant}?" in message)


def test_switches_are_no_settings():
    switches = (
        "MEGACTL_OPS",
        "MEGACTL_TRACEBACK",
        "MEGACTL_HANG_TIMEOUT",
        "MEGACTL_START_TIMEOUT",
        "MEGACTL_ARCHS",
        "MEGACTL_CUDA",
        "MEGACTL_SKIP_OPS",
    )
    assert load(environ=dict.fromkeys(switches, "1")).run == Run()


def test_every_preset_loads_and_divides():
    for name in PRESETS:
        run = load(preset=name).run
        assert run.model.hidden_size % run.model.num_heads == 0
        assert set(preset_values(name)) <= set(all_settings())


def test_presets_are_the_published_tables():
    import csv
    from pathlib import Path

    shared = Path(__file__).parents[3] / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("the published tables (../shared/data) are not here")
    labels = {"18.4": "18b", "39.1": "39b", "76.1": "76b", "145.6": "145b", "310.1": "310b", "529.6": "530b", "1008.0": "1t"}
    rows = csv.DictReader(line for line in (shared / "planner" / "sc21_table1.csv").read_text().splitlines() if not line.startswith("#"))
    checked = 0
    for row in rows:
        run = load(preset=f"gpt-{labels.get(row['params_B'], row['params_B'] + 'b')}").run
        expected = (int(row["layers"]), int(row["hidden"]), int(row["heads"]), 2048, 51200)
        found = (run.model.num_layers, run.model.hidden_size, run.model.num_heads, run.training.seq_length, run.model.vocab_size)
        assert found == expected
        checked += 1
    for row in csv.DictReader((shared / "seed-tables" / "aux_msize_architectures.csv").read_text().splitlines()):
        if row["msize_label_b"] in ("52", "181"):
            run = load(preset=f"gpt-{row['msize_label_b']}b").run
            found = (run.model.num_layers, run.model.hidden_size, run.model.num_heads, run.training.seq_length, run.model.vocab_size)
            assert found == tuple(int(row[key]) for key in ("layers", "hidden", "heads", "seq", "vocab"))
            checked += 1
    assert checked == 12
