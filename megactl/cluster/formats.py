"""The texts that Slurm and pyxis read: one small function a format. Each returns the rule that a text breaks and an example, or None."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from megactl.config.slurm import expand_hosts
from megactl.errors import ConfigError

Broken = tuple[str, str] | None

_MOST_MINUTES = 2**32 - 16  # the last values mean "no limit" and the like
_SIGNALS = {"HUP": 1, "INT": 2, "USR1": 10, "USR2": 12, "TERM": 15}
_MAIL = {"NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "ARRAY_TASKS",
         "TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50"}  # fmt: skip
# Set by the script for every rank; another value would break the rendezvous.
_RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
# The end of the name tells: TOKENIZERS_PARALLELISM is none.
_SECRET = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?)$", re.IGNORECASE)
PLACEHOLDER = re.compile(r"<[^<>]*>")


def seconds_of(text: str) -> int | None:
    """A time limit of Slurm in seconds; None for UNLIMITED. Raises ValueError for a text that is none.

    minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds (man sbatch, --time).
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if match is None:
        raise ValueError(text)
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def clock(seconds: int | None) -> str:
    """A time limit in the one form that nobody misreads: [D-]HH:MM:SS. (A bare number is minutes to Slurm.)"""
    if seconds is None:
        return "UNLIMITED"
    days, rest = divmod(seconds, 86_400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text


def _time(text: str) -> Broken:
    example = "such as 30 (minutes), 24:00:00 or 2-12"
    try:
        seconds = seconds_of(text)
    except ValueError:
        return "must be minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS", example
    if seconds is not None and seconds // 60 >= _MOST_MINUTES:
        return "Slurm counts minutes in 32 bits", example
    return ("must be above zero", example) if seconds == 0 else None


def _memory(text: str) -> Broken:
    match = re.fullmatch(r"(\d+)([KMGT]?)", text, re.ASCII)
    if match is not None:
        return None
    almost = re.fullmatch(r"(\d+) ?([kmgtKMGT])(i?[bB])?", text, re.ASCII)
    return (
        "must be a whole number and K, M, G or T",
        f"use {almost[1]}{almost[2].upper()}" if almost else "such as 500G, or 0 for all of it",
    )


def _nodes(text: str) -> Broken:
    example = "such as node[01-04],node7"
    try:
        hosts = list(expand_hosts(text))
    except ConfigError as error:
        return error.problems[0].rule, example
    if not hosts or not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", host, re.ASCII) for host in hosts):
        return "must be host names, with ranges in brackets", example
    return None


def signal_seconds(text: str) -> int:
    """Seconds before the time limit at which a valid --signal is sent; 0 for none."""
    return 0 if text == "none" else int(text.rpartition("@")[2])


def _signal(text: str) -> Broken:
    example = "such as USR2@180, or none"
    if text == "none":
        return None
    if text.startswith("B:"):
        return "B: sends it to the batch shell alone, and the ranks would never see it", f"use {text[2:]}"
    match = re.fullmatch(r"(?:R:)?(?:SIG)?([A-Z0-9]+)@(\d+)", text, re.ASCII)
    if match is None:
        return "must be NAME@SECONDS", example
    if match[1] not in _SIGNALS and match[1] not in map(str, _SIGNALS.values()):
        return f"the trainer saves and stops on {', '.join(_SIGNALS)}, and {match[1]} would end it without a save", example
    return ("Slurm takes 0 to 65535 seconds", example) if int(match[2]) > 65535 else None


def _array(text: str) -> Broken:
    item = r"\d+(?:-\d+(?::\d+)?)?"
    if not re.fullmatch(rf"{item}(?:,{item})*(?:%\d+)?", text, re.ASCII):
        return "must be task numbers and %1", "such as 0-9%1"
    if not text.endswith("%1"):
        return "its jobs go on with one run, so one may run at a time", f"use {text.partition('%')[0]}%1; several runs are --sweep"
    return None


def _mail_type(text: str) -> Broken:
    unknown = [part for part in text.split(",") if part.upper() not in _MAIL]
    return (f"Slurm has no mail type {unknown[0]}", "use END,FAIL, or ALL") if unknown else None


def _variable(text: str) -> Broken:
    name, equals, _ = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
        return "must be NAME=VALUE", "such as NCCL_SOCKET_IFNAME=ib0"
    if name in _RENDEZVOUS:
        return f"{name} is set by the script for all ranks alike", "leave it out"
    if name.startswith("SLURM_"):
        return "variables of Slurm's own are Slurm's to set", "leave it out"
    if _SECRET.search(name):
        return "a secret must not be written into a script", f"export {name} before you submit: sbatch passes the environment on"
    return None


def _mount(text: str) -> Broken:
    example = "such as /scratch/corpus:/data:ro"
    if not re.fullmatch(r"[^:,]+:/[^:,]*(:[a-z+]+)?", text):
        return "must be SRC:DST or SRC:DST:FLAGS, DST a whole path, without commas", example
    return _path(text)


def _path(text: str) -> Broken:
    if text.startswith("~") or "$" in text:
        return "stands quoted in the script, where ~ and $ are not expanded", "write the whole path"
    if text.startswith("-"):
        return "must not begin with a dash, which would make it an option", f"use ./{text}"
    return None


def _command(text: str) -> Broken:
    try:
        found = shlex.split(text)
    except ValueError as error:
        return f"cannot be read as words: {error}", "such as 'python -m megactl'"
    if not found or found[0].startswith("-"):
        return "must begin with a program", "such as /opt/env/bin/megactl, or 'python -m megactl'"
    return None


def _module(text: str) -> Broken:
    good = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+@/-]*", text, re.ASCII)
    return None if good else ("must be the name of one module", "such as cuda/12.8; repeat --module for more")


def _word(text: str) -> Broken:
    good = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text, re.ASCII)
    return None if good else ("must be letters, digits and _ . -", "such as gpt-7.5b")


FORMATS: dict[str, Callable[[str], Broken]] = {
    "job_name": _word,
    "gpu_type": _word,
    "time": _time,
    "memory": _memory,
    "signal": _signal,
    "nodelist": _nodes,
    "exclude": _nodes,
    "array": _array,
    "mail_type": _mail_type,
    "modules": _module,
    "venv": _path,
    "log_dir": _path,
    "chdir": _path,
    "command": _command,
    "environment": _variable,
    "container_mounts": _mount,
}

# Settings that stand in #SBATCH lines; the others stand in shell commands, where quoting makes any printable text safe.
DIRECTIVES = ("job_name", "account", "partition", "qos", "reservation", "constraint", "gpu_type", "memory", "time", "signal",
              "nodelist", "exclude", "array", "mail_user", "mail_type", "log_dir", "chdir")  # fmt: skip
