"""The pages say what the code does: every command shown parses, every file named exists, tables and messages are the code's own."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from test_layering import imports, module_name, sources

from megactl.cli import COMMANDS, build_app, main
from megactl.config.flags import given
from megactl.config.load import load
from megactl.config.validate import resolve
from megactl.costmodel.memory import precision_sizes

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
# Help texts show commands too.
HELP = sorted([ROOT / "megactl" / "cli.py", *(ROOT / "megactl" / "commands").glob("*.py")])

STARTS = re.compile(r"\s*(?:#\s*|\$ )?((?:(?:\w+=\S+|time) )*(?:(?:\.venv/bin/)?megactl|torchrun|srun|(?:\S*/)?python3? -m megactl)\s.*)")
FOLDERS = r"(?:megactl|tests|docs|scripts|examples|templates|\.ci)"
PATHS = re.compile(rf"(?<![\w./<-])({FOLDERS}/[\w./-]*\w|(?:demo|test)\.sh|pyproject\.toml|setup\.py|constraints\.txt|LICENSE)(?![\w<])")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No launcher's or user's variables."""
    for name in list(os.environ):
        if name.startswith(("MEGACTL_", "SLURM_", "CUDA_VISIBLE")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def read(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every line inside a ``` fence, lines that end in a backslash joined to the next."""
    inside, start, kept = False, 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            inside = not inside
            continue
        if inside:
            start = start if kept else number
            kept += line
            if kept.endswith("\\"):
                kept = kept[:-1]
            else:
                yield start, kept
                kept = ""


def shown(path: Path) -> Iterator[tuple[int, str]]:
    """(line, shell command) of every megactl command that a file shows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        lines = [*blocks(text)]
        prose = re.sub(r"```.*?```", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
        spans = re.finditer(r"`((?:megactl|torchrun|srun) [^`\n]+)`", prose)
        lines += [(prose[: match.start()].count("\n") + 1, match[1]) for match in spans]
    else:
        lines = list(enumerate(text.replace('"""', "").splitlines(), start=1))
    for number, line in lines:
        found = STARTS.fullmatch(line)
        # srun and torchrun also start other programs, in examples of scripts that are not ours.
        if found and "megactl" in found[1]:
            yield number, found[1]


def arguments(command: str) -> list[str]:
    """The words behind `megactl`, up to a pipe or the like; `...` stands for more and is left out."""
    words = shlex.shlex(command, posix=True, punctuation_chars=True)
    words.whitespace_split, words.commenters = True, "#"
    found: list[str] = []
    for word in words:
        if word in ("|", "&&", ";", ">", "||"):
            break
        found.append(word)
    start = next(index for index, word in enumerate(found) if word.rpartition("/")[2] == "megactl")
    return [word for word in found[start + 1 :] if word != "..."]


@cache
def command_tree(*words: str) -> Any:
    return typer.main.get_command(build_app(words)).commands[words[0]]


def mistakes(words: list[str]) -> str | None:
    """What the command line would refuse of `megactl WORDS`: commands and options that do not exist, settings that cannot be read."""
    if not words or words[0] in ("--help", "--version"):
        return None
    if words[0] not in COMMANDS:
        return f"no command {words[0]}"
    command, rest = command_tree(*words[:2]), words[1:]
    while hasattr(command, "commands"):
        if not rest or rest[0] == "--help":
            return None
        if rest[0] not in command.commands:
            return f"no command {rest[0]} in {command.name}"
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        context = command.make_context(command.name, list(rest), resilient_parsing=True)
        if context.args:
            return f"not understood: {context.args}"
        if words[0] == "train":
            options = context.params
            load(preset=options["preset"], config=None, assignments=options["assignments"] or (), flags=given(options), environ={})
    except Exception as error:
        return str(error) or type(error).__name__
    return None


ALL_SHOWN = [(path, line, text) for path in (*PAGES, *EXAMPLES, *HELP) for line, text in shown(path)]


@pytest.mark.parametrize(("path", "line", "text"), ALL_SHOWN, ids=[f"{path.relative_to(ROOT)}:{line}" for path, line, _ in ALL_SHOWN])
def test_every_command_shown_parses(path, line, text):
    assert mistakes(arguments(text)) is None


def test_the_search_finds_commands_in_each_kind_of_file():
    found = {path.relative_to(ROOT).as_posix() for path, _, _ in ALL_SHOWN}
    assert {"README.md", "docs/data.md", "docs/running.md", "examples/first-run.toml", "megactl/commands/data.py"} <= found
    assert {arguments(text)[0] for path, _, text in ALL_SHOWN if path.name == "README.md"} == set(COMMANDS)


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("megactl train --preset gpt-tiny --mock-data --frobnicate 3", True),
        ("megactl train --preset gpt-nothing", True),
        ("megactl train --layers 1.5", True),
        ("megactl data preprocess a.txt --tokeniser byte", True),
        ("megactl data unpack a.txt", True),
        ("megactl fly", True),
        ("torchrun --nproc-per-node 8 -m megactl train --tpp 2", True),
        ("megactl report runs/a runs/b", True),
        ("A=1 srun -n 8 megactl train ... --tp 2 | tee log", False),
        ("megactl data", False),
    ],
)
def test_a_wrong_command_is_noticed(command, wrong):
    assert STARTS.fullmatch(command)
    assert (mistakes(arguments(command)) is not None) == wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_named_exists(path):
    missing = [name for name in sorted(set(PATHS.findall(path.read_text(encoding="utf-8")))) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    inside = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in inside if target and not (path.parent / target).exists()] == []


def test_the_architecture_names_every_room_and_every_module_of_the_engine():
    text = read("docs/architecture.md")
    package = ROOT / "megactl"
    rooms = [f"megactl/{path.parent.name}/" for path in package.glob("*/__init__.py")]
    modules = [path.relative_to(ROOT).as_posix() for path in (package / "engine").glob("*.py") if path.name != "__init__.py"]
    folders = [f"megactl/engine/{path.parent.name}/" for path in (package / "engine").glob("*/__init__.py")]
    assert [name for name in [*rooms, *modules, *folders] if name not in text] == []


def test_the_table_of_commands_is_that_of_the_command_line():
    rows = re.findall(r"^\| `megactl ([\w-]+)` \| (.+) \|$", read("README.md"), flags=re.M)
    assert rows == [(name, row.help) for name, row in COMMANDS.items()]


def test_the_readme_opens_with_one_sentence_and_two_commands():
    title, sentence, block = read("README.md").split("\n\n")[:3]
    assert title == "# megactl"
    assert sentence.endswith(".") and len(re.findall(r"[.!?](?:\s|$)", sentence)) == 1
    assert [line.split()[0] for line in block.splitlines()[1:-1]] == ["./demo.sh", "./test.sh"]


def test_rooms_import_only_from_below_as_the_picture_in_the_readme_shows():
    picture = re.search(r"┌─+┐\n(.*?)└", read("README.md"), flags=re.S)[1]
    layers = [re.findall(r"^│ ([\w, ]+?)  ", layer, flags=re.M) for layer in re.split(r"├─+┤\n", picture)]
    level = {room: depth for depth, rows in enumerate(layers) for row in rows for room in row.split(", ")}
    assert {path.parent.name for path in (ROOT / "megactl").glob("*/__init__.py")} < set(level)
    wrong = []
    for path in sources():
        module = module_name(path)
        for name, line, _ in imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package=path.name == "__init__.py"):
            mine, other = module.split(".")[1:2], name.split(".")[1:2]
            known = name.startswith("megactl.") and mine and {*mine, *other} <= set(level)
            # The front door and the commands are one room.
            if known and mine != other and level[mine[0]] >= level[other[0]] and level[mine[0]] > 0:
                wrong.append(f"{module}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_run(path):
    loaded = load(config=str(path), assignments=["data.data=corpus"] if path.stem in ("gpt-345m", "bert-345m", "llama-1b") else [])
    parallel = loaded.run.parallel
    ranks = parallel.tensor_parallel * parallel.pipeline_parallel * (parallel.data_parallel or 1)
    gpus = ranks if loaded.run.training.device == "cuda" else 0
    run = resolve(loaded.run, world_size=ranks, visible=ranks, gpus=gpus, vocab_size=2048, origins=loaded.origins).run
    assert run.model.num_layers and run.training.global_batch_size


def table(page: str, header: str) -> list[list[str]]:
    """The rows below the table line that begins with `header`, as cells."""
    lines = read(page).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(header)) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


GIB = 2**30
LAYOUTS = table("docs/parallelism.md", "| layout | micro-batches")


@pytest.mark.parametrize("row", LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_the_eight_rank_table_is_what_a_dry_run_predicts(row, capsys):
    (command,) = [text for _, text in shown(ROOT / "docs" / "parallelism.md") if "--dry-run" in text and "--gbs 64" in text]
    words = [*arguments(command), *row[0].split("`")[1].split(), "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    fullest = max(document["memory"]["stages"], key=lambda stage: stage["total"])
    state = fullest["weights"] + fullest["gradients"] + fullest["optimizer"]
    stages, micro_batches = document["layout"]["pp"], document["batch"]["micro_batches"]
    assert row == [
        f"`--tp {document['layout']['tp']} --pp {stages}` (dp {document['layout']['dp']})",
        str(micro_batches),
        f"{max(document['model']['parameters_per_rank']) / 1e6:.1f}M",
        f"{state / GIB:.2f} GiB",
        f"{fullest['total'] / GIB:.2f} GiB",
        f"{100 * (stages - 1) / micro_batches:.1f} %",
    ]


def test_the_message_about_a_layout_that_does_not_fit_is_real(capsys):
    shown_command, message = re.search(r"\$ (megactl train .*--pp 4)\n(error: .*)\n", read("docs/parallelism.md")).groups()
    assert main(arguments(shown_command)) == 2
    assert capsys.readouterr().err.strip() == message


def test_the_bytes_of_a_parameter_are_those_of_the_cost_model():
    rows = table("docs/parallelism.md", "| bytes a parameter")
    assert [row[0] for row in rows] == [f"{precision}, ZeRO {stage}" for precision in ("bf16", "fp32") for stage in range(4)]
    for name, *cells, together in rows:
        state, stage = precision_sizes(name[:4]).state, int(name[-1])
        # Stage 3 shares the weights, 2 and 3 the gradients, 1 to 3 the optimizer.
        sizes = [(state.weight, stage == 3), (state.gradient, stage >= 2), (state.optimizer, stage >= 1)]
        assert cells == [f"{size}{' / d' if shared else ''}" for size, shared in sizes]
        kept, divided = (sum(size for size, shared in sizes if shared == which) for which in (False, True))
        assert together == " + ".join([*([str(kept)] if kept else []), *([f"{divided} / d"] if divided else [])])


def test_the_messages_of_tensor_parallelism_are_those_of_the_model(monkeypatch):
    """One rank of two alone, with an all-reduce that only counts."""
    import torch

    from megactl.engine import tensor_parallel
    from megactl.engine.mesh import Axis, Mesh
    from megactl.engine.models.layers import MicroBatch
    from megactl.engine.parallelize import build_part

    sent: list[int] = []
    monkeypatch.setattr(tensor_parallel, "all_reduce", lambda tensor, group, **_: sent.append(tensor.numel() * tensor.element_size()))
    settings = ["parallel.tensor_parallel=2", "training.device=cpu", "data.mock_data=true", "model.num_layers=3", "training.seq_length=8"]
    run = resolve(load(preset="gpt-tiny", assignments=settings).run, world_size=2, visible=2).run
    mesh = Mesh(device=torch.device("cpu"), world_size=2, tp=Axis(size=2, rank=0, ranks=(0, 1)))
    model, b, s, h = build_part(run, mesh, 0, 1).model, 2, 8, 128
    tokens = torch.zeros(b, s, dtype=torch.int64)
    counts, sizes = [], []

    def phase(result: Any) -> Any:
        counts.append(len(sent))
        sizes.append(set(sent))
        sent.clear()
        return result

    logits = phase(model(tokens, MicroBatch(torch.tensor([1, 1, 0]), torch.arange(s).expand(b, s))))
    loss = phase(model.loss_sum(logits, tokens, torch.ones(b, s)))
    phase(loss.backward())
    rows = {row[0]: [0 if cell == "none" else sum(map(int, re.findall(r"\d+", cell))) for cell in row[1:3]] for row in
            table("docs/parallelism.md", "| messages of one micro-batch")}  # fmt: skip
    layer, embedding, head, loss_row = (rows[name] for name in ("a layer", "the embedding", "the head", "the loss"))
    assert counts == [3 * layer[0] + embedding[0] + head[0], loss_row[0], 3 * layer[1] + embedding[1] + head[1] + loss_row[1]]
    assert sizes == [{b * s * h * 4}, {4 * b * s, 8 * b * s}, {b * s * h * 4}]
