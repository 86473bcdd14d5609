"""The admin as this site shows it: its first page is the loop with its numbers."""

from django.contrib.admin import AdminSite
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, URLResolver, path

MOST_PROJECTS = 12


class TrainingsiteAdminSite(AdminSite):
    site_header = "Trainingsite"
    site_title = "Trainingsite"
    index_title = "Record · Judge · Train · Deploy · Operate"
    enable_nav_sidebar = True

    def index(self, request: HttpRequest, extra_context: dict[str, object] | None = None) -> TemplateResponse:
        return super().index(request, {**(extra_context or {}), "board": self._board(request)})

    def get_app_list(self, request: HttpRequest, app_label: str | None = None) -> list[dict[str, object]]:
        """In the order of the loop; what runs the site comes last."""
        found = super().get_app_list(request, app_label)
        order = {"trajectories": 0, "training": 1}
        return sorted(found, key=lambda app: order.get(str(app["app_label"]), 2))

    def get_urls(self) -> list[URLPattern | URLResolver]:
        return [path("dashboard/", self.admin_view(self.dashboard), name="dashboard"), *super().get_urls()]

    def dashboard(self, request: HttpRequest) -> HttpResponse:
        """The part of the first page that htmx asks for again."""
        return TemplateResponse(request, "admin/dashboard.html", {"board": self._board(request)})

    def _board(self, request: HttpRequest) -> object:
        from training import pages
        from trainingsite import health
        from trajectories import rights

        projects = list(rights.projects(request.user).order_by("-pk")[:MOST_PROJECTS])
        return pages.dashboard(projects, health.parts())
