"""Text to sentences by rules, without data to download. Made for English and its like, and for scripts with full stops of their own.

A stop (. ! ? and runs of them, with the quotes and brackets behind) ends a sentence where white space follows, unless what stands before
or behind it says otherwise: abbreviations, initials, list numbers, a lower-case word. A blank line always ends one. CJK, Devanagari, Arabic
and Urdu stops end one by themselves. No text is lost: joined, the sentences are the text without the white space between them.

Every pattern matches in linear time: possessive runs, and no look at more than the word on either side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_CLOSERS = "\"'\u2019\u201d\u00bb\u203a)]}\u300d\u300f\u3011\u300b\uff09*_"
_OPENERS = "\"'\u2018\u201c\u00ab\u2039([{\u00bf\u00a1\u201e*_#-\u2013\u2014"
# One match for each place where a sentence might end: a stop with its closers, a stop that needs no white space, or a blank line.
_PLACES = re.compile(
    rf"(?P<stop>[.!?\u2026\u203d]++[{re.escape(_CLOSERS)}]*+)"
    rf"|(?P<hard>[\u3002\uff01\uff1f\uff61\u0964\u0965\u06d4\u061f]++[{re.escape(_CLOSERS)}]*+)"
    r"|(?P<paragraph>\n[^\S\n]*+\n\s*+|\u2029|\f)"
)
_NEXT_WORD = re.compile(rf"\s++[{re.escape(_OPENERS)}]*+(?P<word>\S?(?:[^\W\d_]|['\u2019])*+)")
# A word behind a stop longer than this is no abbreviation.
_LONGEST_WORD = 24
_ENUMERATOR = re.compile(r"[(\[]?(?:\d{1,3}|[A-Za-z]|[ivxlc]{1,5}|[IVXLC]{1,5})")
_DOTTED = re.compile(r"(?:[^\W\d_]{1,3}\.)+[^\W\d_]{1,3}")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A name, a number or an example follows: never the end.
_TITLES = _words(
    "Mr Mrs Ms Mx Dr Prof Messrs Mme Mlle Rev Fr Hon Pres Gov Sen Rep Gen Lt Col Maj Capt Cmdr Sgt Cpl Adm Brig Supt Insp Ald Amb Dir Mgr "
    "St Ste Mt Ft e.g i.e cf viz vs v al. approx ca nr resp bzw z.B d.h u.a"
)
# Only before a number: "No. 5", but "He said no. No. They left."
_BEFORE_NUMBERS = _words(
    "No Nos Nr no nos nr Fig Figs fig figs Eq Eqs eq Vol Vols vol Ch ch Sec sec Sect sect Art art p pp Pt pt ed Ed Op op Ex ex "
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thurs Fri Sat Sun App Tab tab Thm Lem Prop Def Ref Refs par"
)
# They may stand at an end: it is one if the next word often begins a sentence.
_EITHER = _words(
    "Jr Sr Inc Ltd Co Corp Bros Plc LLC Cie Esq etc al Ave Blvd Rd Sq Dept Univ Assn Ph.D M.D B.A M.A B.Sc M.Sc a.m p.m A.M P.M "
    "U.S U.K U.N E.U D.C ft in lb lbs oz hr hrs min sec km cm mm kg est Est ibid Ibid et seq max Max avg temp Calif Mass Conn Penn Tex Fla"
)
_STARTERS = _words(
    "The This That These Those There Then They Their A An And As At After Although All Also Another Any Because Before But By Both "
    "Each Even Every Few For From He Her His Here How However I If In Instead Into Is It Its Just Last Later Like Many Meanwhile "
    "Moreover More Most My Next No Not Nor Now Of On Once One Only Or Other Our Others Over Perhaps She Since So Some Soon Still "
    "Such Suddenly Therefore Thus To Today Under Until Upon We What When Where Whether Which While Who Why With Within Without Yes "
    "Yet You Your Additionally According During Despite Does Did Do Finally First Second Third Furthermore Hence Indeed "
    "Nevertheless Rather Several Through Throughout Was Were Will"
)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in order, without white space at their ends; none of them empty."""
    # Text without any capital gives no sign of where sentences begin; then every stop before white space counts.
    lower_only = text.islower()
    sentences, start = [], 0
    for end in _ends(text, lower_only):
        sentence = text[start:end].strip()
        start = end
        if sentence:
            sentences.append(sentence)
    return sentences


def _ends(text: str, lower_only: bool) -> Iterator[int]:
    """Places behind which a new sentence begins, the end of the text being the last."""
    start = 0
    for place in _PLACES.finditer(text):
        if place["stop"] is not None and not _ends_sentence(text, start, place, lower_only):
            continue
        start = place.end()
        yield start
    yield len(text)


def _ends_sentence(text: str, start: int, place: re.Match[str], lower_only: bool) -> bool:
    following = _NEXT_WORD.match(text, place.end())
    if following is None:
        # No white space behind: "3.14", "example.com", "etc.,"; the end of the text needs no stop.
        return False
    stop, word = place["stop"], following["word"]
    closed = stop[-1] not in ".!?\u2026\u203d"
    if word[:1].islower() and not lower_only and (closed or stop[0] in ".\u2026"):
        return False
    if stop.rstrip(_CLOSERS) != "." or closed:
        return True
    return _full_stop_ends(text, start, place.start(), word)


def _full_stop_ends(text: str, start: int, stop: int, following: str) -> bool:
    """Whether one full stop, before a word that may begin a sentence, ends one; `start` is where the sentence so far begins."""
    begin = max(start, stop - _LONGEST_WORD)
    word = text[begin:stop].rpartition(" ")[2].rpartition("\n")[2].lstrip(_OPENERS)
    if word in _TITLES:
        return False
    if word in _BEFORE_NUMBERS and following[:1].isdigit():
        return False
    # "1. Introduction", "a. One": a list's mark is no sentence.
    if stop - start <= _LONGEST_WORD and _ENUMERATOR.fullmatch(text[start:stop].strip()) and word != "I":
        return False
    initial = len(word) == 1 and word.isalpha() and word.isupper()
    if initial or word in _EITHER or _DOTTED.fullmatch(word):
        return following in _STARTERS
    return True
