"""Wrong input: exit code 2 and one message with the value, the rule and what to set instead, whichever layer notices it."""

from __future__ import annotations

import pytest
from train_harness import TINY

NO_DATA = tuple(word for word in TINY if word not in ("--mock-data", "--vocab", "64"))


@pytest.fixture
def corpus(train, tmp_path):
    """A prefix of byte tokens in twenty documents."""
    (tmp_path / "text.jsonl").write_text("".join('{"text": "%s"}\n' % ("abc def " * 20) for _ in range(20)))
    done = train.command(
        "data", "preprocess", str(tmp_path / "text.jsonl"), "--output-prefix", str(tmp_path / "c"), "--tokenizer", "byte", "--append-eod"
    )
    assert done.code == 0, done.err
    return tmp_path / "c_text_document"


def refused(done, *said):
    """Exit 2, one error, no ranks' noise, and everything in `said`."""
    done.must(2, *said)
    assert done.err.count("error:") == 1, done.err
    return done


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_file(train, corpus, suffix):
    path = corpus.with_name(corpus.name + suffix)
    path.write_bytes(path.read_bytes()[:-200])
    refused(train("run", "--data", corpus, "--split", "80,20,0", "--dp", "2", base=NO_DATA), path.name)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file(train, corpus, suffix):
    corpus.with_name(corpus.name + suffix).unlink()
    refused(train("run", "--data", corpus, base=NO_DATA), corpus.name)


def test_a_missing_tokenizer(train, corpus, tmp_path):
    refused(train("run", "--data", corpus, "--tokenizer", tmp_path / "tokenizer.json", base=NO_DATA), "tokenizer.json")


def test_a_vocabulary_that_is_too_small(train, corpus):
    done = train("run", "--data", corpus, "--vocab", "100", base=NO_DATA)
    refused(done, "--vocab 100: is smaller than the 257 tokens", "use --vocab 257")


def test_tokens_outside_the_vocabulary_of_data_without_a_record(train, corpus):
    corpus.with_name(corpus.name + ".json").unlink()
    done = train("run", "--data", corpus, "--vocab", "64", "--dp", "2", "--split", "100,0,0", base=NO_DATA)
    refused(done, "64")


def test_a_split_without_documents_for_evaluation(train, corpus):
    done = train("run", "--data", corpus, "--split", "99,1,0", "--eval-interval", "2", "--dp", "2", base=NO_DATA)
    refused(done, "--split 99,1,0: gives valid none of the 20 documents", "--eval-interval 0")


def test_more_positions_than_there_are(train):
    refused(train("run", "--seq-length", "64", "--max-positions", "32"), "--seq-length 64", "32")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tp", "3"), ("--tp 3", "--heads 4")),
        (("--pp", "4"), ("--pp 4", "--layers 2")),
        (("--dp", "3"), ("--global-batch-size 4", "multiple of")),
        (("--tp", "2", "--nproc", "3"), ("3",)),
        (("--micro-batch-size", "3"), ("--global-batch-size 4", "multiple of")),
        (("--precision", "int8"), ("int8",)),
        (("--resume", "maybe"), ("maybe",)),
        (("--rampup-batch-size", "2 x 8"), ("2 x 8",)),
        (("--iterations", "0"), ("--iterations 0",)),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_settings_that_cannot_be(train, tmp_path, flags, said):
    refused(train("run", *flags), *said)
    assert not (tmp_path / "run").exists()


def test_all_mistakes_at_once(train):
    refused(train("run", "--tp", "3", "--lr", "-1", "--seq-length", "0"), "--tp 3", "--lr -1", "--seq-length 0")


def test_no_data_at_all(train):
    refused(train("run", base=NO_DATA), "--data", "--mock-data")


def test_a_run_directory_that_cannot_be(train, tmp_path):
    (tmp_path / "run").write_text("a file")
    refused(train("run"), "run")


def test_a_missing_logger(train, tmp_path):
    pytest.importorskip("torch")
    import importlib.util

    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed, so nothing is missing")
    refused(train("run", "--wandb-project", "p"), "--wandb-project p: needs the package wandb", "pip install")
