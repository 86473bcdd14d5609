from collections.abc import Iterable
from typing import TYPE_CHECKING

from django.apps import AppConfig, apps
from django.db.models.signals import post_migrate

if TYPE_CHECKING:
    from trajectories.limits import Limit


class TrainingConfig(AppConfig):
    name = "training"
    verbose_name = "Train and deploy"

    def ready(self) -> None:
        from trajectories import limits

        limits.also(_limits)
        post_migrate.connect(
            _schedule, sender=apps.get_app_config("django_celery_beat"), dispatch_uid="training.schedules"
        )


def _limits() -> "Iterable[Limit]":
    from training import limits

    return limits.listed()


def _schedule(using: str, **_: object) -> None:
    from training import schedules

    schedules.create_missing(using)
