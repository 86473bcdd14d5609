"""From a trained adapter to a ready version: it is read, loaded and asked before anyone is told of it."""

from pathlib import Path

import pytest
from pytest_django import Settings

from tests import builders
from tests.training.model_server import FakeModelServer
from tests.training.scripted_trainer import save_adapter
from training import adapters, batches
from training.models import BatchStatus, ModelStatus, TrainedModel, TrainingBatch
from trajectories.history import SYSTEM

pytestmark = pytest.mark.django_db


@pytest.fixture
def batch(settings: Settings, tmp_path: Path) -> TrainingBatch:
    """A batch whose run has just succeeded."""
    settings.ADAPTERS_DIR = tmp_path / "adapters"
    settings.MODEL_SERVER_URL = ""
    project = builders.make_project()
    batch = builders.make_batch(project, status=BatchStatus.UPLOADING, groups=(builders.make_group(project),))
    builders.make_model(batch=batch, status=ModelStatus.TRAINING, adapter_path="")
    folder = tmp_path / "jobs" / "1-1"
    folder.mkdir(parents=True)
    save_adapter(folder / "adapter", 0.5)
    builders.make_run(batch, status="succeeded", folder=str(folder), result={"steps_done": 4, "drift_detail": ""})
    return batch


def model_of(batch: TrainingBatch) -> TrainedModel:
    return TrainedModel.objects.get(batch=batch)


def test_the_model_server_loads_it_and_it_answers(batch: TrainingBatch, model_server: FakeModelServer) -> None:
    batches.tend(batch)

    model = model_of(batch)
    assert (batch.status, model.status) == (BatchStatus.COMPLETED, ModelStatus.READY)
    assert model_server.loads == [model.serving_name] == model_server.asked
    assert f"Loaded by the model server at {model_server.url}, and it answers." in model.notes


def test_it_is_unloaded_again_until_somebody_approves_it(batch: TrainingBatch, model_server: FakeModelServer) -> None:
    batches.tend(batch)

    assert model_server.adapters == {}


def test_what_an_earlier_try_left_loaded_is_not_taken_for_this_one(
    batch: TrainingBatch, model_server: FakeModelServer
) -> None:
    name = model_of(batch).serving_name
    model_server.adapters[name] = "/what/was/killed/there"

    batches.tend(batch)

    assert batch.status == BatchStatus.COMPLETED
    assert model_server.loads == [name]


def test_while_the_model_server_is_away_the_adapter_waits_visibly(
    batch: TrainingBatch, model_server: FakeModelServer
) -> None:
    model_server.away = True

    batches.tend(batch)
    assert batch.status == BatchStatus.UPLOADING
    assert "does not answer, so the adapter waits" in TrainingBatch.objects.get(pk=batch.pk).error
    model_server.away = False
    batches.tend(batch)

    assert (batch.status, batch.error) == (BatchStatus.COMPLETED, "")


def test_an_adapter_that_the_server_refuses_is_no_version(batch: TrainingBatch, model_server: FakeModelServer) -> None:
    model_server.refuse.add(model_of(batch).serving_name)

    batches.tend(batch)

    assert batch.status == BatchStatus.FAILED
    assert "refused the adapter" in batch.error and "size mismatch" in batch.error
    assert model_of(batch).status == ModelStatus.FAILED


def test_a_refused_adapter_is_published_again_without_training_when_the_server_was_mended(
    batch: TrainingBatch, model_server: FakeModelServer
) -> None:
    model_server.refuse.add(model_of(batch).serving_name)
    batches.tend(batch)
    model_server.refuse.clear()

    batches.retry(batch, by=SYSTEM)
    batches.tend(batch)

    assert batch.status == BatchStatus.COMPLETED
    assert batch.runs.count() == 1


def test_without_a_model_server_the_version_says_that_it_was_never_loaded(batch: TrainingBatch) -> None:
    batches.tend(batch)

    assert batch.status == BatchStatus.COMPLETED
    assert "No model server is configured" in model_of(batch).notes


def test_what_the_trainer_left_out_is_said(batch: TrainingBatch) -> None:
    dropped = [{"reason": "too_long", "count": 6}, {"reason": "not_trained", "count": 29}]
    batch.runs.update(result={"steps_done": 1, "dropped": dropped})

    batches.tend(batch)

    assert "Without gradient: 6 trajectories longer than max_sequence_tokens." in model_of(batch).notes
    assert "29" not in model_of(batch).notes


def test_the_adapter_is_kept_outside_the_job_under_the_hash_of_its_weights(batch: TrainingBatch) -> None:
    batches.tend(batch)

    model = model_of(batch)
    kept = adapters.inspect(Path(model.adapter_path))
    assert (kept.sha256, kept.n_bytes) == (model.adapter_hash, model.adapter_bytes)
    assert Path(model.adapter_path).name == f"{model.version}-{kept.sha256[:12]}"


def test_published_twice_it_is_one_version(batch: TrainingBatch) -> None:
    twin = TrainingBatch.objects.get(pk=batch.pk)

    batches.tend(batch)
    batches.tend(twin)

    assert TrainedModel.objects.filter(batch=batch).count() == 1
    assert twin.status == BatchStatus.COMPLETED


def test_an_adapter_that_cannot_be_read_is_no_version(batch: TrainingBatch) -> None:
    weights = Path(batch.runs.get().folder) / "adapter" / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])

    batches.tend(batch)

    assert batch.status == BatchStatus.FAILED
    assert "Was it cut off?" in batch.error
