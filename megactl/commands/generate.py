"""`megactl generate`: text from what was trained."""

from __future__ import annotations

import math
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.commands.common import count, emit_json, printable, said_now_and_then, say
from megactl.errors import CheckpointError, ConfigError, DataError, Problem

if TYPE_CHECKING:
    from megactl.engine.checkpoint import Header
    from megactl.storage.tokenizer import Tokenizer

_DEFAULT_TOP_K = 40
_PRECISIONS, _DEVICES = ("fp32", "bf16", "fp16", "fp64"), ("auto", "cpu", "cuda")


def generate(
    path: Annotated[Path, typer.Argument(metavar="RUN_DIR|CHECKPOINT", help="A run directory, or a folder such as .../step-00000100.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue (default: none, a new document).")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", metavar="FILE", help="The same, from a UTF-8 file.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Stop after N new tokens.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Draw from the K most likely tokens (default 40; 0: from all).")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="Draw from the fewest tokens that hold this probability.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", metavar="N", help="Continuations of the prompt.")] = 1,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed draws the same text (default: a new one).")] = None,
    device: Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.")] = "auto",
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="fp32|bf16|fp16|fp64", help="Arithmetic (default: the run's own).")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="byte|PATH", help="The run's tokenizer, where it has moved or was not recorded.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Sample text from a checkpoint: the prompt and its continuation on stdout, everything else on stderr.

    Of a run directory the newest good checkpoint is used. Any layout is read: the parts of all ranks are put together. A sample ends at the
    end-of-document token or after --max-tokens.

    Examples:

      megactl generate runs/gpt-345m-20261121-101112 --prompt "The cause of the"

      megactl generate runs/a --temperature 0 --prompt-file question.txt --max-tokens 200

      megactl generate runs/a/checkpoints/step-00000500 -n 4 --top-p 0.95 --top-k 0 --seed 1 --json | jq -r .samples[].text
    """
    _check(locals())
    text = _prompt(prompt, prompt_file)
    from megactl.engine.sampling import Options, choose_device, sample

    where = choose_device(device)
    (model, header, precision), folder = _load(path, where, precision)
    words = _tokenizer(folder, header, tokenizer, model.config.vocab_size)
    seed = secrets.randbelow(2**31) if seed is None else seed
    eod = words.describe()["eod"]
    # Ids that the model has and the tokenizer has not were never trained and have no text.
    options = Options(max_tokens, words.vocab_size, temperature, _top_k(top_k, words.vocab_size), top_p, eod, seed)
    ids = _prompt_ids(words, text, eod, model.config.max_positions)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{folder}: iteration {header.step}, {count(parameters)} parameters, {precision} on {where.type}")
    if len(ids) + max_tokens - 1 > (limit := model.config.max_positions):
        say(f"the text may outgrow the model's {limit} positions: from there on a token sees the last {max(1, limit // 2)} to {limit}")
    started = time.monotonic()
    progress = said_now_and_then(lambda tokens: f"{tokens} of {max_tokens} tokens")
    samples = sample(model, ids, options, num_samples, progress)
    seconds = time.monotonic() - started
    tokens = sum(len(item.tokens) for item in samples)
    texts = [_continuation(words, ids if text else [], item.tokens) for item in samples]
    if json_:
        settings = {"temperature": temperature, "top_k": options.top_k, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
        made = [
            {"prompt": text, "text": new, "tokens": item.tokens, "finish": item.finish} for new, item in zip(texts, samples, strict=True)
        ]
        facts = {"parameters": parameters, "tokenizer": words.spec, "device": where.type, "precision": precision, "prompt_tokens": len(ids)}
        speed = {"seconds": seconds, "tokens_per_s": tokens / seconds}
        emit_json({"checkpoint": folder, "iteration": header.step, "samples": made, "settings": settings, **facts, **speed})
    else:
        _print(text, texts)
    ends = f"{sum(item.finish == 'eod' for item in samples)} of {num_samples} ended by themselves"
    say(f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s), {ends}; seed {seed}")


def _check(given: dict[str, Any]) -> None:
    """Raise one ConfigError with every option that is out of range."""
    temperature, top_k, top_p, seed = given["temperature"], given["top_k"], given["top_p"], given["seed"]
    rules = [
        ("--prompt", "--prompt-file is given too", "give one of them", given["prompt"] is None or given["prompt_file"] is None),
        ("--max-tokens", "must be at least 1", "set 64", given["max_tokens"] >= 1),
        ("--num-samples", "must be at least 1", "set 1", given["num_samples"] >= 1),
        ("--temperature", "must be a finite number, 0 or more", "set 0 for the most likely text, 0.8 for a usual one",
         math.isfinite(temperature) and temperature >= 0),
        ("--top-k", "must be 0 or more", "set 0 to draw from all tokens", top_k is None or top_k >= 0),
        ("--top-p", "must be above 0 and at most 1", "leave it out to draw from all tokens", top_p is None or 0 < top_p <= 1),
        ("--seed", "must not be negative", "set 0 or more", seed is None or seed >= 0),
        ("--device", f"must be one of {', '.join(_DEVICES)}", "set auto", given["device"] in _DEVICES),
        ("--precision", f"must be one of {', '.join(_PRECISIONS)}", "leave it out for the run's own",
         given["precision"] in (None, *_PRECISIONS)),
    ]  # fmt: skip
    problems = [Problem(f"{flag} {given[flag[2:].replace('-', '_')]}", rule, instead) for flag, rule, instead, holds in rules if not holds]
    if problems:
        raise ConfigError(problems)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if file is None:
        return prompt or ""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--prompt-file {file}: cannot be read ({error.strerror})", "check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--prompt-file {file}: is not UTF-8 text ({error.reason} at byte {error.start})", "convert it to UTF-8") from error


def _load(path: Path, device: Any, precision: str | None) -> tuple[Any, Path]:
    """((model, header, precision), checkpoint folder). A damaged checkpoint of a run directory is passed over, with a line on stderr."""
    from megactl.engine.sampling import ForeignModelError, load_model
    from megactl.storage import checkpoint_folder, manifest

    if not path.exists():
        raise CheckpointError(f"{path}: does not exist", "give a run directory, or a folder such as RUN_DIR/checkpoints/step-00000100")
    if (path / manifest.FILE_NAME).is_file():
        return load_model(path, device, precision), path
    loaded: list[Any] = []

    def problems(folder: Path) -> list[str]:
        # Loading the weights is the check: reading the optimizer's state too, as a resume must, would take several times as long.
        try:
            loaded[:] = [load_model(folder, device, precision)]
        except ForeignModelError:
            # Nothing is wrong with it: an older checkpoint of the run would be refused alike.
            raise
        except CheckpointError as error:
            return [error.message]
        return []

    for root in (path, path / "checkpoints"):
        found = checkpoint_folder.candidates(root)
        folder = checkpoint_folder.newest_good(found, checkpoint_folder.latest(root), lambda text: say(text, label="warning"), problems)
        if folder is not None:
            return loaded[0], folder
    # Nothing is there, and `resolve` has the sentence for it; unless the run has saved its first one since.
    return _load(checkpoint_folder.resolve(path), device, precision)


def _tokenizer(folder: Path, header: Header, spec: str | None, vocab_size: int) -> Tokenizer:
    """The run's tokenizer: as named, the copy in the run directory, or the recorded path. Raises DataError unless it is the run's."""
    from megactl.storage.tokenizer import load_recorded
    from megactl.storage.tokenizer_copy import find_copy

    recorded = header.tokenizer or {}
    copy = find_copy(folder.absolute().parent.parent, recorded.get("kind"))
    if spec is None and recorded.get("spec") != "byte" and copy is not None:
        spec = str(copy)
    elif spec is None:
        spec = recorded.get("spec")
        if spec is None:
            raise DataError(f"{folder}: no tokenizer is recorded with it", "name the one of the training data: --tokenizer byte|PATH")
        if spec != "byte" and not Path(spec).exists():
            raise DataError(f"{folder}: its tokenizer {spec} does not exist here", "say where it is now: --tokenizer PATH")
    lower_case = recorded.get("cleaning", {}).get("lower_case")
    words = load_recorded(spec, eod_token=recorded.get("eod_token"), lower_case=lower_case)
    facts = words.describe()
    changed = "sha256" in recorded and facts["sha256"] != recorded["sha256"]
    if changed or (recorded and (spec == "byte") != (recorded.get("spec") == "byte")):
        rule = f"{folder}: was trained with another tokenizer than {spec} is now"
        raise DataError(rule, f"name the one it was trained with ({recorded.get('spec')}): --tokenizer")
    if words.vocab_size > vocab_size:
        rule = f"{spec}: has {words.vocab_size} tokens, the model has {vocab_size}"
        raise DataError(rule, "name the tokenizer it was trained with: --tokenizer")
    return words


def _top_k(top_k: int | None, vocab_size: int) -> int | None:
    if top_k is None:
        return min(_DEFAULT_TOP_K, vocab_size)
    if top_k > vocab_size:
        instead = f"set {vocab_size} or less, or 0 to draw from all tokens"
        raise ConfigError([Problem(f"--top-k {top_k}", f"the tokenizer has {vocab_size} tokens", instead)])
    return top_k or None


def _prompt_ids(words: Tokenizer, text: str, eod: int | None, limit: int) -> list[int]:
    if not text:
        # A document of the training data follows the end of another one.
        if eod is None:
            raise DataError("an empty prompt starts from the end-of-document token, and the tokenizer has none", "give --prompt TEXT")
        return [eod]
    try:
        ids = words.encode(text)
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not valid Unicode (character {error.start})", "give UTF-8 text") from error
    if not ids:
        raise DataError(f"the prompt {text[:40]!r} has no tokens", "give other text")
    if len(ids) > limit:
        raise DataError(f"the prompt has {len(ids)} tokens, the model has {limit} positions", f"shorten it to {limit} tokens or less")
    return ids


def _continuation(words: Tokenizer, ids: list[int], tokens: list[int]) -> str:
    """The text of the new tokens. Decoded behind the prompt, since some decoders strip the space of a text's first word."""
    before, whole = words.decode(ids), words.decode([*ids, *tokens])
    return whole[len(before) :] if whole.startswith(before) else words.decode(tokens)


def _print(prompt: str, texts: list[str]) -> None:
    for number, text in enumerate(texts):
        if len(texts) > 1:
            typer.echo(f"--- sample {number}")
        shown = prompt + text
        typer.echo(printable(shown) if sys.stdout.isatty() else shown)
