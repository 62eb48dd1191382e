"""Text and TOML values to types: exact, strict, and never a crash."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.config.coerce import CoercionError, coerce
from megactl.config.settings import all_settings

INT, OPTIONAL_INT = all_settings()["training.iterations"], all_settings()["parallel.data_parallel"]
FLOAT, BOOL, TEXT = all_settings()["optimizer.lr"], all_settings()["data.mock_data"], all_settings()["data.data"]


@pytest.mark.parametrize(
    ("text", "value"), [("5", 5), ("5_000", 5000), ("5e5", 500_000), ("1.5e1", 15), ("-3", -3), ("+3", 3), (" 7 ", 7), ("2.0", 2)]
)
def test_integers(text, value):
    result = coerce(INT, text)
    assert result == value and type(result) is int


@pytest.mark.parametrize(
    "text",
    ["1.5", "abc", "", " ", "1 2", "0x10", "1e", "e5", ".", "nan", "inf", "1__0", "_1", "true", "1e400", "\u0663\u066b\u0665", "\u0663"],
)
def test_not_integers(text):
    with pytest.raises(CoercionError):
        coerce(INT, text)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), (".5", 0.5), ("3", 3.0), ("1_0.5", 10.5)])
def test_numbers(text, value):
    result = coerce(FLOAT, text)
    assert result == value and type(result) is float


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "1,5", "abc", "--", "True"])
def test_not_numbers(text):
    with pytest.raises(CoercionError):
        coerce(FLOAT, text)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("yes", True), ("off", False), ("1", True), ("0", False)])
def test_booleans(text, value):
    assert coerce(BOOL, text) is value


@pytest.mark.parametrize("value", ["maybe", "", "2", 1, 0, 1.0])
def test_not_booleans(value):
    with pytest.raises(CoercionError):
        coerce(BOOL, value)


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        (INT, "5", "not text"),
        (INT, True, "not true or false"),
        (FLOAT, True, "not true or false"),
        (FLOAT, "1e-4", "not text"),
        (BOOL, "true", "not text"),
        (TEXT, 5, "must be text"),
        (INT, [1], "not a list"),
        (INT, {"a": 1}, "not a table"),
        (FLOAT, math.nan, "not infinite or NaN"),
    ],
)
def test_typed_values_are_not_converted_across_types(setting, value, rule):
    with pytest.raises(CoercionError, match=rule):
        coerce(setting, value, typed=True)


def test_typed_numbers_convert_where_they_are_exact():
    assert coerce(FLOAT, 3, typed=True) == 3.0
    assert coerce(INT, 5e5, typed=True) == 500_000
    assert coerce(all_settings()["optimizer.warmup"], 100, typed=True) == "100"
    with pytest.raises(CoercionError):
        coerce(all_settings()["optimizer.warmup"], True, typed=True)


def test_none_clears_optional_settings_only():
    assert coerce(OPTIONAL_INT, "none") is None
    assert coerce(TEXT, "None", typed=True) is None
    with pytest.raises(CoercionError):
        coerce(INT, "none")


@pytest.mark.parametrize(("text", "use"), [("5k", "use 5000"), ("1.5M", "use 1500000"), ("3,5", "use 3.5"), ("2.5", "use 2 or 3")])
def test_suggestions(text, use):
    with pytest.raises(CoercionError) as error:
        coerce(INT, text)
    assert use in str(error.value.instead)


def test_choices_are_exact_and_suggest():
    precision = all_settings()["training.precision"]
    for word, meant in {"fp8": "bf16", "FP16": "fp16", "float16": "fp16", "BF16": "bf16", "float32": "fp32", "bf6": "bf16"}.items():
        with pytest.raises(CoercionError) as error:
            coerce(precision, word)
        assert error.value.instead == f"did you mean {meant}?"


@settings(deadline=None)
@given(
    st.sampled_from(sorted(all_settings())),
    st.text() | st.integers() | st.floats() | st.booleans() | st.lists(st.integers(), max_size=2),
    st.booleans(),
)
def test_any_value_gives_the_right_type_or_a_coercion_error(name, value, typed):
    setting = all_settings()[name]
    try:
        result = coerce(setting, value, typed=typed)
    except CoercionError:
        return
    assert (result is None and setting.optional) or type(result) is setting.type
