"""The copy of a tokenizer in a run directory: every kind, with what the data was made with, when the original is gone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megactl.errors import DataError
from megactl.storage.dataset_metadata import read_metadata
from megactl.storage.preprocess import PreprocessOptions, preprocess
from megactl.storage.tokenizer import load_recorded, load_tokenizer
from megactl.storage.tokenizer_copy import find_copy, keep_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and the café of the naïve fox.\n" * 40
LINE = "The naïve fox"


def bpe(folder):
    from megactl.storage.bpe import train_bpe

    train_bpe([folder / "text.txt"], 300, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def gpt2(folder):
    document = json.loads(bpe(folder).read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "small-vocab.json").write_text(json.dumps(document["model"]["vocab"]))
    (folder / "small-merges.txt").write_text("\n".join(" ".join(pair) for pair in document["model"]["merges"]) + "\n")
    return folder / "small-vocab.json"


def wordpiece(folder):
    from megactl.storage.wordpiece_training import train_wordpiece

    train_wordpiece([folder / "text.txt"], 120, folder / "vocab.txt", lower_case=False)
    # As downloaded vocabularies are: nothing beside it says how it treats capitals.
    (folder / "tokenizer_config.json").unlink()
    return folder / "vocab.txt"


def sentencepiece(folder):
    library = pytest.importorskip("sentencepiece")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_prefix=str(folder / "m"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return folder / "m.model"


KINDS = {"tokenizer.json": bpe, "vocab.json + merges.txt": gpt2, "vocab.txt": wordpiece, "sentencepiece": sentencepiece}


@pytest.fixture
def made(tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "original" / "text.txt").write_text(TEXT, "utf-8")
    return tmp_path / "original"


def data_of(folder, tokenizer, **options):
    preprocess(
        PreprocessOptions(inputs=(str(folder / "text.txt"),), output_prefix=str(folder.parent / "d"), tokenizer=str(tokenizer), workers=1,
                          **options), lambda counts: None, lambda text: None)  # fmt: skip
    return str(folder.parent / "d_text_document")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_from_its_copy(made, kind):
    path = KINDS[kind](made)
    original = load_tokenizer(path)
    ids, facts = original.encode(LINE), original.describe()
    kept = keep_tokenizer(str(path), data_of(made, path), made.parent / "run")
    assert {**kept, "cleaning": None} == {**facts, "cleaning": None} and kept["kind"] == kind
    shutil.rmtree(made)
    copy = find_copy(made.parent / "run", kept["kind"])
    again = load_recorded(str(copy), eod_token=kept["eod_token"])
    assert again.encode(LINE) == ids and again.describe()["sha256"] == facts["sha256"]
    # The run goes on without the original, and says the same of its tokenizer.
    after = keep_tokenizer(str(path), str(made.parent / "d_text_document"), made.parent / "run")
    assert {**after, "path": None, "cleaning": None} == {**kept, "path": None, "cleaning": None}


def test_capitals_are_treated_as_the_data_was_made(made):
    """The flag of `data preprocess` wins over what the vocabulary shows, and reaches the copy."""
    path = wordpiece(made)
    prefix = data_of(made, path, lower_case=True, eod_token="[SEP]", append_eod=True)
    record = read_metadata(Path(prefix))
    assert record.lower_case is True and record.eod_token == "[SEP]"
    assert load_tokenizer(path).encode("Fox") != load_tokenizer(path, lower_case=True).encode("Fox"), "the two differ here"
    facts = keep_tokenizer(str(path), prefix, made.parent / "run")
    assert facts["eod_token"] == "[SEP]" and facts["cleaning"]["lower_case"]
    assert json.loads((made.parent / "run" / "tokenizer_config.json").read_text())["do_lower_case"] is True
    copy = load_tokenizer(find_copy(made.parent / "run", "vocab.txt"))
    assert copy.encode("Fox") == load_tokenizer(path, lower_case=True).encode("Fox")


def test_a_stale_copy_of_another_tokenizer_is_not_used(made):
    path = wordpiece(made)
    prefix = data_of(made, path)
    keep_tokenizer(str(path), prefix, made.parent / "run")
    path.unlink()
    (made.parent / "run" / "vocab.txt").write_text("[UNK]\na\nb\n")
    with pytest.raises(DataError, match="is another one"):
        keep_tokenizer(str(path), prefix, made.parent / "run")
    (made.parent / "run" / "vocab.txt").unlink()
    with pytest.raises(DataError, match="does not exist"):
        keep_tokenizer(str(path), prefix, made.parent / "run")


def test_bytes_need_no_copy(made):
    assert keep_tokenizer("byte", data_of(made, "byte"), made.parent / "run")["kind"] == "byte"
    assert list((made.parent / "run").iterdir()) == [] and find_copy(made.parent / "run", "byte") is None


def test_a_changed_original_replaces_the_copy_and_an_equal_one_is_left_alone(made):
    path, run = wordpiece(made), made.parent / "run"
    keep_tokenizer(str(path), None, run)
    before = (run / "vocab.txt").stat().st_ino
    keep_tokenizer(str(path), None, run)
    keep_tokenizer(str(run / "vocab.txt"), None, run)
    assert (run / "vocab.txt").stat().st_ino == before
    path.write_text(path.read_text() + "##more\n")
    keep_tokenizer(str(path), None, run)
    assert (run / "vocab.txt").read_bytes() == path.read_bytes()


def test_a_record_with_a_wrong_type_is_named(made):
    prefix = data_of(made, "byte")
    document = json.loads((made.parent / "d_text_document.json").read_text())
    assert document["lower_case"] is None
    (made.parent / "d_text_document.json").write_text(json.dumps(document | {"lower_case": "yes"}))
    with pytest.raises(DataError, match="lower_case = 'yes'; must be true, false or null"):
        read_metadata(Path(prefix))
    assert np.fromfile(f"{prefix}.bin", np.uint16).size
