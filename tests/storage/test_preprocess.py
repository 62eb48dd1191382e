"""Preprocessing: order, determinism, bad input, and going on after a kill."""

import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megactl.errors import DataError, MegactlError
from megactl.storage.indexed import IndexedDataset, file_sha256
from megactl.storage.preprocess import PreprocessOptions, preprocess
from megactl.storage.text import Position, Source, _whole_lines, find_sources, read_chunks


def run(tmp_path, *inputs, out="P", log=lambda message: None, **options):
    settings = {"tokenizer": "byte", "workers": 1, **options}
    return preprocess(PreprocessOptions(inputs=tuple(map(str, inputs)), output_prefix=str(tmp_path / out), **settings), log=log)


def jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


def documents(prefix):
    data = IndexedDataset(prefix)
    return [
        bytes(data.document(i).tolist()).decode() if 256 not in data.document(i) else data.document(i).tolist() for i in range(len(data))
    ]


def digest(prefix):
    return file_sha256(prefix.with_name(prefix.name + ".bin")), file_sha256(prefix.with_name(prefix.name + ".idx"))


def test_lines_files_and_folders_in_order(tmp_path):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    jsonl(folder / "a.jsonl", ["one", "zwei"])
    (folder / "b" / "c.txt").write_bytes("\ufeffdrei\r\n".encode())
    (folder / "notes.md").write_text("not taken")
    (folder / "z.txt.gz").write_bytes(gzip.compress(b"four"))
    summary = run(tmp_path, folder)
    assert documents(tmp_path / "P_text_document") == ["one", "zwei", "four", "drei\r\n"]
    assert (summary.documents, summary.tokens, summary.dtype, summary.already_done) == (4, 17, "uint16", False)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*state*"))
    metadata = IndexedDataset(tmp_path / "P_text_document").metadata
    assert (metadata.vocab_size, metadata.eod, metadata.append_eod, metadata.tokenizer) == (257, 256, False, "byte")
    assert metadata.sources[0] == str(folder / "a.jsonl")
    assert (metadata.checksums["bin"], metadata.checksums["idx"]) == digest(tmp_path / "P_text_document")


def test_append_eod_and_empty_documents(tmp_path):
    summary = run(tmp_path, jsonl(tmp_path / "a.jsonl", ["hi", "", "x"]), append_eod=True)
    assert documents(tmp_path / "P_text_document") == [[104, 105, 256], [120, 256]]
    assert summary.empty_documents == 1


def sentences(prefix):
    """Each document as the texts of its sentences."""
    data = IndexedDataset(prefix)
    texts = [bytes(data.sequence(i).tolist()).decode() for i in range(len(data))]
    return [texts[first:last] for first, last in itertools.pairwise(data.documents.tolist())]


def test_sentences_are_sequences_and_documents_runs_of_them(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ["One. Two!  Three?", "", "  \n ", "Only one", "Naïve café. 你好。再见。"])
    summary = run(tmp_path, source, split_sentences=True)
    prefix = tmp_path / "P_text_sentence"
    assert sentences(prefix) == [["One.", "Two!", "Three?"], ["Only one"], ["Naïve café.", "你好。", "再见。"]]
    assert (summary.documents, summary.sentences, summary.empty_documents, summary.cut_sentences) == (3, 7, 2, 0)
    assert summary.outputs == (str(prefix),) and IndexedDataset(prefix).holds_sentences
    metadata = IndexedDataset(prefix).metadata
    assert (metadata.split_sentences, metadata.documents, metadata.sequences, metadata.append_eod) == (True, 3, 7, False)
    again = run(tmp_path, source, split_sentences=True)
    assert again.already_done and (again.documents, again.sentences) == (3, 7)
    # Documents of the same text are another pair beside it, and say of themselves what they are.
    assert run(tmp_path, source).sentences is None
    assert IndexedDataset(tmp_path / "P_text_document").metadata.split_sentences is False


def test_end_of_document_has_no_place_among_sentences(tmp_path):
    with pytest.raises(DataError, match="leave --append-eod out"):
        run(tmp_path, jsonl(tmp_path / "a.jsonl", ["One."]), split_sentences=True, append_eod=True)


def test_long_sentences_are_cut_into_equal_parts_and_nothing_is_lost(tmp_path):
    text = "x" * 1100 + ". Short. " + "Y" * 511 + "."
    summary = run(tmp_path, jsonl(tmp_path / "a.jsonl", [text]), split_sentences=True)
    data = IndexedDataset(tmp_path / "P_text_sentence")
    assert data.lengths.tolist() == [367, 367, 367, 6, 512] and summary.cut_sentences == 1
    assert "".join(sentences(tmp_path / "P_text_sentence")[0]) == text.replace(". ", ".")


def test_a_sentence_without_tokens_is_left_out(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n.\n")
    lines = []
    source = jsonl(tmp_path / "a.jsonl", ["A b. \u200b\n\n\u200b\n\nB a.", "\u200b"])
    summary = run(tmp_path, source, tokenizer=str(tmp_path / "vocab.txt"), split_sentences=True, log=lines.append)
    data = IndexedDataset(tmp_path / "P_text_sentence")
    assert [data.sequence(i).tolist() for i in range(len(data))] == [[5, 6, 7], [6, 5, 7]]
    assert (summary.documents, summary.empty_documents) == (1, 1)
    assert "lower case (the vocabulary has no capitals)" in lines[0]
    # Another treatment of capitals is other data.
    with pytest.raises(DataError, match="--overwrite"):
        run(tmp_path, source, tokenizer=str(tmp_path / "vocab.txt"), split_sentences=True, lower_case=False)


@pytest.mark.slow
def test_sentences_do_not_depend_on_workers_or_chunks(tmp_path, corpus):
    digests = set()
    for workers, chunk in ((1, 1 << 20), (2, 50_000)):
        run(tmp_path, corpus, out=f"w{workers}", workers=workers, chunk_bytes=chunk, split_sentences=True)
        digests.add(digest(tmp_path / f"w{workers}_text_sentence"))
    assert len(digests) == 1
    data = IndexedDataset(tmp_path / "w2_text_sentence")
    assert len(data) > data.num_documents > 2300 and int(data.lengths.max()) <= 512


def test_interruption_between_sentences_repeats_nothing(tmp_path, corpus, monkeypatch):
    from megactl.storage import preprocess as module

    run(tmp_path, corpus, out="whole", split_sentences=True, chunk_bytes=100_000)
    append, calls = module._append, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return append(*arguments)

    monkeypatch.setattr(module, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, corpus, split_sentences=True, chunk_bytes=100_000)
    summary = run(tmp_path, corpus, split_sentences=True, chunk_bytes=100_000)
    assert summary.resumed_documents > 0 and digest(tmp_path / "P_text_sentence") == digest(tmp_path / "whole_text_sentence")
    assert summary.sentences == len(IndexedDataset(tmp_path / "P_text_sentence"))


def test_keys_name_the_pairs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "T", "content": "body"}\n')
    run(tmp_path, tmp_path / "a.jsonl", json_keys=("content", "title"))
    assert documents(tmp_path / "P_content_document") == ["body"] and documents(tmp_path / "P_title_document") == ["T"]


def test_as_text_and_patterns(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("b.py", "a.py", "c.rst", "d.o"):
        (tmp_path / "src" / name).write_text(name)
    run(tmp_path, tmp_path / "src", as_text=True, patterns=("*.py", "*.rst"))
    assert documents(tmp_path / "P_text_document") == ["a.py", "b.py", "c.rst"]
    run(tmp_path, tmp_path / "src" / "d.o", as_text=True, out="Q")
    assert documents(tmp_path / "Q_text_document") == ["d.o"]
    with pytest.raises(DataError, match="--as-text"):
        run(tmp_path, tmp_path / "src" / "c.rst", out="R")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Five files, 3 MB, with documents from one byte to longer than a chunk."""
    source, folder = random.Random(5), tmp_path_factory.mktemp("corpus")
    texts = ["".join(source.choices("abc déf\n北", k=source.choice((1, 40, 700, 3000)))) for _ in range(2500)]
    texts[100] = "long " * 60_000
    jsonl(folder / "a.jsonl", texts[:1500])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts[1500:2400]).encode()))
    for i, text in enumerate(texts[2400:]):
        (folder / f"c{i:03d}.txt").write_text(text, "utf-8")
    return folder


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers_or_chunks(tmp_path, corpus):
    digests = set()
    for workers, chunk in ((1, 1 << 20), (1, 10_000), (2, 50_000), (3, 200_000)):
        out = f"w{workers}-{chunk}"
        run(tmp_path, corpus, out=out, workers=workers, chunk_bytes=chunk, append_eod=True)
        digests.add(digest(tmp_path / f"{out}_text_document"))
    assert len(digests) == 1
    assert len(IndexedDataset(tmp_path / f"{out}_text_document")) == 2500


SLOW = """
import sys, time
from megactl.storage import encoding, preprocess
preprocess._SAVE_EVERY_S = 0.0
encode = encoding.encode_chunk
def slow(config, chunk):
    time.sleep(0.02)
    return encode(config, chunk)
preprocess.encode_chunk = slow
fixed = dict(tokenizer="byte", workers=1, append_eod=True, chunk_bytes=100_000)
options = preprocess.PreprocessOptions(inputs=(sys.argv[1],), output_prefix=sys.argv[2], **fixed)
print("start", flush=True)
preprocess.preprocess(options, log=print)
"""


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_it_continues_with_the_same_bytes(tmp_path, corpus, rounds):
    run(tmp_path, corpus, out="whole", append_eod=True)
    source, continued = random.Random(8), 0
    for round in range(rounds):
        out = tmp_path / f"killed{round}"
        while True:
            process = subprocess.Popen([sys.executable, "-c", SLOW, str(corpus), str(out)], stdout=subprocess.PIPE, text=True)
            assert process.stdout.readline() == "start\n"
            time.sleep(source.uniform(0.1, 0.6))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read()
            continued += "continuing" in rest
            if process.wait() == 0:
                break
        assert digest(tmp_path / f"killed{round}_text_document") == digest(tmp_path / "whole_text_document")
        assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*state.json"))
    assert continued > rounds


def test_interruption_inside_a_step_repeats_nothing(tmp_path, corpus, monkeypatch):
    """The writers have taken a chunk that the state does not know of yet."""
    from megactl.storage import preprocess as module

    run(tmp_path, corpus, out="whole", append_eod=True, chunk_bytes=30_000)
    append, calls = module._append, []

    def interrupted(state, writers, chunk, encoded):
        result = append(state, writers, chunk, encoded)
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(module, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, corpus, append_eod=True, chunk_bytes=30_000)
    summary = run(tmp_path, corpus, append_eod=True, chunk_bytes=30_000)
    assert summary.resumed_documents > 0
    assert digest(tmp_path / "P_text_document") == digest(tmp_path / "whole_text_document")


def test_state_that_does_not_fit_starts_anew_and_says_so(tmp_path, corpus, monkeypatch):
    from megactl.storage import preprocess as module

    append = module._append

    def stop(*arguments):
        monkeypatch.setattr(module, "_append", append)
        raise KeyboardInterrupt

    for spoil, words in (
        (lambda: os.truncate(tmp_path / "P_text_document.lengths.partial", 0), "continuing"),
        (lambda: (tmp_path / "P_text_document.bin.partial").unlink(), "shorter than"),
        (lambda: (tmp_path / "P.preprocess-state.json").write_text("{"), "cannot be read"),
    ):
        lines = []
        monkeypatch.setattr(module, "_append", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, corpus, overwrite=True)
        spoil()
        run(tmp_path, corpus, overwrite=True, log=lines.append)
        assert any(words in line for line in lines)
        assert len(IndexedDataset(tmp_path / "P_text_document")) == 2500
    monkeypatch.setattr(module, "_append", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, corpus, overwrite=True)
    lines = []
    run(tmp_path, corpus, overwrite=True, append_eod=True, log=lines.append)
    assert any("other input or options" in line for line in lines)


def test_done_twice_is_done_once_and_other_output_is_kept(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ["one"])
    run(tmp_path, source)
    before = os.stat(tmp_path / "P_text_document.bin").st_mtime_ns
    assert run(tmp_path, source).already_done
    assert os.stat(tmp_path / "P_text_document.bin").st_mtime_ns == before
    with pytest.raises(DataError, match="--overwrite"):
        run(tmp_path, source, append_eod=True)
    run(tmp_path, source, append_eod=True, overwrite=True)
    assert documents(tmp_path / "P_text_document") == [[111, 110, 101, 256]]


def test_two_runs_on_one_prefix_are_refused(tmp_path):
    import fcntl

    source = jsonl(tmp_path / "a.jsonl", ["one"])
    with (tmp_path / "P.preprocess-state.lock").open("w+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4711")
        file.flush()
        with pytest.raises(DataError, match="is being written by pid 4711"):
            run(tmp_path, source)
    run(tmp_path, source)


BAD_LINES = [
    ('{"text": "a"', "is not valid JSON"),
    ('["text"]', "must be one JSON object, not a list"),
    ('{"body": "a"}', r"has no key 'text' \(its keys: body\)"),
    ('{"text": 3}', "'text' is a int; it must be a string"),
    ('{"text": "\\ud800"}', "lone surrogate"),
    ("[" * 200_000, "is not valid JSON"),
    (b'{"text": "\xff"}', "is not valid UTF-8"),
]


@pytest.mark.parametrize("line, words", BAD_LINES)
def test_bad_line_names_file_and_line_or_is_counted(tmp_path, line, words):
    data = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + data + b'\n{"text": "after"}')
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*" + words):
        run(tmp_path, tmp_path / "a.jsonl")
    summary = run(tmp_path, tmp_path / "a.jsonl", skip_bad=True)
    assert (summary.documents, summary.bad_documents) == (2, 1) and "a.jsonl:3" in summary.first_bad
    assert documents(tmp_path / "P_text_document") == ["good", "after"]


def test_line_numbers_run_on_over_chunks_and_workers(tmp_path):
    lines = ['{"text": "%s"}' % ("x" * 100)] * 3000
    lines[2500] = "oops"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl:2501"):
            run(tmp_path, tmp_path / "a.jsonl", workers=workers, chunk_bytes=5000)


def test_bad_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(DataError, match=r"a\.txt: byte 3 is not valid UTF-8"):
        run(tmp_path, tmp_path / "a.txt")


@pytest.mark.parametrize("cut", [1, 9, 20])
def test_truncated_gzip_is_an_error(tmp_path, cut):
    content = gzip.compress(b'{"text": "hello"}\n' * 10)
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-cut])
    with pytest.raises(DataError, match="is truncated"):
        run(tmp_path, tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="is damaged"):
        run(tmp_path, tmp_path / "a.jsonl.gz")


def test_gzip_of_several_members(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n'))
    run(tmp_path, tmp_path / "a.jsonl.gz")
    assert documents(tmp_path / "P_text_document") == ["one", "two"]


def test_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = zstandard.compress(b'{"text": "one"}\n') + zstandard.compress(b'{"text": "two"}\n')
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    run(tmp_path, tmp_path / "a.jsonl.zst")
    assert documents(tmp_path / "P_text_document") == ["one", "two"]
    (tmp_path / "b.jsonl.zst").write_bytes(content[:-3])
    with pytest.raises(DataError, match="is truncated"):
        run(tmp_path, tmp_path / "b.jsonl.zst", out="Q")


def test_zstd_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd" + bytes(20))
    with pytest.raises(MegactlError, match=r"megactl\[zstd\]"):
        run(tmp_path, tmp_path / "a.jsonl.zst")


def test_wrong_input_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for inputs, words in ((("missing.jsonl",), "cannot be read"), ((tmp_path / "empty",), "holds no .txt"), ((), "no input files")):
        with pytest.raises(DataError, match=words):
            run(tmp_path, *inputs)
    source = jsonl(tmp_path / "a.jsonl", ["one"])
    for options, words in (
        ({"workers": 0}, "--workers 0"),
        ({"json_keys": ("a", "a")}, "--json-key"),
        ({"json_keys": ("a/b",)}, "--json-key"),
    ):
        with pytest.raises(DataError, match=words):
            run(tmp_path, source, **options)
    with pytest.raises(DataError, match="not a plain file"):
        os.mkfifo(tmp_path / "pipe.txt")
        run(tmp_path, tmp_path / "pipe.txt")


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path, monkeypatch):
    from megactl.errors import RunError
    from megactl.storage import preprocess as module

    monkeypatch.setattr(module, "encode_chunk", _die)
    source = jsonl(tmp_path / "a.jsonl", ["x" * 1000] * 50)
    with pytest.raises(RunError, match="a worker process was killed"):
        run(tmp_path, source, workers=2, chunk_bytes=1000)


def _die(config, chunk):
    os.kill(os.getpid(), signal.SIGKILL)


@given(st.binary(max_size=300), st.integers(1, 40), st.integers(1, 60))
def test_chunks_are_the_input_and_end_with_lines(data, step, chunk):
    blocks = [(data[i : i + step], i + step) for i in range(0, len(data), step)]
    pieces = [piece for piece, _ in _whole_lines(blocks, chunk)]
    assert b"".join(pieces) == data
    assert all(piece.endswith(b"\n") and len(piece) > 0 for piece in pieces[:-1])


def test_reading_may_start_between_any_two_chunks(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(500))
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.txt").write_text("text")
    sources = find_sources([tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.txt")])
    whole = list(read_chunks(sources, Position(), 1000))
    assert b"".join(chunk.data for chunk in whole) == 2 * lines and whole[-1].files[0].path.endswith("c.txt")
    assert whole[-1].disk_bytes == sum(source.size for source in sources)
    for number, chunk in enumerate(whole):
        rest = list(read_chunks(sources, chunk.end, 1000))
        assert b"".join(item.data for item in rest) == b"".join(item.data for item in whole[number + 1 :])
        assert [item.first_line for item in rest][:1] == [item.first_line for item in whole[number + 1 :]][:1]
    assert isinstance(sources[0], Source)
