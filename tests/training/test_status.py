"""How the loop stands: what comes in, what is trained, what serves, and how every part is."""

from datetime import datetime, timedelta

import pytest
from django.test import Client
from django.utils import timezone

from tests import builders
from training import policies, status
from training.models import BatchStatus, RunStatus
from trainingsite import health
from trajectories.models import Project

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def look_anew() -> None:
    health.forget()


@pytest.fixture
def project() -> Project:
    return builders.make_project()


def body(client: Client, project: Project) -> dict[str, dict[str, object]]:
    _, key = builders.make_key(project)
    answer = client.get("/api/v1/status/", headers=builders.bearer(key))
    assert answer.status_code == 200
    found: dict[str, dict[str, object]] = answer.json()
    return found


def test_with_history(client: Client, project: Project) -> None:
    now = timezone.now()
    builders.make_trajectory(project, received_at=now - timedelta(hours=2))
    builders.make_trajectory(project, received_at=now - timedelta(hours=1))
    builders.make_trajectory(project, received_at=now - timedelta(days=3))
    builders.make_trajectory(project, received_at=now - timedelta(days=30))
    done = builders.make_batch(project, status=BatchStatus.COMPLETED, completed_at=now)
    serving = builders.make_model(batch=done, status="deployed", version="v1.0.0")
    live = builders.make_batch(project, status=BatchStatus.TRAINING, parent=serving)
    builders.make_run(live, status=RunStatus.RUNNING, step=3, total_steps=10, seconds_per_step=2.0)
    builders.make_model(project, "v1.0.1", status="ready")
    builders.make_model(batch=live, status="training", version="v1.0.2", adapter_path="")

    found = body(client, project)

    assert (found["data_collection"]["last_24h"], found["data_collection"]["last_7d"]) == (2, 3)
    assert found["data_collection"]["rate_per_hour"] == pytest.approx(3 / 72, rel=0.01)  # three in three days
    training = found["training"]
    assert isinstance(training["current_batch"], dict)
    assert isinstance(training["last_completed"], dict)
    assert training["current_batch"]["batch_id"] == live.batch_id
    assert (training["current_batch"]["progress"], training["current_batch"]["eta_seconds"]) == (0.3, 14.0)
    assert training["last_completed"]["batch_id"] == done.batch_id
    assert training["next_scheduled"] is None  # one is trained at a time
    assert found["models"] == {"latest": "v1.0.1", "deployed": "v1.0.0", "training": "v1.0.2"}


def test_with_none(client: Client, project: Project) -> None:
    found = body(client, project)

    assert found["data_collection"] == {
        "last_24h": 0,
        "last_7d": 0,
        "rate_per_hour": 0.0,
        "indexing_lag_seconds": 0.0,
    }
    assert (found["training"]["current_batch"], found["training"]["last_completed"]) == (None, None)
    assert found["models"] == {"latest": None, "deployed": None, "training": None}


def test_the_next_batch_is_due_an_interval_after_the_last(client: Client, project: Project) -> None:
    batch = builders.make_batch(project, status=BatchStatus.COMPLETED)
    batch.refresh_from_db()

    due = body(client, project)["training"]["next_scheduled"]

    assert datetime.fromisoformat(str(due)) == batch.created_at + timedelta(hours=24)


def test_without_automation_nothing_is_scheduled(client: Client, project: Project) -> None:
    policy = policies.of(project)
    policy.auto_trigger = False
    policy.save()

    assert body(client, project)["training"]["next_scheduled"] is None


def test_every_part_is_told(client: Client, project: Project) -> None:
    parts = body(client, project)["health"]

    assert {"database", "broker", "storage", "judge", "serving", "collection"} <= set(parts)
    assert parts["database"] == {"ok": True, "detail": "answers"}


def test_a_low_collection_rate_is_warned_of(project: Project) -> None:
    """1,000 trajectories for a batch: at 1 a day that is years, at 100 an hour 10 hours."""
    assert not status.collection_health(project).ok

    day_ago = timezone.now() - timedelta(days=1)
    builders.make_trajectory(project, received_at=day_ago)
    slow = status.collection_health(project)
    assert not slow.ok
    assert "1000 for a batch take 1000.0 days" in slow.detail

    policy = policies.of(project)
    policy.min_trajectories = 10
    policy.save()
    assert status.collection_health(project).ok


def test_another_projects_work_is_not_shown(client: Client, project: Project) -> None:
    elsewhere = builders.make_project()
    builders.make_trajectory(elsewhere)
    builders.make_model(batch=builders.make_batch(elsewhere, status=BatchStatus.COMPLETED), version="v1.0.0")

    found = body(client, project)

    assert found["data_collection"]["last_7d"] == 0
    assert found["models"]["latest"] is None
    assert found["training"]["last_completed"] is None


def test_it_asks_for_a_key(client: Client) -> None:
    assert client.get("/api/v1/status/").status_code == 401
