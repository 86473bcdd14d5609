"""Every refusal of the API as RFC 9457 problem+json, whoever raised it."""

import logging
import math
from collections.abc import Mapping

from django.core.exceptions import PermissionDenied
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse
from rest_framework import exceptions
from rest_framework.response import Response

from trainingsite.rendering import JSONRenderer
from trajectories import pressure
from trajectories.errors import Away, Problem, Refused

logger = logging.getLogger(__name__)

DISK_FULL = "53100"  # SQLSTATE
DATABASE_RETRY = 5  # seconds after which a request may find the database there again

FAULT = "A fault of ours; it is in the log. Sending the same again is safe."
TITLES = {
    400: "The request cannot be understood",
    401: "No valid key",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    409: "Not as things are",
    410: "Gone",
    413: "Too large",
    415: "Unsupported media type",
    429: "Too many requests",
    500: "A fault of ours",
    503: "Not available now",
    507: "Storage is full",
}


def body(status: int, code: str, detail: str, **extra: object) -> dict[str, object]:
    """The fields of a problem; `extra` ones that are None are left out."""
    return {
        "type": f"urn:trainingsite:problem:{code}",
        "title": TITLES.get(status, "Problem"),
        "status": status,
        "code": code,
        "detail": detail,
        **{key: value for key, value in extra.items() if value is not None},
    }


def of(problem: Problem) -> dict[str, object]:
    """A `Problem` as the body of its answer."""
    reasons = problem.reasons if isinstance(problem, Refused) else []
    return body(
        problem.status,
        problem.code,
        problem.detail,
        pointer=problem.pointer,
        limit=problem.limit,
        size=problem.size,
        reasons=reasons or None,
    )


def exception_handler(exc: Exception, context: Mapping[str, object]) -> Response | None:
    """DRF's hook. What is not meant for people returns None: it is logged and becomes a 500."""
    headers: dict[str, str] = {}
    if isinstance(exc, OperationalError | InterfaceError):
        problem = away(exc)
        if problem is None:
            return None
        exc = problem
    if isinstance(exc, Problem):
        data = of(exc)
        if exc.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(exc.retry_after)))
    elif isinstance(exc, Http404):
        data = body(404, "not-found", "There is no such thing in this project.")
    elif isinstance(exc, PermissionDenied):
        data = body(403, "forbidden", str(exc) or "This key may not do that.")
    elif isinstance(exc, exceptions.APIException):
        code = exc.default_code.replace("_", "-")
        data = body(exc.status_code, code, _plain(exc.detail))
        if isinstance(exc, exceptions.AuthenticationFailed | exceptions.NotAuthenticated):
            headers["WWW-Authenticate"] = 'Bearer realm="trainingsite"'
        wait: float | None = getattr(exc, "wait", None)  # of Throttled; its stubs do not know
        if wait is not None:
            headers["Retry-After"] = str(max(1, round(wait)))
    else:
        return None
    status = data["status"]
    assert isinstance(status, int)
    response = Response(data, status=status, headers=headers)
    response.content_type = "application/problem+json"
    return response


def away(exc: OperationalError | InterfaceError) -> Problem | None:
    """What the database's failure means to the sender; None: a fault of ours, such as a statement it cannot run.

    It is gone, starting, full, overloaded, or chose this transaction to end a deadlock: the same again can help.
    """
    cause = exc.__cause__
    state = (getattr(cause, "sqlstate", None) or "") if cause is not None else ""
    if state.startswith("54"):  # program limit exceeded
        return None
    logger.warning("the database refused a request: %s", str(exc).strip().partition("\n")[0])
    if state == DISK_FULL:
        return pressure.disk_was_full()
    return Away(
        "The database is away or overloaded. Send the same again later: what of it is there already is not kept twice.",
        retry_after=DATABASE_RETRY,
    )


def _plain(detail: object) -> str:
    if isinstance(detail, list):
        return " ".join(_plain(part) for part in detail)
    if isinstance(detail, dict):
        return " ".join(f"{key}: {_plain(value)}" for key, value in detail.items())
    return str(detail)


def answer(status: int, code: str, detail: str) -> HttpResponse:
    """The same for plain Django views and the error pages of the API's paths."""
    return HttpResponse(
        JSONRenderer().render(body(status, code, detail)), status=status, content_type="application/problem+json"
    )


def is_api(request: HttpRequest) -> bool:
    return request.path.startswith(("/api/", "/otel/", "/v1/"))
