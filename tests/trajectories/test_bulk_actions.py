"""One thing done to many: chosen once, in chunks, killed anywhere, taken back."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db.models import Count

from tests import builders
from tests.gateway.running import database_url
from tests.trajectories import recordings
from trajectories import bulk_actions, formats, indexing, ingestion, preparing
from trajectories.bulk_actions import KINDS
from trajectories.errors import Refused
from trajectories.history import Actor
from trajectories.models import (
    ActionState,
    BulkAction,
    BulkItem,
    Group,
    Membership,
    Project,
    Role,
    StateChange,
    Trajectory,
)

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project("shop")


@pytest.fixture
def researcher(project: Project) -> Actor:
    user = builders.make_member(project, Role.RESEARCHER)
    return Actor(user.get_username(), user)


@pytest.fixture
def operator(project: Project) -> Actor:
    user = builders.make_member(project, Role.OPERATOR)
    return Actor(user.get_username(), user)


def rows(project: Project, n: int) -> list[int]:
    return [builders.make_trajectory(project).pk for _ in range(n)]


def begin(kind: str, project: Project, by: Actor, **more: str) -> BulkAction:
    chosen = Trajectory.objects.filter(project=project)
    return bulk_actions.start(KINDS[kind], project, chosen, by=by, reason=more.get("reason", "they cheat"))


def small_chunks(monkeypatch: pytest.MonkeyPatch, kind: str, n: int) -> None:
    monkeypatch.setitem(KINDS, kind, replace(KINDS[kind], rows=n))


def test_everything_that_matched_at_the_start_is_done_and_nothing_else(
    project: Project, researcher: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, "exclude", 3)
    before = rows(project, 7)
    action = begin("exclude", project, researcher)
    later = rows(project, 2)
    while bulk_actions.run(action.pk, seconds=0):
        pass
    action.refresh_from_db()

    assert (action.state, action.n_chosen, action.n_done, action.n_refused) == (ActionState.DONE, 7, 7, 0)
    assert set(Trajectory.objects.filter(is_excluded=True).values_list("pk", flat=True)) == set(before)
    assert not Trajectory.objects.filter(pk__in=later, is_excluded=True).exists()
    changes = StateChange.objects.filter(kind="trajectory", field="is_excluded", object_id__in=before)
    assert changes.count() == 7
    assert {one.reason for one in changes} == {"they cheat"}
    assert {one.by_name for one in changes} == {researcher.name}


def test_the_groups_are_counted_again(project: Project, researcher: Actor) -> None:
    group = builders.make_group(project, (0.0, 1.0, 1.0))
    one = group.trajectories.order_by("pk")[0]
    action = bulk_actions.start(
        KINDS["exclude"], project, Trajectory.objects.filter(pk=one.pk), by=researcher, reason="it cheats"
    )
    bulk_actions.run(action.pk)
    indexing.drain(project)
    group.refresh_from_db()
    assert group.n == 2


def test_what_cannot_be_done_is_told_and_costs_its_neighbours_nothing(project: Project, operator: Actor) -> None:
    sealed, running = builders.make_trajectory(project), builders.make_trajectory(project, state="open")
    action = begin("archive", project, operator, reason="")
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert (action.n_done, action.n_refused) == (1, 1)
    assert "still running" in BulkItem.objects.get(action=action, object_id=running.pk).detail
    assert Trajectory.objects.get(pk=sealed.pk).archived_at is not None


def test_a_row_that_was_deleted_meanwhile_is_told(project: Project, researcher: Actor) -> None:
    first, _ = rows(project, 2)
    action = begin("exclude", project, researcher)
    Trajectory.objects.filter(pk=first).delete()
    bulk_actions.run(action.pk)
    assert "deleted" in BulkItem.objects.get(action=action, object_id=first).detail
    action.refresh_from_db()
    assert (action.state, action.n_done, action.n_refused) == (ActionState.DONE, 1, 1)


def test_it_is_taken_back_but_for_what_changed_since(project: Project, researcher: Actor) -> None:
    mine, already = rows(project, 2)
    Trajectory.objects.filter(pk=already).update(is_excluded=True)
    action = begin("exclude", project, researcher)
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert (action.n_done, action.n_refused) == (1, 1)

    back = bulk_actions.undo(action, by=researcher, reason="")
    bulk_actions.run(back.pk)
    assert not Trajectory.objects.get(pk=mine).is_excluded
    assert Trajectory.objects.get(pk=already).is_excluded  # somebody else's doing stays
    with pytest.raises(Refused, match="taken back already"):
        bulk_actions.undo(action, by=researcher, reason="")


def test_a_cancelled_one_leaves_the_rest_and_can_be_taken_back(
    project: Project, researcher: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, "exclude", 2)
    rows(project, 5)
    action = begin("exclude", project, researcher)
    assert bulk_actions.run(action.pk, seconds=0)
    bulk_actions.cancel(action, by=researcher, reason="wrong filter")
    assert not bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert (action.state, action.n_done) == (ActionState.CANCELLED, 2)
    with pytest.raises(Refused, match="ended already"):
        bulk_actions.cancel(action, by=researcher, reason="")
    back = bulk_actions.undo(action, by=researcher, reason="wrong filter")
    bulk_actions.run(back.pk)
    assert not Trajectory.objects.filter(project=project, is_excluded=True).exists()


def test_one_that_runs_cannot_be_taken_back_yet(project: Project, researcher: Actor) -> None:
    rows(project, 1)
    action = begin("exclude", project, researcher)
    with pytest.raises(Refused, match="still runs"):
        bulk_actions.undo(action, by=researcher, reason="")


def test_the_role_is_asked_for_again_with_each_chunk(
    project: Project, researcher: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, "exclude", 2)
    rows(project, 4)
    action = begin("exclude", project, researcher)
    assert bulk_actions.run(action.pk, seconds=0)
    Membership.objects.filter(user=researcher.user).delete()
    assert not bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert action.state == ActionState.CANCELLED
    assert "is no researcher now" in action.error
    assert Trajectory.objects.filter(is_excluded=True).count() == 2


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nobody_begins_one_without_its_role(project: Project, kind: str) -> None:
    outsider = builders.make_member(builders.make_project("there"), Role.OPERATOR)
    rows(project, 1)
    with pytest.raises(Refused, match="You are no"):
        begin(kind, project, Actor(outsider.get_username(), outsider))


def test_another_project_s_rows_are_never_chosen(project: Project, researcher: Actor) -> None:
    other = builders.make_project("there")
    theirs = rows(other, 2)
    everything = Trajectory.objects.all()
    with pytest.raises(Refused, match="Nothing of shop"):
        bulk_actions.start(KINDS["exclude"], project, everything, by=researcher, reason="x")
    mine = rows(project, 1)
    action = bulk_actions.start(KINDS["exclude"], project, everything, by=researcher, reason="x")
    assert list(BulkItem.objects.filter(action=action).values_list("object_id", flat=True)) == mine
    assert theirs


def test_a_reason_is_asked_for(project: Project, researcher: Actor) -> None:
    rows(project, 1)
    with pytest.raises(Refused, match="reason"):
        begin("exclude", project, researcher, reason="  ")


def test_marked_for_evaluation_it_leaves_its_group_and_no_batch_takes_it(project: Project, researcher: Actor) -> None:
    bodies = [recordings.native(scenario_id="s", scenario={"id": "s", "split": "train"}) for _ in range(3)]
    found = ingestion.record_many(project, [formats.incoming(json.dumps(one).encode(), "native") for one in bodies])
    assert all(isinstance(one, preparing.Recorded) for one in found)
    indexing.drain(project)
    row = Trajectory.objects.filter(project=project).order_by("pk")[0]
    chosen = Trajectory.objects.filter(pk=row.pk)
    action = bulk_actions.start(KINDS["mark-evaluation"], project, chosen, by=researcher, reason="a test set")
    bulk_actions.run(action.pk)
    indexing.drain(project)
    row.refresh_from_db()
    assert row.is_evaluation
    assert row.group is not None
    told = Group.objects.filter(project=project).order_by("pk").values_list("is_evaluation", "n")
    assert list(told) == [(False, 2), (True, 1)]

    back = bulk_actions.undo(action, by=researcher, reason="")
    bulk_actions.run(back.pk)
    indexing.drain(project)
    assert list(told.all()) == [(False, 3), (True, 0)]


def test_what_a_batch_has_stays_training(project: Project, researcher: Actor) -> None:
    group = builders.make_group(project, (0.0, 1.0))
    builders.make_batch(project, status="completed", groups=(group,))
    action = bulk_actions.start(
        KINDS["mark-evaluation"], project, group.trajectories.all(), by=researcher, reason="a test set"
    )
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert (action.n_done, action.n_refused) == (0, 2)
    assert "A batch that is live or completed" in BulkItem.objects.filter(action=action)[0].detail


def test_what_a_live_version_learned_from_is_archived_only_when_told_so(project: Project, operator: Actor) -> None:
    group = builders.make_group(project, (0.0, 1.0))
    batch = builders.make_batch(project, status="completed", groups=(group,))
    old = builders.make_model(project, batch=batch, status="archived")
    chosen = group.trajectories.all()

    heir = builders.make_model(project, parent=old, status="deployed")
    action = bulk_actions.start(KINDS["archive"], project, chosen, by=operator)
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert (action.n_done, action.n_refused) == (0, 2)
    assert f"{heir} (deployed) learned from it" in BulkItem.objects.filter(action=action)[0].detail

    told = bulk_actions.start(KINDS["archive"], project, chosen, by=operator, options=["even_if_needed", "nonsense"])
    assert told.options == {"even_if_needed": True}
    bulk_actions.run(told.pk)
    told.refresh_from_db()
    assert (told.n_done, told.n_refused) == (2, 0)


def test_what_only_archived_versions_learned_from_goes(project: Project, operator: Actor) -> None:
    group = builders.make_group(project, (0.0, 1.0))
    batch = builders.make_batch(project, status="completed", groups=(group,))
    builders.make_model(project, batch=batch, status="archived")
    action = bulk_actions.start(KINDS["archive"], project, group.trajectories.all(), by=operator)
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert (action.n_done, action.n_refused) == (2, 0)


def test_two_workers_do_not_do_it_twice(project: Project, researcher: Actor) -> None:
    rows(project, 3)
    action = begin("exclude", project, researcher)
    bulk_actions.run(action.pk)
    assert not bulk_actions.run(action.pk)
    assert StateChange.objects.filter(field="is_excluded").count() == 3


# --- killed ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal
from dataclasses import replace
from trajectories import bulk_actions
kind = bulk_actions.KINDS["exclude"]
chunks = 0
def act(chunk):
    global chunks
    refused = kind.act(chunk)
    chunks += 1
    if chunks == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # its rows are written, and nothing is committed
    return refused
bulk_actions.register(replace(kind, rows=4, act=act))
bulk_actions.run({pk})
"""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    yield {**os.environ, "DATABASE_URL": database_url(), "DATA_DIR": str(tmp_path)}


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_is_killed_in_a_chunk_leaves_it_to_the_next(
    project: Project, researcher: Actor, environment: dict[str, str]
) -> None:
    pks = rows(project, 10)
    action = begin("exclude", project, researcher)
    run = subprocess.run(
        [sys.executable, "manage.py", "shell", "--no-imports", "-c", KILLED.format(pk=action.pk)],
        env=environment,
        check=False,
        capture_output=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    action.refresh_from_db()
    assert (action.n_done, action.state) == (4, ActionState.RUNNING)

    assert bulk_actions.live() == [action.pk]
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert (action.n_done, action.state) == (10, ActionState.DONE)
    once = StateChange.objects.filter(field="is_excluded").values("object_id").annotate(n=Count("id"))
    assert {row["object_id"]: row["n"] for row in once} == dict.fromkeys(pks, 1)


def test_a_person_without_an_account_any_more_ends_it(project: Project, researcher: Actor) -> None:
    rows(project, 2)
    action = begin("exclude", project, researcher)
    User.objects.filter(pk=researcher.user.pk if researcher.user else 0).delete()
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert action.state == ActionState.CANCELLED
