"""Small JSON bodies, read under a limit and decoded into a frozen struct: shape is checked once, here."""

import re
from typing import TypeVar

import msgspec
from rest_framework.request import Request

from training import limits
from trajectories.body import drain
from trajectories.errors import Invalid, TooLarge

Shape = TypeVar("Shape", bound=msgspec.Struct)

_MOST = re.compile(r"<= (\d+)")
_PLACE = re.compile(r" - at `(?:key in )?\$([^`]*)`$")


def read(request: Request, shape: type[Shape]) -> Shape:
    """The body as `shape`; nothing sent counts as `{}`.

    Raises:
        TooLarge: above `limits.BODY_BYTES`.
        Invalid: not JSON, or not of this shape; with the place as a JSON pointer.
    """
    limit = limits.BODY_BYTES
    raw = request._request.read(limit + 1)  # not request.body, whose limit is Django's own
    if len(raw) > limit:
        announced = request.META.get("CONTENT_LENGTH") or ""
        size = int(announced) if announced.isascii() and announced.isdigit() else None
        drain(request)
        raise TooLarge(
            f"The body has {size or f'more than {limit}'} bytes; {limit} are allowed.",
            pointer="",
            limit=limit,
            size=size,
        )
    if b"\\u0000" in raw:
        raise Invalid("The body holds the character NUL (\\u0000), which cannot be stored. Send it without.")
    try:
        return msgspec.json.decode(raw.strip() or b"{}", type=shape)
    except msgspec.ValidationError as exc:
        place = _PLACE.search(str(exc))
        pointer = re.sub(r"\.|\[(\d+)\]", lambda part: f"/{part[1] or ''}", place[1]) if place else ""
        most = _MOST.search(str(exc))
        raise Invalid(_PLACE.sub("", str(exc)) + ".", pointer=pointer, limit=int(most[1]) if most else None) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Invalid(f"The body is not JSON: {exc}", pointer="") from exc
