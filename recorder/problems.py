"""What the site refuses, by what the caller should do next; read from its problem+json answers."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

LONGEST_WAIT = 3600.0  # seconds that a Retry-After is believed


class ApiError(Exception):
    """The base of all. `str()` is the site's sentence, with what to do about it."""

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        code: str = "",
        pointer: str | None = None,
        limit: int | None = None,
        reasons: list[dict[str, object]] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status  # of HTTP; None: there was no answer
        self.code = code  # "conflict", "refused", "too-large", …
        self.pointer = pointer  # RFC 6901, into the body that was sent
        self.limit = limit
        self.reasons = reasons or []  # rows {"check", "value", "threshold", "ok", "detail"}
        self.retry_after = retry_after  # seconds


class Invalid(ApiError):
    """What was sent cannot be understood, or is too large. Sending it again cannot help."""


class NotAllowed(ApiError):
    """The key is missing, unknown, expired, or lacks the scope."""


class NotFound(ApiError):
    """There is no such thing in the key's project."""


class Conflict(ApiError):
    """The id is taken by other content; what came first is kept."""


class Gone(ApiError):
    """The id belonged to something that was erased."""


class Refused(ApiError):
    """Understood, and not possible as things are: `reasons` say why, where the site gave them."""


class Unavailable(ApiError):
    """No answer, or one that says: later. Asking again can help, after `retry_after` seconds where it is given."""


def of(response: httpx.Response) -> ApiError:
    """The error that an answer of 300 and more stands for."""
    body = _body(response)
    status = response.status_code
    code = _text(body.get("code"))
    kind: type[ApiError]
    if status in (408, 425, 429) or status >= 500:
        kind = Unavailable
    elif status in (401, 403):
        kind = NotAllowed
    elif status == 404:
        kind = NotFound
    elif status == 409:
        kind = Conflict if code == "conflict" else Refused
    elif status == 410:
        kind = Gone
    else:
        kind = Invalid
    limit, pointer, reasons = body.get("limit"), body.get("pointer"), body.get("reasons")
    return kind(
        _text(body.get("detail")) or f"The site answered {status} {response.reason_phrase} without saying why.",
        status=status,
        code=code,
        pointer=pointer if isinstance(pointer, str) else None,
        limit=limit if isinstance(limit, int) else None,
        reasons=[one for one in reasons if isinstance(one, dict)] if isinstance(reasons, list) else None,
        retry_after=retry_after(response.headers.get("Retry-After")),
    )


def no_answer(exc: httpx.HTTPError) -> Unavailable:
    return Unavailable(f"The site does not answer: {type(exc).__name__}: {exc}", code="no-answer")


def retry_after(header: str | None) -> float | None:
    """Seconds from a Retry-After header, given as a number or as a date; None: not there, or not readable."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            when = parsedate_to_datetime(header)
        except ValueError:
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else None


def _body(response: httpx.Response) -> Mapping[str, object]:
    try:
        body: object = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
