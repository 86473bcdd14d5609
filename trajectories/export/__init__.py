"""Trajectories going out: each format streamed in pieces, from any place on, with the memory of a few trajectories.

    native, trl-sft, openai-ft, hf-parquet     in the order of recording
    art-jsonl, art-parquet, trl-preference     by group; then, for ART, what is in none

Gold answers (`metadata.private` of scenarios and trajectories) stay here, unless `native` is asked for them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import msgspec
from django.db.models import QuerySet

from trajectories import payloads
from trajectories.errors import Invalid, Unknown
from trajectories.export import art, openai_ft, pages, parquet, trl
from trajectories.export.native import line, native, public
from trajectories.export.pages import Opened, Place, Tally, cursor, place_of
from trajectories.models import Trajectory

__all__ = (
    "ARGUMENTS", "FORMATS", "Asked", "Options", "Place", "Span", "Tally", "asked", "check_name", "cursor", "media_type",
    "native", "place_of", "public", "span", "stream", "suffix",
)  # fmt: skip

FORMATS = {
    "native": "a trajectory a line, as another site takes it",
    "art-jsonl": "a group a line, with tokens, for OpenPipe ART",
    "art-parquet": "a trajectory a row, for OpenPipe ART",
    "trl-sft": "conversations for TRL's SFTTrainer",
    "trl-preference": "best and worst of each group, for TRL's DPOTrainer",
    "openai-ft": "conversations for OpenAI's fine-tuning",
    "hf-parquet": "a trajectory a row with tokens, for datasets, pandas, polars, DuckDB",
}
PARQUET = ("art-parquet", "hf-parquet")
BY_GROUP = ("art-jsonl", "art-parquet", "trl-preference")
ARGUMENTS = ("after", "margin", "private", "unreadable")  # beside those of the list
LIMIT = 100_000  # trajectories, or groups, of one part
PIECE = 64 * 1024  # bytes, about, that leave at once


class Options(msgspec.Struct, frozen=True, kw_only=True):
    margin: float = 0.0  # of a preference: least difference of rewards
    private: bool = False  # native: with gold answers


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody wants exported, and from where on."""

    name: str = "native"
    begin: Place | None = None
    limit: int | None = None
    options: Options = Options()
    skip_unreadable: bool = False


def asked(rows: "QuerySet[Trajectory]", arguments: Mapping[str, str]) -> Asked:
    """Of the arguments of an address; `rows` are those among which `after` is looked up.

    Raises:
        Invalid: a value that it cannot have. Unknown: `after` names no trajectory.
    """
    name = check_name(arguments.get("format") or "native")
    begin = place_of(arguments["cursor"]) if arguments.get("cursor") else None
    if arguments.get("after"):
        begin = after(rows, arguments["after"], name)
    return Asked(
        name=name,
        begin=begin,
        limit=_limit(arguments["limit"]) if arguments.get("limit") else None,
        options=Options(margin=_margin(arguments.get("margin") or "0"), private=_is_private(name, arguments)),
        skip_unreadable=_one_of("unreadable", arguments.get("unreadable", ""), ("", "skip")) == "skip",
    )


def _limit(given: str) -> int:
    size = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0
    if not 1 <= size <= LIMIT:
        raise Invalid(f"limit is {given[:50]!r}; 1 to {LIMIT} are allowed.", pointer="?limit", limit=LIMIT)
    return size


def _margin(given: str) -> float:
    try:
        found = float(given)
    except ValueError:
        found = float("nan")
    if not 0 <= found < float("inf"):
        raise Invalid(f"margin must be a number from 0 on, not {given[:50]!r}.", pointer="?margin")
    return found


def _is_private(name: str, arguments: Mapping[str, str]) -> bool:
    wanted = _one_of("private", arguments.get("private", ""), ("", "0", "1")) == "1"
    if wanted and name != "native":
        raise Invalid(f"Gold answers go out in the native format alone, not in {name}.", pointer="?private")
    return wanted


def _one_of(name: str, given: str, known: Sequence[str]) -> str:
    if given not in known:
        raise Invalid(
            f"{name} must be {' or '.join(one for one in known if one)}, not {given[:50]!r}.", pointer=f"?{name}"
        )
    return given


class Span(msgspec.Struct, frozen=True):
    """From one place to another. By group, `g` places come before `t` places: those of what is in no group."""

    begin: Place
    end: Place
    newest: int  # pk of the newest trajectory: what comes in later belongs to the next export
    following: Place | None = None  # where the next part begins, when there is more


def check_name(name: str) -> str:
    """Raises Invalid: there is no such format."""
    if name not in FORMATS:
        raise Invalid(f"There is no export format {name[:50]!r}. There are: {', '.join(FORMATS)}.", pointer="?format")
    return name


def suffix(name: str) -> str:
    return "parquet" if name in PARQUET else "jsonl"


def media_type(name: str) -> str:
    return "application/vnd.apache.parquet" if name in PARQUET else "application/x-ndjson"


def after(rows: "QuerySet[Trajectory]", trajectory_id: str, name: str) -> Place:
    """The place after the line that this trajectory is in.

    Raises:
        Unknown: it is not there (any more).
    """
    row = None if "\x00" in trajectory_id else rows.filter(trajectory_id=trajectory_id).only("group_id").first()
    if row is None:
        raise Unknown(f"There is no trajectory {trajectory_id[:200]!r} to go on after. Use the cursor of a line.")
    if name in BY_GROUP and row.group_id is not None:
        return Place("g", row.group_id)
    return Place("t", row.pk)


def span(rows: "QuerySet[Trajectory]", name: str, begin: Place | None, limit: int | None) -> Span:
    """What an export goes through: all that is there now after `begin`, or so many trajectories (by group: groups).

    Raises:
        Invalid: `begin` is a place in an export of another kind.
    """
    begin = begin or Place("g" if name in BY_GROUP else "t")
    if begin.kind == "g" and name not in BY_GROUP:
        raise Invalid(f"The cursor is of an export by group, which {name} is not.", pointer="?cursor")
    rows = pages.sealed(rows)
    newest = pages.last(rows)
    whole = Span(begin, Place("t", newest), newest)
    if limit is None:
        return whole
    if begin.kind == "g":
        found = list(pages.group_pks(rows, begin.pk, pages.last_group(rows))[: limit + 1])
        if len(found) > limit:
            end = Place("g", found[limit - 1])
            return Span(begin, end, newest, end)
        if name == "trl-preference":
            return whole
        rest = limit - len(found)
        if not rest:
            loose = rows.filter(group=None).exists()
            return Span(begin, Place("t", 0), newest, Place("t", 0) if loose else None)
        rows, first = rows.filter(group=None), 0
    else:
        rows = rows.filter(group=None) if name in BY_GROUP else rows
        rest, first = limit, begin.pk - (begin.row >= 0)
    ends = list(rows.filter(pk__gt=first, pk__lte=newest).order_by("id").values_list("pk", flat=True)[: rest + 1])
    if len(ends) <= rest:
        return whole
    end = Place("t", ends[rest - 1])
    return Span(begin, end, newest, end)


def stream(
    rows: "QuerySet[Trajectory]",
    name: str,
    span: Span,
    options: Options | None = None,
    tally: Tally | None = None,
) -> Iterator[bytes]:
    """The export in pieces of some size; JSON lines end with a newline, the last one too.

    Raises:
        LookupError, Away, OSError: a payload cannot be read, and the tally does not pass it over.
    """
    options, tally = options or Options(), tally or Tally()
    rows = pages.sealed(rows).filter(pk__lte=span.newest)
    if name in PARQUET:
        made = _art_rows(rows, span, tally) if name == "art-parquet" else _hf_rows(rows, span, tally)
        schema = parquet.art_schema() if name == "art-parquet" else parquet.hf_schema()
        return parquet.stream(made, schema)
    lines: Mapping[str, Callable[[QuerySet[Trajectory], Span, Tally], Iterator[bytes]]] = {
        "native": partial(_native, private=options.private),
        "trl-sft": _sft,
        "openai-ft": _openai,
        "art-jsonl": _art_lines,
        "trl-preference": partial(_preferences, margin=options.margin),
    }
    return _pieces(lines[name](rows, span, tally))


def _pieces(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Neither a system call for each line nor more in memory than a piece and a line."""
    waiting: list[bytes] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= PIECE:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)


# --- in the order of recording ---------------------------------------------------------------------------------------


def _ordered(
    rows: "QuerySet[Trajectory]", span: Span, tally: Tally, columns: Sequence[str] = pages.COLUMNS
) -> Iterator[Opened]:
    """A trajectory of which some rows were taken comes again."""
    first = span.begin.pk - (span.begin.row >= 0)
    return pages.trajectories(rows, first, span.end.pk, tally, columns)


def _native(rows: "QuerySet[Trajectory]", span: Span, tally: Tally, *, private: bool) -> Iterator[bytes]:
    for one in _ordered(rows, span, tally):
        tally.lines += 1
        yield line(one, private=private) + b"\n"


def _several(one: Opened, made: Sequence[dict[str, object]], span: Span) -> Iterator[tuple[Place, dict[str, object]]]:
    """The rows of one trajectory that are still to go, each with the place after it."""
    done = span.begin.row if one.row.pk == span.begin.pk else -1
    for number, row in enumerate(made):
        if number > done:
            yield Place("t", one.row.pk, number if number + 1 < len(made) else -1), row


def _sft(rows: "QuerySet[Trajectory]", span: Span, tally: Tally) -> Iterator[bytes]:
    for one in _ordered(rows, span, tally):
        made = list(trl.sft(one))
        tally.left_out["nothing to learn"] += not made
        for place, row in _several(one, made, span):
            tally.lines += 1
            yield payloads.encode({**row, "cursor": cursor(place)}) + b"\n"


def _openai(rows: "QuerySet[Trajectory]", span: Span, tally: Tally) -> Iterator[bytes]:
    for one in _ordered(rows, span, tally):
        made = list(openai_ft.lines(one))
        tally.left_out["nothing to learn"] += not made
        for _, row in _several(one, made, span):
            tally.lines += 1
            yield payloads.encode(row) + b"\n"


def _hf_rows(rows: "QuerySet[Trajectory]", span: Span, tally: Tally) -> Iterator[tuple[parquet.Row, int]]:
    for one in _ordered(rows, span, tally, pages.ALL_COLUMNS):
        tally.lines += 1
        yield parquet.hf_row(one), one.row.raw_size


# --- by group --------------------------------------------------------------------------------------------------------


def _grouped(rows: "QuerySet[Trajectory]", span: Span) -> Iterator[list[Trajectory]]:
    """The trajectories of each group of the span, not opened yet."""
    if span.begin.kind == "g":
        until = span.end.pk if span.end.kind == "g" else pages.last_group(rows)
        for _, members in pages.groups(rows, span.begin.pk, until):
            yield members


def _by_group(chosen: Iterable[Trajectory], tally: Tally) -> Iterator[tuple[int, Iterator[Opened]]]:
    """Opened some at once, across groups: most are small, and each part costs its queries."""
    return groupby(pages.opened(chosen, tally), key=lambda one: one.row.group_id or 0)


def _rewarded(rows: "QuerySet[Trajectory]", span: Span, tally: Tally) -> Iterator[tuple[Place, Iterator[Opened]]]:
    """What ART takes: groups, then each trajectory that is in none as a group of one. Rewards are known."""

    def known() -> Iterator[Trajectory]:
        for members in _grouped(rows, span):
            for row in members:
                if row.reward is not None:
                    yield row
                else:
                    tally.left_out["reward unknown"] += 1

    for pk, members in _by_group(known(), tally):
        yield Place("g", pk), members
    if span.end.kind == "t":
        first = span.begin.pk if span.begin.kind == "t" else 0
        loose = rows.filter(group=None)
        for one in pages.trajectories(loose, first, span.end.pk, tally):
            if one.row.reward is None:
                tally.left_out["reward unknown"] += 1
            else:
                yield Place("t", one.row.pk), iter((one,))


def _group_metadata(place: Place) -> bytes:
    return payloads.encode(art.group_metadata(place.pk if place.kind == "g" else None, cursor(place)))


def _art_lines(rows: "QuerySet[Trajectory]", span: Span, tally: Tally) -> Iterator[bytes]:
    """A line leaves in parts: a group may be larger than what we hold at once."""
    for place, members in _rewarded(rows, span, tally):
        before = b'{"exceptions":[],"metadata":%b,"metrics":{},"logs":[],"trajectories":[' % _group_metadata(place)
        for one in members:
            yield before + payloads.encode(art.trajectory(one))
            before = b","
        tally.lines += 1
        yield b"]}\n"


def _art_rows(rows: "QuerySet[Trajectory]", span: Span, tally: Tally) -> Iterator[tuple[parquet.Row, int]]:
    for index, (place, members) in enumerate(_rewarded(rows, span, tally)):
        told = _group_metadata(place).decode()
        for one in members:
            tally.lines += 1
            yield parquet.art_row(one, index, told), one.row.raw_size


def _preferences(rows: "QuerySet[Trajectory]", span: Span, tally: Tally, *, margin: float) -> Iterator[bytes]:
    def pairs() -> Iterator[Trajectory]:
        for members in _grouped(rows, span):
            pair = trl.best_and_worst(members, margin)
            if pair is None:
                tally.left_out["no difference of known rewards"] += 1
            else:
                yield from pair

    for pk, members in _by_group(pairs(), tally):
        both = list(members)
        row = trl.preference(*both) if len(both) == 2 else None
        if row is None:
            tally.left_out["nothing in common"] += 1
            continue
        tally.lines += 1
        yield payloads.encode({**row, "cursor": cursor(Place("g", pk))}) + b"\n"
