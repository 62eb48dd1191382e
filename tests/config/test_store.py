"""config.toml: what comes back is what went in, and two runs do not share a folder."""

from __future__ import annotations

import multiprocessing
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.config import store
from megactl.config.load import load
from megactl.config.settings import Setting, all_settings
from megactl.config.toml_file import toml_key, toml_value
from megactl.config.validate import resolve
from megactl.errors import ConfigError


def value_of(setting: Setting) -> st.SearchStrategy:
    if setting.choices:
        values = st.sampled_from(setting.choices)
    elif setting.type is bool:
        values = st.booleans()
    elif setting.type is int:
        values = st.integers(-(2**60), 2**60)
    elif setting.type is float:
        values = st.floats(allow_nan=False, allow_infinity=False)
    else:
        values = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), min_size=1).filter(
            lambda text: text.strip() and text.strip().lower() != "none"
        )
    return values | st.none() if setting.optional else values


@settings(deadline=None)
@given(st.data(), st.sampled_from([None, "gpt-tiny", "gpt-345m"]))
def test_any_run_survives_the_round_trip(tmp_path_factory, data, preset):
    names = data.draw(st.sets(st.sampled_from(sorted(all_settings())), max_size=12))
    flags = {name: ("--x", "none" if (value := data.draw(value_of(all_settings()[name]))) is None else value) for name in names}
    loaded = load(preset=preset, flags=flags)
    folder = tmp_path_factory.mktemp("run")
    store.write(folder, loaded)
    again = store.read(folder)
    assert again.run == loaded.run
    assert {name for name in all_settings() if again.is_set(name)} == set(names)


def test_set_and_derived_are_apart_and_derived_is_not_read(tmp_path):
    loaded = load(preset="gpt-tiny", assignments=["data.mock_data=true", "optimizer.warmup=1%"])
    answer = resolve(loaded.run, world_size=2, run_dir=str(tmp_path))
    path = store.write(tmp_path, loaded, answer.derived)
    document = tomllib.loads(path.read_text())
    assert document["schema_version"] == 1 and document["preset"] == "gpt-tiny"
    assert document["optimizer"] == {"warmup": "1%"} and document["data"] == {"mock_data": True}
    assert "model" not in document and "parallel" not in document
    assert document["derived"]["parallel.data_parallel"] == 2 and document["derived"]["model.hidden_size"] == 128
    assert '"parallel.data_parallel" = 2  # 2 ranks / (tp 1 x pp 1 x cp 1)' in path.read_text()
    assert store.read(tmp_path).run == store.read(path).run == loaded.run
    assert resolve(store.read(tmp_path).run, world_size=2, run_dir=str(tmp_path)).run == answer.run


def test_a_file_of_another_version_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text("schema_version = 2\n[future]\nthings = 1\n")
    with pytest.raises(ConfigError, match="schema_version 1") as error:
        store.read(tmp_path)
    assert len(error.value.problems) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--run-dir"):
        store.write(tmp_path / "file", load())
    with pytest.raises(ConfigError, match="--run-dir"), store.claim(tmp_path / "file"):
        pass


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_written_as_toml_reads_it(text):
    assert tomllib.loads(f"{toml_key(text)} = {toml_value(text)}") == {text: text}


@settings(deadline=None)
@given(st.floats(allow_nan=False) | st.integers() | st.booleans())
def test_numbers_are_written_as_toml_reads_them(value):
    result = tomllib.loads(f"x = {toml_value(value)}")["x"]
    assert result == value and type(result) is type(value)


def _hold(folder, ready, leave):
    with store.claim(folder):
        ready.set()
        leave.wait(20)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    spawn = multiprocessing.get_context("fork")
    ready, leave = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=_hold, args=(tmp_path, ready, leave))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(ConfigError, match=f"is in use by process {holder.pid}"), store.claim(tmp_path):
        pass
    holder.kill()
    holder.join()
    with store.claim(tmp_path):
        pass


def test_the_hash_sees_what_decides_the_numbers_and_nothing_else():
    base = load(assignments=["data.mock_data=true"])
    known = {store.config_hash(resolve(base.run, world_size=1, run_dir="a").run)}
    assert store.config_hash(resolve(base.run, world_size=1, run_dir="b", local_world_size=7).run) in known
    for assignment in ("optimizer.lr=1", "model.gelu=erf", "training.seed=1", "optimizer.beta1=0", "parallel.zero=0", "checkpoint.load=x"):
        changed = load(assignments=["data.mock_data=true", assignment])
        known.add(store.config_hash(resolve(changed.run, world_size=1).run))
    assert len(known) == 6, "zero=0 is the derived value already, the others differ"
    assert all(len(value) == 64 for value in known)
