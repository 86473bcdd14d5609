from collections.abc import Iterable
from typing import TYPE_CHECKING

from django.apps import AppConfig

if TYPE_CHECKING:
    from trajectories.limits import Limit


class GatewayConfig(AppConfig):
    name = "gateway"
    verbose_name = "Gateway"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from trajectories import limits

        limits.also(_limits)


def _limits() -> "Iterable[Limit]":
    from gateway import limits

    return limits.listed()
