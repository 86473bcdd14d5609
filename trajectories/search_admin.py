"""The page that finds trajectories by what was said in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from django.contrib.admin.options import ModelAdmin
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.http import urlencode

from trajectories import listing, search_texts, searching
from trajectories.errors import Invalid
from trajectories.models import IndexingWork, Trajectory
from trajectories.project_admin import held

WAITING_UP_TO = 1_000  # of what is not indexed yet; more are "more than"


@dataclass(frozen=True)
class SearchPage:
    """What the template reads."""

    text: str
    found: searching.Found | None  # None: nothing was asked
    projects: Mapping[int, str]  # to choose from
    project: int | None
    waiting: int  # recordings that cannot be found yet
    waiting_up_to: int
    older: str  # address of the next page; "": there is none
    is_first: bool
    is_over: bool = False  # the time was up before anything was looked at
    limit: int = search_texts.LIMIT

    @property
    def is_empty_question(self) -> bool:
        return self.found is not None and not self.found.question.terms


def search_view(model_admin: "ModelAdmin[Trajectory]", request: HttpRequest) -> HttpResponse:
    """Hits newest first, with what was said around them; each page a walk within a time."""
    if not model_admin.has_view_permission(request):
        raise PermissionDenied
    page = _page(request, model_admin.get_queryset(request))
    context = {
        **model_admin.admin_site.each_context(request),
        "title": "Search in what was said",
        "opts": model_admin.opts,
        "page": page,
    }
    return TemplateResponse(request, "admin/trajectories/trajectory/search.html", context)


def _page(request: HttpRequest, rows: "QuerySet[Trajectory]") -> SearchPage:
    text = request.GET.get("q", "").replace("\x00", "")
    mine = held(request).slugs
    asked = request.GET.get("project", "")
    project = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 19 and int(asked) in mine else None
    projects: Sequence[int] = [project] if project is not None else list(mine)
    waiting = IndexingWork.objects.filter(project__in=projects)[: WAITING_UP_TO + 1].count()
    found, is_over, cursor = None, False, None
    if text.strip():
        if request.GET.get("p"):
            try:
                cursor = listing.decode(request.GET["p"], listing.NEWEST, Trajectory)
            except Invalid:
                cursor = None
        chosen = rows.filter(project__in=projects).select_related("agent", "scenario", "project")
        try:
            found = searching.search(chosen, text, cursor, projects=projects)
        except listing.TimeIsUp:
            is_over = True
    older = ""
    if found is not None and found.next is not None:
        told = {"q": text, "p": found.next} | ({"project": str(project)} if project is not None else {})
        older = "?" + urlencode(told)
    return SearchPage(
        text=text,
        found=found,
        projects=mine if len(mine) > 1 else {},
        project=project,
        waiting=waiting,
        waiting_up_to=WAITING_UP_TO,
        older=older,
        is_first=cursor is None,
        is_over=is_over,
    )
