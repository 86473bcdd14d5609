"""What makes a recording trainable, and how much: named checks with weights, and the fidelity of its calls.

A check that does not apply to an agent is n/a and leaves the denominator. Computed once, on arrival.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from trajectories.models import Fidelity
from trajectories.payloads import LlmCallPayload, Message, TrajectoryPayload
from trajectories.transcripts import has_image, is_answered, own_prompt, text_of

SUBSTANTIAL = 20  # characters of a first prompt, all messages together

Verdict = tuple[float, str] | None  # share passed 0 to 1 and what is missing; None: n/a


class Finding(msgspec.Struct, frozen=True):
    """A check that did not pass, for the trajectory's page."""

    check: str
    ok: bool
    detail: str


class Assessment(msgspec.Struct, frozen=True, kw_only=True):
    quality: float  # 0 to 1
    fidelity: str
    findings: tuple[Finding, ...]


def assess(payload: TrajectoryPayload, weights: Mapping[str, float] | None = None) -> Assessment:
    """Quality, fidelity and what is to be said about them."""
    total = passed = 0.0
    findings: list[Finding] = []
    for name, (weight, check) in CHECKS.items():
        verdict = check(payload)
        if verdict is None:
            continue
        weight = (weights or {}).get(name, weight)
        share, detail = verdict
        total += weight
        passed += weight * share
        if share < 1:
            findings.append(Finding(name, False, detail))
    level, said = fidelity(payload)
    findings.extend(Finding("fidelity", False, one) for one in said)
    return Assessment(
        quality=min(1.0, max(0.0, passed / total)) if total else 0.0, fidelity=level, findings=tuple(findings)
    )


def has_steps(payload: TrajectoryPayload) -> Verdict:
    return (1.0, "") if payload.steps else (0.0, "it has no steps")


def steps_have_calls(payload: TrajectoryPayload) -> Verdict:
    return _share([bool(step.llm_calls) for step in payload.steps], "steps have no LLM call")


def prompts_are_substantial(payload: TrajectoryPayload) -> Verdict:
    """The first prompt of each conversation; later ones only add to it."""
    heads = [call for call in payload.calls() if call.prompt_ref is None]
    return _share(
        [
            bool(call.prompt_token_ids) or sum(len(text_of(one)) for one in own_prompt(call)) >= SUBSTANTIAL
            for call in heads
        ],
        f"prompts have fewer than {SUBSTANTIAL} characters",
    )


def answers_are_there(payload: TrajectoryPayload) -> Verdict:
    return _share(
        [is_answered(call) for call in payload.calls() if call.error is None],
        "calls have neither an answer nor an error",
    )


def accesses_carry_data(payload: TrajectoryPayload) -> Verdict:
    """n/a for an agent that looks nothing up."""
    return _share(
        [one.data not in (None, {}, [], "") for step in payload.steps for one in step.provider_accesses],
        "provider accesses carry no data",
    )


def actions_have_results(payload: TrajectoryPayload) -> Verdict:
    """A result, an error, a success mark, a step reward or, of tool calls, at least one result."""
    done: list[bool] = []
    for step in payload.steps:
        action = step.action
        if action is None:
            continue
        done.append(
            action.success is not None
            or action.result is not None
            or action.error is not None
            or step.reward is not None
            or any(call.result is not None or call.error is not None for call in action.calls)
        )
    if done and not done[-1]:
        done[-1] = True  # the last action ends the episode in many environments: nothing answers it
    return _share(done, "actions have no result")


def system_prompt_recorded(payload: TrajectoryPayload) -> Verdict:
    heads = [call for call in payload.calls() if call.prompt_ref is None]
    return _share(
        [
            bool(call.prompt_token_ids)
            or any(message.get("role") in ("system", "developer") for message in own_prompt(call)[:2])
            for call in heads
        ],
        "conversations have no system prompt",
    )


def tools_recorded(payload: TrajectoryPayload) -> Verdict:
    """n/a where no tool was called."""
    using = [call for call in payload.calls() if call.tool_calls]
    return _share(
        [bool(call.tools or payload.tools) for call in using], "calls use tools whose definitions are missing"
    )


def sampling_recorded(payload: TrajectoryPayload) -> Verdict:
    return _share(
        [call.temperature is not None for call in payload.calls() if call.trainable is not False],
        "calls have no temperature",
    )


def not_truncated(payload: TrajectoryPayload) -> Verdict:
    if payload.final_status in ("truncated_steps", "truncated_tokens", "timeout"):
        return 0.0, f"it ended as {payload.final_status}"
    return 1.0, ""


CHECKS: Mapping[str, tuple[float, Callable[[TrajectoryPayload], Verdict]]] = {
    "has_steps": (2.0, has_steps),
    "steps_have_calls": (2.0, steps_have_calls),
    "answers_are_there": (2.0, answers_are_there),
    "prompts_are_substantial": (1.0, prompts_are_substantial),
    "actions_have_results": (1.0, actions_have_results),
    "accesses_carry_data": (0.5, accesses_carry_data),
    "not_truncated": (1.0, not_truncated),
    "system_prompt_recorded": (0.25, system_prompt_recorded),
    "tools_recorded": (0.25, tools_recorded),
    "sampling_recorded": (0.25, sampling_recorded),
}


def _share(passed: Sequence[bool], what: str) -> Verdict:
    if not passed:
        return None
    missing = passed.count(False)
    return 1 - missing / len(passed), f"{missing} of {len(passed)} {what}"


def fidelity(payload: TrajectoryPayload) -> tuple[str, list[str]]:
    """The level of the calls that may be trained, and why it is not higher."""
    calls = [call for call in payload.calls() if call.trainable is not False and is_answered(call)]
    said: list[str] = []
    if any(has_image(message) for call in payload.calls() for message in _new_messages(call)):
        said.append("prompts with images are not trainable for a text base")
    if not calls:
        return Fidelity.TEXT, [*said, "no call can be trained: none has an answer and is not context"]
    faults = [fault for call in calls if (fault := _token_fault(call)) is not None]
    if not faults:
        return Fidelity.EXACT, said
    told = sorted({fault for fault in faults if fault})
    said.extend(told)
    if all(call.messages is not None or call.prompt_ref is not None for call in calls):
        return Fidelity.RETOKENISED, said
    return Fidelity.TEXT, said


def _new_messages(call: LlmCallPayload) -> Sequence[Message]:
    return call.prompt_ref.append if call.prompt_ref else own_prompt(call)


def _token_fault(call: LlmCallPayload) -> str | None:
    """None: ids and log-probabilities are whole; "": there are none; else what is wrong with them."""
    if call.token_ids is None and call.logprobs is None:
        return ""
    if not call.token_ids:
        return "token ids are missing or empty where log-probabilities are given"
    if call.logprobs is None:
        return "token ids came without log-probabilities"
    if len(call.logprobs) != len(call.token_ids):
        return "log-probabilities and token ids differ in number"
    if any(one is None or not math.isfinite(one) or one > 1e-6 for one in call.logprobs):
        return "some log-probabilities are null, not finite or above 0"
    if not call.prompt_token_ids:
        return "token ids came without those of the prompt"
    return None
