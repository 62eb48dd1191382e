"""`megactl data` as it is typed: exit codes, one JSON document on stdout, messages on stderr."""

import gzip
import json
import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "megactl", "data"]


def megactl(*arguments, cwd=None, code=0):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def corpus(tmp_path):
    lines = [{"text": f"document number {i} of the corpus", "body": str(i)} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("naïve\n".encode()))
    return tmp_path


def test_preprocess_and_inspect(corpus):
    done = megactl(
        "preprocess", "a.jsonl", "--input", "b.txt.gz", "--output-prefix", "P", "--tokenizer", "byte", "--append-eod", cwd=corpus
    )
    assert "P_text_document.bin" in done.stdout and "documents/s" in done.stdout and "MB/s" in done.stdout
    shown = megactl("inspect", "P_text_document", "--show", 2, "--deep", cwd=corpus).stdout
    assert "document number 1 of the corpus<|endoftext|>" in shown and "checksums" in shown
    facts = json.loads(megactl("inspect", "P_text_document.idx", "--json", "--show", 1, cwd=corpus).stdout)
    assert (facts["documents"], facts["vocab_size"], facts["eod"], facts["dtype"]) == (21, 257, 256, "uint16")
    assert facts["longest"] == 33 and facts["texts"] == ["document number 0 of the corpus<|endoftext|>"]


def test_json_is_one_document_and_progress_is_elsewhere(corpus):
    arguments = ("preprocess", corpus / "a.jsonl", "--output-prefix", corpus / "P", "--tokenizer", "byte", "--json", "--json-key", "body")
    summary = json.loads(megactl(*arguments).stdout)
    assert summary["outputs"] == [str(corpus / "P_body_document")] and summary["documents"] == 20 and not summary["already_done"]
    again = megactl(*arguments)
    assert json.loads(again.stdout)["already_done"] and "already done" in again.stderr


def test_mistakes_exit_2_with_what_to_do(corpus):
    done = megactl("preprocess", "a.jsonl", cwd=corpus, code=2)
    assert "--output-prefix and --tokenizer" in done.stderr
    common = ("--output-prefix", "P", "--tokenizer", "byte")
    assert "cannot be read" in megactl("preprocess", "none.jsonl", *common, cwd=corpus, code=2).stderr
    (corpus / "bad.jsonl").write_text('{"text": "x"}\n{\n')
    done = megactl("preprocess", "bad.jsonl", *common, cwd=corpus, code=2)
    assert "bad.jsonl:2" in done.stderr and "--skip-bad" in done.stderr
    done = megactl("preprocess", "bad.jsonl", *common, "--skip-bad", cwd=corpus)
    assert "left out 1 bad documents" in done.stderr
    assert "split-sentences" in megactl("preprocess", "a.jsonl", *common, "--split-sentences", cwd=corpus, code=2).stderr
    failed = megactl("inspect", "nothing", "--json", cwd=corpus, code=2)
    assert json.loads(failed.stdout)["error"]["exit_code"] == 2


def test_inspect_finds_damage(corpus):
    megactl("preprocess", "a.jsonl", "--output-prefix", "P", "--tokenizer", "byte", cwd=corpus)
    path = corpus / "P_text_document.bin"
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)
    megactl("inspect", "P_text_document", cwd=corpus)
    assert "sha256" in megactl("inspect", "P_text_document", "--deep", cwd=corpus, code=2).stderr
    content[3] = 0xFF
    path.write_bytes(content)
    assert "must be in [0, 257)" in megactl("inspect", "P_text_document", "--deep", cwd=corpus, code=2).stderr
    path.write_bytes(content[:-2])
    assert "truncated" in megactl("inspect", "P_text_document", cwd=corpus, code=2).stderr
    assert "did you mean P_text_document" in megactl("inspect", "P", cwd=corpus, code=2).stderr


def test_show_needs_the_tokenizer_and_cannot_command_the_terminal(corpus):
    (corpus / "evil.jsonl").write_text(json.dumps({"text": "\x1b]0;title\x07x"}) + "\n")
    megactl("preprocess", "evil.jsonl", "--output-prefix", "E", "--tokenizer", "byte", cwd=corpus)
    assert "\x1b" not in megactl("inspect", "E_text_document", "--show", 1, cwd=corpus).stdout
    (corpus / "E_text_document.json").unlink()
    assert "--tokenizer" in megactl("inspect", "E_text_document", "--show", 1, cwd=corpus, code=2).stderr
    assert "x" in megactl("inspect", "E_text_document", "--show", 1, "--tokenizer", "byte", cwd=corpus).stdout
    assert "add --show" in megactl("inspect", "E_text_document", "--tokenizer", "byte", cwd=corpus, code=2).stderr


def test_tokenizer_commands(corpus):
    pytest.importorskip("tokenizers")
    done = megactl("tokenizer", "train", "a.jsonl", "--vocab-size", 280, "--output", "t.json", "--json", cwd=corpus)
    trained = json.loads(done.stdout)
    assert trained["requested"] == 280 and 257 < trained["vocab_size"] <= 280
    assert ("gives only" in done.stderr) == (trained["vocab_size"] < 280)
    shown = json.loads(megactl("tokenizer", "show", "t.json", "document", "--json", cwd=corpus).stdout)
    assert "".join(shown["pieces"]) == "document" and shown["vocab_size"] == trained["vocab_size"]
    assert "256 <|endoftext|>" in megactl("tokenizer", "show", "byte").stdout
    megactl("preprocess", "a.jsonl", "--output-prefix", "T", "--tokenizer", "t.json", "--append-eod", cwd=corpus)
    facts = json.loads(megactl("inspect", "T_text_document", "--deep", "--show", 1, "--json", cwd=corpus).stdout)
    assert facts["texts"] == ["document number 0 of the corpus<|endoftext|>"]
    (corpus / "t.json").write_text((corpus / "t.json").read_text().replace("Ġ", "Ġ ", 1))
    assert megactl("inspect", "T_text_document", "--show", 1, cwd=corpus, code=2).stderr
    assert "exists" in megactl("tokenizer", "train", "a.jsonl", "--vocab-size", 280, "--output", "t.json", cwd=corpus, code=2).stderr


@pytest.mark.parametrize("command", [("preprocess",), ("inspect",), ("tokenizer", "train"), ("tokenizer", "show")])
def test_help_has_worked_examples(command):
    assert "Examples" in megactl(*command, "--help").stdout


def test_nothing_here_imports_torch():
    code = (
        "import sys, megactl.commands.data, megactl.storage.preprocess, megactl.storage.bpe, megactl.storage.inspect, "
        "megactl.storage.sample_index, megactl.storage.blending, megactl.storage.data_spec\n"
        "assert not {'torch', 'tokenizers', 'zstandard', 'pandas'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
