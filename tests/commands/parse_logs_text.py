"""Logs as Megatron-LM writes them, for tests: an arguments block, iteration lines, and an end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def arguments_block(arguments: Mapping[str, object]) -> str:
    """The block of arguments, a name dotted to 48 characters."""
    rows = "".join(f"  {name + ' ':.<48} {value}\n" for name, value in arguments.items())
    return (
        f"------------------------ arguments ------------------------\n{rows}-------------------- end of arguments ---------------------\n"
    )


def iteration(number: int, milliseconds: float, *, total: int = 1000, batch: int = 1024, loss: float | None = 8.0) -> str:
    """One iteration line of Megatron-LM 2.4."""
    printed = f" lm loss: {loss:.6E} |" if loss is not None else ""
    return (
        f" iteration {number:8d}/{total:8d} | consumed samples: {number * batch:12d} |"
        f" elapsed time per iteration (ms): {milliseconds:.1f} | learning rate: 1.500E-04 |"
        f" global batch size: {batch:5d} |{printed} loss scale: 4096.0 | grad norm: 1.234 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |\n"
    )


def log(milliseconds: Iterable[float], arguments: Mapping[str, object] | None = None, *, end: str = "", batch: int = 1024) -> str:
    """A whole log: one line for each time."""
    block = arguments_block(arguments) if arguments is not None else ""
    return block + "".join(iteration(number, value, batch=batch) for number, value in enumerate(milliseconds, start=1)) + end
