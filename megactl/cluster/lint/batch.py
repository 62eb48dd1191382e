"""A batch script as the rules see it: its directives, its commands, what variables hold, how many nodes, tasks and GPUs it asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megactl.cluster.lint.directives import Option, Piece, first_code_line, read_directives, take_options
from megactl.cluster.lint.shell import parse
from megactl.cluster.lint.syntax import Assignment, Command, Parsed

# What a variable may hold here: a script that doubles a variable in each line must not take quadratic time.
_LONGEST_VALUE = 4096
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?:\[[@*]\])?(?::?-([^{}]*))?\}|(\w+))")
_WRAPPERS = frozenset(("exec", "nohup", "time", "command", "env", "stdbuf", "timeout", "numactl", "nice"))
TORCHRUN = re.compile(r"(?<![\w.-])(?:torchrun|torch\.distributed\.(?:run|launch))(?![\w.])")
# Launchers that start one process a GPU of their node by themselves, so that one task a node is right.
NODE_LAUNCHERS = re.compile(
    r"(?<![\w.-])(?:torchrun|torch\.distributed\.(?:run|launch)|accelerate(?: launch)?|deepspeed|lightning|composer"
    r"|megactl(?: -\S+)* train)(?![\w.])"
)
MEGACTL = re.compile(r"(?<![\w.-])megactl(?: -\S+)* train(?!\w)")
TRAINS = re.compile(NODE_LAUNCHERS.pattern + r"|(?<![\w.])python[\d.]*\s(?!-c\s)[^|;]*(?:\.py\b|-m\s)")
SPREADERS = re.compile(r"(?<![\w.-])(?:srun|mpirun|mpiexec|pdsh|clush|ssh|deepspeed|sbatch|ray)(?![\w.])")


@dataclass(frozen=True)
class Srun:
    """One srun. `options` are its own, variables filled in; `complete` is False where a variable among them is not known here;
    `program` is the rest of its words, joined."""

    command: Command
    options: tuple[Option, ...]
    complete: bool
    program: str
    first_program_word: int

    def value(self, *names: str) -> str | None:
        """Value of the last of the options `names`; "" for an option without a value."""
        return next((option.value or "" for option in reversed(self.options) if option.name in names and not option.fault), None)


@dataclass(frozen=True, eq=False)
class Batch:
    """One script. `folder` is where a relative path of its directives begins (None: unknown); `expanded` says that it is the body of a
    here-document whose variables the surrounding script fills in."""

    text: str
    folder: Path | None = None
    first_line: int = 1
    expanded: bool = False
    lines: list[str] = field(init=False)
    parsed: Parsed = field(init=False)
    options: list[Option] = field(init=False)
    ignored: list[int] = field(init=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "lines", self.text.replace("\r\n", "\n").split("\n"))
        set_(self, "parsed", parse(self.text.replace("\r\n", "\n")))
        options, ignored = read_directives(self.lines)
        set_(self, "options", options)
        set_(self, "ignored", [line for line in ignored if line not in self.heredoc_lines])

    # -- directives ----------------------------------------------------------------------------------------------------------------------

    @property
    def first_code(self) -> int | None:
        """Line of the first command."""
        return first_code_line(self.lines)

    def option(self, *names: str) -> Option | None:
        """The last directive among `names` that sbatch accepts: the one that counts."""
        return next((option for option in reversed(self.options) if option.name in names and option.fault is None), None)

    def number(self, *names: str) -> int | None:
        """The value of a directive as a whole number; None where it is absent or something else."""
        option = self.option(*names)
        return int(option.value) if option is not None and option.value and option.value.isdecimal() else None

    @property
    def is_job(self) -> bool:
        """Whether it is meant for sbatch: it has directives, or lines that were meant as such."""
        return bool(self.options or self.ignored)

    @cached_property
    def nodes(self) -> int | None:
        """Nodes asked for; 1 where nothing says another number; None where it is a range or cannot be read."""
        option = self.option("nodes")
        if option is None:
            return None if self.option("ntasks", "nodelist", "gpus") else 1
        return self.number("nodes")

    @cached_property
    def gpus_per_node(self) -> int | None:
        """GPUs a node: --gpus-per-node, --gres=gpu:N, or --gpus-per-task times the tasks; 0 where none is asked for; None if unclear."""
        found = [count for option in self.options if (count := gpus_of(option)) is not None]
        if found:
            return found[-1]
        per_task = self.option("gpus-per-task")
        if per_task is not None:
            count, tasks = _count(per_task.value or ""), self.tasks_per_node
            return count * tasks if count is not None and tasks is not None else None
        return None if self.option("gpus", "gres", "tres-per-task", "gpus-per-socket") else 0

    @cached_property
    def tasks_per_node(self) -> int | None:
        """Tasks a node; 1 where nothing is said; None if unclear."""
        per_node, total = self.option("ntasks-per-node"), self.option("ntasks")
        if per_node is not None:
            return self.number("ntasks-per-node")
        if total is not None:
            count, nodes = self.number("ntasks"), self.nodes
            return count // nodes if count and nodes and count % nodes == 0 else None
        return None if self.option("ntasks-per-gpu") else 1

    @cached_property
    def heredoc_lines(self) -> frozenset[int]:
        """Numbers of the lines that are the text of a here-document, its end included."""
        heredocs = [heredoc for command in self.commands for heredoc in command.heredocs]
        return frozenset(line for item in heredocs for line in range(item.line, item.line + item.body.count("\n") + 1))

    # -- commands ------------------------------------------------------------------------------------------------------------------------

    @property
    def commands(self) -> tuple[Command, ...]:
        """Simple commands in order."""
        return self.parsed.commands

    @cached_property
    def assignments(self) -> list[tuple[Assignment, Command]]:
        """Every NAME=value, also behind export and declare, with the command it stands in."""
        return [(assignment, command) for command in self.commands for assignment in command.assignments]

    @cached_property
    def variables(self) -> dict[str, str]:
        """What the script's variables hold at its end, as far as that can be read without running anything."""
        held: dict[str, str] = {}
        for assignment, _ in self.assignments:
            value = _fill(assignment.value.text, held)
            before = held.get(assignment.name, "") + (" " if assignment.elements else "") if assignment.append else ""
            held[assignment.name] = (before + value)[:_LONGEST_VALUE]
        return held

    def fill(self, text: str) -> str:
        """`text` with the script's variables filled in (twice, since a variable may hold another one's name)."""
        return _fill(_fill(text, self.variables), self.variables)

    @cached_property
    def sruns(self) -> list[Srun]:
        """Every srun of the script, also where it stands in a variable (`$LAUNCH`, `"${launch[@]}"`)."""
        return [srun for command in self.commands if command.words and (srun := self._srun(command)) is not None]

    def srun_of(self, command: Command) -> Srun | None:
        """What `command` starts with srun, if it does."""
        return self._srun_by_command.get(id(command))

    @cached_property
    def _srun_by_command(self) -> dict[int, Srun]:
        return {id(srun.command): srun for srun in self.sruns}

    def _srun(self, command: Command) -> Srun | None:
        if not any("srun" in word.text or word.raw.startswith(("$", '"$')) for word in command.words[:8]):
            return None
        split = self._split(command)
        start = _srun_at([text for text, _ in split[:8]])
        if start is None:
            return None
        # Slurm's own variables hold numbers and names; any other one that is not set here may hold options.
        behind = [(text, place) for text, place in split[start + 1 :] if not _unknown(text)]
        complete = len(behind) == len(split) - start - 1
        found, end = take_options([Piece(text) for text, _ in behind], command.line, "srun", stray=False)
        first = behind[end][1] if end < len(behind) else len(command.words)
        program = " ".join(self.fill(word.text) for word in command.words[first:])
        return Srun(command, tuple(found), complete, program, first)

    def _split(self, command: Command) -> list[tuple[str, int]]:
        """(word, index of the word it is written in) after variables that hold several words are filled in."""
        found: list[tuple[str, int]] = []
        for place, word in enumerate(command.words):
            several = word.raw.startswith("$") or "[@]" in word.raw
            found += [(text, place) for text in (self.fill(word.text).split() if several else [word.text])]
        return found

    @cached_property
    def launches(self) -> list[tuple[Command, str]]:
        """Commands that start training, each with its words, variables filled in."""
        acts = (command for command in self.commands if command_name(command) not in ("echo", "printf", "export"))
        texts = [(command, self.fill(command.text)) for command in acts]
        return [(command, text) for command, text in texts if TRAINS.search(text)]

    @cached_property
    def trains_with_megactl(self) -> bool:
        """Whether what it starts is `megactl train`, which sets its threads and starts a node's ranks by itself."""
        return any(MEGACTL.search(text) for _, text in self.launches)

    def mentions(self, pattern: str) -> bool:
        """Whether any command or value of the script (not its comments) matches."""
        return re.search(pattern, self.code) is not None

    @cached_property
    def code(self) -> str:
        """All words and values, quotes removed, a command a line."""
        return "\n".join(
            " ".join([*(f"{item.name}={item.value.text}" for item in command.assignments), *(word.text for word in command.words)])
            for command in self.commands
        )

    @cached_property
    def needs_gpus(self) -> bool:
        """Whether GPUs are asked for."""
        return self.gpus_per_node != 0


def command_name(command: Command) -> str:
    """The program's name without its folder; "" for a command of assignments alone."""
    return command.words[0].text.rpartition("/")[2] if command.words else ""


def gpus_of(option: Option) -> int | None:
    """GPUs a node that one directive asks for; None where it says nothing of that."""
    value = option.value or ""
    if option.fault is None and option.name == "gpus-per-node":
        return _count(value)
    if option.fault is None and option.name == "gres":
        parts = [part for part in value.split(",") if part == "gpu" or part.startswith("gpu:")]
        counts = [_count(part.partition(":")[2]) if ":" in part else 1 for part in parts]
        return sum(count for count in counts if count is not None) if parts and None not in counts else None
    return None


def _count(text: str) -> int | None:
    """N of "N", "type:N"; 1 of "type"; None for what is no number."""
    _kind, colon, number = text.rpartition(":")
    number = number.partition("(")[0]
    if number.isdecimal():
        return int(number)
    return None if colon or not re.fullmatch(r"[A-Za-z]\w*", number) else 1


def _fill(text: str, held: dict[str, str]) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return held[name] if name in held else match[2] if match[2] is not None else match[0]

    return _VARIABLE.sub(replace, text[:_LONGEST_VALUE])[: 2 * _LONGEST_VALUE]


def _srun_at(words: list[str]) -> int | None:
    for index, word in enumerate(words):
        name = word.rpartition("/")[2]
        if name == "srun":
            return index
        if not (name in _WRAPPERS or name.startswith("-") or re.fullmatch(r"\d+[smhd]?|\w+=.*", name)):
            return None
    return None


def _unknown(word: str) -> bool:
    return re.match(r"\$\{?(?!SLURM)[A-Za-z_]\w*(?:\[@\])?\}?$", word) is not None


def walk(batch: Batch, depth: int = 3) -> Iterator[Batch]:
    """The script, and every script that it writes or submits through a here-document, at most `depth` levels down."""
    yield batch
    for command in batch.commands if depth else ():
        for heredoc in command.heredocs:
            if heredoc.body.startswith("#!") or command_name(command) == "sbatch":
                body = heredoc.body if heredoc.quoted else re.sub(r"\\([$`\\])", r"\1", heredoc.body)
                yield from walk(Batch(body, batch.folder, heredoc.line + batch.first_line - 1, expanded=not heredoc.quoted), depth - 1)
