"""Live, ready, and how every part is. Only the database decides whether the site is ready."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings as site
from django.db.utils import ConnectionHandler
from django.test import Client
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from pytest_django import Settings

from tests import builders
from tests.judge_server import JudgeServer
from trainingsite import health
from trajectories.models import IndexingWork

pytestmark = pytest.mark.django_db

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture(autouse=True)
def look_anew() -> Iterator[None]:
    health.forget()
    yield
    health.forget()


@pytest.fixture
def database_away(monkeypatch: pytest.MonkeyPatch) -> None:
    away = ConnectionHandler({"default": {**site.DATABASES["default"], "HOST": "127.0.0.1", "PORT": "9"}})
    monkeypatch.setattr(health, "connection", away["default"])


@pytest.fixture
def broker_away(settings: Settings) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:9/0"


def ready(client: Client) -> tuple[int, dict[str, dict[str, object]]]:
    answer = client.get("/readyz")
    found: dict[str, dict[str, object]] = json.loads(answer.content)["parts"]
    return answer.status_code, found


# --- parts ---------------------------------------------------------------------------------------------------------


def test_the_database_answers() -> None:
    assert health.database() == health.Health(True, "answers")


def test_the_databases_failure_is_handled(database_away: None) -> None:
    found = health.database()

    assert not found.ok
    assert found.detail.startswith("The database does not answer:")
    assert "\n" not in found.detail


def test_the_broker_answers() -> None:
    assert health.broker().ok


def test_a_broker_that_is_away_is_said_with_what_it_means(broker_away: None) -> None:
    found = health.broker()

    assert not found.ok
    assert "Work waits in the database" in found.detail
    assert "not known" in health.worker().detail
    health.saw_worker()  # and nothing is raised


def test_workers_are_seen_when_they_work() -> None:
    health.saw_worker()

    assert health.worker().ok


def test_the_schedule_is_late_when_nothing_was_sent_for_a_while() -> None:
    PeriodicTask.objects.update(last_run_at=None)
    assert not health.schedule().ok

    interval = IntervalSchedule.objects.create(every=5, period=IntervalSchedule.SECONDS)
    task = PeriodicTask.objects.create(name="tick", task="tick", interval=interval, last_run_at=timezone.now())
    assert health.schedule().ok

    PeriodicTask.objects.filter(pk=task.pk).update(last_run_at=timezone.now() - 2 * health.BEAT_EVERY)
    assert "Is beat running?" in health.schedule().detail


def test_storage_has_room_and_can_be_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.DATA_DIR = tmp_path / "not" / "made" / "yet"
    assert health.storage().ok

    monkeypatch.setattr(health, "DISK_LOW", 2.0)  # more than any disk has free
    assert "nearly full" in health.storage().detail

    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert "cannot be written" in health.storage().detail


def test_without_a_judge_or_a_model_server_that_is_said_and_no_failure(settings: Settings) -> None:
    settings.JUDGE_BASE_URL = settings.MODEL_SERVER_URL = ""

    assert health.judge() == health.Health(True, "No LLM judge is configured; recorded rewards and rules count.")
    assert health.serving().ok
    assert "not served" in health.serving().detail


def test_judge_and_model_server_are_asked(settings: Settings) -> None:
    with JudgeServer() as server:
        settings.JUDGE_BASE_URL, settings.JUDGE_MODEL = server.url, "judge-1"
        settings.MODEL_SERVER_URL = server.url
        assert health.judge().ok
        assert health.serving().ok


def test_judge_and_model_server_that_are_away_are_named(settings: Settings) -> None:
    settings.JUDGE_BASE_URL, settings.JUDGE_MODEL = f"{NOWHERE}/v1", "judge-1"
    settings.MODEL_SERVER_URL = NOWHERE

    assert not health.judge().ok
    assert NOWHERE in health.judge().detail
    assert not health.serving().ok


def test_an_address_that_is_none_is_no_fault(settings: Settings) -> None:
    settings.JUDGE_BASE_URL, settings.JUDGE_MODEL = "http://[not-an-address", "judge-1"

    assert not health.judge().ok


# --- pages ---------------------------------------------------------------------------------------------------------


def test_live_whatever_else_is_away(client: Client, database_away: None, broker_away: None) -> None:
    assert client.get("/healthz").status_code == 200


def test_ready(client: Client) -> None:
    status, parts = ready(client)

    assert status == 200
    assert set(parts) == {"database", "beat", "broker", "worker", "storage", "judge", "serving", "gateway"}


def test_ready_without_broker_workers_beat_judge_and_model_server(
    client: Client, broker_away: None, settings: Settings
) -> None:
    settings.JUDGE_BASE_URL, settings.JUDGE_MODEL = f"{NOWHERE}/v1", "judge-1"
    settings.MODEL_SERVER_URL = NOWHERE

    status, parts = ready(client)

    assert status == 200
    assert [parts[name]["ok"] for name in ("broker", "worker", "judge", "serving")] == [False] * 4


def test_not_ready_without_the_database(client: Client, database_away: None) -> None:
    status, parts = ready(client)

    assert status == 503
    assert parts["database"]["ok"] is False
    assert "beat" not in parts  # it is read from the database


def test_not_ready_while_the_database_is_being_prepared(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "migrated", lambda: False)

    answer = client.get("/readyz")

    assert answer.status_code == 503
    assert json.loads(answer.content)["detail"] == "The database is being prepared."


def test_what_is_watched_is_not_asked_at_every_look(client: Client, settings: Settings) -> None:
    settings.JUDGE_BASE_URL, settings.JUDGE_MODEL = f"{NOWHERE}/v1", "judge-1"
    first = ready(client)[1]["judge"]
    settings.JUDGE_BASE_URL = ""

    assert ready(client)[1]["judge"] == first


def test_metrics_in_the_form_of_prometheus(client: Client) -> None:
    project = builders.make_project("secret-project")
    trajectory = builders.make_trajectory(project)
    IndexingWork.objects.create(project=project, trajectory=trajectory)

    answer = client.get("/metrics")

    text = answer.content.decode()
    assert answer["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'trainingsite_up{part="database"} 1' in text
    assert "trainingsite_indexing_lag_seconds" in text
    assert "secret-project" not in text  # the page asks for no key
    for line in text.splitlines():
        assert line.startswith("# ") or float(line.rpartition(" ")[2]) >= 0


def test_metrics_without_the_database(client: Client, database_away: None) -> None:
    assert 'trainingsite_up{part="database"} 0' in client.get("/metrics").content.decode()
