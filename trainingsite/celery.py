"""Celery, and the one way to wake it: `nudge`.

The row says what is to be done; a message only says "look now". A message that is lost is sent again by
the sweep, one that comes twice finds the work done.
"""

import logging
import os
import threading
import time
from typing import Protocol

from celery import Celery, signals
from django.db import transaction

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "trainingsite.settings")

logger = logging.getLogger(__name__)

app = Celery("trainingsite")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()

_quiet_until = threading.local()
_seen_at = 0.0

SEEN_EVERY = 10.0  # seconds between two notes that a worker works


@signals.task_postrun.connect(weak=False)
def _note_that_a_worker_works(**kwargs: object) -> None:
    """For the health page; a broker that is away keeps no note and costs nothing else."""
    global _seen_at
    if time.monotonic() - _seen_at > SEEN_EVERY:
        from trainingsite import health

        health.saw_worker()
        _seen_at = time.monotonic()


class Sendable(Protocol):
    """What `nudge` needs of a task."""

    name: str


def nudge(task: Sendable, *args: int | str) -> None:
    """Ask a worker to look at a row once this transaction has committed.

    Never raises and never waits long: a broker that is away costs at most one short connection attempt, and
    none for the next five seconds after a failed one. The sweep sends what got lost.
    """
    transaction.on_commit(lambda: _send(task.name, args), robust=True)


def _send(name: str, args: tuple[int | str, ...]) -> None:
    if time.monotonic() < getattr(_quiet_until, "at", 0.0):
        return
    try:
        app.send_task(name, args=args, retry=False, ignore_result=True)
    except Exception as exc:  # whatever a broker that is away raises, the row is the queue
        _quiet_until.at = time.monotonic() + 5.0
        logger.warning("broker away, %s%s waits for the sweep: %s", name, args, exc)
