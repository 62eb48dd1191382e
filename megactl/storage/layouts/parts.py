"""Which part of a checkpoint a tensor belongs to, told by the keys that lead to it."""

from __future__ import annotations

import re
from collections.abc import Collection

from megactl.storage.foreign import Tensor
from megactl.storage.layouts.inventory import MASTER, OTHER, RNG, WEIGHTS, Classify, Placed

# Names that optimizers give their state: Adam and its kin, SGD, Adagrad, RMSprop, Adadelta, Adafactor, Shampoo's and Muon's momentum.
MOMENTS = frozenset({
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "momentum", "square_avg", "grad_avg", "acc_delta",
    "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_diff", "prev_grad",
})  # fmt: skip
# What Megatron-LM, DeepSpeed and apex call the copy in full precision.
MASTERS = frozenset({
    "fp32_from_fp16_params", "fp32_from_float16_params", "fp32_from_fp16", "fp32_groups", "single_partition_of_fp32_groups",
    "fp32_flat_groups", "master_param", "master_params", "master_weights", "fp32_param", "fp32",
})  # fmt: skip
ROOTS = frozenset({"model", "module", "state_dict", "model_state_dict", "model_state", "net", "network", "ema", "model_ema"})
"""Keys under which files keep the model beside other things."""

_CHUNK = re.compile(r"model[0-9]*", re.ASCII)
_RANDOM = re.compile(r"(^|[_.])rng([_.]|$)|random_state", re.ASCII)


def place(path: tuple[str, ...], *, roots: Collection[str] = ROOTS, masters: Collection[str] = MASTERS) -> Placed:
    """(part, name) of a tensor under `path`: below one of `roots` it is a weight, elsewhere the keys name what it is."""
    if path and (path[0] in roots or (_CHUNK.fullmatch(path[0]) and "model" in roots)):
        return (OTHER if path[-1].endswith("_extra_state") else WEIGHTS, ".".join(path[1:]))
    for word in reversed(path):
        if word in MOMENTS:
            return word, ".".join(part for part in path if part != word)
    if any(word in masters for word in path):
        return MASTER, ".".join(path)
    return (RNG if any(_RANDOM.search(word) for word in path) else OTHER), ".".join(path)


def by_path(*, roots: Collection[str] = ROOTS, masters: Collection[str] = MASTERS) -> Classify:
    """`place` for a layout's own keys."""
    return lambda tensor: place(tensor.path, roots=roots, masters=masters)


def of_state_dict(tensors: Collection[Tensor]) -> Classify:
    """For a file whose layout nobody declared: with a known root or an optimizer's state it is a training checkpoint, else weights."""
    structured = any(tensor.path and (tensor.path[0] in ROOTS or _CHUNK.fullmatch(tensor.path[0])) for tensor in tensors)
    state = any(place(tensor.path)[0] not in (WEIGHTS, OTHER) for tensor in tensors)
    return by_path() if structured or state else lambda tensor: (WEIGHTS, ".".join(tensor.path))


def place_key(key: str) -> Placed:
    """(part, name) of a key of a distributed checkpoint, whose path is one string: `optimizer.state.exp_avg.<name>` (Megatron-LM),
    `optimizer.state.<name>.exp_avg` (FSDP), `optimizer.distributed.<buffer>.param` (Megatron-LM's distributed optimizer)."""
    words = key.split(".")
    if words[-1] in MOMENTS:
        return words[-1], ".".join(word for word in words[:-1] if word not in ("state", "optimizer", "optim"))
    if not any(word.startswith("optim") or "optim" in word.split("/")[0] for word in words[:2]):
        if _RANDOM.search(words[0]) or words[0].startswith("rng"):
            return RNG, key
        return (OTHER if "_extra_state" in key or words[0].startswith("rerun") else WEIGHTS), key
    for word in words[1:]:
        if word in MOMENTS or word in MASTERS or (word == "param" and word == words[-1]):
            part = word if word in MOMENTS else MASTER
            return part, ".".join(other for other in words if other != word and other not in ("state", "optimizer", "optim"))
    return OTHER, key
