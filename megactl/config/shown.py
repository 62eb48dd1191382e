"""How a message names a setting: as the user wrote it, with where the value came from when that was not the command line."""

from __future__ import annotations

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
