"""Every limit on what may be sent, in one place; `GET /api/v1/limits/` answers with them."""

from datetime import timedelta

from trajectories.models import ID_LENGTH

MiB = 1024 * 1024

ITEM_BYTES = 32 * MiB  # of one trajectory, unpacked: a POST's body, a line of NDJSON, an item of a batch
BATCH_JSON_BYTES = 64 * MiB  # of {"batch": […]}, which must be held whole; NDJSON is read line by line
NDJSON_BYTES = 4096 * MiB  # of a whole NDJSON body, unpacked
SMALL_BODY_BYTES = 1 * MiB  # of rewards, scenarios, ends
BULK_ITEMS = 10_000
STEPS = 20_000
HISTORIES = 1_000
ID_CHARACTERS = ID_LENGTH
COLUMN_JSON_BYTES = 256 * 1024  # of scenario metadata, of reward components
GROUP_SIZE = 10_000
CLOCK_SKEW = timedelta(hours=1)  # how far ahead of our clock a time may lie
EARLIEST_YEAR = 1970
REWARD_WAIT = timedelta(hours=24)  # how long a reward for an unknown id is kept
PAGE = 200  # rows of a list
DRAIN_BYTES = 256 * MiB  # of a refused body that is still read, so that the sender sees the answer


def published() -> dict[str, object]:
    """The body of GET /api/v1/limits/: sizes in bytes, unpacked, unless the name says otherwise."""
    return {
        "trajectory_bytes": ITEM_BYTES,
        "batch_json_bytes": BATCH_JSON_BYTES,
        "ndjson_bytes": NDJSON_BYTES,
        "small_body_bytes": SMALL_BODY_BYTES,
        "bulk_items": BULK_ITEMS,
        "steps": STEPS,
        "histories": HISTORIES,
        "id_characters": ID_CHARACTERS,
        "column_json_bytes": COLUMN_JSON_BYTES,
        "group_size": GROUP_SIZE,
        "clock_skew_seconds": int(CLOCK_SKEW.total_seconds()),
        "earliest_year": EARLIEST_YEAR,
        "reward_wait_seconds": int(REWARD_WAIT.total_seconds()),
        "page": PAGE,
        "content_encodings": ["identity", "gzip", "zstd"],
        "formats": {"in": ["native", "messages"], "out": ["native"]},
    }
