"""What workers do. A task looks up, calls one function, and knows nothing more; a lost one is sent again by the beat.

How often is in the database (admin: periodic tasks), where schedules.py puts the defaults.
"""

from celery import shared_task

from training import automation, batches, boards, deployments, evaluation, reconcile
from training.models import Deployment, Evaluation, TrainingBatch
from trajectories.models import Project


@shared_task
def tend_batch(batch_id: int) -> None:
    """Take one batch as far as it can go. Safe to run twice, and beside the sweep."""
    batch = TrainingBatch.objects.select_related("project", "parent").filter(pk=batch_id).first()
    if batch is not None:
        batches.tend(batch)


@shared_task
def tend_batches() -> None:
    """The same for all live ones: watches runs, and finds what a lost message left behind."""
    automation.tend_batches()


@shared_task
def start_due() -> None:
    """Start a batch where one is due and the project is ready."""
    for batch in automation.start_due():
        batches.tend(batch)


@shared_task
def judge_groups() -> None:
    """Judge closed groups."""
    automation.judge_groups()


@shared_task
def snapshot_readiness() -> None:
    """Keep what the readiness checks say now."""
    automation.snapshot_readiness()


@shared_task
def take_board(project_id: int) -> None:
    """Keep how one project stands, for the first page: somebody looks at it, and the last look is old."""
    for project in Project.objects.filter(pk=project_id):
        boards.take(project)


@shared_task
def take_boards() -> None:
    """The same for every project."""
    boards.take_all()


@shared_task
def advance_evaluation(evaluation_id: int) -> None:
    """Take one evaluation as far as it can go now. Safe to run twice."""
    rows = Evaluation.objects.select_related("project", "candidate", "baseline").filter(pk=evaluation_id)
    for one in rows:
        evaluation.advance(one)


@shared_task
def advance_evaluations() -> None:
    """The same for all under way: finishes those whose attempts are in, fails those whose time is up."""
    evaluation.advance_all()


@shared_task
def roll_out(deployment_id: int) -> None:
    """Bring one approved version to its agents. Safe to run twice; a model server that is away is left to the sweep."""
    rows = Deployment.objects.select_related("project", "model").filter(pk=deployment_id)
    for one in rows:
        deployments.roll_out_if_possible(one)


@shared_task
def roll_out_waiting() -> None:
    """The same for all that are approved and do not serve yet."""
    deployments.roll_out_waiting()


@shared_task
def reconcile_servers() -> None:
    """Load on each model server what should be there, unload what should not."""
    reconcile.reconcile_all()
