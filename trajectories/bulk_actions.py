"""One thing done to many rows, behind the request: chosen once, worked off in chunks, killed anywhere, undone.

What was chosen is kept row by row when the action starts, so that "all 120,000 that match" are those that matched then.
A chunk's rows, their history, its items and the action's counters are written in one transaction: a worker that is
killed leaves the chunk as it was, and the next one does it.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from uuid import UUID

from django.db import connection, transaction
from django.db.models import QuerySet
from django.utils import timezone

from trajectories import archive, history, indexing, rights
from trajectories.errors import Problem, Refused
from trajectories.history import Actor
from trajectories.models import (
    LIVE_ACTION,
    ActionState,
    BulkAction,
    BulkItem,
    Group,
    IndexingWork,
    Project,
    Role,
    State,
    Trajectory,
)

logger = logging.getLogger(__name__)

LOCK = 0x6275_6C6B  # first half of the advisory lock of an action that is done at once; the second is its number
SECONDS = 20.0  # of one turn of a worker; the next turn goes on
UNDO_DAYS = 30

Parameter = int | float | Decimal | str | bytes | date | UUID | None
Refusals = Mapping[int, str]  # by pk: why it was not done


@dataclass(frozen=True)
class Chunk:
    """Some rows of an action, of one project."""

    action: BulkAction
    pks: Sequence[int]
    by: Actor

    @property
    def project(self) -> Project:
        return self.action.project

    @property
    def reason(self) -> str:
        return self.action.reason


@dataclass(frozen=True)
class Option:
    """A tick on the page that asks for the second look."""

    name: str
    label: str


@dataclass(frozen=True)
class Choice:
    """A question on that page, with the answers it may have and what they mean."""

    name: str
    label: str
    values: Mapping[str, str]


def _nothing(chunk: Chunk) -> Refusals:
    return {}


Whole = Callable[[BulkAction, Callable[[int], bool]], dict[str, object]]


@dataclass(frozen=True)
class Kind:
    """Something that can be done to many."""

    name: str
    label: str  # on the button: "Exclude"
    past: str  # "excluded"
    role: str
    act: Callable[[Chunk], Refusals] = _nothing  # inside the chunk's transaction
    whole: Whole | None = None  # in place of chunks: all at once, begun anew when it is killed; tells how far it is
    warning: str = ""
    undo: str = ""  # the kind that takes it back; "": it cannot be
    needs_reason: bool = True
    of_groups: bool = False  # chosen trajectories stand for their groups
    rows: int = 500  # of a chunk: one that moves files holds its rows for as long as that takes
    options: tuple[Option, ...] = ()
    choices: tuple[Choice, ...] = ()


KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> None:
    """Known from now on, under its name."""
    KINDS[kind.name] = kind


# --- choosing --------------------------------------------------------------------------------------------------------


def start(
    kind: Kind,
    project: Project,
    rows: "QuerySet[Trajectory]",
    *,
    by: Actor,
    reason: str = "",
    chosen_by: str = "",
    options: Sequence[str] = (),
    choices: Mapping[str, str] | None = None,
) -> BulkAction:
    """Keep what is chosen of a project, as it is now. `run` does it.

    Raises:
        Refused: nothing of the project is chosen; no reason where one is needed; the person has not the role; an
            answer that a choice does not have.
    """
    if kind.needs_reason and not reason.strip():
        raise Refused("Give a reason: it is kept with each change.")
    if not rights.may(by.user, project, kind.role):
        raise Refused(f"You are no {kind.role} of {project}.")
    known = {one.name for one in kind.options}
    answers = {one.name: (choices or {}).get(one.name, next(iter(one.values))) for one in kind.choices}
    for one in kind.choices:
        if answers[one.name] not in one.values:
            raise Refused(f"{one.label} cannot be {answers[one.name][:50]!r}; choose one of {', '.join(one.values)}.")
    chosen = rows.filter(project=project).order_by()
    ids = chosen.filter(group__isnull=False).values("group").distinct() if kind.of_groups else chosen.values("pk")
    with transaction.atomic():
        action = BulkAction.objects.create(
            project=project,
            kind=kind.name,
            options={name: True for name in options if name in known} | answers,
            chosen_by=chosen_by,
            reason=reason.strip(),
            by_user=by.user,
            by_name=by.name[:150],
        )
        _keep(action, *ids.query.sql_with_params())
        if not action.n_chosen:
            raise Refused(
                f"None of these is in a group, so there is nothing to do in {project}."
                if kind.of_groups
                else f"Nothing of {project} is chosen."
            )
    return action


def undo(action: BulkAction, *, by: Actor, reason: str) -> BulkAction:
    """A new action that takes back what this one did, row by row. Rows that changed since are told, not touched.

    Raises:
        Refused: it cannot be taken back, has not ended, was taken back already, or is too old.
    """
    kind = KINDS.get(action.kind)
    back = KINDS.get(kind.undo) if kind is not None else None
    if back is None:
        raise Refused(f"{action} cannot be taken back.")
    if not rights.may(by.user, action.project, back.role):
        raise Refused(f"You are no {back.role} of {action.project}.")
    with transaction.atomic():
        row = BulkAction.objects.select_for_update(of=("self",)).select_related("project").get(pk=action.pk)
        if row.state in LIVE_ACTION:
            raise Refused(f"{row} still runs. Cancel it first, then take back what it did.")
        if BulkAction.objects.filter(undoes=row).exists():
            raise Refused(f"{row} was taken back already.")
        if (timezone.now() - row.created_at).days > UNDO_DAYS:
            raise Refused(f"{row} is older than {UNDO_DAYS} days. Choose the rows anew and {back.label.lower()} them.")
        made = BulkAction.objects.create(
            project=row.project,
            kind=back.name,
            reason=reason.strip() or f"takes back {row}",
            by_user=by.user,
            by_name=by.name[:150],
            undoes=row,
        )
        done = BulkItem.objects.filter(action=row, state="done").order_by().values("object_id")
        _keep(made, *done.query.sql_with_params())
        if not made.n_chosen:
            raise Refused(f"{row} changed nothing, so there is nothing to take back.")
    return made


def _keep(action: BulkAction, query: str, parameters: tuple[Parameter, ...]) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into bulk_items (action_id, object_id, state, detail) "  # noqa: S608  # an ORM query with its parameters
            f"select %s, chosen.pk, 'waiting', '' from ({query}) as chosen(pk)",
            [action.pk, *parameters],
        )
        action.n_chosen = cursor.rowcount
    action.save(update_fields=["n_chosen"])


def cancel(action: BulkAction, *, by: Actor, reason: str) -> None:
    """End it where it stands; what is done stays done, and can be taken back.

    Raises:
        Refused: it has ended.
    """
    with transaction.atomic():
        row = BulkAction.objects.select_for_update(of=("self",)).get(pk=action.pk)
        if row.state not in LIVE_ACTION:
            raise Refused(f"{row} has ended already: {row.get_state_display()}.")
        _end(row, ActionState.CANCELLED, by=by, reason=reason, error=f"Cancelled by {by.name}.")


def _end(row: BulkAction, to: ActionState, *, by: Actor, reason: str = "", error: str = "") -> None:
    was, row.state, row.ended_at, row.error = row.state, to, timezone.now(), error
    row.save(update_fields=["state", "ended_at", "error"])
    history.record(row, was, to, project=row.project, by=by, reason=reason, field="state")


# --- doing -----------------------------------------------------------------------------------------------------------


def run(pk: int, *, seconds: float = SECONDS) -> bool:
    """Work on an action for a while. True: there is more to do. Another worker's action is left alone."""
    action = BulkAction.objects.filter(pk=pk, state__in=LIVE_ACTION).select_related("project", "by_user").first()
    kind = KINDS.get(action.kind) if action is not None else None
    if action is not None and kind is not None and kind.whole is not None:
        _at_once(action, kind, kind.whole)
        return False
    until = time.monotonic() + seconds
    while _chunk(pk):
        if time.monotonic() >= until:
            return True
    return False


def _at_once(action: BulkAction, kind: Kind, whole: Whole) -> None:
    """A lock that ends with the worker's connection says whose it is: a transaction would be held for minutes."""
    key = [LOCK, action.pk % 2**31]
    with connection.cursor() as cursor:
        cursor.execute("select pg_try_advisory_lock(%s, %s)", key)
        row = cursor.fetchone()
    if row is None or not row[0]:
        return
    try:
        live_row = BulkAction.objects.filter(pk=action.pk, state__in=LIVE_ACTION)
        if not rights.may(action.by_user, action.project, kind.role):
            _finish(action, ActionState.CANCELLED, error=f"{action.by_name} is no {kind.role} now.")
            return
        if not live_row.update(state=ActionState.RUNNING, started_at=timezone.now()):
            return

        def progress(n: int) -> bool:
            return bool(live_row.update(n_done=min(n, action.n_chosen)))

        told = whole(action, progress)
        _finish(action, ActionState.DONE, options=action.options | told)
    except Exception as exc:  # whatever it is, nobody would wait for the end of an action that says nothing
        logger.exception("bulk action %s broke off", action.pk)
        _finish(action, ActionState.CANCELLED, error=f"It broke off: {exc}"[:1000])
    finally:
        with connection.cursor() as cursor:
            cursor.execute("select pg_advisory_unlock(%s, %s)", key)


def _finish(action: BulkAction, to: ActionState, *, error: str = "", options: dict[str, object] | None = None) -> None:
    """Unless somebody else has ended it."""
    with transaction.atomic():
        row = BulkAction.objects.select_for_update(of=("self",)).get(pk=action.pk)
        if row.state in LIVE_ACTION:
            if options is not None:
                row.options = options
                row.n_refused = row.n_chosen - row.n_done
                row.save(update_fields=["options", "n_refused"])
            _end(row, to, by=history.SYSTEM, reason=error, error=error)


def live() -> list[int]:
    """The actions that are not at their end."""
    return list(BulkAction.objects.filter(state__in=LIVE_ACTION).order_by("id").values_list("pk", flat=True))


def _chunk(pk: int) -> bool:
    """Do some rows. False: it has ended, or is another's."""
    with transaction.atomic():
        action = (
            BulkAction.objects.select_for_update(of=("self",), skip_locked=True)
            .select_related("project", "by_user")
            .filter(pk=pk, state__in=LIVE_ACTION)
            .first()
        )
        if action is None:
            return False
        kind = KINDS.get(action.kind)
        if kind is None or not rights.may(action.by_user, action.project, kind.role):
            why = f"There is no {action.kind} any more." if kind is None else f"{action.by_name} is no {kind.role} now."
            _end(action, ActionState.CANCELLED, by=history.SYSTEM, reason=why, error=why)
            return False
        items = list(BulkItem.objects.filter(action=action, state="waiting").order_by("id")[: kind.rows])
        if not items:
            _end(action, ActionState.DONE, by=history.SYSTEM)
            return False
        by = Actor(action.by_name, action.by_user)
        refused = kind.act(Chunk(action, [item.object_id for item in items], by))
        for item in items:
            item.detail = refused.get(item.object_id, "")
            item.state = "refused" if item.object_id in refused else "done"
        BulkItem.objects.filter(pk__in=[item.pk for item in items if item.state == "done"]).update(state="done")
        BulkItem.objects.bulk_update([item for item in items if item.state == "refused"], ["state", "detail"])
        action.started_at = action.started_at or timezone.now()
        action.state = ActionState.RUNNING
        action.n_refused += len(refused)
        action.n_done += len(items) - len(refused)
        action.save(update_fields=["started_at", "state", "n_done", "n_refused"])
    return True


# --- what can be done to trajectories --------------------------------------------------------------------------------


def _locked(chunk: Chunk) -> dict[int, Trajectory]:
    """The chunk's rows, held in one order. Deleted ones and those of another project are missing."""
    rows = Trajectory.objects.select_for_update(no_key=True, of=("self",)).filter(pk__in=chunk.pks)
    return {row.pk: row for row in rows.filter(project=chunk.project).order_by("pk")}


def _gone(chunk: Chunk, rows: Mapping[int, object]) -> dict[int, str]:
    return {pk: "It was deleted meanwhile." for pk in chunk.pks if pk not in rows}


def _set_excluded(chunk: Chunk, *, excluded: bool) -> Refusals:
    rows = _locked(chunk)
    refused = _gone(chunk, rows)
    words = ("included", "excluded")
    refused |= {pk: f"It is {words[excluded]} already." for pk, row in rows.items() if row.is_excluded is excluded}
    changed = [row for pk, row in rows.items() if pk not in refused]
    Trajectory.objects.filter(pk__in=[row.pk for row in changed]).update(is_excluded=excluded)
    _record(chunk, changed, words[not excluded], words[excluded], "is_excluded")
    indexing.touch(chunk.project, [row.group_id for row in changed])
    return refused


def _record(chunk: Chunk, rows: Sequence[Trajectory], was: str, to: str, field: str) -> None:
    history.record_many(
        ((row, was, to) for row in rows), project=chunk.project, by=chunk.by, reason=chunk.reason, field=field
    )


def _set_evaluation(chunk: Chunk, *, evaluation: bool) -> Refusals:
    """It leaves its group, whose other attempts were played for another purpose, and gets one of its new kind."""
    rows = _locked(chunk)
    refused = _gone(chunk, rows)
    word = "for evaluation" if evaluation else "for training"
    used = set(Trajectory.objects.filter(pk__in=rows, batch_items__is_active=True).values_list("pk", flat=True))
    for pk, row in rows.items():
        if row.is_evaluation is evaluation:
            refused[pk] = f"It is {word} already."
        elif row.state == State.OPEN:
            refused[pk] = "It still runs. Mark it when it has ended."
        elif row.evaluation_id:
            refused[pk] = f"It answers evaluation {row.evaluation_id}."
        elif pk in used:
            refused[pk] = "A batch that is live or completed has it."
    changed = [row for pk, row in rows.items() if pk not in refused]
    pks = [row.pk for row in changed]
    Trajectory.objects.filter(pk__in=pks).update(is_evaluation=evaluation, group=None)
    _record(
        chunk, changed, "training" if evaluation else "evaluation", "evaluation" if evaluation else "training", "use"
    )
    indexing.touch(chunk.project, [row.group_id for row in changed])
    IndexingWork.objects.bulk_create(IndexingWork(project=chunk.project, trajectory_id=pk) for pk in pks)
    return refused


def _each(chunk: Chunk, act: Callable[[Trajectory], None]) -> Refusals:
    """One by one: what refuses is told, and costs its neighbours nothing."""
    rows = _locked(chunk)
    refused = _gone(chunk, rows)
    for pk, row in rows.items():
        try:
            with transaction.atomic():
                act(row)
        except Problem as problem:
            refused[pk] = str(problem)
    indexing.touch(chunk.project, [row.group_id for pk, row in rows.items() if pk not in refused])
    return refused


EVEN_IF_NEEDED = Option("even_if_needed", "Also those that a live version learned from")


def _archive(chunk: Chunk) -> Refusals:
    needed = {} if chunk.action.options.get(EVEN_IF_NEEDED.name) else archive.needed(chunk.pks)

    def one(row: Trajectory) -> None:
        if row.pk in needed:
            raise Refused(needed[row.pk])
        archive.archive(row, by=chunk.by, reason=chunk.reason, even_if_needed=True)

    return _each(chunk, one)


register(
    Kind(
        "exclude",
        "Exclude",
        "excluded",
        Role.RESEARCHER,
        lambda chunk: _set_excluded(chunk, excluded=True),
        warning="They leave their groups' baselines and every later batch. Batches that are frozen keep them.",
        undo="include",
    )
)
register(
    Kind(
        "include",
        "Include again",
        "included again",
        Role.RESEARCHER,
        lambda chunk: _set_excluded(chunk, excluded=False),
        undo="exclude",
    )
)
register(
    Kind(
        "mark-evaluation",
        "Keep for evaluation",
        "kept for evaluation",
        Role.RESEARCHER,
        lambda chunk: _set_evaluation(chunk, evaluation=True),
        warning="They leave their groups, and no batch takes them from now on.",
        undo="mark-training",
    )
)
register(
    Kind(
        "mark-training",
        "Give to training",
        "given to training",
        Role.RESEARCHER,
        lambda chunk: _set_evaluation(chunk, evaluation=False),
        warning="What was played to measure a version may teach the next one from now on.",
        undo="mark-evaluation",
    )
)
register(
    Kind(
        "archive",
        "Archive",
        "in the archive",
        Role.OPERATOR,
        _archive,
        warning="Their payloads move to the archive storage; rows and pages stay and open them on demand.",
        undo="restore",
        needs_reason=False,
        rows=25,
        options=(EVEN_IF_NEEDED,),
    )
)
register(
    Kind(
        "restore",
        "Restore from archive",
        "back from the archive",
        Role.OPERATOR,
        lambda chunk: _each(chunk, lambda row: archive.restore(row, by=chunk.by, reason=chunk.reason)),
        undo="archive",
        needs_reason=False,
        rows=25,
    )
)


def locked_groups(chunk: Chunk) -> tuple[dict[int, Group], dict[int, str]]:
    """The chunk's groups, and the refusals of those that are gone: for kinds that concern groups."""
    found = Group.objects.filter(pk__in=chunk.pks, project=chunk.project).select_related("project").order_by("pk")
    rows = {row.pk: row for row in found}
    return rows, _gone(chunk, rows)
