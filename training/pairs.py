"""Two attempts held against each other: what both did once, and beside each other what each did in its place."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from training import differences, turns
from training.differences import Piece, Work
from training.turns import Line, Turn

MOST_TURNS = 400  # of each; what comes after is on the attempts' own pages
TEXT = 6_000  # characters of one text
PAGE_TEXT = 900_000  # of all of them


@dataclass(frozen=True, slots=True)
class MarkedLine:
    """A line in pieces; those that the other attempt's has not are marked."""

    kind: str
    role: str
    note: str
    pieces: Sequence[Piece]
    left_out: int = 0  # characters


@dataclass(frozen=True, slots=True)
class Side:
    """What one of the two did here."""

    step: int
    url: str
    lines: Sequence[MarkedLine]


@dataclass(frozen=True, slots=True)
class Row:
    """The same turn of both, or what each did in its place; None where one did nothing."""

    same: bool
    one: Side | None
    other: Side | None

    @property
    def sides(self) -> tuple[Side | None, Side | None]:
        return self.one, self.other


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows that are all the same, to be folded, or all different."""

    same: bool
    rows: Sequence[Row]
    steps: str


@dataclass(frozen=True, slots=True)
class Called:
    """How often each used a tool or took an action; listed where they differ."""

    name: str
    one: int
    other: int


@dataclass(frozen=True, slots=True)
class Pair:
    stretches: Sequence[Stretch]
    in_common: int  # turns
    only_one: int
    only_other: int
    called: Sequence[Called]
    left_out: bool  # there is more than is compared here


def compare(one: Sequence[Turn], other: Sequence[Turn], urls: tuple[str, str]) -> Pair:
    """Lay two attempts beside each other.

    Args:
        urls: of the attempts' own pages.
    """
    mine, others = one[:MOST_TURNS], other[:MOST_TURNS]
    laid = list(_laid([turn.key for turn in mine], [turn.key for turn in others], mine, others))
    pages = _Pages(urls)
    rows = [pages.row(mine[a] if a is not None else None, others[b] if b is not None else None) for a, b in laid]
    both = sum(1 for row in rows if row.same)
    return Pair(
        stretches=_stretches(rows),
        in_common=both,
        only_one=len(mine) - both,
        only_other=len(others) - both,
        called=_called(mine, others),
        left_out=len(one) > len(mine) or len(other) > len(others),
    )


def _laid(
    keys: Sequence[bytes], other_keys: Sequence[bytes], mine: Sequence[Turn], others: Sequence[Turn]
) -> Iterable[tuple[int | None, int | None]]:
    """Places of turns that stand beside each other: the same ones, and those of one speaker in a changed stretch."""
    for kind, a, end_a, b, end_b in differences.blocks(keys, other_keys):
        if kind == "equal":
            yield from zip(range(a, end_a), range(b, end_b), strict=True)
            continue
        while a < end_a or b < end_b:
            if a < end_a and b < end_b and mine[a].role == others[b].role:
                yield a, b
                a, b = a + 1, b + 1
            elif a < end_a and (b >= end_b or mine[a].role != "assistant"):
                yield a, None
                a += 1
            else:
                yield None, b
                b += 1


class _Pages:
    """Makes rows within what a page may show and spend."""

    def __init__(self, urls: tuple[str, str]) -> None:
        self.urls = urls
        self.work = Work()
        self.left = PAGE_TEXT

    def row(self, one: Turn | None, other: Turn | None) -> Row:
        mine = turns.lines(one) if one else []
        others = turns.lines(other) if other else []
        if one is not None and other is not None and one.key == other.key:
            side = self._side(one, self.urls[0], [self._plain(line) for line in mine])
            return Row(True, side, side)
        if [line.role for line in mine] == [line.role for line in others]:
            pairs = [self._marked(a, b) for a, b in zip(mine, others, strict=True)]
            return Row(
                False,
                self._side(one, self.urls[0], [pair[0] for pair in pairs]),
                self._side(other, self.urls[1], [pair[1] for pair in pairs]),
            )
        return Row(
            False,
            self._side(one, self.urls[0], [self._plain(line) for line in mine]),
            self._side(other, self.urls[1], [self._plain(line) for line in others]),
        )

    def _side(self, turn: Turn | None, url: str, lines: Sequence[MarkedLine]) -> Side | None:
        return None if turn is None else Side(turn.step, f"{url}?step={turn.step}", lines)

    def _cut(self, text: str) -> str:
        cut = text[: max(200, min(TEXT, self.left))]
        self.left -= len(cut)
        return cut

    def _plain(self, line: Line) -> MarkedLine:
        text = self._cut(line.text)
        return MarkedLine(line.kind, line.role, line.note, [Piece(text, False)], len(line.text) - len(text))

    def _marked(self, one: Line, other: Line) -> tuple[MarkedLine, MarkedLine]:
        mine, others = self._cut(one.text), self._cut(other.text)
        pieces = differences.texts(mine, others, self.work)
        return (
            MarkedLine(one.kind, one.role, one.note, pieces[0], len(one.text) - len(mine)),
            MarkedLine(other.kind, other.role, other.note, pieces[1], len(other.text) - len(others)),
        )


def _stretches(rows: Sequence[Row]) -> list[Stretch]:
    made: list[Stretch] = []
    start = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at].same != rows[start].same:
            part = rows[start:at]
            steps = [side.step for row in part for side in (row.one, row.other) if side is not None]
            first, last = min(steps), max(steps)
            made.append(Stretch(part[0].same, part, f"step {first}" if first == last else f"steps {first} to {last}"))
            start = at
    return made


def _called(one: Sequence[Turn], other: Sequence[Turn]) -> list[Called]:
    mine, others = _counted(one), _counted(other)
    return [
        Called(name, mine[name], others[name])
        for name in sorted({*mine, *others}, key=lambda name: (-abs(mine[name] - others[name]), name))[:20]
        if mine[name] != others[name]
    ]


def _counted(said: Sequence[Turn]) -> Counter[str]:
    return Counter(
        line.note
        for turn in said
        if turn.role in ("assistant", "action")
        for line in turns.lines(turn)
        if line.role in ("call", "action") and line.note
    )
