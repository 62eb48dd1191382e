"""Megatron-LM's own format: a folder for each model-parallel rank (`--ckpt-format torch`).

    iter_0001000/mp_rank_00/model_optim_rng.pt            tp rank; without pipeline
    iter_0001000/mp_rank_00_000/model_optim_rng.pt        tp rank, pp rank
    iter_0001000/mp_rank_00_000_000/...                   tp, pp, expert rank
    iter_0001000/mp_rank_00_000/distrib_optim.pt          --use-distributed-optimizer since May 2023
    iter_0001000/mp_rank_00[_000]/model_rng.pt            the same, March 2022 to May 2023,
    iter_0001000/mp_rank_00[_000]_000/optim.pt            with one of these for each data-parallel rank

Source: megatron/checkpointing.py, megatron/training/checkpointing.py, core/optimizer/distrib_optimizer.py of NVIDIA/Megatron-LM.
"""

from __future__ import annotations

from typing import Any

from megactl.storage.foreign import Contents, Tensor
from megactl.storage.layouts import facts
from megactl.storage.layouts.base import absent, extent, number_after
from megactl.storage.layouts.folder import Classifier, Folder, Planned, add_files, rest
from megactl.storage.layouts.inventory import MASTER, PROBLEM, Inventory, Placed
from megactl.storage.layouts.parts import MASTERS, place

_FILE = r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?/((?:model_optim_rng|model_rng|optim|distrib_optim|layer_wise_optimizer_\d+)\.pt)"
_WEIGHTS = ("model_optim_rng.pt", "model_rng.pt")


class MegatronLegacy:
    """`mp_rank_*` folders."""

    system = "megatron"
    title = "Megatron-LM (torch format, a folder for each model-parallel rank)"

    def matches(self, folder: Folder) -> bool:
        """A file of the right name in a folder of the right name."""
        return bool(folder.matching(_FILE))

    def inspect(self, folder: Folder) -> Inventory:
        """All ranks. tp and pp come from the names and are compared with the arguments inside."""
        inventory = Inventory(folder.path, self.system, self.title, iteration=number_after(r"^iter_(\d+)$", folder.path.name))
        plan = _plan(folder)
        for name in ("tp", "pp", "ep"):
            if degree := extent(planned.rank[name] for planned in plan if name in planned.rank):
                inventory.layout[name] = degree
        inventory.layout.setdefault("pp", 1)
        notes = _Notes(inventory)
        add_files(inventory, folder, [*plan, *rest(folder, plan)], notes.take)
        notes.compare()
        _report_missing(inventory, plan, notes)
        return inventory


def _plan(folder: Folder) -> list[Planned]:
    """The rank files. A third number, or a second one beside `optim.pt`, is a data-parallel rank there and an expert rank elsewhere."""
    plan = []
    for name, match in folder.matching(_FILE).items():
        tp, *more = (int(number) for number in match.groups()[:3] if number is not None)
        rank = {"tp": tp}
        if match[4] == "optim.pt":
            rank |= dict(zip(("pp", "dp") if len(more) == 2 else ("dp",), more, strict=False))
        else:
            rank |= dict(zip(("pp", "ep"), more, strict=False))
        plan.append(Planned(name, match[4].removesuffix(".pt"), rank, _classifier(rank.get("pp"), match[4])))
    return plan


def _classifier(stage: int | None, file: str) -> Classifier:
    """Layers are counted from 0 in each stage, so a name is unique only together with its stage."""
    prefix = "" if stage is None else f"stage{stage}."
    masters = MASTERS if file in _WEIGHTS else {*MASTERS, "param"}

    def classify(tensor: Tensor) -> Placed:
        part, name = place(tensor.path, roots={"model"} if file in _WEIGHTS else (), masters=masters)
        if part == MASTER and name == "":
            name = file
        return part, prefix + (f"{tensor.path[0]}.{name}" if tensor.path[0] != "model" and tensor.path[0].startswith("model") else name)

    return lambda contents: classify


class _Notes:
    """What the files say about the run."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.args: dict[str, Any] = {}
        self.iterations: dict[int, str] = {}

    def take(self, planned: Planned, contents: Contents) -> None:
        """Note a file's iteration and the run's arguments."""
        if planned.role not in ("model_optim_rng", "model_rng"):
            return
        self.args = self.args or facts.arguments(contents.tree)
        iteration = facts.whole(facts.mapping(contents.tree).get("iteration"))
        if iteration is not None:
            self.iterations.setdefault(iteration, planned.name)

    def lacks_optimizer(self) -> bool:
        """Whether the optimizer's state must be in files of its own (a run may have been told not to save it)."""
        return self.args.get("use_distributed_optimizer") is True and self.args.get("no_save_optim") is not True

    def compare(self) -> None:
        """Names, files and arguments must agree on iteration and layout."""
        inventory = self.inventory
        said = sorted(self.iterations)
        if len(said) > 1:
            inventory.say(
                PROBLEM, "", f"ranks are of different iterations: {', '.join(f'{self.iterations[i]} is of {i}' for i in said[:4])}"
            )
        if said and inventory.iteration is None:
            inventory.iteration = said[0]
        elif said and inventory.iteration not in said:
            inventory.say(PROBLEM, self.iterations[said[0]], f"is of iteration {said[0]}, the folder's name says {inventory.iteration}")
        degrees = facts.degrees(self.args)
        for name in ("tp", "pp"):
            found, expected = inventory.layout.get(name, 1), degrees.get(name)
            if expected is not None and found > expected:
                inventory.say(PROBLEM, "", f"ranks of {name} = {found}, the run's arguments say {name} = {expected}")
        inventory.layout |= {name: value for name, value in degrees.items() if value >= inventory.layout.get(name, 1)}
        if self.args.get("use_distributed_optimizer") is True:
            inventory.layout["zero"] = 1
        inventory.architecture, inventory.unpredictable = facts.from_megatron(self.args)


def _report_missing(inventory: Inventory, plan: list[Planned], notes: _Notes) -> None:
    """Each rank of the grid has the files that any rank has."""
    layout = inventory.layout
    if notes.lacks_optimizer() and not any("optim" in planned.role.removeprefix("model_optim") for planned in plan):
        inventory.lacks(["distrib_optim.pt of every rank"], "the run used the distributed optimizer and saved its state")
    if not any(planned.role in ("model_optim_rng", "model_rng") for planned in plan):
        inventory.lacks(["model_optim_rng.pt of every rank"], "it holds the weights")
    for role in sorted({planned.role for planned in plan}):
        axes = [axis for axis in ("tp", "pp", "ep", "dp") if any(axis in item.rank for item in plan if item.role == role)]
        present = {tuple(item.rank.get(axis, 0) for axis in axes) for item in plan if item.role == role}
        # The degree of data parallelism does not show in how many ranks wrote, but for one file a rank.
        sizes = tuple(extent(point[i] for point in present) if axis == "dp" else layout[axis] for i, axis in enumerate(axes))
        if "pp" not in axes and layout.get("pp", 1) > 1:
            inventory.say(PROBLEM, "", f"the run has {layout['pp']} pipeline stages, the names of {role}.pt have none")
        names = [f"mp_rank_{_written(axes, point)}/{role}.pt" for point in absent(present, sizes)]
        inventory.lacks(names, f"{role} of " + " x ".join(f"{axis} {size}" for axis, size in zip(axes, sizes, strict=True)))


def _written(axes: list[str], point: tuple[int, ...]) -> str:
    return "_".join(f"{number:02d}" if axis == "tp" else f"{number:03d}" for axis, number in zip(axes, point, strict=True))
