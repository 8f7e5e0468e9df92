"""Normalisation of texts for comparison, and the places of gold answers in them.

Normalisation is SQuAD's (arXiv 1606.05250, ``normalize_answer`` of its script): lower case, no ASCII punctuation, no
English articles, single spaces. Before it, spellings of the same text are folded: Unicode's NFKC (composed and
decomposed accents, full-width digits, ligatures), curly and other quotes to straight ones, dashes to hyphens,
characters without width to nothing.
``fold=False`` is SQuAD's form as published.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

_QUOTES = "\u00ab\u00bb\u00b4\u02b9-\u02bf\u02c8\u02ca\u2018-\u201f\u2032-\u2037\u2039\u203a\u300c-\u300f\u301d-\u301f"
_DASHES = "\u058a\u05be\u2010-\u2015\u2043\u2212\u2e3a\u2e3b\u301c\u3030\ufe58\ufe63\uff0d"
_WITHOUT_WIDTH = "\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff"
_SLASHES = "\u2044\u2215"


def _characters(ranges: str) -> Iterator[int]:
    for first, last in re.findall(r"(.)(?:-(.))?", ranges):
        yield from range(ord(first), ord(last or first) + 1)


_SPELLINGS = {
    character: spelled
    for ranges, spelled in ((_QUOTES, "'"), (_DASHES, "-"), (_WITHOUT_WIDTH, None), (_SLASHES, "/"))
    for character in _characters(ranges)
}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Group 1 separates words; punctuation inside a number ("1,960") does not.
_PUNCTUATION_PARTS = re.compile(rf"(?<=\d)[.,:](?=\d)|([{re.escape(string.punctuation)}])")

Keep = Literal["words", "articles", "all"]
"""What `normalise` keeps: words alone, words and articles, or these and punctuation."""


def fold_spelling(text: str) -> str:
    """``text`` in NFKC with straight quotes, hyphens for dashes and no characters without width."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", text.translate(_SPELLINGS)).translate(_SPELLINGS)


def normalise(text: str, fold: bool = True, keep: Keep = "words", spaced: bool = False) -> str:
    """``text`` in lower case, without ASCII punctuation and articles, words joined by single spaces.

    Args:
        fold: `fold_spelling` first; SQuAD's script does not.
        keep: "articles" or "all" for texts without any other characters ("The The", "!!!").
        spaced: punctuation separates words, as in "yes/no" and "1990-1995"; SQuAD's script joins them.
    """
    text = (fold_spelling(text) if fold else text).lower()
    if keep != "all":
        text = _PUNCTUATION_PARTS.sub(_part, text) if spaced else text.translate(_PUNCTUATION)
    if keep == "words":
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split())


def _part(match: re.Match[str]) -> str:
    return " " if match[1] else ""


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def numbers_of(text: str, fold: bool = True) -> tuple[str, ...]:
    """Returns the runs of digits of ``text``, in order: SQuAD's normalisation does not distinguish "12.5" from "125",
    nor "2-1" from "21". A comma between thousands separates no runs."""
    return tuple(re.findall(r"\d+", _THOUSANDS.sub("", fold_spelling(text) if fold else text)))


@dataclass(frozen=True)
class Gold:
    """A gold answer for comparison: its normalised text, what the normalisation kept, and its `numbers_of`."""

    text: str
    keep: Keep = "words"
    numbers: tuple[str, ...] = ()

    @property
    def yes_or_no(self) -> bool:
        return self.keep == "words" and self.text in ("yes", "no")

    @property
    def trivial(self) -> bool:
        """Whether it is one article or punctuation alone, which nearly every text contains."""
        return self.keep == "all" or (self.keep == "articles" and " " not in self.text)

    @property
    def short(self) -> bool:
        """Whether it is yes, no, a word of at most `SHORT_WORD` characters, a number, or no word at all ("The The")."""
        if self.keep != "words":
            return True
        return len(words_of(self.text)) == 1 and (len(self.text) <= SHORT_WORD or self.text.isdigit())


SHORT_WORD = 6
"""A gold answer of one word of so many characters is short: it is part of many other words ("no", "us", "spirit")."""

LONGEST_PART = 50
"""An answer part of more words is no answer."""


def golds(answers: Iterable[str], fold: bool = True) -> list[Gold]:
    """Returns the distinct gold answers in their order, normalised. Articles, then punctuation, are kept if nothing
    else is left of an answer."""
    normalised = (
        next(
            (
                Gold(text, keep, numbers_of(answer, fold))
                for keep in ("words", "articles", "all")
                if (text := normalise(answer, fold, keep))
            ),
            None,
        )
        for answer in answers
    )
    return list(dict.fromkeys(filter(None, normalised)))


UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han (for a regex class)."""

_WORDS = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Returns the words between spaces; in scripts without spaces each character is a word."""
    return _WORDS.findall(text)


def is_word(text: str, start: int, end: int) -> bool:
    """Whether ``text[start:end]`` is not part of a longer word.

    Words of letters with cases and of digits end before another kind of character; in other scripts a word may start
    and end anywhere (Chinese and Japanese have no spaces, Korean joins particles to its words).
    """
    return not any(_continues(text[place - 1 : place + 1]) for place in (start, end) if 0 < place < len(text))


def _continues(pair: str) -> bool:
    return all(c.isdigit() or c.lower() != c.upper() for c in pair)


def cuts_number(text: str, start: int, end: int) -> bool:
    """Whether ``text[start:end]`` starts or ends inside a number ("June 1" in "June 15")."""
    return any(text[place - 1 : place + 1].isdigit() for place in (start, end) if 0 < place < len(text))


_ANSWER = re.compile(r"\banswer(?:\s+is)?[\s*_]*[:\uff1a]", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?][\"'\u2019\u201d)\]*_]*\s+|[\u3002\uff01\uff1f]\s*|\n+")


def answer_part(response: str) -> tuple[int, int]:
    """Start and end of the part of a response that holds its answer; equal if it has none.

    It is the line after the last "Answer:" (in any case, "The answer is:" too). Without one it is the entire response
    if it has at most `LONGEST_PART` words, else the last sentence. A thought, up to the last ``</think>``, never is. A
    part of more than `LONGEST_PART` words is no answer.
    """
    start = response.rfind("</think>") + len("</think>") if "</think>" in response else 0
    end = len(response)
    marks = list(_ANSWER.finditer(response, start))
    if marks:
        start = marks[-1].end()
        start += len(response[start:]) - len(response[start:].lstrip(" \t\r\n*_"))
        line = re.compile(r"[\r\n]").search(response, start)
        end = line.start() if line else end
    elif len(words_of(response[start:])) > LONGEST_PART:
        end = len(response.rstrip())
        ends = [match.end() for match in _SENTENCE_END.finditer(response, start, end) if match.end() < end]
        start = ends[-1] if ends else start
    return (start, end) if len(words_of(response[start:end])) <= LONGEST_PART else (end, end)


# "no" is an answer at the end of the part, before punctuation, at the start of a clause and beside "yes"; before a noun
# it is a determiner ("no information", "no one"), and "No. 5" is a number.
_CLAUSE = "they it he she we i you this that these those both neither not the because since as but only".split()
_YES_OR_NO = {
    "yes": re.compile(r"(?<!\w)yes(?!\w)", re.IGNORECASE),
    "no": re.compile(
        r"(?<![\w\-\u2010])no(?![\w\-\u2010]|\.?\s*\d)"
        rf"(?=\s*(?:$|[\r\n]|[^\w\s])|\s+(?:{'|'.join(_CLAUSE)})\b|\s+(?:\w+\s+)?yes\b)"
        r"|\A\W*no(?=\s+(?-i:[A-Z]))|\byes\s+(?:\w+\s+)?no\b",
        re.IGNORECASE,
    ),
}

_ITEMS = re.compile(r"[,;/|]|\b(?:and|or)\b|(?<=\d)\s+(?=\d)", re.IGNORECASE)
_MOST_ITEMS = 5


def _lists_everything(part: str) -> bool:
    """Whether a part is a list of more than `_MOST_ITEMS` items of one or two words."""
    items = len(list(filter(str.strip, _ITEMS.split(part))))
    return items > _MOST_ITEMS and len(words_of(part)) <= 2 * items


@dataclass(frozen=True)
class _Place:
    """An answer's place: ``span`` of the normalised ``text[start:end]``; if ``keep`` is None, ``text[start:end]``."""

    start: int
    end: int
    keep: Keep | None
    spaced: bool = False
    span: tuple[int, int] = (0, 0)


def _spans(key: str, text: str) -> Iterator[tuple[int, int]]:
    start = key.find(text)
    while start >= 0:
        yield start, start + len(text)
        start = key.find(text, start + 1)


def _in_response(response: str, gold: Gold, fold: bool) -> Iterator[_Place]:
    """Yields the places of a gold answer in a response, its numbers the same there; see `answers_response`."""
    for place in _candidates(response, gold, fold):
        ((start, end),) = _merged(response, [place], fold) if gold.numbers else ((0, 0),)
        if not gold.numbers or numbers_of(response[start:end], fold) == gold.numbers:
            yield place


def _candidates(response: str, gold: Gold, fold: bool) -> Iterator[_Place]:
    """Yields the places where a response, normalised, contains a gold answer."""
    if not gold.short:
        for spaced in (False, True):
            key = normalise(response, fold, gold.keep, spaced)
            yield from (
                _Place(0, len(response), gold.keep, spaced, span)
                for span in _spans(key, gold.text)
                if not cuts_number(key, *span)
            )
        return
    start, end = answer_part(response)
    part = response[start:end]
    if gold.yes_or_no:
        folded = unicodedata.normalize("NFKC", part) if fold else part  # a dash, unlike a hyphen, ends a word
        spans = {word: match.span() for word, pattern in _YES_OR_NO.items() if (match := pattern.search(folded))}
        if spans.keys() == {gold.text}:
            first, last = spans[gold.text] if len(folded) == len(part) else (0, len(part))
            yield _Place(start + first, start + last, None)
    elif gold.trivial:
        if normalise(part, fold, gold.keep) == gold.text:
            yield _Place(start, end, None)
    elif not _lists_everything(part):
        for spaced in (False, True):
            key = normalise(part, fold, gold.keep, spaced)
            yield from (
                _Place(start, end, gold.keep, spaced, span) for span in _spans(key, gold.text) if is_word(key, *span)
            )


def answers_response(response: str, answers: Iterable[str], fold: bool = True) -> bool:
    """Whether any gold answer is found in a response.

    A gold answer is found where its normalised text is part of the response's and its numbers are the same ("12.5" is
    not in "125"), but never inside a number ("June 1" in "June 15"). A short one (`Gold.short`) is searched in the
    `answer_part` only and as whole words, and not in a list of many items. Yes and no are found where the answer part
    has the one and not the other. One article or punctuation alone must be the entire answer part.
    """
    return any(True for gold in golds(answers, fold) for _ in _in_response(response, gold, fold))


def find_in_response(response: str, answers: Iterable[str], fold: bool = True) -> list[tuple[int, int]]:
    """Returns (start, end) in the response of the gold answers that `answers_response` finds; sorted, without
    overlaps."""
    places = (place for gold in golds(answers, fold) for place in _in_response(response, gold, fold))
    return _merged(response, places, fold)


def stated_golds(answers: Iterable[str], fold: bool = True) -> list[Gold]:
    """Returns the gold answers for which documents are searched.

    Yes and no are judgements, not facts that a document states; one article or one sign is in every document.
    """
    return [
        gold
        for gold in golds(answers, fold)
        if not gold.yes_or_no and not (gold.trivial and (gold.keep == "articles" or len(gold.text) == 1))
    ]


def mentions(key: str, gold: Gold) -> bool:
    """Whether a document, normalised with the gold answer's ``keep``, contains it: as a substring, up to three
    characters as whole words.

    "5" and "US" are part of nearly every document's words. A longer answer counts within words too, so that no
    distractor reveals it ("1960" in "1960s"). `is_word` defines whole words.
    """
    return any(True for _ in _in_document(key, gold))


def _in_document(key: str, gold: Gold) -> Iterator[tuple[int, int]]:
    whole_words = gold.keep == "articles" or (gold.keep == "words" and len(gold.text) <= 3)
    return (span for span in _spans(key, gold.text) if not whole_words or is_word(key, *span))


def find_in_document(document: str, answers: Iterable[str]) -> list[tuple[int, int]]:
    """Returns (start, end) in the document of the gold answers that `mentions` finds; sorted, without overlaps."""
    places = (
        _Place(0, len(document), gold.keep, False, span)
        for gold in stated_golds(answers)
        for span in _in_document(normalise(document, keep=gold.keep), gold)
    )
    return _merged(document, places, True)


def _merged(text: str, places: Iterable[_Place], fold: bool) -> list[tuple[int, int]]:
    """Returns the places as (start, end) in ``text``, sorted, with overlapping ones merged."""
    spans, mapped = [], {}
    for place in places:
        if place.keep is None:
            spans.append((place.start, place.end))
            continue
        form = (place.start, place.end, place.keep, place.spaced)
        if form not in mapped:
            mapped[form] = normalised_places(text[place.start : place.end], fold, place.keep, place.spaced)
        characters = mapped[form]
        first, last = place.span
        spans.append((place.start + characters[first][1], place.start + characters[last - 1][2]))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


_SEGMENT = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]+|[\x00-\x7f]")


def normalised_places(
    text: str, fold: bool = True, keep: Keep = "words", spaced: bool = False
) -> list[tuple[str, int, int]]:
    """Returns the characters of `normalise`'s text, each with the start and end of its source in ``text``.

    Folding may change how many characters there are; characters that it changes together (a letter and its
    accents, at most a run outside ASCII) share one place.
    """
    places: list[tuple[str, int, int]] = []
    for match in _SEGMENT.finditer(text):
        piece = (fold_spelling(match[0]) if fold else match[0]).lower()
        one_to_one = len(piece) == len(match[0])
        places += [
            (c, *((match.start() + i, match.start() + i + 1) if one_to_one else match.span()))
            for i, c in enumerate(piece)
        ]

    def without(pattern: re.Pattern[str], drop: bool) -> list[tuple[str, int, int]]:
        characters, last, left = "".join(c for c, _, _ in places), 0, []
        for match in pattern.finditer(characters):
            left += places[last : match.start()]
            if not drop and (match.lastindex or not pattern.groups):
                left.append((" ", places[match.start()][1], places[match.end() - 1][2]))
            last = match.end()
        return left + places[last:]

    if keep != "all":
        places = without(_PUNCTUATION_PARTS, drop=not spaced)
    if keep == "words":
        places = without(_ARTICLES, drop=False)
    words = re.finditer(r"\S+", "".join(c for c, _, _ in places))
    joined: list[tuple[str, int, int]] = []
    for word in words:
        if joined:
            between = joined[-1][2], places[word.start()][1]
            joined.append((" ", min(between), max(between)))  # both words may be one character ("\u00b4")
        joined += places[word.start() : word.end()]
    return joined
