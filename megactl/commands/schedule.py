"""`megactl schedule`: a pipeline schedule as a timeline, with its bubble and its live micro-batches; without a name, all compared."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.commands.common import columns, emit_json, say
from megactl.commands.tables import show_table
from megactl.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megactl.schedules import Kind, PublishedBubble, Timeline, Times, Work

_MOST_COMPUTATIONS, _MOST_RATIO = 2_000_000, 1000.0


@dataclass(frozen=True)
class _Request:
    """What was asked for, in range. Times are those of one micro-batch on a whole rank, all its chunks together."""

    ranks: int
    chunks: int
    micro_batches: int
    forward: float
    backward: float
    weight_gradient: float
    transfer: float

    @property
    def work(self) -> Work:
        from megactl.schedules import Work

        return Work(self.forward, self.backward - self.weight_gradient, self.weight_gradient)

    def durations(self, chunks: int) -> dict[Kind, float]:
        """Times of one micro-batch on one of a rank's chunks."""
        from megactl.schedules import durations_of

        return durations_of(
            self.forward / chunks,
            self.backward / chunks,
            input_gradient=self.work.input_gradient / chunks,
            weight_gradient=self.weight_gradient / chunks,
        )


def schedule(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="1f1b, gpipe, zb-h1, zb-h2, zb-v (default: compare all).")] = None,
    pp: Annotated[int, typer.Option("--pp", "--pipeline-model-parallel-size", "--pipeline-parallel", metavar="P", help="Ranks.")] = 4,
    vpp: Annotated[
        int | None,
        typer.Option(
            "--vpp", "--num-virtual-stages-per-pipeline-rank", "--virtual-pipeline", metavar="V", help="Model chunks a rank, of 1f1b."
        ),
    ] = None,
    micro_batches: Annotated[int, typer.Option("--micro-batches", "--num-microbatches", "--gas", metavar="M", help="Micro-batches.")] = 8,
    forward: Annotated[float, typer.Option("--forward", metavar="T", help="Time of a micro-batch's forward on a rank.")] = 1.0,
    backward: Annotated[float | None, typer.Option("--backward", metavar="T", help="Its backward (default: twice the forward).")] = None,
    weight_gradient: Annotated[
        float | None, typer.Option("--weight-gradient", metavar="T", help="The part of that which is W (default: half).")
    ] = None,
    transfer: Annotated[float, typer.Option("--transfer", metavar="T", help="Time of a tensor on its way to another rank.")] = 0.0,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the timeline: .png, .svg or .pdf.")] = None,
    width: Annotated[int | None, typer.Option("--width", metavar="N", help="Cut the text here (default: the terminal's).")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Show a pipeline schedule: when each rank does what, how long it waits, how many micro-batches it holds.

    The order is the one that `megactl train` runs. Times are of any unit, and those of one micro-batch on a whole rank, so schedules with
    several chunks a rank compare with others. F3 is the forward of micro-batch 3, B3 its backward, I3 and W3 its two parts; F3.5 is on
    virtual stage 5; dots are waiting.

    Examples:

      megactl schedule --pp 8 --micro-batches 32

      megactl schedule 1f1b --pp 4 --vpp 2 --micro-batches 8

      megactl schedule zb-v --pp 4 --micro-batches 8 --plot zb-v.svg

      megactl schedule zb-h1 --pp 8 --micro-batches 32 --forward 10 --backward 21 --weight-gradient 9 --transfer 0.4 --json
    """
    values = {"--pp": pp, "--vpp": 1 if vpp is None else vpp, "--micro-batches": micro_batches}
    given = {"--forward": forward, "--backward": backward, "--weight-gradient": weight_gradient, "--transfer": transfer}
    times = {flag: value for flag, value in given.items() if value is not None}
    backward = 2 * forward if backward is None else backward
    weight_gradient = backward / 2 if weight_gradient is None else weight_gradient
    problems = [*_name_problems(name, pp, vpp), *_range_problems(values, times), *_output_problems(name, plot, width)]
    if problems:
        raise ConfigError(problems)
    if name is None:
        return _compare(_Request(pp, 2 if vpp is None else vpp, micro_batches, forward, backward, weight_gradient, transfer), json_=json_)
    request = _Request(pp, values["--vpp"], micro_batches, forward, backward, weight_gradient, transfer)
    document, times = _run(name, request)
    if plot is not None:
        _draw(document, times, plot)
    if json_:
        emit_json({**document, "timeline": _spans(times.timeline()), "plot": None if plot is None else str(plot)})
        return 0
    print("\n".join([*_timeline_text(times, width), "", *_facts(document)]))
    if plot is not None:
        say(f"drawn: {plot}")
    return 0


def _name_problems(name: str | None, pp: int, vpp: int | None) -> Iterator[Problem]:
    from megactl.config.absent import meant_choice
    from megactl.schedules import GENERATORS

    if name is not None and name not in GENERATORS:
        close = meant_choice(name, tuple(GENERATORS))
        yield Problem(f"schedule {name}", "is not known", f"did you mean {close}?" if close else f"use one of {', '.join(GENERATORS)}")
    elif vpp not in (None, 1) and name not in (None, "1f1b"):
        own = GENERATORS[name].chunks
        yield Problem(
            f"--vpp {vpp} with {name}", f"it has {own} chunk{'s' if own != 1 else ''} on each rank", "leave --vpp out, or use 1f1b"
        )
    if vpp is not None and vpp > 1 and pp == 1:
        yield Problem(f"--vpp {vpp} with --pp 1", "one rank waits for no other", "use --vpp 1, or --pp 2 or more")


def _range_problems(counts: dict[str, int], times: dict[str, float]) -> Iterator[Problem]:
    low = [name for name, value in counts.items() if value < 1]
    yield from (Problem(f"{name} {counts[name]}", "must be at least 1", "use 1 or more") for name in low)
    total = 3 * counts["--pp"] * counts["--vpp"] * counts["--micro-batches"]
    if not low and total > _MOST_COMPUTATIONS:
        what = " x ".join(f"{name} {value}" for name, value in counts.items())
        yield Problem(what, f"are up to {total:,} computations, and no screen shows them", "use smaller numbers")
    wrong = [name for name, value in times.items() if not (value > 0 or (name == "--transfer" and value == 0)) or value == float("inf")]
    yield from (Problem(f"{name} {times[name]:g}", "must be a time above 0", "such as 1") for name in wrong)
    if wrong:
        return
    backward = times.get("--backward", 2 * times["--forward"])
    weights = times.get("--weight-gradient", backward / 2)
    parts = (times["--forward"], backward - weights, weights)
    if weights >= backward:
        yield Problem(f"--weight-gradient {weights:g}", f"is part of the backward, {backward:g}", f"such as {backward / 2:g}")
    elif max(parts) / min(parts) > _MOST_RATIO:
        shown = ", ".join(f"{part:g}" for part in parts)
        yield Problem(shown, "as times of F, I and W are too unlike for one picture", "check their units")


def _output_problems(name: str | None, plot: Path | None, width: int | None) -> Iterator[Problem]:
    if plot is not None:
        from megactl.report.drawing import ENDINGS

        if name is None:
            yield Problem(f"--plot {plot}", "draws one schedule", "name it, such as 1f1b")
        if plot.suffix.lower() not in ENDINGS:
            yield Problem(f"--plot {plot}", "ends in no format that can be drawn", f"use {', '.join(ENDINGS)}")
    if width is not None and width < 20:
        yield Problem(f"--width {width}", "must be at least 20", "leave it out for the terminal's")


def _run(name: str, request: _Request) -> tuple[dict[str, Any], Times]:
    """One schedule: what is known of it as a document, and when everything runs."""
    from megactl.schedules import generate, max_live_on_rank, num_chunks, peak_of, published_bubble, run_times

    chunks = num_chunks(name, request.chunks)
    sizes = {"num_ranks": request.ranks, "num_microbatches": request.micro_batches, "chunks": chunks}
    made = generate(name, **sizes)
    times = run_times(made, request.durations(chunks), request.transfer)
    timed = times.totals()
    live = [peak_of(made.order(rank), dict.fromkeys(made.stages_of(rank), 1))[0] for rank in range(request.ranks)]
    published = published_bubble(name, work=request.work, **sizes)
    document = {
        "schedule": name,
        "ranks": request.ranks,
        "chunks": chunks,
        "micro_batches": request.micro_batches,
        "stage_to_rank": list(made.stage_to_rank),
        "times": {**vars(request.work), "transfer": request.transfer},
        "time": timed.makespan,
        "ideal_time": timed.ideal,
        "bubble": {
            "idle": timed.bubble,
            "fraction": timed.bubble_fraction,
            "own_idle": timed.own_bubble,
            "own_fraction": timed.own_bubble / timed.ideal,
            "published": None if published is None else vars(published),
        },
        "live_micro_batches": [count / chunks for count in live],
        "live_bound": [max_live_on_rank(name, rank=rank, **sizes) / chunks for rank in range(request.ranks)],
    }
    return document, times


def _timeline_text(times: Times, width: int | None) -> list[str]:
    from megactl.schedules import text_view

    room = width if width is not None else shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return text_view(times.schedule, times=times, max_width=room).splitlines()


def _facts(document: dict[str, Any]) -> list[str]:
    bubble, published = document["bubble"], document["bubble"]["published"]
    idle = f"{_share(bubble['fraction'])} of the computing time: a rank waits {bubble['idle']:g} beside {document['ideal_time']:g} of work"
    facts = [("bubble:", idle)]
    if bubble["own_idle"] < bubble["idle"] * (1 - 1e-9):
        own = f"{_share(bubble['own_fraction'])} from each rank's own first to its own last computation; a step whose end waits for all"
        facts.append(("", f"{own} ranks (a gradient norm) loses the bubble above"))
    if published is not None:
        conditions = [published["assumes"]] if published["assumes"] else []
        conditions += ["free transfers"] if document["times"]["transfer"] else []
        under = f" for {', '.join(conditions)}" if conditions else ""
        facts.append(("published:", f"{published['formula']}{under} = {_share(published['fraction'])} ({published['source']})"))
    else:
        facts.append(("published:", "no formula for these numbers"))
    facts.append(("live:", f"{_live(document['live_micro_batches'])} micro-batches on ranks 0 to {document['ranks'] - 1}, at most"))
    if document["chunks"] > 1:
        facts.append(("", f"one on one chunk counts 1/{document['chunks']}: that much of a rank's layers"))
    return columns(facts)


def _live(counts: Sequence[float]) -> str:
    """ "4 3 2 1", in the middle of many cut."""
    words = [f"{count:.3g}" for count in counts]
    return " ".join(words if len(words) <= 16 else [*words[:8], "...", *words[-4:]])


def _share(fraction: float) -> str:
    # Not "-0.0 %", where sums of floats end a hair below zero.
    return f"{max(100 * fraction, 0.0):.1f} %"


def _spans(timeline: Timeline) -> list[list[dict[str, Any]]]:
    return [
        [
            {
                "kind": action.kind.value,
                "stage": action.virtual_stage,
                "micro_batch": action.microbatch,
                "slot": action.slot,
                "start": start,
                "end": end,
            }
            for action, start, end in row
        ]
        for row in timeline.spans
    ]


def _draw(document: dict[str, Any], times: Times, path: Path) -> None:
    from megactl.report.timeline_plot import Box, write_timeline

    made, timeline = times.schedule, times.timeline()
    place = {stage: index for rank in range(made.num_ranks) for index, stage in enumerate(made.stages_of(rank))}
    rows = [[Box(a.kind.value, place[a.virtual_stage], str(a.microbatch), start, end) for a, start, end in row] for row in timeline.spans]
    chunks = f", {document['chunks']} chunks a rank" if document["chunks"] > 1 else ""
    sizes = f"{document['ranks']} ranks, {document['micro_batches']} micro-batches{chunks}"
    write_timeline(rows, path, title=f"{document['schedule']}: {sizes}; bubble {_share(document['bubble']['fraction'])}")


def _compare(request: _Request, *, json_: bool) -> int:
    """Every schedule with the same work, as a table; 1f1b also with several chunks."""
    from megactl.schedules import GENERATORS

    plain = {**vars(request), "chunks": 1}
    asked = [(name, _Request(**plain)) for name in GENERATORS]
    if request.ranks > 1 and request.chunks > 1:
        asked.insert(2, ("1f1b", request))
    found = [_run(name, each)[0] for name, each in asked]
    if json_:
        emit_json(found)
        return 0
    header = ("schedule", "chunks", "time", "bubble", "own bubble", "published", "live")
    show_table(header, [_row(document) for document in found], right=(1, 2, 3, 4, 5, 6))
    times = f"F {request.forward:g}, I {request.work.input_gradient:g}, W {request.weight_gradient:g}, transfer {request.transfer:g}"
    meanings = [
        ("bubble:", "waiting beside computing, where a step ends for all ranks at once, as with a gradient norm"),
        ("own bubble:", "the same where each rank may begin its next step as soon as it has ended this one"),
        ("live:", "micro-batches whose activations the fullest rank holds"),
    ]
    print("\n".join([f"{request.ranks} ranks, {request.micro_batches} micro-batches; {times}", *columns(meanings)]))
    return 0


def _row(document: dict[str, Any]) -> list[str | None]:
    bubble: dict[str, Any] = document["bubble"]
    published: PublishedBubble | None = bubble["published"]
    return [
        document["schedule"],
        str(document["chunks"]),
        f"{document['time']:g}",
        _share(bubble["fraction"]),
        _share(bubble["own_fraction"]),
        None if published is None else _share(bubble["published"]["fraction"]),
        f"{max(document['live_micro_batches']):.3g}",
    ]
