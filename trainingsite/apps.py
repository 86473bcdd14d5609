"""The site as an app (its commands, checks) and the admin it uses."""

from django.apps import AppConfig
from django.contrib.admin.apps import AdminConfig


class SiteConfig(AppConfig):
    name = "trainingsite"
    label = "trainingsite"

    def ready(self) -> None:
        from trainingsite import checks, openapi  # noqa: F401  (importing registers the checks, and how keys are told)


class TrainingsiteAdminConfig(AdminConfig):
    default_site = "trainingsite.admin_site.TrainingsiteAdminSite"
