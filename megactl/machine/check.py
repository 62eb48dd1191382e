"""One thing that was looked at: what was found, whether a run can live with it, and the cure where not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

# From good to bad. A warning costs speed or will hurt some runs; a problem breaks them.
STATUSES = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Check:
    """`value` is shown. `cure` is one line, and stands where `status` is not ok.

    `alike`: what it is worth where nodes differ in it ("warning" or "problem"); None where they may. `key` is what must be equal,
    by default the value.
    """

    group: str
    name: str
    value: str
    status: str = "ok"
    cure: str | None = None
    alike: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        assert self.status in STATUSES and self.alike in (None, *STATUSES[1:])
        assert (self.cure is not None) == (self.status != "ok"), f"{self.name}: a cure belongs to a warning or a problem"

    @property
    def compared(self) -> str:
        """What nodes are compared by."""
        return self.value if self.key is None else self.key

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Check:
        """Inverse of `asdict`. Raises TypeError or AssertionError for what is none."""
        if not all(isinstance(value, str | None) for value in document.values()):
            raise TypeError("a check is made of texts")
        return cls(**document)


@dataclass(frozen=True)
class NodeReport:
    """What was found on one node. `node` is its name in the job, or the host's."""

    node: str
    checks: tuple[Check, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"node": self.node, "status": worst(self.checks), "checks": [asdict(check) for check in self.checks]}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> NodeReport:
        """Inverse of `as_dict`. Raises KeyError, TypeError or AssertionError for what is none."""
        return cls(str(document["node"]), tuple(Check.from_json(item) for item in document["checks"]))


def worst(checks: Iterable[Check]) -> str:
    """The worst status among `checks`; ok without any."""
    return max((check.status for check in checks), key=STATUSES.index, default=STATUSES[0])
