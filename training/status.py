"""How the loop stands: what comes in, what is trained, what serves, how every part is."""

from datetime import datetime, timedelta

from django.db.models import Count, Q
from django.utils import timezone

from training import automation, policies, readiness, runs
from training.models import LIVE_BATCH, BatchStatus, ModelStatus, TrainedModel, TrainingBatch
from trainingsite import health
from trajectories.models import IndexingWork, Project, Trajectory

ENOUGH_AFTER = timedelta(days=30)  # a rate that would need longer than this for one batch is low


def of(project: Project) -> dict[str, object]:
    """The body of GET /api/v1/status/."""
    return {
        "data_collection": collection(project),
        "training": training(project),
        "models": models(project),
        "health": {name: part.row() for name, part in parts(project).items()},
        "as_of": timezone.now().isoformat(),
    }


def collection(project: Project) -> dict[str, object]:
    now = timezone.now()
    day, week = now - timedelta(days=1), now - timedelta(days=7)
    found = Trajectory.objects.filter(project=project, received_at__gte=week).aggregate(
        last_24h=Count("pk", filter=Q(received_at__gte=day)), last_7d=Count("pk")
    )
    oldest = IndexingWork.objects.filter(project=project).order_by("pk").values_list("created_at", flat=True).first()
    return {
        **found,
        "rate_per_hour": readiness.rate_per_hour(project),
        "indexing_lag_seconds": (now - oldest).total_seconds() if oldest else 0.0,
    }


def training(project: Project) -> dict[str, object]:
    mine = TrainingBatch.objects.filter(project=project).order_by("-pk")
    live = mine.filter(status__in=LIVE_BATCH).first()
    done = mine.filter(status=BatchStatus.COMPLETED).first()
    due = automation.due_at(project, policies.of(project))
    return {
        "current_batch": batch_row(live) if live else None,
        "last_completed": batch_row(done) if done else None,
        "next_scheduled": due.isoformat() if due else None,
    }


def batch_row(batch: TrainingBatch) -> dict[str, object]:
    run = batch.runs.order_by("-attempt").first()
    return {
        "batch_id": batch.batch_id,
        "status": batch.status,
        "mode": batch.mode,
        "progress": runs.progress(run) if run else 0.0,
        "eta_seconds": runs.eta_seconds(run) if run else None,
        "created_at": batch.created_at.isoformat(),
        "completed_at": _iso(batch.completed_at),
    }


def models(project: Project) -> dict[str, object]:
    mine = TrainedModel.objects.filter(project=project).order_by("-ordinal")
    return {
        "latest": _version(mine.exclude(status__in=(ModelStatus.TRAINING, ModelStatus.FAILED)).first()),
        "deployed": _version(mine.filter(status=ModelStatus.DEPLOYED).first()),
        "training": _version(mine.filter(status=ModelStatus.TRAINING).first()),
    }


def parts(project: Project) -> dict[str, health.Health]:
    """The site's parts, and whether enough comes in for this project's policy."""
    return {**health.parts(), "collection": collection_health(project)}


def collection_health(project: Project) -> health.Health:
    """Warns when at the present rate one batch would take longer than `ENOUGH_AFTER`."""
    need = policies.of(project).min_trajectories
    rate = readiness.rate_per_hour(project)
    if rate == 0.0:
        return health.Health(False, "Nothing came in during the last 7 days.")
    days = need / (24 * rate)
    detail = f"{rate:.1f} trajectories an hour; {need} for a batch take {days:.1f} days"
    return health.Health(timedelta(days=min(days, 10_000)) <= ENOUGH_AFTER, detail)


def _version(model: TrainedModel | None) -> str | None:
    return model.version if model else None


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at else None
