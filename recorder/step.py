"""One decision of an agent, as it tells it or as it was seen from outside."""

from collections.abc import Mapping, Sequence
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from . import completions
from .completions import Body
from .current import Place, enter, leave
from .harmless import harmless, now, reason
from .plain import PREVIEW, Notes, Size, mapping, plain, text

if TYPE_CHECKING:
    from .trajectory import Trajectory

Message = Mapping[str, object]


class Step:
    """One decision: what was seen, looked up, asked, done. As a context manager it completes itself, and is the
    current one inside."""

    def __init__(self, trajectory: "Trajectory", index: int, *, seen: bool = False) -> None:
        self.trajectory = trajectory
        self.index = index
        self.seen = seen  # begun by a call or action that was seen from outside, not by the agent
        self._entered: Token[Place | None] | None = None
        self._actions: list[Body] = []
        self._body: Body = {}
        self._accesses: list[Body] = []
        self._calls: list[Body] = []
        self._completed = False

    def begin(self, index: int, environment_state: Mapping[str, object] | None) -> None:
        self.index = index
        self._body["timestamp"] = now()
        if environment_state is not None:
            self._body["environment_state"] = mapping(environment_state, self.trajectory._notes, self._at("state"))

    def began(self, started_at: str) -> None:
        self._body["timestamp"] = started_at

    @property
    def completed(self) -> bool:
        return self._completed

    @property
    def taken(self) -> bool:
        """It has a call or an action already."""
        return bool(self._calls or self._actions)

    @property
    def acted(self) -> bool:
        """It has an action that no call of it has asked for."""
        return bool(self._actions) and not self._calls

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
            self.add(_filled(call, self.trajectory._notes, self._at("llm_calls")))

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
            self.add({name: value for name, value in call.items() if value is not None})

    @harmless
    def log_action(
        self,
        action_type: str,
        parameters: Mapping[str, object] | None = None,
        *,
        result: object = None,
        error: object = None,
        success: bool | None = None,
        tool_call_id: str | None = None,
        latency_ms: float | None = None,
        size: Size = PREVIEW,
    ) -> None:
        """Something that the agent did, as one of several in this step; for a single one, `complete` does.

        Args:
            tool_call_id: of the model's tool call that asked for it; found by the name where it is left out.
            size: how much of parameters and result is kept.
        """
        with self._writing("log_action"):
            self.act(
                action_of(
                    action_type,
                    parameters,
                    self.trajectory._notes,
                    self._at("action"),
                    size,
                    result=result,
                    error=error,
                    success=success,
                    tool_call_id=tool_call_id,
                    latency_ms=latency_ms,
                )
            )

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
            trajectory._settle(self)
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
            done = self._done(_filled(given, notes, self._at("action")))
            body: Body = {
                **self._body,
                "provider_accesses": self._accesses or None,
                "llm_calls": self._calls or None,
                "action": done or None,
                "reward": plain(reward, notes, self._at("reward")),
            }
            trajectory._complete(self, {name: value for name, value in body.items() if value is not None})

    def __enter__(self) -> Self:
        self._entered = enter(self.trajectory, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave(self._entered)
        if exc is not None and not self._completed:
            self.complete(error=reason(exc))
        else:
            self.complete()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, trace)

    def count_fault(self, what: str) -> None:
        self.trajectory._outlet.fault(f"Step.{what}")

    def act(self, action: Body) -> None:
        """With the lock held: one more action."""
        self._actions.append(action)

    def _done(self, given: Body) -> Body:
        """The step's action: as the agent gave it, and with what was seen of its actions."""
        if not self._actions:
            return given
        self._name_tool_calls()
        if "action_type" in given:
            return {"calls": self._actions, **given}
        if len(self._actions) > 1:
            results = [one["success"] for one in self._actions if "success" in one]
            every = {"success": all(results)} if results else {}
            return {"action_type": "tool_calls", **every, "calls": self._actions, **given}
        only = dict(self._actions[0])
        if "tool_call_id" in only:  # then what came of it stands with the id
            came = {name: only.pop(name) for name in ("tool_call_id", "result", "error") if name in only}
            only["calls"] = [came]
        return {**only, **given}

    def _name_tool_calls(self) -> None:
        """Give each action the id of the tool call that asked for it: the first unanswered one of its name."""
        asked = [one for call in self._calls for one in completions.tool_calls(call)]
        taken = {one.get("tool_call_id") for one in self._actions}
        for action in self._actions:
            if "tool_call_id" in action:
                continue
            for tool_call_id, name in asked:
                if name == action.get("action_type") and tool_call_id not in taken:
                    action["tool_call_id"] = tool_call_id
                    taken.add(tool_call_id)
                    break

    def add(self, call: Body) -> None:
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
        self._step.trajectory._lock.__enter__()
        if self._step._completed:
            self._step.trajectory._lock.__exit__(None, None, None)
            raise RuntimeError(f"{self._what} on step {self._step.index}, which is complete")

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._step.trajectory._lock.__exit__(kind, exc, trace)


def action_of(
    action_type: str,
    parameters: Mapping[str, object] | None,
    notes: Notes,
    place: str,
    size: Size,
    *,
    result: object = None,
    error: object = None,
    success: bool | None = None,
    tool_call_id: str | None = None,
    latency_ms: float | None = None,
) -> Body:
    """An action as one of several in a step."""
    made: Body = {
        "action_type": text(str(action_type), notes, place),
        "parameters": mapping(parameters, notes, f"{place}/parameters", size),
        "result": plain(result, notes, f"{place}/result", size),
        "error": plain(error, notes, f"{place}/error", size),
        "success": success,
        "tool_call_id": tool_call_id,
        "latency_ms": latency_ms,
    }
    return {name: value for name, value in made.items() if value is not None}


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
