"""The schema as settings and flags: nothing missing, nothing twice, and the tables of names stay true to it."""

from __future__ import annotations

import pytest

from megactl.config.absent import _CHOICES, ABSENT
from megactl.config.flags import all_flags, given, help_text
from megactl.config.names import nearest, normal
from megactl.config.schema import SECTIONS, Run
from megactl.config.settings import all_settings, names_by_alias, replace
from megactl.errors import ConfigError


def test_every_field_is_a_setting_with_a_flag_help_and_known_type():
    expected = {f"{section}.{key}" for section, cls in SECTIONS.items() for key in cls.__dataclass_fields__}
    assert set(all_settings()) == expected
    for setting in all_settings().values():
        assert setting.flags and all(flag.startswith("--") for flag in setting.flags), setting.name
        assert setting.help and setting.type in (bool, int, float, str)
        assert setting.default is None or isinstance(setting.default, setting.type)
        assert not setting.choices or setting.default in setting.choices


def test_no_flag_is_declared_twice():
    declared = [part for flag in all_flags() for part in flag.declaration.split("/")]
    assert len(declared) == len(set(declared))


def test_an_alias_names_one_setting():
    owners: dict[str, set[str]] = {}
    for setting in all_settings().values():
        for spelling in (setting.key, *(part for flag in setting.flags for part in flag.split("/"))):
            owners.setdefault(normal(spelling), set()).add(setting.name)
    assert {spelling: names for spelling, names in owners.items() if len(names) > 1} == {}


def test_absent_names_are_absent():
    assert set(ABSENT).isdisjoint(names_by_alias())
    assert all(normal(name) == name for name in ABSENT)


def test_choice_words_are_not_choices_of_a_setting_they_would_change():
    for setting in all_settings().values():
        for choice in setting.choices:
            assert _CHOICES.get(choice) not in set(setting.choices) - {choice}


@pytest.mark.parametrize(
    ("word", "expected"),
    [("hiden", "hidden"), ("HIDDEN", "hidden"), ("num-layers", "num_layers"), ("zzzzzz", None), ("--lerning-rate", None)],
)
def test_nearest(word, expected):
    assert nearest(word, ["hidden", "heads", "num_layers", "lr"]) == expected


def test_nearest_prefers_the_common_beginning_among_equals():
    assert nearest("beta", ["xbeta", "beta1"]) == "beta1"


def test_replace_changes_only_what_is_named():
    run = replace(Run(), {"model.hidden_size": 64, "optimizer.lr": 1.0})
    assert (run.model.hidden_size, run.optimizer.lr) == (64, 1.0)
    assert replace(run, {"model.hidden_size": 768, "optimizer.lr": 3e-4}) == Run()


def test_two_spellings_of_one_setting_must_agree():
    by_flag = {flag.name: flag.parameter for flag in all_flags()}
    short, long = by_flag["--tp"], by_flag["--tensor-model-parallel-size"]
    assert given({short: "2", long: "2"}) == {"parallel.tensor_parallel": ("--tp", "2")}
    with pytest.raises(ConfigError, match="is the same setting as --tp 2"):
        given({short: "2", long: "4"})


def test_help_names_the_default_once():
    for setting in all_settings().values():
        text = help_text(setting)
        assert text.count("(default") <= 1
        assert setting.default is None or setting.type is bool or "(default" in text
