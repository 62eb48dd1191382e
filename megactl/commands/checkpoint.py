"""`megactl checkpoint`: what a checkpoint holds, whether it is whole, and how large it will be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from megactl.commands.architecture_options import ARCHITECTURE, Request, read_request, with_settings
from megactl.commands.common import emit_json, printable, said_now_and_then, say
from megactl.commands.typer_app import App
from megactl.config.flags import all_flags
from megactl.errors import CheckpointError, ConfigError, MegactlError, Problem
from megactl.storage.foreign import Limits

if TYPE_CHECKING:
    from megactl.costmodel.checkpoint import CheckpointEstimate

app = App(help="Look into checkpoints of megactl and of other systems, without loading them.")

_LAYOUT = ("parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.data_parallel", "parallel.zero", "training.precision")
_FAILED = 1
PICKLE_LIMIT = Limits().opcodes
_PATH = typer.Argument(metavar="PATH...", help="Checkpoint folders, the folders above them, or single files.")
Paths, OptionalPaths = Annotated[list[Path], _PATH], Annotated[list[Path] | None, _PATH]
PickleLimit = Annotated[int, typer.Option("--pickle-limit", min=1000, metavar="N", help="Opcodes read of one pickle at most.")]
Found = TypeVar("Found")

_HELP = "\n\n".join(
    (
        "Size of a checkpoint by part, file and parameter; its layout; what is missing, damaged or out of proportion.",
        "Reads checkpoints of megactl, Megatron-LM (torch, torch_dist), DeepSpeed (ZeRO 0 to 3, bf16, universal), PyTorch DCP, Hugging "
        "Face, and single .pt, .bin and .safetensors files. Nothing is unpickled: no code of a file can run, and torch is not needed.",
        "Sizes are printed in powers of 1000 and of 1024. Exit code 1: something is damaged, missing or unsafe.",
        "--predict takes an architecture. Alone it says how large the checkpoint will be; with PATH the two are compared.",
    )
)

_EPILOG = """Examples:

megactl checkpoint inspect runs/gpt-345m-20261121-101112

megactl checkpoint inspect /ckpt/gpt3/iter_0001000 --per-file

megactl checkpoint inspect global_step500/ model.safetensors --json | jq '.checkpoints[].parts'

megactl checkpoint inspect --predict --preset gpt-181b --tp 4 --pp 64 --precision fp16"""


@app.callback()
def checkpoint() -> None:
    """Look into checkpoints of megactl and of other systems, without loading them."""


@with_settings(*ARCHITECTURE, *_LAYOUT, help=_HELP, epilog=_EPILOG)
def inspect_(
    paths: OptionalPaths = None,
    per_file: Annotated[bool, typer.Option("--per-file", help="A row for each file, not only for each kind.")] = False,
    per_parameter: Annotated[bool, typer.Option("--per-parameter", help="A row for each tensor and part.")] = False,
    predict: Annotated[
        bool, typer.Option("--predict", help="The size from an architecture; with PATH, compared with what is there.")
    ] = False,
    pickle_limit: PickleLimit = PICKLE_LIMIT,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    **settings: Any,
) -> int:
    """Run the command; the help text is `_HELP`. Returns the exit code: 1 where anything is damaged, missing or unsafe."""
    request = _request(paths, predict, settings)
    from megactl.storage.layouts import inspect

    found, failed = _each(paths or [], lambda path: inspect(path, Limits(opcodes=pickle_limit)))
    from megactl.commands import checkpoint_view as view

    estimate = _estimate(request) if request is not None else None
    comparisons = [view.compare(inventory, request) for inventory in found]
    if json_:
        documents = [
            view.document(inventory, comparison, per_parameter=per_parameter)
            for inventory, comparison in zip(found, comparisons, strict=True)
        ]
        prediction = view.estimate_document(estimate) if estimate is not None else None
        emit_json({"checkpoints": documents, "prediction": prediction, "errors": [vars(error) for error in failed]})
    else:
        for inventory, comparison in zip(found, comparisons, strict=True):
            view.show(inventory, comparison, per_file=per_file, per_parameter=per_parameter)
        if estimate is not None:
            view.show_estimate(estimate, request)
    return _FAILED if failed or not all(inventory.good for inventory in found) else 0


app.command("inspect", **inspect_.command_options)(inspect_)


@app.command("verify")
def verify_(
    paths: Paths,
    pickle_limit: PickleLimit = PICKLE_LIMIT,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Read checkpoints back and compare every byte with the checksums they carry.

    megactl's have a SHA-256 for every byte, torch's zip files a CRC-32 for every tensor, Megatron-LM's torch_dist a SHA-256 for every file
    where it was saved with --verify-integrity. Files without checksums are checked by their structure, and counted apart. Everything that
    `inspect` finds (missing ranks, files cut short) is reported too. Exit code 1: something is damaged, missing or unsafe.

    Examples:

      megactl checkpoint verify runs/gpt-345m-20261121-101112

      megactl checkpoint verify runs/a/checkpoints/step-00000100 runs/a/checkpoints/step-00000200

      megactl checkpoint verify /ckpt/gpt3/iter_0001000 --json | jq '.checkpoints[].ok'
    """
    from megactl.storage.layouts import verify

    reported = said_now_and_then(lambda name: f"reading {printable(name)}")
    found, failed = _each(paths, lambda path: verify(path, Limits(opcodes=pickle_limit), reported))
    from megactl.commands import checkpoint_view as view

    if json_:
        documents = [view.verification_document(verification) for verification in found]
        emit_json({"checkpoints": documents, "errors": [vars(error) for error in failed]})
    else:
        for verification in found:
            view.show_verification(verification)
    return _FAILED if failed or not all(verification.good for verification in found) else 0


def _request(paths: list[Path] | None, predict: bool, settings: dict[str, Any]) -> Request | None:
    """The architecture to predict for. Architecture flags without --predict would do nothing, so they are refused."""
    if predict:
        return read_request({**settings, "precision": settings.get("precision") or "bf16"})
    flags = {"preset": "--preset", "config": "--config"} | {flag.parameter: flag.setting.flag for flag in all_flags()}
    typed = [flags[name] for name, value in settings.items() if value is not None]
    problems = []
    if typed:
        problems.append(Problem(", ".join(typed), "only --predict uses an architecture", "add --predict, or leave it out"))
    if not paths:
        problems.append(Problem("PATH", "is not given", "give a checkpoint, or --predict with an architecture"))
    if problems:
        raise ConfigError(problems)
    return None


def _each(paths: list[Path], work: Callable[[Path], Found]) -> tuple[list[Found], list[MegactlError]]:
    """`work` on every path, and the errors of paths that hold no checkpoint. Where none does, the request was wrong: that is raised."""
    found: list[Found] = []
    failed: list[MegactlError] = []
    for path in paths:
        try:
            found.append(work(path))
        except CheckpointError as error:
            failed.append(error)
    if failed and not found:
        raise failed[0] if len(failed) == 1 else CheckpointError("\n".join(error.message for error in failed), failed[0].hint)
    for error in failed:
        say(error.message, label="error")
    return found, failed


def _estimate(request: Request) -> CheckpointEstimate:
    from megactl.costmodel.checkpoint import estimate_checkpoint

    run = request.run
    dp = run.parallel.data_parallel or 1
    zero = run.parallel.zero if run.parallel.zero is not None else int(dp > 1)
    return estimate_checkpoint(
        request.model,
        precision=run.training.precision,
        tp=run.parallel.tensor_parallel,
        pp=run.parallel.pipeline_parallel,
        dp=dp,
        zero=zero,
        seq_length=request.seq_length,
    )
