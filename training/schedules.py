"""The default periodic tasks: put into the database once, then edited in the admin and never overwritten."""

from dataclasses import dataclass

from django.db import connections, transaction
from django_celery_beat.models import IntervalSchedule, PeriodicTask


@dataclass(frozen=True)
class Schedule:
    name: str  # of the row; by it a default is known to be there already
    task: str
    seconds: int
    what: str


# A task that is switched off in the admin stays off; one that is deleted comes back with the next `migrate`.
DEFAULTS = (
    Schedule("Index recordings", "trajectories.tasks.index_waiting", 5, "Groups, counters and calls of what came in."),
    Schedule("Close groups", "trajectories.tasks.close_groups", 60, "Idle groups, open trajectories, waiting rewards."),
    Schedule("Assemble spans", "trajectories.tasks.assemble_spans", 2, "Trajectories of what came over OTLP."),
    Schedule("Sweep blobs", "trajectories.tasks.sweep_blobs", 1800, "Large parts that no trajectory holds any more."),
    Schedule("Run bulk actions", "trajectories.tasks.run_bulk_actions", 15, "What was begun for many and not ended."),
    Schedule(
        "List metrics", "trajectories.tasks.list_metrics", 60, "Metrics that a project lists, of older recordings."
    ),
    Schedule("Judge groups", "training.tasks.judge_groups", 20, "Ask the judges about closed groups."),
    Schedule("Snapshot readiness", "training.tasks.snapshot_readiness", 300, "Keep what the checks say."),
    Schedule("Take boards", "training.tasks.take_boards", 20, "Keep what the first page shows of each project."),
    Schedule("Start due batches", "training.tasks.start_due", 60, "Train where a project is ready and due."),
    Schedule("Tend batches", "training.tasks.tend_batches", 5, "Watch runs, publish, take up what was lost."),
    Schedule("Advance evaluations", "training.tasks.advance_evaluations", 10, "Finish those whose attempts are in."),
    Schedule("Roll out", "training.tasks.roll_out_waiting", 10, "Bring approved versions to their agents."),
    Schedule("Reconcile model servers", "training.tasks.reconcile_servers", 10, "Load what should be there."),
)


def create_missing(using: str = "default") -> list[str]:
    """Put the defaults in that are not there yet; the names of those."""
    if PeriodicTask._meta.db_table not in connections[using].introspection.table_names():
        return []  # migrated back to zero
    with transaction.atomic(using):
        names = [one.name for one in DEFAULTS]
        there = set(PeriodicTask.objects.using(using).filter(name__in=names).values_list("name", flat=True))
        missing = [one for one in DEFAULTS if one.name not in there]
        for one in missing:
            same = IntervalSchedule.objects.using(using).filter(every=one.seconds, period=IntervalSchedule.SECONDS)
            interval = same.order_by("pk").first() or same.create(every=one.seconds, period=IntervalSchedule.SECONDS)
            PeriodicTask.objects.using(using).create(
                name=one.name,
                task=one.task,
                interval=interval,
                description=one.what,
                # Messages that no worker took in time are worth nothing: the next one says the same.
                expire_seconds=max(30, one.seconds),
            )
    return [one.name for one in missing]
