"""What docs/flops.md and README.md show of tflops and model-size is what the commands print."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megactl.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/flops.md")}
SHOWN = [
    (name, *found) for name, page in PAGES.items() for found in re.findall(r"```\n\$ megactl ((?:tflops|model-size) .*)\n([^`]*)```", page)
]
ROWS = re.findall(r"^\| `(--preset [^`]*)` \| (\d+) \| (.*) B \| (.*)% \| (.*)% \| (.*)% \|$", PAGES["docs/flops.md"], flags=re.M)


def test_both_pages_show_both_commands() -> None:
    assert {(name, line.split()[0]) for name, line, _ in SHOWN} == {
        (name, command) for name in PAGES for command in ("tflops", "model-size")
    }


@pytest.mark.parametrize(("page", "line", "text"), SHOWN, ids=[f"{name}: {line}" for name, line, _ in SHOWN])
def test_the_output_shown_is_real(page: str, line: str, text: str, capsys) -> None:
    assert main(shlex.split(line)) == 0
    assert [shown.rstrip() for shown in capsys.readouterr().out.splitlines()] == text.splitlines()


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_how_far_the_rule_of_thumb_is_off(row: tuple[str, ...], capsys) -> None:
    assert main(["tflops", *row[0].split(), "--gbs", "64", "--sec", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    exact, speed = found["exact"], found["tflops_per_gpu"]
    apart = (speed / exact["hfu_tflops"], 0.75 * speed / exact["mfu_tflops"], 0.75 * speed / exact["causal_mfu_tflops"])
    expected = (str(found["inputs"]["seq"]), f"{exact['parameters'] / 1e9:.2f}", *(f"{100 * (share - 1):+.1f}" for share in apart))
    assert row[1:] == expected


def test_the_table_reads_low_and_high() -> None:
    assert len(ROWS) == 10 and {row[3][0] for row in ROWS} == {"+", "-"}
