"""Units: the parts of a model whose weights are needed together, and whose gradients become complete together.

A unit is a layer, or half of one (`split_layers`: up to the end of attention, and what follows), or a tile of one of its matrices
(megactl.engine.tiles); the embedding, the final norm and the head are one each. Tiles lie within the unit of their layer, which
keeps what is not tiled. Units are numbered in the order in which forward enters them.

`watch` tells observers when forward and backward enter and leave a unit. It wraps the methods that run the unit instead of using
module hooks, since half a layer is no module of its own. In backward the notice comes from identity functions on the unit's outputs
and inputs. A layer that is recomputed in backward makes new ones each time, so they work there without knowing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megactl.engine.models.transformer import Block, Transformer
from megactl.engine.tiles import Tile


@dataclass(frozen=True)
class Unit:
    """`methods` of `owner` run the unit; `modules` hold its weights, those of units within it included. `parent` is the unit around it."""

    index: int
    owner: nn.Module
    methods: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    parent: int | None = None


class Observer(Protocol):
    """What wants to know where forward and backward are; each is told the unit's number."""

    def before_forward(self, unit: int) -> None:
        """The unit's forward begins."""

    def after_forward(self, unit: int) -> None:
        """The unit's forward is over."""

    def before_backward(self, unit: int) -> None:
        """The gradients of the unit's outputs are there."""

    def after_backward(self, unit: int) -> None:
        """The gradients of the unit's inputs are there. Not called for a unit without inputs that need one: the embedding's ids."""


def units_of(model: Transformer, *, split_layers: bool = False) -> list[Unit]:
    """The units of a model part, in the order in which forward enters them."""
    found: list[Unit] = []
    for module in model.units():
        for methods, modules in _runs(module, split_layers):
            parent = Unit(len(found), module, methods, tuple(modules))
            found.append(parent)
            tiles = [tile for part in modules for tile in part.modules() if isinstance(tile, Tile)]
            found += [Unit(number, tile, Tile.RUNS, (tile,), parent.index) for number, tile in enumerate(tiles, len(found))]
    return found


def _runs(module: nn.Module, split_layers: bool) -> Iterator[tuple[tuple[str, ...], list[nn.Module]]]:
    if split_layers and isinstance(module, Block):
        for method, modules in module.halves().items():
            yield (method,), modules
    else:
        yield ("forward",), [module]


def backward_order(units: Sequence[Unit]) -> list[int]:
    """Numbers of the units in the order in which backward enters them: what lies within a unit after it, and backwards as well."""
    outer = [unit.index for unit in reversed(units) if unit.parent is None]
    within = {index: [unit.index for unit in reversed(units) if unit.parent == index] for index in outer}
    return [number for index in outer for number in (index, *within[index])]


def watch(units: Sequence[Unit], observers: Sequence[Observer]) -> None:
    """Tell `observers` from now on; of what begins in their order, of what ends in the opposite one."""
    for unit in units:
        for name in unit.methods:
            setattr(unit.owner, name, partial(_watched, getattr(unit.owner, name), unit.index, tuple(observers)))


def _watched(method: Callable, unit: int, observers: tuple[Observer, ...], *arguments: Any, **options: Any) -> Any:
    arguments = _noticed(arguments, lambda: [observer.after_backward(unit) for observer in reversed(observers)])
    for observer in observers:
        observer.before_forward(unit)
    result = method(*arguments, **options)
    for observer in reversed(observers):
        observer.after_forward(unit)
    if isinstance(result, tuple):
        return _noticed(result, lambda: [observer.before_backward(unit) for observer in observers])
    return _noticed((result,), lambda: [observer.before_backward(unit) for observer in observers])[0]


def _noticed(values: tuple, notice: Callable[[], Any]) -> tuple:
    """`values` with a call of `notice` in backward, once the gradients of all tensors among them are there."""
    places = [index for index, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    if not places or not torch.is_grad_enabled():
        return values
    passed = dict(zip(places, _Notice.apply(notice, *(values[index] for index in places)), strict=True))
    return tuple(passed.get(index, value) for index, value in enumerate(values))


class _Notice(Function):
    @staticmethod
    def forward(ctx, notice, *tensors):
        ctx.notice = notice
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx, *gradients):
        ctx.notice()
        return None, *gradients
