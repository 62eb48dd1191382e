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
    assert "--append-eod out" in megactl("preprocess", "a.jsonl", *common, "--split-sentences", "--append-eod", cwd=corpus, code=2).stderr
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


def test_from_text_to_sentences_with_a_vocabulary_of_its_own(tmp_path):
    pytest.importorskip("tokenizers")
    texts = [f"The document {i} begins. It goes on, unbelievably! Dr. Who ends it." for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train = ("tokenizer", "train", "a.jsonl", "--vocab-size", 90, "--output", "vocab.txt")
    done = megactl(*train, "--kind", "wordpiece", cwd=tmp_path)
    assert "vocab.txt: " in done.stdout and "None" not in done.stdout
    shown = megactl("tokenizer", "show", "vocab.txt", "Unbelievably", cwd=tmp_path).stdout
    assert "pad 0, unk 1, cls 2, sep 3, mask 4" in shown and "lower (tokenizer_config.json)" in shown
    arguments = ("preprocess", "a.jsonl", "--output-prefix", "P", "--tokenizer", "vocab.txt", "--split-sentences")
    done = megactl(*arguments, cwd=tmp_path)
    assert "30 documents, 90 sentences" in done.stdout and "P_text_sentence.bin" in done.stdout and "lower case" in done.stderr
    shown = megactl("inspect", "P_text_sentence", "--show", 1, "--deep", cwd=tmp_path).stdout
    assert "30 of 90 sentences, 3.0 each on average (0 of one sentence)" in shown and "no end-of-document token" in shown
    assert "dr . who ends it ." in shown.split("\n")
    facts = json.loads(megactl("inspect", "P_text_sentence", "--json", cwd=tmp_path).stdout)
    assert facts["sentences"] and (facts["single_sentence_documents"], facts["long_sentences"]) == (0, 0)
    for options, words in (
        (("--kind", "wordpiece", "--overwrite", "--eod-token", "[EOD]"), "no end-of-document token"),
        (("--lower-case", "--overwrite"), "keeps text as it is"),
    ):
        assert words in megactl(*train, *options, cwd=tmp_path, code=2).stderr
    assert "Invalid value" in megactl(*train, "--kind", "unigram", cwd=tmp_path, code=2).stderr


def test_a_run_is_told_which_form_of_the_data_it_needs(tmp_path, monkeypatch, capsys):
    """In this process: every one of them is refused before anything heavy is loaded."""
    pytest.importorskip("tokenizers")
    from megactl.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n.\na\nb\n")
    (tmp_path / "a.txt").write_text("a b. b a. a.")
    common = ["data", "preprocess", "a.txt", "--workers", "1", "--tokenizer"]
    assert main([*common, "vocab.txt", "--output-prefix", "S", "--split-sentences"]) == 0
    assert main([*common, "vocab.txt", "--output-prefix", "D"]) == 0
    assert main([*common, "byte", "--output-prefix", "B", "--split-sentences"]) == 0

    def refused(data, model):
        layout = ["--layers", "2", "--hidden", "32", "--heads", "2", "--seq", "32", "--device", "cpu"]
        capsys.readouterr()
        assert main(["train", "--model", model, "--data", data, *layout, "--dry-run"]) == 2
        return capsys.readouterr().err

    assert "preprocess the text without --split-sentences, or use --model bert" in refused("S_text_sentence", "gpt")
    assert "S_text_sentence.idx is for --model bert" in refused("S", "gpt")
    assert "preprocess the text with --split-sentences" in refused("D_text_document", "bert")
    assert "D_text_document.idx is for --model gpt" in refused("D", "bert")
    message = refused("B", "bert")
    assert "byte: has no [CLS], [SEP], [MASK], [PAD]" in message and "--kind wordpiece" in message
    (tmp_path / "vocab.txt").rename(tmp_path / "moved.txt")
    assert "say where it is now: --tokenizer PATH" in refused("S", "bert")
    (tmp_path / "S_text_sentence.json").unlink()
    assert "no tokenizer is recorded with the data; name the one" in refused("S", "bert")
