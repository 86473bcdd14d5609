"""The life of a batch: every move, what it leaves behind, and who wins a race."""

import pytest
from django.db import IntegrityError, transaction

from tests import builders
from training import batches
from training.models import BatchStatus, ModelStatus, TrainedModel, TrainingBatch
from trajectories import history
from trajectories.errors import Refused
from trajectories.history import SYSTEM, Actor

pytestmark = pytest.mark.django_db

ALICE = Actor("alice")


def test_every_move_is_a_row_with_author_and_reason() -> None:
    batch = builders.make_batch(status=BatchStatus.TRAINING)

    batches.cancel(batch, by=ALICE, reason="wrong data")

    (change,) = history.of(batch)
    assert (change.was, change.to, change.by_name, change.reason) == ("training", "cancelled", "alice", "wrong data")


@pytest.mark.parametrize("status", ["pending", "preparing", "scoring", "training", "uploading"])
def test_each_live_batch_can_be_cancelled(status: str) -> None:
    batch = builders.make_batch(status=status)

    batches.cancel(batch, by=ALICE)

    assert batch.status == BatchStatus.CANCELLED


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_what_has_ended_cannot_be_cancelled(status: str) -> None:
    batch = builders.make_batch(status=status)

    with pytest.raises(Refused, match=f"is {status}, so it cannot become cancelled"):
        batches.cancel(batch, by=ALICE)


def test_only_one_of_two_moves_a_batch() -> None:
    first = builders.make_batch(status=BatchStatus.TRAINING)
    second = TrainingBatch.objects.get(pk=first.pk)  # read before the first one moves

    batches.cancel(first, by=SYSTEM)

    with pytest.raises(Refused, match="changed while you were looking"):
        batches.cancel(second, by=SYSTEM)


def test_a_project_has_one_live_batch() -> None:
    batch = builders.make_batch(status=BatchStatus.SCORING)

    with pytest.raises(IntegrityError, match="batch_one_live_a_project"), transaction.atomic():
        builders.make_batch(batch.project, status=BatchStatus.PENDING)


@pytest.mark.parametrize("end", ["fail", "cancel"])
def test_a_batch_that_ends_without_a_model_releases_its_trajectories(end: str) -> None:
    project = builders.make_project()
    group = builders.make_group(project)
    batch = builders.make_batch(project, status=BatchStatus.TRAINING, groups=(group,))

    if end == "fail":
        batches.fail(batch, "the trainer ran out of memory")
    else:
        batches.cancel(batch, by=ALICE)

    assert not batch.items.filter(is_active=True).exists()
    builders.make_batch(project, status=BatchStatus.TRAINING, groups=(group,))  # the same trajectories again


def test_a_batch_that_fails_takes_its_unfinished_version_along() -> None:
    batch = builders.make_batch(status=BatchStatus.TRAINING)
    model = builders.make_model(batch=batch, status=ModelStatus.TRAINING, adapter_path="")

    batches.fail(batch, "no attempt is left")

    model.refresh_from_db()
    assert (model.status, model.notes) == (ModelStatus.FAILED, "no attempt is left")


def test_a_failed_batch_is_tried_again_with_what_was_frozen() -> None:
    project = builders.make_project()
    batch = builders.make_batch(project, status=BatchStatus.TRAINING, groups=(builders.make_group(project),))
    frozen = list(batch.items.values_list("trajectory_ref", "advantage"))
    batches.fail(batch, "the disk was full")

    batches.retry(batch, by=ALICE)

    assert (batch.status, batch.error) == (BatchStatus.PENDING, "")
    assert list(batch.items.filter(is_active=True).values_list("trajectory_ref", "advantage")) == frozen


def test_a_batch_that_did_not_fail_cannot_be_tried_again() -> None:
    batch = builders.make_batch(status=BatchStatus.COMPLETED)

    with pytest.raises(Refused, match="Only a failed one"):
        batches.retry(batch, by=ALICE)


def test_a_batch_is_not_tried_again_while_another_is_live() -> None:
    batch = builders.make_batch(status=BatchStatus.FAILED)
    builders.make_batch(batch.project, status=BatchStatus.TRAINING)

    with pytest.raises(Refused, match="One batch is trained at a time"):
        batches.retry(batch, by=ALICE)


def test_a_batch_is_not_tried_again_when_another_learned_from_its_trajectories() -> None:
    project = builders.make_project()
    group = builders.make_group(project)
    batch = builders.make_batch(project, status=BatchStatus.TRAINING, groups=(group,))
    batches.fail(batch, "the disk was full")
    builders.make_batch(project, status=BatchStatus.COMPLETED, groups=(group,))

    with pytest.raises(Refused, match="another batch has some of its trajectories"):
        batches.retry(batch, by=ALICE)
    assert batch.status == BatchStatus.FAILED


def test_a_version_keeps_its_number_when_its_batch_is_tried_again() -> None:
    batch = builders.make_batch(status=BatchStatus.SCORING)
    model = builders.make_model(batch=batch, status=ModelStatus.TRAINING, adapter_path="")
    batches.fail(batch, "the disk was full")
    batches.retry(batch, by=ALICE)

    with batches.one_at_a_time("nothing else"):
        for _ in range(3):
            batches._step(batch)
            batch.refresh_from_db()

    assert batch.status == BatchStatus.TRAINING
    assert list(TrainedModel.objects.filter(batch=batch).values_list("pk", "status")) == [(model.pk, "training")]


def test_trajectories_erased_since_end_a_second_try_with_a_sentence() -> None:
    project = builders.make_project()
    group = builders.make_group(project)
    batch = builders.make_batch(project, status=BatchStatus.TRAINING, groups=(group,))
    batches.fail(batch, "the disk was full")
    batches.retry(batch, by=ALICE)
    group.trajectories.all()[0].delete()

    batches.tend(batch)

    assert batch.status == BatchStatus.FAILED
    assert "1 of its 4 trajectories were erased" in batch.error
