"""Is everything there? Live, ready, and the numbers for a monitor.

Only the database decides whether the site is ready: without it nothing can be recorded. Everything else that is away
is said in the body, because the site goes on without it. Each check is short, catches what it tries, and is typed.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
import redis
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils import timezone
from django.views.decorators.http import require_safe

BEAT_EVERY = timedelta(minutes=3)  # the schedule writes at least once a minute; this is late
DISK_LOW = 0.05  # share of the disk that is free
TIMEOUT = 1.5  # seconds, of each question to another process
KEPT_SECONDS = 5.0  # answers about other processes are kept this long: a health page must not load what it watches
WORKERS_KEY = "worker-seen"


@dataclass(frozen=True)
class Health:
    """One part: whether it is well, and a sentence for people."""

    ok: bool
    detail: str

    def row(self) -> dict[str, object]:
        return {"ok": self.ok, "detail": self.detail}


_kept: dict[str, tuple[float, Health]] = {}


def _keep(name: str, look: Callable[[], Health]) -> Health:
    at, found = _kept.get(name, (0.0, Health(False, "")))
    if time.monotonic() - at > KEPT_SECONDS or not at:
        found = look()
        _kept[name] = (time.monotonic(), found)
    return found


def forget() -> None:
    """Look anew at the next question (tests, and a person who presses reload)."""
    _kept.clear()


def database() -> Health:
    try:
        with connection.cursor() as cursor:
            cursor.execute("select 1")
            cursor.fetchone()
    except (DatabaseError, InterfaceError) as exc:
        return Health(False, f"The database does not answer: {str(exc).strip().splitlines()[0]}")
    return Health(True, "answers")


def _redis() -> "redis.Redis":
    return redis.Redis.from_url(
        settings.REDIS_URL.replace("redis+socket://", "unix://"), socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT
    )


def broker() -> Health:
    try:
        with _redis() as client:
            client.ping()
    except (redis.RedisError, ValueError, OSError) as exc:
        return Health(False, f"The broker does not answer ({exc}). Work waits in the database until it does.")
    return Health(True, "answers")


def schedule() -> Health:
    """Beat: when the last scheduled task was sent."""
    from django_celery_beat.models import PeriodicTask

    last = PeriodicTask.objects.filter(enabled=True, last_run_at__isnull=False).order_by("-last_run_at").first()
    if last is None or last.last_run_at is None:
        return Health(False, "The schedule has not run yet.")
    age = timezone.now() - last.last_run_at
    if age > BEAT_EVERY:
        return Health(False, f"The schedule last ran {age.total_seconds():.0f} s ago. Is beat running?")
    return Health(True, f"last ran {age.total_seconds():.0f} s ago")


def worker() -> Health:
    """A worker writes the time when it does scheduled work (`saw_worker`)."""
    try:
        with _redis() as client:
            seen = client.get(f"{settings.CELERY_BROKER_TRANSPORT_OPTIONS['global_keyprefix']}{WORKERS_KEY}")
    except (redis.RedisError, ValueError, OSError):
        return Health(False, "not known while the broker is away")
    if not isinstance(seen, bytes):
        return Health(False, "No worker has worked in the last minutes.")
    return Health(True, f"last worked {max(0.0, time.time() - float(seen)):.0f} s ago")


def saw_worker() -> None:
    """Called by scheduled tasks. A broker that is away is no reason to fail."""
    try:
        with _redis() as client:
            key = f"{settings.CELERY_BROKER_TRANSPORT_OPTIONS['global_keyprefix']}{WORKERS_KEY}"
            client.set(key, str(time.time()), ex=int(BEAT_EVERY.total_seconds()))
    except (redis.RedisError, ValueError, OSError):
        return


def storage() -> Health:
    """The data folder can be written, and its disk has room: told before writes are refused, and when they are."""
    from trajectories import pressure

    if why := pressure.why_full():
        return Health(False, f"{why} Nothing is taken in until there is more room.")
    folder = Path(settings.DATA_DIR)
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    free = f"{usage.free / 1e9:.1f} GB free"
    if not os.access(folder, os.W_OK):
        return Health(False, f"{settings.DATA_DIR} cannot be written.")
    if usage.free < DISK_LOW * usage.total:
        return Health(False, f"The disk is nearly full: {free}.")
    return Health(True, free)


def judge() -> Health:
    if not (settings.JUDGE_BASE_URL and settings.JUDGE_MODEL):
        return Health(True, "No LLM judge is configured; recorded rewards and rules count.")
    headers = {"Authorization": f"Bearer {settings.JUDGE_API_KEY}"} if settings.JUDGE_API_KEY else {}
    return _endpoint(f"{settings.JUDGE_BASE_URL.rstrip('/')}/models", headers, "The judge")


def serving() -> Health:
    if not settings.MODEL_SERVER_URL:
        return Health(True, "No model server is configured; versions are trained but not served.")
    key = settings.MODEL_SERVER_API_KEY
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base = settings.MODEL_SERVER_URL.rstrip("/")
    return _endpoint(f"{base}/health", headers, "The model server")


def gateway() -> Health:
    """What the gateway says of itself: alarms of its spool are its own."""
    if not settings.GATEWAY_URL:
        return Health(True, "No gateway is configured.")
    url = f"{settings.GATEWAY_URL.rstrip('/')}/healthz"
    try:
        said = httpx.get(url, timeout=TIMEOUT).json()
        return Health(bool(said["ok"]), str(said["detail"]))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as exc:
        return Health(False, f"The gateway at {url} does not answer: {exc or type(exc).__name__}")


def _endpoint(url: str, headers: dict[str, str], what: str) -> Health:
    try:
        response = httpx.get(url, headers=headers, timeout=TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        return Health(False, f"{what} at {url} does not answer: {exc or type(exc).__name__}")
    if response.status_code >= 400:
        return Health(False, f"{what} at {url} answers {response.status_code}.")
    return Health(True, f"answers at {url}")


def parts() -> dict[str, Health]:
    """Everything, for pages and `status`. What needs the database is not asked when it is away."""
    return {**near(), **far()}


def near() -> dict[str, Health]:
    """What this process sees by itself, at once."""
    found = {"database": database()}
    if found["database"].ok:
        found["beat"] = _keep("beat", schedule)
    found["broker"] = _keep("broker", broker)
    found["worker"] = _keep("worker", worker)
    found["storage"] = storage()
    return found


def far() -> dict[str, Health]:
    """Servers that are asked over HTTP: each that is away costs its time-out."""
    return {"judge": _keep("judge", judge), "serving": _keep("serving", serving), "gateway": _keep("gateway", gateway)}


def migrated() -> bool:
    """Whether this database has all tables: asked once, then known."""
    if "migrated" not in _kept:
        from django.db.migrations.executor import MigrationExecutor

        executor = MigrationExecutor(connection)
        if executor.migration_plan(executor.loader.graph.leaf_nodes()):
            return False
        _kept["migrated"] = (time.monotonic(), Health(True, ""))
    return True


@require_safe
def healthz(request: HttpRequest) -> HttpResponse:
    """Live: the process answers."""
    return JsonResponse({"ok": True})


@require_safe
def readyz(request: HttpRequest) -> HttpResponse:
    """Ready: 503 while the database is away or is being prepared; the other parts are told, they do not decide."""
    found = parts()
    ready = found["database"].ok
    detail = found["database"].detail
    if ready and not migrated():
        ready, detail = False, "The database is being prepared."
    body = {"ok": ready, "detail": detail, "parts": {name: part.row() for name, part in found.items()}}
    return JsonResponse(body, status=200 if ready else 503)


@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """Prometheus text: parts, and how much waits. No numbers of single projects: this page asks for no key."""
    from trajectories.models import IndexingWork

    lines = ["# HELP trainingsite_up Whether a part is well.", "# TYPE trainingsite_up gauge"]
    found = parts()
    lines += [f'trainingsite_up{{part="{name}"}} {int(part.ok)}' for name, part in found.items()]
    if found["database"].ok:
        oldest = IndexingWork.objects.order_by("pk").values_list("created_at", flat=True).first()
        lag = max(0.0, (timezone.now() - oldest).total_seconds()) if oldest else 0.0
        lines += [
            "# HELP trainingsite_indexing_lag_seconds Age of the oldest write that is not indexed yet.",
            "# TYPE trainingsite_indexing_lag_seconds gauge",
            f"trainingsite_indexing_lag_seconds {lag:.3f}",
        ]
    return HttpResponse("\n".join(lines) + "\n", content_type="text/plain; version=0.0.4; charset=utf-8")
