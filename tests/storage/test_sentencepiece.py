"""SentencePiece .model files; a tiny model is trained here. Without the library, only what is said of its absence is tested."""

import sys

import pytest

from megactl.errors import DataError, MegactlError
from megactl.storage.special_tokens import pair_tokens
from megactl.storage.tokenizer import load_tokenizer

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "naïve café 北京 unbelievable things",
] * 50


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("sentencepiece", reason="the optional sentencepiece library is not installed")


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def model(request, library, tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / request.param
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(path),
        vocab_size=90,
        model_type=request.param,
        hard_vocab_limit=False,
        control_symbols="[CLS],[SEP],[MASK]",
        pad_id=3,
        minloglevel=2,
    )
    return path.with_suffix(".model")


def test_without_its_library_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "t.model").write_bytes(b"\n")
    with pytest.raises(MegactlError, match=r"megactl\[sentencepiece\]"):
        load_tokenizer(tmp_path / "t.model")


def test_ids_are_the_librarys(library, model):
    processor, tokenizer = library.SentencePieceProcessor(model_file=str(model)), load_tokenizer(model)
    assert tokenizer.vocab_size == processor.get_piece_size()
    for text in [*TEXT[:3], "unseen 🙂 words", "", "  spaces  ", "line\nends"]:
        assert tokenizer.encode(text) == processor.encode(text) == tokenizer.encode_batch([text, "a"])[0].tolist()
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0]
    assert load_tokenizer(model.parent).describe()["sha256"] == tokenizer.describe()["sha256"]


def test_facts(model):
    tokenizer = load_tokenizer(model)
    facts = tokenizer.describe()
    assert (facts["kind"], facts["eod"], facts["eod_token"]) == ("sentencepiece", 2, "</s>") and tokenizer.eod == 2
    cls, sep, mask, pad = pair_tokens(tokenizer)
    assert pad == 3 and len({cls, sep, mask, pad}) == 4
    assert tokenizer.decode([*tokenizer.encode("the fox"), tokenizer.eod, cls]) == "the fox</s>[CLS]"
    assert load_tokenizer(model, eod_token="[SEP]").eod == sep
    with pytest.raises(DataError, match="--eod-token"):
        load_tokenizer(model, eod_token="[EOD]")
    with pytest.raises(DataError, match="has ids 0 to"):
        tokenizer.decode([tokenizer.vocab_size])
    continues = tokenizer.continues()
    first, *rest = tokenizer.encode("jugs")
    assert not continues[first] and all(continues[token] for token in rest) and not continues[[0, 1, cls, sep, mask, pad]].any()


def test_damaged_models_are_named(library, tmp_path, model):
    for content, words in (
        (b"", "is empty"),
        (model.read_bytes()[:100], "is not a SentencePiece model"),
        (b"not a model", "is not a Sent"),
    ):
        (tmp_path / "t.model").write_bytes(content)
        with pytest.raises(DataError, match=words):
            load_tokenizer(tmp_path / "t.model")


def test_a_folder_with_two_is_not_guessed(library, tmp_path):
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"several \.model files"):
        load_tokenizer(tmp_path)


def test_lone_surrogates_are_refused(model):
    with pytest.raises(UnicodeEncodeError):
        load_tokenizer(model).encode_batch(["\ud800"])
