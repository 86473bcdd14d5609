"""Keys of the API: made once, kept as hashes, scoped, expiring."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from django.contrib.auth.models import AnonymousUser, User
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from trajectories.models import ApiKey, Project, Scope

if TYPE_CHECKING:  # rest_framework.views imports this module by its settings
    from rest_framework.views import APIView

PREFIX = "ts_"
SHOWN = 10  # characters kept in the clear, to tell keys apart
LAST_USED_EVERY = timedelta(minutes=1)


def hash_of(key: str) -> str:
    """SHA-256: the key is 256 random bits, so a slow hash would protect nothing and cost every request."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def make_key(
    project: Project,
    name: str,
    scopes: Sequence[str] = (Scope.INGEST, Scope.READ),
    *,
    owner: User | None = None,
    expires_at: datetime | None = None,
    requests_per_minute: int | None = None,
) -> tuple[ApiKey, str]:
    """A new key: its row, and the key itself, which is not kept and cannot be shown again."""
    key = PREFIX + secrets.token_urlsafe(32)
    row = ApiKey.objects.create(
        project=project,
        name=name,
        prefix=key[:SHOWN],
        key_hash=hash_of(key),
        scopes=list(dict.fromkeys(scopes)),
        owner=owner,
        expires_at=expires_at,
        requests_per_minute=requests_per_minute,
    )
    return row, key


class ApiKeyAuthentication(BaseAuthentication):
    """`Authorization: Bearer <key>`, or `X-API-Key: <key>`. All that is wrong with a key gets the same answer."""

    def authenticate(self, request: Request) -> tuple[User | AnonymousUser, ApiKey] | None:
        header = request.headers.get("Authorization", "")
        scheme, _, key = header.partition(" ")
        if scheme.lower() != "bearer":
            key = request.headers.get("X-API-Key", "")
        key = key.strip()
        if not key:
            return None
        row = ApiKey.objects.select_related("project", "owner").filter(key_hash=hash_of(key)).first()
        now = timezone.now()
        if row is None or not row.is_live(now) or (row.owner is not None and not row.owner.is_active):
            raise AuthenticationFailed("The key is unknown, expired or revoked. Make one with create_api_key.")
        if row.last_used_at is None or now - row.last_used_at > LAST_USED_EVERY:
            ApiKey.objects.filter(pk=row.pk).update(last_used_at=now)
        return row.owner or AnonymousUser(), row

    def authenticate_header(self, request: Request) -> str:
        return 'Bearer realm="trainingsite"'


class HasScope(BasePermission):
    """The key holds one of the scopes that the view asks for this method."""

    def has_permission(self, request: Request, view: "APIView") -> bool:
        key = request.auth
        if not isinstance(key, ApiKey):
            return False
        scopes: Mapping[str, Sequence[str]] = getattr(view, "scopes", {})
        method = "GET" if request.method in ("HEAD", "OPTIONS") else request.method or "GET"
        wanted = scopes.get(method, ())
        if set(wanted) & set(key.scopes):
            return True
        self.message = f"This key lacks the scope {' or '.join(wanted) or '(none allows this)'}."
        return False
