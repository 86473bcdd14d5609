"""The walk behind every list: each row once, whatever comes in meanwhile, and an honest end when time is up."""

import random
from collections.abc import Callable
from datetime import datetime
from unittest.mock import patch

import pytest
from django.db import connection
from django.db.models import QuerySet
from django.test.utils import CaptureQueriesContext

from tests import builders
from trajectories import listing
from trajectories.errors import Invalid
from trajectories.listing import NEWEST, Cursor, Key, Ordering, Page
from trajectories.models import Project, Trajectory

pytestmark = pytest.mark.django_db

BEST = Ordering("-reward", "highest reward first", field="reward", per_project=True)
WORST = Ordering("reward", "lowest reward first", field="reward", descending=False, per_project=True)
LONGEST = Ordering("-n_steps", "most steps first", field="n_steps")
LATEST = Ordering("-started_at", "latest start first", field="started_at")
ORDERINGS = (NEWEST, Ordering("oldest", "oldest first", descending=False), BEST, WORST, LONGEST, LATEST)
REWARDS = (None, None, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, -3.5)

Rows = QuerySet[Trajectory]


def seed(project: Project, n: int, rng: random.Random) -> None:
    for _ in range(n):
        builders.make_trajectory(
            project,
            reward=rng.choice(REWARDS),
            n_steps=rng.randrange(3),
            final_status=rng.choice(("completed", "completed", "agent_error")),
        )


def in_order(rows: Rows, ordering: Ordering) -> list[int]:
    """What the walk should find, by sorting in Python."""

    def place(row: Trajectory) -> tuple[object, ...]:
        value = getattr(row, ordering.field) if ordering.field else 0
        sign = -1 if ordering.descending else 1
        if value is None:
            return (1, 0, sign * row.pk)
        number = value.timestamp() if isinstance(value, datetime) else value
        return (0, sign * number, sign * row.pk)

    return [row.pk for row in sorted(rows, key=place)]


def again(cursor: Cursor, ordering: Ordering) -> Cursor:
    """As it comes back in the next request."""
    return listing.decode(cursor.encode(ordering), ordering, Trajectory)


def everything(
    rows: Callable[[], Rows],
    base: Callable[[], Rows],
    ordering: Ordering,
    projects: list[int],
    *,
    window: int,
    size: int,
) -> tuple[list[int], Page[Trajectory], int]:
    """Every page from the first to the last: what was found, the last page, how many there were."""
    found: list[int] = []
    cursor: Cursor | None = None
    for number in range(1, 500):
        page = listing.walk(rows(), ordering, cursor, size=size, base=base(), projects=projects, window=window)
        found += [row.pk for row in page.rows]
        assert len(page.rows) == size or page.cut or page.older is None
        if page.older is None:
            return found, page, number
        cursor = again(page.older, ordering)
    raise AssertionError("The walk never ends.")


@pytest.mark.parametrize("ordering", ORDERINGS, ids=lambda one: one.name)
@pytest.mark.parametrize(("window", "size", "windows"), [(1, 1, 1), (3, 4, 2), (7, 5, 4), (2_000, 6, 4)])
def test_pages_give_every_matching_row_once_and_in_order(
    ordering: Ordering, window: int, size: int, windows: int
) -> None:
    rng = random.Random(f"{ordering.name} {window}")
    one, two, other = builders.make_project(), builders.make_project(), builders.make_project()
    for project in (one, two, other, one, two, one):
        seed(project, 7, rng)
    mine = Trajectory.objects.filter(project__in=[one, two])
    wanted = in_order(mine.filter(final_status="completed"), ordering)
    with patch.object(listing, "WINDOWS", windows), patch.object(listing, "GROWTH", 1):
        found, _, _ = everything(
            lambda: mine.filter(final_status="completed"),
            lambda: mine.all(),
            ordering,
            [one.pk, two.pk],
            window=window,
            size=size,
        )
    assert found == wanted


@pytest.mark.parametrize("ordering", ORDERINGS, ids=lambda one: one.name)
def test_the_way_back_gives_the_same_rows(ordering: Ordering) -> None:
    project = builders.make_project()
    seed(project, 30, random.Random(ordering.name))
    rows = Trajectory.objects.filter(project=project).exclude(final_status="agent_error")
    base = Trajectory.objects.filter(project=project)
    wanted = in_order(rows, ordering)
    with patch.object(listing, "WINDOWS", 2), patch.object(listing, "GROWTH", 1):
        _, last, _ = everything(rows.all, base.all, ordering, [project.pk], window=3, size=4)
        found = [row.pk for row in last.rows]
        cursor = last.newer
        while cursor is not None:
            page = listing.walk(rows, ordering, again(cursor, ordering), size=4, base=base, window=3)
            found = [row.pk for row in page.rows] + found
            cursor = page.newer
    assert found == wanted


def test_rows_that_come_in_at_the_head_shift_nothing() -> None:
    project = builders.make_project()
    rng = random.Random(1)
    seed(project, 20, rng)
    base = Trajectory.objects.filter(project=project)
    before = in_order(base, NEWEST)

    def while_others_record() -> Rows:
        seed(project, 1, rng)
        return base.all()

    first = listing.walk(base, size=4)
    found, cursor = [row.pk for row in first.rows], first.older
    while cursor is not None:
        page = listing.walk(while_others_record(), NEWEST, again(cursor, NEWEST), size=4)
        found += [row.pk for row in page.rows]
        cursor = page.older

    assert found == before
    newer = listing.walk(base, NEWEST, first.newer or Cursor(Key(before[0]), newer=True), size=50)
    assert [row.pk for row in newer.rows] == in_order(base.all(), NEWEST)[: len(newer.rows)]
    assert len(newer.rows) == base.all().count() - len(before)


def test_a_walk_that_runs_out_of_time_says_how_far_it_looked_and_goes_on_there() -> None:
    project = builders.make_project()
    seed(project, 40, random.Random(2))
    oldest = Trajectory.objects.filter(project=project).earliest("pk")
    Trajectory.objects.filter(pk=oldest.pk).update(final_status="cancelled")
    rare = Trajectory.objects.filter(project=project, final_status="cancelled")
    base = Trajectory.objects.filter(project=project)

    with patch.object(listing, "WINDOWS", 1):
        page = listing.walk(rare, base=base, window=5, budget=60.0)

    assert (page.rows, page.cut, page.counted) == ([], True, None)
    assert page.older is not None and page.looked_to is not None
    assert page.looked_to.pk > oldest.pk
    rest = listing.walk(rare, NEWEST, page.older, base=base)
    assert [row.pk for row in rest.rows] == [oldest.pk]
    assert not rest.cut and rest.older is None
    assert rest.newer is not None
    assert listing.walk(rare, NEWEST, rest.newer, base=base).rows == []


def test_a_statement_that_takes_too_long_is_ended_and_what_was_found_is_shown() -> None:
    project = builders.make_project()
    seed(project, 20, random.Random(3))
    base = Trajectory.objects.filter(project=project)
    slow = base.extra(where=["(select true from pg_sleep(case when reward_source = 'slow' then 5 else 0 end))"])
    last = base.earliest("pk")
    Trajectory.objects.filter(pk=last.pk).update(reward_source="slow")

    page = listing.walk(slow, base=base, window=5, budget=0.3)

    assert page.cut and page.older is not None
    assert page.rows and last.pk not in [row.pk for row in page.rows]
    assert base.count() == 20  # the connection is in order, and without a time limit
    with connection.cursor() as cursor:
        cursor.execute("show statement_timeout")
        assert cursor.fetchone() == ("0",)


def test_when_nothing_at_all_was_looked_at_the_page_is_empty_and_cut() -> None:
    project = builders.make_project()
    seed(project, 3, random.Random(4))
    base = Trajectory.objects.filter(project=project)
    slow = base.extra(where=["(select true from pg_sleep(5))"])

    page = listing.walk(slow, base=base, budget=0.05)

    assert (page.rows, page.cut, page.older) == ([], True, None)


def test_a_list_without_filters_is_one_query() -> None:
    project = builders.make_project()
    seed(project, 9, random.Random(5))
    with CaptureQueriesContext(connection) as queries:
        page = listing.walk(Trajectory.objects.filter(project=project), size=4)
    assert len(page.rows) == 4
    asked = [one["sql"] for one in queries if "SAVEPOINT" not in one["sql"] and "set_config" not in one["sql"]]
    assert len(asked) == 1 and "OFFSET" not in asked[0]


@pytest.mark.parametrize("ordering", [NEWEST, BEST, LATEST, LONGEST], ids=lambda one: one.name)
@pytest.mark.parametrize(
    "text",
    ["x", "", "%00", "ü", "W10", "e30", Cursor(Key(7)).encode(Ordering("other", "")),
     Cursor(Key(7, "yesterday")).encode(BEST), Cursor(Key(7, "yesterday")).encode(LATEST),
     Cursor(Key(7, "\x00")).encode(LONGEST), Cursor(Key(2**63)).encode(NEWEST), Cursor(Key(-2)).encode(NEWEST),
     Cursor(Key(7, 1)).encode(NEWEST), Cursor(Key(7)).encode(LATEST), Cursor(Key(7, 10**30)).encode(LONGEST)],
)  # fmt: skip
def test_a_cursor_that_is_none_of_ours_is_refused(ordering: Ordering, text: str) -> None:
    with pytest.raises(Invalid):
        listing.decode(text, ordering, Trajectory)


def test_counts_are_exact_where_that_is_cheap_and_said_to_be_guesses_elsewhere() -> None:
    project = builders.make_project()
    seed(project, 12, random.Random(6))
    rows = Trajectory.objects.filter(project=project)

    def counted(some: Rows = rows) -> listing.Count | None:
        return listing.walk(some, size=5, counts=True).counted

    assert counted() == listing.Count(12)
    assert counted(rows.none()) == listing.Count(0)
    assert listing.walk(rows, size=50).counted == listing.Count(12)
    with patch.object(listing, "COUNT_UP_TO", 5):
        assert not (counted() or listing.Count(0)).exact
    with patch.object(listing, "CHEAP", 0.0):
        assert not (counted() or listing.Count(0)).exact
