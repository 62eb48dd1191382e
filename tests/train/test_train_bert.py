"""BERT as a user meets it: text to sentences, a stop and a resume, a report; and tokenizers that outlive their files."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from train_harness import assert_same_tensors, checkpoint, evaluations, header, losses, records, steps, summary

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (str(DOCS), "--as-text", "--pattern", "*.md")
BERT = (
    "--preset", "bert-tiny", "--device", "cpu", "--seq-length", "32", "--micro-batch-size", "4", "--global-batch-size", "8",
    "--lr", "1e-3", "--warmup", "4", "--log-interval", "1", "--split", "80,20", "--layers", "2", "--eval-interval", "40",
    "--eval-iterations", "2",
)  # fmt: skip


@pytest.fixture
def sentences(train, tmp_path):
    """A WordPiece vocabulary and sentences made with it, out of this repository's documentation."""
    train.command("data", "tokenizer", "train", *TEXT, "--kind", "wordpiece", "--vocab-size", "400", "--output", "words/vocab.txt").must(0)
    preprocess = ("data", "preprocess", *TEXT, "--tokenizer", "words/vocab.txt", "--split-sentences", "--output-prefix", "docs")
    train.command(*preprocess).must(0)
    return tmp_path / "docs_text_sentence"


def test_bert_from_text_over_four_ranks(train, tmp_path, sentences):
    flags = ("--data", sentences, "--tp", "2", "--pp", "2", "--iterations", "40")
    train("whole", *flags, base=BERT).must(0)
    command = train.begin("run", *flags, base=BERT)
    command.iterations(3)
    command.signal(signal.SIGTERM)
    command.wait().must(75, "SIGTERM received", "run the same command again to continue")
    (stopped,) = steps(tmp_path / "run")
    assert 3 <= stopped < 40 and summary(tmp_path / "run")["status"] == "saved"
    train("run", *flags, base=BERT).must(0, f"at iteration {stopped}")
    found = [loss for _, loss in losses(tmp_path / "run")]
    # The stop has changed nothing, and something was learnt: ln 400 + ln 2 = 6.7 is chance.
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(found) == 40
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole") != []
    assert_same_tensors(checkpoint(tmp_path / "run", 40), checkpoint(tmp_path / "whole", 40))
    assert sum(found[-5:]) / 5 < found[0] - 0.5
    assert all(line["loss"] == pytest.approx(line["lm_loss"] + line["sentence_loss"], rel=1e-6) for line in records(tmp_path / "run"))
    refused = train.command("generate", str(tmp_path / "run"), "--prompt", "a")
    refused.must(2, "holds a BERT, which fills gaps in a text and does not continue it", "--model gpt")
    assert "damaged" not in refused.err
    pages = train.command("report", str(tmp_path / "run"), "--json").must(0)
    document = json.loads(pages.out)
    assert document["iterations_recorded"] == 40 and document["evaluations"] and document["missing"] == []
    page = Path(document["report"]).read_text()
    assert all(text in page for text in ("bert-tiny", "Loss of masked tokens", "Loss of sentence pairs"))


def test_gpt_refuses_sentences(train, sentences):
    train("gpt", "--preset", "gpt-tiny", "--data", sentences, "--device", "cpu", base=()).must(2, "its sequences are sentences")


def sentencepiece_model(train):
    library = pytest.importorskip("sentencepiece")
    lines = [line for line in (DOCS / "running.md").read_text().splitlines() if line]
    (train.folder / "words").mkdir()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(train.folder / "words" / "m"), vocab_size=300, hard_vocab_limit=False, minloglevel=2
    )
    return "words/m.model", ()


def wordpiece_vocabulary(train):
    train.command("data", "tokenizer", "train", *TEXT, "--kind", "wordpiece", "--vocab-size", "300", "--output", "words/vocab.txt").must(0)
    # WordPiece has no end-of-document token of its own, and this one is used against what the file beside it says.
    return "words/vocab.txt", ("--eod-token", "[SEP]", "--no-lower-case")


@pytest.mark.parametrize(
    ("make", "copies"), [(sentencepiece_model, {"tokenizer.model"}), (wordpiece_vocabulary, {"vocab.txt", "tokenizer_config.json"})]
)
def test_generate_needs_the_run_directory_alone(train, tmp_path, make, copies):
    spec, options = make(train)
    train.command("data", "preprocess", *TEXT, "--tokenizer", spec, "--append-eod", *options, "--output-prefix", "text").must(0)
    gpt = ("--preset", "gpt-tiny", "--device", "cpu", "--seq-length", "16", "--iterations", "2")
    train("run", "--data", tmp_path / "text_text_document", base=gpt).must(0)
    assert copies <= {path.name for path in (tmp_path / "run").iterdir()}
    sample = ("generate", str(tmp_path / "run"), "--prompt", "The run stops", "--max-tokens", "8", "--seed", "3", "--json")
    before = json.loads(train.command(*sample).must(0).out)
    shutil.rmtree(tmp_path / "words")
    after = json.loads(train.command(*sample).must(0).out)
    assert after["samples"] == before["samples"] and Path(after["tokenizer"]).parent == tmp_path / "run"
    if options:
        tokenizer = header(tmp_path / "run", 2)["tokenizer"]
        assert tokenizer["eod_token"] == "[SEP]" and tokenizer["cleaning"]["lower_case"] is False
    # The run itself also goes on without the original.
    more = train("run", "--data", tmp_path / "text_text_document", "--iterations", "3", base=gpt).must(0)
    assert "will need --tokenizer" not in more.err and header(tmp_path / "run", 3)["tokenizer"]["sha256"]
