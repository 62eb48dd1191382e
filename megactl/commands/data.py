"""`megactl data`: text to token files, what they hold, and training a tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megactl.commands.common import columns, emit_json, printable, said_now_and_then, say, size
from megactl.commands.typer_app import App
from megactl.errors import DataError

if TYPE_CHECKING:
    from megactl.storage.preprocess import PreprocessSummary
    from megactl.storage.preprocess_state import Counts
    from megactl.storage.tokenizer_training import TrainedTokenizer

app = App(help="Turn text into token files, inspect them, train a tokenizer.")


class TokenizerKind(StrEnum):
    """What `tokenizer train` can make."""

    bpe = "bpe"
    wordpiece = "wordpiece"


tokenizer_app = App(help="Train a tokenizer, or look at one.")
app.add_typer(tokenizer_app, name="tokenizer")


Files = Annotated[list[Path] | None, typer.Argument(metavar="FILE...", help="Files or folders: .txt, .jsonl, also .gz and .zst.")]
Inputs = Annotated[list[Path] | None, typer.Option("--input", "-i", metavar="FILE", help="The same, as an option (repeatable).")]
JsonKeys = Annotated[
    list[str], typer.Option("--json-key", "--json-keys", metavar="KEY", help="Key of the text in a JSON line (repeatable).")
]
AsText = Annotated[bool, typer.Option("--as-text", help="Take every file as one document, whatever its name.")]
Patterns = Annotated[
    list[str] | None, typer.Option("--pattern", metavar="GLOB", help="Files to take from folders, e.g. '*.py' (repeatable).")
]
EodToken = Annotated[str | None, typer.Option("--eod-token", metavar="TOKEN", help="End-of-document token, where it cannot be guessed.")]
LowerCase = Annotated[
    bool | None,
    typer.Option(
        "--lower-case/--no-lower-case",
        help="Capitals of a vocab.txt (default: what tokenizer_config.json beside it says, else as in the vocabulary).",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def preprocess(
    files: Files = None,
    input_: Inputs = None,
    output_prefix: Annotated[
        str, typer.Option("--output-prefix", "-o", metavar="P", help="Writes P_text_document.bin, .idx and .json.")
    ] = "",
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="byte|PATH", help="'byte', tokenizer.json, vocab.txt, .model, or a folder.")
    ] = "",
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Worker processes (default: one a core).")] = None,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="End each document with the end-of-document token.")] = False,
    split_sentences: Annotated[
        bool, typer.Option("--split-sentences", help="For BERT: one sequence a sentence; writes P_text_sentence.bin, .idx and .json.")
    ] = False,
    lower_case: LowerCase = None,
    json_key: JsonKeys = ["text"],  # noqa: B006 (Typer copies it)
    as_text: AsText = False,
    pattern: Patterns = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count and leave out documents that cannot be read.")] = False,
    eod_token: EodToken = None,
    overwrite: Overwrite = False,
    checksum: Annotated[bool, typer.Option("--checksum/--no-checksum", help="Record sha256 of the outputs.")] = True,
    json_: Json = False,
) -> None:
    """Turn text into .bin/.idx token files, Megatron's format. Interrupted, the same command continues.

    A .txt file is one document, a .jsonl file has one a line, in the key `text`. The bytes written do not depend on --workers.

    Examples:

      megactl data preprocess corpus.jsonl --output-prefix corpus --tokenizer byte --append-eod

      megactl data preprocess --input a.jsonl.gz --input b.jsonl.zst --output-prefix web --tokenizer gpt2/ --append-eod --workers 16

      megactl data preprocess src/ --as-text --pattern '*.py' --pattern '*.rst' --output-prefix code --tokenizer tokenizer.json --append-eod

      megactl data preprocess corpus.jsonl --output-prefix corpus --tokenizer vocab.txt --split-sentences
    """
    from megactl.storage.preprocess import PreprocessOptions
    from megactl.storage.preprocess import preprocess as run

    _require({"--output-prefix": output_prefix, "--tokenizer": tokenizer})
    options = PreprocessOptions(
        inputs=_inputs(files, input_),
        output_prefix=output_prefix,
        tokenizer=tokenizer,
        json_keys=tuple(json_key),
        workers=workers,
        append_eod=append_eod,
        eod_token=eod_token,
        split_sentences=split_sentences,
        lower_case=lower_case,
        as_text=as_text,
        patterns=tuple(pattern or ()),
        skip_bad=skip_bad,
        overwrite=overwrite,
        checksum=checksum,
    )
    with _progress() as progress:
        summary = run(options, progress, say)
    if summary.bad_documents:
        say(f"left out {summary.bad_documents} bad documents; the first: {summary.first_bad}", label="warning")
    if json_:
        emit_json(asdict(summary))
    else:
        _print_summary(summary)


@app.command()
def inspect(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="The pair's name without .bin or .idx.")],
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Print the text of the first N documents.")] = 0,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="byte|PATH", help="Decode with this one.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also read every token and compare recorded checksums.")] = False,
    json_: Json = False,
) -> None:
    """What a .bin/.idx pair holds. Checks every size and pointer; exit code 2 where anything is damaged.

    Examples:

      megactl data inspect corpus_text_document

      megactl data inspect corpus_text_document --show 2 --deep

      megactl data inspect corpus_text_sentence --show 1

      megactl data inspect made_by_megatron_text_document --show 1 --tokenizer gpt2/ --json | jq .tokens
    """
    from megactl.storage.inspect import first_documents, report_pair

    if tokenizer is not None and not show:
        raise DataError(f"--tokenizer {tokenizer}: is only used to show text", "add --show N")
    report = report_pair(prefix, deep=deep, progress=say)
    texts = first_documents(report.prefix, show, tokenizer) if show else []
    if json_:
        emit_json({**asdict(report), "texts": texts})
        return
    eod = f"end of document {report.eod}" if report.eod is not None else "no end-of-document token"
    vocabulary = f"{report.vocab_size}, {eod}" if report.recorded else "not recorded (no .json beside the pair)"
    documents = str(report.documents)
    if report.sentences:
        mean = report.sequences / max(report.documents, 1)
        documents += f" of {report.sequences} sentences, {mean:.1f} each on average ({report.single_sentence_documents} of one sentence)"
    elif report.sequences != report.documents:
        documents += f" ({report.sequences} sequences)"
    rows = [
        ("documents", documents),
        ("tokens", f"{report.tokens} ({report.dtype}, {size(report.bin_bytes)})"),
        (
            "sentence" if report.sentences else "length",
            f"mean {report.mean:.1f}, longest {report.longest} tokens, {report.empty_sequences} empty",
        ),
        *([("too long", f"{report.long_sentences} sentences: their documents give no samples")] if report.long_sentences else []),
        ("tokenizer", report.tokenizer or "not recorded"),
        ("vocabulary", vocabulary),
        *([("largest token", str(report.largest_token))] if deep else []),
        ("checked", ", ".join(report.checked)),
    ]
    typer.echo("\n".join([report.prefix, *columns(rows, indent="  ")]))
    for number, text in enumerate(texts):
        typer.echo(f"--- document {number}\n{printable(text)}")


@tokenizer_app.command()
def train(
    files: Files = None,
    input_: Inputs = None,
    vocab_size: Annotated[int, typer.Option("--vocab-size", metavar="N", help="Largest number of tokens.")] = 0,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The tokenizer.json or vocab.txt to write.")] = "",
    kind: Annotated[TokenizerKind, typer.Option("--kind", help="bpe as for GPT-2, or wordpiece as for BERT.")] = TokenizerKind.bpe,
    lower_case: Annotated[
        bool | None,
        typer.Option("--lower-case/--no-lower-case", help="wordpiece: take capitals and accents away (default: yes)."),
    ] = None,
    json_key: Annotated[str, typer.Option("--json-key", metavar="KEY", help="Key of the text in a JSON line.")] = "text",
    as_text: AsText = False,
    pattern: Patterns = None,
    min_frequency: Annotated[int, typer.Option("--min-frequency", min=1, metavar="N", help="Merge pairs seen at least N times.")] = 2,
    eod_token: Annotated[
        str | None, typer.Option("--eod-token", metavar="TOKEN", help="bpe: end-of-document token (default: <|endoftext|>).")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Train a tokenizer: byte-level BPE (GPT-2's kind) to a tokenizer.json, or WordPiece (BERT's) to a vocab.txt.

    Examples:

      megactl data tokenizer train corpus.jsonl --vocab-size 32000 --output tokenizer.json

      megactl data tokenizer train src/ --as-text --pattern '*.py' --vocab-size 8192 --output tokenizer.json

      megactl data tokenizer train corpus.jsonl --kind wordpiece --vocab-size 30522 --output vocab.txt
    """
    _require({"--vocab-size": vocab_size, "--output": output})
    trained = _trainer(kind, lower_case, eod_token)(
        _inputs(files, input_),
        vocab_size,
        output,
        json_key=json_key,
        min_frequency=min_frequency,
        as_text=as_text,
        patterns=tuple(pattern or ()),
        overwrite=overwrite,
        progress=_text_progress(),
    )
    if trained.vocab_size < vocab_size:
        say(f"the text gives only {trained.vocab_size} of {vocab_size} tokens; use more text or a smaller --vocab-size", label="warning")
    if json_:
        emit_json(asdict(trained))
        return
    facts = f"{trained.vocab_size} tokens from {trained.text_mb:.1f} MB in {trained.seconds:.1f} s"
    typer.echo(f"{trained.path}: {facts}" + (f"; {trained.eod_token} = {trained.eod}" if trained.eod is not None else ""))


def _trainer(kind: TokenizerKind, lower_case: bool | None, eod_token: str | None) -> Callable[..., TrainedTokenizer]:
    """The function that trains this kind, with the options that belong to it alone. Raises DataError for those of the other kind."""
    if kind is TokenizerKind.bpe:
        from megactl.storage.bpe import train_bpe

        if lower_case is not None:
            raise DataError("--lower-case: byte-level BPE keeps text as it is", "leave it out, or use --kind wordpiece")
        return partial(train_bpe, eod_token=eod_token) if eod_token is not None else train_bpe
    from megactl.storage.wordpiece_training import train_wordpiece

    if eod_token is not None:
        raise DataError(f"--eod-token {eod_token}: BERT's vocabulary has no end-of-document token", "leave it out, or use --kind bpe")
    return partial(train_wordpiece, lower_case=lower_case is not False)


@tokenizer_app.command()
def show(
    spec: Annotated[str, typer.Argument(metavar="byte|PATH", help="'byte', tokenizer.json, vocab.txt, .model, or a folder.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Text to tokenize.")] = None,
    eod_token: EodToken = None,
    lower_case: LowerCase = None,
    json_: Json = False,
) -> None:
    """What a tokenizer is, and how it cuts a text.

    Examples:

      megactl data tokenizer show tokenizer.json "def main():"

      megactl data tokenizer show vocab.txt "unbelievable" --json
    """
    from megactl.storage.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec, eod_token=eod_token, lower_case=lower_case)
    facts = tokenizer.describe()
    ids = tokenizer.encode(text) if text is not None else None
    pieces = [tokenizer.decode([token]) for token in ids] if ids is not None else None
    if json_:
        emit_json({**facts, "ids": ids, "pieces": pieces})
        return
    eod = f"{facts['eod']} {facts['eod_token']}" if facts["eod"] is not None else "unknown (name it with --eod-token)"
    rows = [("kind", facts["kind"]), ("path", facts["path"]), ("sha256", facts["sha256"] or "-")]
    rows += [("vocabulary", str(facts["vocab_size"])), ("end of document", eod)]
    if facts["special_tokens"]:
        rows.append(("special", ", ".join(f"{role} {number}" for role, number in facts["special_tokens"].items())))
    if "cleaning" in facts:
        cleaning = facts["cleaning"]
        rows.append(("case", f"{'lower' if cleaning['lower_case'] else 'as written'} ({cleaning['source']})"))
    typer.echo("\n".join(columns(rows)))
    if ids is not None and pieces is not None:
        typer.echo(f"{len(ids)} tokens: " + " ".join(f"{token}:{printable(piece)!r}" for token, piece in zip(ids, pieces, strict=True)))


def _inputs(files: list[Path] | None, options: list[Path] | None) -> tuple[str, ...]:
    """Arguments first, then --input."""
    return tuple(str(path) for path in [*(files or []), *(options or [])])


def _require(options: dict[str, object]) -> None:
    """Every required option that was left out, in one message: Typer would name only the first."""
    missing = [name for name, value in options.items() if not value]
    if missing:
        raise DataError(f"{' and '.join(missing)}: required", "see --help for examples")


def _print_summary(summary: PreprocessSummary) -> None:
    for prefix in summary.outputs:
        typer.echo(f"{prefix}.bin, .idx, .json")
    sentences = f"{summary.sentences} sentences, " if summary.sentences is not None else ""
    facts = f"{summary.documents} documents, {sentences}{summary.tokens} tokens ({summary.dtype})"
    if summary.already_done:
        typer.echo(f"{facts}; nothing was left to do")
        return
    resumed = f", {summary.resumed_documents} of them by an interrupted run" if summary.resumed_documents else ""
    empty = f"; {summary.empty_documents} empty documents left out" if summary.empty_documents else ""
    cut = f"; {summary.cut_sentences} sentences of more than 512 tokens cut" if summary.cut_sentences else ""
    typer.echo(f"{facts}{resumed}{empty}{cut}")
    typer.echo(
        f"{summary.seconds:.1f} s with {summary.workers} workers: {summary.documents_per_s:.0f} documents/s, {summary.mb_per_s:.2f} MB/s"
    )


@contextmanager
def _progress() -> Iterator[Callable[[Counts], None]]:
    """A live bar on a terminal, elsewhere a line every few seconds; on stderr."""
    if not sys.stderr.isatty():
        yield _progress_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (BarColumn(), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda counts: bar.update(task, total=counts.disk_total, completed=counts.disk_bytes, description=_described(counts))


def _progress_lines() -> Callable[[Counts], None]:
    return said_now_and_then(lambda counts: f"{100 * counts.disk_bytes / max(counts.disk_total, 1):.0f}%: {_described(counts)}")


def _described(counts: Counts) -> str:
    return f"{counts.documents} documents, {counts.tokens} tokens"


def _text_progress() -> Callable[[float], None]:
    return said_now_and_then(lambda text_mb: f"read {text_mb:.0f} MB")
