"""Rules on the file itself: line ends, characters, the first line, continuations, what is left open."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from megactl.cluster.lint.batch import Batch
from megactl.cluster.lint.findings import Hit, Rule
from megactl.cluster.quoting import shown

_SHELLS = re.compile(r"#!\s*(?:\S*/env\s+(?:-S\s+)?)?(?:\S*/)?(?:ba|z|k|da)?sh\b")
_PLACEHOLDER = re.compile(r"<(?:\.\.\.|[A-Za-z][\w .:/@+-]*[\w.])>")
_FILL_IN = re.compile(r"CHANGE_?ME|FIXME|\byour[_-]own[_-]\w+|\bYOUR_\w+")
# What word processors put in place of - ' " and the space.
_PASTED = re.compile(
    "[\u2010-\u2015\u2212\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00a0\u2007\u202f\u200b\u200c\u200d\u2060\ufeff]"
)
_ASCII_SIGN = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": "a space"}


def line_ends(batch: Batch) -> Iterator[Hit]:
    """sbatch refuses a script with "\\r\\n"; a lone carriage return becomes part of a word."""
    rows = batch.text.split("\n")
    broken = [number for number, row in enumerate(rows, start=1) if "\r" in row]
    if broken:
        value = f"{len(broken)} of {len(rows)} lines end in a carriage return" if len(broken) > 1 else "a carriage return"
        yield Hit(broken[0], value, "sbatch refuses scripts with DOS line ends", "run `sed -i 's/\\r$//' FILE`, or dos2unix")


def byte_order_mark(batch: Batch) -> Iterator[Hit]:
    """Written by some editors; sbatch wants #! as the first two bytes."""
    if batch.text.startswith("\ufeff"):
        yield Hit(1, "a byte order mark", "sbatch wants #! as the first two bytes", "save the file as UTF-8 without a byte order mark")


def nul_bytes(batch: Batch) -> Iterator[Hit]:
    """sbatch refuses them."""
    at = batch.text.find("\0")
    if at >= 0:
        yield Hit(batch.text.count("\n", 0, at) + 1, "a NUL byte", "sbatch refuses a script that holds one", "save the file as plain text")


def shebang(batch: Batch) -> Iterator[Hit]:
    """The first line must name an interpreter."""
    first = batch.lines[0].lstrip("\ufeff")
    if batch.is_job and not re.match(r"#!\s*\S", first):
        yield Hit(1, shown(first), "sbatch wants #! and an interpreter in the first line", "begin the file with #!/bin/bash")


def interpreter(batch: Batch) -> Iterator[Hit]:
    """`set -o pipefail`, arrays and [[ are not in /bin/sh everywhere."""
    first = batch.lines[0].lstrip("\ufeff")
    plain = re.match(r"#!\s*(?:/usr)?/bin/(?:da)?sh\b", first)
    if plain and batch.mentions(r"(?m)\bpipefail\b|^\[\[ "):
        yield Hit(1, first.strip(), "is dash on Debian and Ubuntu, which lacks pipefail and [[", "use #!/bin/bash")
    if _SHELLS.match(first) and re.match(r"#!\s*\S+\s+\S+\s+\S", first) and "env" not in first:
        rule = "the kernel hands all that stands behind the interpreter over as one word"
        yield Hit(1, first.strip(), rule, "use #!/bin/bash, and `set` below")


def pasted_characters(batch: Batch) -> Iterator[Hit]:
    """Dashes and quotes of documents look right and mean nothing to sbatch and bash."""
    comments = {comment.line: comment.text for comment in batch.parsed.comments}
    for number, row in enumerate(batch.lines, start=1):
        code = row.removesuffix(comments.get(number, "")) if not row.startswith("#SBATCH") else row
        if number in batch.heredoc_lines or code.isascii():
            continue
        # Inside quotes they may be meant: a title, a message.
        bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", code)
        match = _PASTED.search(bare)
        if match and not (number == 1 and match.start() == 0 and match[0] == "\ufeff"):
            letter = match[0]
            name = unicodedata.name(letter, "character").lower()
            dash = any(word in name for word in ("dash", "hyphen", "minus"))
            sign = _ASCII_SIGN.get(letter, "-" if dash else "nothing or a space")
            rule = "is pasted from a document and means nothing to sbatch or bash"
            yield Hit(number, f"U+{ord(letter):04X} ({name})", rule, f"type {sign}")


def broken_continuation(batch: Batch) -> Iterator[Hit]:
    """`\\` continues a line only where the line ends right behind it."""
    comments = {comment.line for comment in batch.parsed.comments}
    for number, row in enumerate(batch.lines, start=1):
        if number not in batch.heredoc_lines and number not in comments and re.search(r"(?<!\\)(?:\\\\)*\\[ \t]+$", row):
            rule = "the line does not go on, and the next one is a command of its own"
            yield Hit(number, "a blank behind \\", rule, "delete the blanks at its end")


def comment_in_command(batch: Batch) -> Iterator[Hit]:
    """A comment ends the command, and a backslash inside a comment continues nothing."""
    for comment in batch.parsed.comments:
        if comment.continued:
            rule = "ends the command above, and what follows is a command of its own"
            cure = "take the comment out of the continued lines, or use an array: ARGS=( ... )"
            yield Hit(comment.line, shown(comment.text.strip()), rule, cure)


def option_as_command(batch: Batch) -> Iterator[Hit]:
    """The line above lacks its backslash (or has a blank behind it)."""
    for command in batch.commands:
        if command.words and re.match(r"--?[A-Za-z]", command.words[0].raw):
            rule = "is run as a command of its own"
            yield Hit(command.line, shown(command.words[0].text), rule, "end the line above in \\, with nothing behind it")


def unclosed(batch: Batch) -> Iterator[Hit]:
    """Quotes, parentheses and here-documents that never end."""
    for line, opened in batch.parsed.unclosed:
        if opened.startswith("<<"):
            cure = f"put {opened[2:]} alone on a line, without blanks around it (behind <<- tabs may stand before it)"
            yield Hit(line, opened, "the here-document never ends", cure)
        else:
            yield Hit(line, opened, "is opened here and never closed", "close it")


def placeholders(batch: Batch) -> Iterator[Hit]:
    """Values in angle brackets that a template wants filled in. In a command the brackets would be redirections."""
    for option in batch.options:
        row = batch.lines[option.line - 1]
        match = _PLACEHOLDER.search(row) or _FILL_IN.search(option.value or "")
        if match:
            yield Hit(option.line, shown(match[0]), "is left to be filled in", "write the value of your cluster")
    comments = {comment.line: comment.text for comment in batch.parsed.comments}
    for number, row in enumerate(batch.lines, start=1):
        code = row.removesuffix(comments[number]) if number in comments else row
        # In quotes it may be meant: markup, a message.
        match = None if number in batch.heredoc_lines else _PLACEHOLDER.search(re.sub(r"\s(\"[^\"]*\"|'[^']*')", " ", code))
        if match:
            rule = "is left to be filled in (bash reads < and > as redirections)"
            yield Hit(number, shown(match[0]), rule, "write the value of your cluster")


RULES = (
    Rule("crlf", "error", "DOS line ends, which sbatch refuses", line_ends),
    Rule("bom", "error", "a byte order mark before #!", byte_order_mark),
    Rule("nul", "error", "a NUL byte, which sbatch refuses", nul_bytes),
    Rule("shebang", "error", "no #! in the first line, which sbatch refuses", shebang),
    Rule("interpreter", "warning", "#!/bin/sh for a script in bash, or more than one argument behind the interpreter", interpreter),
    Rule("pasted-characters", "error", "dashes, quotes and blanks pasted from a document", pasted_characters),
    Rule("broken-continuation", "error", "blanks behind a backslash at a line's end", broken_continuation),
    Rule("comment-in-command", "error", "a comment between continued lines, which ends the command", comment_in_command),
    Rule("option-as-command", "error", "a line that begins with an option: the backslash above is missing", option_as_command),
    Rule("unclosed", "error", "a quote, parenthesis or here-document that never ends", unclosed),
    Rule("placeholder", "error", "`<...>` and the like left to be filled in", placeholders),
)
