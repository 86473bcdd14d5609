"""One page of a long list: a walk along an index, in windows, until the page is full or the time is up.

A page begins after a cursor, the key of a row, never after a number of rows; rows that come in or go away shift
nothing. Filters hold inside a window, so a filter that no index answers costs the window and not the table. What was
not looked at when the time was up comes with the next page: its cursor is where the walk stopped.
"""

import base64
import binascii
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Generic, TypeVar, cast

import msgspec
from django.core.exceptions import ValidationError
from django.db import OperationalError, connection, transaction
from django.db.models import BooleanField, F, Field, Func, Lookup, Model, QuerySet, Value
from django.db.models.expressions import Combinable
from django.db.models.lookups import GreaterThan, GreaterThanOrEqual, LessThan, LessThanOrEqual
from psycopg.errors import QueryCanceled

from trajectories.errors import Invalid

BUDGET = 0.1  # seconds for the rows of a page
COUNT_BUDGET = 0.05  # seconds to count what matches
COUNT_UP_TO = 10_000  # above this a list says "about"
WINDOW = 2_000  # rows of the index, or numbers, in the first window
GROWTH = 16  # times as wide as the last, at most
WINDOWS = 4  # so many queries, at most
CHEAP = 25_000.0  # in the planner's units: a count that costs more is not tried
BRANCHES = 8  # projects that are walked side by side in another order than by age

Row = TypeVar("Row", bound=Model)


# --- orders and places in them -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ordering:
    """An order in which a list may be walked: one column and the primary key, with an index over both, or the key
    alone. What has no value in the column comes last, whichever way."""

    name: str  # in addresses
    label: str
    field: str = ""  # none: by the primary key alone
    descending: bool = True
    per_project: bool = False  # its index begins with the project


NEWEST = Ordering("newest", "newest first")


@dataclass(frozen=True)
class Key:
    """The place of a row in an order."""

    pk: int
    value: object = None  # of the ordering's column; None where it has none
    including: bool = False  # a page that begins here has this row too


BORDER = -1  # as a key's number: between those that have a value and those that have none


class _Cursor(msgspec.Struct, array_like=True):
    ordering: str
    newer: bool
    pk: int
    value: str | int | float | None = None
    including: bool = False


@dataclass(frozen=True)
class Cursor:
    """Where a page begins, and which way it goes."""

    key: Key
    newer: bool = False

    def encode(self, ordering: Ordering) -> str:
        value = self.key.value
        told = value.isoformat() if isinstance(value, datetime) else cast(str | int | float | None, value)
        raw = msgspec.json.encode(_Cursor(ordering.name, self.newer, self.key.pk, told, self.key.including))
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(text: str, ordering: Ordering, model: type[Model]) -> Cursor:
    """Raises Invalid: it is none of ours, or of another order."""
    wrong = Invalid("The cursor is none of this list. Leave it out to begin again.", pointer="?cursor")
    try:
        raw = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
        sent = msgspec.json.decode(raw, type=_Cursor)
    except (ValueError, UnicodeError, binascii.Error, msgspec.MsgspecError):
        raise wrong from None
    value: object = sent.value
    if sent.ordering != ordering.name or not BORDER <= sent.pk < 2**63 or (not ordering.field and value is not None):
        raise wrong
    if ordering.field:
        field = cast("Field[object, object]", model._meta.get_field(ordering.field))
        try:
            value = field.to_python(value)
        except (ValidationError, ValueError, TypeError, OverflowError):
            raise wrong from None
        too_large = isinstance(value, int) and abs(value) >= 2**63
        if (value is None and not field.null) or too_large or (isinstance(value, str) and "\x00" in value):
            raise wrong
    return Cursor(Key(sent.pk, value, sent.including), sent.newer)


# --- a page --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Some rows in their order, and the places to go on from."""

    rows: Sequence[Row]
    older: Cursor | None = None  # None: there is nothing further that way
    newer: Cursor | None = None
    cut: bool = False  # the time was up before the page was full; its cursor goes on where the walk stopped
    whole: bool = False  # all that matches is on this page
    looked_to: Key | None = None  # the last place that was looked at, when it was cut


def walk(
    rows: QuerySet[Row],
    ordering: Ordering = NEWEST,
    cursor: Cursor | None = None,
    *,
    size: int = 50,
    budget: float = BUDGET,
    base: QuerySet[Row] | None = None,
    projects: Sequence[int] = (),
    window: int = WINDOW,
) -> Page[Row]:
    """A page of `rows`.

    Args:
        rows: scoped and filtered, their order is of no account.
        base: the same without filters, for windows along another column than the key; None: `rows` have none.
        projects: whose rows these may be, for an order whose index begins with the project; none: of one, or unknown.
        budget: seconds.
        window: width of the first window.
    """
    backwards = cursor is not None and cursor.newer
    line = _line(rows if base is None else base, ordering, projects, backwards=backwards)
    number, after = line.at(cursor.key if cursor else None)
    windowed = base is not None or line.needs_windows
    found: list[Row] = []
    stopped = cursor.key if cursor else None  # up to there everything has been looked at
    began = time.monotonic()
    ended = False
    with suppress(_TimeIsUp), limited(budget):
        for _ in range(WINDOWS):
            opened = time.monotonic()
            bound = line.stretches[number].bound(after, window) if windowed else None
            found += line.stretches[number].between(rows, after, bound)[: size + 1 - len(found)]
            if len(found) > size:
                break
            if bound is not None:
                stopped = after = bound
            elif number + 1 < len(line.stretches):
                number, after, stopped = number + 1, None, Key(BORDER)
            else:
                ended = True
                break
            now = time.monotonic()
            left = budget - (now - began)
            if left <= 0:
                break
            window = int(window * max(1.0, min(GROWTH, left / 2 / max(now - opened, 1e-4))))
    cut = not ended and len(found) <= size
    return _page(found, ordering, cursor, size=size, ended=ended, stopped=stopped if cut else None, cut=cut)


def _page(
    found: list[Row],
    ordering: Ordering,
    cursor: Cursor | None,
    *,
    size: int,
    ended: bool,
    stopped: Key | None,
    cut: bool,
) -> Page[Row]:
    rows = found[:size]
    onward = stopped if cut else (None if ended else key_of(rows[-1], ordering))
    back = key_of(rows[0], ordering) if rows else (replace(cursor.key, including=True) if cursor else None)
    backwards = cursor is not None and cursor.newer
    ahead = Cursor(onward, newer=backwards) if onward is not None else None
    behind = Cursor(back, newer=not backwards) if back is not None and cursor is not None else None
    if backwards:
        rows.reverse()
        return Page(rows, older=behind, newer=ahead, cut=cut, looked_to=stopped)
    return Page(rows, older=ahead, newer=behind, cut=cut, whole=ended and cursor is None, looked_to=stopped)


def key_of(row: Model, ordering: Ordering) -> Key:
    return Key(row.pk, getattr(row, ordering.field) if ordering.field else None)


class _TimeIsUp(Exception):
    """The database ended a statement that took too long."""


@contextmanager
def limited(budget: float) -> Iterator[None]:
    """No statement inside takes longer than the budget. Raises _TimeIsUp."""
    nested = connection.in_atomic_block
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("select set_config('statement_timeout', %s, true)", [str(max(1, round(budget * 1000)))])
            yield
            if nested:  # the setting would hold until the outer transaction ends
                cursor.execute("select set_config('statement_timeout', '0', true)")
    except OperationalError as exc:
        if not isinstance(exc.__cause__, QueryCanceled):
            raise
        raise _TimeIsUp from exc


# --- the line that is walked -----------------------------------------------------------------------------------------


class _Stretch:
    """A part of the index, walked in one direction."""

    def bound(self, after: Key | None, width: int) -> Key | None:
        """The last place of the window that begins after a place; None: the window reaches the end."""
        raise NotImplementedError

    def between(self, rows: QuerySet[Row], after: Key | None, last: Key | None) -> QuerySet[Row]:
        """Those after `after`, up to and with `last`, in the direction of the walk."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Line:
    stretches: Sequence[_Stretch]
    nulls: int = -1  # which of them has the rows without a value; -1: none has
    needs_windows: bool = False  # even where nothing is filtered

    def at(self, key: Key | None) -> tuple[int, Key | None]:
        """The stretch in which the walk begins, and the place in it."""
        if key is None:
            return 0, None
        if key.pk == BORDER:
            return len(self.stretches) - 1, None
        if self.nulls < 0:
            return 0, key
        return (self.nulls if key.value is None else 1 - self.nulls), key


def _line(base: QuerySet[Row], ordering: Ordering, projects: Sequence[int], *, backwards: bool) -> _Line:
    descending = ordering.descending != backwards
    if not ordering.field:
        return _Line([_ByKey(base.model, descending=descending)])
    split = ordering.per_project and 1 < len(projects) <= BRANCHES
    some = [base.filter(project=one) for one in projects] if split else [base]
    branches = [cast("QuerySet[Model]", one) for one in some]
    values = _ByColumn(branches, ordering.field, descending=descending)
    if not base.model._meta.get_field(ordering.field).null:
        return _Line([values], needs_windows=split)
    nulls = _WithoutValue(branches, ordering.field, descending=descending)
    both: tuple[_Stretch, _Stretch] = (nulls, values) if backwards else (values, nulls)
    return _Line(both, nulls=0 if backwards else 1, needs_windows=split)


class _ByKey(_Stretch):
    """Windows of numbers: they need no look at the index, and those without rows cost nothing."""

    def __init__(self, model: type[Model], *, descending: bool) -> None:
        self.model = model
        self.descending = descending
        self.ends: tuple[int, int] | None = None

    def bound(self, after: Key | None, width: int) -> Key | None:
        low, high = self.ends = self.ends or self._ends()
        if self.descending:
            last = (high + 1 if after is None else min(after.pk, high + 1)) - width
            return Key(last) if last > low else None
        last = (low - 1 if after is None else max(after.pk, low - 1)) + width
        return Key(last) if last < high else None

    def _ends(self) -> tuple[int, int]:
        pk = self.model._meta.pk
        assert pk is not None
        with connection.cursor() as cursor:
            cursor.execute(f'select min("{pk.column}"), max("{pk.column}") from "{self.model._meta.db_table}"')  # noqa: S608
            low, high = cursor.fetchone()
        return low or 0, high or 0

    def between(self, rows: QuerySet[Row], after: Key | None, last: Key | None) -> QuerySet[Row]:
        beyond, up_to = ("pk__lt", "pk__gte") if self.descending else ("pk__gt", "pk__lte")
        if after is not None:
            rows = rows.filter(**{beyond + ("e" if after.including else ""): after.pk})
        if last is not None:
            rows = rows.filter(**{up_to: last.pk})
        return rows.order_by("-pk" if self.descending else "pk")


COMPARED: Mapping[tuple[str, bool], type[Lookup[bool]]] = {
    ("<", False): LessThan,
    ("<", True): LessThanOrEqual,
    (">", False): GreaterThan,
    (">", True): GreaterThanOrEqual,
}


class _ByColumn(_Stretch):
    """Windows of rows along an index over a column and the key, which is asked where a window ends."""

    def __init__(self, branches: "Sequence[QuerySet[Model]]", field: str, *, descending: bool) -> None:
        self.branches = branches  # whose windows are merged
        self.field = field
        self.descending = descending

    def order(self) -> list[str]:
        return [f"-{name}" if self.descending else name for name in (self.field, "pk")]

    def only(self, rows: QuerySet[Row]) -> QuerySet[Row]:
        nullable = rows.model._meta.get_field(self.field).null
        return rows.filter(**{f"{self.field}__isnull": False}) if nullable else rows

    def place(self, key: Key) -> Combinable:
        return _pair(Value(key.value), Value(key.pk))

    def pair(self) -> Combinable:
        return _pair(F(self.field), F("pk"))

    def compared(self, key: Key, sign: str, *, or_equal: bool) -> Lookup[bool]:
        return COMPARED[sign, or_equal](self.pair(), self.place(key))

    def key(self, value: object, pk: int) -> Key:
        return Key(pk, value)

    def bound(self, after: Key | None, width: int) -> Key | None:
        ends = [
            self.between(one.select_related(None), after, None).values_list(self.field, "pk")[:width]
            for one in self.branches
        ]
        merged = ends[0] if len(ends) == 1 else ends[0].union(*ends[1:], all=True).order_by(*self.order())
        # The end of a window, not a page: the index alone is read, and no further than the window is wide.
        last = list(merged[width - 1 : width])
        return self.key(*last[0]) if last else None

    def between(self, rows: QuerySet[Row], after: Key | None, last: Key | None) -> QuerySet[Row]:
        rows = self.only(rows)
        if after is not None:
            rows = rows.filter(self.compared(after, "<" if self.descending else ">", or_equal=after.including))
        if last is not None:
            rows = rows.filter(self.compared(last, ">" if self.descending else "<", or_equal=True))
        return rows.order_by(*self.order())


class _WithoutValue(_ByColumn):
    """The rows that have none in the column, by their key."""

    def order(self) -> list[str]:
        return ["-pk" if self.descending else "pk"]

    def only(self, rows: QuerySet[Row]) -> QuerySet[Row]:
        return rows.filter(**{f"{self.field}__isnull": True})

    def place(self, key: Key) -> Combinable:
        return Value(key.pk)

    def pair(self) -> Combinable:
        return F("pk")

    def key(self, value: object, pk: int) -> Key:
        return Key(pk)


def _pair(first: Combinable, second: Combinable) -> Combinable:
    """Two values that are compared as one, so that an index over both finds the place."""
    return Func(first, second, function="row", output_field=BooleanField())  # never read as a value


# --- how many there are ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    n: int
    exact: bool = True


def count(rows: QuerySet[Row], *, budget: float = COUNT_BUDGET) -> Count:
    """How many match: counted where that is cheap, else as the planner guesses."""
    plain = rows.select_related(None).order_by().values("pk")
    told = plain.explain(format="json")
    if not told:  # nothing can match
        return Count(0)
    plan = json.loads(told)[0]["Plan"]
    guessed, cost = int(plan["Plan Rows"]), float(plan["Total Cost"])
    if guessed <= 2 * COUNT_UP_TO and cost <= CHEAP:
        with suppress(_TimeIsUp), limited(budget):
            found = plain[: COUNT_UP_TO + 1].count()
            if found <= COUNT_UP_TO:
                return Count(found)
            return Count(max(found, guessed), exact=False)
    return Count(guessed, exact=False)
