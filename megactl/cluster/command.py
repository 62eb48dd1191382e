"""The `megactl train` command that a script runs: every setting that the user set, as its own flag, so that the script stands alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megactl.config.load import Loaded
from megactl.config.settings import Setting, all_settings


def train_words(loaded: Loaded, *, more: Mapping[str, str] | None = None, leave_out: Iterable[str] = ()) -> list[list[str]]:
    """The options of `train`, one list of words an option.

    `more`: dotted name -> value, beside or in place of what the user set. `leave_out`: dotted names that the script sets otherwise.
    """
    found = [["--preset", loaded.run.preset]] if loaded.run.preset is not None else []
    more, left_out = dict(more or {}), set(leave_out)
    for name, item in all_settings().items():
        if name in left_out:
            continue
        if name in more:
            found.append(option_words(item, more[name]))
        elif loaded.is_set(name):
            found.append(option_words(item, item.read(loaded.run)))
    return found


def option_words(item: Setting, value: object) -> list[str]:
    """One option with its value as `train` reads it back to the same value."""
    if value is None:
        # A setting that a preset had set and the user cleared.
        return ["--set", f"{item.name}=none"]
    if item.type is bool:
        if value:
            return [item.flag]
        _, slash, off = item.flags[0].partition("/")
        return [off if slash else f"--no-{item.flag.removeprefix('--')}"]
    text = repr(value) if isinstance(value, float) else str(value)
    # A word that begins with a dash would be taken for an option.
    return [f"{item.flag}={text}"] if text.startswith("-") else [item.flag, text]
