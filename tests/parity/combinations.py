"""Combinations of every technique: drawn at random among those that the configuration allows, and a covering set of them.

The closed table of refusals decides what is a combination, so a case is dropped exactly where a user would be told why.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from megactl.config.checks import machine_independent
from parity.cases import Case

# What is drawn. A value that needs another one is drawn often enough to meet it, because `_given` looks at what was drawn before.
FACTORS: Mapping[str, tuple] = {
    "model": ("gpt", "bert"),
    "schedule": ("1f1b", "gpipe", "zb-h1", "zb-h2", "zb-v"),
    "vpp": (1, 2),
    "sp": (False, True),
    "cp_method": ("ring", "all-to-all"),
    "scatter": (True, False),
    "recompute": ("none", "selective", "full"),
    "recompute_method": ("uniform", "block"),
    "recompute_layers": (1, 2),
    "partition": (False, True),
    "zero": (0, 1, 2, 3),
    "split_layers": (False, True),
    "tile": (1, 2),
    "prefetch": (1, 0, 2),
    "threshold": (0, 100),
    "offload": (None, "optimizer", "activations", "parameters", "optimizer,parameters", "optimizer,parameters,activations"),
    "micro_batches": (1, 2, 3, 4),
    "precision": ("fp64", "fp64", "fp32"),
    "positions": ("learned", "rope"),
    "normalization": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu"),
    "kv_heads": (None, 4),
    "bias": (True, False),
    "micro_batch": (2, 1, 3),
    "dropout": (0.0, 0.1),
    "tied": (True, False),
    "norm": ("pre", "post"),
    "attention": ("auto", "unfused"),
    "documents": ("plain", "reset", "eod", "positions"),
    "padding": (True, False),
    "sentence": (True, False),
    "overlap": (True, False),
    "bucket": (2000, 1, 40_000_000),
    "clip": (0.5, 0.0),
    "ramp": (False, True),
    "overflow": (False, False, False, True),
}
_DEGREES = ("tp", "cp", "pp", "dp")
_DEFAULTS = {field.name: field.default for field in fields(Case)}


def draw(generator: random.Random, world_sizes: tuple[int, ...]) -> Case:
    """One allowed combination, value by value; a value that does not go with those before it stays the default."""
    while True:
        case = _layout(generator, world_sizes)
        for name, values in FACTORS.items():
            case = _with(case, name, generator.choice(values))
        if is_allowed(case):
            return case


def _layout(generator: random.Random, world_sizes: tuple[int, ...]) -> dict[str, object]:
    size = generator.choice(world_sizes)
    while True:
        degrees = {axis: generator.choice((1, 2, 4)) for axis in _DEGREES}
        if math.prod(degrees.values()) == size:
            return dict(degrees)


def _with(case: dict[str, object], name: str, value: object) -> dict[str, object]:
    """The case with a value more, where the configuration allows it beside what is drawn already; else with the default."""
    changed = {**case, name: value}
    if value == _DEFAULTS[name] or is_allowed(changed):
        return changed
    return {**case, name: _DEFAULTS[name]}


def is_allowed(case: Mapping[str, object]) -> bool:
    """Whether the configuration takes it, and the reference has it."""
    made = Case(**case)
    of_the_other = made.documents != "plain" if made.model == "bert" else not (made.padding and made.sentence)
    if of_the_other:
        return False
    if made.overflow and made.precision != "fp64":
        return False
    return not machine_independent(made.run(), {})


def drawn(seed: int, count: int, world_sizes: tuple[int, ...] = (2, 4, 8)) -> list[Case]:
    """`count` different combinations, the same ones for one seed."""
    generator, found = random.Random(seed), {}
    while len(found) < count:
        found[Case(**draw(generator, world_sizes))] = None
    return list(found)


def values_of(case: Case) -> dict[str, object]:
    """Factor -> value, of what is drawn."""
    return {name: getattr(case, name) for name in (*_DEGREES, *FACTORS)}


def pairs(case: Case) -> set[tuple]:
    """Each pair of values of two factors that the case holds."""
    return set(itertools.combinations(values_of(case).items(), 2))


def covering(seed: int, pool: int, world_sizes: tuple[int, ...]) -> list[Case]:
    """A small set of combinations that holds every pair of values which occurs in `pool` drawn ones (greedy)."""
    return list(_greedy(drawn(seed, pool, world_sizes)))


COVERING_SET = Path(__file__).parent / "covering_set.json"


def covering_set() -> list[Case]:
    """The fixed set that every run of the tests checks: a file, since drawing it takes longer than many of its cases."""
    return [Case(**settings) for settings in json.loads(COVERING_SET.read_text(encoding="utf-8"))]


def write_covering_set(pool: int = 1000) -> None:
    """Draw the set anew, after a factor has come or a rule has changed (from `tests`, `python -c` with this function)."""
    lines = [json.dumps(_settings(case)) for case in covering(1, pool, (2, 4))]
    COVERING_SET.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _settings(case: Case) -> dict[str, object]:
    """What differs from the defaults."""
    return {name: value for name, value in values_of(case).items() if value != _DEFAULTS[name]}


def _greedy(cases: list[Case]) -> Iterator[Case]:
    held = {case: pairs(case) for case in cases}
    missing = set().union(*held.values())
    while missing:
        best = max(held, key=lambda case: len(held[case] & missing))
        yield best
        missing -= held.pop(best)
