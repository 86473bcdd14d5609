"""Answers that are meant for people. Each says what is the case and what to do about it.

They are split by what the caller should do next: send something else (`Invalid`, `TooLarge`), leave it be
(`Conflict`, `Gone`), change the state of things first (`Refused`). The API turns each into problem+json
(`trainingsite/problems.py`), the admin into a message.
"""


class Problem(Exception):
    """The base of all; `status` is the HTTP status, `code` the last part of the problem's type."""

    status = 400
    code = "problem"

    def __init__(
        self,
        detail: str,
        *,
        pointer: str | None = None,
        limit: int | None = None,
        size: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer  # RFC 6901, into the body that was sent
        self.limit = limit  # the published limit that was passed, where one was
        self.size = size  # what was sent, in the limit's unit, where it is known
        self.retry_after = retry_after  # seconds until the same may be sent again


class Invalid(Problem):
    """What was sent cannot be understood; sending it again cannot help."""

    status = 400
    code = "invalid"


class TooLarge(Problem):
    """One of the published limits was passed (`GET /api/v1/limits/`)."""

    status = 413
    code = "too-large"


class Conflict(Problem):
    """The id is taken by other content; what came first is kept."""

    status = 409
    code = "conflict"


class Gone(Problem):
    """The id belonged to something that was erased."""

    status = 410
    code = "gone"


class Unknown(Problem):
    """There is no such thing in this project. Said alike for what never was and for what is another's."""

    status = 404
    code = "not-found"


class TooMany(Problem):
    """More requests than the key may send; the same again after `retry_after` seconds."""

    status = 429
    code = "too-many-requests"


class Away(Problem):
    """What is needed does not answer now; the same again after `retry_after` seconds."""

    status = 503
    code = "away"


class Full(Problem):
    """No room to write. Reading goes on; the same again when somebody has made room."""

    status = 507
    code = "storage-full"


class Refused(Problem):
    """The request is understood and cannot be done as things are. The text says why and the way out."""

    status = 409
    code = "refused"

    def __init__(
        self,
        detail: str,
        *,
        pointer: str | None = None,
        limit: int | None = None,
        size: int | None = None,
        retry_after: float | None = None,
        reasons: list[dict[str, object]] | None = None,
    ) -> None:
        super().__init__(detail, pointer=pointer, limit=limit, size=size, retry_after=retry_after)
        self.reasons = reasons or []  # rows {"check", "value", "threshold", "ok", "detail"}
