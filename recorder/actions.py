"""Functions of the agent that act: what they were given, what came of it, and how long it took, recorded as they run.

The function behaves as before: same results, same exceptions, generators lazy, `send`, `throw` and `close` included.
"""

import functools
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import ParamSpec, Protocol, TypeVar, cast

from .current import here
from .harmless import now, reason
from .plain import Notes, Size, plain
from .step import Step, action_of
from .trajectory import Outlet, Trajectory

P = ParamSpec("P")
R = TypeVar("R")


class Anything(Protocol):
    """A function of any kind."""

    def __call__(self, *args: object, **kwargs: object) -> object: ...


def recorded(outlet: Outlet, function: Callable[P, R], name: str | None, size: Size) -> Callable[P, R]:
    """The function, whose calls inside a trajectory are recorded as actions of the current step."""
    if isinstance(function, staticmethod | classmethod):
        inner = recorded(outlet, cast(Anything, function.__func__), name, size)
        return cast(Callable[P, R], type(function)(inner))
    anything = cast(Anything, function)
    action = _Action(outlet, anything, name or str(getattr(function, "__name__", type(function).__name__)), size)
    if inspect.isasyncgenfunction(function):
        return cast(Callable[P, R], _async_generator(anything, action))
    if inspect.isgeneratorfunction(function):
        return cast(Callable[P, R], _generator(anything, action))
    if inspect.iscoroutinefunction(function):
        return cast(Callable[P, R], _coroutine(anything, action))
    return _plain(function, action)


def _plain(function: Callable[P, R], action: "_Action") -> Callable[P, R]:
    @functools.wraps(function)
    def act(*args: P.args, **kwargs: P.kwargs) -> R:
        run = action.begin(args, kwargs)
        try:
            result = function(*args, **kwargs)
        except BaseException as exc:
            run.failed(exc)
            raise
        run.came(result)
        return result

    return act


def _coroutine(function: Anything, action: "_Action") -> Anything:
    @functools.wraps(function)
    async def act(*args: object, **kwargs: object) -> object:
        run = action.begin(args, kwargs)
        try:
            result = await cast(Awaitable[object], function(*args, **kwargs))
        except BaseException as exc:
            run.failed(exc)
            raise
        run.came(result)
        return result

    return act


def _generator(function: Anything, action: "_Action") -> Anything:
    @functools.wraps(function)
    def act(*args: object, **kwargs: object) -> Generator[object, object, object]:
        run = action.begin(args, kwargs)
        try:
            result = yield from _Seen(cast(Generator[object, object, object], function(*args, **kwargs)), run)
        except GeneratorExit:
            run.came(None)  # whoever asked has seen enough
            raise
        except BaseException as exc:
            run.failed(exc)
            raise
        run.came(result)
        return result

    return act


def _async_generator(function: Anything, action: "_Action") -> Anything:
    @functools.wraps(function)
    async def act(*args: object, **kwargs: object) -> AsyncGenerator[object, object]:
        run = action.begin(args, kwargs)
        inner = cast(AsyncGenerator[object, object], function(*args, **kwargs))
        try:
            following = inner.asend(None)
            while True:
                try:
                    item = await following
                except StopAsyncIteration:
                    break
                run.yielded(item)
                try:
                    sent = yield item
                except GeneratorExit:
                    await inner.aclose()
                    raise
                except BaseException as exc:
                    following = inner.athrow(exc)
                else:
                    following = inner.asend(sent)
        except GeneratorExit:
            run.came(None)
            raise
        except BaseException as exc:
            run.failed(exc)
            raise
        run.came(None)

    return act


class _Seen(Generator[object, object, object]):
    """A generator whose items are noted as they pass; `yield from` hands everything else through."""

    def __init__(self, inner: Generator[object, object, object], run: "_Run") -> None:
        self._inner = inner
        self._run = run

    def __next__(self) -> object:
        return self._run.yielded(next(self._inner))

    def send(self, value: object) -> object:
        return self._run.yielded(self._inner.send(value))

    def throw(self, exc: BaseException) -> object:  # type: ignore[override]  # the older forms are deprecated
        return self._run.yielded(self._inner.throw(exc))

    def close(self) -> None:
        self._inner.close()


class _Action:
    """A decorated function."""

    def __init__(self, outlet: Outlet, function: Anything, name: str, size: Size) -> None:
        self.outlet = outlet
        self.name = name
        self.size = size
        try:
            self.signature: inspect.Signature | None = inspect.signature(function)
        except (TypeError, ValueError):  # some written in C have none
            self.signature = None

    def begin(self, args: tuple[object, ...], kwargs: dict[str, object]) -> "_Run":
        """Note what it is given now: it may change it."""
        run = _Run(self)
        try:
            place = here(self.outlet)
            if place is not None:
                run.trajectory, run.step = place.trajectory, place.step
                run.parameters = plain(self._named(args, kwargs), run.notes, "/parameters", self.size)
        except Exception:
            self.outlet.fault(f"action {self.name}")
        return run

    def _named(self, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, object]:
        if self.signature is None:
            return {**dict(zip(map(str, range(len(args))), args, strict=True)), **kwargs}
        try:
            named = dict(self.signature.bind(*args, **kwargs).arguments)
        except TypeError:  # the function will say so itself
            return {**dict(zip(map(str, range(len(args))), args, strict=True)), **kwargs}
        first = next(iter(self.signature.parameters), "")
        if first in ("self", "cls"):
            named.pop(first, None)
        return named


class _Run:
    """One call of it."""

    def __init__(self, action: _Action) -> None:
        self.trajectory: Trajectory | None = None  # None: outside of all, nothing is recorded
        self.step: Step | None = None
        self.parameters: object = None
        self.notes: Notes = []
        self._action = action
        self._items: list[object] | None = None  # of a generator, the first ones
        self._n = 0
        self._left = action.size
        self._at = now()
        self._since = time.perf_counter()

    def yielded(self, item: object) -> object:
        if self.trajectory is not None:
            self._n += 1
            self._items = self._items if self._items is not None else []
            if self._left.items > 0 and self._left.characters > 0:
                kept = plain(item, self.notes, f"/result/{self._n - 1}", self._left)
                self._items.append(kept)
                spent = len(kept) if isinstance(kept, str) else 64
                self._left = Size(self._left.items - 1, self._left.characters - spent)
        return item

    def came(self, result: object) -> None:
        if self._items is None:
            self._tell(result=result, success=True)
            return
        left = self._n - len(self._items)
        more = {"returned": result, "items_left_out": left or None}
        told = {name: value for name, value in more.items() if value is not None}
        self._tell(result={"items": self._items, **told} if told else self._items, success=True)

    def failed(self, exc: BaseException) -> None:
        self._tell(result=self._items, error=reason(exc), success=False)

    def _tell(self, *, result: object = None, error: str | None = None, success: bool) -> None:
        trajectory, action = self.trajectory, self._action
        if trajectory is None:
            return
        try:
            latency = (time.perf_counter() - self._since) * 1000
            made = action_of(
                action.name,
                None,
                self.notes,
                "/action",
                action.size,
                result=result,
                error=error,
                success=success,
                latency_ms=round(latency, 3),
            )
            if self.parameters:
                made["parameters"] = self.parameters
            if self.notes:
                made["changed"] = self.notes
            trajectory.add_action(made, self.step, self._at)
        except Exception:
            action.outlet.fault(f"action {action.name}")
