"""Sentence splitting: a table of hard cases, and what holds for any text."""
# ruff: noqa: RUF001 (the characters that look like others are what is tested)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megactl.storage.sentences import split_sentences

# Sentences are separated by " | ".
CASES = [
    "One sentence. | Another one! | A third? | Yes.",
    "No stop at the end",
    "Mr. Smith met Mrs. Jones and Dr. Who. | They talked.",
    "He lives in St. Petersburg, e.g. near the river, i.e. not far. | She does too.",
    "It costs 3.14 dollars, version 2.0.1 is out. | 25 people bought it.",
    "In 1999. | The year after was 2000. | 30 of them came.",
    "J. R. R. Tolkien wrote it. | George W. Bush did not.",
    "He has vitamin C. | The dose is high.",
    "So did I. | Then we left.",
    "Apple Inc. Chairman Tim spoke. | He works at Apple Inc. | The stock rose.",
    "The U.S. Army came. | She lives in the U.S. | It is large.",
    "We met at 5 p.m. | They came late. | The 5 p.m. Boston train left.",
    "She has a Ph.D. | He has none.",
    "Apples, pears, etc. | The rest is gone. | Apples etc. are fruit.",
    "See Fig. 3 and No. 5 on p. 12. | He said no. | No. | They left.",
    "On Jan. 5 it began. | Smith et al. 2019 showed it. | Smith vs. Jones was first.",
    '"I came." | "I saw." | She left.',
    '"Really?" she asked. | "Yes!" he said. | “Quoted.” | ‘Another.’ | Done.',
    "(It was late.) | We went home. | [Laughter.] | Next.",
    "He paused... and went on. | He paused... | Then he left.",
    "He paused… and went on. | He paused… | Then he left.",
    "What?! | No way!! | Right.",
    "Yahoo! | is lower case after a mark.",
    "Visit example.com or mail a.b@c.org today. | Thanks.",
    "1. Introduction starts here. | 2. Methods follow.",
    "A. First point. | B. Second point.",
    "hello there. | how are you? | fine.",
    "¿Qué pasa? | ¡Nada! | Vamos.",
    "Er kam. | Ölflecken blieben. | Épée is French.",
    "你好。 | 今天天气很好！ | 是吗？ | 他说：“好。” | 然后走了。",
    "これは文です。 | 「はい。」 | そうです。",
    "यह वाक्य है। | यह दूसरा है।",
    "Title without stop\n\n | A paragraph that\nruns over lines. | It ends.\n\n\n | Another",
    "Windows lines.\r\n\r\n | Next.",
    "Line one\nline two. | Line three",
    "Mixed 中文。 | Then English. | 再见",
    "He said 'stop.' | Then he stopped.",
    "*Emphasis.* | _More._ | **Bold.** | Plain.",
    "The temperature was 5 in. deep. | Good.",
    "Wait -- what? | -- Nothing.",
    "Ends with an initial, John F. Kennedy. | Next.",
    "I met the Rev. Martin Luther King Jr. in Washington D.C. | It was warm.",
]


@pytest.mark.parametrize("case", CASES)
def test_hard_cases(case):
    expected = [part.strip() for part in case.split(" | ")]
    text = case.replace("\n\n | ", "\n\n").replace("\n\n\n | ", "\n\n\n").replace("\r\n\r\n | ", "\r\n\r\n")
    found = split_sentences(text.replace(" | ", " "))
    assert found == expected


def test_cjk_needs_no_white_space():
    assert split_sentences("你好。今天很好！是吗？") == ["你好。", "今天很好！", "是吗？"]
    assert split_sentences("他说：“好。”然后走了。") == ["他说：“好。”", "然后走了。"]


@pytest.mark.parametrize("text", ["", " ", "\n\n\n", "\u2029", "\t \r\n \n"])
def test_white_space_is_no_sentence(text):
    assert split_sentences(text) == []


pieces = st.sampled_from(
    [
        "a",
        "B",
        "Mr",
        "U.S",
        " ",
        " ",
        ".",
        ".",
        "!",
        "?",
        "...",
        "…",
        "\n",
        "\n\n",
        '"',
        "”",
        ")",
        "(",
        "1",
        "。",
        "、",
        "e.g",
        "The",
        "\u2029",
        "\f",
    ]
)


@given(st.one_of(st.text(max_size=200), st.lists(pieces, max_size=60).map("".join)))
def test_no_text_is_lost_and_no_sentence_is_empty(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)


@pytest.mark.parametrize(
    "unit",
    [
        "!",
        ".",
        ". ",
        "a.",
        "a. ",
        "1. ",
        "\n",
        "\n \t",
        "。",
        ")",
        "?)",
        "?) ",
        "U.S. ",
        "...",
        '" ',
        "A",
        " ",
        "(. ",
        "a\n \n",
        "x" * 50 + ". ",
    ],
)
def test_repetitions_take_linear_time(unit):
    """Where backtracking would show: with time that grows with the square of the length, this meets the limit on a test's time."""
    text = unit * (300_000 // len(unit))
    assert sum(map(len, map(str.split, split_sentences(text)))) == len(text.split())
