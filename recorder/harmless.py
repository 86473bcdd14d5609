"""What keeps the agent unharmed: faults that are counted instead of raised, and a lock that finalisers may ask for."""

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from .plain import text

logger = logging.getLogger("recorder")

P = ParamSpec("P")


class Counted(Protocol):
    def count_fault(self, what: str) -> None: ...


S = TypeVar("S", bound=Counted)


def harmless(method: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """What goes wrong inside is logged and counted, and the agent goes on."""

    @functools.wraps(method)
    def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            self.count_fault(method.__name__)

    return guarded


class Guard:
    """A trajectory's lock. `free` tells a finaliser, which may run in the middle of anything, whether it may enter."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        self._lock.release()

    @contextmanager
    def free(self) -> Iterator[bool]:
        """Held inside when True; False: another thread holds it, or this one does, further out."""
        if not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            if self._depth:
                yield False
                return
            self._depth += 1
            try:
                yield True
            finally:
                self._depth -= 1
        finally:
            self._lock.release()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def reason(exc: BaseException) -> str:
    """Its kind and what it says, whatever its own code does."""
    kind = type(exc).__name__
    try:
        said = str(exc)
    except Exception:
        return kind
    return text(f"{kind}: {said[:1000]}" if said else kind, [])[:1000]
