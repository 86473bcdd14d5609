"""What happens by itself, step by step: each a plain function that beat, the API, a page or a command may call.

Each may run twice, at once, and be killed anywhere: the rows say what is to be done. One project's trouble never
costs another its turn.
"""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial

from django.db import InterfaceError, OperationalError
from django.utils import timezone

from training import batches, judging, policies, readiness
from training.models import LIVE_BATCH, BatchStatus, TrainingBatch, TrainingPolicy
from trajectories.errors import Refused
from trajectories.history import SYSTEM
from trajectories.models import Project

logger = logging.getLogger(__name__)


def judge_groups() -> None:
    """Ask the judges about closed groups, where the policy says so; again about those that failed and are due.

    A slow judge keeps one worker busy at most: the others have batches to look after.
    """
    with batches.one_at_a_time("judging") as mine:
        if mine:
            for_each_project("judging", _judge)


def _judge(project: Project) -> None:
    if policies.of(project).auto_judge:
        judging.judge_due(project)


def snapshot_readiness() -> None:
    """Keep what the checks say now, for pages, trends and the forecast."""
    for_each_project("readiness", readiness.snapshot)


def start_due() -> list[TrainingBatch]:
    """Start a batch in each project that trains by itself, is due, and is ready."""
    started: list[TrainingBatch] = []

    def start(project: Project) -> None:
        batch = start_if_due(project)
        if batch is not None:
            started.append(batch)

    for_each_project("starting a batch", start)
    return started


def start_if_due(project: Project) -> TrainingBatch | None:
    """The batch that was started; None when the project does not train by itself, is not due, or not ready."""
    policy = policies.of(project)
    due = due_at(project, policy)
    if due is None or due > timezone.now():
        return None
    if not readiness.check(project).ready:
        return None
    try:
        return batches.trigger(project, batches.Wish(purpose="by schedule"), by=SYSTEM)
    except Refused as refusal:
        logger.info("project %s: due and ready, but no batch was started: %s", project, refusal)
        return None


def due_at(project: Project, policy: TrainingPolicy) -> datetime | None:
    """When the next batch may start by itself; None when the project does not train by itself, or trains already.

    Counted from the last batch that was asked for, whatever became of it: one that failed is not started over and
    over.
    """
    if not policy.auto_trigger or TrainingBatch.objects.filter(project=project, status__in=LIVE_BATCH).exists():
        return None
    last = TrainingBatch.objects.filter(project=project).exclude(status=BatchStatus.CANCELLED).order_by("-pk").first()
    if last is None:
        return timezone.now()
    return last.created_at + timedelta(hours=policy.training_interval_hours)


def tend_batches() -> None:
    """Take every live batch as far as it can go: judge, start and watch runs, publish. Also the sweep for lost work."""
    for batch in TrainingBatch.objects.filter(status__in=LIVE_BATCH).select_related("project", "parent").order_by("pk"):
        _guarded(f"batch {batch.pk}", partial(batches.tend, batch))


def for_each_project(what: str, step: Callable[[Project], object]) -> None:
    """One project's fault is logged and costs no other its turn."""
    for project in Project.objects.order_by("pk").iterator(chunk_size=200):
        _guarded(f"{what}, project {project}", partial(step, project))


def _guarded(what: str, step: Callable[[], object]) -> None:
    try:
        step()
    except (OperationalError, InterfaceError):
        raise  # the database is away: everyone's turn is over
    except Exception:
        logger.exception("%s: a fault; the next turn tries again", what)
