#!/usr/bin/env python3
"""Makes real text and data for gpt-345m and bert-345m from what a machine has: Python's library and installed packages. No network.

    PYTHONPATH=. python3 scripts/bench_gpu/make_data.py DATA [--megabytes 96] [--only gpt|bert] [--gpt-vocab 50257] [--bert-vocab 30522]

gpt:  DATA/gpt.jsonl, a document a source or text file -> byte-level BPE -> DATA/gpt_text_document.bin/.idx
bert: DATA/bert.jsonl, a document the docstrings of a source file, or a text file -> WordPiece -> DATA/bert_text_sentence.bin/.idx

The standard library comes first, then packages by name, until --megabytes of text are there; equal documents are kept once. Two machines
with the same packages make the same text. What exists is kept: remove DATA to make it anew.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SKIPPED = {"test", "tests", "testing", "__pycache__", "idlelib", "node_modules"}
PROSE, SOURCE = (".txt", ".rst", ".md"), ".py"
# Larger files are tables and generated code; smaller documents have no sentence to learn from.
LARGEST, SMALLEST = 400_000, 200


def files() -> Iterator[Path]:
    """Text and source files in a fixed order: the standard library, then site-packages."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    for root, skipped in ((library, SKIPPED | {"site-packages", "dist-packages"}), (packages, SKIPPED)):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in skipped)
            yield from (Path(folder, name) for name in sorted(names) if name.endswith((SOURCE, *PROSE)))


def read(path: Path) -> str | None:
    """A file's text; None where it is empty, too large or not UTF-8."""
    try:
        if not 0 < path.stat().st_size <= LARGEST:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def prose(path: Path) -> str | None:
    """The sentences of a file: a text file as it is, of source code the docstrings without their examples."""
    text = read(path)
    if text is None or path.suffix != SOURCE:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, owners)]
    kept = [_without_examples(inspect.cleandoc(text)) for text in found if text]
    return "\n\n".join(text for text in kept if text) or None


def _without_examples(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith((">>>", "...", "--", "==", "~~"))).strip()


def write_corpus(path: Path, megabytes: float, *, sentences: bool) -> None:
    """Write documents, a JSON line each, until there are as many megabytes of text, whole or not at all."""
    started, seen, size, count = time.monotonic(), set(), 0, 0
    temporary = path.with_suffix(".part")
    with ProcessPoolExecutor() as pool, temporary.open("w", encoding="utf-8") as out:
        for text in pool.map(prose if sentences else read, files(), chunksize=64):
            if text is None or len(text) < SMALLEST:
                continue
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size, count = size + len(text.encode()), count + 1
            if size >= megabytes * 1e6:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    temporary.replace(path)
    print(f"{path}: {count} documents, {size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s", flush=True)


def megactl(*words: str) -> None:
    """Run a megactl command with this Python; its failure ends the program."""
    print("$ megactl", *words, flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "megactl", *words], check=False).returncode
    if code:
        raise SystemExit(f"make_data: exit code {code}: megactl {' '.join(words)}")
    print(f"  {time.monotonic() - started:.0f} s", flush=True)


def make_gpt(data: Path, megabytes: float, vocab_size: int) -> None:
    """Corpus, tokenizer and token file of the GPT."""
    corpus, tokenizer = data / "gpt.jsonl", data / "gpt-tokenizer.json"
    if not corpus.exists():
        write_corpus(corpus, megabytes, sentences=False)
    if not tokenizer.exists():
        megactl("data", "tokenizer", "train", str(corpus), "--vocab-size", str(vocab_size), "--output", str(tokenizer))
    if not (data / "gpt_text_document.idx").exists():
        words = ("--tokenizer", str(tokenizer), "--append-eod", "--output-prefix", str(data / "gpt"))
        megactl("data", "preprocess", str(corpus), *words)
    megactl("data", "inspect", str(data / "gpt_text_document"))


def make_bert(data: Path, megabytes: float, vocab_size: int) -> None:
    """Corpus, vocabulary and sentence file of the BERT."""
    corpus, vocabulary = data / "bert.jsonl", data / "vocab.txt"
    if not corpus.exists():
        write_corpus(corpus, megabytes, sentences=True)
    if not vocabulary.exists():
        words = ("--kind", "wordpiece", "--vocab-size", str(vocab_size), "--output", str(vocabulary))
        megactl("data", "tokenizer", "train", str(corpus), *words)
    if not (data / "bert_text_sentence.idx").exists():
        words = ("--split-sentences", "--tokenizer", str(vocabulary), "--output-prefix", str(data / "bert"))
        megactl("data", "preprocess", str(corpus), *words)
    megactl("data", "inspect", str(data / "bert_text_sentence"))


def main() -> None:
    """Parse the command line and make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--megabytes", type=float, default=96.0)
    parser.add_argument("--only", choices=["gpt", "bert"])
    parser.add_argument("--gpt-vocab", type=int, default=50257)
    parser.add_argument("--bert-vocab", type=int, default=30522)
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)
    if arguments.only != "bert":
        make_gpt(arguments.data, arguments.megabytes, arguments.gpt_vocab)
    if arguments.only != "gpt":
        make_bert(arguments.data, arguments.megabytes, arguments.bert_vocab)


if __name__ == "__main__":
    main()
