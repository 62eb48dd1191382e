"""`megactl slurm lint` and `submit` as typed: files, exit codes, JSON, a stand-in for sbatch; and the page about them."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from lint_cases import CASES, framed

from megactl.cluster import submit as submission
from megactl.cluster.lint import RULES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "slurm-lint.md").read_text(encoding="utf-8")
GOOD = framed()
BAD = framed("#SBATCH --time=20h\n#SBATCH --mem=64")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# -- lint


def test_findings_are_lines_that_editors_understand(slurm, here):
    Path("bad.sh").write_text(BAD)
    code, out, err = slurm("lint", "bad.sh")
    assert code == 1
    assert re.fullmatch(r"(bad\.sh:\d+: (error|warning): .+: .+; .+ \[[a-z-]+\]\n)+", out)
    assert "bad.sh:10: error: --time=20h: is no time limit; write HH:MM:SS or D-HH:MM:SS [time-format]" in out
    assert err == "1 error, 3 warnings in 1 file\n"


def test_exit_codes(slurm, here):
    Path("good.sh").write_text(GOOD)
    Path("warned.sh").write_text(framed("#SBATCH --mem=64"))
    Path("bad.sh").write_text(BAD)
    assert slurm("lint", "good.sh") == (0, "", "nothing found in 1 file\n")
    assert slurm("lint", "warned.sh")[0] == 0
    assert slurm("lint", "warned.sh", "--strict")[0] == 1
    assert slurm("lint", "warned.sh", "--strict", "--ignore", "memory-units,repeated-option")[0] == 0
    assert slurm("lint", "good.sh", "bad.sh")[0] == 1
    code, _, err = slurm("lint")
    assert code == 2 and "name batch scripts" in err
    code, _, err = slurm("lint", "good.sh", "--ignore", "fixed-ports", "--ignore", "nonsense")
    assert code == 2 and "did you mean fixed-port?" in err and "--ignore nonsense" in err


def test_stdin(slurm, here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(BAD.encode())))
    code, out, _ = slurm("lint", "-")
    assert code == 1 and out.startswith("-:")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"\x7fELF\x02\x01", "is binary"), (b"", "is empty"), (b"\0" * 50, "is binary"),
     ("#!/bin/bash\n".encode("utf-16"), "UTF-16"), (b"#!/bin/bash\n" + b"a" * 5_000_000, "4 MiB"), ("folder", "Is a directory")],
)  # fmt: skip
def test_a_file_that_is_no_script_is_named_and_the_others_are_read(slurm, here, content, said):
    Path("good.sh").write_text(GOOD)
    if content == "folder":
        Path("odd").mkdir()
    elif content is not None:
        Path("odd").write_bytes(content)
    code, out, err = slurm("lint", "odd", "good.sh")
    assert (code, out) == (1, "") and said in err and "odd: " in err and "nothing found in 1 file" in err


def test_an_old_encoding_is_read(slurm, here):
    Path("old.sh").write_bytes(GOOD.encode() + "# für später\n".encode("latin-1"))
    assert slurm("lint", "old.sh")[:2] == (0, "")


def test_json_is_one_document(slurm, here):
    Path("bad.sh").write_text(BAD)
    code, out, _ = slurm("lint", "bad.sh", "nowhere.sh", "--json")
    document = json.loads(out)
    assert code == 1 and (document["errors"], document["warnings"]) == (1, 3)
    (file,) = document["files"]
    assert {tuple(sorted(item)) for item in file["findings"]} == {("cure", "line", "message", "rule", "severity", "value")}
    assert [item["message"] for item in document["unreadable"]] == ["nowhere.sh: No such file or directory"]


def test_control_characters_of_a_script_do_not_reach_the_terminal(slurm, here):
    Path("bad.sh").write_text(framed("#SBATCH --partitionn=\x1b]0;title\x07"))
    code, out, _ = slurm("lint", "bad.sh")
    assert code == 1 and "\x1b" not in out and "\x07" not in out


def test_rules_are_listed(slurm):
    code, out, _ = slurm("lint", "--rules")
    assert code == 0 and all(rule.id in out for rule in RULES)
    assert [row["rule"] for row in json.loads(slurm("lint", "--rules", "--json")[1])] == [rule.id for rule in RULES]


RENDERED = [
    (), ("--launcher", "torchrun"), ("--sweep", "lr=1e-4,3e-4"), ("--array", "0-9%1", "--no-requeue"), ("--signal", "none", "--no-requeue"),
    ("--gpu-request", "gres", "--exclusive", "--mem", "0"), ("--container-image", "/i/x.sqsh", "--container-mount", "/data:/data"),
    ("--module", "cuda/12", "--env", "A=b c", "--sbatch", "switches=1", "--srun", "mpi=pmix"),
    ("--cpus-per-task", "12", "--run-dir", "runs/a"),
    ("--gpus-per-node", "0", "--ntasks-per-node", "2", "--device", "cpu"), ("--mail-type", "END,FAIL", "--mail-user", "a@b.org"),
]  # fmt: skip


@pytest.mark.parametrize("flags", RENDERED, ids=" ".join)
def test_what_render_writes_has_no_findings(slurm, rendered, here, flags):
    cpus = () if "--cpus-per-task" in flags else ("--cpus-per-task", "4")
    Path("job.sh").write_text(rendered(*flags, *cpus, "--time", "12:00:00"))
    assert slurm("lint", "--strict", "job.sh")[:2] == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [("--kill-on-bad-exit=1", "", "kill-on-bad-exit"), ("#SBATCH --open-mode=append", "", "requeue-log"),
     ("    srun\n", "    srun --requeue\n", "srun-option"), ("--mock-data", "--mock-data --resume never", "requeue-resume"),
     ("--ntasks-per-node=2\n    --cpus", "--ntasks-per-node=1\n    --cpus", None),
     ('|| code=$?\nstatus', '\ncode=$?\nstatus', "errexit")],
)  # fmt: skip
def test_a_rendered_script_is_understood_and_not_just_passed_over(slurm, rendered, here, old, new, rule):
    text = rendered("--cpus-per-task", "4", "--time", "12:00:00")
    assert old in text
    Path("job.sh").write_text(text.replace(old, new))
    found = json.loads(slurm("lint", "job.sh", "--json")[1])["files"][0]["findings"]
    assert [item["rule"] for item in found] == ([rule] if rule else [])


# -- submit, with stand-ins for sbatch and scontrol

_SBATCH = r"""#!/bin/bash
printf '%s\n' "$*" >> "$CALLS"
for last; do :; done
case "$*" in *--test-only*)
    case $last in *refused*)
        echo "sbatch: error: invalid partition specified: gpuu" >&2
        echo "allocation failure: Invalid partition name specified" >&2
        exit 1 ;;
    esac
    case $last in *slow*) exec sleep 60 ;; esac
    echo "sbatch: Job 7 to start at 2026-11-21T08:08:36 using 2 processors on nodes node[1-2] in partition debug" >&2; exit 0 ;;
esac
case $last in *late*) echo "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying" >&2; exit 1 ;; esac
echo "41$(wc -l < "$CALLS")${CLUSTER:+;$CLUSTER}"
"""
_SCONTROL = "#!/bin/bash\necho 'JobId=1 JobName=x'\necho '   StdOut=/logs of jobs/gpt.out'\n"


@pytest.fixture
def sbatch(tmp_path, here, monkeypatch):
    """Stand-ins on PATH; the calls of sbatch so far."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name, text in (("sbatch", _SBATCH), ("scontrol", _SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def test_a_script_is_tested_then_submitted(slurm, sbatch):
    Path("a.sh").write_text(GOOD)
    assert slurm("submit", "a.sh", "--dependency", "afterok:1:2") == (0, "a.sh: job 412; log: /logs of jobs/gpt.out\n", "")
    assert sbatch() == ["--test-only --dependency=afterok:1:2 ./a.sh", "--parsable --dependency=afterok:1:2 ./a.sh"]


def test_json_of_submit(slurm, sbatch, monkeypatch):
    monkeypatch.setenv("CLUSTER", "alps")
    Path("-a.sh").write_text(GOOD)
    code, out, _ = slurm("submit", "--json", "--", "-a.sh")
    assert code == 0
    job = {"file": "-a.sh", "job_id": "412", "cluster": "alps", "log": "/logs of jobs/gpt.out", "starts": "2026-11-21T08:08:36"}
    assert json.loads(out) == {"dry_run": False, "jobs": [job]}


def test_dry_run_submits_nothing(slurm, sbatch):
    Path("a.sh").write_text(GOOD)
    code, out, _ = slurm("submit", "a.sh", "--dry-run")
    assert code == 0 and "start it at 2026-11-21T08:08:36; not submitted (--dry-run)" in out
    assert all("--test-only" in call for call in sbatch())


def test_lint_errors_stop_all_unless_forced(slurm, sbatch):
    Path("a.sh").write_text(GOOD)
    Path("b.sh").write_text(BAD)
    code, out, err = slurm("submit", "a.sh", "b.sh")
    assert (code, out, sbatch()) == (1, "", []) and "[time-format]" in err and "nothing was submitted" in err
    assert slurm("submit", "a.sh", "b.sh", "--force")[0] == 0
    assert len(sbatch()) == 4


def test_one_refusal_of_slurm_stops_all(slurm, sbatch):
    for name in ("a", "refused-1", "refused-2"):
        Path(f"{name}.sh").write_text(GOOD)
    code, out, err = slurm("submit", "a.sh", "refused-1.sh")
    assert (code, out) == (1, "")
    assert "refused-1.sh: Slurm refuses it: invalid partition specified: gpuu; allocation failure" in err and "sinfo -s" in err
    code, _, err = slurm("submit", "refused-1.sh", "refused-2.sh", "a.sh")
    assert code == 1 and "refused-1.sh" in err and "refused-2.sh" in err
    assert all("--test-only" in call for call in sbatch())


def test_a_failure_in_the_middle_says_what_was_submitted(slurm, sbatch):
    for name in ("a", "late", "z"):
        Path(f"{name}.sh").write_text(GOOD)
    code, out, err = slurm("submit", "a.sh", "late.sh", "z.sh", "--json")
    assert code == 1 and "1 of 3 scripts were submitted, 2 not" in err and "temporarily unable" in err
    assert json.loads(out)["jobs"][0]["file"] == "a.sh"


def test_a_silent_controller_is_not_waited_for(slurm, sbatch, monkeypatch):
    monkeypatch.setattr(submission, "TEST_SECONDS", 0.3)
    Path("slow.sh").write_text(GOOD)
    code, _, err = slurm("submit", "slow.sh")
    assert code == 1 and "did not answer within 0.3 s" in err and "scontrol ping" in err


def test_without_slurm_the_message_says_where_to_go(slurm, here, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    Path("a.sh").write_text(GOOD)
    code, _, err = slurm("submit", "a.sh")
    assert code == 2 and "sbatch is not on PATH" in err and "login node" in err


def test_wrong_requests_of_submit(slurm, sbatch):
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("no script")
    assert slurm("submit")[0] == 2
    code, _, err = slurm("submit", "folder", "--dependency", " ")
    assert code == 2 and "use --experiment folder" in err and "is no dependency" in err
    for folder, said in (("folder", "holds no batch script"), ("nowhere", "is no folder")):
        code, _, err = slurm("submit", "--experiment", folder)
        assert code == 2 and said in err
    assert slurm("submit", "nowhere.sh")[0] == 2
    assert sbatch() == []


def test_variables_that_overrule_directives_are_named(slurm, sbatch, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    Path("a.sh").write_text(GOOD)
    assert "warning: SBATCH_PARTITION=debug" in slurm("submit", "a.sh")[2]


def test_every_point_of_a_rendered_experiment_is_submitted(slurm, sbatch):
    code, _, err = slurm("render", "--experiment", "figure_13", "--without", "recompute", "--mock-data", "--output-dir", "points")
    assert code == 0, err
    scripts = {str(path) for path in Path("points").glob("*.sh") if path.name != "submit-all.sh"}
    code, out, err = slurm("submit", "--experiment", "points", "--json")
    assert code == 0, err
    assert {job["file"] for job in json.loads(out)["jobs"]} == scripts and len(scripts) > 3


# -- the page


def test_the_page_has_every_rule():
    rows = re.findall(r"^\| `([a-z-]+)` \| (error|warning) \| (.+) \|$", PAGE, flags=re.M)
    assert rows == [(rule.id, rule.severity, rule.summary) for rule in RULES]


def test_the_page_shows_what_lint_prints(slurm, here):
    script, shown = re.search(r"```bash\n(#!/bin/bash\n.*?)```.*?```\n(\$ megactl slurm lint .*?)```", PAGE, flags=re.S).groups()
    Path("train.sh").write_text(script)
    command, _, printed = shown.partition("\n")
    _, out, err = slurm(*shlex.split(command)[3:])
    assert out + err == printed


def test_every_case_has_a_rule_on_the_page():
    assert all(f"`{case.rule}`" in PAGE for case in CASES)
