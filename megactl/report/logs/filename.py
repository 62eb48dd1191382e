"""What a log's file name says of its run, as in `61B-megatron-mbs-2-pp16-dp-1-gas-512-200977.out`.

A name is what somebody typed, so its facts are used only where asked for, and only where the log itself is silent.
"""

from __future__ import annotations

import re

from megactl.report.logs.run_folder import named_after

_KEYS = {"n": "nodes"}
_NUMBER = re.compile(r"(?<![A-Za-z0-9])(tp|pp|dp|vpp|mbs|gbs|gas|seq|zero|n)[-_=]?(\d{1,9})(?![A-Za-z0-9])", re.IGNORECASE)
_BILLIONS = re.compile(r"(?<![A-Za-z0-9.])(\d{1,6}(?:\.\d{1,6})?)B(?![A-Za-z0-9])")
_EXPERIMENT = re.compile(r"(?<![A-Za-z0-9])(table|figure)[-_]?(\d{1,2})(?![0-9])", re.IGNORECASE)


def facts(file: str) -> dict[str, int | float]:
    """Facts in the base name of `file`: tp, pp, dp, vpp, mbs, gbs, gas, seq, zero, nodes (`n16`) and model_b (`61B`, in 10^9).

    The value follows its key with or without one of `-`, `_`, `=`. A key that stands there twice with two values says nothing. Of
    mbs, dp and gas together, gbs is their product.
    """
    name = named_after(file)
    found: dict[str, set[int | float]] = {}
    for key, digits in _NUMBER.findall(name):
        found.setdefault(_KEYS.get(key.lower(), key.lower()), set()).add(int(digits))
    for billions in _BILLIONS.findall(name):
        found.setdefault("model_b", set()).add(float(billions))
    known = {key: values.pop() for key, values in found.items() if len(values) == 1}
    if "gbs" not in found and {"mbs", "dp", "gas"} <= known.keys():
        known["gbs"] = known["mbs"] * known["dp"] * known["gas"]
    return known


def experiment(file: str) -> str | None:
    """The experiment of the SC21 paper that the base name carries, as `figure_13` or `table_1`; None without one."""
    match = _EXPERIMENT.search(named_after(file))
    return f"{match[1].lower()}_{int(match[2])}" if match else None
