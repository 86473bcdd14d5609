"""The life of a TrainingBatch. Nothing outside this file writes its status.

    pending → preparing → scoring → training → uploading → completed
        any of them → failed | cancelled          failed → pending, when a person retries

`trigger` chooses whole groups, `tend` takes a batch as far as it can go now and may be called by anyone at any time:
by the task that a trigger nudges, by the watch over runs, by the sweep.
"""

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from django.conf import settings
from django.db import IntegrityError, InterfaceError, OperationalError, connection, transaction
from django.db.models import Count
from django.utils import timezone

from training import adapters, freezing, judging, mixing, model_life, policies, readiness, runs, selection, versions
from training.models import (
    LIVE_BATCH,
    LIVE_RUN,
    BatchGroup,
    BatchItem,
    BatchStatus,
    Mode,
    ModelStatus,
    RunStatus,
    TrainedModel,
    TrainingBatch,
)
from training.serving import ModelServer, ServingRefused, ServingUnavailable
from trajectories import history, indexing
from trajectories.errors import Invalid, Refused
from trajectories.history import SYSTEM, Actor
from trajectories.models import Group, Project

logger = logging.getLogger(__name__)

# What the trainer left out and no page would show otherwise (training/trainer/job.py, Dropped).
DROPPED = {
    "too_long": "trajectories longer than max_sequence_tokens",
    "no_trainable_call": "trajectories without a call that may be trained",
    "greedy_call": "calls at temperature 0, which have no ratio",
    "empty_answer": "calls without tokens",
}

ANSWER_WITHIN = 10.0  # seconds that the sender of an adapter waits for its version
FROM_OUTSIDE = "external"  # a model's origin: its adapter was sent by POST /api/v1/models/

_STOPPED = frozenset({BatchStatus.FAILED, BatchStatus.CANCELLED})
NEXT: dict[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.PENDING: frozenset({BatchStatus.PREPARING}) | _STOPPED,
    BatchStatus.PREPARING: frozenset({BatchStatus.SCORING}) | _STOPPED,
    BatchStatus.SCORING: frozenset({BatchStatus.TRAINING}) | _STOPPED,
    BatchStatus.TRAINING: frozenset({BatchStatus.UPLOADING}) | _STOPPED,
    BatchStatus.UPLOADING: frozenset({BatchStatus.COMPLETED}) | _STOPPED,
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.FAILED: frozenset({BatchStatus.PENDING}),
    BatchStatus.CANCELLED: frozenset(),
}

# --- asking for one -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a batch is asked to be; what is left out is the policy's."""

    force: bool = False  # waives amounts and schedule, never what makes a group fit to learn from
    limit: int | None = None  # at most so many trajectories, in whole groups
    mode: Mode | None = None
    purpose: str = ""
    behaviour: str = ""  # only groups of this behaviour
    base_model: str = ""
    parent: TrainedModel | Literal["serving"] | None = "serving"  # None: the bare base
    shuffle_rewards: bool = False  # a placebo
    hyperparameters: dict[str, object] | None = None  # over the policy's
    seed: int | None = None


def trigger(project: Project, wish: Wish, *, by: Actor) -> TrainingBatch:
    """Choose the groups of a new batch.

    Returns:
        The batch, pending; `tend` takes it on.

    Raises:
        Refused: another batch is under way; the project is not ready (with the reasons); or no group is fit.
        Invalid: a hyperparameter does not exist or has a wrong type.
    """
    policy = policies.of(project)
    mode = wish.mode or Mode(policy.mode)
    chosen = {**policy.hyperparameters, **(wish.hyperparameters or {})}
    policies.hyperparameters(chosen)
    _refuse_second(project)
    indexing.drain(project)  # the counters that selection reads are filled behind the write
    base_model = wish.base_model or policy.base_model
    parent = selection.parent(project, base_model) if wish.parent == "serving" else wish.parent
    if parent is not None and parent.base_model != base_model:
        raise Refused(f"{parent} is an adapter of {parent.base_model}, so it cannot be trained on as {base_model}.")
    standing = readiness.check(project, mode=mode)
    if not (standing.ready or wish.force):
        raise Refused(f"Not ready to train: {standing.reason}", reasons=standing.rows())
    rules = selection.Rules.of(policy, mode, parent, force=wish.force, behaviour=wish.behaviour)
    limit = wish.limit if wish.limit is not None else policy.batch_limit
    groups = selection.choose(project, rules, limit)
    room = None if limit is None else limit - sum(group.n for group in groups)
    # Imitation needs nothing to compare with, so it also takes what belongs to no scenario.
    alone = selection.alone(project, wish.behaviour)[:room].count() if mode == Mode.SFT else 0
    if not groups and not alone:
        raise _nothing_usable(project, rules, limit)
    with transaction.atomic():
        try:
            with transaction.atomic():
                batch = TrainingBatch.objects.create(
                    project=project,
                    mode=mode,
                    purpose=wish.purpose,
                    base_model=base_model,
                    parent=parent,
                    forced=wish.force,
                    limit=limit,
                    shuffle_rewards=wish.shuffle_rewards,
                    seed=random.SystemRandom().getrandbits(31) if wish.seed is None else wish.seed,
                    hyperparameters={"max_drift": policy.max_drift, **chosen},
                    reward_mix=mixing.weights(policy),
                    readiness=standing.body(),
                    n_groups=len(groups),
                    n_trajectories=sum(group.n for group in groups) + alone,
                    requested_by=by.user,
                    requested_by_name=by.name[:150],
                )
        except IntegrityError as exc:  # two asked at once; the constraint lets one through
            raise Refused("Another batch of this project has just been started. Wait for it, or cancel it.") from exc
        history.record(batch, "", BatchStatus.PENDING, project=project, by=by, reason=wish.purpose)
        _reserve(batch, groups, alone, wish.behaviour)
    return batch


def _refuse_second(project: Project) -> None:
    other = TrainingBatch.objects.filter(project=project, status__in=LIVE_BATCH).first()
    if other is not None:
        raise Refused(
            f"Batch {other.batch_id} of this project is {other.get_status_display()}. One batch is trained at a time: "
            "wait for it, or cancel it."
        )


def _nothing_usable(project: Project, rules: selection.Rules, limit: int | None) -> Refused:
    standing = selection.standing(project, rules)
    usable = standing.groups.get("", 0)
    if usable:
        return Refused(f"limit is {limit}, and the next group alone has more trajectories. Groups are taken whole.")
    reasons = [
        {"check": "usable_groups", "value": n, "threshold": 0, "ok": False, "detail": f"{_groups(n)}: {why}"}
        for why, n in standing.left_out().items()
    ]
    why = "; ".join(str(row["detail"]) for row in reasons) or "there are no closed groups"
    way_out = ""
    if standing.groups.get(selection.NOT_OURS):
        way_out = " Foreign and unknown data can be trained in the modes filtered and sft (off-policy, uncorrected)."
    return Refused(f"No group is fit for a {rules.mode} batch: {why}.{way_out}", reasons=reasons)


def _groups(n: int) -> str:
    return "1 group" if n == 1 else f"{n} groups"


def _reserve(batch: TrainingBatch, groups: Sequence[Group], alone: int, behaviour: str) -> None:
    """Keep the choice. One batch is live at a time, so nobody else takes these groups before they are frozen."""
    rows = [
        BatchGroup(
            batch=batch, group=group, scenario_ref=group.scenario.scenario_id, behaviour=group.behaviour, n=group.n
        )
        for group in groups
    ]
    if alone:
        rows.append(BatchGroup(batch=batch, group=None, scenario_ref="", behaviour=behaviour, n=alone))
    BatchGroup.objects.bulk_create(rows, batch_size=1000)


# --- taking it on ---------------------------------------------------------------------------------------------------


def tend(batch: TrainingBatch) -> None:
    """Take a batch as far as it can go now.

    Safe at any time and by anyone: of several that tend the same batch one works, the others leave at once; what
    was done stays done when it is killed between two steps.
    """
    with one_at_a_time(f"batch {batch.pk}") as mine:
        if not mine:
            return
        try:
            batch.refresh_from_db()
            while _step(batch):
                batch.refresh_from_db()
        except Refused as refusal:
            logger.info("batch %s: %s", batch.pk, refusal)  # a person moved it meanwhile
        except (runs.TrainingFailed, Unfit) as failed:
            batch.refresh_from_db()
            fail(batch, str(failed))
        except (OperationalError, InterfaceError):
            raise  # the database is away; the batch is as it was
        except Exception as fault:
            logger.exception("batch %s: a fault while it was %s", batch.pk, batch.status)
            batch.refresh_from_db()
            fail(batch, f"A fault of ours while it was {batch.get_status_display()}; the log has more: {fault!r}")


def _step(batch: TrainingBatch) -> bool:
    """One step of a batch's life; False when there is nothing to do now."""
    match BatchStatus(batch.status):
        case BatchStatus.PENDING:
            _move(batch, BatchStatus.PREPARING)
        case BatchStatus.PREPARING:
            _prepare(batch)
            _move(batch, BatchStatus.SCORING)
        case BatchStatus.SCORING:
            if batch.frozen_at is None:
                if not _score(batch):
                    return False
                freeze(batch)
            else:
                _begin_training(batch)
        case BatchStatus.TRAINING:
            return _train(batch)
        case BatchStatus.UPLOADING:
            return publish(batch)
        case _:
            return False
    return True


class Unfit(Exception):
    """Nothing of the batch can be trained. The text is for people."""


def _prepare(batch: TrainingBatch) -> None:
    """Leave out the groups that are no longer what they were when they were chosen.

    Raises:
        Unfit: none is left; or a frozen batch that is tried again has lost trajectories.
    """
    if batch.frozen_at is not None:
        lost = batch.items.filter(trajectory__isnull=True).count()
        if lost:
            raise Unfit(f"{lost} of its {batch.n_trajectories} trajectories were erased. Start a new batch.")
        return
    indexing.drain(batch.project)
    rules = _rules(batch)
    why_not = dict(
        Group.objects.filter(batch_groups__batch=batch, batch_groups__is_used=True)
        .annotate(why_not=selection.why_not(rules, besides=batch))
        .exclude(why_not="")
        .values_list("pk", "why_not")
    )
    for row in batch.groups.filter(group__in=why_not):
        row.is_used, row.left_out = False, why_not[row.group_id or 0]
        row.save(update_fields=["is_used", "left_out"])
    if not batch.groups.filter(is_used=True).exists():
        raise Unfit("None of its groups may be trained any more. Start a new batch.")


def _rules(batch: TrainingBatch) -> selection.Rules:
    return selection.Rules.of(policies.of(batch.project), Mode(batch.mode), batch.parent, force=batch.forced)


def _score(batch: TrainingBatch) -> bool:
    """Have the groups judged that are not; True when nothing is left to wait for.

    A group whose judge failed for good is not waited for: without the judge's word the mix leaves it out, and says so.
    """
    if batch.mode == Mode.SFT:
        return True
    groups = Group.objects.filter(batch_groups__batch=batch, batch_groups__is_used=True)
    return judging.judge_groups(batch.project, groups)


def freeze(batch: TrainingBatch) -> None:
    """Write down by value what will be trained, and begin to train it.

    Raises:
        Unfit: no group with anything to learn from is left.
    """
    policy = policies.of(batch.project)
    manifest = sha256()
    n_groups = n_trajectories = 0
    off_policy = False
    with transaction.atomic():
        for row in batch.groups.filter(is_used=True).select_related("group__scenario").order_by("pk"):
            frozen = freezing.freeze(batch, row, policy)
            row.is_used, row.left_out = not frozen.why_not, frozen.why_not[:200]
            row.n, row.mean, row.std = len(frozen.items), frozen.mean, frozen.std
            row.save()
            if frozen.why_not:
                continue
            try:
                BatchItem.objects.bulk_create(frozen.items, batch_size=500)
            except IntegrityError as exc:
                raise Unfit(f"Trajectories of {row.group} are in another batch already.") from exc
            n_groups += 1
            n_trajectories += len(frozen.items)
            off_policy = off_policy or frozen.off_policy
            for item in frozen.items:
                manifest.update(freezing.manifest_line(item))
        if not n_groups:
            raise Unfit(_nothing_left(batch))
        TrainingBatch.objects.filter(pk=batch.pk).update(
            frozen_at=timezone.now(),
            manifest_hash=manifest.hexdigest(),
            n_groups=n_groups,
            n_trajectories=n_trajectories,
            off_policy=off_policy,
        )
        batch.refresh_from_db()
        _begin_training(batch)


def _nothing_left(batch: TrainingBatch) -> str:
    """Raised out of the transaction that would have kept the reasons, so they go into the sentence."""
    reasons = batch.groups.filter(is_used=False).order_by().values_list("left_out").annotate(n=Count("pk"))
    why = "; ".join(f"{_groups(n)}: {left_out}" for left_out, n in sorted(reasons, key=lambda row: -row[1])[:5])
    return f"Nothing to learn from is left in it ({why}). Start a new batch when there are more trajectories."


def _begin_training(batch: TrainingBatch) -> None:
    """Move a frozen batch on, and give its model a version: here, since only what is trained should cost a number."""
    with transaction.atomic():
        _move(batch, BatchStatus.TRAINING)
        model = TrainedModel.objects.filter(batch=batch).first()
        if model is None:
            versions.allocate(batch)
        elif model.status == ModelStatus.FAILED:
            model_life.train_again(model, by=SYSTEM, reason="its batch is tried again")


def _train(batch: TrainingBatch) -> bool:
    """Look after the batch's runs; True when there may be more to do at once.

    Raises:
        runs.TrainingFailed: no attempt is left, or none can help.
    """
    run = batch.runs.order_by("-attempt").first()
    if run is not None and run.status == RunStatus.SUCCEEDED:
        _move(batch, BatchStatus.UPLOADING)
        return True
    if run is not None and run.status in LIVE_RUN:
        runs.watch(run)
        run.refresh_from_db()
        return run.status not in LIVE_RUN
    run = runs.start(batch)
    return run is not None and run.status not in LIVE_RUN


# --- its end --------------------------------------------------------------------------------------------------------


def publish(batch: TrainingBatch) -> bool:
    """Put the adapter where the model servers read it, have it loaded and asked once, and complete the batch.

    Returns:
        False when the model server does not answer: the next look tries again.

    Raises:
        Unfit: the adapter cannot be served.
    """
    model = batch.model
    run = batch.runs.filter(status=RunStatus.SUCCEEDED).order_by("-attempt").first()
    external = model.origin == FROM_OUTSIDE
    if external or run is None:
        source = Path(model.adapter_path)
    else:
        source = Path(run.folder) / "adapter"
    try:
        adapter = adapters.inspect(source)
    except adapters.BadAdapter as bad:
        raise Unfit(f"The adapter cannot be served: {bad}") from bad
    if batch.parent is not None and batch.parent.adapter_hash == adapter.sha256:
        raise Unfit(f"The adapter is the same as that of {batch.parent}: nothing was learned.")
    adapter = adapters.place(adapter, adapter_folder(model))
    try:
        note = _ask_once(model, adapter)
    except ServingUnavailable as exc:
        why = f"The model server does not answer, so the adapter waits: {exc}"
        TrainingBatch.objects.filter(pk=batch.pk, status=BatchStatus.UPLOADING).update(error=why)
        batch.refresh_from_db()
        logger.warning("batch %s: %s", batch.pk, why)
        return False
    except ServingRefused as exc:
        raise Unfit(f"The model server refused the adapter: {exc}") from exc
    result = run.result if run is not None and run.result and not external else {}
    with transaction.atomic():
        _move(batch, BatchStatus.COMPLETED, completed_at=timezone.now(), error="")
        if run is not None and not external:
            TrainedModel.objects.filter(pk=model.pk).update(run=run)
        model_life.become_ready(
            model, adapter, summary=result, notes=" ".join(_notes(batch, result, note)), by=SYSTEM, reason=f"{batch}"
        )
    runs.tidy(batch)
    return True


def adapter_folder(model: TrainedModel) -> Path:
    """Where a version's adapter lies; `adapters.place` adds the hash of its weights."""
    return Path(settings.ADAPTERS_DIR) / model.project.slug / model.version


def _ask_once(model: TrainedModel, adapter: adapters.Adapter) -> str:
    """Load the adapter, ask it something, unload it; what there is to say about that.

    Raises:
        ServingUnavailable, ServingRefused: as the driver says.
    """
    url = policies.of(model.project).serving_url or settings.MODEL_SERVER_URL
    if not url:
        return "No model server is configured: the adapter was read and checked, but never loaded."
    key, timeout = settings.MODEL_SERVER_API_KEY or None, settings.MODEL_SERVER_TIMEOUT_SECONDS
    with ModelServer(url, key, timeout=timeout) as server:
        if not server.load(model.serving_name, str(adapter.path)):
            # Left by an earlier try that was killed here, perhaps with other weights.
            server.unload(model.serving_name)
            server.load(model.serving_name, str(adapter.path))
        server.chat(model.serving_name, [{"role": "user", "content": "Hello."}], max_tokens=4)
        server.unload(model.serving_name)  # what agents are given is loaded by its deployment
    return f"Loaded by the model server at {url}, and it answers."


def _notes(batch: TrainingBatch, result: dict[str, object], served: str) -> Iterator[str]:
    if batch.off_policy:
        yield "Off-policy, uncorrected: some of what it learned from was not played by its parent."
    if batch.shuffle_rewards:
        yield "A placebo: rewards were shuffled inside each group."
    if result.get("drift_detail"):
        yield str(result["drift_detail"])
    dropped = result.get("dropped")
    for row in dropped if isinstance(dropped, list) else ():
        if row["reason"] in DROPPED:
            yield f"Without gradient: {row['count']} {DROPPED[row['reason']]}."
    yield served


def accept_external(batch: TrainingBatch, folder: Path, *, by: Actor) -> TrainedModel:
    """Take an adapter that others trained from the batch's data, instead of our own run's.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors; copied, so it may go afterwards.

    Returns:
        The batch's version: ready, or still waiting for the model server.

    Raises:
        Invalid: the files are no adapter.
        Refused: the batch is not in training.
    """
    if batch.status != BatchStatus.TRAINING:
        raise Refused(
            f"Batch {batch.batch_id} is {batch.get_status_display()}. An adapter is taken while its batch is training."
        )
    try:
        adapter = adapters.inspect(folder)
    except adapters.BadAdapter as bad:
        raise Invalid(str(bad)) from bad
    model = batch.model
    placed = adapters.place(adapter, adapter_folder(model))
    with transaction.atomic():
        _end_run(batch, by=by, reason="an adapter was sent from outside")
        _move(batch, BatchStatus.UPLOADING, by=by, reason="an adapter was sent from outside")
        TrainedModel.objects.filter(pk=model.pk).update(origin=FROM_OUTSIDE, adapter_path=str(placed.path))
    # The sweep may be at it in this very moment; the sender should hear what became of it all the same.
    until = time.monotonic() + ANSWER_WITHIN
    tend(batch)
    while batch.status == BatchStatus.UPLOADING and not batch.error and time.monotonic() < until:
        time.sleep(0.1)
        tend(batch)
        batch.refresh_from_db()
    model.refresh_from_db()
    return model


def fail(batch: TrainingBatch, why: str, *, by: Actor = SYSTEM) -> None:
    """End a batch without a model and release its trajectories. What stands in it stays, for a retry and to read."""
    try:
        _end(batch, BatchStatus.FAILED, by=by, reason=why)
    except Refused:
        return  # completed or ended meanwhile
    logger.warning("batch %s failed: %s", batch.pk, why)


def cancel(batch: TrainingBatch, *, by: Actor, reason: str = "") -> None:
    """End a live batch at a person's word; its trainer is stopped, its trajectories are free again.

    Raises:
        Refused: it is not live.
    """
    _end(batch, BatchStatus.CANCELLED, by=by, reason=reason)


def _end(batch: TrainingBatch, to: BatchStatus, *, by: Actor, reason: str) -> None:
    with transaction.atomic():
        _move(batch, to, by=by, reason=reason, error=reason)
        _end_run(batch, by=by, reason=reason)
        batch.items.update(is_active=False)
        model = TrainedModel.objects.filter(batch=batch, status=ModelStatus.TRAINING).first()
        if model is not None:
            model_life.fail(model, by=by, reason=reason or f"its batch was {to.label}")


def _end_run(batch: TrainingBatch, *, by: Actor, reason: str) -> None:
    run = batch.runs.filter(status__in=LIVE_RUN).first()
    if run is not None:
        runs.cancel(run, by=by, reason=reason)


def retry(batch: TrainingBatch, *, by: Actor, reason: str = "") -> None:
    """Try a failed batch again, with what was frozen where it was.

    Raises:
        Refused: it did not fail; another batch is live; or another one has some of its trajectories by now.
    """
    if batch.status != BatchStatus.FAILED:
        raise Refused(f"Batch {batch.batch_id} is {batch.get_status_display()}. Only a failed one can be tried again.")
    _refuse_second(batch.project)
    try:
        with transaction.atomic():
            _move(batch, BatchStatus.PENDING, by=by, reason=reason, error="")
            batch.items.filter(trajectory__isnull=False).update(is_active=True)
    except IntegrityError as exc:
        batch.refresh_from_db()
        raise Refused(
            f"Batch {batch.batch_id} cannot be tried again: another batch has some of its trajectories, or has just "
            "been started. Start a new batch."
        ) from exc


def progress(batch: TrainingBatch) -> float:
    """Share of the planned training steps that are done, 0 to 1."""
    if batch.status in (BatchStatus.UPLOADING, BatchStatus.COMPLETED):
        return 1.0
    run = batch.runs.order_by("-attempt").first()
    return runs.progress(run) if run is not None else 0.0


def eta_seconds(batch: TrainingBatch) -> float | None:
    """Seconds to the end of training at the pace of the last steps; None while there is none."""
    run = batch.runs.order_by("-attempt").first()
    return runs.eta_seconds(run) if run is not None and batch.status == BatchStatus.TRAINING else None


@contextmanager
def one_at_a_time(what: str) -> Iterator[bool]:
    """True for the one who works on `what`; it is free again when that process ends, however it does.

    An advisory lock of the database session, so it needs a connection of one's own: with PgBouncer, session pooling.
    """
    key = int.from_bytes(sha256(what.encode()).digest()[:8], "big", signed=True)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", [key])
        (mine,) = cursor.fetchone() or (False,)
    try:
        yield bool(mine)
    finally:
        if mine:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_unlock(%s)", [key])


def _move(batch: TrainingBatch, to: BatchStatus, *, by: Actor = SYSTEM, reason: str = "", **also: object) -> None:
    was = BatchStatus(batch.status)
    if to not in NEXT[was]:
        raise Refused(f"Batch {batch.batch_id} is {was.label}, so it cannot become {to.label}.")
    with transaction.atomic():
        # The WHERE repeats the status we read: of two workers that try the same move, the database lets one
        # through. A plain save() would let both.
        moved = TrainingBatch.objects.filter(pk=batch.pk, status=was).update(
            status=to, status_since=timezone.now(), **also
        )
        if not moved:
            raise Refused(f"Batch {batch.batch_id} changed while you were looking at it. Reload and try again.")
        history.record(batch, was, to, project=batch.project, by=by, reason=reason)
    batch.refresh_from_db()
