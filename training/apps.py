from django.apps import AppConfig, apps
from django.db.models.signals import post_migrate


class TrainingConfig(AppConfig):
    name = "training"
    verbose_name = "Train and deploy"

    def ready(self) -> None:
        post_migrate.connect(
            _schedule, sender=apps.get_app_config("django_celery_beat"), dispatch_uid="training.schedules"
        )


def _schedule(using: str, **_: object) -> None:
    from training import schedules

    schedules.create_missing(using)
