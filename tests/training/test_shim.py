"""The process that owns a trainer: what it holds, what it leaves, and what ends with it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from django.db import connection
from django.db.models.functions import Now

from tests import builders
from training import runs, shim
from training.models import TrainingRun
from trainingsite.children import Process


class Start(Protocol):
    def __call__(self, command: list[str], *, fence: int = 1, lease: float = 20.0) -> Path: ...


pytestmark = pytest.mark.django_db(transaction=True)

SLEEPS = [sys.executable, "-c", "import time; print('awake', flush=True); time.sleep(600)"]
ENDS = [sys.executable, "-c", "import sys; print('done'); sys.exit(3)"]


@pytest.fixture
def run() -> TrainingRun:
    return builders.make_run(builders.make_batch(status="training"), fence=1)


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[bytes]"]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def start(tmp_path: Path, run: TrainingRun, started: list["subprocess.Popen[bytes]"]) -> Start:
    """Start a shim; the job's folder."""

    def starting(command: list[str], *, fence: int = 1, lease: float = 20.0) -> Path:
        job = tmp_path / "batch" / f"1-{fence}"
        job.mkdir(parents=True)
        arguments = ["--job", str(job), "--run", str(run.pk), "--fence", str(fence), "--lease", str(lease)]
        environment = {**os.environ, shim.DSN_VARIABLE: runs._dsn()}
        started.append(
            subprocess.Popen([sys.executable, "-m", "training.shim", *arguments, "--", *command], env=environment)
        )
        return job

    return starting


def eventually(happened: Callable[[], object], within: float = 20.0) -> None:
    until = time.monotonic() + within
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def trainer_of(job: Path) -> Process:
    eventually(lambda: "awake" in (shim.tail(job / shim.LOG) or [""]))
    eventually(lambda: shim.read_holder(job.parent))
    holder = shim.read_holder(job.parent)
    assert holder is not None and holder.trainer.alive()
    return holder.trainer


def test_it_keeps_the_lease_alive_and_leaves_how_the_trainer_ended(start: Start, run: TrainingRun) -> None:
    job = start(ENDS)

    eventually(lambda: shim.read_exit(job))

    ended = shim.read_exit(job)
    assert ended is not None
    assert (ended.reason, ended.code, ended.signal, ended.log) == ("ended", 3, None, ["done"])
    run.refresh_from_db()
    assert run.heartbeat_at is not None


def test_it_gives_the_lease_back_when_the_trainer_has_ended(start: Start, run: TrainingRun) -> None:
    start(ENDS, lease=600.0)

    eventually(lambda: TrainingRun.objects.filter(pk=run.pk, lease_until__lte=Now()).exists())


def test_the_trainer_learns_nothing_of_the_database(start: Start) -> None:
    job = start([sys.executable, "-c", f"import os; print(os.environ.get({shim.DSN_VARIABLE!r}))"])

    eventually(lambda: shim.read_exit(job))

    assert shim.tail(job / shim.LOG) == ["None"]


def test_a_killed_shim_takes_its_trainer_along(start: Start, started: list["subprocess.Popen[bytes]"]) -> None:
    trainer = trainer_of(start(SLEEPS))

    started[0].kill()

    eventually(lambda: not trainer.alive())


def test_a_killed_trainer_is_said_to_have_been_killed(start: Start) -> None:
    job = start(SLEEPS)
    trainer_of(job).signal(signal.SIGKILL)

    eventually(lambda: shim.read_exit(job))

    ended = shim.read_exit(job)
    assert ended is not None and (ended.reason, ended.code, ended.signal) == ("ended", None, signal.SIGKILL)


def test_a_higher_fence_in_the_row_ends_the_trainer(start: Start, run: TrainingRun) -> None:
    job = start(SLEEPS, lease=2.0)
    trainer = trainer_of(job)

    TrainingRun.objects.filter(pk=run.pk).update(fence=2)

    eventually(lambda: not trainer.alive())
    eventually(lambda: shim.read_exit(job))
    ended = shim.read_exit(job)
    assert ended is not None and ended.reason == "lease lost"


def test_a_run_that_is_no_longer_live_ends_the_trainer(start: Start, run: TrainingRun) -> None:
    trainer = trainer_of(start(SLEEPS, lease=2.0))

    TrainingRun.objects.filter(pk=run.pk).update(status="cancelled")

    eventually(lambda: not trainer.alive())


def test_while_the_database_is_away_the_trainer_goes_on_until_the_lease_ends(start: Start, run: TrainingRun) -> None:
    job = start(SLEEPS, lease=4.0)
    trainer = trainer_of(job)

    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE training_runs RENAME TO elsewhere")
    try:
        eventually(lambda: not trainer.alive())
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO training_runs")
    eventually(lambda: shim.read_exit(job))
    ended = shim.read_exit(job)
    assert ended is not None and ended.reason == "lease lost"


def test_it_does_not_start_a_trainer_without_the_lease(start: Start, run: TrainingRun) -> None:
    TrainingRun.objects.filter(pk=run.pk).update(fence=7)
    job = start(SLEEPS)

    eventually(lambda: shim.read_exit(job))

    assert not (job / shim.LOG).exists()


def test_a_second_shim_of_the_same_fence_never_starts_a_second_trainer(start: Start, tmp_path: Path) -> None:
    job = start(SLEEPS, lease=4.0)
    trainer = trainer_of(job)
    (tmp_path / "batch" / "1-1").rename(tmp_path / "batch" / "first")

    again = start(SLEEPS, lease=4.0)

    eventually(lambda: shim.read_exit(again))
    ended = shim.read_exit(again)
    assert ended is not None and ended.reason == "not started" and "lock" in ended.log[-1]
    assert trainer.alive()


def test_a_shim_of_a_higher_fence_ends_the_leftovers_of_a_lower_one(
    start: Start, started: list["subprocess.Popen[bytes]"], run: TrainingRun
) -> None:
    """The trainer's own child holds the lock on: the first shim is killed, its trainer with it, the child lives."""
    parent = "import subprocess, sys, time; print('awake', flush=True); subprocess.run([sys.executable, '-c', "
    job = start([sys.executable, "-c", parent + "'import time; time.sleep(600)'], close_fds=False)"])
    trainer = trainer_of(job)
    started[0].kill()
    eventually(lambda: not trainer.alive())
    TrainingRun.objects.filter(pk=run.pk).update(fence=2)

    second = trainer_of(start(SLEEPS, fence=2))

    assert second.alive()


def test_asked_to_stop_it_ends_the_trainer_gently(start: Start, started: list["subprocess.Popen[bytes]"]) -> None:
    gentle = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)));"
        "print('awake', flush=True); time.sleep(600)"
    )
    job = start([sys.executable, "-c", gentle])
    trainer_of(job)

    assert shim.stop(job.parent) == started[0].pid

    eventually(lambda: shim.read_exit(job))
    ended = shim.read_exit(job)
    assert ended is not None
    assert (ended.reason, ended.code, ended.log) == ("stopped", 75, ["awake", "saved"])


def test_a_command_that_is_not_there_is_said(start: Start) -> None:
    job = start(["/no/such/trainer"])

    eventually(lambda: shim.read_exit(job))

    ended = shim.read_exit(job)
    assert ended is not None and "/no/such/trainer" in ended.log[-1]


def test_an_exit_file_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / shim.EXIT).write_text(json.dumps({"reason": "ended"}))

    assert shim.read_exit(tmp_path) is None
