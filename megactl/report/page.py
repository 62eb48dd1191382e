"""The report page: one self-contained HTML file with facts, curves and what is missing."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import jinja2

from megactl.report.curves import Curve, curve_of, default_window, smoothed
from megactl.report.run_data import RunData
from megactl.report.svg import Line, line_chart

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: training report</title>
<style>
:root { --ink: #1d2733; --soft: #67727e; --line: #e3e7eb; --paper: #fff;
  --main: #1f6fb2; --raw: #a9cbe6; --dots: #d1495b; --warn: #fdf3dc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #98a3ae; --line: #303841; --paper: #171c21;
    --main: #6db3ea; --raw: #35597a; --dots: #f08a98; --warn: #3b3116; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 860px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p.sub { color: var(--soft); margin: .2rem 0 1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; min-width: 7.5rem; }
.tile b { display: block; font-size: 1.2rem; } .tile span, .facts td:first-child { color: var(--soft); }
.note { background: var(--warn); border-radius: 8px; padding: .6rem 1rem; } .note ul { margin: .2rem 0; padding-left: 1.2rem; }
.facts { border-collapse: collapse; width: 100%; }
.facts td { border-top: 1px solid var(--line); padding: .25rem .5rem; vertical-align: top; overflow-wrap: anywhere; }
.facts td:first-child { width: 15rem; }
svg { width: 100%; height: auto; } svg path { fill: none; stroke-linejoin: round; }
.main { stroke: var(--main); stroke-width: 1.8; } .raw { stroke: var(--raw); stroke-width: 1.1; }
.dots { fill: var(--dots); } .grid { stroke: var(--line); } .tick, .label, .legend { font-size: 12px; fill: var(--soft); }
</style></head><body>
<h1>{{ name }}</h1>
<p class="sub">{{ subtitle }}</p>
<div class="tiles">{% for label, value in tiles %}<div class="tile"><b>{{ value }}</b><span>{{ label }}</span></div>{% endfor %}</div>
{% if error %}<div class="note"><b>The run failed:</b> {{ error }}</div>{% endif %}
{% if missing %}<div class="note"><b>Not complete</b>
<ul>{% for sentence in missing %}<li>{{ sentence }}</li>{% endfor %}</ul></div>{% endif %}
{% for title, chart in charts %}<h2>{{ title }}</h2>{{ chart | safe }}{% endfor %}
<h2>Facts</h2>
<table class="facts">{% for label, value in facts %}<tr><td>{{ label }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
</body></html>
"""


def render_page(data: RunData, *, window: int | None = None, log: bool = False) -> str:
    """The page as text. `window`: points in the smoothing mean (None chooses); `log`: logarithmic loss axis."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(
        name=data.run_dir.resolve().name,
        subtitle=f"written {datetime.now():%Y-%m-%d %H:%M}",
        tiles=tiles_of(data),
        error=data.summary.get("error"),
        missing=data.missing,
        charts=_charts(data, window, log),
        facts=facts_of(data),
    )


def loss_curves(data: RunData, window: int | None = None) -> tuple[Curve, Curve, Curve]:
    """(raw, smoothed, evaluation) loss over the iterations; the smoothed one is the raw one itself where nothing is smoothed."""
    raw = curve_of("each iteration", data.records.steps, "loss")
    return raw, _smooth(raw, window), curve_of("validation", data.records.evaluations, "loss")


def _charts(data: RunData, window: int | None, log: bool) -> list[tuple[str, str]]:
    charts = []
    raw, smooth, evaluations = loss_curves(data, window)
    lines = _raw_and_smooth(raw, smooth) + ([Line(evaluations, "dots")] if not evaluations.is_empty else [])
    if any(not line.curve.is_empty for line in lines):
        charts.append(("Loss", line_chart(lines, name="loss", y_label="loss (nats per token)", log=log)))
    for title, key, label, noisy, zero in (
        # BERT's two losses, of which the loss above is the sum; a GPT records neither.
        ("Loss of masked tokens", "lm_loss", "nats per masked token", True, False),
        ("Loss of sentence pairs", "sentence_loss", "nats per pair", True, False),
        ("Throughput", "tokens_per_s", "tokens per second", True, True),
        ("Model TFLOP/s per GPU", "model_tflops_per_gpu", "TFLOP/s per GPU", True, True),
        ("Learning rate", "learning_rate", "learning rate", False, True),
        ("Gradient norm", "grad_norm", "global gradient norm", True, False),
    ):
        curve = curve_of("each iteration", data.records.steps, key)
        if not curve.is_empty:
            shown = _raw_and_smooth(curve, _smooth(curve, window)) if noisy else [Line(curve)]
            charts.append((title, line_chart(shown, name=key, y_label=label, robust=noisy, zero=zero)))
    return charts


def _raw_and_smooth(raw: Curve, smooth: Curve) -> list[Line]:
    return [Line(raw)] if smooth is raw else [Line(raw, "raw"), Line(smooth)]


def _smooth(raw: Curve, window: int | None) -> Curve:
    window = default_window(len(raw.x)) if window is None else window
    if window <= 1:
        return raw
    smooth = smoothed(raw, window)
    return Curve(f"mean of {window}", smooth.x, smooth.y)


def tiles_of(data: RunData) -> list[tuple[str, str]]:
    """The figures at the top: (label, text), with n/a for what is not known."""
    summary = data.summary
    return [
        ("status", str(summary.get("status", "unknown"))),
        ("iterations", _text(summary.get("iterations"))),
        ("final loss", _text(summary.get("final_loss"), ".4f")),
        ("s per iteration (median)", _text(summary.get("median_s_per_iteration"), ".4g")),
        ("tokens/s (median)", _text(summary.get("tokens_per_s"), ",.0f")),
        ("model TFLOP/s per GPU", _text(summary.get("model_tflops_per_gpu"), ".1f")),
        ("MFU", _text(summary.get("mfu"), ".1%")),
    ]


def facts_of(data: RunData) -> list[tuple[str, str]]:
    """The facts table: model, layout, batch, machine and versions, as far as they are known."""
    summary, environment = data.summary, data.environment
    layout = summary.get("layout") if isinstance(summary.get("layout"), dict) else {}
    steps, records = data.records.steps, data.records
    model = [("preset", data.config.get("preset"))]
    model += [
        (key.replace("_", " "), data.setting("model", key))
        for key in ("architecture", "num_layers", "hidden_size", "num_heads", "vocab_size")
    ]
    counts = [
        ("samples consumed", steps[-1].get("consumed_samples") if steps else None),
        ("skipped iterations", sum(bool(step.get("skipped")) for step in steps) if steps else None),
        ("iterations with a loss that is not a number", sum(bool(step.get("nan")) for step in steps) if steps else None),
        ("evaluations", len(records.evaluations) or None),
    ]
    machine: list[tuple[str, Any]] = [("ranks", summary.get("world_size")), ("peak memory (GB)", summary.get("peak_memory_gb"))]
    machine_keys = ("hosts", "gpus", "cpu", "torch", "cuda", "nccl", "driver", "python", "megactl", "commit")
    machine += [(key, environment.get(key)) for key in machine_keys]
    layout_rows = [(str(key).replace("_", " "), value) for key, value in layout.items()]
    rows = [("folder", str(data.run_dir.resolve())), *model, *layout_rows, *counts, *machine]
    return [(label, _fact(value)) for label, value in rows if value not in (None, [], "")]


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        names = list(dict.fromkeys(map(str, value)))
        return ", ".join(f"{value.count(name)} x {name}" if value.count(name) > 1 else name for name in names)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: Any, form: str = ",") -> str:
    return format(value, form) if isinstance(value, int | float) else "n/a"
