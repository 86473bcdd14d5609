"""What differs between two sequences and between two texts, in time that no input can stretch.

difflib is quadratic on texts that repeat themselves. Here what occurs often anchors nothing, long texts are compared by
line, and a page has so much work to spend; what is beyond that stands there unmarked.
"""

import difflib
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

OFTEN = 8  # what occurs more often joins what is beside it, and is looked for nowhere else
TOKENS = 320  # words, or lines, of each text that are compared
WORK = 3_000_000  # pairs of tokens a page
ALIKE = 0.25  # texts with a smaller share in common are different altogether: marks would be noise

_WORDS = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")
_LINES = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    changed: bool


class Work:
    """What a page may still spend on looking for differences."""

    def __init__(self, pairs: int = WORK) -> None:
        self.left = pairs

    def spend(self, pairs: int) -> bool:
        if pairs > self.left:
            return False
        self.left -= pairs
        return True


Block = tuple[str, int, int, int, int]  # equal, replace, delete or insert; from, until in one; from, until in the other


def blocks(one: Sequence[Hashable], other: Sequence[Hashable]) -> Sequence[Block]:
    """How one becomes the other, as difflib.SequenceMatcher.get_opcodes says it."""
    counts = Counter(other)
    matcher = difflib.SequenceMatcher(lambda item: counts[item] > OFTEN, one, other, autojunk=False)
    return matcher.get_opcodes()


def texts(one: str, other: str, work: Work) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, those marked that the other has not. Together the pieces are the text."""
    if one == other:
        return [Piece(one, False)], [Piece(other, False)]
    for split in (_WORDS, _LINES):
        mine, others = split.findall(one), split.findall(other)
        start = _common(mine, others)
        end = _common(mine[start:][::-1], others[start:][::-1])
        inner = mine[start : len(mine) - end], others[start : len(others) - end]
        if max(map(len, inner)) <= TOKENS and work.spend(len(inner[0]) * len(inner[1])):
            return _marked(mine, others, start, end)
    return [Piece(one, False)], [Piece(other, False)]


def _marked(one: list[str], other: list[str], start: int, end: int) -> tuple[list[Piece], list[Piece]]:
    mine: list[tuple[str, bool]] = [("".join(one[:start]), False)]
    others: list[tuple[str, bool]] = [("".join(other[:start]), False)]
    for kind, a, b, c, d in blocks(one[start : len(one) - end], other[start : len(other) - end]):
        mine.append(("".join(one[start + a : start + b]), kind != "equal"))
        others.append(("".join(other[start + c : start + d]), kind != "equal"))
    mine.append(("".join(one[len(one) - end :]), False))
    others.append(("".join(other[len(other) - end :]), False))
    same = sum(len(text.strip()) for text, changed in mine if not changed)
    if same < ALIKE * max(sum(len(text) for text, _ in mine), sum(len(text) for text, _ in others)):
        return [Piece("".join(one), False)], [Piece("".join(other), False)]
    return _joined(mine), _joined(others)


def _joined(parts: Sequence[tuple[str, bool]]) -> list[Piece]:
    made: list[Piece] = []
    for text, changed in parts:
        if not text:
            continue
        if made and made[-1].changed == changed:
            made[-1] = Piece(made[-1].text + text, changed)
        else:
            made.append(Piece(text, changed))
    return made


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    at = 0
    end = min(len(one), len(other))
    while at < end and one[at] == other[at]:
        at += 1
    return at
