"""What agents did, as researchers see it."""

import json
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import msgspec
from django.contrib import admin, messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import transaction
from django.db.models import Model, QuerySet
from django.forms import ModelForm
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect, QueryDict
from django.http.response import HttpResponseBase
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone

from trajectories import (
    archive,
    auth,
    blobs,
    bulk_admin,
    census,
    columns,
    export,
    history,
    indexing,
    listing,
    otlp,
    people,
    pressure,
    quality,
    redaction,
    rights,
    search_admin,
    segments,
    transcripts,
)
from trajectories.api import export_response
from trajectories.errors import Invalid, Problem, Refused
from trajectories.history import Actor
from trajectories.listing import Ordering, by_age, by_column
from trajectories.models import (
    Agent,
    ApiKey,
    Blob,
    BlobUse,
    LlmCallLog,
    Membership,
    OtelRecord,
    Project,
    RewardChange,
    Role,
    Scenario,
    SharedText,
    SpanState,
    State,
    StateChange,
    Tombstone,
    Trajectory,
)
from trajectories.payloads import LlmCallPayload, Message, StepPayload
from trajectories.project_admin import Ask, ProjectAdmin, Verb, held, one_of

LONG = 1_500  # characters; a longer text is folded
STEPS_A_PAGE = 40


# --- a trajectory's page -------------------------------------------------------------------------------------------


RASTER = ("image/png", "image/jpeg", "image/gif", "image/webp")  # shown; an SVG may hold scripts and is only handed out


@dataclass(frozen=True)
class Line:
    """One thing that was said or done, as the page shows it."""

    role: str
    text: str
    note: str = ""  # model, tokens, tool name
    is_context: bool = False
    blobs: Sequence["BlobView"] = ()  # large parts of it, which lie elsewhere

    def __post_init__(self) -> None:
        """A NUL in HTML is shown by no browser; its picture is."""
        for name in ("role", "text", "note"):
            if "\x00" in (words := getattr(self, name)):
                object.__setattr__(self, name, words.replace("\x00", "\u2400"))

    @property
    def is_long(self) -> bool:
        return len(self.text) > LONG or self.text.count("\n") > 24

    @property
    def start(self) -> str:
        return self.text[:200]


@dataclass(frozen=True)
class BlobView:
    """A large part: its beginning, and where to get the whole."""

    row: Blob
    url: str

    @property
    def sha256(self) -> str:
        return bytes(self.row.content_hash).hex()

    @property
    def is_picture(self) -> bool:
        return self.row.media_type in RASTER


@dataclass(frozen=True)
class StepView:
    number: int
    timestamp: object
    lines: Sequence[Line]
    reward: float | None


@dataclass(frozen=True)
class UseView:
    """One use in a batch, whose numbers were frozen."""

    row: object
    was: float | None  # recorded reward in the batch; None too where it did not count
    changed: bool  # and is another now


def _use(row: object, reward: float | None) -> UseView:
    parts = getattr(row, "parts", None)
    recorded = parts.get("recorded") if isinstance(parts, dict) else None
    if not isinstance(recorded, dict):
        return UseView(row, None, False)
    return UseView(row, recorded.get("raw"), recorded.get("raw") != reward)


@dataclass(frozen=True)
class TrajectoryPage:
    """Some steps of a conversation with everything that is said about it."""

    steps: Sequence[StepView]
    first: int
    last: int
    total: int
    previous: int | None  # first step of the part before
    next: int | None
    closing: Sequence[Line] = ()
    judgments: Sequence[object] = ()
    uses: Sequence["UseView"] = ()
    is_live: bool = False  # more steps may come at its end
    rewards: Sequence[RewardChange] = ()
    redactions: Sequence[object] = ()
    checks: Sequence[quality.Check] = ()
    missing: str = ""
    tools: str = ""
    metadata: Line | None = None
    calls: Sequence[LlmCallLog] = field(default_factory=list)

    @property
    def after(self) -> int:
        """Number of the first step that is not shown."""
        return self.last + 1


def trajectory_page(trajectory: Trajectory, start: int) -> TrajectoryPage:
    """The steps from `start` on, `STEPS_A_PAGE` of them."""
    page = _around(trajectory)
    try:
        payload = segments.load(trajectory, open_blobs=False)
    except Exception as exc:  # a page that says what is wrong with a payload is worth more than an error page
        return replace(page, missing=f"The payload cannot be read: {exc}")
    total = len(payload.steps)
    start = max(0, min(start, max(0, total - 1)))
    end = min(total, start + STEPS_A_PAGE)
    shown = payload.steps[start:end]
    prompts = transcripts.prompts(payload)
    position = sum(len(step.llm_calls) for step in payload.steps[:start])
    shows = _Blobs(trajectory, payload.marks)
    steps = []
    for number, step in enumerate(shown, start=start):
        said = prompts[position - 1] if position else ()
        steps.append(StepView(number, step.timestamp, shows.all(_lines(step, prompts, position, said)), step.reward))
        position += len(step.llm_calls)
    return replace(
        page,
        steps=steps,
        first=start,
        last=end - 1,
        total=total,
        previous=max(0, start - STEPS_A_PAGE) if start else None,
        next=end if end < total else None,
        closing=shows.all([_message(one) for one in payload.closing_messages]) if end == total else (),
        is_live=trajectory.state == State.OPEN and end == total,
        checks=quality.checks(
            census.of(payload), trajectory.final_status, quality.weights_of(trajectory.project.quality_weights)
        ),
        tools=_pretty(payload.tools) if payload.tools else "",
        metadata=shows.one(Line("", _pretty(payload.metadata))) if payload.metadata else None,
    )


def _around(trajectory: Trajectory) -> TrajectoryPage:
    """What is said beside the conversation; it needs no payload."""
    return TrajectoryPage(
        steps=(),
        first=0,
        last=-1,
        total=trajectory.n_steps,
        previous=None,
        next=None,
        judgments=list(trajectory.judgments.select_related("judge_call").order_by("-is_current", "-pk")[:50]),
        uses=[
            _use(one, trajectory.reward)
            for one in trajectory.batch_items.select_related("batch", "batch__model").order_by("-pk")[:20]
        ],
        rewards=list(trajectory.reward_changes.order_by("-pk")[:20]),
        redactions=list(trajectory.redactions.order_by("rule")),
    )


class _Blobs:
    """Puts the previews of large parts in the places of their marks."""

    def __init__(self, trajectory: Trajectory, marks: Mapping[str, int]) -> None:
        self.marks = marks
        rows = Blob.objects.in_bulk(set(marks.values())) if marks else {}
        self.views = {
            pk: BlobView(row, reverse("admin:trajectories_trajectory_blob", args=[trajectory.pk, pk]))
            for pk, row in rows.items()
        }

    def all(self, lines: Sequence[Line]) -> Sequence[Line]:
        return [self.one(line) for line in lines] if self.marks else lines

    def one(self, line: Line) -> Line:
        held = {mark: pk for mark, pk in self.marks.items() if mark in line.text}
        if not held:
            return line
        text = line.text
        for mark in sorted(held, key=len, reverse=True):  # mark:1 is the beginning of mark:12
            view = self.views.get(held[mark])
            text = text.replace(mark, f"{view.row.preview} …" if view else "(a part that is lost)")
        views = [self.views[pk] for pk in dict.fromkeys(held.values()) if pk in self.views]
        return replace(line, text=text, blobs=views)


def _lines(
    step: StepPayload, prompts: Sequence[Sequence[Message]], position: int, before: Sequence[Message]
) -> list[Line]:
    lines: list[Line] = []
    if step.environment_state:
        lines.append(Line("environment", _pretty(step.environment_state)))
    for access in step.provider_accesses:
        lines.append(Line("provider", _pretty(access.data), f"{access.provider_name} {access.purpose or ''}".strip()))
    for offset, call in enumerate(step.llm_calls):
        prompt = prompts[position + offset]
        known = len(prompts[position + offset - 1]) + 1 if position + offset else 0
        fresh = prompt[known:] if 0 < known <= len(prompt) else prompt
        lines += [_message(one) for one in fresh]
        lines += _answer(call)
    action = step.action
    if action is not None:
        said = {"parameters": action.parameters, "result": action.result, "error": action.error}
        told = {key: value for key, value in said.items() if value not in (None, {}, "")}
        results = [
            Line("tool", _text(one.result if one.error is None else one.error), "result") for one in action.calls
        ]
        outcome = "" if action.success is None else (" (succeeded)" if action.success else " (failed)")
        lines.append(Line("action", _pretty(told) if told else "", f"{action.action_type}{outcome}"))
        lines += results
    return lines


def _answer(call: LlmCallPayload) -> list[Line]:
    tokens = f", {call.completion_tokens} tokens" if call.completion_tokens else ""
    latency = f", {call.latency_ms:.0f} ms" if call.latency_ms is not None else ""
    temperature = f", T={call.temperature:g}" if call.temperature is not None else ""
    note = f"{call.model_version or call.model or 'model not named'}{temperature}{tokens}{latency}"
    lines = []
    if call.reasoning:
        lines.append(Line("reasoning", call.reasoning, note))
    answer = transcripts.answer_of(call)
    text = transcripts.text_of(answer) if answer else ""
    if text or not call.tool_calls:
        lines.append(Line("assistant", text, note, is_context=call.trainable is False))
    called = answer.get("tool_calls") if answer else None
    lines += [_tool_call(one, note) for one in called] if isinstance(called, list) else []
    if call.error is not None:
        lines.append(Line("error", _text(call.error), note))
    return lines


def _tool_call(one: object, note: str) -> Line:
    function = one.get("function") if isinstance(one, dict) else None
    if not isinstance(function, dict):
        return Line("call", _pretty(one), note)
    arguments = function.get("arguments")
    try:
        told = _pretty(json.loads(arguments)) if isinstance(arguments, str) else _pretty(arguments)
    except ValueError:
        told = str(arguments)
    return Line("call", told, f"calls {function.get('name')}")


def _message(message: Message) -> Line:
    role = str(message.get("role") or "message")
    text = transcripts.text_of(message)
    if not text and message.get("tool_calls"):
        text = _pretty(message["tool_calls"])
    return Line(role, text, str(message.get("name") or ""), is_context=role == "assistant")


def _text(value: object) -> str:
    return value if isinstance(value, str) else _pretty(value)


def _pretty(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=2, default=str)
    except (TypeError, ValueError):
        return str(value)


def _number(text: str) -> int:
    """Of a step, as an address has it; 0 for what is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _exclude(row: Trajectory, by: Actor, form: QueryDict) -> str:
    return _mark(row, by, form.get("reason", ""), excluded=True)


def _include(row: Trajectory, by: Actor, form: QueryDict) -> str:
    return _mark(row, by, form.get("reason", ""), excluded=False)


def _mark(row: Trajectory, by: Actor, reason: str, *, excluded: bool) -> str:
    """Keep one attempt out of (or let it back into) groups' baselines, batches and counts."""

    with transaction.atomic():
        changed = Trajectory.objects.filter(pk=row.pk, is_excluded=not excluded).update(is_excluded=excluded)
        if not changed:
            raise Refused(f"{row} is {'excluded' if excluded else 'included'} already. Reload the page.")
        names = ("included", "excluded") if excluded else ("excluded", "included")
        history.record(row, *names, project=row.project, by=by, reason=reason, field="is_excluded")
        indexing.touch(row.project, [row.group_id])
    return f"{row} is {'excluded' if excluded else 'included again'}."


def _archive(row: Trajectory, by: Actor, form: QueryDict) -> str:
    archive.archive(row, by=by, reason=form.get("reason", ""), even_if_needed=bool(form.get("even_if_needed")))
    indexing.touch(row.project, [row.group_id])
    return f"The payload of {row} is in the archive; this page opens it on demand."


def _restore(row: Trajectory, by: Actor, form: QueryDict) -> str:
    archive.restore(row, by=by, reason=form.get("reason", ""))
    indexing.touch(row.project, [row.group_id])
    return f"{row} is back from the archive."


class RewardFilter(admin.SimpleListFilter):
    title = "reward"
    parameter_name = "reward_is"
    CHOICES: ClassVar[dict[str, tuple[str, dict[str, float | bool]]]] = {
        "unknown": ("unknown", {"reward__isnull": True}),
        "negative": ("below 0", {"reward__lt": 0}),
        "zero": ("0", {"reward": 0}),
        "part": ("between 0 and 1", {"reward__gt": 0, "reward__lt": 1}),
        "one": ("1 and above", {"reward__gte": 1}),
    }

    def lookups(self, request: HttpRequest, model_admin: object) -> list[tuple[str, str]]:
        return [(key, label) for key, (label, _) in self.CHOICES.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Trajectory]) -> QuerySet[Trajectory]:
        chosen = self.CHOICES.get(self.value() or "")
        return queryset.filter(**chosen[1]) if chosen else queryset


class MyProjectsFilter(admin.SimpleListFilter):
    """Offered when there is a choice; from the user's own projects, never by DISTINCT over a big table."""

    title = "project"
    parameter_name = "project"

    def __init__(
        self,
        request: HttpRequest,
        params: dict[str, list[str]],
        model: type[Model],
        model_admin: ProjectAdmin[Model],
    ) -> None:
        self.project_path = model_admin.project_path
        super().__init__(request, params, model, model_admin)

    def lookups(self, request: HttpRequest, model_admin: object) -> list[tuple[str, str]]:
        mine = held(request).slugs
        return [(str(pk), slug) for pk, slug in list(mine.items())[:100]] if len(mine) > 1 else []

    def has_output(self) -> bool:
        return bool(self.lookup_choices) or self.value() is not None

    def queryset(self, request: HttpRequest, queryset: QuerySet[Model]) -> QuerySet[Model]:
        value = self.value()
        if not value:
            return queryset
        if not (value.isascii() and value.isdigit() and int(value) in held(request).slugs):
            raise IncorrectLookupParameters(Invalid("There is no such project among yours."))
        return queryset.filter(**{self.project_path: int(value)})


@admin.register(Trajectory)
class TrajectoryAdmin(ProjectAdmin[Trajectory]):
    list_display = (
        "trajectory_id",
        "agent",
        "scenario",
        "reward_shown",
        "final_status_chip",
        "steps_number",
        "behaviour",
        "fidelity_chip",
        "quality_shown",
        "received",
    )
    list_select_related = ("agent", "scenario")
    list_filter = (
        MyProjectsFilter,
        "final_status",
        RewardFilter,
        "fidelity",
        "origin",
        "is_evaluation",
        "is_excluded",
        "state",
    )
    search_fields = ("trajectory_id__startswith", "scenario__scenario_id__startswith")
    search_help_text = "the beginning of a trajectory id or a scenario id"
    ordering = ("-id",)
    orderings = (*by_age(), *by_column("reward", "reward", column="reward_shown"))
    empty = "Send some: docs/http-api.md says how."
    payload_columns = ("metrics", "findings", "reward_components", "content_hash", "twin_hash")
    verbs = (
        Verb(
            "exclude",
            "Exclude",
            Role.RESEARCHER,
            _exclude,
            when=lambda row: not row.is_excluded,
            warning="It leaves its group's baseline and every later batch. Batches that are frozen keep it.",
        ),
        Verb("include", "Include again", Role.RESEARCHER, _include, when=lambda row: row.is_excluded),
        Verb(
            "archive",
            "Archive",
            Role.OPERATOR,
            _archive,
            when=lambda row: row.archived_at is None,
            needs_reason=False,
            warning="The payload moves to the archive storage; the row and this page stay.",
            asks=(Ask("even_if_needed", "Even if a live version learned from it", "checkbox"),),
        ),
        Verb(
            "restore",
            "Restore from archive",
            Role.OPERATOR,
            _restore,
            when=lambda row: row.archived_at is not None,
            needs_reason=False,
        ),
    )

    final_status_chip = columns.chip("final_status", "ended")
    fidelity_chip = columns.chip("fidelity", "fidelity")
    steps_number = columns.number("n_steps", "steps")

    @admin.display(description="reward", ordering="reward")
    def reward_shown(self, row: Trajectory) -> str:
        return "unknown" if row.reward is None else f"{row.reward:g}"

    @admin.display(description="quality")
    def quality_shown(self, row: Trajectory) -> str:
        return f"{row.quality:.0%}"

    def live_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """What came since step `after` of a trajectory that runs; htmx asks for it. 204: nothing."""
        row = self.get_object(request, object_id)
        if row is None or not self.has_view_permission(request, row):
            raise Http404
        after = _number(request.GET.get("after", "0"))
        if row.state == State.OPEN and row.n_steps <= after:
            return HttpResponse(status=204)
        context = {"original": row, "page": trajectory_page(row, after), "after": after, "is_fragment": True}
        return TemplateResponse(request, "admin/trajectories/trajectory/live.html", context)

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.blob_view)
        live = self.admin_site.admin_view(self.live_view)
        out = self.admin_site.admin_view(self.export_view)
        return [
            path("export/", out, name="trajectories_trajectory_export"),
            path("search/", self.admin_site.admin_view(self.search_view), name="trajectories_trajectory_search"),
            path("<path:object_id>/blob/<int:blob>/", view, name="trajectories_trajectory_blob"),
            path("<path:object_id>/live/", live, name="trajectories_trajectory_live"),
            *super().get_urls(),
        ]

    def search_view(self, request: HttpRequest) -> HttpResponse:
        return search_admin.search_view(self, request)

    def export_view(self, request: HttpRequest) -> HttpResponseBase:
        """What the list shows under these filters, all its pages, as a file: which format is asked first."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        try:
            rows = self.get_changelist_instance(request).get_queryset(request).select_related(None).order_by()
        except IncorrectLookupParameters:
            return HttpResponseRedirect(reverse("admin:trajectories_trajectory_changelist"))
        if request.method == "POST":
            told = {name: str(request.POST.get(name, "")) for name in ("format", "margin", "unreadable")}
            try:
                return export_response(rows, export.asked(rows, told), "trajectories")
            except Problem as problem:
                self.message_user(request, str(problem), messages.ERROR)
        context = {
            **self.admin_site.each_context(request),
            "title": "Export trajectories",
            "opts": self.opts,
            "count": rows[: listing.COUNT_UP_TO + 1].count(),
            "most": listing.COUNT_UP_TO,
            "formats": export.FORMATS.items(),
            "chosen": request.POST.get("format", "native"),
            "margin": request.POST.get("margin", "0"),
        }
        return TemplateResponse(request, "admin/trajectories/trajectory/export.html", context)

    def blob_view(self, request: HttpRequest, object_id: str, blob: int) -> HttpResponse:
        """A large part of a trajectory as a file, for those who may see the trajectory."""
        row = self.get_object(request, object_id)
        if row is None or not self.has_view_permission(request, row):
            raise Http404
        uses = BlobUse.objects.filter(trajectory_ref=row.trajectory_id, content_hash=bytes(row.content_hash))
        found = Blob.objects.filter(pk=blob, project=row.project_id, pk__in=uses.values("blob")).first()
        if found is None:
            raise Http404
        try:
            media_type, raw = blobs.file_of(found, blobs.read(found))
        except Problem as problem:
            return HttpResponse(str(problem), status=problem.status, content_type="text/plain; charset=utf-8")
        suffix = mimetypes.guess_extension(media_type.partition(";")[0]) or ".bin"
        return HttpResponse(
            raw,
            content_type=media_type if media_type in RASTER or found.kind == "json" else "application/octet-stream",
            headers={
                "Content-Disposition": f'attachment; filename="blob-{found.pk}{suffix}"',
                "Content-Security-Policy": "default-src 'none'; sandbox",
                "Cache-Control": "private, max-age=3600",
            },
        )

    def page(self, request: HttpRequest, row: Trajectory) -> TrajectoryPage:
        if "step" not in request.GET and row.state == State.OPEN:
            return trajectory_page(row, (row.n_steps - 1) // STEPS_A_PAGE * STEPS_A_PAGE)  # where it goes on
        return trajectory_page(row, _number(request.GET.get("step", "0")))

    def get_actions(self, request: HttpRequest) -> dict[str, bulk_admin.Offered]:  # type: ignore[override]  # stubs
        return bulk_admin.offered(held(request))


# --- projects, people, keys ----------------------------------------------------------------------------------------


class ProjectForm(ModelForm[Project]):
    def clean_redaction_rules(self) -> object:
        found = self.cleaned_data["redaction_rules"]
        if wrong := redaction.what_is_wrong(found or []):
            raise ValidationError(wrong)
        return found or []


@admin.register(Project)
class ProjectItselfAdmin(ProjectAdmin[Project]):
    form = ProjectForm
    list_display = ("slug", "name", "held_out_share", "reward_aggregation", "created")
    search_fields = ("slug", "name")
    change_role = Role.OPERATOR
    readonly_fields = ("slug", "created_at")
    fields = (
        "slug",
        "name",
        "description",
        "held_out_share",
        "reward_aggregation",
        "redaction_rules",
        "redaction_failure",
        "group_idle_minutes",
        "open_timeout_minutes",
        "gateway_when_full",
        "gateway_idle_minutes",
        "created_at",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Project]:
        return Project.objects.filter(pk__in=self.projects_of(request))

    def project_of(self, row: Project) -> Project:
        return row

    def has_add_permission(self, request: HttpRequest) -> bool:
        return bool(getattr(request.user, "is_superuser", False))

    def get_readonly_fields(self, request: HttpRequest, obj: Project | None = None) -> tuple[str, ...]:
        return ("created_at",) if obj is None else ("slug", "created_at")


@admin.register(Membership)
class MembershipAdmin(ProjectAdmin[Membership]):
    list_display = ("user", "role", "project", "created")
    list_filter = (MyProjectsFilter, "role")
    list_select_related = ("user", "project")
    search_fields = ("user__username",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return bool(getattr(request.user, "is_superuser", False))

    def has_change_permission(self, request: HttpRequest, obj: Membership | None = None) -> bool:
        return bool(getattr(request.user, "is_superuser", False))

    def has_delete_permission(self, request: HttpRequest, obj: Membership | None = None) -> bool:
        return bool(getattr(request.user, "is_superuser", False))

    def get_readonly_fields(self, request: HttpRequest, obj: Membership | None = None) -> tuple[str, ...]:
        return ("created_at",)


def _set_rate(row: ApiKey, by: Actor, form: QueryDict) -> str:
    people.set_rate(row, form.get("requests_per_minute", ""))
    row.refresh_from_db(fields=["requests_per_minute"])
    return f"{row} may send {pressure.rate_of(row) or 'any number of'} requests a minute."


def _revoke(row: ApiKey, by: Actor, form: QueryDict) -> str:
    if not ApiKey.objects.filter(pk=row.pk, revoked_at=None).update(revoked_at=timezone.now()):
        raise Refused(f"{row} is revoked already.")
    return f"{row} is revoked: from now on it opens nothing."


@admin.register(ApiKey)
class ApiKeyAdmin(ProjectAdmin[ApiKey]):
    list_display = ("name", "prefix", "project", "scopes", "owner", "expires_at", "last_used_at", "revoked_at")
    list_filter = (MyProjectsFilter,)
    list_select_related = ("project", "owner")
    search_fields = ("name", "prefix")
    add_role = Role.OPERATOR
    fields = ("project", "name", "scopes", "expires_at", "requests_per_minute")
    verbs = (
        Verb(
            "rate",
            "Set the rate",
            Role.OPERATOR,
            _set_rate,
            when=lambda row: row.revoked_at is None,
            needs_reason=False,
            asks=(
                Ask("requests_per_minute", "Requests a minute (0: any number; nothing: the site's default)", "number"),
            ),
        ),
        Verb(
            "revoke",
            "Revoke",
            Role.OPERATOR,
            _revoke,
            when=lambda row: row.revoked_at is None,
            needs_reason=False,
            warning="Whatever uses this key is refused from now on. This cannot be undone; make a new key instead.",
        ),
    )

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> tuple[str, ...]:
        if obj is None:
            return self.fields
        return (
            "project",
            "name",
            "prefix",
            "scopes",
            "owner",
            "created_at",
            "expires_at",
            "revoked_at",
            "last_used_at",
            "requests_per_minute",
        )

    def get_readonly_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> tuple[str, ...]:
        return () if obj is None else tuple(self.get_fields(request, obj))

    def save_model(self, request: HttpRequest, obj: ApiKey, form: object, change: bool) -> None:
        by = Actor.of(request)
        if not rights.may(request.user, obj.project, Role.OPERATOR):
            raise Refused(f"{by.name} is no operator of {obj.project}.")
        made, key = auth.make_key(
            obj.project,
            obj.name,
            obj.scopes,
            owner=by.user,
            expires_at=obj.expires_at,
            requests_per_minute=obj.requests_per_minute,
        )
        obj.pk, obj.prefix, obj.key_hash, obj.owner = made.pk, made.prefix, made.key_hash, made.owner
        self.message_user(request, f"The key, shown this once: {key}", messages.WARNING)


@admin.register(Agent)
class AgentAdmin(ProjectAdmin[Agent]):
    list_display = ("agent_id", "name", "project", "is_active", "created")
    list_filter = (MyProjectsFilter, "is_active")
    orderings = (
        Ordering("agent_id", "by id", "agent_id", descending=False, per_project=True),
        Ordering("-agent_id", "by id, backwards", "agent_id", per_project=True),
        *by_age(),
    )
    list_select_related = ("project",)
    search_fields = ("agent_id__startswith", "name")
    change_role = Role.OPERATOR
    fields = ("project", "agent_id", "name", "user", "is_active", "created_at")
    readonly_fields = ("project", "agent_id", "created_at")
    autocomplete_fields = ("user",)


@admin.register(Scenario)
class ScenarioAdmin(ProjectAdmin[Scenario]):
    list_display = ("scenario_id", "split", "project", "created")
    list_filter = (MyProjectsFilter, "split")
    list_select_related = ("project",)
    search_fields = ("scenario_id__startswith",)
    payload_columns = ("description", "metadata")


@admin.register(LlmCallLog)
class LlmCallAdmin(ProjectAdmin[LlmCallLog]):
    project_path = "trajectory__project"
    list_display = (
        "trajectory",
        "position",
        "model",
        "model_version",
        "origin",
        "is_trainable",
        "completion_tokens",
        "latency_ms",
        "finish_reason",
    )
    list_filter = (MyProjectsFilter, "origin", "is_trainable", "has_error")
    list_select_related = ("trajectory", "trajectory__project")
    search_fields = ("trajectory__trajectory_id__startswith",)
    ordering = ("-id",)


@admin.register(RewardChange)
class RewardChangeAdmin(ProjectAdmin[RewardChange]):
    list_display = ("created", "trajectory", "waiting_for", "was", "reward", "source", "by_name")
    list_filter = (MyProjectsFilter,)
    list_select_related = ("trajectory",)
    search_fields = ("trajectory__trajectory_id__startswith", "waiting_for__startswith")


CHANGED = ("status", "state", "judging", "split", "is_excluded", "archived_at", "fence")  # fields with a history


@admin.register(StateChange)
class StateChangeAdmin(ProjectAdmin[StateChange]):
    list_display = ("created", "kind", "object_id", "field", "was", "to", "by_name", "reason")
    list_filter = (MyProjectsFilter, one_of("field", *CHANGED))
    search_fields = ("by_name", "kind")


@admin.register(Tombstone)
class TombstoneAdmin(ProjectAdmin[Tombstone]):
    list_display = ("trajectory_id", "project", "by_name", "reason", "created")
    list_filter = (MyProjectsFilter,)
    list_select_related = ("project",)
    search_fields = ("trajectory_id__startswith",)
    payload_columns = ("content_hash",)


@admin.register(SharedText)
class SharedTextAdmin(ProjectAdmin[SharedText]):
    list_display = ("id", "kind", "raw_size", "project", "created")
    list_filter = (MyProjectsFilter, one_of("kind", "system", "tools"))
    list_select_related = ("project",)
    payload_columns = ("data", "text_hash")
    fields = ("project", "kind", "codec", "raw_size", "created_at")

    def get_readonly_fields(self, request: HttpRequest, obj: SharedText | None = None) -> tuple[str, ...]:
        return ("project", "kind", "codec", "raw_size", "created_at")


@admin.register(Blob)
class BlobAdmin(ProjectAdmin[Blob]):
    list_display = ("id", "kind", "media_type", "raw_size", "stored_size", "project", "created")
    list_filter = (MyProjectsFilter, one_of("kind", "text", "json"))
    list_select_related = ("project",)
    payload_columns = ("content_hash", "preview")
    fields = ("project", "kind", "media_type", "raw_size", "stored_size", "preview", "location", "created_at")

    def get_readonly_fields(self, request: HttpRequest, obj: Blob | None = None) -> tuple[str, ...]:
        return self.fields


def _retry_span(row: OtelRecord, by: Actor, form: QueryDict) -> str:
    otlp.retry(row, by, form.get("reason", ""))
    return "It waits for its trajectory again, with what else of its trace was in quarantine for the same reason."


def _discard_span(row: OtelRecord, by: Actor, form: QueryDict) -> str:
    otlp.discard(row, by, form.get("reason", ""))
    return "Its content is gone."


def _is_quarantined(row: OtelRecord) -> bool:
    return row.state == SpanState.QUARANTINED


SHOWN_OF_SPAN = 64 * 1024  # characters


@dataclass(frozen=True)
class SpanPage:
    """What the template of a span reads."""

    trajectory: Trajectory | None  # that it went into
    content: str
    left: int  # characters that are not shown


def _content_of(row: OtelRecord) -> str:
    try:
        return json.dumps(msgspec.to_builtins(otlp.value_of(row)), ensure_ascii=False, indent=2)
    except LookupError as exc:
        return str(exc)


@admin.register(OtelRecord)
class OtelRecordAdmin(ProjectAdmin[OtelRecord]):
    """What came over OTLP: waiting for its trajectory, sealed into one, or in quarantine with the reason."""

    list_display = ("id", "kind", "name", "trace_id", "state_chip", "reason", "trajectory_ref", "project", "received")
    list_filter = (MyProjectsFilter, "state", one_of("kind", "span", "log"))
    verbs = (
        Verb("retry", "Try again", Role.RESEARCHER, _retry_span, when=_is_quarantined, needs_reason=False),
        Verb(
            "discard",
            "Discard",
            Role.RESEARCHER,
            _discard_span,
            when=_is_quarantined,
            warning="Its content is deleted for good. Its id stays known for a while, so that it does not come again.",
        ),
    )
    list_select_related = ("project",)
    search_fields = ("trace_id__startswith", "trajectory_ref__startswith")
    payload_columns = ("data", "content_hash")

    def page(self, request: HttpRequest, row: OtelRecord) -> "SpanPage":
        told = _content_of(row) if row.data is not None else ""
        ref = Trajectory.objects.filter(project=row.project_id, trajectory_id=row.trajectory_ref or "\n").only("pk")
        return SpanPage(ref.first(), told[:SHOWN_OF_SPAN], max(0, len(told) - SHOWN_OF_SPAN))
