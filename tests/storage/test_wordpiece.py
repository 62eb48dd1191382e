"""WordPiece: cut as Hugging Face's BertTokenizer cuts, trained the same each time, and what its files may look like."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.errors import DataError, MegactlError
from megactl.storage import libraries
from megactl.storage.special_tokens import pair_tokens
from megactl.storage.tokenizer import load_tokenizer
from megactl.storage.wordpiece_training import train_wordpiece

tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = "The quick brown fox jumps over the lazy dog, unbelievably; cafés naïve Straße 北京大学 don't stop 3.14! " * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordpiece")
    (folder / "a.txt").write_text(TEXT, "utf-8")
    result = train_wordpiece([folder / "a.txt"], 100, folder / "vocab.txt")
    assert (result.vocab_size, result.eod, result.requested) == (100, None, 100) and result.text_mb > 0.001
    return folder / "vocab.txt"


def vocab(path, tokens, config=None):
    path.write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    if config is not None:
        (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    return path


alphabet = st.sampled_from(
    [*"abcdeTQ fox the ##", "é", "É", "ß", "北", "京", "\u0301", "\t", "\x00", "\u200b", "\u00a0", "\ufffd", "'", "-", "[MASK]", "。"]
)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.lists(alphabet, max_size=60).map("".join)), lower=st.booleans())
def test_ids_are_those_of_bert_word_piece_tokenizer(trained, text, lower):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return
    ours = load_tokenizer(trained, lower_case=lower)
    theirs = tokenizers.BertWordPieceTokenizer(str(trained), lowercase=lower)
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == expected
    assert ours.encode_batch([text, ""])[0].tolist() == expected


def test_ids_are_those_of_the_original_algorithm(trained):
    """Google's rules, written down again: clean, lower, split at white space, Chinese and punctuation, then the longest piece."""
    import unicodedata

    pieces = {token: number for number, token in enumerate(trained.read_text("utf-8").split("\n"))}

    def words(text):
        out = ""
        for char in unicodedata.normalize("NFD", text.lower()):
            kind = unicodedata.category(char)
            if kind == "Mn" or (kind.startswith("C") and char not in "\t\n\r"):
                continue
            lone = kind.startswith("P") or char in "$+<=>^`|~" or "\u4e00" <= char <= "\u9fff"
            out += f" {char} " if lone else char
        return out.split()

    def cut(word):
        found, start = [], 0
        while start < len(word) and len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in pieces:
                    found.append(pieces[piece])
                    start = end
                    break
            else:
                return [pieces["[UNK]"]]
        return found or [pieces["[UNK]"]]

    tokenizer = load_tokenizer(trained)
    for text in (TEXT, "UNBELIEVABLE fox, foxes—the “naïve” 北京 café", "x" * 101, "x" * 100, "zq ¿qué? a\u00adb\x07c", "do\tnot\r\nstop"):
        assert tokenizer.encode(text) == [token for word in words(text) for token in cut(word)]


def test_facts(trained):
    tokenizer = load_tokenizer(trained)
    facts = tokenizer.describe()
    assert (facts["kind"], facts["vocab_size"], facts["eod"]) == ("vocab.txt", 100, None) and len(facts["sha256"]) == 64
    assert facts["special_tokens"] == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert pair_tokens(tokenizer) == (2, 3, 4, 0)
    tokens = trained.read_text("utf-8").rstrip("\n").split("\n")
    continues = tokenizer.continues()
    assert continues.dtype == np.bool_ and continues.tolist() == [token.startswith("##") for token in tokens] and continues.any()
    with pytest.raises(DataError, match="no end-of-document token"):
        _ = tokenizer.eod
    assert load_tokenizer(trained, eod_token="[SEP]").eod == 3
    with pytest.raises(DataError, match="--eod-token"):
        load_tokenizer(trained, eod_token="[EOD]")
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    with pytest.raises(DataError, match="has ids 0 to 99"):
        tokenizer.decode([100])


def test_a_folder_with_one_is_enough(trained):
    assert load_tokenizer(trained.parent).describe()["sha256"] == load_tokenizer(trained).describe()["sha256"]


def test_case_is_the_flags_the_files_or_the_vocabularys(tmp_path):
    plain = vocab(tmp_path / "vocab.txt", [*SPECIAL, "the", "fox"])
    capitals = vocab(tmp_path / "cased-vocab.txt", [*SPECIAL, "the", "Fox"])

    def case(path, **options):
        cleaning = load_tokenizer(path, **options).describe()["cleaning"]
        return cleaning["lower_case"], cleaning["source"]

    assert case(plain) == (True, "the vocabulary has no capitals")
    assert case(capitals) == (False, "the vocabulary has capitals, e.g. 'Fox'")
    assert case(capitals, lower_case=True) == (True, "--lower-case")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "tokenizer_class": "BertTokenizer"}')
    assert case(plain) == (False, "tokenizer_config.json") and case(plain, lower_case=True)[0]
    assert load_tokenizer(plain).encode("The fox") == [1, 6] and load_tokenizer(plain, lower_case=True).encode("The fox") == [5, 6]
    for text in ("{", '{"do_lower_case": "yes"}', "[]"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(DataError, match=r"tokenizer_config\.json"):
            load_tokenizer(plain)
    with pytest.raises(DataError, match="--no-lower-case: byte says itself"):
        load_tokenizer("byte", lower_case=False)


def test_strip_accents_and_chinese_characters_follow_the_config(tmp_path):
    tokens = [*SPECIAL, "cafe", "café", "北京"]
    path = vocab(tmp_path / "vocab.txt", tokens, {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False})
    assert load_tokenizer(path).encode("CAFÉ 北京") == [6, 7]
    vocab(path, tokens, {"do_lower_case": True})
    assert load_tokenizer(path).encode("CAFÉ 北京") == [5, 1, 1]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"[PAD]\n[CLS]\na\n", r"has no \[UNK\]"),
        (b"[UNK]\n\na\n", r"vocab\.txt:2: an empty line"),
        (b"[UNK]\n\xff\n", "not valid UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, words):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_tokenizer(tmp_path / "vocab.txt")


def test_line_ends_do_not_shift_ids(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("[UNK]\r\nthe\r\n\u2028\r\nfox\r\n".encode())
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    assert tokenizer.vocab_size == 4 and tokenizer.encode("the fox") == [1, 3]


def test_facts_need_no_library(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    tokenizer = load_tokenizer(trained)
    assert pair_tokens(tokenizer).cls == 2 and tokenizer.continues().any() and tokenizer.describe()["vocab_size"] == 100
    with pytest.raises(MegactlError, match="'tokenizers' library is needed"):
        tokenizer.encode("a")
    assert libraries.sentencepiece_library  # the other library is asked for in the same way


def test_training_gives_the_same_vocabulary_in_every_process(tmp_path, trained):
    """The library numbers single characters by a hash table that is seeded anew in each process."""
    code = "import sys; from megactl.storage.wordpiece_training import train_wordpiece; train_wordpiece([sys.argv[1]], 100, sys.argv[2])"
    out = tmp_path / "vocab.txt"
    subprocess.run([sys.executable, "-c", code, str(trained.parent / "a.txt"), str(out)], check=True, timeout=120)
    assert out.read_bytes() == trained.read_bytes()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"do_lower_case": True}
    tokens = out.read_text("utf-8").split("\n")
    assert tokens[:5] == SPECIAL and len(set(tokens)) == len(tokens)


def test_cased_training_keeps_capitals_and_accents(tmp_path, trained):
    train_wordpiece([trained.parent / "a.txt"], 100, tmp_path / "vocab.txt", lower_case=False)
    tokens = (tmp_path / "vocab.txt").read_text("utf-8").split("\n")
    assert "T" in tokens and any("é" in token for token in tokens)
    assert not load_tokenizer(tmp_path / "vocab.txt").describe()["cleaning"]["lower_case"]


def test_a_small_vocabulary_keeps_to_its_size(tmp_path, trained):
    result = train_wordpiece([trained.parent / "a.txt"], 20, tmp_path / "vocab.txt")
    assert result.vocab_size <= 20 and load_tokenizer(tmp_path / "vocab.txt").encode("e")[0] >= 5


def test_training_refuses_what_it_cannot_do(tmp_path, trained):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="--vocab-size 6"):
        train_wordpiece([trained.parent / "a.txt"], 6, tmp_path / "vocab.txt")
    with pytest.raises(DataError, match=r"name it .*vocab\.txt"):
        train_wordpiece([trained.parent / "a.txt"], 100, tmp_path / "vocab.json")
    with pytest.raises(DataError, match="holds no text"):
        train_wordpiece([tmp_path / "empty.txt"], 100, tmp_path / "vocab.txt")
    with pytest.raises(DataError, match="exists"):
        train_wordpiece([trained.parent / "a.txt"], 100, trained)
    assert not (tmp_path / "vocab.txt").exists() and not (tmp_path / "tokenizer_config.json").exists()


def test_tokenizer_json_of_a_wordpiece_says_the_same(tmp_path, trained):
    theirs = tokenizers.BertWordPieceTokenizer(str(trained), lowercase=True)
    theirs.save(str(tmp_path / "tokenizer.json"))
    tokenizer, plain = load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(trained)
    assert tokenizer.encode(TEXT) == plain.encode(TEXT)
    assert pair_tokens(tokenizer) == pair_tokens(plain) and (tokenizer.continues() == plain.continues()).all()


def test_tokens_of_other_families_are_found():
    """RoBERTa's names; and a byte-level vocabulary, where words start with a mark of their own."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3, "a": 4, "\u0120a": 5}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    from megactl.storage.tokenizer import FileTokenizer

    tokenizer = FileTokenizer("roberta", library, [], None)
    assert pair_tokens(tokenizer) == (0, 2, 3, 1)
    assert tokenizer.continues().tolist() == [False, False, False, False, True, False]
    with pytest.raises(DataError, match=r"has no \[CLS\]"):
        pair_tokens(load_tokenizer("byte"))
