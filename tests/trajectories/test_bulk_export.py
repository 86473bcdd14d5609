"""An export behind the request: a file that is whole or not there, kept for some days."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.files.storage import storages
from django.db.models import QuerySet
from django.test import Client
from django.utils import timezone

from tests import builders
from tests.gateway.running import database_url
from tests.trajectories import recordings
from trajectories import bulk_actions, bulk_export, export, formats, ingestion, preparing
from trajectories.errors import Refused
from trajectories.history import Actor
from trajectories.models import ActionState, BulkAction, Project, Role, Trajectory

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project("shop")


@pytest.fixture
def reader(project: Project) -> Actor:
    user = builders.make_member(project, Role.READER)
    return Actor(user.get_username(), user)


def record(project: Project, n: int) -> list[str]:
    bodies = [recordings.native() for _ in range(n)]
    found = ingestion.record_many(project, [formats.incoming(json.dumps(one).encode(), "native") for one in bodies])
    assert all(isinstance(one, preparing.Recorded) for one in found)
    return [str(one["trajectory_id"]) for one in bodies]


def begin(project: Project, by: Actor, choices: Mapping[str, str] | None = None) -> BulkAction:
    chosen = Trajectory.objects.filter(project=project)
    return bulk_actions.start(bulk_export.KIND, project, chosen, by=by, choices=choices)


def lines(action: BulkAction) -> list[dict[str, object]]:
    file = bulk_export.opened(action)
    assert file is not None
    with file:
        return [json.loads(line) for line in file.read().splitlines()]


def test_the_file_has_what_was_chosen(project: Project, reader: Actor) -> None:
    ids = record(project, 5)
    action = begin(project, reader)
    record(project, 2)
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert (action.state, action.n_done, action.n_refused) == (ActionState.DONE, 5, 0)
    assert {line["trajectory_id"] for line in lines(action)} == set(ids)


def test_the_format_is_chosen_and_must_be_one(project: Project, reader: Actor) -> None:
    record(project, 1)
    with pytest.raises(Refused, match="Format cannot be 'excel'"):
        begin(project, reader, {"format": "excel"})
    action = begin(project, reader, {"format": "trl-sft"})
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert "messages" in lines(action)[0]
    assert str(action.options["name"]) == "shop.trl-sft.jsonl"


def test_what_still_runs_is_told_as_left_out(project: Project, reader: Actor) -> None:
    record(project, 1)
    builders.make_trajectory(project, state="open")
    action = begin(project, reader)
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert (action.n_done, action.n_refused) == (1, 1)


def test_one_that_is_cancelled_leaves_no_file(project: Project, reader: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    record(project, 3)
    monkeypatch.setattr(bulk_export, "EVERY", 0.0)
    action = begin(project, reader)
    real = export.stream

    def stream(
        rows: QuerySet[Trajectory], name: str, span: export.Span, options: export.Options, tally: export.Tally
    ) -> Iterator[bytes]:
        for piece in real(rows, name, span, options, tally):
            BulkAction.objects.filter(pk=action.pk).update(state=ActionState.CANCELLED)
            yield piece

    monkeypatch.setattr(export, "stream", stream)
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert action.state == ActionState.CANCELLED
    assert bulk_export.opened(action) is None


def test_a_storage_that_is_away_is_told(project: Project, reader: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    record(project, 1)

    def refuse(*arguments: object) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(storages["default"], "save", refuse)
    action = begin(project, reader)
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert action.state == ActionState.CANCELLED
    assert "no space left" in action.error


def test_old_files_go(project: Project, reader: Actor) -> None:
    record(project, 1)
    action = begin(project, reader)
    bulk_actions.run(action.pk)
    assert bulk_export.sweep() == 0
    BulkAction.objects.filter(pk=action.pk).update(ended_at=timezone.now() - timedelta(days=8))
    location = str(BulkAction.objects.get(pk=action.pk).options["file"])
    assert bulk_export.sweep() == 1
    assert not storages["default"].exists(location)
    action.refresh_from_db()
    assert bulk_export.opened(action) is None


def test_it_is_downloaded_by_members_alone(project: Project, reader: Actor) -> None:
    record(project, 1)
    action = begin(project, reader)
    bulk_actions.run(action.pk)
    assert reader.user is not None
    client = Client()
    client.force_login(reader.user)
    page = client.get(f"/admin/trajectories/bulkaction/{action.pk}/change/")
    assert b"Download shop.native.jsonl" in page.content
    told = client.get(f"/admin/trajectories/bulkaction/{action.pk}/file/")
    assert told["Content-Disposition"] == 'attachment; filename="shop.native.jsonl"'
    assert json.loads(b"".join(iter(told)))["trajectory_id"]
    outsider = Client()
    outsider.force_login(builders.make_member(builders.make_project("there"), Role.OPERATOR))
    assert outsider.get(f"/admin/trajectories/bulkaction/{action.pk}/file/").status_code in (302, 404)


KILLED = """
import os, signal
from trajectories import bulk_actions, bulk_export, export
real = export.stream
def stream(*arguments):
    for piece in real(*arguments):
        yield piece
        os.kill(os.getpid(), signal.SIGKILL)  # some of it is written
export.stream = stream
bulk_actions.run({pk})
"""


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_is_killed_leaves_no_half_file_and_the_next_writes_it(
    project: Project, reader: Actor, tmp_path: Path
) -> None:
    ids = record(project, 3)
    action = begin(project, reader)
    environment = {**os.environ, "DATABASE_URL": database_url(), "DATA_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "manage.py", "shell", "--no-imports", "-c", KILLED.format(pk=action.pk)],
        env=environment,
        check=False,
        capture_output=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not list(tmp_path.rglob("*.jsonl"))
    assert bulk_actions.live() == [action.pk]
    bulk_actions.run(action.pk)
    action.refresh_from_db()
    assert {line["trajectory_id"] for line in lines(action)} == set(ids)
