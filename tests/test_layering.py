"""The layers of the house: which package may import which, checked on the source; and what a command really loads, checked in a process."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megactl.cli import COMMANDS

ROOT = Path(__file__).parents[1] / "megactl"
TORCH = ("torch",)
# Imported inside functions only, everywhere outside the engine; and never loaded by a --help.
HEAVY = ("torch", "pandas", "matplotlib", "tokenizers", "sentencepiece", "transformers", "wandb", "tensorboard", "scipy")

# What each room may import of the others, even inside a function.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "storage": ("errors",),
    "schedules": ("errors",),
    "config": ("storage", "errors"),
    "costmodel": ("config", "schedules", "errors"),
    # It looks at what is here, not at what a run makes of it: of the rooms below it only the settings that variables may hold.
    "machine": ("config", "errors"),
    "cluster": ("config", "storage", "errors"),
    "report": ("costmodel", "config", "storage", "errors"),
    "engine": ("config", "schedules", "costmodel", "storage", "report", "machine", "errors"),
}
_ROOMS = (*MAY_IMPORT, "errors", "commands", "cli")
# What each package of ours must never import. The longest matching name decides.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "megactl.errors": ("megactl.",),
    **{
        f"megactl.{room}": tuple(f"megactl.{other}" for other in _ROOMS if other not in (room, *allowed))
        for room, allowed in MAY_IMPORT.items()
    },
}
# engine/models is readable alone: architecture over ops and functional, and never the code that distributes it.
MODELS_MAY = (
    "megactl.engine.models", "megactl.engine.ops", "megactl.engine.functional", "megactl.engine.functional_llama", "megactl.config",
    "megactl.errors",
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if "csrc" not in path.parts)


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """(imported module, line, at the top level of the file) of every import that can run; TYPE_CHECKING blocks cannot."""
    stack: list[tuple[ast.AST, bool]] = [(tree, True)]
    while stack:
        node, top = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack += [(child, top) for child in node.orelse]
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + (1 if is_package else 0)]
                base = ".".join([*parents, *([base] if base else [])])
            # `from megactl.engine import launch` imports the module megactl.engine.launch.
            yield from ((f"{base}.{alias.name}", node.lineno, top) for alias in node.names)
        inside = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        stack += [(child, inside) for child in ast.iter_child_nodes(node)]


def reaches(name: str, target: str) -> bool:
    return name == target.rstrip(".") or name.startswith(target if target.endswith(".") else f"{target}.")


def violations(module: str, text: str, *, is_package: bool = False) -> list[str]:
    """The forbidden edges of one module's source."""
    found = []
    owner = max((name for name in FORBIDDEN if reaches(module, name)), key=len, default=None)
    for name, line, top in imports(ast.parse(text), module, is_package=is_package):
        where = f"{module}:{line} imports {name}"
        if owner is not None and any(reaches(name, target) for target in FORBIDDEN[owner]):
            found.append(f"{where}: {owner} must not")
        if not reaches(module, "megactl.engine") and any(reaches(name, heavy) for heavy in HEAVY) and (top or name.split(".")[0] in TORCH):
            found.append(f"{where}: " + ("only engine may import torch" if name.split(".")[0] in TORCH else "only inside a function"))
        if reaches(module, "megactl.commands") and top and reaches(name, "megactl.engine"):
            found.append(f"{where}: a command imports the engine inside its function")
        if (
            reaches(module, "megactl.engine.models")
            and reaches(name, "megactl")
            and not any(reaches(name, allowed) for allowed in MODELS_MAY)
        ):
            found.append(f"{where}: models import only ops, functional, config and errors")
        if reaches(module, "megactl.engine.models") and reaches(name, "torch.distributed"):
            found.append(f"{where}: models never import distribution")
    return found


def test_no_forbidden_edge():
    found = []
    for path in sources():
        found += violations(module_name(path), path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("megactl.config.load", "from megactl.engine import launch"),
        ("megactl.config.load", "def f():\n    import megactl.engine.mesh"),
        ("megactl.config.load", "def f():\n    import torch"),
        ("megactl.config.load", "from ..engine import mesh"),
        ("megactl.cli", "import pandas as pd"),
        ("megactl.commands.train", "from megactl.engine.launch import launch"),
        ("megactl.commands.train", "def f():\n    import torch.nn"),
        ("megactl.engine.trainer", "def f():\n    from megactl.commands import train"),
        ("megactl.engine.models.gpt", "from megactl.engine.tensor_parallel import Column"),
        ("megactl.engine.models.gpt", "from torch import distributed"),
        ("megactl.errors", "from megactl.config import schema"),
        ("megactl.machine.host", "from megactl.engine.launch import host"),
        ("megactl.config.slurm", "from megactl.machine.sockets import listen"),
        ("megactl.storage.indexed", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("megactl.report.page", "class A:\n    import matplotlib.pyplot"),
        ("megactl.schedules.view", "from megactl.storage import indexed"),
    ],
)
def test_the_walk_sees_each_kind_of_edge(module, text):
    assert violations(module, text)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("megactl.config.load", "if TYPE_CHECKING:\n    import torch"),
        ("megactl.commands.train", "def f():\n    from megactl.engine.launch import launch"),
        ("megactl.report.plot", "def f():\n    import matplotlib"),
        ("megactl.engine.models.gpt", "import torch\nfrom megactl.engine.ops import dropout_add\nfrom megactl.config.schema import Model"),
        ("megactl.storage.torchlike", "import torchlike"),
    ],
)
def test_the_walk_lets_the_rest_pass(module, text):
    assert not violations(module, text)


def modules_after(statement: str) -> set[str]:
    """All of sys.modules after `statement` in a fresh process that writes to no terminal."""
    code = f"import json, sys\n{statement}\nsys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return set(json.loads(answer.stderr.splitlines()[-1]))


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after `statement` in a fresh process."""
    return {name.split(".")[0] for name in modules_after(statement)}


def test_importing_the_front_door_loads_nothing_heavy():
    assert loaded_by("import megactl.cli").isdisjoint({*HEAVY, "numpy"})


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_neither_torch_nor_pandas(command):
    path = ROOT / "commands" / f"{command}.py".replace("-", "_")
    if command is not None and not path.exists():
        pytest.skip(f"{path.name} is not here")
    arguments = [*([command] if command else []), "--help"]
    found = loaded_by(f"from megactl.cli import main\nassert main({arguments!r}) == 0")
    assert found.isdisjoint(HEAVY)


def test_a_dry_run_loads_neither_torch_nor_pandas():
    arguments = ["train", "--preset", "gpt-tiny", "--mock-data", "--device", "cpu", "--dry-run"]
    assert loaded_by(f"from megactl.cli import main\nassert main({arguments!r}) == 0").isdisjoint(HEAVY)


# What a desk command loads, since most of its time is that: our rooms (or a module, where the rest of the room stays out), and the
# packages of others. A module that comes in through a new import shows here; move the import into the function that needs it.
_FRONT = {"cli", "errors", "commands.common", "commands.typer_app"}
_FLAGS = {"config.flags", "config.names", "config.schema", "config.settings"}
_LOGS = {"report.logs", "report.records", "_build", "_native"}
_LOADED: dict[str, tuple[set[str], set[str]]] = {
    "--help": (set(), set()),
    "tflops --ms 52 --gbs 1024 --sec 127": ({"commands", "config", "costmodel", "report.quantity"}, set()),
    "model-size --preset gpt-345m": ({"commands", "config", "costmodel", "report.quantity", "schedules"}, set()),
    "slurm experiments": ({"commands", "cluster.experiments", "config.names"}, set()),
    "slurm render --help": ({"commands", "cluster.settings", *_FLAGS}, set()),
    "slurm render --preset gpt-tiny --mock-data --nodes 1 --gpus-per-node 1": ({"commands", "cluster", "config"}, {"jinja2", "markupsafe"}),
    "slurm lint job.sh": (
        {"commands", "cluster.lint", "cluster.formats", "cluster.quoting", "cluster.slurm_options", "config.names", "config.slurm"}, set(),
    ),
    "schedule zb-v": ({"commands", "schedules", "config.absent", "config.names"}, set()),
    "checkpoint inspect model.safetensors": ({"commands", "storage", *_FLAGS}, set()),
    "parse-logs .": ({"commands", *_LOGS, "storage", "costmodel", "config.schema"}, set()),
}  # fmt: skip
_OTHERS = {
    "rich", "markdown_it", "pygments", "jinja2", "markupsafe", "tabulate", "yaml", "numpy", "psutil", "safetensors", "zstandard", *HEAVY,
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a script, a checkpoint and a log."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "job.sh").write_text("#!/bin/bash\n#SBATCH --time=10 --output=%j.out\nsrun hostname\n")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    line = "iteration {:8d}/ 3 | elapsed time per iteration (ms): 100.0 | lm loss: 2.0E+00 |\n"
    (folder / "run.out").write_text("".join(line.format(number) for number in (1, 2, 3)))
    return folder


@pytest.mark.parametrize("line", _LOADED)
def test_a_desk_command_loads_what_it_needs(desk, line):
    rooms, packages = _LOADED[line]
    words = line.split()
    loaded = modules_after(f"import os\nos.chdir({str(desk)!r})\nfrom megactl.cli import main\nassert main({words!r}) == 0")
    assert {name.split(".")[0] for name in loaded} & _OTHERS == packages
    own = {name.removeprefix("megactl.") for name in loaded if name.startswith("megactl.")}
    # A package is loaded with each of its modules: its own __init__ counts where the rest of it may not.
    bare = {name for name in own if any(other.startswith(f"{name}.") for other in own)}
    allowed = _FRONT | rooms
    assert {name for name in own - bare if not any(reaches(name, room) for room in allowed)} == set()
    # The other way round: a row that allows what nobody loads any more is out of date.
    assert {room for room in rooms - {"schedules", "_native"} if not any(reaches(name, room) for name in own)} == set()


def test_every_module_outside_the_engine_imports_without_torch():
    names = [module_name(path) for path in sources() if "engine" not in path.parts and path.name != "__main__.py"]
    block = (
        "class Block:\n    def find_spec(self, name, *rest):\n        assert name.split('.')[0] != 'torch', 'torch'\n"
        "sys.meta_path.insert(0, Block())"
    )
    found = loaded_by(f"{block}\nimport importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert "torch" not in found
