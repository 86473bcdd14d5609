"""Watching a batch by HTTP: progress and ETA come from real steps, never from a constant."""

import pytest
from django.test import Client
from django.utils import timezone

from tests import builders
from training import batches
from training.models import BatchStatus, ModelStatus, RunStatus, TrainingBatch
from trajectories.models import Project

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project()


def look(client: Client, project: Project, batch_id: str) -> tuple[int, dict[str, object]]:
    _, key = builders.make_key(project)
    answer = client.get(f"/api/v1/batches/{batch_id}/", headers=builders.bearer(key))
    return answer.status_code, answer.json()


def training(project: Project, **fields: object) -> TrainingBatch:
    """A batch whose run is under way."""
    batch = builders.make_batch(project, status=BatchStatus.TRAINING, groups=(builders.make_group(project),))
    builders.make_model(batch=batch, status=ModelStatus.TRAINING, adapter_path="", version="v1.0.0")
    builders.make_run(batch, **{"status": RunStatus.RUNNING, **fields})
    return batch


def test_not_found(client: Client, project: Project) -> None:
    status, body = look(client, project, "never-was")

    assert status == 404
    assert "never-was" in str(body["detail"])


def test_another_projects_batch_is_not_found_alike(client: Client, project: Project) -> None:
    theirs = builders.make_batch()

    assert look(client, project, theirs.batch_id)[0] == 404


def test_running_with_real_progress_and_eta(client: Client, project: Project) -> None:
    """3 of 10 steps at 2 seconds a step: 0.3, and 14 seconds to go."""
    batch = training(project, step=3, total_steps=10, seconds_per_step=2.0, phase="training")

    status, body = look(client, project, batch.batch_id)

    assert status == 200
    assert (body["status"], body["progress"], body["eta_seconds"]) == ("training", 0.3, 14.0)
    assert body["model_version"] == "v1.0.0"
    assert body["error"] is None
    assert (body["groups"], body["trajectories"]) == (1, 4)


def test_progress_follows_the_steps(client: Client, project: Project) -> None:
    batch = training(project, step=3, total_steps=10, seconds_per_step=2.0)
    batch.runs.update(step=9, seconds_per_step=0.5)

    body = look(client, project, batch.batch_id)[1]

    assert (body["progress"], body["eta_seconds"]) == (0.9, 0.5)


def test_before_the_first_steps_there_is_no_eta(client: Client, project: Project) -> None:
    body = look(client, project, training(project, total_steps=None).batch_id)[1]

    assert (body["progress"], body["eta_seconds"]) == (0.0, None)


def test_a_batch_that_waits_has_made_no_progress(client: Client, project: Project) -> None:
    body = look(client, project, builders.make_batch(project).batch_id)[1]

    assert (body["status"], body["progress"], body["eta_seconds"]) == ("pending", 0.0, None)


def test_a_run_without_progress_is_called_stalled(client: Client, project: Project) -> None:
    batch = training(project, status=RunStatus.STALLED, step=3, total_steps=10, phase="training")

    run = look(client, project, batch.batch_id)[1]["run"]

    assert isinstance(run, dict)
    assert (run["status"], run["step"], run["total_steps"]) == ("stalled", 3, 10)


def test_completed(client: Client, project: Project) -> None:
    batch = builders.make_batch(
        project, status=BatchStatus.COMPLETED, groups=(builders.make_group(project),), completed_at=timezone.now()
    )
    builders.make_run(batch, status=RunStatus.SUCCEEDED, step=10, total_steps=10, seconds_per_step=2.0)
    builders.make_model(batch=batch, version="v1.0.0")

    body = look(client, project, batch.batch_id)[1]

    assert (body["status"], body["progress"], body["eta_seconds"]) == ("completed", 1.0, None)
    assert body["model_version"] == "v1.0.0"
    assert body["completed_at"]


def test_a_run_that_ended_early_by_its_drift_is_whole_once_the_batch_is(client: Client, project: Project) -> None:
    batch = builders.make_batch(project, status=BatchStatus.COMPLETED, groups=(builders.make_group(project),))
    builders.make_run(batch, status=RunStatus.SUCCEEDED, step=6, total_steps=10)

    assert look(client, project, batch.batch_id)[1]["progress"] == 1.0


def test_failed_with_error(client: Client, project: Project) -> None:
    batch = training(project, step=3, total_steps=10, seconds_per_step=2.0)

    batches.fail(batch, "The trainer ran out of memory at step 3.")

    body = look(client, project, batch.batch_id)[1]
    assert (body["status"], body["error"]) == ("failed", "The trainer ran out of memory at step 3.")
    assert body["eta_seconds"] is None
    assert body["progress"] == 0.3  # as far as it came
