"""What the settings of memory mean, for all who read them."""

from __future__ import annotations

OFFLOADABLE = ("optimizer", "parameters", "activations")


def offload_targets(text: str | None) -> frozenset[str]:
    """What is kept in host memory: "optimizer,activations" as a set; None or "none" is the empty one. Raises ValueError for other words."""
    words = [] if text is None else [word.strip().lower() for word in text.split(",")]
    if words in ([], ["none"]):
        return frozenset()
    unknown = [word for word in words if word not in OFFLOADABLE]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(OFFLOADABLE)}")
    return frozenset(words)
