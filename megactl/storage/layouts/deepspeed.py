"""DeepSpeed's checkpoints, with and without its pipeline, ZeRO 0 to 3, and the universal form.

    global_step100/layer_03-model_01-model_states.pt                     pipeline: weights of one entry of the layer list, one tp rank
    global_step100/mp_rank_05_model_states.pt                            model-parallel rank (pp x TP + tp): weights without pipeline;
                                                                         with it only scalars, and all optimizer state where ZeRO is off
    global_step100/zero_pp_rank_3_mp_rank_05_optim_states.pt             ZeRO 1, 2, 3: the share of one data-parallel rank (not pp)
    global_step100/bf16_zero_pp_rank_3_mp_rank_05_optim_states.pt        the same of BF16_Optimizer
    global_step100/zero_pp_rank_3_mp_rank_05_model_states.pt             ZeRO 3: shapes, no weights
    global_step100_universal/zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt
    latest                                                               "global_step100"

Source: deepspeed/runtime/engine.py, runtime/pipe/module.py, runtime/zero/, runtime/bf16_optimizer.py, checkpoint/ds_to_universal.py.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from typing import Any

from megactl.storage.foreign import Contents, Tensor
from megactl.storage.layouts import facts
from megactl.storage.layouts.base import MOST_MISSING, absent, extent, number_after
from megactl.storage.layouts.folder import Folder, Planned, add_files, rest
from megactl.storage.layouts.inventory import MASTER, NOTE, OTHER, PROBLEM, WARNING, WEIGHTS, FileRow, Inventory, Placed
from megactl.storage.layouts.parts import MASTERS, MOMENTS, place

LAYER = r"(?:.*/)?layer_(\d+)-model_(\d+)-model_states\.pt"
MODEL = r"(?:.*/)?mp_rank_(\d+)_model_states\.pt"
# The underscore before "optim" was missing in 2020's files.
OPTIM = r"(?:.*/)?(bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt"
SHARDED = r"(?:.*/)?(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt"
EXPERT = r"(?:.*/)?(?:layer_\d+_expert_\d+_mp_rank_\d+_model_states|expp_rank_\d+_mp_rank_\d+_optim_states)\.pt"
UNIVERSAL = r"(?:.*/)?zero/(.+)/(fp32|exp_avg|exp_avg_sq|step|[a-z_]+)\.pt"


def deepspeed_plan(folder: Folder) -> list[Planned]:
    """The files that are DeepSpeed's by their names, wherever in the folder they lie."""
    plan = [Planned(n, "layer", {"layer": int(m[1]), "tp": int(m[2])}, _layer(int(m[1]))) for n, m in folder.matching(LAYER).items()]
    plan += [Planned(n, "model", {"mp": int(m[1])}, lambda contents: _model_state) for n, m in folder.matching(MODEL).items()]
    for pattern, role in ((OPTIM, "optimizer"), (SHARDED, "model shard")):
        for name, match in folder.matching(pattern).items():
            *_, dp, mp = match.groups()
            plan.append(Planned(name, role, {"mp": int(mp), "dp": int(dp)}, lambda contents: _model_state))
    return plan + [Planned(name, "expert", {}, lambda contents: _model_state) for name in folder.matching(EXPERT)]


def _layer(index: int) -> Any:
    def classify(tensor: Tensor) -> Placed:
        return WEIGHTS, f"layer{index:02d}." + ".".join(tensor.path)

    return lambda contents: classify


def _model_state(tensor: Tensor) -> Placed:
    """`module` holds weights; parameters that are not trained are kept apart, whole or in fragments."""
    if tensor.path[0].startswith("frozen_param_fragments"):
        return WEIGHTS, ".".join(tensor.path[1:])
    if tensor.path[0] == "optimizer_state_dict" or tensor.path[0] == "optimizer":
        return place(tensor.path, roots=(), masters=MASTERS)
    return place(tensor.path, roots={"module"})


class DeepSpeed:
    """`*_model_states.pt` and `*_optim_states.pt`."""

    system = "deepspeed"
    title = "DeepSpeed"

    def matches(self, folder: Folder) -> bool:
        """Any of the names, directly in the folder."""
        return any("/" not in name for pattern in (LAYER, MODEL, OPTIM, SHARDED) for name in folder.matching(pattern))

    def inspect(self, folder: Folder) -> Inventory:
        """All files; degrees from names and contents; ranks, layers and shares that are missing."""
        inventory = Inventory(folder.path, self.system, self.title, iteration=number_after(r"global_step(\d+)$", folder.path.name))
        plan = deepspeed_plan(folder)
        add_deepspeed(inventory, folder, plan, rest(folder, plan))
        return inventory


def add_deepspeed(inventory: Inventory, folder: Folder, plan: list[Planned], others: list[Planned]) -> None:
    """Read DeepSpeed's files and report what is missing among them."""
    notes = _Notes(inventory)
    add_files(inventory, folder, [*plan, *others], notes.take)
    notes.settle(plan)
    _missing_ranks(inventory, plan, notes)
    _missing_layers(inventory, plan, notes.args)
    if inventory.layout.get("zero") == 3 and not inventory.elements[WEIGHTS]:
        rule = "ZeRO 3 saves no 16-bit weights: they are in the fp32 shares, and zero_to_fp32.py puts them together"
        inventory.say(NOTE, "", rule)


class _Notes:
    """What the files say about the run."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.args: dict[str, Any] = {}
        self.zero: int | None = None
        self.worlds: dict[str, int] = {}
        self.steps: dict[int, str] = {}

    def take(self, planned: Planned, contents: Contents) -> None:
        """Note a file's step, degrees and ZeRO stage, and the run's arguments."""
        if planned.role not in ("model", "optimizer", "model shard"):
            return
        top = facts.mapping(contents.tree)
        self.args = self.args or facts.arguments(contents.tree)
        for axis in ("dp", "mp"):
            if (world := facts.whole(top.get(f"{axis}_world_size"))) is not None:
                self.worlds[axis] = world
        configured = facts.mapping(facts.mapping(top.get("ds_config")).get("zero_optimization")).get("stage")
        for stage in (configured, facts.mapping(top.get("optimizer_state_dict")).get("zero_stage")):
            self.zero = self.zero if facts.whole(stage) is None else facts.whole(stage)
        if (step := facts.whole(top.get("global_steps"))) is not None:
            self.steps.setdefault(step, planned.name)

    def settle(self, plan: list[Planned]) -> None:
        """Degrees: tp from the layer files, else from the arguments; pp = mp / tp."""
        inventory, layout = self.inventory, self.inventory.layout
        roles = {planned.role for planned in plan}
        mp = max(extent(planned.rank["mp"] for planned in plan if "mp" in planned.rank), self.worlds.get("mp", 0))
        tp = extent(planned.rank["tp"] for planned in plan if planned.role == "layer") or facts.degrees(self.args).get("tp")
        if tp and mp:
            layout |= {"tp": tp, "pp": max(1, mp // tp)}
        elif mp:
            layout["tp"] = mp
        shares = extent(planned.rank["dp"] for planned in plan if "dp" in planned.rank)
        if shares or "dp" in self.worlds:
            layout["dp"] = max(shares, self.worlds.get("dp", 0))
        sharded = 3 if "model shard" in roles else 1 if "optimizer" in roles else 0
        layout["zero"] = self.zero if self.zero is not None else sharded
        if sharded == 3 and layout["zero"] < 3:
            layout["zero"] = 3
        if len(self.steps) > 1:
            names = ", ".join(f"{name} is of step {step}" for step, name in sorted(self.steps.items())[:4])
            inventory.say(PROBLEM, "", f"ranks are of different steps: {names}")
        inventory.iteration = min(self.steps, default=inventory.iteration)
        inventory.architecture, inventory.unpredictable = facts.from_megatron(self.args)


def _missing_ranks(inventory: Inventory, plan: list[Planned], notes: _Notes) -> None:
    mp = max(extent(item.rank["mp"] for item in plan if "mp" in item.rank), notes.worlds.get("mp", 0))
    dp = inventory.layout.get("dp", 0)
    shares = {role: [item for item in plan if item.role == role] for role in ("model", "optimizer", "model shard")}
    pattern = {"model": "mp_rank_{mp:02d}_model_states.pt", "model shard": "zero_pp_rank_{dp}_mp_rank_{mp:02d}_model_states.pt"}
    bf16 = any("bf16_" in item.name for item in shares["optimizer"])
    pattern["optimizer"] = ("bf16_" if bf16 else "") + "zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"
    for role, items in shares.items():
        if not items:
            continue
        if role == "model":
            lost = [(rank, 0) for (rank,) in absent({(item.rank["mp"],) for item in items}, (mp,))]
        else:
            lost = absent({(item.rank["mp"], item.rank["dp"]) for item in items}, (mp, dp))
        inventory.lacks([pattern[role].format(mp=rank, dp=share) for rank, share in lost], f"{role} files of mp {mp} x dp {dp or 1}")
    zero, saved = inventory.layout.get("zero", 0), bool(shares["optimizer"]) or inventory.elements[MASTER]
    if zero and not saved:
        inventory.say(WARNING, "", f"the run used ZeRO {zero}, and there is no optimizer state: it can be read, but not resumed as it was")


def _missing_layers(inventory: Inventory, plan: list[Planned], args: dict[str, Any]) -> None:
    """A pipeline's layer files. Functions in the layer list have none, so a gap counts only between two transformer layers, which are
    known by their equal weights; with Megatron-DeepSpeed's arguments the number of layers is known too."""
    names = {item.name for item in plan if item.role == "layer"}
    rows = [row for row in inventory.files if row.name in names]
    present = {(row.rank["layer"], row.rank["tp"]) for row in rows}
    tp, indices = extent(rank for _, rank in present), sorted({layer for layer, _ in present})
    positions = {layer: position for position, layer in enumerate(indices)}
    lost = [(indices[at], rank) for at, rank in absent({(positions[layer], rank) for layer, rank in present}, (len(indices), tp))]
    blocks = _blocks(rows)
    gaps = (index for before, after in pairwise(blocks) for index in range(before + 1, after) if index not in positions)
    whole = list(islice(gaps, MOST_MISSING))
    expected = facts.whole(args.get("num_layers"))
    found = blocks[-1] - blocks[0] + 1 if blocks else 0
    if expected is not None and found == expected:
        # Its list: embedding, a function, the layers, a function, the last norm.
        whole += [index for index in (blocks[0] - 2, blocks[-1] + 2) if index not in positions]
    lost += [(index, rank) for index in whole for rank in range(min(tp, MOST_MISSING))]
    inventory.lacks([f"layer_{index:02d}-model_{rank:02d}-model_states.pt" for index, rank in lost], "layers of the pipeline")
    if expected is not None and rows and found < expected:
        inventory.say(PROBLEM, "", f"{found} transformer layers have files, the run's arguments say {expected}")


def _blocks(rows: list[FileRow]) -> list[int]:
    """Indices of the transformer layers: those with the weights that most layers have, where at least two have them."""
    weights = {row.rank["layer"]: row.parts[WEIGHTS] for row in rows if row.read}
    usual = Counter(weights.values()).most_common(1)
    return sorted(layer for layer, nbytes in weights.items() if usual[0][1] > 1 and nbytes == usual[0][0])


class Universal:
    """`zero/<parameter>/fp32.pt`: one folder a parameter, merged over all ranks."""

    system = "deepspeed"
    title = "DeepSpeed, universal"

    def matches(self, folder: Folder) -> bool:
        """A file of the right name in a folder `zero`."""
        return any(name.startswith("zero/") for name in folder.matching(UNIVERSAL))

    def inspect(self, folder: Folder) -> Inventory:
        """All parameters; each has the files that any has."""
        inventory = Inventory(folder.path, self.system, self.title, iteration=number_after(r"global_step(\d+)", folder.path.name))
        inventory.layout["universal"] = True
        files = {name: (match[1], match[2]) for name, match in folder.matching(UNIVERSAL).items()}
        states = [Planned(name, state, {}, _universal(parameter, state)) for name, (parameter, state) in files.items()]
        ranks = deepspeed_plan(folder)
        add_files(inventory, folder, [*states, *ranks, *rest(folder, [*states, *ranks])])
        kinds = {state for _, state in files.values() if state == "fp32" or state in MOMENTS}
        present = {(parameter, state) for parameter, state in files.values()}
        parameters = sorted({parameter for parameter, _ in present})
        lost = [f"zero/{parameter}/{kind}.pt" for parameter in parameters for kind in sorted(kinds) if (parameter, kind) not in present]
        inventory.lacks(lost, "other parameters have them")
        return inventory


def _universal(parameter: str, state: str) -> Any:
    part = MASTER if state == "fp32" else state if state in MOMENTS else OTHER

    def classify(tensor: Tensor) -> Placed:
        # {"param": tensor, "cat_dim": 0, ...}
        return part, parameter

    return lambda contents: classify
