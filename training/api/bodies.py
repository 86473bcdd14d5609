"""Small JSON bodies, read under a limit and decoded into a frozen struct: shape is checked once, here."""

import re
from typing import TypeVar

import msgspec
from rest_framework.request import Request

from trajectories.errors import Invalid, TooLarge

MAX_BYTES = 256 * 1024

Shape = TypeVar("Shape", bound=msgspec.Struct)

_PLACE = re.compile(r" - at `(?:key in )?\$([^`]*)`$")


def read(request: Request, shape: type[Shape]) -> Shape:
    """The body as `shape`; nothing sent counts as `{}`.

    Raises:
        TooLarge: above MAX_BYTES.
        Invalid: not JSON, or not of this shape; with the place as a JSON pointer.
    """
    raw = request._request.read(MAX_BYTES + 1)  # not request.body, whose limit is Django's own
    if len(raw) > MAX_BYTES:
        raise TooLarge(f"The body is above {MAX_BYTES} bytes.", limit=MAX_BYTES)
    if b"\\u0000" in raw:
        raise Invalid("The body holds the character NUL (\\u0000), which cannot be stored. Send it without.")
    try:
        return msgspec.json.decode(raw.strip() or b"{}", type=shape)
    except msgspec.ValidationError as exc:
        place = _PLACE.search(str(exc))
        pointer = re.sub(r"\.|\[(\d+)\]", lambda part: f"/{part[1] or ''}", place[1]) if place else ""
        raise Invalid(_PLACE.sub("", str(exc)) + ".", pointer=pointer) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Invalid(f"The body is not JSON: {exc}", pointer="") from exc
