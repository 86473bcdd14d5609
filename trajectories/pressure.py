"""When to say "later": a key that asks too often, a disk that is nearly full.

The rate of a key is a token bucket that holds one minute's worth. It lies in the broker, so it is exact over all web
processes and costs one short question of those keys that have a rate; while the broker is away each process keeps its
own bucket, so a key gets at most its rate times the number of processes. No row is written for it.
"""

import logging
import shutil
import threading
import time
from collections import OrderedDict
from pathlib import Path

import redis
from django.conf import settings
from django.core.files.storage import FileSystemStorage, storages
from django.db import DatabaseError, InterfaceError, connection

from trajectories.errors import Full, TooMany
from trajectories.models import ApiKey

logger = logging.getLogger(__name__)

BROKER_SECONDS = 0.1  # longest wait for the broker's answer
QUIET_SECONDS = 5.0  # a broker that did not answer is not asked again for so long
BUCKETS = 10_000  # keys whose buckets a process remembers
LOOK_EVERY = 1.0  # seconds between two looks at the disks
MEASURE_EVERY = 30.0  # seconds between two questions for the database's size: it counts files
FULL_RETRY = 30  # seconds after which somebody may have made room
MB = 1024 * 1024

# KEYS[1] the bucket; ARGV: tokens a millisecond, size. Answers the milliseconds until there is a token, 0: taken.
_TAKE = """
local t = redis.call('TIME')
local now = t[1] * 1000 + t[2] / 1000
local rate, size = tonumber(ARGV[1]), tonumber(ARGV[2])
local kept = redis.call('HMGET', KEYS[1], 'left', 'at')
local left = tonumber(kept[1]) or size
local at = tonumber(kept[2]) or now
left = math.min(size, left + math.max(0, now - at) * rate)
local wait = 0
if left >= 1 then left = left - 1 else wait = (1 - left) / rate end
redis.call('HSET', KEYS[1], 'left', tostring(left), 'at', string.format('%.3f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil(size / rate) + 1000)
return tostring(wait)
"""

# --- keys ----------------------------------------------------------------------------------------------------------


def rate_of(key: ApiKey) -> int:
    """Requests a minute; 0: as many as come."""
    own = key.requests_per_minute
    return int(settings.API_REQUESTS_PER_MINUTE) if own is None else own


def admit(key: ApiKey) -> None:
    """Count a request of the key.

    Raises:
        TooMany: with the seconds until the next one may come.
    """
    rate = rate_of(key)
    if not rate:
        return
    wait = _take(key.pk, rate)
    if wait > 0:
        raise TooMany(
            f"This key may send {rate} requests a minute; the next one in {wait:.1f} s. Send many trajectories in one "
            "request to bulk/, or have an operator raise the key's rate.",
            limit=rate,
            retry_after=wait,
        )


def _take(bucket: int, rate: int) -> float:
    """Seconds to wait; 0: admitted."""
    global _quiet_until
    if time.monotonic() >= _quiet_until:
        try:
            name = f"{settings.CELERY_BROKER_TRANSPORT_OPTIONS['global_keyprefix']}rate:{bucket}"
            answer = _broker().register_script(_TAKE)(keys=[name], args=[rate / 60_000, rate])
            return float(answer) / 1000
        except (redis.RedisError, ValueError, OSError) as exc:
            _quiet_until = time.monotonic() + QUIET_SECONDS
            logger.warning("broker away, rates of keys are counted by each process: %s", exc)
    return _take_here(bucket, rate, time.monotonic())


def _take_here(bucket: int, rate: int, now: float) -> float:
    with _lock:
        left, at = _buckets.pop(bucket, (float(rate), now))
        left = min(float(rate), left + (now - at) * rate / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / rate
        _buckets[bucket] = (left if wait else left - 1, now)
        if len(_buckets) > BUCKETS:
            _buckets.popitem(last=False)
    return wait


def _broker() -> "redis.Redis":
    global _client
    if _client is None:
        _client = redis.Redis.from_url(
            settings.REDIS_URL.replace("redis+socket://", "unix://"),
            socket_timeout=BROKER_SECONDS,
            socket_connect_timeout=BROKER_SECONDS,
        )
    return _client


# --- room ----------------------------------------------------------------------------------------------------------


def check_room() -> None:
    """Call before anything is written that somebody sent. Costs a look at the clock; the disks once a second.

    Raises:
        Full: there is less room than the floor.
    """
    if why := why_full():
        raise Full(
            f"{why} Nothing is taken in until there is more room; what was acknowledged is safe and can be read.",
            retry_after=FULL_RETRY,
        )


def why_full() -> str:
    """What is nearly full, for people; "" when there is room."""
    global _looked
    at, found = _looked
    now = time.monotonic()
    if now >= at:
        found = _look(now)
        _looked = (now + LOOK_EVERY, found)
    return found


def disk_was_full() -> Full:
    """The database could not write: nobody else need find that out for a while."""
    global _looked
    _looked = (time.monotonic() + FULL_RETRY, "The database's disk is full.")
    return Full(
        "The database's disk is full. Nothing of this request is kept; reading goes on.", retry_after=FULL_RETRY
    )


def floor_bytes(total: int) -> int:
    """How much of a disk must stay free: the database needs room to write its log when it stops."""
    given = int(settings.DISK_FREE_FLOOR_MB)
    return given * MB if given >= 0 else max(64 * MB, min(total // 20, 2048 * MB))


def watched() -> list[Path]:
    """Folders whose disks are looked at."""
    found = [Path(settings.DATA_DIR), *(Path(one) for one in settings.DISK_WATCH)]
    for name in ("default", "archive"):
        storage = storages[name]
        if isinstance(storage, FileSystemStorage):
            found.append(Path(storage.location))
    return found


def _look(now: float) -> str:
    seen: set[int] = set()
    for folder in watched():
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            device, usage = folder.stat().st_dev, shutil.disk_usage(folder)
        except OSError as exc:
            logger.warning("the disk of %s cannot be looked at: %s", folder, exc)
            continue
        if device in seen:
            continue
        seen.add(device)
        floor = floor_bytes(usage.total)
        if usage.free < floor:
            return (
                f"The disk of {folder} is nearly full: {usage.free // MB} MB are free, {floor // MB} MB must stay so."
            )
    most = int(settings.DATABASE_MAX_MB)
    if most and (size := _database_size(now)) is not None and size > most * MB:
        return f"The database has {size // MB} MB; DATABASE_MAX_MB allows {most}."
    return ""


def _database_size(now: float) -> int | None:
    """Bytes, as of the last half minute; None while it cannot be asked."""
    global _measured
    at, size = _measured
    if now < at:
        return size
    try:
        with connection.cursor() as cursor:
            cursor.execute("select pg_database_size(current_database())")
            size = int(cursor.fetchone()[0])
    except (DatabaseError, InterfaceError):
        size = None
    _measured = (now + MEASURE_EVERY, size)
    return size


_lock = threading.Lock()
_buckets: "OrderedDict[int, tuple[float, float]]" = OrderedDict()  # key → (tokens left, when that was)
_client: "redis.Redis | None" = None
_quiet_until = 0.0
_looked = (0.0, "")  # (look again at, what was found)
_measured: tuple[float, int | None] = (0.0, None)


def forget() -> None:
    """Look anew (tests)."""
    global _client, _quiet_until, _looked, _measured
    _buckets.clear()
    _client, _quiet_until, _looked, _measured = None, 0.0, (0.0, ""), (0.0, None)
