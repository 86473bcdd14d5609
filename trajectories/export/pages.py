"""Which trajectories go out, in which order, and from where on: keyset pages, never the whole.

A place in an export is where a reader may go on later: after a trajectory (`t`), or, in the formats that have a line
a group, after a group (`g`; the trajectories without one follow the groups). Open trajectories are left out until they
are sealed.
"""

import base64
import binascii
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from django.db.models import Max, QuerySet

from trajectories import segments
from trajectories.errors import Away, Invalid
from trajectories.models import Scenario, State, Trajectory
from trajectories.segments import LoadedPayload

ROWS = 100  # looked up at once
BYTES = 8 * 1024 * 1024  # of payloads that are open at once; one alone may be larger
GROUPS = 200  # groups whose members are looked up at once

COLUMNS = (
    "trajectory_id", "scenario_id", "group_id", "final_status", "reward", "reward_components", "behaviour",
    "model_names", "is_superseded", "is_excluded", "twin_of_id", "raw_size", "shared_texts",
)  # fmt: skip
ALL_COLUMNS = (
    *COLUMNS, "episode_id", "started_at", "ended_at", "received_at", "stop_reason", "reward_source", "origin",
    "n_steps", "n_calls", "prompt_tokens", "completion_tokens", "fidelity", "quality", "is_evaluation",
)  # fmt: skip

log = logging.getLogger(__name__)


class Place(msgspec.Struct, frozen=True):
    """After so many rows of this trajectory or group; -1: after all of them."""

    kind: str = "t"
    pk: int = 0
    row: int = -1


def cursor(place: Place) -> str:
    told = f"{place.kind}{place.pk}" + (f".{place.row}" if place.row >= 0 else "")
    return base64.urlsafe_b64encode(told.encode()).decode()


def place_of(given: str) -> Place:
    """Raises Invalid: it is no cursor of ours."""
    try:
        told = base64.urlsafe_b64decode(given.encode("ascii", "strict")).decode("ascii")
        kind, number = ("t", told) if told[:1].isdigit() else (told[:1], told[1:])
        pk, _, row = number.partition(".")
        place = Place(kind, int(pk), int(row) if row else -1)
        if kind not in ("t", "g") or not 0 <= place.pk < 2**63 or not -1 <= place.row < 2**31:
            raise ValueError(told)
    except (ValueError, UnicodeError, binascii.Error):
        raise Invalid("The cursor is none of ours. Leave it out to begin again.", pointer="?cursor") from None
    return place


class Opened(msgspec.Struct, frozen=True):
    """A trajectory with what was recorded of it."""

    row: Trajectory
    payload: LoadedPayload
    scenario: Scenario | None


class Tally:
    """What an export did: counted while it streams, for whoever asks meanwhile or at the end."""

    def __init__(self, *, skip_unreadable: bool = False) -> None:
        self.skip_unreadable = skip_unreadable
        self.trajectories = 0  # read
        self.lines = 0  # or rows of parquet
        self.left_out: Counter[str] = Counter()  # by reason: trajectories, or of preferences groups
        self.unreadable: list[str] = []

    def met(self, row: Trajectory, exc: Exception) -> None:
        """Raises what was met, unless it is to be passed over."""
        log.error("export: trajectory %r (row %s) cannot be read: %s", row.trajectory_id, row.pk, exc)
        if not self.skip_unreadable:
            raise exc
        self.unreadable.append(row.trajectory_id)


def sealed(rows: "QuerySet[Trajectory]") -> "QuerySet[Trajectory]":
    return rows.exclude(state=State.OPEN)


def last(rows: "QuerySet[Trajectory]") -> int:
    """The newest row that is there now: what comes in meanwhile belongs to the next export."""
    newest = rows.order_by("-id").values_list("pk", flat=True).first()
    return newest or 0


def trajectories(
    rows: "QuerySet[Trajectory]", after: int, until: int, tally: Tally, columns: Sequence[str] = COLUMNS
) -> Iterator[Opened]:
    """Those with `after` < pk <= `until`, in the order of recording."""
    while True:
        page = list(rows.filter(pk__gt=after, pk__lte=until).only(*columns).order_by("id")[:ROWS])
        if not page:
            return
        yield from opened(page, tally)
        after = page[-1].pk


def opened(rows: Iterable[Trajectory], tally: Tally) -> Iterator[Opened]:
    """The rows with their payloads, some at once."""
    for part in _parts(rows):
        told = Scenario.objects.in_bulk({row.scenario_id for row in part if row.scenario_id is not None})
        for row, payload in _loaded(part, tally):
            tally.trajectories += 1
            yield Opened(row, payload, told.get(row.scenario_id) if row.scenario_id is not None else None)


def _parts(rows: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
    part: list[Trajectory] = []
    size = 0
    for row in rows:
        if part and (size + row.raw_size > BYTES or len(part) >= ROWS):
            yield part
            part, size = [], 0
        part.append(row)
        size += row.raw_size
    if part:
        yield part


def _loaded(part: Sequence[Trajectory], tally: Tally) -> Iterator[tuple[Trajectory, LoadedPayload]]:
    try:
        found = segments.load_many(part)
    except (LookupError, Away, OSError) as exc:
        if len(part) == 1:
            tally.met(part[0], exc)
            return
        for one in part:  # to find out which
            yield from _loaded([one], tally)
        return
    for row in part:
        yield row, found[row.pk]


def groups(rows: "QuerySet[Trajectory]", after: int, until: int) -> Iterator[tuple[int, list[Trajectory]]]:
    """(group, its trajectories), in the order of groups; the trajectories are not open yet, only known."""
    while True:
        pks = group_pks(rows, after, until)[:GROUPS]
        if not pks:
            return
        members: dict[int, list[Trajectory]] = {}
        for row in rows.filter(group__in=list(pks)).only(*COLUMNS).order_by("group_id", "id").iterator(chunk_size=2000):
            assert row.group_id is not None
            if members and row.group_id not in members:
                yield members.popitem()
            members.setdefault(row.group_id, []).append(row)
        yield from members.items()
        after = pks[len(pks) - 1]


def group_pks(rows: "QuerySet[Trajectory]", after: int, until: int) -> "QuerySet[Trajectory, int]":
    found = rows.filter(group__gt=after, group__lte=until).order_by("group_id").values_list("group_id", flat=True)
    return found.distinct()


def last_group(rows: "QuerySet[Trajectory]") -> int:
    return rows.order_by().aggregate(last=Max("group"))["last"] or 0
