"""Help pages in plain text, and groups that import one command."""

from __future__ import annotations

import os
import re

import pytest

from megactl.cli import COMMANDS, main
from megactl.commands.slurm import COMMANDS as SLURM
from megactl.config.flags import PANELS, all_flags, help_text


@pytest.fixture
def page(capsys, monkeypatch):
    """stdout of a command that ends with 0, on a terminal of some width."""

    def read(*words, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main([*words, "--help"]) == 0
        return capsys.readouterr().out

    return read


@pytest.mark.parametrize("columns", [40, 80, 100, 300])
def test_every_flag_is_in_its_panel_with_its_text(page, columns):
    text = page("train", columns=columns)
    panels = {title: body for title, body in re.findall(r"^(\w.*):\n((?:  .*\n?)+)", text, flags=re.M)}
    for flag in all_flags():
        body = " ".join(panels[PANELS[flag.setting.section]].split())
        assert (f"{flag.name} " in body) != flag.hidden
        if not flag.hidden:
            assert " ".join(help_text(flag.setting).split()) in body
    folded = [line for line in text.splitlines() if " megactl " not in line and len(line.split()) > 1]
    assert max(len(line) for line in folded if line.startswith("    ")) <= max(min(columns, 110), 58)


def test_examples_are_not_folded(page):
    text = page("slurm", "lint", columns=60)
    assert """\n  megactl slurm lint train.sh --json | jq '.files[].findings[] | select(.severity == "error")'\n""" in text


def test_groups_list_their_commands(page):
    for name, row in COMMANDS.items():
        assert f"  {name} " in page() and row.help in " ".join(page().split())
    text = page("slurm")
    assert all(f"  {name} " in text for name in SLURM) and "Usage: megactl slurm [OPTIONS] COMMAND" in text
    assert "--predict" in page("checkpoint", "inspect") and "Arguments:" in page("parse-logs")


@pytest.mark.parametrize("group", ["slurm", "checkpoint", "data", "bench"])
def test_a_group_without_a_command_shows_its_help_and_refuses(group, capsys):
    assert main([group]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"Usage: megactl {group}") and "error: a command is missing: one of " in err
    assert main([group, "nonsense"]) == 2
    assert "No such command 'nonsense'" in capsys.readouterr().err


def test_completion_of_a_group(monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "_MEGACTL_COMPLETE", "complete_bash")
    monkeypatch.setitem(os.environ, "COMP_WORDS", "megactl slurm lint --str")
    monkeypatch.setitem(os.environ, "COMP_CWORD", "3")
    main([])
    assert "--strict" in capsys.readouterr().out
