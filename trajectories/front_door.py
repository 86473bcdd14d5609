"""POST /api/v1/trajectories/ straight from the server, without what the rest of the site has around a view.

Sessions, messages, CSRF marks and content negotiation do not concern an agent that sends one trajectory, and together
they cost more than recording it. Whatever is out of the ordinary (no key that may, a packed or large body, another
format) takes the ordinary way before a byte of the body is read; the answers are the same on both.
"""

import logging
import math
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, cast

import msgspec
from django.db import InterfaceError, OperationalError, close_old_connections, connection

from trainingsite import problems
from trajectories import api, auth, formats, ingestion, limits, pressure
from trajectories.errors import Invalid, Problem
from trajectories.models import ApiKey, Scope

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

PATHS = frozenset({"/api/v1/trajectories/", "/api/v1/trajectories"})
FORMATS = {"": "native", "format=native": "native", "format=messages": "messages"}
ORDINARY_BYTES = 256 * 1024  # a longer body is read piece by piece, when there is room for it

logger = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()

Answer = tuple[str, str, bytes, float | None]  # status line, content type, body, seconds to wait


class FrontDoor:
    """A WSGI application in front of the site's."""

    def __init__(self, site: "WSGIApplication") -> None:
        self.site = site

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if environ["PATH_INFO"] not in PATHS or environ["REQUEST_METHOD"] != "POST":
            return self.site(environ, start_response)
        size = environ.get("CONTENT_LENGTH", "")
        name = FORMATS.get(environ.get("QUERY_STRING", ""))
        plain = environ.get("HTTP_CONTENT_ENCODING", "identity") == "identity" and "HTTP_EXPECT" not in environ
        if (
            name is None
            or not plain
            or not (size.isascii() and size.isdigit())
            or int(size) > min(ORDINARY_BYTES, limits.ITEM_BYTES)
        ):
            return self.site(environ, start_response)
        if not connection.in_atomic_block:  # of a test
            close_old_connections()
        try:
            key = auth.live(auth.key_in(environ.get("HTTP_AUTHORIZATION", ""), environ.get("HTTP_X_API_KEY", "")))
        except (OperationalError, InterfaceError):
            key = None  # the ordinary way says what is wrong
        if key is None or Scope.INGEST not in key.scopes:
            return self.site(environ, start_response)
        status, kind, data, wait = _answer(key, cast(IO[bytes], environ["wsgi.input"]), int(size), name)
        headers = [
            ("Content-Type", kind),
            ("Content-Length", str(len(data))),
            ("X-Content-Type-Options", "nosniff"),
            *((("Retry-After", str(max(1, math.ceil(wait)))),) if wait is not None else ()),
        ]
        start_response(status, headers)
        return (data,)


def _answer(key: ApiKey, source: IO[bytes], size: int, name: str) -> Answer:
    raw = _read(source, size)  # whatever comes of it: who still sends does not see an answer
    try:
        pressure.admit(key)
        pressure.check_room()
        if len(raw) < size:
            raise Invalid(f"The body broke off: {size - len(raw)} bytes of its Content-Length did not come.")
        recorded = ingestion.record(key.project, formats.incoming(raw, name))
        if recorded.outcome != "replay":
            api.wake(key.project)
        status = "201 Created" if recorded.created else "200 OK"
        return status, "application/json", _encoder.encode(api.receipt(recorded)), None
    except Problem as problem:
        return _refused(problem)
    except (OperationalError, InterfaceError) as exc:
        away = problems.away(exc)
        if away is not None:
            return _refused(away)
        logger.exception("a trajectory could not be recorded")
    except Exception:
        logger.exception("a trajectory could not be recorded")
    return _problem(problems.body(500, "fault", problems.FAULT), None)


def _read(source: IO[bytes], size: int) -> bytes:
    parts: list[bytes] = []
    left = size
    while left > 0 and (part := source.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _refused(problem: Problem) -> Answer:
    return _problem(problems.of(problem), problem.retry_after)


def _problem(body: dict[str, object], wait: float | None) -> Answer:
    return f"{body['status']} {body['title']}", "application/problem+json", _encoder.encode(body), wait
