"""Every limit on what may be sent, in one place; `GET /api/v1/limits/` answers with them.

`listed` names them all, with units and what more is answered with; a test walks the list and shows each at its limit
and one above. What another package enforces it adds by `also`.
"""

from collections.abc import Callable, Iterable
from datetime import timedelta

import msgspec
from django.conf import settings

from trajectories.models import ID_LENGTH

MiB = 1024 * 1024

ITEM_BYTES = 32 * MiB  # of one trajectory, unpacked: a POST's body, a line of NDJSON, an item of a batch
OPEN_BYTES = 256 * MiB  # of all steps of an open trajectory together, as JSON: its end holds them all
PART_BYTES = 256 * 1024  # a larger text or value inside a trajectory lies in blob storage
BATCH_JSON_BYTES = 32 * MiB  # of {"batch": […]}, which must be held whole; NDJSON is read line by line
NDJSON_BYTES = 4096 * MiB  # of a whole NDJSON body, unpacked
OTLP_BYTES = 32 * MiB  # of an export of spans or log records, unpacked
SMALL_BODY_BYTES = 1 * MiB  # of rewards, scenarios, ends
BULK_ITEMS = 10_000
STEPS = 20_000
HISTORIES = 1_000
ID_CHARACTERS = ID_LENGTH
EVALUATION_ID_CHARACTERS = 64
REWARD_SOURCE_CHARACTERS = 100
COLUMN_JSON_BYTES = 256 * 1024  # of scenario metadata, of reward components
GROUP_SIZE = 10_000
CLOCK_SKEW = timedelta(hours=1)  # how far ahead of our clock a time may lie
EARLIEST_YEAR = 1970
REWARD_WAIT = timedelta(hours=24)  # how long a reward for an unknown id is kept
PAGE = 200  # rows of a list
DRAIN_BYTES = 256 * MiB  # of a refused body that is still read, so that the sender sees the answer
REDACTION_SECONDS = 2.0  # of one rule on one trajectory


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """One limit, as it is published."""

    name: str
    value: int
    unit: str
    what: str
    status: int | None = 413  # what more is answered with; None: nothing is refused, `what` says what happens


_others: list[Callable[[], Iterable[Limit]]] = []


def also(limits: Callable[[], Iterable[Limit]]) -> None:
    """Publish limits that another package enforces."""
    _others.append(limits)


def listed() -> list[Limit]:
    """All of them, as they are now."""
    return [
        Limit(
            name="trajectory_bytes",
            value=ITEM_BYTES,
            unit="bytes",
            what="one trajectory, or the steps of one request, unpacked: a body, a line of NDJSON, an item of a batch",
        ),
        Limit(
            name="open_trajectory_bytes",
            value=OPEN_BYTES,
            unit="bytes",
            what="all steps of an open trajectory together, as JSON",
        ),
        Limit(
            name="part_bytes",
            value=PART_BYTES,
            unit="bytes",
            what="a larger text or value lies in blob storage and is given back whole",
            status=None,
        ),
        Limit(name="batch_json_bytes", value=BATCH_JSON_BYTES, unit="bytes", what='a {"batch": […]} body, unpacked'),
        Limit(name="ndjson_bytes", value=NDJSON_BYTES, unit="bytes", what="a whole NDJSON body, unpacked"),
        Limit(
            name="otlp_bytes", value=OTLP_BYTES, unit="bytes", what="an OTLP export of spans or log records, unpacked"
        ),
        Limit(
            name="small_body_bytes",
            value=SMALL_BODY_BYTES,
            unit="bytes",
            what="the body of a reward, a scenario, an end",
        ),
        Limit(name="bulk_items", value=BULK_ITEMS, unit="items", what="trajectories of one bulk request"),
        Limit(name="steps", value=STEPS, unit="steps", what="steps of one trajectory"),
        Limit(name="histories", value=HISTORIES, unit="histories", what="conversations of one trajectory (messages)"),
        Limit(
            name="id_characters",
            value=ID_CHARACTERS,
            unit="characters",
            what="every id that a sender chooses, and role",
            status=400,
        ),
        Limit(
            name="evaluation_id_characters",
            value=EVALUATION_ID_CHARACTERS,
            unit="characters",
            what="evaluation_id",
            status=400,
        ),
        Limit(
            name="reward_source_characters",
            value=REWARD_SOURCE_CHARACTERS,
            unit="characters",
            what="source of a late reward",
            status=400,
        ),
        Limit(
            name="column_json_bytes",
            value=COLUMN_JSON_BYTES,
            unit="bytes",
            what="a scenario's description, its metadata, reward_components",
        ),
        Limit(name="group_size", value=GROUP_SIZE, unit="attempts", what="group_size", status=400),
        Limit(
            name="clock_skew_seconds",
            value=int(CLOCK_SKEW.total_seconds()),
            unit="seconds",
            what="how far ahead of the site's clock a time may lie",
            status=400,
        ),
        Limit(name="earliest_year", value=EARLIEST_YEAR, unit="year", what="no time lies before it", status=400),
        Limit(
            name="reward_wait_seconds",
            value=int(REWARD_WAIT.total_seconds()),
            unit="seconds",
            what="how long a reward for an unknown id waits; then it is marked as expired",
            status=None,
        ),
        Limit(name="page", value=PAGE, unit="rows", what="`limit` of a list of trajectories or scenarios", status=400),
        Limit(
            name="refused_bytes_read",
            value=DRAIN_BYTES,
            unit="bytes",
            what="of a refused body that is still read, so that the sender sees the answer; then the connection closes",
            status=None,
        ),
        Limit(
            name="redaction_milliseconds",
            value=int(REDACTION_SECONDS * 1000),
            unit="milliseconds",
            what="one redaction rule on one trajectory; longer: refused, or stored with a finding, as the project says",
            status=409,
        ),
        Limit(
            name="requests_per_minute",
            value=int(settings.API_REQUESTS_PER_MINUTE),
            unit="requests a minute",
            what="of a key that has no rate of its own; 0: as many as come",
            status=429,
        ),
        Limit(
            name="disk_free_floor_mb",
            value=int(settings.DISK_FREE_FLOOR_MB),
            unit="MiB",
            what="less room on a disk of the site: nothing is taken in; -1: 5 % of the disk, 64 to 2048 MiB",
            status=507,
        ),
        Limit(
            name="database_max_mb",
            value=int(settings.DATABASE_MAX_MB),
            unit="MiB",
            what="a larger database: nothing is taken in; 0: not limited",
            status=507,
        ),
        *(one for other in _others for one in other()),
    ]


def published() -> dict[str, object]:
    """The body of GET /api/v1/limits/: each limit by its name, and under `limits` with unit and meaning."""
    rows = listed()
    return {
        **{one.name: one.value for one in rows},
        "content_encodings": ["identity", "gzip", "zstd"],
        "formats": {"in": ["native", "messages"], "out": ["native"]},
        "limits": rows,
    }
