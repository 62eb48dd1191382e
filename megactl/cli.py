"""The front door: finds the command, imports only that one, and turns every failure into one message and an exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from megactl import __version__
from megactl.commands.common import emit_json, say
from megactl.commands.typer_app import App, Row
from megactl.errors import EXIT_INTERRUPTED, BuildError, ConfigError, MegactlError

EXIT_FAILED, EXIT_INPUT = 1, 2


COMMANDS: dict[str, Row] = {
    "train": Row("megactl.commands.train:train", "Pre-train a model: one process to many nodes."),
    "data": Row("megactl.commands.data:app", "Turn text into token files, inspect them, train a tokenizer."),
    "tflops": Row("megactl.commands.tflops:tflops", "TFLOP/s of a run: rule of thumb, HFU, MFU, and tables in notes."),
    "model-size": Row("megactl.commands.model_size:model_size", "Parameters and bytes of a model, by part, stage and GPU."),
    "schedule": Row("megactl.commands.schedule:schedule", "Pipeline schedules: timelines, bubbles, live micro-batches."),
    "generate": Row("megactl.commands.generate:generate", "Sample text from what was trained."),
    "checkpoint": Row("megactl.commands.checkpoint:app", "Look into checkpoints, of megactl and of other systems."),
    "parse-logs": Row("megactl.commands.parse_logs:parse_logs", "A table, curves and comparisons out of training logs."),
    "report": Row("megactl.commands.report:report", "A page with plots of a run."),
    "slurm": Row("megactl.commands.slurm:COMMANDS", "Write, check and submit Slurm scripts."),
    "doctor": Row("megactl.commands.doctor:doctor", "Is this machine, or every node of a job, fit to train?"),
    "bench": Row("megactl.commands.bench:app", "Time operators beside torch's, and training under several sets of options."),
}

# What brings a package that only some commands need.
_EXTRAS = {
    "torch": "train",
    "tokenizers": "train",
    "matplotlib": "plot",
    "zstandard": "zstd",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}

_HELP = """The toolkit for pre-training GPT and BERT models on many GPUs: every kind of parallelism, ZeRO, recomputation, offload.

Every command has --help with worked examples and --json (one document on stdout)."""

_EPILOG = """Exit codes: 0 done, 1 the work failed, 2 the input was wrong, 75 saved, run the same command again.

megactl train --preset gpt-tiny --mock-data --iterations 20

megactl train --preset gpt-345m --tp 2 --pp 2 --data corpus_text_document --dry-run"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code. Prints every error itself."""
    _print_any_name()
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    show_traceback = "--traceback" in own or os.environ.get("MEGACTL_TRACEBACK", "0") not in ("", "0")
    as_json = "--json" in own
    arguments = [word for word in own if word != "--traceback"] + arguments[len(own) :]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _broken_pipe()
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except SystemExit as exit:
        # Typer ends the process by itself where stdout is a closed pipe.
        return exit.code if isinstance(exit.code, int) else EXIT_FAILED if exit.code else 0
    except Exception as error:
        return _report(error, as_json=as_json, show_traceback=show_traceback)


def _print_any_name() -> None:
    """A name that is no UTF-8 is printed with its bytes as \\udcff and the like: valid in JSON too, and no failure, whatever the locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(arguments: list[str]) -> int:
    words = _completion_words(os.environ) or arguments
    name = _command_in(words)
    if name is not None and name not in COMMANDS and not _completion_words(os.environ):
        raise _unknown_command(name)
    result = build_app(words)(args=arguments or ["--help"], prog_name="megactl", standalone_mode=False)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _command_in(words: Sequence[str]) -> str | None:
    return next((word for word in words if not word.startswith("-")), None)


def _completion_words(environ: Mapping[str, str]) -> list[str]:
    """What was typed so far, where a shell asks for completions; the program's own name is left out."""
    if "_MEGACTL_COMPLETE" not in environ:
        return []
    return (environ.get("_TYPER_COMPLETE_ARGS") or environ.get("COMP_WORDS") or "megactl").split()[1:]


def _unknown_command(name: str) -> MegactlError:
    from megactl.config.names import nearest

    close = nearest(name, COMMANDS)
    hint = f"did you mean `megactl {close}`?" if close else f"use one of {', '.join(COMMANDS)}"
    return MegactlError(f"no such command: {name}", hint)


def build_app(words: Sequence[str] = ()) -> App:
    """The Typer app with every command listed; only the one that `words` (as typed) name is imported, and of a group only its command."""
    app = App(
        name="megactl",
        help=_HELP,
        epilog=_EPILOG,
        pretty_exceptions_enable=False,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_root)
    app.attach_rows(COMMANDS, list(words))
    return app


def _version(value: bool) -> None:
    if value:
        print(f"megactl {__version__}")
        raise typer.Exit()


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
    traceback: bool = typer.Option(False, "--traceback", help="Show the traceback of an error (or set MEGACTL_TRACEBACK=1)."),
) -> None:
    """Options before the command; --traceback is taken out of the arguments before Typer sees them, so it may stand anywhere."""


def _broken_pipe() -> int:
    """The reader has gone (`| head`): nothing to say, and nothing may be flushed into the closed pipe at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILED


def _report(error: Exception, *, as_json: bool, show_traceback: bool) -> int:
    described = _describe(error)
    if described is None:
        return _report_bug(error, as_json=as_json, show_traceback=show_traceback)
    if show_traceback:
        _print_traceback(error)
    say(described.message, label="error")
    if described.hint:
        say(described.hint, label="hint")
    if as_json:
        _emit_error(type(error).__name__, described)
    return described.exit_code


def _describe(error: Exception) -> MegactlError | None:
    """An expected failure as a MegactlError; None for what nobody foresaw."""
    if isinstance(error, MegactlError):
        return error
    if isinstance(error, _click_exception()):
        return _usage_error(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRAS:
        package = (error.name or "").partition(".")[0]
        return BuildError(f"this needs {package}, which is not installed", f'pip install "megactl[{_EXTRAS[package]}]"')
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        failed = MegactlError(f"{where}{error.strerror}")
        # A name that no file system takes is what was typed; everything else is the machine's.
        failed.exit_code = EXIT_INPUT if error.errno == errno.ENAMETOOLONG else EXIT_FAILED
        return failed
    return None


def _click_exception() -> type[Exception]:
    """The base of Typer's usage errors. Typer vendors click since 0.16 or so, so its public BadParameter is the way to it."""
    return typer.BadParameter.__mro__[2]


def _usage_error(error: Any) -> MegactlError:
    from megactl.config.load import unknown_flag

    context = getattr(error, "ctx", None)
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        known = [flag for item in context.command.params for flag in (*item.opts, *item.secondary_opts)] if context else []
        rule, instead = unknown_flag(error.option_name, [flag for flag in known if flag.startswith("--")])
        message = f"{error.option_name}: {rule}"
    else:
        message, instead = error.format_message(), None
    path = context.command_path if context is not None else "megactl"
    return MegactlError(message, instead or f"see `{path} --help`")


def _report_bug(error: Exception, *, as_json: bool, show_traceback: bool) -> int:
    text = str(error).strip()
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if show_traceback:
        _print_traceback(error)
    say(f"unexpected {message}", label="error")
    say("this is a bug in megactl, not in what you typed; run again with --traceback for the details", label="hint")
    if as_json:
        failed = MegactlError(f"unexpected {message}", "this is a bug in megactl")
        failed.exit_code = EXIT_FAILED
        _emit_error(type(error).__name__, failed)
    return EXIT_FAILED


def _print_traceback(error: Exception) -> None:
    import traceback

    traceback.print_exception(error)


def _emit_error(kind: str, error: MegactlError) -> None:
    document: dict[str, Any] = {"type": kind, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    if isinstance(error, ConfigError):
        document["problems"] = [vars(problem) for problem in error.problems]
    emit_json({"error": document})
