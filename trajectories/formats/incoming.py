"""What every format ends in: the native payload, and what of it makes its identity."""

import hashlib

import msgspec

from trajectories import payloads
from trajectories.payloads import Envelope, TrajectoryPayload


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """A trajectory as it came in, not yet redacted, no default filled in."""

    payload: TrajectoryPayload
    canonical: bytes  # of what was received, without id, reward and judgments
    source_format: str
    derived_actions: bool = False  # the actions are what `messages.with_actions` makes of the messages: not stored
    made_id: bool = False  # made of the file's name and the place in it: other content may come under it

    def hashes(self, key: bytes) -> tuple[bytes, bytes]:
        """(content hash, twin hash), 32 bytes each: keyed, so that they tell nothing of a guessed content."""
        return hashes(key, self.canonical, self.payload.trajectory_id)


def hashes(key: bytes, canonical: bytes, trajectory_id: str) -> tuple[bytes, bytes]:
    twin = hashlib.blake2b(canonical, key=key, digest_size=32).digest()
    return hashlib.blake2b(twin + trajectory_id.encode(), key=key, digest_size=32).digest(), twin


def identity(envelope: Envelope) -> bytes:
    """The canonical form of an envelope without what changes by its own calls, and without its id."""
    extra = envelope.extra
    if "judgments" in extra:
        extra = {key: value for key, value in extra.items() if key != "judgments"}
    return payloads.canonical(
        msgspec.structs.replace(envelope, trajectory_id="", reward=None, reward_components={}, extra=extra)
    )
