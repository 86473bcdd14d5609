"""One episode as an agent tells it: a trajectory, its steps, what was looked up, asked and done in each.

Nothing here raises into the agent or waits for the network: what fails inside is logged and counted. What is given is
copied at once, so the agent may go on to change its lists. Times and ids are made here, so that sending again is safe.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import Token
from types import TracebackType
from typing import Literal, Protocol, Self

from . import completions
from .completions import Body
from .current import Place, enter, leave
from .harmless import Guard, harmless, now, reason
from .plain import Notes, encode, mapping, plain
from .step import Step

logger = logging.getLogger("recorder")

FinalStatus = Literal[
    "completed", "truncated_steps", "truncated_tokens", "agent_error", "environment_error", "timeout", "cancelled"
]
LOOK_BACK = 4  # calls whose conversation a new prompt may go on from


class Outlet(Protocol):
    """Where a trajectory goes: the recorder, as the trajectory sees it."""

    def begun(self, trajectory: "Trajectory", envelope: bytes) -> None: ...
    def added(self, trajectory: "Trajectory", step: bytes) -> None: ...
    def ended(self, trajectory: "Trajectory", envelope: bytes, steps: list[bytes]) -> None: ...
    def fault(self, what: str) -> None: ...


class Pending(Protocol):
    """An answer that is still being read. Whoever holds the trajectory's lock may ask for what there is of it."""

    step: Step | None

    def over(self) -> bool:
        """It was read to its end."""
        ...

    def record(self) -> None:
        """Put it where it belongs, as far as it came. Later calls change nothing."""
        ...


class Trajectory:
    """One agent's view of one episode. As a context manager it ends itself: completed, or agent_error with what was
    raised, and is the current one inside. Made by `Recorder.start_trajectory`; methods may be called from several
    threads."""

    def __init__(
        self, outlet: Outlet, trajectory_id: str, envelope: Mapping[str, object], *, live: bool = False
    ) -> None:
        self.trajectory_id = trajectory_id
        self.live = live  # shown while it runs
        self._outlet = outlet
        self._lock = Guard()
        self._notes: Notes = []
        self._steps: list[bytes] = []
        self._open_step: Step | None = None
        self._calls = 0
        self._talks: list[tuple[int, list[object]]] = []  # (call, its prompt and answer), the last few
        self._ended = False
        self._pending: list[Pending] = []
        self._entered: Token[Place | None] | None = None
        self._late_reward: Body = {}
        self._envelope: Body = {"trajectory_id": trajectory_id}
        self._begin(envelope)

    @harmless
    def _begin(self, envelope: Mapping[str, object]) -> None:
        self._envelope.update(
            (name, plain(value, self._notes, f"/{name}")) for name, value in envelope.items() if value is not None
        )
        self._envelope.setdefault("started_at", now())
        self._outlet.begun(self, self._encoded())

    @property
    def ended(self) -> bool:
        return self._ended

    def belongs_to(self, outlet: Outlet) -> bool:
        return self._outlet is outlet

    @contextmanager
    def use(self) -> Iterator["Trajectory"]:
        """Make it the current one here, without ending it: for threads, which do not inherit what is current."""
        token = enter(self, None)
        try:
            yield self
        finally:
            leave(token)

    def start_step(self, environment_state: Mapping[str, object] | None = None) -> Step:
        """The next decision. A step that is still open is completed first, as it is.

        Args:
            environment_state: what the agent saw; any JSON.
        """
        step = Step(self, len(self._steps))
        self._start(step, environment_state)
        return step

    @harmless
    def _start(self, step: Step, environment_state: Mapping[str, object] | None) -> None:
        with self._lock:
            if self._ended:
                raise RuntimeError(f"trajectory {self.trajectory_id} has ended; its steps cannot go on")
            if self._open_step is not None:
                self._open_step.complete()
            step.begin(len(self._steps), environment_state)
            self._open_step = step

    @harmless
    def end(
        self,
        final_status: FinalStatus = "completed",
        *,
        reward: float | None = None,
        reward_components: Mapping[str, float | None] | None = None,
        metrics: Mapping[str, object] | None = None,
        metadata: Mapping[str, object] | None = None,
        stop_reason: str | None = None,
    ) -> None:
        """Hand the trajectory over for delivery. Later calls change nothing.

        Args:
            final_status: how it ended; `environment_error` keeps it out of training.
            reward: of the whole episode, any finite number; None: not known (yet), which is not 0.
            metadata: added to what was given at the start.
        """
        with self._lock:
            if self._ended:
                return
            if self._open_step is not None:
                self._open_step.complete()
            self._settle(all_of_them=True)
            if self._open_step is not None:  # of an answer that was still being read
                self._open_step.complete()
            self._ended = True  # whatever happens below: it is over
            given = {"reward": reward, "reward_components": reward_components}
            more: Body = {
                "ended_at": now(),
                "final_status": final_status,
                "stop_reason": stop_reason,
                **self._late_reward,
                **{name: value for name, value in given.items() if value is not None},
                "metrics": metrics,
            }
            self._envelope.update(
                (name, plain(value, self._notes, f"/{name}")) for name, value in more.items() if value is not None
            )
            if metadata:
                known = self._envelope.get("metadata")
                added = mapping(metadata, self._notes, "/metadata") or {}
                self._envelope["metadata"] = {**(known if isinstance(known, dict) else {}), **added}
            if self._notes:
                self._envelope["extra"] = {"recorder": {"changed": self._notes}}
            self._outlet.ended(self, self._encoded(), self._steps)
            self._steps, self._talks = [], []

    @harmless
    def set_reward(self, reward: float | None, *, reward_components: Mapping[str, float | None] | None = None) -> None:
        """The reward that it ends with, unless `end` names one."""
        with self._lock:
            if self._ended:
                raise RuntimeError(f"trajectory {self.trajectory_id} has ended; Recorder.reward brings rewards later")
            self._late_reward = {"reward": reward, "reward_components": reward_components}

    def __enter__(self) -> Self:
        self._entered = enter(self, None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave(self._entered)
        if exc is None:
            self.end()
        elif isinstance(exc, Exception) and not isinstance(exc, TimeoutError):
            self.end("agent_error", stop_reason=reason(exc))
        else:
            self.end("timeout" if isinstance(exc, TimeoutError) else "cancelled", stop_reason=reason(exc))

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, trace)

    def count_fault(self, what: str) -> None:
        self._outlet.fault(f"Trajectory.{what}")

    # What wrapped clients and decorated actions ask for.

    @property
    def last_call(self) -> int | None:
        """The number of the last call, from 0 through the whole trajectory."""
        return self._calls - 1 if self._calls else None

    @harmless
    def add_call(self, call: Body, step: Step | None, started_at: str) -> None:
        """A call that was seen from outside; `step`: where it was begun. Without an open one it begins a step of its
        own, which then takes the actions that follow, until the next call."""
        with self._lock:
            place = step if step is not None and not step.completed else self._open_step
            if place is None or (place.seen and place.taken):
                if self._ended:
                    raise RuntimeError(f"trajectory {self.trajectory_id} has ended; an answer came too late for it")
                place = self._seen_step(started_at)
            place.add(call)

    @harmless
    def add_action(self, action: Body, step: Step | None, started_at: str) -> None:
        """An action that was seen from outside. Without a call that it could follow, it is a step of its own."""
        with self._lock:
            place = step if step is not None and not step.completed else self._open_step
            if place is None or (place.seen and place.acted):
                if self._ended:
                    raise RuntimeError(f"trajectory {self.trajectory_id} has ended; an action came too late for it")
                place = self._seen_step(started_at)
            place.act(action)

    def wait_for(self, pending: Pending) -> None:
        with self._lock:
            self._pending.append(pending)

    def came(self, pending: Pending) -> None:
        """It is over: record it now where that can be done; else whoever holds the lock does, a little later."""
        with self._lock.free() as free:
            if free:
                self._settle()

    def left_behind(self) -> None:
        """In the child after a fork: the parent goes on with it, and another thread may have held its lock."""
        self._lock = Guard()
        self._ended = True
        self._pending = []

    def _seen_step(self, started_at: str) -> Step:
        step = Step(self, len(self._steps), seen=True)
        self._start(step, None)
        step.began(started_at)
        return step

    def _settle(self, step: Step | None = None, *, all_of_them: bool = False) -> None:
        """With the lock held: record answers that are over, and those that can wait no longer."""
        for pending in self._pending[:]:
            if all_of_them or (step is not None and pending.step is step) or pending.over():
                self._pending.remove(pending)
                pending.record()

    def _encoded(self) -> bytes:
        return encode(self._envelope)

    def _complete(self, step: Step, body: Body) -> None:
        """Called by the step, once, with the lock held."""
        line = encode(body)
        self._steps.append(line)
        if self._open_step is step:
            self._open_step = None
        self._outlet.added(self, line)

    def _place(self, call: Body) -> int:
        """Number the call, and have its prompt refer to an earlier call's where it goes on from it: a growing
        conversation then costs its new words only."""
        number = self._calls
        self._calls += 1
        messages = call.get("messages")
        if not isinstance(messages, list):
            self._talks.clear()  # prompts of two texts: nothing goes on
            return number
        for earlier, talk in reversed(self._talks):
            size = len(talk)
            if size > len(messages) or messages[: size - 1] != talk[:-1]:
                continue
            if completions.same(messages[size - 1], talk[-1]):
                call["prompt_ref"] = {"call": earlier, "append": messages[size:]}
                del call["messages"]
                break
        if call.get("error") is None:
            self._talks = [*self._talks[1 - LOOK_BACK :], (number, [*messages, completions.message_of(call)])]
        return number
