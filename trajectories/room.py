"""How much of what agents send this process holds at once. Who comes while there is no room waits, empty-handed.

Decoded JSON takes several times its bytes, and sixteen threads decode: without a common bound eight bodies of large
trajectories took 2.2 GB. What still arrives lies on disk if it is large (`body.py`), so a slow sender holds no room.
"""

import ctypes
import threading
import time
from collections import deque

from trajectories.errors import Away

BYTES = 64 * 1024 * 1024  # of memory, about, for what is being decoded, prepared and written
WAIT_SECONDS = 60.0

_free = threading.Condition()
_queue: deque[object] = deque()
_held = 0
_passed = 0  # since memory was last given back to the system
_trim = getattr(
    ctypes.CDLL(None), "malloc_trim", None
)  # glibc's; what is free between pieces in use it keeps otherwise


def needed(raw: bytes) -> int:
    """What a document takes while it is recorded: its texts (as sent, decoded, canonical, packed), and its values."""
    return 4 * len(raw) + 64 * raw.count(b",")


class Share:
    """What one request holds. It asks for more only while it holds nothing, or where there is room at once: of two
    that hold something and wait for each other none would ever go on."""

    def __init__(self) -> None:
        self.size = 0

    def extend(self, size: int) -> bool:
        """False: there is no room now. Give everything back, then `wait` for it."""
        global _held
        with _free:
            if _queue or _held + size > BYTES:
                return False
            _held += size
        self.size += size
        return True

    def wait(self, size: int) -> None:
        """In order of coming; what is larger than all the room gets it alone.

        Raises:
            Away: for a minute there was none.
        """
        assert self.size == 0, "it would wait for itself"
        global _held
        me = object()
        until = time.monotonic() + WAIT_SECONDS
        with _free:
            _queue.append(me)
            try:
                while _queue[0] is not me or (_held and _held + size > BYTES):
                    if not _free.wait(until - time.monotonic()) and time.monotonic() >= until:
                        raise Away(
                            "The site is at work on all that it can hold at once. Send the same again later.",
                            retry_after=WAIT_SECONDS / 2,
                        )
                _held += size
            finally:
                _queue.remove(me)
                _free.notify_all()
        self.size = size
        if size > BYTES and _trim is not None:
            _trim(0)

    def give_back(self, size: int | None = None) -> None:
        """All of it, unless told how much."""
        global _held, _passed
        size = self.size if size is None else size
        self.size -= size
        if not size:
            return
        with _free:
            _held -= size
            _passed += size
            trim = _trim if _passed > BYTES else None
            if trim is not None:
                _passed = 0
            _free.notify_all()
        if trim is not None:
            trim(0)

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()
