"""`megactl train`: settings -> a checked run -> ranks. Also `--dry-run`, which prints what would run and why."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.commands.common import columns, count, emit_json, size
from megactl.commands.host_need import host_need, host_text, refuse_host_need
from megactl.commands.schema_options import dressed, parameter, setting_parameters, unknown_options
from megactl.config.flags import given
from megactl.errors import MegactlError

if TYPE_CHECKING:
    from megactl.config.load import Loaded
    from megactl.config.schema import Run
    from megactl.config.start import StartInfo
    from megactl.config.validate import Resolved

EXIT_MISTAKE = 2

# One line a paragraph: Typer keeps the line breaks of all but the first.
_HELP = "\n\n".join(
    (
        "Pre-train a GPT or BERT model.",
        "Started by itself it starts the ranks on this machine: one a GPU, or on CPUs tp x pp x cp x dp. Under torchrun, or srun with "
        "a task a GPU, it is one rank of the run; under srun with a task a node it starts that node's ranks. It continues from its own "
        "run directory's newest good checkpoint.",
        "Megatron-LM's long names work too (--tensor-model-parallel-size, --train-iters, ...), as do --mbs, --gbs and --seq. Every "
        "setting can also be given as --set section.key=value, in a TOML file for --config, or as MEGACTL_SECTION_KEY in the environment.",
    )
)

_EPILOG = """Examples:

megactl train --preset gpt-tiny --mock-data --iterations 20

megactl train --preset gpt-345m --tp 2 --pp 2 --mbs 4 --gbs 32 --data corpus_text_document --precision bf16

megactl train --config run.toml --set optimizer.lr=1e-4 --dry-run

torchrun --nproc-per-node 8 -m megactl train --preset gpt-1.3b --tp 4 --data corpus_text_document --run-dir runs/a

srun --ntasks-per-node 8 megactl train --preset gpt-7.5b --tp 8 --pp 4 --data corpus_text_document --run-dir runs/b"""


def _options() -> list[inspect.Parameter]:
    """Typer's parameters: the general ones, then one for each flag of the schema, in panels by section."""
    general = {
        "preset": Annotated[str | None, typer.Option("--preset", metavar="NAME", help="Start from a named model, such as gpt-345m")],
        "config": Annotated[str | None, typer.Option("--config", metavar="FILE.toml", help="Settings from a TOML file")],
        "assignments": Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any one setting; repeatable")],
        "dry_run": Annotated[bool, typer.Option("--dry-run", help="Print what would run and why, and run nothing")],
        "as_json": Annotated[bool, typer.Option("--json", help="One JSON document on stdout: the summary, or the plan of --dry-run")],
    }
    defaults = {"dry_run": False, "as_json": False}
    found = [parameter("ctx", typer.Context, inspect.Parameter.empty)]
    found += [parameter(name, annotation, defaults.get(name)) for name, annotation in general.items()]
    return [*found, *setting_parameters()]


@dressed(_options(), help=_HELP, epilog=_EPILOG)
def train(**options: Any) -> int:
    """Run the command; the help text is `_HELP`, the options are made from the schema. Returns the exit code."""
    from megactl.config.prepare import prepare

    context = options.pop("ctx")
    dry_run, as_json = options.pop("dry_run"), options.pop("as_json")
    loaded = _load(context, options)
    resolved, start = prepare(loaded, os.environ, dry_run=dry_run)
    if dry_run:
        return _print_plan(loaded, resolved, start, as_json=as_json)
    return _start(loaded, resolved, start, as_json=as_json)


def _load(context: typer.Context, options: Mapping[str, Any]) -> Loaded:
    """The run as the user set it. Unknown options are reported together with every other mistake of the configuration."""
    from megactl.config.load import load
    from megactl.config.prepare import Problems

    problems = Problems(unknown_options(context, "train"))
    flags = problems.catch(lambda: given(options)) or {}
    sources = {"preset": options["preset"], "config": options["config"], "assignments": options["assignments"] or ()}
    loaded = problems.catch(lambda: load(**sources, flags=flags, environ=os.environ))
    problems.raise_all()
    assert loaded is not None
    return loaded


def plan(loaded: Loaded, resolved: Resolved, start: StartInfo) -> dict[str, Any]:
    """What would run, as the JSON document of --dry-run: ranks, layout, batch, model, memory, every derived value and every origin."""
    from megactl.config.layout import degrees
    from megactl.config.settings import all_settings

    run = resolved.run
    layout = degrees(run, start.world_size)
    settings = {item.name: {"value": item.read(run), "origin": loaded.origins[item.name]} for item in all_settings().values()}
    for item in resolved.derived:
        if item.key in settings:
            settings[item.key]["origin"] = f"derived: {item.reason}"
    memory = memory_of(resolved)
    need = host_need(resolved, start, memory["stages"])
    return {
        "world_size": start.world_size,
        "start": {"kind": start.kind, "ranks_on_this_machine": start.local_world_size, "device": run.training.device},
        "layout": layout,
        "ranks": _ranks(layout, start.world_size),
        "batch": _batch(resolved),
        "model": _model(run),
        "memory": {**memory, "host": None if need is None else need.as_dict()},
        "schedule": schedule_of(resolved),
        "run_dir": run.logging.run_dir,
        "derived": [{"key": item.key, "value": item.value, "reason": item.reason} for item in resolved.derived],
        "settings": settings,
    }


def _ranks(layout: Mapping[str, int], world_size: int) -> list[dict[str, int]]:
    """Each rank's coordinates; the axes run from the innermost (tp) to the outermost (pp)."""
    found = []
    for rank in range(world_size):
        place, rest = {"rank": rank}, rank
        for axis, degree in layout.items():
            rest, place[axis] = divmod(rest, degree)
        found.append(place)
    return found


def _batch(resolved: Resolved) -> dict[str, Any]:
    training, batch = resolved.run.training, resolved.batch
    return {
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": batch.global_batch_size,
        "micro_batches": batch.global_batch_size // (batch.micro_batch_size * batch.data_parallel),
        "start_global_batch_size": batch.at(0),
        "seq_length": training.seq_length,
        "tokens_per_iteration": batch.global_batch_size * training.seq_length,
        "iterations": training.iterations,
        "samples": batch.consumed_after(training.iterations),
        "tokens": batch.consumed_after(training.iterations) * training.seq_length,
        "warmup_iterations": resolved.warmup_iterations,
    }


def _model(run: Run) -> dict[str, Any]:
    from megactl.costmodel.flops import model_flops
    from megactl.costmodel.parameters import padded_vocab, parameter_parts, rank_parameters

    model, parallel, seq_length = run.model, run.parallel, run.training.seq_length
    stages = {"schedule": parallel.schedule, "virtual_pipeline": parallel.virtual_pipeline, "split": parallel.pipeline_split}
    parts = parameter_parts(model, seq_length=seq_length)
    assert model.vocab_size is not None and run.training.global_batch_size is not None, "the run is not resolved"
    return {
        "parameters": sum(parts.values()),
        "parts": parts,
        "parameters_per_rank": list(
            rank_parameters(model, tp=parallel.tensor_parallel, pp=parallel.pipeline_parallel, seq_length=seq_length, **stages)
        ),
        "padded_vocab_size": padded_vocab(model.vocab_size, parallel.tensor_parallel),
        "flops_per_iteration": model_flops(model, seq_length, run.training.global_batch_size),
    }


def memory_of(resolved: Resolved) -> dict[str, Any]:
    """Predicted bytes of one rank of each stage, and of the fullest; what the prediction leaves out is named in costmodel.memory."""
    from megactl.config.memory import offload_targets
    from megactl.costmodel.memory import CUBLAS_WORKSPACES, Layout, estimate_stages

    run, batch = resolved.run, resolved.batch
    assert run.parallel.data_parallel is not None and run.parallel.zero is not None, "the run is not resolved"
    layout = Layout(
        seq_length=run.training.seq_length,
        micro_batch_size=run.training.micro_batch_size,
        num_microbatches=batch.global_batch_size // (batch.micro_batch_size * batch.data_parallel),
        tensor_parallel=run.parallel.tensor_parallel,
        pipeline_parallel=run.parallel.pipeline_parallel,
        data_parallel=run.parallel.data_parallel,
        zero=run.parallel.zero,
        precision=run.training.precision,
        schedule=run.parallel.schedule,
        virtual_pipeline=run.parallel.virtual_pipeline,
        split=run.parallel.pipeline_split,
        sequence_parallel=run.parallel.sequence_parallel,
        context_parallel=run.parallel.context_parallel,
        context_method=run.parallel.context_method,
        bucket_size=run.parallel.bucket_size,
        zero_prefetch=run.parallel.zero_prefetch,
        persistence_threshold=run.parallel.persistence_threshold,
        split_layers=run.parallel.split_layers,
        tile=run.parallel.tile,
        recompute=run.memory.recompute,
        recompute_method=run.memory.recompute_method,
        recompute_layers=run.memory.recompute_layers,
        partition_activations=run.memory.partition_activations,
        offload=offload_targets(run.memory.offload),
        workspaces=CUBLAS_WORKSPACES if run.training.device == "cuda" else 0,
    )
    stages = [estimate.as_dict() for estimate in estimate_stages(run.model, layout)]
    return {"largest_rank_bytes": max(stage["total"] for stage in stages), "stages": stages}


def schedule_of(resolved: Resolved) -> dict[str, Any] | None:
    """What the pipeline loses: idle over computing time where stages are equal, a backward takes twice a forward and transfers are free.

    None without a pipeline.
    """
    parallel, batch = resolved.run.parallel, resolved.batch
    if parallel.pipeline_parallel == 1:
        return None
    from megactl.schedules import UNIT_TIMES, generate, num_chunks, run_times

    micro_batches = batch.global_batch_size // (batch.micro_batch_size * batch.data_parallel)
    chunks = num_chunks(parallel.schedule, parallel.virtual_pipeline)
    made = generate(parallel.schedule, num_ranks=parallel.pipeline_parallel, num_microbatches=micro_batches, chunks=chunks)
    return {
        "name": parallel.schedule,
        "chunks": chunks,
        "stage_to_rank": list(made.stage_to_rank),
        "bubble": run_times(made, UNIT_TIMES).totals().bubble_fraction,
    }


def _schedule_text(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    schedule = document["schedule"]
    if schedule is None:
        return []
    name, chunks = schedule["name"], schedule["chunks"]
    vpp = f" --vpp {chunks}" if name == "1f1b" and chunks > 1 else ""
    command = f"megactl schedule {name} --pp {document['layout']['pp']}{vpp} --micro-batches {document['batch']['micro_batches']}"
    held = f", {chunks} chunks a rank" if chunks > 1 else ""
    return [
        (
            "schedule",
            f"{name}{held}: a bubble of {100 * schedule['bubble']:.1f} % of the computing time, with equal stages; drawn by {command}",
        )
    ]


def _cost_text(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, memory = document["model"], document["memory"]
    fullest = max(memory["stages"], key=lambda stage: stage["total"])
    parts = ["weights", "gradients", "optimizer", "activations", "logits", "transient"]
    parts[3:3] = [part for part in ("live_state", "workspaces") if fullest[part]]
    state = ", ".join(f"{part.replace('_', ' ')} {size(fullest[part])}" for part in parts)
    per_rank = f"at most {count(max(model['parameters_per_rank']))} on a rank"
    return [
        ("model", f"{count(model['parameters'])} parameters, {per_rank}, {count(model['flops_per_iteration'])} FLOPs an iteration"),
        ("memory", f"{size(memory['largest_rank_bytes'])} on a rank of stage {fullest['stage']}, predicted: {state}"),
        *host_text(memory["host"], max(stage["host"] for stage in memory["stages"])),
    ]


def plan_text(document: Mapping[str, Any], resolved: Resolved, loaded: Loaded) -> str:
    """The document of --dry-run for people: one line a fact, then every derived value and every value that was set."""
    batch, start = document["batch"], document["start"]
    layout = " x ".join(f"{axis} {degree}" for axis, degree in document["layout"].items())
    by = {"self": "started by this command", "torchrun": "started by torchrun", "srun": "started by srun"}
    growth = f", from {batch['start_global_batch_size']} on" if batch["start_global_batch_size"] != batch["global_batch_size"] else ""
    facts = [
        ("ranks", f"{document['world_size']} = {layout}, {by.get(start['kind'], 'started by srun, a task a node')}, on {start['device']}"),
        (
            "batch",
            f"{batch['global_batch_size']} sequences of {batch['seq_length']} tokens, {batch['micro_batches']} micro-batches of "
            f"{batch['micro_batch_size']} on each replica{growth}",
        ),
        ("length", f"{batch['iterations']} iterations, {count(batch['samples'])} sequences, {count(batch['tokens'])} tokens"),
        *_schedule_text(document),
        *_cost_text(document),
        ("run dir", document["run_dir"]),
    ]
    derived = [(item.key, str(item.value), item.reason) for item in resolved.derived]
    chosen = [
        (name, str(entry["value"]), loaded.origins[name])
        for name, entry in document["settings"].items()
        if loaded.origins[name] != "default"
    ]
    lines = columns([(f"{label}:", value) for label, value in facts])
    lines += ["", "derived:", *columns(derived, indent="  "), "", "set:", *columns(chosen, indent="  ")]
    return "\n".join([*lines, "", *_ranks_text(document)])


def _ranks_text(document: Mapping[str, Any]) -> list[str]:
    """The ranks' coordinates; of a large layout the first ones, since the rest follow the same pattern."""
    ranks, most = document["ranks"], 16
    rows = [tuple(str(value) for value in place.values()) for place in ranks[:most]]
    more = [f"  ... {len(ranks) - most} more"] if len(ranks) > most else []
    return ["ranks:", *columns([("rank", *document["layout"]), *rows], indent="  "), *more]


def _print_plan(loaded: Loaded, resolved: Resolved, start: StartInfo, *, as_json: bool) -> int:
    document = plan(loaded, resolved, start)
    if as_json:
        emit_json(document)
    else:
        print(plan_text(document, resolved, loaded))
    return 0


def _start(loaded: Loaded, resolved: Resolved, start: StartInfo, *, as_json: bool) -> int:
    from megactl.config.store import claim, write
    from megactl.engine.launch import launch

    run_dir = resolved.run.logging.run_dir
    assert run_dir is not None
    refuse_host_need(host_need(resolved, start, memory_of(resolved)["stages"]), resolved)
    if not start.is_first:
        return launch(resolved.run, resolved, start)
    with claim(run_dir):
        before = _config_bytes(run_dir)
        write(run_dir, loaded, resolved.derived)
        code = EXIT_MISTAKE
        try:
            with _stdout_to_stderr() if as_json else nullcontext():
                code = launch(resolved.run, resolved, start)
        except MegactlError as error:
            code = error.exit_code
            raise
        finally:
            if code == EXIT_MISTAKE and before is not None:
                # A refused continuation (another model, say) must not leave its settings with the checkpoints of the run that is there.
                _restore_config(run_dir, before)
        if as_json:
            emit_json(_summary(run_dir, code))
        return code


def _config_bytes(run_dir: str) -> bytes | None:
    path = Path(run_dir) / "config.toml"
    return path.read_bytes() if path.exists() else None


def _restore_config(run_dir: str, before: bytes) -> None:
    from megactl.storage.durable import replace_file

    replace_file(Path(run_dir) / "config.toml", before, f"restore-{os.getpid()}")


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send stdout to stderr, for this process and the ranks it starts: with --json the iteration lines must not stand on stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _summary(run_dir: str, code: int) -> dict[str, Any]:
    """The run's summary.json with the exit code and the run directory beside it."""
    import json
    from pathlib import Path

    try:
        summary = json.loads((Path(run_dir) / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {"status": "failed", "error": "the run left no summary.json"}
    return {**summary, "exit_code": code, "run_dir": run_dir}
