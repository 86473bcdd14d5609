"""The life of a TrainedModel. Nothing outside this file writes its status.

training → ready → deployed → retired → deployed        ready → rejected → ready, when a person says so
training → failed → training, when its batch is tried again: one model a batch, so it keeps its version
ready | retired | rejected → archived → back to where it was
"""

from django.db import transaction
from django.utils import timezone

from training.adapters import Adapter
from training.models import ModelStatus, TrainedModel
from trajectories import history
from trajectories.errors import Refused
from trajectories.history import Actor

NEXT: dict[ModelStatus, frozenset[ModelStatus]] = {
    ModelStatus.TRAINING: frozenset({ModelStatus.READY, ModelStatus.FAILED}),
    ModelStatus.FAILED: frozenset({ModelStatus.TRAINING}),
    ModelStatus.READY: frozenset({ModelStatus.DEPLOYED, ModelStatus.REJECTED, ModelStatus.ARCHIVED}),
    ModelStatus.DEPLOYED: frozenset({ModelStatus.RETIRED}),
    ModelStatus.RETIRED: frozenset({ModelStatus.DEPLOYED, ModelStatus.ARCHIVED}),
    ModelStatus.REJECTED: frozenset({ModelStatus.READY, ModelStatus.ARCHIVED}),
    ModelStatus.ARCHIVED: frozenset(),  # only `restore` leads out, to the one place where it was
}


def become_ready(
    model: TrainedModel, adapter: Adapter, *, summary: dict[str, object], notes: str, by: Actor, reason: str = ""
) -> None:
    """The training is done and the adapter has answered."""
    _move(
        model,
        ModelStatus.READY,
        by=by,
        reason=reason,
        adapter_path=str(adapter.path),
        adapter_hash=adapter.sha256,
        adapter_bytes=adapter.n_bytes,
        summary=summary,
        notes=notes,
        ready_at=timezone.now(),
    )


def fail(model: TrainedModel, *, by: Actor, reason: str) -> None:
    _move(model, ModelStatus.FAILED, by=by, reason=reason, notes=reason)


def train_again(model: TrainedModel, *, by: Actor, reason: str = "") -> None:
    """Its batch is tried again: same version, since nothing was ever served under it."""
    _move(model, ModelStatus.TRAINING, by=by, reason=reason, notes="")


def deploy(model: TrainedModel, *, by: Actor, reason: str = "") -> None:
    """It serves now. deployments.py calls this in the transaction that opens the serving interval."""
    _move(model, ModelStatus.DEPLOYED, by=by, reason=reason)


def retire(model: TrainedModel, *, by: Actor, reason: str = "") -> None:
    """It serves nobody any more."""
    _move(model, ModelStatus.RETIRED, by=by, reason=reason)


def reject(model: TrainedModel, *, by: Actor, reason: str) -> None:
    """Not to be deployed, until someone takes that back."""
    _move(model, ModelStatus.REJECTED, by=by, reason=reason)


def take_back_rejection(model: TrainedModel, *, by: Actor, reason: str = "") -> None:
    _move(model, ModelStatus.READY, by=by, reason=reason)


def archive(model: TrainedModel, *, by: Actor, reason: str = "") -> None:
    """Out of the lists. The adapter stays, for lineage and for `restore`."""
    _move(model, ModelStatus.ARCHIVED, by=by, reason=reason, status_before_archive=model.status)


def restore(model: TrainedModel, *, by: Actor, reason: str = "") -> None:
    """Back to where it was."""
    if model.status != ModelStatus.ARCHIVED:
        raise Refused(f"{model} is {model.get_status_display()}, not archived.")
    was = ModelStatus(model.status_before_archive)
    _move(model, was, by=by, reason=reason, allowed=frozenset({was}), status_before_archive="")


def _move(
    model: TrainedModel,
    to: ModelStatus,
    *,
    by: Actor,
    reason: str = "",
    allowed: frozenset[ModelStatus] | None = None,
    **also: object,
) -> None:
    was = ModelStatus(model.status)
    if to not in (NEXT[was] if allowed is None else allowed):
        raise Refused(f"{model} is {was.label}, so it cannot become {to.label}.")
    with transaction.atomic():
        # The WHERE repeats the status we read: of two that try the same move, the database lets one through.
        moved = TrainedModel.objects.filter(pk=model.pk, status=was).update(
            status=to, status_since=timezone.now(), **also
        )
        if not moved:
            raise Refused(f"{model} changed while you were looking at it. Reload and try again.")
        history.record(model, was, to, project=model.project, by=by, reason=reason)
    model.refresh_from_db()
