"""Tokenizers: what they are, what they refuse, and that their files are read as their makers mean them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megactl.errors import DataError
from megactl.storage.bpe import train_bpe
from megactl.storage.tokenizer import load_tokenizer

pytest.importorskip("tokenizers")

TEXT = "the quick brown fox jumps over the lazy dog, the quick red fox too\n" * 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text(TEXT + "naïve café 北京 🙂 one two three four five six seven\n" * 5, "utf-8")
    result = train_bpe([folder / "a.txt"], 320, folder / "tokenizer.json")
    assert result.vocab_size == 320 and result.eod == 0 and result.text_mb > 0.002
    return folder / "tokenizer.json"


def gpt2_files(folder, trained):
    """The same tokenizer as GPT-2's two files."""
    model = json.loads(trained.read_text("utf-8"))["model"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    return folder


@given(st.text())
def test_byte_tokenizer_gives_back_every_text(text):
    tokenizer = load_tokenizer("byte")
    try:
        ids = tokenizer.encode(text)
    except UnicodeEncodeError:
        return
    assert tokenizer.decode(ids) == text and all(0 <= token < 256 for token in ids)
    assert tokenizer.encode_batch([text, ""])[0].tolist() == ids


def test_byte_tokenizer_facts():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.decode([104, 105, 256, 33, 0xFF]) == "hi<|endoftext|>!\ufffd"
    with pytest.raises(DataError, match="token 257"):
        tokenizer.decode([257])
    with pytest.raises(DataError, match="--eod-token"):
        load_tokenizer("byte", eod_token="</s>")


def test_trained_tokenizer_gives_back_text_and_merges(trained):
    tokenizer = load_tokenizer(trained)
    for text in ("the quick fox", "  spaces\t\n", "naïve 🙂 and 漢字 unseen"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text])[0].tolist() == ids
    assert len(tokenizer.encode("the quick")) < 5
    assert tokenizer.encode("a<|endoftext|>")[-1] == tokenizer.eod == 0
    with pytest.raises(DataError, match="has ids 0 to 319"):
        tokenizer.decode([320])


def test_training_is_repeatable_and_says_when_text_runs_out(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 20)
    first = train_bpe([tmp_path / "a.txt"], 400, tmp_path / "one.json")
    train_bpe([tmp_path / "a.txt"], 400, tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert 257 < first.vocab_size < 400 == first.requested


def test_training_refuses_what_it_cannot_do(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    (tmp_path / "there.json").write_text("{}")
    with pytest.raises(DataError, match="--vocab-size 256"):
        train_bpe([tmp_path / "a.txt"], 256, tmp_path / "t.json")
    with pytest.raises(DataError, match="holds no text"):
        train_bpe([tmp_path / "empty.txt"], 300, tmp_path / "t.json")
    with pytest.raises(DataError, match=r"bad.jsonl:2: must be a JSON object with a string 'text'"):
        train_bpe([tmp_path / "bad.jsonl"], 300, tmp_path / "t.json")
    with pytest.raises(DataError, match=r"there.json: exists"):
        train_bpe([tmp_path / "a.txt"], 300, tmp_path / "there.json")
    assert not (tmp_path / "t.json").exists()


def test_folder_and_gpt2_files_agree_with_tokenizer_json(tmp_path, trained):
    whole = load_tokenizer(trained.parent)
    pair = gpt2_files(tmp_path / "gpt2", trained)
    assert load_tokenizer(trained.parent).describe()["sha256"] == load_tokenizer(trained).describe()["sha256"]
    for spec in (pair, pair / "vocab.json", pair / "merges.txt"):
        tokenizer = load_tokenizer(spec)
        assert tokenizer.encode(TEXT) == whole.encode(TEXT) and tokenizer.eod == whole.eod
    (pair / "gpt2-vocab.json").write_bytes((pair / "vocab.json").read_bytes())
    (pair / "gpt2-merges.txt").write_bytes((pair / "merges.txt").read_bytes())
    assert load_tokenizer(pair / "gpt2-vocab.json").encode("the fox") == whole.encode("the fox")


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path, trained):
    document = json.loads(trained.read_text("utf-8"))
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    document["padding"] = {**padding, "pad_token": "<|endoftext|>"}
    (tmp_path / "t.json").write_text(json.dumps(document), "utf-8")
    tokenizer, plain = load_tokenizer(tmp_path / "t.json"), load_tokenizer(trained)
    assert tokenizer.encode(TEXT) == plain.encode(TEXT)
    assert tokenizer.encode_batch([TEXT, "a"])[1].tolist() == plain.encode("a")


def test_end_of_document_is_found_named_or_asked_for(tmp_path, trained):
    text = trained.read_text("utf-8")
    (tmp_path / "llama.json").write_text(text.replace("<|endoftext|>", "</s>"), "utf-8")
    (tmp_path / "other.json").write_text(text.replace("<|endoftext|>", "[END]"), "utf-8")
    assert load_tokenizer(tmp_path / "llama.json").eod == 0
    unknown = load_tokenizer(tmp_path / "other.json")
    assert unknown.describe()["eod"] is None
    with pytest.raises(DataError, match="--eod-token"):
        _ = unknown.eod
    assert load_tokenizer(tmp_path / "other.json", eod_token="[END]").eod == 0
    with pytest.raises(DataError, match="is not in the vocabulary"):
        load_tokenizer(tmp_path / "other.json", eod_token="[NONE]")


def test_size_counts_ids_and_not_tokens(tmp_path, trained):
    document = json.loads(trained.read_text("utf-8"))
    document["added_tokens"].append(
        {"id": 500, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    )
    document["model"]["vocab"]["<far>"] = 500
    (tmp_path / "gap.json").write_text(json.dumps(document), "utf-8")
    assert load_tokenizer(tmp_path / "gap.json").vocab_size == 501


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "does not exist"),
        ("", "is empty"),
        ("{", "not valid JSON, perhaps truncated"),
        ("[]", "must hold one JSON object"),
        ("{}", "has no 'model' object"),
        ('{"model": {}}', "is not a tokenizer this library can read"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}', "is not a tokenizer this library can read"),
    ],
)
def test_damaged_tokenizer_json_is_named(tmp_path, content, words):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=words):
        load_tokenizer(path)


def test_every_truncation_of_tokenizer_json_is_found(tmp_path, trained):
    whole = trained.read_bytes().rstrip()
    for size in np.linspace(0, len(whole) - 1, 25).astype(int).tolist():
        (tmp_path / "t.json").write_bytes(whole[:size])
        with pytest.raises(DataError):
            load_tokenizer(tmp_path / "t.json")


def test_damaged_gpt2_files_are_named(tmp_path, trained):
    folder = gpt2_files(tmp_path / "gpt2", trained)
    merges = (folder / "merges.txt").read_text("utf-8")
    (folder / "merges.txt").write_text("".join(merges.splitlines(True)[:-5]), "utf-8")
    with pytest.raises(DataError, match="no merge makes 5 tokens"):
        load_tokenizer(folder)
    (folder / "merges.txt").write_text(merges + "q zz\n", "utf-8")
    with pytest.raises(DataError, match=r"merges.txt:\d+: 'q zz' is not a merge"):
        load_tokenizer(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(DataError, match="go together"):
        load_tokenizer(folder)
    (folder / "vocab.json").write_text('{"a": "b"}')
    (folder / "merges.txt").write_text(merges, "utf-8")
    with pytest.raises(DataError, match="must be a token id"):
        load_tokenizer(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"holds no tokenizer file"):
        load_tokenizer(tmp_path / "nothing")
