"""Lists by opaque cursor, newest first, without totals."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from django.db.models import Model, QuerySet
from rest_framework.request import Request

from training import limits
from trajectories.errors import Invalid

DEFAULT = 50

Row = TypeVar("Row", bound=Model)


@dataclass(frozen=True)
class Page(Generic[Row]):
    rows: Sequence[Row]
    next: str | None  # the cursor of the page after this one; None on the last


def page(request: Request, rows: QuerySet[Row]) -> Page[Row]:
    """The page that `?cursor=&limit=` ask for, by falling primary key.

    Raises:
        Invalid: the limit is no number from 1 to MOST, or the cursor is none of ours.
    """
    limit = _limit(request.query_params.get("limit"))
    after = _pk(request.query_params.get("cursor"))
    if after is not None:
        rows = rows.filter(pk__lt=after)
    found = list(rows.order_by("-pk")[: limit + 1])
    more = len(found) > limit
    return Page(found[:limit], _cursor(found[limit - 1].pk) if more else None)


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT
    size = int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
    if size is None or not 1 <= size <= limits.PAGE:
        raise Invalid(
            f"limit is {text[:20]!r}; give a whole number from 1 to {limits.PAGE}.",
            pointer="?limit",
            limit=limits.PAGE,
            size=size,
        )
    return size


def _cursor(pk: int) -> str:
    return base64.urlsafe_b64encode(f"pk:{pk}".encode()).decode().rstrip("=")


def _pk(cursor: str | None) -> int | None:
    if not cursor:
        return None
    try:
        name, _, number = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii").partition(":")
        if name == "pk" and number.isascii() and number.isdigit() and len(number) < 19:
            return int(number)
    except (ValueError, binascii.Error):
        pass
    raise Invalid("cursor is none of ours. Leave it out to begin, or give `next` of the page before.")
