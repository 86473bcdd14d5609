"""The end of a trajectory whose calls may still lie in the gateway's spool: it must not overtake them.

The gateway puts the end behind the calls. Whoever has called the gateway may end a trajectory before the database has
heard of it, so an unknown id is the gateway's to know, too.
"""

from urllib.parse import quote

import httpx
import msgspec
from django.conf import settings

from trajectories import payloads
from trajectories.errors import Away, Conflict, Gone, Invalid, Problem, TooLarge, TooMany
from trajectories.models import Project, State, Trajectory
from trajectories.payloads import EndBody
from trajectories.running import GATEWAY

SECONDS = 25.0  # the gateway waits for calls under way, and for the database
RETRY = 5

PROBLEMS: dict[int, type[Problem]] = {
    400: Invalid, 409: Conflict, 410: Gone, 413: TooLarge, 429: TooMany,
}  # fmt: skip


class _Said(msgspec.Struct):
    message: str


class _Error(msgspec.Struct):
    error: _Said


def end(project: Project, trajectory_id: str, body: EndBody, key: str) -> bool:
    """Have the gateway seal the trajectory, if calls of it may lie in its spool.

    Returns:
        Whether the end may be taken here and now: nothing is in the spool, or it was sealed (then it is a replay).
        False: the gateway has taken it and the database will hear of it later.

    Raises:
        Problem: as the gateway refuses it. Away: it does not answer.
    """
    if not settings.GATEWAY_URL:
        return True
    row = (
        Trajectory.objects.filter(project=project, trajectory_id=trajectory_id)
        .values_list("state", "source_format")
        .first()
    )
    if row is not None and (row[0] == State.SEALED or row[1] != GATEWAY):
        return True
    url = f"{settings.GATEWAY_URL.rstrip('/')}/v1/trajectories/{quote(trajectory_id, safe='')}/end/"
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        answer = httpx.post(url, content=payloads.encode(body), headers=headers, timeout=SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise Away(
            "The gateway does not answer, and calls of this trajectory may lie in its spool. Send the end again later.",
            retry_after=RETRY,
        ) from exc
    if answer.status_code in (200, 404):
        return True
    if answer.status_code == 202:
        return False
    try:
        said = msgspec.json.decode(answer.content, type=_Error).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError):
        said = f"The gateway answered {answer.status_code}."
    wait = answer.headers.get("Retry-After", "")
    raise PROBLEMS.get(answer.status_code, Away)(
        said, retry_after=int(wait) if wait.isascii() and wait.isdigit() else None
    )
