"""How settings are shown: in a message as the user wrote them and where, in a log as Megatron-LM prints its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megactl.config.schema import Run
from megactl.config.settings import all_settings


@dataclass(frozen=True)
class Names:
    """A run and the origins of its values (`Loaded.origins`; empty where they are not known)."""

    run: Run
    origins: Mapping[str, str] = field(default_factory=dict)

    def show(self, name: str) -> str:
        """ "--tp 3", or "--heads 24 (preset gpt-1.7b)", or "--heads 24 (run.toml:4)"; "no --zero" where it is open."""
        setting = all_settings()[name]
        value = setting.read(self.run)
        if value is None:
            return f"no {setting.flag}"
        if setting.type is bool:
            text = setting.flag if value else f"--no-{setting.flag.removeprefix('--')}"
        else:
            text = f"{setting.flag} {_plain(value)}"
        origin = self.origins.get(name, "flag")
        return text if origin.startswith(("flag ", "--set ")) or origin == "flag" else f"{text} ({origin})"


def arguments_block(run: Run, world_size: int) -> list[str]:
    """Model, layout and batch of a run as the lines of Megatron-LM's arguments block, which every reader of its logs knows."""
    values = {"world_size": world_size}
    for section in ("model", "parallel", "memory", "training"):
        values |= dataclasses.asdict(getattr(run, section))
    title, end = (f"{'-' * 20} {words} {'-' * 20}" for words in ("arguments", "end of arguments"))
    return [title, *(f"  {name} {'.' * max(3, 40 - len(name))} {value}" for name, value in values.items()), end]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return f"'{text}'" if " " in text else text


def nearest_multiples(value: int, base: int) -> str:
    """ "48" or "32 or 48": the multiples of `base` around `value`, at least `base` itself."""
    below, above = value // base * base, -(-value // base) * base
    return str(max(above, base)) if below in (0, above) else f"{below} or {above}"


def nearest_divisors(value: int, whole: int) -> str:
    """ "4 or 6": the divisors of `whole` around `value`."""
    divisors = [number for number in range(1, whole + 1) if whole % number == 0]
    below = [number for number in divisors if number <= value][-1:]
    above = [number for number in divisors if number >= value][:1]
    return " or ".join(str(number) for number in dict.fromkeys(below + above))
