"""The broker carries nudges, never the work: away, wiped or late, nothing is lost and no request fails."""

import json
import threading
from pathlib import Path

import pytest
from celery import Celery
from django.test import Client
from django_celery_beat.models import PeriodicTask
from pytest_django import Settings

from tests import builders
from tests.training.recorded import recorded_group
from training import automation, policies, readiness, schedules, tasks
from training.models import BatchStatus, ReadinessSnapshot, TrainedModel, TrainingBatch
from trainingsite.celery import app
from trajectories.models import Project

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def nobody_trains(settings: Settings, tmp_path: Path) -> None:
    settings.JOBS_DIR = tmp_path / "jobs"
    settings.MODEL_SERVER_URL = ""
    settings.TRAINER_COMMAND = ["external"]


@pytest.fixture
def project() -> Project:
    project = builders.make_project()
    policy = policies.of(project)
    policy.base_model = "tiny"
    policy.min_trajectories = 4
    policy.min_scenario_groups = 1
    policy.save()
    builders.make_model(project, "v1.0.0", status="deployed")
    recorded_group(project)
    return project


@pytest.mark.django_db(transaction=True)
def test_a_trigger_is_answered_while_the_broker_is_away(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = Celery("away", broker="redis://127.0.0.1:1/0", set_as_current=False)
    away.conf.broker_transport_options = app.conf.broker_transport_options
    monkeypatch.setattr("trainingsite.celery.app", away)
    monkeypatch.setattr("trainingsite.celery._quiet_until", threading.local())
    _, key = builders.make_key(project)

    answer = Client().post(
        "/api/v1/batches/", json.dumps({}), content_type="application/json", headers=builders.bearer(key)
    )

    assert answer.status_code == 201
    assert "broker away, training.tasks.tend_batch" in caplog.text


def test_the_sweep_takes_up_a_batch_whose_nudge_was_lost(project: Project) -> None:
    automation.start_due()
    batch = TrainingBatch.objects.get(project=project)
    assert batch.status == BatchStatus.PENDING

    automation.tend_batches()

    batch.refresh_from_db()
    assert batch.status == BatchStatus.TRAINING
    assert TrainedModel.objects.filter(batch=batch).count() == 1


def test_a_message_that_comes_twice_or_too_late_changes_nothing(project: Project) -> None:
    automation.start_due()
    batch = TrainingBatch.objects.get(project=project)

    for _ in range(3):
        tasks.tend_batch(batch.pk)
    tasks.tend_batch(10**9)

    assert TrainedModel.objects.filter(batch=batch).count() == 1


def test_a_due_and_ready_project_is_started_once(project: Project) -> None:
    assert len(automation.start_due()) == 1
    assert automation.start_due() == []

    batch = TrainingBatch.objects.get(project=project)
    assert (batch.purpose, batch.requested_by_name, batch.forced) == ("by schedule", "trainingsite", False)


def test_a_project_that_trains_only_when_asked_is_left_alone(project: Project) -> None:
    policy = policies.of(project)
    policy.auto_trigger = False
    policy.save()

    assert automation.start_due() == []


def test_a_project_that_is_not_ready_is_left_alone(project: Project) -> None:
    policy = policies.of(project)
    policy.min_trajectories = 5
    policy.save()

    assert automation.start_due() == []


def test_the_interval_counts_from_the_last_batch_whatever_became_of_it(project: Project) -> None:
    builders.make_batch(project, status=BatchStatus.FAILED)
    due = automation.due_at(project, policies.of(project))
    last = TrainingBatch.objects.get(project=project)

    assert due is not None and (due - last.created_at).total_seconds() == 24 * 3600
    assert automation.start_due() == []


def test_one_projects_fault_costs_no_other_its_turn(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = builders.make_project("aaa-first")
    real = readiness.snapshot

    def snapshot(of: Project) -> ReadinessSnapshot:
        if of == broken:
            raise ValueError("this project's rows are odd")
        return real(of)

    monkeypatch.setattr(readiness, "snapshot", snapshot)

    automation.snapshot_readiness()

    assert list(ReadinessSnapshot.objects.values_list("project", flat=True)) == [project.pk]


# --- schedules ------------------------------------------------------------------------------------------------------


def test_every_default_names_a_task_that_exists() -> None:
    app.loader.import_default_modules()

    assert [one.task for one in schedules.DEFAULTS if one.task not in app.tasks] == []


def test_the_defaults_are_there_after_migrate_and_are_never_overwritten() -> None:
    schedules.create_missing()
    PeriodicTask.objects.filter(name="Judge groups").update(enabled=False, expire_seconds=7)
    PeriodicTask.objects.filter(name="Roll out").delete()

    assert schedules.create_missing() == ["Roll out"]

    edited = PeriodicTask.objects.get(name="Judge groups")
    assert (edited.enabled, edited.expire_seconds) == (False, 7)
    assert schedules.create_missing() == []
