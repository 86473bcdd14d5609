"""v1.0.9 → v1.0.10: which version comes next, and giving it to a batch."""

from django.db import transaction

from training import policies
from training.models import TrainedModel, TrainingBatch
from trajectories.models import KnownVersion, Project

FIRST = (1, 0, 0)


def next_numbers(project: Project) -> tuple[int, int, int]:
    """Major, minor and patch of the project's next version: the highest patch plus one, compared as numbers."""
    newest = (
        TrainedModel.objects.filter(project=project)
        .order_by("-major", "-minor", "-patch")
        .values_list("major", "minor", "patch")
        .first()
    )
    return FIRST if newest is None else (newest[0], newest[1], newest[2] + 1)


def next_version(project: Project) -> str:
    """The same as text: "v1.0.0" when there is none."""
    return "v" + ".".join(str(number) for number in next_numbers(project))


@transaction.atomic
def allocate(batch: TrainingBatch, *, origin: str = "trained") -> TrainedModel:
    """Make the batch's version, in state training; ingestion knows it from this transaction on.

    Two that allocate in one project at once wait for each other; a number that a failed training has used is not
    used again.
    """
    project = Project.objects.select_for_update(no_key=True).get(pk=batch.project_id)
    major, minor, patch = next_numbers(project)
    version = f"v{major}.{minor}.{patch}"
    last = TrainedModel.objects.filter(project=project).order_by("-ordinal").values_list("ordinal", flat=True).first()
    model = TrainedModel.objects.create(
        project=project,
        version=version,
        major=major,
        minor=minor,
        patch=patch,
        ordinal=(last or 0) + 1,
        parent=batch.parent,
        batch=batch,
        origin=origin,
        mode=batch.mode,
        off_policy=batch.off_policy,
        base_model=batch.base_model,
        serving_name=policies.of(project).served_name(version),
    )
    KnownVersion.objects.create(
        project=project,
        version=version,
        serving_name=model.serving_name,
        ordinal=model.ordinal,
        base_model=model.base_model,
    )
    return model
