"""Hugging Face folders: one file of weights or several with an index, and what its Trainer saves beside them.

    config.json   model.safetensors   or   model-00001-of-00003.safetensors ... and model.safetensors.index.json
    pytorch_model.bin                 or   pytorch_model-00001-of-00003.bin ... and pytorch_model.bin.index.json
    checkpoint-500/{optimizer.pt, scheduler.pt, rng_state_0.pth, trainer_state.json, training_args.bin, global_step500/}

Source: transformers/modeling_utils.py, transformers/trainer.py, huggingface_hub/serialization.
"""

from __future__ import annotations

import re
from typing import Any

from megactl.errors import CheckpointError
from megactl.storage.foreign import Contents, Tensor
from megactl.storage.layouts import facts
from megactl.storage.layouts.base import number_after
from megactl.storage.layouts.deepspeed import add_deepspeed, deepspeed_plan
from megactl.storage.layouts.folder import Folder, Planned, add_files, rest
from megactl.storage.layouts.inventory import OTHER, PROBLEM, WARNING, WEIGHTS, Inventory, Placed
from megactl.storage.layouts.parts import by_path
from megactl.storage.strict_json import loads

_SHARD = r"(?:pytorch_model|model|adapter_model|diffusion_pytorch_model|tf_model)(?:-(\d{5})-of-(\d{5}))?\.(safetensors|bin)"
_INDEX = r"(?:pytorch_model|model|diffusion_pytorch_model)\.(?:safetensors|bin)\.index\.json"
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_TRAINER = {"optimizer.pt": "optimizer", "optimizer.bin": "optimizer", "scheduler.pt": "scheduler", "training_args.bin": "arguments",
            "scaler.pt": "scaler"}  # fmt: skip


class HuggingFace:
    """`model*.safetensors` or `pytorch_model*.bin`, or an index of them."""

    system = "huggingface"
    title = "Hugging Face"

    def matches(self, folder: Folder) -> bool:
        """Weights or an index under the names that transformers gives them."""
        return bool(folder.matching(_SHARD) or folder.matching(_INDEX) or ("trainer_state.json" in folder.sizes))

    def inspect(self, folder: Folder) -> Inventory:
        """Weights against their index, the Trainer's state, and a DeepSpeed checkpoint inside."""
        inventory = Inventory(folder.path, self.system, self.title, iteration=number_after(r"^checkpoint-(\d+)$", folder.path.name))
        shards = [Planned(name, "weights", {}, lambda contents: _weight) for name in folder.matching(_SHARD)]
        trainer = [Planned(n, _TRAINER[n], {}, lambda c: by_path(roots=())) for n in folder.sizes if n in _TRAINER]
        random = [Planned(name, "rng", {}, lambda contents: _random) for name in folder.matching(r"rng_state(?:_\d+)?\.pth")]
        deepspeed = deepspeed_plan(folder)
        seen: dict[str, set[str]] = {}

        def notice(planned: Planned, contents: Contents) -> None:
            if planned.role == "weights":
                seen[planned.name] = {".".join(tensor.path) for tensor in contents.tensors}

        plan = [*shards, *trainer, *random]
        add_files(inventory, folder, plan, notice)
        others = rest(folder, [*plan, *deepspeed])
        if deepspeed:
            inventory.title += " Trainer with DeepSpeed"
            add_deepspeed(inventory, folder, deepspeed, others)
        else:
            add_files(inventory, folder, others)
        for index in folder.matching(_INDEX):
            _compare_index(inventory, folder, index, seen)
        _compare_numbers(inventory, folder)
        _take_facts(inventory, folder)
        return inventory


def _weight(tensor: Tensor) -> Placed:
    return WEIGHTS, ".".join(tensor.path)


def _random(tensor: Tensor) -> Placed:
    return "rng", ".".join(tensor.path)


def _json(inventory: Inventory, folder: Folder, name: str) -> Any:
    """A JSON file, None where it is absent; damage is a finding."""
    text = folder.text(name) if name in folder.sizes else None
    if text is None:
        return None
    try:
        return loads(text.encode("utf-8", "replace"), name)
    except CheckpointError as error:
        inventory.say(PROBLEM, name, error.message.removeprefix(f"{name}: "))
        return None


def _compare_index(inventory: Inventory, folder: Folder, index: str, seen: dict[str, set[str]]) -> None:
    """Every shard that the index names is there and holds the tensors it is said to hold."""
    document = _json(inventory, folder, index)
    weights = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        inventory.say(PROBLEM, index, "has no weight_map from tensors to files")
        return
    files = sorted(set(weights.values()))
    odd = [file for file in files if not _PLAIN.fullmatch(file) or file in (".", "..")]
    if odd:
        inventory.say(PROBLEM, index, f"names files outside its folder, the first is {odd[0][:120]!r}; they were not opened")
    inventory.lacks([file for file in files if file not in folder.sizes and file not in odd], f"shards named in {index}")
    lost = [name for name, file in weights.items() if file in seen and name not in seen[file]]
    if lost:
        inventory.say(
            PROBLEM, index, f"{len(lost)} tensors are not in the files it names, the first is {lost[0][:120]} of {weights[lost[0]][:120]}"
        )
    extra = sorted(name for file, names in seen.items() if file in files for name in names if weights.get(name) != file)
    if extra:
        inventory.say(WARNING, index, f"{len(extra)} tensors of its files are not in it, the first is {extra[0][:120]}")


def _compare_numbers(inventory: Inventory, folder: Folder) -> None:
    """Shards say in their names how many there are."""
    groups: dict[tuple[str, int], set[int]] = {}
    for name, match in folder.matching(_SHARD).items():
        if match[1] is not None and int(match[2]) < 100_000:
            groups.setdefault((name.partition("-")[0] + "-{:05d}-of-" + match[2] + "." + match[3], int(match[2])), set()).add(int(match[1]))
    for (pattern, count), present in groups.items():
        lost = [pattern.format(number) for number in range(1, count + 1) if number not in present]
        inventory.lacks([name for name in lost if name not in inventory.missing], f"{count} shards by their names")


def _take_facts(inventory: Inventory, folder: Folder) -> None:
    config, state = _json(inventory, folder, "config.json"), _json(inventory, folder, "trainer_state.json")
    settings, unpredictable = facts.from_huggingface(config)
    if inventory.architecture is None:
        inventory.architecture, inventory.unpredictable = settings, unpredictable
    if isinstance(state, dict) and (step := facts.whole(state.get("global_step"))) is not None:
        inventory.iteration = step
    if inventory.elements[WEIGHTS] == 0 and not inventory.missing and inventory.parts[OTHER] == 0:
        inventory.say(WARNING, "", "no weights were found")
