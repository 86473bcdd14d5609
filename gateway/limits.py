"""The limits that the gateway enforces; `GET /api/v1/limits/` lists them with those of recording."""

from django.conf import settings

from trajectories.limits import Limit


def listed() -> list[Limit]:
    return [
        Limit(
            name="gateway_body_bytes",
            value=int(settings.GATEWAY_BODY_BYTES),
            unit="bytes",
            what="a request to the gateway",
        ),
        Limit(
            name="gateway_spool_bytes",
            value=int(settings.GATEWAY_SPOOL_BYTES),
            unit="bytes",
            what="calls that wait for the database; more: unrecorded (X-Recorded: no) or 503, as the project says",
            status=None,
        ),
    ]
