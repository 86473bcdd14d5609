"""Who did what, when and why: the author of a change, and its row."""

from collections.abc import Iterable
from dataclasses import dataclass

from django.contrib.auth.models import User
from django.db.models import Model
from django.http import HttpRequest

from trajectories.models import ApiKey, Project, StateChange


@dataclass(frozen=True)
class Actor:
    """A person, a key acting for one, or the site itself."""

    name: str
    user: User | None = None

    @staticmethod
    def of(request: HttpRequest) -> "Actor":
        """The signed-in person of a page."""
        user = request.user
        assert isinstance(user, User), "pages are for people who have signed in"
        return Actor(user.get_username(), user)

    @staticmethod
    def of_key(key: ApiKey) -> "Actor":
        """The key's owner, where it has one; the key's name is kept either way."""
        owner = key.owner
        return Actor(f"{owner.get_username()} (key {key.name})" if owner else f"key {key.name}", owner)


SYSTEM = Actor("trainingsite")


def record(
    row: Model, was: str, to: str, *, project: Project, by: Actor, reason: str = "", field: str = "status"
) -> StateChange:
    """Write the row of one change; call it in the transaction that makes the change."""
    return StateChange.objects.create(
        project=project,
        kind=kind(row),
        object_id=row.pk,
        field=field,
        was=was,
        to=to,
        by_user=by.user,
        by_name=by.name[:150],
        reason=reason,
    )


def record_many(
    rows: Iterable[tuple[Model, str, str]], *, project: Project, by: Actor, reason: str = "", field: str = "status"
) -> None:
    """The same for many rows (row, was, to) in one statement."""
    StateChange.objects.bulk_create(
        StateChange(
            project=project,
            kind=kind(row),
            object_id=row.pk,
            field=field,
            was=was,
            to=to,
            by_user=by.user,
            by_name=by.name[:150],
            reason=reason,
        )
        for row, was, to in rows
    )


def kind(row: Model) -> str:
    """The name under which a row's changes are kept: its model's, in lower case."""
    return row._meta.label_lower.rpartition(".")[2]


def of(row: Model) -> list[StateChange]:
    """Everything that happened to a row, newest first."""
    return list(StateChange.objects.filter(kind=kind(row), object_id=row.pk).select_related("by_user"))
