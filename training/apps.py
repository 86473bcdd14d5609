from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from django.apps import AppConfig, apps
from django.db.models.signals import post_migrate

if TYPE_CHECKING:
    from trajectories.limits import Limit


class TrainingConfig(AppConfig):
    name = "training"
    verbose_name = "Train and deploy"

    def ready(self) -> None:
        from trajectories import archive, limits

        limits.also(_limits)
        archive.also_asks(_needed)
        _offer_judging()
        _offer_use()
        post_migrate.connect(
            _schedule, sender=apps.get_app_config("django_celery_beat"), dispatch_uid="training.schedules"
        )


def _limits() -> "Iterable[Limit]":
    from training import limits

    return limits.listed()


def _needed(trajectories: Sequence[int]) -> Mapping[int, str]:
    from training import lineage

    return lineage.why_needed(trajectories)


def _offer_judging() -> None:
    from trajectories import bulk_actions
    from trajectories.models import Role

    def judge(chunk: bulk_actions.Chunk) -> bulk_actions.Refusals:
        from training import judging

        return judging.judge_many(chunk)

    bulk_actions.register(
        bulk_actions.Kind(
            "judge",
            "Judge again",
            "waiting for their judges",
            Role.RESEARCHER,
            judge,
            warning="Each group of these is asked about once more. What was said before stays in its history.",
            of_groups=True,
            rows=200,
        )
    )


def _offer_use() -> None:
    from django.db.models import Exists, OuterRef, Q

    from trajectories import filters

    def holds() -> Q:
        from training.models import BatchItem

        return Q(Exists(BatchItem.objects.filter(trajectory=OuterRef("pk"), is_active=True)))

    filters.also("What it is for", filters.Field("in a batch", (filters.flagged("used", holds),)))


def _schedule(using: str, **_: object) -> None:
    from training import schedules

    schedules.create_missing(using)
