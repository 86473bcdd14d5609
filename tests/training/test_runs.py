"""One attempt to train a batch: started once, watched by many, killed anywhere, ending in one model."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import pytest
from django.db import connection
from django.utils import timezone
from pytest_django import Settings

from tests import builders
from tests.training.recorded import recorded_group
from training import adapters, automation, batches, runs, shim
from training.models import BatchStatus, ModelStatus, RunStatus, TrainedModel, TrainingBatch, TrainingRun
from training.trainer import job as wire
from trainingsite import children
from trainingsite.children import Process
from trajectories import history
from trajectories.errors import Refused
from trajectories.history import SYSTEM

pytestmark = pytest.mark.django_db(transaction=True)


class Scripted(Protocol):
    def __call__(self, *words: str) -> TrainingBatch: ...


@pytest.fixture
def scripted(settings: Settings, tmp_path: Path) -> Iterator[Scripted]:
    """Makes a frozen batch in training whose trainer plays a script."""
    settings.JOBS_DIR = tmp_path / "jobs"
    settings.ADAPTERS_DIR = tmp_path / "adapters"
    settings.MODEL_SERVER_URL = ""
    settings.TRAINER_LEASE_SECONDS = 5

    def make(*words: str) -> TrainingBatch:
        settings.TRAINER_COMMAND = [sys.executable, "-m", "tests.training.scripted_trainer", "{job}", *words]
        project = builders.make_project()
        parent = builders.make_model(project, "v1.0.0", status="deployed")
        batch = builders.make_batch(
            project, status=BatchStatus.TRAINING, groups=(recorded_group(project),), parent=parent
        )
        builders.make_model(batch=batch, status=ModelStatus.TRAINING, adapter_path="", version="v1.0.1", parent=parent)
        return batch

    yield make
    shim.stop_all(tmp_path / "jobs")
    for holder in (tmp_path / "jobs").glob(f"*/{shim.HOLDER}"):
        kept = shim.read_holder(holder.parent)
        if kept is not None:
            children.end(kept.shim, ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)))


def eventually(happened: Callable[[], object], within: float = 60.0) -> None:
    until = time.monotonic() + within
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


def tend_until(batch: TrainingBatch, *statuses: str, within: float = 60.0) -> None:
    def arrived() -> bool:
        batches.tend(batch)
        batch.refresh_from_db()
        return batch.status in statuses

    eventually(arrived, within)


def tend_until_run(batch: TrainingBatch, happened: Callable[[TrainingRun], object]) -> TrainingRun:
    """Look after the batch until its newest run is as wanted."""

    def arrived() -> bool:
        batches.tend(batch)
        return bool(happened(newest(batch)))

    eventually(arrived)
    return newest(batch)


def newest(batch: TrainingBatch) -> TrainingRun:
    run = batch.runs.order_by("-attempt").first()
    assert run is not None
    return run


def only_model(batch: TrainingBatch) -> TrainedModel:
    return TrainedModel.objects.get(batch=batch)


# --- what it does ---------------------------------------------------------------------------------------------------


def test_a_run_ends_in_one_ready_version_with_what_the_trainer_said(scripted: Scripted) -> None:
    batch = scripted("--steps", "3")

    tend_until(batch, BatchStatus.COMPLETED)

    model = only_model(batch)
    assert (model.status, model.version, model.parent_id) == (ModelStatus.READY, "v1.0.1", batch.parent_id)
    assert model.summary["steps_done"] == 3
    assert "No model server is configured" in model.notes
    assert adapters.inspect(Path(model.adapter_path)).sha256 == model.adapter_hash


def test_of_a_completed_batch_what_tells_how_it_went_is_kept(scripted: Scripted) -> None:
    batch = scripted()

    tend_until(batch, BatchStatus.COMPLETED)

    left = {path.name for path in Path(newest(batch).folder).iterdir()}
    assert left >= {"job.json", "metrics.jsonl", "log.txt", "exit.json", "result.json"}
    assert not left & {"checkpoint", "adapter", "groups.jsonl"}


def test_every_step_is_kept_and_is_the_progress(scripted: Scripted) -> None:
    batch = scripted("--steps", "5", "--pause", "0.05")

    tend_until(batch, BatchStatus.COMPLETED)

    run = newest(batch)
    assert list(run.metrics.values_list("step", flat=True)) == [1, 2, 3, 4, 5]
    assert run.metrics.get(step=1).values["loss"] == 0.5
    assert (run.step, run.total_steps, runs.progress(run)) == (5, 5, 1.0)
    assert run.seconds_per_step is not None and run.seconds_per_step >= 0.05


def test_progress_and_forecast_come_from_real_steps(scripted: Scripted) -> None:
    batch = scripted("--steps", "4", "--end", "hang")

    run = tend_until_run(batch, lambda run: run.step == 2)

    assert batches.progress(batch) == 0.5
    assert run.seconds_per_step is not None
    assert batches.eta_seconds(batch) == pytest.approx(2 * run.seconds_per_step)


def test_every_move_of_a_run_is_kept(scripted: Scripted) -> None:
    batch = scripted()

    tend_until(batch, BatchStatus.COMPLETED)

    moves = [(change.was, change.to) for change in reversed(history.of(newest(batch)))]
    assert moves == [("", "starting"), ("starting", "running"), ("running", "succeeded")]


def test_the_trainer_gets_the_frozen_values(scripted: Scripted) -> None:
    batch = scripted("--end", "hang")
    tend_until_run(batch, lambda run: run.step == 2)

    folder = Path(newest(batch).folder)
    (group,) = wire.read_groups((folder / "groups.jsonl").read_bytes())
    frozen = {item.trajectory_ref: (item.advantage, item.reward) for item in batch.items.all()}
    assert {one.trajectory_id: (one.advantage, one.reward) for one in group.trajectories} == frozen
    (history_line,) = group.trajectories[0].histories
    assert [message["role"] for message in history_line.messages] == ["user", "assistant"]
    (call,) = history_line.calls
    assert (call.at, call.trainable, call.parent_policy, call.temperature) == (1, True, True, 1.0)
    job = wire.read_job(folder)
    assert batch.parent is not None
    assert (job.mode, job.base_model, job.parent_adapter) == ("grpo", "tiny", batch.parent.adapter_path)


# --- what it does not take for a success ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("unchanged", "the weights do not differ"),
        ("short", "only 2 of 4 planned steps"),
        ("invalid", "No group has any spread"),
    ],
)
def test_what_cannot_help_is_not_tried_again(scripted: Scripted, end: str, reason: str) -> None:
    batch = scripted("--end", end)

    tend_until(batch, BatchStatus.FAILED)

    assert reason in batch.error
    assert batch.runs.count() == 1
    assert only_model(batch).status == ModelStatus.FAILED
    assert not batch.items.filter(is_active=True).exists()


def test_the_same_weights_as_the_parents_are_no_new_version(scripted: Scripted) -> None:
    batch = scripted()
    assert batch.parent is not None
    run = runs.start(batch)
    assert run is not None
    eventually(lambda: shim.read_exit(Path(run.folder)))
    made = adapters.inspect(Path(run.folder) / "adapter")
    TrainedModel.objects.filter(pk=batch.parent.pk).update(adapter_hash=made.sha256)
    batch = TrainingBatch.objects.get(pk=batch.pk)

    tend_until(batch, BatchStatus.FAILED)

    assert "the same as that of v1.0.0" in batch.error


def test_a_trainer_that_always_fails_uses_up_its_attempts_and_says_its_last_line(
    scripted: Scripted, settings: Settings
) -> None:
    settings.TRAINER_MAX_ATTEMPTS = 2
    batch = scripted("--end", "crash")

    tend_until(batch, BatchStatus.FAILED)

    assert list(batch.runs.values_list("status", flat=True)) == ["failed", "failed"]
    assert "2 attempts failed" in batch.error and "out of luck at step 3" in batch.error


def test_a_failed_batch_that_is_retried_has_its_attempts_again(scripted: Scripted, settings: Settings) -> None:
    settings.TRAINER_MAX_ATTEMPTS = 1
    batch = scripted("--end", "crash")
    tend_until(batch, BatchStatus.FAILED)
    settings.TRAINER_COMMAND = [sys.executable, "-m", "tests.training.scripted_trainer", "{job}"]

    batches.retry(batch, by=SYSTEM)
    tend_until(batch, BatchStatus.COMPLETED, BatchStatus.FAILED)

    assert (batch.status, batch.error) == (BatchStatus.COMPLETED, "")
    assert newest(batch).attempt == 2
    assert only_model(batch).status == ModelStatus.READY


# --- killed anywhere ------------------------------------------------------------------------------------------------


def test_a_killed_trainer_is_followed_by_an_attempt_from_its_checkpoint(scripted: Scripted, tmp_path: Path) -> None:
    batch = scripted("--end", "hang", "--once", str(tmp_path / "once"))
    first = tend_until_run(batch, lambda run: run.step == 2)
    holder = shim.read_holder(Path(first.folder).parent)
    assert holder is not None

    holder.trainer.signal(signal.SIGKILL)
    tend_until(batch, BatchStatus.COMPLETED)

    first.refresh_from_db()
    second = newest(batch)
    assert first.status == RunStatus.FAILED and "signal 9" in first.error
    assert (second.attempt, second.resumed_from_id) == (2, first.pk)
    assert second.fence > first.fence
    assert second.result is not None and second.result["resumed_from_step"] == 2
    assert only_model(batch).run_id == second.pk


def test_a_killed_shim_is_followed_by_a_higher_fence_of_the_same_attempt(
    scripted: Scripted, settings: Settings, tmp_path: Path
) -> None:
    settings.TRAINER_LEASE_SECONDS = 2
    batch = scripted("--end", "hang", "--once", str(tmp_path / "once"))
    run = tend_until_run(batch, lambda run: run.step == 2)
    holder = shim.read_holder(Path(run.folder).parent)
    assert holder is not None

    holder.shim.signal(signal.SIGKILL)
    tend_until(batch, BatchStatus.COMPLETED)

    again = newest(batch)
    assert (again.pk, again.attempt) == (run.pk, 1)
    assert again.fence > run.fence
    assert not holder.trainer.alive()
    assert again.result is not None and again.result["resumed_from_step"] == 2


def test_a_stopped_site_goes_on_with_the_same_attempt(scripted: Scripted, tmp_path: Path) -> None:
    batch = scripted("--end", "hang", "--once", str(tmp_path / "once"))
    run = tend_until_run(batch, lambda run: run.step == 2)

    assert shim.stop_all(tmp_path / "jobs") != []
    eventually(lambda: shim.read_exit(Path(run.folder)))
    tend_until(batch, BatchStatus.COMPLETED)

    assert batch.runs.count() == 1


def test_a_run_whose_start_was_lost_is_started_by_the_next_look(scripted: Scripted, settings: Settings) -> None:
    """The worker was killed after it wrote the row and before it started the shim."""
    settings.TRAINER_LEASE_SECONDS = 2
    batch = scripted()
    lost = builders.make_run(
        batch, lease_until=timezone.now(), progressed_at=timezone.now(), folder=str(settings.JOBS_DIR / "1" / "1-1")
    )

    tend_until(batch, BatchStatus.COMPLETED)

    assert newest(batch).pk == lost.pk


def test_a_success_that_nobody_took_is_taken_by_the_sweep(scripted: Scripted) -> None:
    """Killed between the run's success and the batch's completion: the row is the queue."""
    batch = scripted()
    run = runs.start(batch)
    assert run is not None

    def succeeded() -> bool:
        runs.watch(run)
        run.refresh_from_db()
        return run.status == RunStatus.SUCCEEDED

    eventually(succeeded)
    automation.tend_batches()

    batch.refresh_from_db()
    assert batch.status == BatchStatus.COMPLETED
    assert only_model(batch).status == ModelStatus.READY


# --- never two ------------------------------------------------------------------------------------------------------


def test_one_of_two_starts_a_run(scripted: Scripted) -> None:
    batch = scripted("--end", "hang")

    assert runs.start(batch) is not None
    assert runs.start(batch) is None


def test_two_watchers_at_once_make_one_model(scripted: Scripted) -> None:
    batch = scripted("--steps", "8", "--pause", "0.05")
    faults: list[BaseException] = []

    def watch() -> None:
        mine = TrainingBatch.objects.get(pk=batch.pk)
        try:
            for _ in range(300):
                for run in mine.runs.filter(status__in=("starting", "running", "stalled")):
                    runs.watch(run)  # without the lock of `tend`, so that both really look at once
                mine.refresh_from_db()
                batches.tend(mine)
                if mine.status == BatchStatus.COMPLETED:
                    return
                time.sleep(0.02)
        except BaseException as fault:
            faults.append(fault)
        finally:
            connection.close()

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for one in watchers:
        one.start()
    for one in watchers:
        one.join()

    assert faults == []
    batch.refresh_from_db()
    assert batch.status == BatchStatus.COMPLETED
    assert TrainedModel.objects.filter(batch=batch).count() == 1
    assert list(newest(batch).metrics.values_list("step", flat=True)) == list(range(1, 9))
    ready = [change for change in history.of(only_model(batch)) if change.to == "ready"]
    assert len(ready) == 1


def test_an_older_fences_result_does_not_count(scripted: Scripted) -> None:
    batch = scripted()
    run = runs.start(batch)
    assert run is not None
    eventually(lambda: shim.read_exit(Path(run.folder)))
    TrainingRun.objects.filter(pk=run.pk).update(fence=run.fence + 1)  # taken up elsewhere, in another folder

    with pytest.raises(Refused, match="changed while you were looking"):
        runs._take_result(run, shim.Exit("ended", 0, None, "", []))

    run.refresh_from_db()
    assert run.status == RunStatus.STARTING


def test_a_cancelled_batch_ends_its_trainer_at_once(scripted: Scripted) -> None:
    batch = scripted("--end", "hang", "--child")
    run = tend_until_run(batch, lambda run: run.step == 2)
    holder = shim.read_holder(Path(run.folder).parent)
    assert holder is not None
    child = Process.of(int((Path(run.folder) / "child").read_text()))
    assert child is not None

    batches.cancel(batch, by=SYSTEM, reason="changed my mind")

    eventually(lambda: not holder.trainer.alive() and not child.alive())
    run.refresh_from_db()
    assert run.status == RunStatus.CANCELLED
    assert only_model(batch).status == ModelStatus.FAILED
    batches.tend(batch)
    assert batch.runs.count() == 1


# --- no progress ----------------------------------------------------------------------------------------------------


def test_a_run_without_progress_is_stalled_and_runs_again_when_steps_come(scripted: Scripted) -> None:
    batch = scripted("--end", "hang")
    run = tend_until_run(batch, lambda run: run.step == 2 and run.status == RunStatus.RUNNING)
    long_ago = timezone.now() - timedelta(seconds=1000)
    TrainingRun.objects.filter(pk=run.pk).update(progressed_at=long_ago)

    run = tend_until_run(batch, lambda run: run.status == RunStatus.STALLED)

    line = (Path(run.folder) / "metrics.jsonl").read_bytes().splitlines()[-1].replace(b'"step":2', b'"step":3')
    with (Path(run.folder) / "metrics.jsonl").open("ab") as lines:
        lines.write(line + b"\n")
    tend_until_run(batch, lambda run: run.status == RunStatus.RUNNING and run.step == 3)


def test_a_run_that_stays_stalled_is_ended_and_resumed(scripted: Scripted, tmp_path: Path) -> None:
    batch = scripted("--end", "hang", "--once", str(tmp_path / "once"))
    first = tend_until_run(batch, lambda run: run.step == 2)
    holder = shim.read_holder(Path(first.folder).parent)
    assert holder is not None
    TrainingRun.objects.filter(pk=first.pk).update(progressed_at=timezone.now() - timedelta(hours=2))

    tend_until(batch, BatchStatus.COMPLETED)

    first.refresh_from_db()
    assert first.status == RunStatus.FAILED and "no progress for 7200 s" in first.error
    assert newest(batch).resumed_from_id == first.pk
    assert not holder.trainer.alive()


def test_lines_that_are_none_of_ours_do_not_stop_the_reading(scripted: Scripted) -> None:
    batch = scripted("--end", "hang")
    run = tend_until_run(batch, lambda run: run.step == 2)
    line = (Path(run.folder) / "metrics.jsonl").read_bytes().splitlines()[-1].replace(b'"step":2', b'"step":3')
    with (Path(run.folder) / "metrics.jsonl").open("ab") as lines:
        lines.write(b'\xff not json\n{"phase": "dancing"}\n' + line.replace(b'"loss"', b'"detail":"a\\u0000b","loss"'))
        lines.write(b"\n")

    run = tend_until_run(batch, lambda run: run.step == 3)

    assert run.metrics.get(step=3).values["detail"] == "ab"


# --- the real trainer -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_trainer_is_killed_resumed_and_ends_in_one_version(scripted: Scripted, settings: Settings) -> None:
    batch = scripted()
    settings.TRAINER_COMMAND = []
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    TrainingBatch.objects.filter(pk=batch.pk).update(
        parent=None,
        mode="filtered",
        hyperparameters={"epochs": 200, "checkpoint_every": 2, "learning_rate": 1e-3, "max_drift": 0.0},
    )
    batch.refresh_from_db()
    first = tend_until_run(batch, lambda run: run.step >= 4)
    holder = shim.read_holder(Path(first.folder).parent)
    assert holder is not None
    holder.trainer.signal(signal.SIGKILL)

    tend_until(batch, BatchStatus.COMPLETED, BatchStatus.FAILED, within=180)

    assert (batch.status, batch.error) == (BatchStatus.COMPLETED, "")
    run = newest(batch)
    assert run.attempt == 2 and run.result is not None and run.result["resumed_from_step"] >= 2
    assert only_model(batch).status == ModelStatus.READY
