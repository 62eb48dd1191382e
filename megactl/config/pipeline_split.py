"""--pp-split: how many layers each virtual stage of the pipeline gets."""

from __future__ import annotations

from megactl.config.schema import Parallel

COUNTED = ("embedding", "head")
"""What may count as a layer, since it takes about the time of one with a large vocabulary."""


class SplitError(ValueError):
    """What is wrong with a split, and what to set instead."""

    def __init__(self, rule: str, instead: str) -> None:
        super().__init__(rule)
        self.rule, self.instead = rule, instead


def model_chunks(parallel: Parallel) -> int:
    """Virtual stages a pipeline rank holds: --vpp of them, and always two under zb-v (as `schedules.num_chunks` says)."""
    return 2 if parallel.schedule == "zb-v" else parallel.virtual_pipeline


def parse_split(text: str) -> tuple[int, ...] | frozenset[str]:
    """ "5,7,7,5" as counts, "embedding,head" as what counts as a layer. Raises SplitError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if all(word.isascii() and word.isdigit() for word in words):
        return tuple(int(word) for word in words)
    if all(word in COUNTED for word in words) and len(set(words)) == len(words):
        return frozenset(words)
    raise SplitError("must be numbers of layers, or embedding, head or both", "such as --pp-split 5,7,7,5 or --pp-split embedding,head")


def stage_layers(num_layers: int, num_stages: int, split: str) -> tuple[int, ...]:
    """Layers of each virtual stage, in the order of the model. Raises SplitError where the split does not fit the model.

    The first and the last stage may be left without layers: they have the embedding and the head.
    """
    parsed = parse_split(split)
    counts = _even(num_layers, num_stages, parsed) if isinstance(parsed, frozenset) else parsed
    if len(counts) != num_stages:
        raise SplitError(f"has {len(counts)} numbers for {num_stages} stages", _instead(num_layers, num_stages))
    if sum(counts) != num_layers:
        raise SplitError(f"has {sum(counts)} layers, and the model has {num_layers}", _instead(num_layers, num_stages))
    empty = [str(stage) for stage, count in enumerate(counts) if count < (stage not in (0, num_stages - 1))]
    if empty:
        rule = f"leaves stage {', '.join(empty)} without layers: a rank that would only pass tensors on"
        raise SplitError(rule, _instead(num_layers, num_stages))
    return counts


def _even(num_layers: int, num_stages: int, counted: frozenset[str]) -> tuple[int, ...]:
    """As equal as possible, embedding and head counted as a layer of the first and the last stage.

    What does not divide goes to late stages, since early ones hold the activations of more micro-batches, but to the last one
    last: it has the logits.
    """
    extra = [0] * num_stages
    extra[0] += "embedding" in counted
    extra[-1] += "head" in counted
    size, rest = divmod(num_layers + len(counted), num_stages)
    larger = [*reversed(range(num_stages - 1)), num_stages - 1][:rest]
    return tuple(size + (stage in larger) - extra[stage] for stage in range(num_stages))


def _instead(num_layers: int, num_stages: int) -> str:
    if num_layers < num_stages - 2:
        return f"use fewer stages than the {num_layers} layers, or more layers"
    counted = frozenset() if num_layers >= num_stages else frozenset(COUNTED)
    return f"such as --pp-split {','.join(str(count) for count in _even(num_layers, num_stages, counted))}"
