"""Rules on #SBATCH lines: are they read at all, does sbatch know them, and do they say what was meant?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megactl.cluster.lint.batch import Batch
from megactl.cluster.lint.directives import Option, is_code
from megactl.cluster.lint.findings import Hit, Rule
from megactl.cluster.quoting import shown
from megactl.cluster.slurm_options import PYXIS, letters, options
from megactl.config.names import nearest

_NEARLY = re.compile(r"\s*#+\s*(S?B?A?T?C?H?\w{4,7}):?\s*(--?[A-Za-z]\S*)", re.IGNORECASE)
# Given again they add up or replace one another on purpose.
_REPEATABLE = frozenset(("constraint", "export", "verbose", "gres", "comment"))
_EXPANDS = re.compile(r"\$[\w{(]|`|(?:^|=)~")


def after_command(batch: Batch) -> Iterator[Hit]:
    """sbatch stops reading directives at the first line that is neither blank nor a comment."""
    for line in batch.ignored:
        text = batch.lines[line - 1].strip()
        rule = f"is ignored: sbatch reads directives up to the first command, in line {batch.first_line - 1 + (batch.first_code or 0)}"
        yield Hit(line, shown(text), rule, "move it above that line")


def no_directive(batch: Batch) -> Iterator[Hit]:
    """Lines that look like directives and are plain comments to sbatch: `#SBTACH`, `#sbatch`, a blank in front."""
    for number, row in _lookalikes(batch):
        word = row.split("-")[0].strip(" \t#:")
        if row.startswith("#SBATCH"):
            continue
        if word == "SBATCH" and not row.startswith("#"):
            yield Hit(number, shown(row.strip()), "is a comment to sbatch: a blank stands before #SBATCH", "begin the line with #SBATCH")
        elif word != "SBATCH" and (word.upper() == "SBATCH" or nearest(word.upper(), ["SBATCH"])):
            yield Hit(number, shown(row.strip()), "is a comment to sbatch, which reads #SBATCH only", "write #SBATCH")


def switched_off(batch: Batch) -> Iterator[Hit]:
    """`##SBATCH` and `# SBATCH`: often on purpose, sometimes not."""
    for number, row in _lookalikes(batch):
        if re.match(r"#(?:#+\s*|\s+#*\s*)SBATCH\b", row):
            yield Hit(number, shown(row.strip()), "is a comment to sbatch", "write #SBATCH to switch it on, or delete it")


def _lookalikes(batch: Batch) -> Iterator[tuple[int, str]]:
    for number, row in enumerate(batch.lines, start=1):
        if number > 1 and not is_code(row) and _NEARLY.match(row):
            yield number, row


def no_space(batch: Batch) -> Iterator[Hit]:
    """`#SBATCH--nodes=2` is read today; nothing says that it will be."""
    for number, row in enumerate(batch.lines, start=1):
        if re.match(r"#SBATCH-", row) and number not in batch.ignored:
            yield Hit(number, shown(row), "has no blank behind #SBATCH, which sbatch reads but does not document", "put a blank there")


def unknown_option(batch: Batch) -> Iterator[Hit]:
    """Options that sbatch refuses: misspelt, srun's own, or shortened so far that several fit."""
    for option in _refused(batch, "unknown", "ambiguous"):
        name, known = option.name.lstrip("-"), {**options("sbatch"), **dict.fromkeys(PYXIS, "value")}
        close = nearest(name, known)
        if option.fault == "ambiguous":
            candidates = ", ".join(f"--{item}" for item in known if item.startswith(name))
            yield Hit(option.line, option.written, f"may be {candidates}", "write it out")
        elif option.written[:2] != "--" and name not in letters("srun"):
            yield Hit(option.line, option.written, f"sbatch has no option {option.name}", _single_dash(option, known))
        elif name in options("srun") or name in letters("srun"):
            yield Hit(option.line, option.written, "is an option of srun, and sbatch refuses it", "move it to the srun command")
        elif close:
            yield Hit(option.line, option.written, f"sbatch has no option --{name}", f"did you mean --{close}?")


def _single_dash(option: Option, known: dict[str, str]) -> str:
    name = option.written.lstrip("-").partition("=")[0]
    close = name if name in known else nearest(name, known)
    return f"did you mean --{close}? (long options begin with two dashes)" if close else "see man sbatch"


def site_option(batch: Batch) -> Iterator[Hit]:
    """Options that only a plugin of the site can know; sbatch refuses them elsewhere."""
    known = {**options("sbatch"), **options("srun"), **dict.fromkeys(PYXIS, "value")}
    for option in _refused(batch, "unknown"):
        name = option.name.lstrip("-")
        if option.written.startswith("--") and name not in known and not nearest(name, known):
            yield Hit(option.line, option.written, "sbatch has no such option of its own", "see whether a plugin of your cluster adds it")


def malformed(batch: Batch) -> Iterator[Hit]:
    """Directives that sbatch cannot split into options and values."""
    for option in _refused(batch, "stray", "no-value", "unwanted-value", "unmatched", "colon"):
        where = shown(option.written)
        if option.fault == "stray":
            known = option.name.partition("=")[0] in options("sbatch")
            cure = f"did you mean --{option.name}?" if known else "quote values that hold blanks"
            yield Hit(option.line, where, "is neither an option nor a value, and sbatch refuses the script", cure)
        elif option.fault == "no-value":
            yield Hit(option.line, where, "needs a value", f"write {option.written}=VALUE")
        elif option.fault == "unwanted-value":
            yield Hit(option.line, where, "takes no value, and sbatch refuses one", f"write --{option.name}")
        elif option.fault == "unmatched":
            yield Hit(option.line, where, "a quote is not closed", "close it")
        else:
            yield Hit(option.line, where, "sbatch refuses the colon", "write #SBATCH and a blank")
    for option in batch.options:
        if option.fault is None and option.value is not None and _equals_slip(option):
            yield Hit(option.line, shown(option.written), f"its value is read as {option.value or 'nothing'!r}", _without_equals(option))


def _equals_slip(option: Option) -> bool:
    short = not option.written.startswith("--")
    return _one_dash_short(option) or option.value in ("", "=") or (short and (option.value or "").startswith("="))


def _one_dash_short(option: Option) -> bool:
    """`-partition=gpu`, which getopt reads as -p with the value "artition=gpu"."""
    name = option.written[1:].partition("=")[0]
    return not option.written.startswith("--") and len(name) > 2 and name in options("sbatch")


def _without_equals(option: Option) -> str:
    if _one_dash_short(option):
        return f"write -{option.written}: long options begin with two dashes"
    if option.written.startswith("--"):
        return f"write --{option.name}=VALUE without blanks around ="
    return f"write {option.written[:2]} {(option.value or '').lstrip('=')}: only long options take ="


def _refused(batch: Batch, *faults: str) -> Iterator[Option]:
    return (option for option in batch.options if option.fault in faults)


def cut_by_comment(batch: Batch) -> Iterator[Hit]:
    """A # inside an unquoted value begins a comment."""
    for option in batch.options:
        if option.cut is not None:
            rule = f"sbatch reads {option.written}, and the rest as a comment"
            yield Hit(option.line, f"{option.written}{option.cut}", rule, "quote the value")


def variable_in_directive(batch: Batch) -> Iterator[Hit]:
    """Directives are not expanded: `$HOME`, `~` and `$(date)` stay as they are written."""
    for option in batch.options:
        expands = option.value is not None and not batch.expanded and _EXPANDS.search(option.value)
        if expands and option.name != "wrap":
            patterns = option.name in ("output", "error", "input", "job-name")
            out = "write it out" + (" (sbatch knows %x job name, %j job, %A_%a array, %u user)" if patterns else "")
            rule = "sbatch expands no variables, and takes this as it stands"
            yield Hit(option.line, shown(option.written), rule, f"{out}, or give it to sbatch on the command line")


def repeated(batch: Batch) -> Iterator[Hit]:
    """Of an option that is given twice the last counts."""
    seen: dict[str, Option] = {}
    for option in batch.options:
        before = seen.get(option.name)
        if option.fault is None and before is not None and option.name not in _REPEATABLE and before.value != option.value:
            rule = f"{before.written} in line {before.line + batch.first_line - 1} says otherwise, and the last one counts"
            yield Hit(option.line, shown(option.written), rule, "delete one of them")
        if option.fault is None:
            seen[option.name] = option
    if "requeue" in seen and "no-requeue" in seen:
        first, later = sorted((seen["requeue"], seen["no-requeue"]), key=lambda option: option.line)
        yield Hit(later.line, later.written, f"contradicts {first.written}", "delete one of them")


RULES = (
    Rule("directive-after-command", "error", "#SBATCH below the first command, where sbatch ignores it", after_command),
    Rule("no-directive", "error", "a misspelt or indented #SBATCH, a comment to sbatch", no_directive),
    Rule("switched-off-directive", "warning", "`##SBATCH` or `# SBATCH`, a comment to sbatch", switched_off),
    Rule("no-space", "warning", "`#SBATCH--nodes=2`", no_space),
    Rule("unknown-option", "error", "an option that sbatch refuses: misspelt, ambiguous, or srun's", unknown_option),
    Rule("site-option", "warning", "an option that only a plugin of the site can know", site_option),
    Rule("malformed-directive", "error", "a stray word, a missing value, `-N=2`, a quote left open", malformed),
    Rule("cut-by-comment", "error", "a # inside a value, which cuts it off", cut_by_comment),
    Rule("variable-in-directive", "error", "`$NAME`, `~` or `$(...)` in a directive, which sbatch does not expand", variable_in_directive),
    Rule("repeated-option", "warning", "an option given twice with different values", repeated),
)
