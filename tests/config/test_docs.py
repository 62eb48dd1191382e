"""The configuration page says what the code does: its tables are generated, its example message is real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megactl.config.flags import reference
from megactl.config.load import load
from megactl.config.presets import PRESETS
from megactl.config.refused import REFUSED
from megactl.config.settings import all_settings
from megactl.config.validate import resolve
from megactl.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def preset_rows() -> list[str]:
    rows = []
    for name in PRESETS:
        run = load(preset=name).run
        model = run.model
        vocabulary = model.vocab_size or "the data's"
        rows.append(
            f"| `{name}` | {model.num_layers} | {model.hidden_size} | {model.num_heads} | {run.training.seq_length} | {vocabulary} |"
        )
    return rows


def refused_rows() -> list[str]:
    rows = []
    for row in REFUSED:
        names = ", ".join(f"`{all_settings()[name].flag}`" for name in row.settings)
        rows.append(f"| {names} | {row.reason} | {row.instead} |")
    return rows


def test_the_page_has_every_setting_preset_and_refusal():
    text = PAGE.read_text(encoding="utf-8")
    assert reference().strip() in text, "regenerate it: python -c 'from megactl.config.flags import reference; print(reference())'"
    for row in preset_rows() + refused_rows():
        assert row in text


def test_the_example_message_is_what_the_code_says():
    text = PAGE.read_text(encoding="utf-8")
    example = re.search(r"error: (3 problems:\n(?:  - .*\n)+)", text)
    assignments = [
        "data.mock_data=true",
        "parallel.tensor_parallel=5",
        "parallel.pipeline_parallel=7",
        "optimizer.lr=0",
        "training.nproc=35",
    ]
    loaded = load(preset="gpt-1.7b", assignments=assignments)
    with pytest.raises(ConfigError) as error:
        resolve(loaded.run, world_size=35, visible=35, origins=loaded.origins)
    assert example is not None and example[1].strip() == str(error.value)
