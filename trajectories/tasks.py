"""What is done behind the write. The queue's rows say what; a message is a nudge, and the sweep looks by itself."""

from celery import shared_task

from trainingsite.celery import nudge
from trajectories import blobs, bulk_actions, bulk_export, indexing, metric_values, otlp, rewards, running
from trajectories.models import IndexingWork, Project


@shared_task(acks_late=True)
def index_project(project_id: int) -> None:
    """Fill groups, counters and call rows of what came in. Safe to run twice."""
    project = Project.objects.filter(pk=project_id).first()
    if project is not None:
        indexing.drain(project)


@shared_task(acks_late=True)
def index_waiting() -> None:
    """The sweep over all projects whose nudge got lost."""
    for project in Project.objects.filter(pk__in=IndexingWork.objects.values("project")):
        indexing.drain(project)


@shared_task(acks_late=True)
def close_groups() -> None:
    """Close groups that are idle, time out open trajectories, expire rewards that wait in vain."""
    for project in Project.objects.all():
        indexing.close_idle(project)
    running.time_out()
    rewards.expire_waiting()


@shared_task(acks_late=True)
def assemble_spans() -> None:
    """Trajectories of what came over OTLP and is quiet by now; old spans go."""
    done = otlp.sweep()
    if done.sealed:
        index_waiting()


@shared_task(acks_late=True)
def sweep_blobs() -> None:
    """Delete large parts that no trajectory holds any more, and exports that have been there long enough."""
    blobs.sweep()
    bulk_export.sweep()


@shared_task(acks_late=True)
def run_bulk_action(pk: int) -> None:
    """Some chunks of one action, then room for others. Safe to run twice."""
    if bulk_actions.run(pk):
        nudge(run_bulk_action, pk)


@shared_task(acks_late=True)
def run_bulk_actions() -> None:
    """The sweep over actions whose nudge got lost or whose worker was killed."""
    for pk in bulk_actions.live():
        bulk_actions.run(pk, seconds=5.0)


@shared_task(acks_late=True)
def list_metrics() -> None:
    """What lists are filtered by, of recordings from before it was declared. Safe to run twice."""
    for project in metric_values.unfinished():
        metric_values.look_through(project)
