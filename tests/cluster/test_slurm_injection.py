"""Hostile text in every setting of render: it is refused by name, or stands in the script as exactly one word and runs nothing."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Callable

import pytest

from megactl.cluster.lint.directives import read_directives
from megactl.cluster.settings import slurm_settings
from megactl.config.settings import Setting, all_settings

# Any of these that a shell runs leaves a file.
MARK = "touch canary"
ATOMS = (
    f"$({MARK})", f"`{MARK}`", f"; {MARK}", f"\n{MARK}\n", f"\r{MARK}", f"\r\n{MARK}", f" && {MARK} #", f"| {MARK}", f"& {MARK} &",
    f"'; {MARK}; '", f'"; {MARK}; "', f"'\"; {MARK}; \"'", f"\\'; {MARK} #", f"$'\\n{MARK}\\n'", f"${{x:=$({MARK})}}", f"<({MARK})",
    "\n#SBATCH --nodes=64\n", "\n#SBATCH --wrap='touch canary'", "#SBATCH --exclusive", " --wrap=id", "--uid=0", "-x", "-", "--", "*",
    "?[a-z]",
    "{a,b}", "~", "~root", "!!", "!1", "$HOME", "${PATH}", "$((1/0))", "$PATH", "%j", "%x", "a b", "\t", "\v", "\f", "\b", "\x1b]0;t\x07",
    "\x7f", "\0", "\u2028", "\u2029", "\x85", "\u00a0", "\u202e", "\ufeff", "\ud800", "é", "日本", "\U0001f525", "\\", "\\\n", "#", " # c",
    "{{ 7*7 }}", "{% include '/etc/passwd' %}", "{# #}", "\nEOF\n", "<<EOF", ">canary", "2>canary", "=", ",", ":", "@", "''", '""', "'",
    '"',     "%s%n", "../../canary", "/dev/null", "1" * 300, "A" * 5000, "ł" * 200, "(", ")", "[", "]", "$(", "`", "${",
)  # fmt: skip
PLAIN = (
    "gpu",
    "a",
    "1",
    "node1",
    "/data/x",
    "x.sqsh",
    "1:00:00",
    "16G",
    "USR1@60",
    "0-3",
    "A=1",
    "/a:/b",
    "comment=x",
    "mpi=pmix",
    "megactl",
)
# What stands before the text where the setting has a form of its own, so that the text comes as far as the script.
FORMS = {
    "slurm.environment": "VALUE=", "slurm.container_mounts": "/data:/", "slurm.sbatch": "comment=", "slurm.srun": "mpi=",
    "slurm.command": "megactl ",
    "slurm.venv": "/", "slurm.chdir": "/", "slurm.log_dir": "logs/", "slurm.container_workdir": "/",
}  # fmt: skip
TEXTS = [
    item for item in (*all_settings().values(), *slurm_settings().values()) if item.type in (str, tuple) and not item.choices and item.flags
]
# What a setting needs beside it, or it would be refused for the lack of that.
BESIDE = {
    "data.data": (), "data.data_cache": ("--data", "corpus"), "slurm.gpu_type": ("--mock-data", "--gpus-per-node", "2", "--device", "cuda"),
    "slurm.container_mounts": ("--mock-data", "--container-image", "x.sqsh"),
    "slurm.container_workdir": ("--mock-data", "--container-image", "x.sqsh"),
}  # fmt: skip
RUN = ("--layers", "1", "--hidden", "8", "--heads", "1", "--seq-length", "8", "--vocab", "64", "--mbs", "1", "--gbs", "4", "--dp", "4")
WHERE = ("--nodes", "2", "--gpus-per-node", "0", "--ntasks-per-node", "2", "--device", "cpu")


def hostile(number: int) -> tuple[Setting, str]:
    """Setting and text of one case: every setting meets every atom sooner or later, alone and among others."""
    chance = random.Random(number)
    setting = TEXTS[number % len(TEXTS)]
    atom = ATOMS[(number // len(TEXTS) * 7 + number) % len(ATOMS)]
    shape = chance.randrange(4)
    text = (atom, f"{chance.choice(PLAIN)}{atom}", f"{atom}{chance.choice(PLAIN)}", f"{chance.choice(ATOMS)}{atom}{chance.choice(ATOMS)}")[
        shape
    ]
    return setting, (FORMS.get(setting.name, "") if chance.random() < 0.7 else "") + text


def names(setting: Setting) -> tuple[str, ...]:
    """What a message may call the setting."""
    return (*setting.flags, setting.name, setting.key)


def asked(text: str) -> list[tuple[str, str | None]]:
    """(option, value) of the script's directives, as sbatch reads them."""
    options, ignored = read_directives(text.split("\n"))
    assert ignored == []
    assert all(option.fault is None and option.cut is None for option in options), options
    return [(option.name, option.value) for option in options]


def holds(setting: Setting, value: str, script: str, ran) -> bool:
    """Whether the value arrived, whole, where it belongs."""
    directives = dict(asked(script))
    srun = [word for call in ran.of("srun") for word in call]
    if setting.name in DIRECTIVES:
        arrived = directives[DIRECTIVES[setting.name]].removeprefix("gpu:")
        # The folder may itself end in /%x: only the file's name is taken off.
        return (re.sub(r"/%x[^/]*$", "", arrived) if setting.name == "slurm.log_dir" else arrived) == value.rstrip("/")
    if setting.name == "slurm.gpu_type":
        return directives["gpus-per-node"] == f"{value}:2"
    if setting.name == "slurm.sbatch":
        name, equals, rest = value.partition("=")
        return directives[name] == (rest if equals else None)
    if setting.name == "slurm.environment":
        name, _, rest = value.partition("=")
        return ran.environment.get(name) == rest
    if setting.name == "slurm.command":
        words = shlex.split(value)
        return any(srun[at : at + len(words)] == words for at in range(len(srun))) or ran.code != 0
    if setting.name == "slurm.venv":
        return f". {shlex.quote(value)}/bin/activate" in script
    if setting.name == "slurm.modules":
        return value in [word for call in ran.of("module") for word in call]
    if setting.name == "slurm.srun":
        return f"--{value}" in srun
    if setting.name == "slurm.container_mounts":
        return f"--container-mounts={value}" in srun
    return any(word == value or word.endswith(f"={value}") for word in srun)


DIRECTIVES = {
    "slurm.job_name": "job-name", "slurm.account": "account", "slurm.partition": "partition", "slurm.qos": "qos", "slurm.time": "time",
    "slurm.reservation": "reservation", "slurm.constraint": "constraint", "slurm.memory": "mem", "slurm.nodelist": "nodelist",
    "slurm.exclude": "exclude", "slurm.array": "array", "slurm.mail_user": "mail-user", "slurm.mail_type": "mail-type",
    "slurm.log_dir": "output", "slurm.chdir": "chdir", "slurm.signal": "signal",
}  # fmt: skip


def case(number: int, slurm: Callable, cluster, baseline: list[tuple[str, str | None]]) -> str:
    """Render one case and run what came of it. Returns "refused", or "ran"."""
    setting, value = hostile(number)
    beside = BESIDE.get(setting.name, ("--mock-data",))
    code, out, err = slurm("render", *RUN, *WHERE, *beside, f"{setting.flags[0]}={value}")
    if code != 0:
        assert code == 2 and out == "" and "unexpected" not in err, (number, setting.name, value, err)
        # A name that is too long for a file is shown itself.
        assert any(name in err for name in (*names(setting), "File name too long")), (number, setting.name, value, err)
        return "refused"
    options = asked(out)
    extra = [name for name, _ in options if name not in {name for name, _ in baseline}]
    own = DIRECTIVES.get(setting.name, value.partition("=")[0] if setting.name == "slurm.sbatch" else "gpus-per-node")
    assert extra in ([], [own]), (number, setting.name, value, extra)
    ran = cluster.run(out)
    assert not list(cluster.folder.glob("**/canary*")) and {call[0] for call in ran.calls} <= {"srun", "scontrol", "module"}, (
        number,
        value,
    )
    assert len(ran.of("srun")) <= 1, (number, value)
    # A folder whose name no file system takes ends the script before srun.
    if "File name too long" not in ran.stderr:
        assert holds(setting, value, out, ran), (number, setting.name, value, ran.stderr, ran.of("srun"))
    return "ran"


def run_cases(numbers: range, slurm: Callable, cluster) -> dict[str, int]:
    """How many of the cases ended in which way."""
    code, out, err = slurm("render", *RUN, "--mock-data", *WHERE)
    assert code == 0, err
    counts = {"refused": 0, "ran": 0}
    for number in numbers:
        counts[case(number, slurm, cluster, asked(out))] += 1
    return counts


def test_hostile_text_is_refused_or_stays_one_word(slurm, cluster):
    counts = run_cases(range(200), slurm, cluster)
    assert counts["refused"] > 50 and counts["ran"] > 20, counts


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_two_thousand_hostile_texts(slurm, cluster):
    counts = run_cases(range(200, 2200), slurm, cluster)
    assert counts["refused"] > 500 and counts["ran"] > 200, counts


def test_the_stand_ins_would_notice_an_injection(slurm, cluster):
    """The same script with a value put in unquoted leaves the mark: the check can fail."""
    _, out, _ = slurm("render", *RUN, "--mock-data", *WHERE, "--run-dir", "PLACE")
    cluster.run(out.replace("run_dir=PLACE", f"run_dir=$({MARK})"))
    assert (cluster.folder / "canary").exists()
    assert ("exclusive", None) in asked(out.replace("#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --exclusive"))
