"""slurm lint: each rule on a script that breaks it and on one that does not; the reader of bash and of directives; time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lint_cases import CASES, framed

from megactl.cluster.lint import RULES, lint_text
from megactl.cluster.lint.directives import directive, read_directives
from megactl.cluster.lint.shell import parse


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=[f"{case.rule}-{index}" for index, case in enumerate(CASES)])
def test_a_rule_finds_its_trap_and_nothing_else(case, folder):
    found = [item for item in lint_text(case.bad, folder=folder) if item.rule == case.rule]
    assert {item.line for item in found} == {case.line}
    assert any(case.value in item.value for item in found)
    assert all(item.message and item.cure for item in found)
    assert case.rule not in {item.rule for item in lint_text(case.good, folder=folder)}


def test_every_rule_has_a_case_and_an_id_of_its_own():
    ids = [rule.id for rule in RULES]
    assert len(ids) == len(set(ids))
    assert set(ids) == {case.rule for case in CASES}


def test_the_frame_of_the_cases_is_clean(folder):
    assert lint_text(framed(), folder=folder) == []


def test_the_good_scripts_are_good_bash(tmp_path):
    """They are what the cures tell people to write. (Here-documents and quotes of the bad ones are broken on purpose.)"""
    for case in CASES:
        if "\0" not in case.good:
            done = subprocess.run(["bash", "-n"], input=case.good, text=True, capture_output=True)
            assert done.returncode == 0, (case.rule, done.stderr)


def test_a_finding_in_a_here_document_has_the_line_of_the_file():
    text = "#!/bin/bash\nsbatch <<'END'\n#!/bin/bash\n#SBATCH --time=20h\nsrun hostname\nEND\n"
    assert [(item.line, item.rule) for item in lint_text(text)] == [(4, "time-format")]


def test_rules_can_be_left_out(folder):
    text = framed("#SBATCH --time=20\n#SBATCH --mem=64")
    every = {item.rule for item in lint_text(text, folder=folder)}
    assert {"time-units", "memory-units"} <= every
    assert {item.rule for item in lint_text(text, folder=folder, ignore=["time-units"])} == every - {"time-units"}


# -- what sbatch reads; the real sbatch is asked the same in test_slurm_real.py

DIRECTIVES = [
    ("#SBATCH --nodes=2   # two", [("nodes", "2")]),
    ("#SBATCH --job-name=a#b", [("job-name", "a")]),
    ("#SBATCH --job-name='a#b c' -N2", [("job-name", "a#b c"), ("nodes", "2")]),
    ("#SBATCH --job-name=a\\#b", [("job-name", "a#b")]),
    ("#SBATCH--nodes=2", [("nodes", "2")]),
    ("#SBATCH\t-N 2\t-n4", [("nodes", "2"), ("ntasks", "4")]),
    ("#SBATCH --job=x --requeue \\", [("job-name", "x"), ("requeue", None)]),
    ("  # comment\n\n#SBATCH -N2", [("nodes", "2")]),
    ("##SBATCH -N2\n# SBATCH -N2\n#sbatch -N2\n #SBATCH -N2", []),
    ("true\n#SBATCH -N2", []),
    ("#SBATCH --job-name=$USER-x", [("job-name", "$USER-x")]),
]


@pytest.mark.parametrize(("text", "expected"), DIRECTIVES)
def test_directives_are_read_as_sbatch_reads_them(text, expected):
    found, _ = read_directives(["#!/bin/bash", *text.split("\n")])
    assert [(option.name, option.value) for option in found] == expected
    assert all(option.fault is None for option in found)


@pytest.mark.parametrize(
    ("text", "fault"),
    [(" --nodez=2", "unknown"), (" --node=2", "ambiguous"), (" --nodes", "no-value"), (" --requeue=1", "unwanted-value"),
     (" nodes=2", "stray"), (": -N2", "colon"), (" --comment='a", "unmatched"), (" -job-name=foo", "unknown"), ("foo", "stray")],
)  # fmt: skip
def test_what_sbatch_refuses_is_a_fault(text, fault):
    assert next(option.fault for option in directive(text, 1)) == fault


# -- the reader of bash


def texts(script: str) -> list[str]:
    return [command.text for command in parse(script).commands]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("a b\nc", ["a b", "c"]),
        ("a 'b c' \"d $x\" e\\ f", ["a b c d $x e f"]),
        ("a \\\n  b", ["a b"]),
        ("a # b\n#c\nd#e", ["a", "d#e"]),
        ("a | b && c || d & e; f", ["a", "b", "c", "d", "e", "f"]),
        ("if a; then b; elif c; then d; else e; fi", ["a", "b", "c", "d", "e"]),
        ("while a; do b; done", ["a", "b"]),
        ("f() { a; }\nf", ["a", "f"]),
        ("case $x in\n a|b) c ;;\n (d) e ;;\n *) f\nesac\ng", ["c", "e", "f", "g"]),
        ("[[ $a < b && ( c > d ) ]] && e", ["[[ $a b c d ]]", "e"]),
        ("(( a < 3 )) && b", ["b"]),
        ("a $(b | c) `d;e` ${f:-g h} $((1<<2)) i", ["a $(b | c) `d;e` ${f:-g h} $((1<<2)) i"]),
        ('a "$(b ")" \'c")\')" d', ['a $(b ")" \'c")\') d']),
        ("a <<E b\nc 'd\nE\ne", ["a b", "e"]),
        ("a <<E <<'F'\nb\nE\nc\nF\nd", ["a", "d"]),
        ("a 2>&1 >b <c d", ["a d"]),
        ("diff <(a b) >(c)", ["diff <(a b) >(c)"]),
        ("a $'b\\'c' d", ["a b\\'c d"]),
        ("echo ${#a} $# $? $$ ${b[@]}", ["echo ${#a} $# $? $$ ${b[@]}"]),
        ("time a; ! b", ["a", "b"]),
    ],
)
def test_commands_are_cut_as_bash_cuts_them(script, expected):
    parsed = parse(script)
    assert texts(script) == expected
    assert parsed.unclosed == ()


def test_what_is_expanded_is_told_from_what_is_only_written():
    (command,) = parse("a $b '$c' \"$d \\$e\" \\$f ${g:-$h} $(i) `j`").commands
    assert [(item.text, item.name, item.quoted) for word in command.words for item in word.expansions] == [
        ("$b", "b", False), ("$d", "d", True), ("${g:-$h}", "g", False), ("$(i)", None, False), ("`j`", None, False),
    ]  # fmt: skip


def test_assignments_and_arrays():
    first, second, third = parse("A=1 B='2 3' cmd\nC=(a \"b c\" # d\n  e)\nexport D=$A E+=x").commands
    assert [(item.name, item.value.text) for item in first.assignments] == [("A", "1"), ("B", "2 3")]
    assert [word.text for word in second.assignments[0].elements] == ["a", "b c", "e"]
    assert [(item.name, item.value.text, item.append) for item in third.assignments] == [("D", "$A", False), ("E", "x", True)]


def test_lines_are_those_of_the_file():
    parsed = parse("a\n\nb \\\n  c\ncat <<E\nx\n$y\nE\nd 'e\nf' $g\n")
    assert [command.line for command in parsed.commands] == [1, 3, 5, 9]
    assert parsed.commands[2].heredocs[0].expansions[0].line == 7
    assert [item.line for word in parsed.commands[3].words for item in word.expansions] == [10]


NASTY = [
    "$(", '"$(', "`", "${", "(", "((", "[[ ", "'", '"', "<<A\n", "case a in ", "$((", "a=(", "\\", ";", "if ", "#!/bin/bash\ncat <<A\n",
    "A=$A$A\n", "#SBATCH --a=b\n", "srun $A\n", "a <<A\n#!\n", "case x in\n", "{ ", "$", "\r\n", "export A=$A$A; srun $A\n",
    "srun python a.py\n", "#SBATCH --nodes=2\n#SBATCH --nodes=3\n", "a \\ \n", "<a>", "$SLURM_PROCID ",
]  # fmt: skip


@pytest.mark.parametrize("piece", NASTY)
def test_time_is_linear_in_the_text(piece):
    """Work is counted, not timed: calls of Python functions for twice the text are at most a little more than twice as many."""
    import sys

    def work(times: int) -> int:
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += 1

        text = "#!/bin/bash\n" + piece * times
        sys.setprofile(count)
        try:
            lint_text(text)
        finally:
            sys.setprofile(None)
        return calls

    small, large = work(60), work(120)
    assert large < 2.3 * small + 2000


def test_nothing_in_a_script_is_run_and_any_text_is_survived(tmp_path, monkeypatch):
    """Random cuts of scripts full of quotes and here-documents: always findings, never an exception."""
    import random

    monkeypatch.chdir(tmp_path)
    source = "".join(case.bad for case in CASES) + f"\n$(touch {tmp_path}/canary)\n`touch {tmp_path}/canary`"
    for seed in range(150):
        chance = random.Random(seed)
        start = chance.randrange(len(source))
        text = source[start : start + chance.randrange(2000)]
        place = chance.randrange(len(text) + 1)
        lint_text(text[:place] + chance.choice("\"'`$(){}<>|&;\\\n\r\0#=[] ") + text[place:], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
