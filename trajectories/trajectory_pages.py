"""What the page of a trajectory shows. A run of 2,000 steps opens as few segments as one of 10."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from django.contrib.postgres.expressions import ArraySubquery
from django.db import connection
from django.db.models import OuterRef, Q, QuerySet
from django.db.models.functions import JSONObject
from django.urls import reverse

from trajectories import census, conversation, folding, quality, segments, shown
from trajectories.conversation import CHARACTERS_A_PAGE, Files, Line, Reader, StepView
from trajectories.models import LlmCallLog, RedactionCount, Relation, RewardChange, State, StepRewards, Trajectory

STEPS_A_PAGE = 40
COLUMNS = 160  # of the map of a run
RELATED = 20
CHANGES = 20  # of the reward


@dataclass(frozen=True)
class UseView:
    """One use in a batch, whose numbers were frozen."""

    row: object
    was: float | None  # recorded reward in the batch; None too where it did not count
    changed: bool  # and is another now


@dataclass(frozen=True)
class RewardView:
    """One change of the recorded reward."""

    created_at: datetime | None
    was: float | None
    reward: float | None
    source: str
    by_name: str
    reason: str


@dataclass(frozen=True)
class Column:
    """Some steps of a run, as its map shows them. Coordinates are of the SVG's user space, y downwards."""

    step: int  # the first of them
    x: float
    latency_y: float
    latency_height: float
    has_error: bool
    label: str


@dataclass(frozen=True)
class Map:
    """A whole run at a glance: how long its calls took, where they failed, what it was rewarded with."""

    columns: Sequence[Column]
    pitch: float  # of a column, with the gap to the next
    width: float
    grouped: bool  # several steps a column
    slowest_seconds: float | None
    seconds: float | None  # of all calls
    rewards: str = ""  # of a polyline: the sum of the step rewards so far
    reward_low: str = ""
    reward_high: str = ""
    reward_sum: float | None = None
    here: tuple[float, float] = (0.0, 0.0)  # x and width of the steps that are shown


@dataclass(frozen=True)
class Related:
    how: str
    row: Trajectory | None
    name: str


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
    uses: Sequence[UseView] = ()
    is_live: bool = False  # more steps may come at its end
    rewards: Sequence["RewardView"] = ()
    redactions: Sequence[Mapping[str, object]] = ()  # rule, count
    checks: Sequence[quality.Check] = ()
    missing: str = ""
    attached: Sequence[tuple[str, Line]] = ()  # what is in no step, with what it is
    took: float | None = None  # seconds
    map: Map | None = None
    related: Sequence[Related] = ()
    components: Sequence[tuple[str, str]] = ()
    metrics: Sequence[tuple[str, str]] = ()
    last_page: int = 0  # first step of the last part

    @property
    def after(self) -> int:
        """Number of the first step that is not shown."""
        return self.last + 1

    @property
    def is_part(self) -> bool:
        return self.total > len(self.steps)


def trajectory_page(trajectory: Trajectory, start: int, *, is_fragment: bool = False) -> TrajectoryPage:
    """The steps from `start` on, at most `STEPS_A_PAGE` of them.

    Args:
        is_fragment: what came while somebody watches: nothing but the steps.
    """
    page = TrajectoryPage((), 0, -1, trajectory.n_steps, None, None) if is_fragment else _around(trajectory)
    if trajectory.ended_at is not None:
        page = replace(page, took=(trajectory.ended_at - trajectory.started_at).total_seconds())
    total = trajectory.n_steps
    start = max(0, min(start, total if is_fragment else max(0, total - 1)))
    end = min(total, start + STEPS_A_PAGE)
    try:
        # One before, for what its prompt repeats of it; one after, for what its tools answered.
        part = segments.part(trajectory, max(0, start - 1), end + 1)
    except Exception as exc:  # a page that says what is wrong with a payload is worth more than an error page
        return replace(page, missing=f"The payload cannot be read: {exc}")
    files = Files(_address(trajectory), part.marks)
    reader = Reader(files, _calls_before(trajectory, part.first) if part.first else 0)
    views: list[StepView] = []
    weight = 0
    for number, step in enumerate(part.steps, start=part.first):
        if number >= end:
            reader.results_of(step)
            break
        view = reader.view(number, step)
        if number < start:
            continue
        views.append(view)
        weight += view.weight
        if weight > CHARACTERS_A_PAGE and number + 1 < end:
            end = number + 1
            if number + 1 - part.first < len(part.steps):
                reader.results_of(part.steps[number + 1 - part.first])
            break
    closing = reader.messages(part.header.closing_messages) if end == total else []
    _share_latencies(views)
    views = _with_feedback(views, page.judgments)
    page = replace(
        page,
        steps=views,
        first=start,
        last=start + len(views) - 1,
        previous=max(0, start - STEPS_A_PAGE) if start else None,
        next=end if end < total else None,
        closing=closing,
        is_live=trajectory.state == State.OPEN and end == total,
        last_page=max(0, (total - 1) // STEPS_A_PAGE * STEPS_A_PAGE),
    )
    if is_fragment:
        return page
    header = part.header
    return replace(
        page,
        checks=_checks(trajectory, segments.whole(trajectory, part)) if part.is_whole else (),
        attached=[
            (title, reader.json("other", value))
            for title, value in (
                (f"Tools it was given ({len(header.tools or ())})", header.tools),
                ("Metadata", header.metadata),
                ("What the site did not understand", header.extra),
            )
            if value
        ],
        map=_map(trajectory, start, max(end, start + 1)) if trajectory.state != State.OPEN and total > 1 else None,
    )


def checks(trajectory: Trajectory) -> list[quality.Check]:
    """Every quality check, passed or not. It takes the whole payload."""
    return _checks(trajectory, segments.load(trajectory, open_blobs=False))


def _checks(trajectory: Trajectory, payload: segments.LoadedPayload) -> list[quality.Check]:
    weights = quality.weights_of(trajectory.project.quality_weights)
    return quality.checks(census.of(payload), trajectory.final_status, weights)


def file_of(trajectory: Trajectory, step: int, sha256: str) -> tuple[str, str] | None:
    """(media type, data URL) of a file in a step, by the hash of its URL."""
    found: list[tuple[str, str]] = []

    class Seeking(Files):
        def of_url(self, step: int, media_type: str, data_url: str) -> conversation.Picture:
            picture = super().of_url(step, media_type, data_url)
            if picture.sha256 == sha256:
                found.append((media_type, data_url))
            return picture

    part = segments.part(trajectory, max(0, step - 1), step + 2)
    reader = Reader(Seeking("", {}), None)
    for number, one in enumerate(part.steps, start=part.first):
        if number <= step:
            reader.view(number, one)
        else:
            reader.results_of(one)
    reader.messages(part.header.closing_messages)
    for header in (part.header.tools, part.header.metadata, part.header.extra):
        reader.json("header", header)
    return found[0] if found else None


def _address(trajectory: Trajectory) -> str:
    return reverse("admin:trajectories_trajectory_change", args=[trajectory.pk]).removesuffix("change/")


def _calls_before(trajectory: Trajectory, step: int) -> int | None:
    """How many calls the steps before `step` made; None where nobody has counted yet."""
    rows = LlmCallLog.objects.filter(trajectory=trajectory, step__gte=step)
    return rows.order_by("position").values_list("position", flat=True).first()


def _share_latencies(views: Sequence[StepView]) -> None:
    timed = [line for view in views for line in view.lines if line.latency_ms is not None and line.latency_ms > 0]
    slowest = max((line.latency_ms or 0.0 for line in timed), default=0.0)
    for line in timed:
        line.share = round(100 * (line.latency_ms or 0.0) / slowest, 1) if slowest else None


def _with_feedback(views: Sequence[StepView], judgments: Sequence[object]) -> list[StepView]:
    """Each step with what was said of it alone."""
    said: dict[int, list[object]] = {}
    for one in judgments:
        step = getattr(one, "step", None)
        if step is not None:
            said.setdefault(step, []).append(one)
    return [replace(view, judged=said.get(view.number, ())) for view in views]


# --- around the conversation -----------------------------------------------------------------------------------------


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
        rewards=[_change(one) for one in getattr(trajectory, "told_rewards", ())],
        redactions=getattr(trajectory, "told_redactions", ()),
        related=_related(trajectory),
        components=_numbers(trajectory.reward_components),
        metrics=_numbers(trajectory.metrics),
    )


def _use(row: object, reward: float | None) -> UseView:
    parts = getattr(row, "parts", None)
    recorded = parts.get("recorded") if isinstance(parts, dict) else None
    if not isinstance(recorded, dict):
        return UseView(row, None, False)
    return UseView(row, recorded.get("raw"), recorded.get("raw") != reward)


def _numbers(told: object) -> list[tuple[str, str]]:
    """Names and values of a flat object, as pages write them."""
    if not isinstance(told, dict):
        return []
    rows = []
    for name, value in list(told.items())[:60]:
        plain = f"{value:g}" if isinstance(value, float) else "unknown" if value is None else None
        text = plain or (value if isinstance(value, str) else folding.told(value))
        rows.append((shown.visible(str(name)[:120]), shown.visible(str(text)[:300])))
    return rows


def _related(trajectory: Trajectory) -> list[Related]:
    """Who called whom, who tried again, who was in the same run. Those that are not recorded are told by their ids."""
    me, project = trajectory.trajectory_id, trajectory.project_id
    told: list[tuple[str, str]] = []
    if trajectory.parent_trajectory_id:
        call = "" if trajectory.parent_call is None else f", call {trajectory.parent_call}"
        told.append((f"called by{call}", trajectory.parent_trajectory_id))
    if trajectory.retry_of:
        told.append(("tries again", trajectory.retry_of))
    says = Q(name=me, kind__in=(Relation.Kind.PARENT, Relation.Kind.RETRY))
    if trajectory.episode_id:
        says |= Q(name=trajectory.episode_id, kind=Relation.Kind.EPISODE)
    others = Relation.objects.filter(says, project=project).exclude(trajectory=trajectory).order_by("trajectory_id")
    rows = Trajectory.objects.only("trajectory_id", "role", "parent_trajectory_id", "retry_of").order_by()
    wanted = rows.filter(pk__in=others.values("trajectory_id")[:RELATED])
    if names := [name for _, name in told]:
        wanted = wanted.union(rows.filter(project=project, trajectory_id__in=names))
    if trajectory.twin_of_id:
        wanted = wanted.union(rows.filter(pk=trajectory.twin_of_id))
    found = {row.trajectory_id: row for row in wanted}
    made = [Related(how, found.pop(name, None), name) for how, name in told]
    for name, row in sorted(found.items(), key=lambda one: one[1].pk):
        if row.pk == trajectory.twin_of_id:
            how = "has the content of"
        elif row.parent_trajectory_id == me:
            how = "called"
        else:
            how = "was tried again by" if row.retry_of == me else "in the same episode"
        made.append(Related(how, row, name))
    return made


def _change(told: Mapping[str, object]) -> RewardView:
    at, was, reward = told.get("created_at"), told.get("was"), told.get("reward")
    return RewardView(
        datetime.fromisoformat(at) if isinstance(at, str) else None,
        was if isinstance(was, float | int) else None,
        reward if isinstance(reward, float | int) else None,
        str(told.get("source") or ""),
        str(told.get("by_name") or ""),
        str(told.get("reason") or ""),
    )


def with_all(rows: "QuerySet[Trajectory]") -> "QuerySet[Trajectory]":
    """The same rows with what `trajectory_page` says of one beside its conversation, by one query."""
    own = OuterRef("pk")
    changes = RewardChange.objects.filter(trajectory=own).order_by("-pk")[:CHANGES]
    taken = RedactionCount.objects.filter(trajectory=own).order_by("rule")
    fields = ("created_at", "was", "reward", "source", "by_name", "reason")
    return (
        rows.select_related("project", "agent", "scenario", "group", "step_rewards")
        .defer(None)
        .annotate(
            told_rewards=ArraySubquery(changes.values(told=JSONObject(**{name: name for name in fields}))),
            told_redactions=ArraySubquery(taken.values(told=JSONObject(rule="rule", count="count"))),
        )
    )


# --- a run at a glance -----------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 800.0, 48.0

_COLUMNS_SQL = """
    select c.step / %(wide)s, max(c.latency_ms), bool_or(c.has_error), count(*), sum(c.latency_ms),
        sum(c.completion_tokens)
    from llm_call_logs c where c.trajectory_id = %(pk)s group by 1 order by 1
"""


def _map(trajectory: Trajectory, start: int, end: int) -> Map | None:
    """None before the indexing pass has seen the trajectory, and where there is nothing to show."""
    total = trajectory.n_steps
    wide = -(-total // COLUMNS)  # steps a column
    number = -(-total // wide)
    with connection.cursor() as cursor:
        cursor.execute(_COLUMNS_SQL, {"pk": trajectory.pk, "wide": wide})
        rows = {int(row[0]): row[1:] for row in cursor.fetchall() if 0 <= row[0] < number}
    try:
        rewards: Sequence[float | None] | None = trajectory.step_rewards.rewards
    except StepRewards.DoesNotExist:
        rewards = None
    if not rows and rewards is None:
        return None
    slowest = max((row[0] for row in rows.values() if row[0] is not None), default=None)
    if slowest is None and rewards is None and total <= STEPS_A_PAGE and not any(row[1] for row in rows.values()):
        return None
    x = WIDTH / number
    columns = []
    for at in range(number):
        latency, failed, calls, summed, tokens = rows.get(at, (None, False, 0, None, None))
        height = round(HEIGHT * latency / slowest, 2) if slowest and latency and latency > 0 else 0.0
        last = min(total, (at + 1) * wide) - 1
        told = [f"step {at * wide}" if last == at * wide else f"steps {at * wide} to {last}", f"{calls} calls"]
        told += [shown.span(summed / 1000)] if summed is not None else []
        told += [f"{tokens:,} tokens out"] if tokens is not None else []
        told += ["an error"] if failed else []
        columns.append(
            Column(at * wide, round(at * x, 2), round(HEIGHT - height, 2), height, bool(failed), ", ".join(told))
        )
    sums = [row[3] for row in rows.values() if row[3] is not None]
    found = Map(
        columns=columns,
        pitch=round(x, 2),
        width=round(min(24.0, max(0.6, x - (1.0 if x > 3 else 0.0))), 2),
        grouped=wide > 1,
        slowest_seconds=None if slowest is None else slowest / 1000,
        seconds=sum(sums) / 1000 if sums else None,
        here=(round(WIDTH * start / total, 2), round(WIDTH * (end - start) / total, 2)),
    )
    return _with_rewards(found, rewards) if rewards else found


def _with_rewards(found: Map, rewards: Sequence[float | None]) -> Map:
    sums: list[float] = []
    so_far = 0.0
    for one in rewards:
        so_far += one or 0.0
        sums.append(so_far)
    low, high = min(0.0, *sums), max(0.0, *sums)
    spread = (high - low) or 1.0
    across = WIDTH / len(sums)
    thinned = range(0, len(sums), max(1, len(sums) // 800))
    points = [(round((at + 0.5) * across, 2), round(2 + 44 * (1 - (sums[at] - low) / spread), 2)) for at in thinned]
    return replace(
        found,
        rewards=" ".join(f"{x},{y}" for x, y in points),
        reward_low=f"{low:.4g}",
        reward_high=f"{high:.4g}",
        reward_sum=sums[-1],
    )
