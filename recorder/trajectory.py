"""One episode as an agent tells it: a trajectory, its steps, what was looked up, asked and done in each.

Nothing here raises into the agent or waits for the network: what fails inside is logged and counted. What is given is
copied at once, so the agent may go on to change its lists. Times and ids are made here, so that sending again is safe.
"""

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Concatenate, Literal, ParamSpec, Protocol, Self, TypeVar

from . import completions
from .completions import Body
from .plain import Notes, encode, mapping, plain, text

logger = logging.getLogger("recorder")

FinalStatus = Literal[
    "completed", "truncated_steps", "truncated_tokens", "agent_error", "environment_error", "timeout", "cancelled"
]
Message = Mapping[str, object]

LOOK_BACK = 4  # calls whose conversation a new prompt may go on from

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


class Outlet(Protocol):
    """Where a trajectory goes: the recorder, as the trajectory sees it."""

    def begun(self, trajectory: "Trajectory", envelope: bytes) -> None: ...
    def added(self, trajectory: "Trajectory", step: bytes) -> None: ...
    def ended(self, trajectory: "Trajectory", envelope: bytes, steps: list[bytes]) -> None: ...
    def fault(self, what: str) -> None: ...


class Trajectory:
    """One agent's view of one episode. As a context manager it ends itself: completed, or agent_error with what was
    raised. Made by `Recorder.start_trajectory`; methods may be called from several threads."""

    def __init__(self, outlet: Outlet, trajectory_id: str, envelope: Mapping[str, object]) -> None:
        self.trajectory_id = trajectory_id
        self._outlet = outlet
        self._lock = threading.RLock()
        self._notes: Notes = []
        self._steps: list[bytes] = []
        self._open_step: Step | None = None
        self._calls = 0
        self._talks: list[tuple[int, list[object]]] = []  # (call, its prompt and answer), the last few
        self._ended = False
        self._envelope: Body = {"trajectory_id": trajectory_id}
        self._begin(envelope)

    @harmless
    def _begin(self, envelope: Mapping[str, object]) -> None:
        self._envelope.update(
            (name, plain(value, self._notes, f"/{name}")) for name, value in envelope.items() if value is not None
        )
        self._envelope["started_at"] = now()
        self._outlet.begun(self, self._encoded())

    @property
    def ended(self) -> bool:
        return self._ended

    def start_step(self, environment_state: Mapping[str, object] | None = None) -> "Step":
        """The next decision. A step that is still open is completed first, as it is.

        Args:
            environment_state: what the agent saw; any JSON.
        """
        step = Step(self, len(self._steps))
        self._start(step, environment_state)
        return step

    @harmless
    def _start(self, step: "Step", environment_state: Mapping[str, object] | None) -> None:
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
            self._ended = True  # whatever happens below: it is over
            more: Body = {
                "ended_at": now(),
                "final_status": final_status,
                "stop_reason": stop_reason,
                "reward": reward,
                "reward_components": reward_components,
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is None:
            self.end()
        elif isinstance(exc, Exception) and not isinstance(exc, TimeoutError):
            self.end("agent_error", stop_reason=_reason(exc))
        else:
            self.end("timeout" if isinstance(exc, TimeoutError) else "cancelled", stop_reason=_reason(exc))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, trace)

    def count_fault(self, what: str) -> None:
        self._outlet.fault(f"Trajectory.{what}")

    def _encoded(self) -> bytes:
        return encode(self._envelope)

    def _complete(self, step: "Step", body: Body) -> None:
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


class Step:
    """One decision: what was seen, looked up, asked, done. As a context manager it completes itself."""

    def __init__(self, trajectory: Trajectory, index: int) -> None:
        self.trajectory = trajectory
        self.index = index
        self._body: Body = {}
        self._accesses: list[Body] = []
        self._calls: list[Body] = []
        self._completed = False

    def begin(self, index: int, environment_state: Mapping[str, object] | None) -> None:
        self.index = index
        self._body["timestamp"] = now()
        if environment_state is not None:
            self._body["environment_state"] = mapping(environment_state, self.trajectory._notes, self._at("state"))

    @harmless
    def log_provider_access(self, provider_name: str, data: object = None, *, purpose: str | None = None) -> None:
        """Data that the agent looked up."""
        with self._writing("log_provider_access"):
            at = self._at("provider_accesses")
            access: Body = {"provider_name": provider_name, "data": data, "purpose": purpose}
            self._accesses.append(_filled(access, self.trajectory._notes, at))

    @harmless
    def log_llm_call(
        self,
        *,
        model: str | None = None,
        messages: Sequence[Message] | None = None,
        system_prompt: str | None = None,
        user_prompt: str | None = None,
        response: str | None = None,
        reasoning: str | None = None,
        tool_calls: Sequence[object] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        model_version: str | None = None,
        trainable: bool | None = None,
        finish_reason: str | None = None,
        error: object = None,
        purpose: str | None = None,
        latency_ms: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        logprobs_mode: Literal["raw", "processed"] | None = None,
        tokenizer: str | None = None,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        token_ids: Sequence[int] | None = None,
        logprobs: Sequence[float | None] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """One question to a model and its answer. For an answer in OpenAI's form, `log_completion` does this.

        Args:
            messages: the whole prompt as OpenAI chat messages; or `system_prompt` and `user_prompt`.
            model: the name that was asked for. The served name of a version tells whose answer it is.
            trainable: False for calls that are context only: few-shot turns, simulated users, other agents.
            temperature, top_p, top_k, min_p: as sampled with; the trainer needs the true ones.
            logprobs: nats, one for each of `token_ids`; `processed`: of the distribution that was drawn from.
        """
        call: Body = {
            "model": model,
            "messages": messages,
            "system_prompt": system_prompt,
            "user_prompt": user_prompt,
            "response": response,
            "reasoning": reasoning,
            "tool_calls": tool_calls,
            "tools": tools,
            "model_version": model_version,
            "trainable": trainable,
            "finish_reason": finish_reason,
            "error": error,
            "purpose": purpose,
            "latency_ms": latency_ms,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "seed": seed,
            "max_tokens": max_tokens,
            "logprobs_mode": logprobs_mode,
            "tokenizer": tokenizer,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "prompt_token_ids": prompt_token_ids,
            "token_ids": token_ids,
            "logprobs": logprobs,
            "extra": extra,
        }
        with self._writing("log_llm_call"):
            self._add(_filled(call, self.trajectory._notes, self._at("llm_calls")))

    @harmless
    def log_completion(
        self,
        request: Mapping[str, object],
        response: object,
        *,
        choice: int = 0,
        latency_ms: float | None = None,
        purpose: str | None = None,
        trainable: bool | None = None,
        model_version: str | None = None,
        logprobs_mode: Literal["raw", "processed"] | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """A chat completion in OpenAI's form: what was asked, as given to `create`, and the answer object or mapping.

        Token ids and log-probabilities are taken from the answer where it has them. Our model server and gateway
        give processed log-probabilities; a vLLM does with `--logprobs-mode processed_logprobs`.
        """
        with self._writing("log_completion"):
            notes, at = self.trajectory._notes, self._at("llm_calls")
            call = completions.call_of(
                mapping(request, notes, at) or {}, mapping(_dumped(response), notes, at) or {}, choice
            )
            call.update(
                latency_ms=latency_ms,
                purpose=purpose,
                trainable=trainable,
                model_version=model_version,
                logprobs_mode=logprobs_mode,
                tokenizer=tokenizer,
            )
            self._add({name: value for name, value in call.items() if value is not None})

    @harmless
    def complete(
        self,
        action: str | Mapping[str, object] | None = None,
        parameters: Mapping[str, object] | None = None,
        *,
        success: bool | None = None,
        result: object = None,
        error: object = None,
        reasoning: str | None = None,
        calls: Sequence[Mapping[str, object]] | None = None,
        reward: float | None = None,
    ) -> None:
        """The step is over. Later calls change nothing.

        Args:
            action: its type ("BUY"), or the whole action as a mapping of the names below.
            calls: what came of each tool call: {"tool_call_id", "result", "error"}.
            reward: from the environment for this step; None: not known, which is not 0.
        """
        trajectory = self.trajectory
        with trajectory._lock:
            if self._completed or trajectory.ended:
                return
            self._completed = True
            notes = trajectory._notes
            given: Body = {
                "action_type": action if not isinstance(action, Mapping) else None,
                "parameters": mapping(parameters, notes, self._at("parameters")),
                "success": success,
                "result": result,
                "error": error,
                "reasoning": reasoning,
                "calls": calls,
            }
            if isinstance(action, Mapping):
                given = {**action, **{name: value for name, value in given.items() if value is not None}}
            done = _filled(given, notes, self._at("action"))
            body: Body = {
                **self._body,
                "provider_accesses": self._accesses or None,
                "llm_calls": self._calls or None,
                "action": done or None,
                "reward": plain(reward, notes, self._at("reward")),
            }
            trajectory._complete(self, {name: value for name, value in body.items() if value is not None})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is not None and not self._completed:
            self.complete(error=_reason(exc))
        else:
            self.complete()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, trace)

    def count_fault(self, what: str) -> None:
        self.trajectory._outlet.fault(f"Step.{what}")

    def _add(self, call: Body) -> None:
        if call.get("tools") == self.trajectory._envelope.get("tools"):
            call.pop("tools", None)  # the trajectory has them
        self.trajectory._place(call)
        self._calls.append(call)

    def _at(self, what: str) -> str:
        return f"/steps/{self.index}/{what}"

    def _writing(self, what: str) -> "_Writing":
        return _Writing(self, what)


class _Writing:
    """The trajectory's lock, held while an open step is added to."""

    def __init__(self, step: Step, what: str) -> None:
        self._step = step
        self._what = what

    def __enter__(self) -> None:
        self._step.trajectory._lock.acquire()
        if self._step._completed:
            self._step.trajectory._lock.release()
            raise RuntimeError(f"{self._what} on step {self._step.index}, which is complete")

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._step.trajectory._lock.release()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _dumped(response: object) -> Mapping[str, object]:
    if isinstance(response, Mapping):
        return response
    dump: object = getattr(response, "model_dump", None)
    made: object = dump() if callable(dump) else None
    if not isinstance(made, Mapping):
        raise TypeError(f"{type(response).__name__} is no chat completion: it is no mapping and has no model_dump()")
    return made


def _filled(fields: Mapping[str, object], notes: Notes, place: str) -> Body:
    return {name: plain(value, notes, f"{place}/{name}") for name, value in fields.items() if value is not None}


def _reason(exc: BaseException) -> str:
    return text(f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__, [])[:1000]
