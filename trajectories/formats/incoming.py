"""What every format ends in: the native payload, and what of it makes its identity."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from trajectories import digests, payloads
from trajectories.payloads import Envelope, TrajectoryPayload

if TYPE_CHECKING:
    from trajectories.formats.chat import Chat


class Incoming:
    """A trajectory as it came in, not yet redacted, no default filled in.

    A plain conversation comes as `chat`, which is stored as it is; its payload is made only for whoever asks.
    """

    __slots__ = (
        "_make",
        "_payload",
        "canonical",
        "chat",
        "derived_actions",
        "envelope",
        "findings",
        "made_id",
        "source_format",
    )

    def __init__(
        self,
        *,
        payload: TrajectoryPayload | None = None,
        canonical: bytes,
        source_format: str,
        derived_actions: bool = False,
        made_id: bool = False,
        findings: tuple[str, ...] = (),
        chat: "Chat | None" = None,
        make: Callable[[], TrajectoryPayload] | None = None,
    ) -> None:
        envelope = payload if payload is not None else chat.sent if chat is not None else None
        assert envelope is not None, "a payload, or a chat and the way to make one"
        self.envelope: Envelope = envelope
        self.canonical = canonical  # of what was received, without id, reward and judgments
        self.source_format = source_format
        self.derived_actions = derived_actions  # are what `messages.with_actions` makes of the messages: not stored
        self.made_id = made_id  # not the sender's: in a file it may stand for several runs, which get numbers then
        self.findings = findings  # what the reader has to say of it, for the trajectory's page
        self.chat = chat
        self._payload = payload
        self._make = make

    @property
    def payload(self) -> TrajectoryPayload:
        if self._payload is None:
            assert self._make is not None
            self._payload = self._make()
        return self._payload

    def under(self, trajectory_id: str) -> "Incoming":
        """The same content under another id."""
        return Incoming(
            payload=msgspec.structs.replace(self.payload, trajectory_id=trajectory_id),
            canonical=self.canonical,
            source_format=self.source_format,
            derived_actions=self.derived_actions,
            made_id=self.made_id,
            findings=self.findings,
        )

    def hashes(self, key: bytes) -> tuple[bytes, bytes]:
        """(content hash, twin hash), 32 bytes each: keyed, so that they tell nothing of a guessed content."""
        return hashes(key, self.canonical, self.envelope.trajectory_id)


def hashes(key: bytes, canonical: bytes, trajectory_id: str) -> tuple[bytes, bytes]:
    twin = digests.keyed(key, canonical)
    return digests.keyed(key, twin + trajectory_id.encode()), twin


def identity(envelope: Envelope) -> bytes:
    """The canonical form of an envelope without what changes by its own calls, and without its id."""
    extra = envelope.extra
    if "judgments" in extra:
        extra = {key: value for key, value in extra.items() if key != "judgments"}
    return payloads.canonical(
        msgspec.structs.replace(envelope, trajectory_id="", reward=None, reward_components={}, extra=extra)
    )
