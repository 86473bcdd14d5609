"""One run: an attempt to train a batch. Nothing outside this file writes a run's status.

    starting → running → succeeded | failed | cancelled       running → stalled → running | failed

The trainer runs in a process of its own, owned by a shim (shim.py) that keeps the run's lease. Here runs are
started, looked at and ended; every function may be called twice, by two at once, and be killed between any two lines.

Who may write: each lease carries a fencing number, the row carries the highest. A folder belongs to one attempt and
fence, and whatever is read from it counts only `WHERE fence = …`.
"""

import itertools
import logging
import os
import shutil
import statistics
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction
from django.db.models import Max
from django.db.models.functions import Now
from django.utils import timezone
from psycopg.conninfo import make_conninfo

from training import jobs, shim
from training.models import LIVE_RUN, BatchStatus, RunMetric, RunStatus, TrainingBatch, TrainingRun
from training.trainer import job as wire
from trajectories import history
from trajectories.errors import Refused
from trajectories.history import SYSTEM, Actor

logger = logging.getLogger(__name__)

NEXT: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.STARTING: frozenset({RunStatus.RUNNING, RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED}),
    RunStatus.RUNNING: frozenset({RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.STALLED, RunStatus.CANCELLED}),
    RunStatus.STALLED: frozenset({RunStatus.RUNNING, RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED}),
    RunStatus.SUCCEEDED: frozenset(),
    RunStatus.FAILED: frozenset(),
    RunStatus.CANCELLED: frozenset(),
}

EXTERNAL = "external"  # as TRAINER_COMMAND: others train, and send the adapter (POST /api/v1/models/)
LEASES_AN_ATTEMPT = 5  # how often one attempt may be taken up again after its shim vanished or was stopped
METRICS_READ_BYTES = 4 * 2**20  # at one look; a line is about 500 bytes
PACE_OF = 20  # steps whose median is the pace
# Not for the trainer: it runs code of others (a hub model's, a TRAINER_COMMAND's) and needs none of these.
SECRETS = ("DATABASE_URL", "REDIS_URL", "SECRET_KEY", "JUDGE_API_KEY", "MODEL_SERVER_API_KEY")


class TrainingFailed(Exception):
    """The batch cannot be trained any more. batches.py decides what that means; the text is for people."""


def start(batch: TrainingBatch) -> TrainingRun | None:
    """Start the next attempt, from the checkpoint of the one before where there is one.

    Returns:
        None when there is nothing to start: the batch is not in training, has a live run, or is trained by others.

    Raises:
        TrainingFailed: all attempts are used up.
    """
    if is_external():
        return None
    with transaction.atomic():
        batch = TrainingBatch.objects.select_for_update().select_related("project").get(pk=batch.pk)
        before = batch.runs.order_by("-attempt").first()
        if batch.status != BatchStatus.TRAINING or (before and before.status in (*LIVE_RUN, RunStatus.SUCCEEDED)):
            return None
        # Since a person's retry moved the batch into training again, not in all.
        used = batch.runs.filter(started_at__gte=batch.status_since).count()
        if used >= settings.TRAINER_MAX_ATTEMPTS:
            assert before is not None
            raise TrainingFailed(f"{used} attempts failed, the last with: {before.error or 'no word'}")
        attempt = before.attempt + 1 if before else 1
        fence = _next_fence(batch)
        run = TrainingRun(
            batch=batch,
            attempt=attempt,
            fence=fence,
            folder=str(_folder(batch, attempt, fence)),
            resumed_from=before if before and has_checkpoint(Path(before.folder)) else None,
            started_at=timezone.now(),  # by the clock that wrote the batch's status_since
            progressed_at=timezone.now(),
        )
        run.save()
        TrainingRun.objects.filter(pk=run.pk).update(lease_until=Now() + _lease())
        history.record(run, "", RunStatus.STARTING, project=batch.project, by=SYSTEM)
    _launch(run, Path(before.folder) if run.resumed_from and before else None)
    return run


def is_external() -> bool:
    return tuple(settings.TRAINER_COMMAND) == (EXTERNAL,)


def _take_up_again(run: TrainingRun, why: str) -> None:
    """Go on with the same attempt under a higher fence, in a new folder, from its last checkpoint.

    Raises:
        TrainingFailed: too often.
    """
    was, folder = run.fence, Path(run.folder)
    with transaction.atomic():
        batch = TrainingBatch.objects.select_for_update().get(pk=run.batch_id)
        fence = _next_fence(batch)
        leases = sum(1 for _ in folder.parent.glob(f"{run.attempt}-*"))
        if leases >= LEASES_AN_ATTEMPT:
            raise TrainingFailed(f"{why}, {leases} times in this attempt")
        moved = TrainingRun.objects.filter(
            pk=run.pk, fence=was, status__in=LIVE_RUN, lease_until__lte=Now(), batch__status=BatchStatus.TRAINING
        ).update(
            fence=fence,
            folder=str(_folder(batch, run.attempt, fence)),
            lease_until=Now() + _lease(),
            metrics_offset=0,
            progressed_at=Now(),
        )
        if not moved:  # someone else took it, or its shim is back
            return
        history.record(run, str(was), str(fence), project=batch.project, by=SYSTEM, reason=why, field="fence")
    run.refresh_from_db()
    before = folder if has_checkpoint(folder) else Path(run.resumed_from.folder) if run.resumed_from else None
    _launch(run, before)


def _next_fence(batch: TrainingBatch) -> int:
    highest: int | None = batch.runs.aggregate(highest=Max("fence"))["highest"]
    return (highest or 0) + 1


def _folder(batch: TrainingBatch, attempt: int, fence: int) -> Path:
    return Path(settings.JOBS_DIR) / str(batch.pk) / f"{attempt}-{fence}"


def _lease() -> timedelta:
    return timedelta(seconds=settings.TRAINER_LEASE_SECONDS)


def has_checkpoint(folder: Path) -> bool:
    """Whether an attempt that ended left something to go on from."""
    return (folder / "checkpoint").is_dir()


def _launch(run: TrainingRun, resume_from: Path | None) -> None:
    """Write the job and start its shim. What goes wrong here is the run's failure, with its reason."""
    folder = Path(run.folder)
    try:
        jobs.write(run.batch, folder, job_id=f"{run.pk}", fence=run.fence, resume_from=resume_from)
        _spawn(run, folder)
    except Refused as refusal:  # the data are not what was frozen: no later attempt can do better
        _fail(run, str(refusal), give_up=True)
    except (OperationalError, InterfaceError):
        raise  # the database is away; the lease runs out, and the next look takes the run up again
    except Exception as exc:  # disk full, a payload that cannot be read: whatever it is, the run's page must say it
        logger.exception("run %s: could not be started", run.pk)
        _fail(run, f"could not be started: {exc}")


def _spawn(run: TrainingRun, folder: Path) -> None:
    words = tuple(settings.TRAINER_COMMAND) or (sys.executable, "-m", "training.trainer", "--job", "{job}")
    command = [word.replace("{job}", str(folder)) for word in words]
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    # Spinning OpenMP threads take the cores from everyone else on a shared machine (a third of the speed, measured).
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment[shim.DSN_VARIABLE] = _dsn()
    arguments = {"job": folder, "run": run.pk, "fence": run.fence, "lease": settings.TRAINER_LEASE_SECONDS}
    options = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    with (folder / "shim.txt").open("ab") as said:
        subprocess.run(
            [sys.executable, "-m", "training.shim", *options, "--detach", "--", *command],
            cwd=settings.BASE_DIR,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=True,
        )


def _dsn() -> str:
    """The database as this process has it; a test's is another than the settings name."""
    said = connection.settings_dict
    names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
    given = {name: str(said[key]) for name, key in names.items() if said.get(key)}
    options = {name: value for name, value in said["OPTIONS"].items() if name not in ("pool", "isolation_level")}
    return make_conninfo(**given, **options)


def watch(run: TrainingRun) -> None:
    """Look at a live run once: take in what its trainer wrote, and act on how it stands.

    Raises:
        TrainingFailed: it ended, and no further attempt is left or can help.
    """
    run.refresh_from_db()
    if run.status not in LIVE_RUN:
        return
    # Asked before the metrics are read: all that the trainer wrote is there by then.
    ended = shim.read_exit(Path(run.folder))
    try:
        while _read_metrics(run):
            pass
        if ended is not None:
            _take_result(run, ended)
        elif TrainingRun.objects.filter(pk=run.pk, fence=run.fence, lease_until__lte=Now() - _lease() / 5).exists():
            # Its shim is gone without a word (kill -9, a power cut), or was never started. The lease has run out, so
            # the shim, if it lives, has killed its trainer.
            _go_on(run, "its shim went away")
        else:
            _look_for_stall(run)
    except Refused:
        return  # another watcher was quicker, or a person cancelled meanwhile


def _read_metrics(run: TrainingRun) -> bool:
    """Take in the next lines of metrics.jsonl; False when there are none, or another watcher took them."""
    path = Path(run.folder) / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(run.metrics_offset)
            raw = file.read(METRICS_READ_BYTES)
    except OSError:
        return False
    raw = raw[: raw.rfind(b"\n") + 1]  # the last line may still be in writing
    if not raw:
        return False
    lines = [line for line in (_progress(one) for one in raw.splitlines()) if line is not None]
    last = lines[-1] if lines else None
    # A line alone is no progress: a trainer that waits for a device may say so every minute.
    moved_on = last is not None and (last.step != run.step or last.phase != run.phase or run.metrics_offset == 0)
    steps = {line.step: line for line in lines if line.phase == "training" and line.step > 0}
    with transaction.atomic():
        # The fence: a folder of an older lease says nothing any more. The offset: of two that read the same lines,
        # one counts them.
        place: dict[str, object] = {}
        if last is not None:
            place = {"phase": last.phase, "step": last.step, "total_steps": last.total_steps or run.total_steps}
        if moved_on:
            place["progressed_at"] = timezone.now()
        taken = TrainingRun.objects.filter(
            pk=run.pk, fence=run.fence, metrics_offset=run.metrics_offset, status__in=LIVE_RUN
        ).update(metrics_offset=run.metrics_offset + len(raw), **place)
        if not taken:
            return False
        RunMetric.objects.bulk_create(
            [
                RunMetric(run=run, step=step, values=_measures(line), at=datetime.fromtimestamp(line.at, UTC))
                for step, line in steps.items()
            ],
            update_conflicts=True,  # a trainer that went on from a checkpoint writes some steps again
            unique_fields=("run", "step"),
            update_fields=("values", "at"),
            batch_size=500,
        )
        if steps:
            TrainingRun.objects.filter(pk=run.pk, fence=run.fence).update(seconds_per_step=_pace(run))
    run.refresh_from_db()
    if moved_on and run.status in (RunStatus.STARTING, RunStatus.STALLED):
        _move(run, RunStatus.RUNNING)
    return True


_decoder = msgspec.json.Decoder(wire.Progress)


def _progress(line: bytes) -> wire.Progress | None:
    """None for a line that is none: another trainer's metrics are welcome, and must not stop ours from being read."""
    try:
        return _decoder.decode(line.replace(b"\\u0000", b""))  # PostgreSQL stores no NUL
    except msgspec.MsgspecError:
        return None


def _measures(line: wire.Progress) -> dict[str, object]:
    """What stands in a line besides its place; only what was measured."""
    known = msgspec.to_builtins(line)
    assert isinstance(known, dict)
    return {name: value for name, value in known.items() if name not in ("phase", "step", "at") and value is not None}


def _pace(run: TrainingRun) -> float | None:
    """Seconds a step: the median of the last ones, so that one slow checkpoint does not move the forecast."""
    at = list(run.metrics.order_by("-step").values_list("at", flat=True)[: PACE_OF + 1])
    gaps = [(later - earlier).total_seconds() for later, earlier in itertools.pairwise(at)]
    gaps = [gap for gap in gaps if gap > 0]
    return statistics.median(gaps) if gaps else None


def progress(run: TrainingRun) -> float:
    """Share of the planned steps that are done, 0 to 1."""
    return min(1.0, run.step / run.total_steps) if run.total_steps else 0.0


def eta_seconds(run: TrainingRun) -> float | None:
    """Seconds to the last planned step at the pace of the last ones; None before two steps were seen."""
    if run.seconds_per_step is None or not run.total_steps or run.status not in LIVE_RUN:
        return None
    return max(0.0, (run.total_steps - run.step) * run.seconds_per_step)


def _look_for_stall(run: TrainingRun) -> None:
    """Without progress for a while a run is stalled, and said to be; after as long again it is ended.

    Raises:
        TrainingFailed: see `_fail`.
    """
    quiet = timezone.now() - (run.progressed_at or run.started_at)
    patience = timedelta(seconds=settings.TRAINER_STALLED_SECONDS)
    if run.status == RunStatus.RUNNING and quiet > patience:
        _move(run, RunStatus.STALLED, reason=f"no step for {quiet.total_seconds():.0f} s")
    elif quiet > 2 * patience:
        # Its shim finds the row no longer live, and kills the trainer; the next attempt waits for the batch's lock.
        _fail(run, f"no progress for {quiet.total_seconds():.0f} s, in phase {run.phase or 'starting'}")


def _take_result(run: TrainingRun, ended: shim.Exit) -> None:
    """The trainer has ended: succeeded, stopped, or failed in a way that another attempt may mend, or none can.

    Raises:
        TrainingFailed: see `_fail`.
    """
    log = "\n".join(ended.log)
    if ended.reason != "ended" or ended.code == wire.EXIT_STOPPED:
        last = f" ({ended.log[-1]})" if ended.reason == "not started" and ended.log else ""
        why = {"lease lost": "its lease was lost", "not started": f"its trainer could not start{last}"}
        _go_on(run, why.get(ended.reason, "its trainer was stopped"))
        return
    try:
        result = wire.read_result(Path(run.folder))
    except (OSError, msgspec.MsgspecError) as exc:
        result = None
        log = f"{log}\nresult.json cannot be read: {exc}"
    if result is not None and (result.job_id, result.fence) != (str(run.pk), run.fence):
        result = None
        log = f"{log}\nresult.json is of another attempt"
    if ended.code == wire.EXIT_DONE and result is not None and result.state == "succeeded":
        why_not = _incomplete(result)
        if why_not:
            _fail(run, why_not, log=log, give_up=True)
        else:
            said = msgspec.json.decode(msgspec.json.encode(result).replace(b"\\u0000", b""))
            _move(run, RunStatus.SUCCEEDED, result=said, log_tail=log, ended_at=timezone.now(), lease_until=None)
    elif result is not None and result.error:
        _fail(run, result.error.replace("\0", ""), log=log, give_up=ended.code == wire.EXIT_INVALID)
    else:
        _fail(run, _how(ended), log=log, give_up=ended.code == wire.EXIT_INVALID)


def _incomplete(result: wire.Result) -> str:
    """Why a result that calls itself a success is none; "" when it is one."""
    if result.steps_done == 0:
        return "no optimiser step was done" + (f": {result.drift_detail}" if result.drift_detail else "")
    if result.steps_done < result.steps_planned and not result.drift_stopped:
        return f"only {result.steps_done} of {result.steps_planned} planned steps were done, without a drift stop"
    if not result.weight_change > 0:  # also when it is NaN
        return f"the weights do not differ from the parent's (change {result.weight_change})"
    return ""


def _how(ended: shim.Exit) -> str:
    last = next((line for line in reversed(ended.log) if line.strip()), "nothing was logged")
    if ended.signal is not None:
        killed = " (the kernel does this when memory runs out)" if ended.signal == 9 else ""
        return f"the trainer was ended by signal {ended.signal}{killed}; its last line: {last}"
    return f"the trainer ended with code {ended.code}; its last line: {last}"


def _go_on(run: TrainingRun, why: str) -> None:
    try:
        _take_up_again(run, why)
    except TrainingFailed as failed:
        _fail(run, str(failed))


def _fail(run: TrainingRun, why: str, *, log: str = "", give_up: bool = False) -> None:
    """End a run without a result. The next attempt is `start`'s business, at the next look.

    Raises:
        TrainingFailed: `give_up`, another attempt cannot help.
    """
    log = log or "\n".join(shim.tail(Path(run.folder) / shim.LOG))
    try:
        _move(run, RunStatus.FAILED, reason=why, error=why, log_tail=log, ended_at=timezone.now(), lease_until=None)
    except Refused:
        return  # someone else ended it first
    logger.warning("run %s of batch %s failed: %s", run.pk, run.batch_id, why)
    shim.stop(Path(run.folder).parent)  # sooner than at its next renewal
    if give_up:
        raise TrainingFailed(why)


def cancel(run: TrainingRun, *, by: Actor, reason: str = "") -> None:
    """End a live run at a person's word. Called in the transaction that cancels its batch."""
    _move(run, RunStatus.CANCELLED, by=by, reason=reason, ended_at=timezone.now(), lease_until=None)
    # The shim would see at its next renewal that the run is no longer live; this tells it at once.
    folder = Path(run.folder).parent
    transaction.on_commit(lambda: _stop(folder), robust=True)


def _stop(folder: Path) -> None:
    shim.stop(folder)


def tidy(batch: TrainingBatch) -> None:
    """Remove what a completed batch's job folders need no more: an optimiser's state can be gigabytes.

    What tells how it went (job, metrics, logs, results) stays. The data can be made again from what is frozen, and the
    adapter lies where the model servers read it.
    """
    for attempt in (Path(settings.JOBS_DIR) / str(batch.pk)).glob("*-*"):
        for name in ("checkpoint", "adapter"):
            shutil.rmtree(attempt / name, ignore_errors=True)
        (attempt / "groups.jsonl").unlink(missing_ok=True)


def _move(run: TrainingRun, to: RunStatus, *, by: Actor = SYSTEM, reason: str = "", **also: object) -> None:
    was = RunStatus(run.status)
    if to not in NEXT[was]:
        raise Refused(f"{run} is {was.label}, so it cannot become {to.label}.")
    with transaction.atomic():
        # The WHERE repeats status and fence as we read them: of two that watch the same run one gets through, and
        # one that looked at the folder of an older lease never does.
        moved = TrainingRun.objects.filter(pk=run.pk, status=was, fence=run.fence).update(
            status=to, status_since=timezone.now(), **also
        )
        if not moved:
            raise Refused(f"{run} changed while you were looking at it. Reload and try again.")
        history.record(run, was, to, project=run.batch.project, by=by, reason=reason)
    run.refresh_from_db()
