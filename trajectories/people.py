"""Projects, the people in them, and their keys: made by commands and on a site's first start."""

from collections.abc import Sequence
from datetime import timedelta

from django.contrib.auth.models import User
from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils import timezone

from trajectories import auth
from trajectories.errors import Refused
from trajectories.models import ApiKey, Membership, Project, Role, Scope

MOST_REQUESTS = 1_000_000  # a minute


def project(slug: str) -> Project:
    """The project with this slug.

    Raises:
        Refused: there is none.
    """
    found = Project.objects.filter(slug=slug).first()
    if found is None:
        raise Refused(f"There is no project {slug!r}. Make it with `manage.py create_project {slug}`.")
    return found


def create_project(slug: str, name: str = "") -> Project:
    """A new, empty project.

    Raises:
        Refused: the slug is taken, or is none.
    """
    new = Project(slug=slug, name=name or slug)
    try:
        new.full_clean(validate_unique=False)
        with transaction.atomic():
            new.save()
    except ValidationError as exc:
        raise Refused(f"{slug!r} cannot be a project's slug: {' '.join(exc.messages)}") from exc
    except IntegrityError as exc:
        raise Refused(f"There is a project {slug!r} already. Choose another slug.") from exc
    return new


def create_user(name: str, membership_of: Project, role: str, password: str | None) -> User:
    """A person who signs in to the admin and has this role in the project; without a password one who only owns keys.

    A user who exists keeps the password and gets the role besides those held.

    Raises:
        Refused: the role is unknown, the password too weak, or given for someone who exists.
    """
    if role not in Role.values:
        raise Refused(f"{role!r} is not a role. Roles are {', '.join(Role.values)}.")
    with transaction.atomic():
        user = User.objects.filter(username=name).first()
        if user is None:
            user = User(username=name, is_staff=True)
            if password is None:
                user.set_unusable_password()
            else:
                try:
                    validate_password(password, user)
                except ValidationError as exc:
                    raise Refused(f"The password will not do. {' '.join(exc.messages)}") from exc
                user.set_password(password)
            try:
                user.full_clean()
            except ValidationError as exc:
                raise Refused(f"{name!r} cannot be a user's name: {' '.join(exc.messages)}") from exc
            user.save()
        elif password is not None and not user.check_password(password):
            raise Refused(f"{name} exists, with another password. Leave it out to add the role alone.")
        Membership.objects.get_or_create(user=user, project=membership_of, role=role)
    return user


def create_api_key(
    of: Project,
    name: str,
    scopes: Sequence[str],
    *,
    owner: str = "",
    expires_days: int | None = None,
    requests_per_minute: int | None = None,
) -> tuple[ApiKey, str]:
    """A new key: its row, and the key itself, which cannot be shown again.

    Raises:
        Refused: a scope is unknown, the owner is, the time is over before it began, or the key could approve
            in nobody's name.
    """
    unknown = [scope for scope in scopes if scope not in Scope.values]
    if unknown or not scopes:
        raise Refused(f"{', '.join(unknown) or 'Nothing'} is not a scope. Scopes are {', '.join(Scope.values)}.")
    user = User.objects.filter(username=owner).first() if owner else None
    if owner and user is None:
        raise Refused(f"There is no user {owner!r}. Make one with `manage.py create_user {owner}`.")
    if Scope.APPROVE in scopes and user is None:
        raise Refused("A key with the scope approve needs an owner who answers for it. Give --user NAME.")
    if expires_days is not None and not 1 <= expires_days <= 36_500:
        raise Refused(f"A key cannot expire in {expires_days} days. Give 1 to 36500.")
    if requests_per_minute is not None and not 0 <= requests_per_minute <= MOST_REQUESTS:
        raise Refused(
            f"A key cannot have {requests_per_minute} requests a minute. Give 0 (any number) to {MOST_REQUESTS}."
        )
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise Refused(f"A key's name has 1 to 100 printable characters; this one has {len(name)}.")
    expires_at = None if expires_days is None else timezone.now() + timedelta(days=expires_days)
    return auth.make_key(of, name, scopes, owner=user, expires_at=expires_at, requests_per_minute=requests_per_minute)


def set_rate(key: ApiKey, requests_per_minute: str) -> None:
    """Give a key a rate of its own; "" takes it away, so that the site's default holds.

    Raises:
        Refused: no whole number from 0 to `MOST_REQUESTS`.
    """
    text = requests_per_minute.strip()
    if text and not (text.isascii() and text.isdigit() and int(text[:9]) <= MOST_REQUESTS):
        raise Refused(
            f"{text[:20]!r} is no number of requests a minute. Give 0 (any number) to {MOST_REQUESTS}, or nothing."
        )
    key.requests_per_minute = int(text) if text else None
    key.save(update_fields=["requests_per_minute"])
