"""InterCode result files: a JSON object of episodes by task, or {"meta": …, "logs": those}.

An episode is {environment, dataset, task_id, query, turn_history{actions, observations, rewards, valid_action[,
thoughts | steps]}, summary{max_reward, …}}; the lists differ in length. A reward of a turn is the score of the state
after it, so that their sum means nothing; the episode's own measure is `summary.max_reward`, which becomes the reward.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from trajectories import payloads
from trajectories.errors import Invalid, Problem
from trajectories.formats import conversations, lenient
from trajectories.formats.conversations import Call, Laid
from trajectories.formats.incoming import Incoming
from trajectories.payloads import ActionPayload, LlmCallPayload, Message, StepPayload

NAME = "intercode"
MODEL = re.compile(r"multiturn_(?P<model>.+?)(?:_\d+_turns.*|-\d+_turns.*)?$")
STRATEGIES = ("plan_solve_refine", "plan_solve", "react", "multiturn")
TURNS = ("actions", "observations", "rewards", "valid_action", "thoughts", "steps")
DONE = ("actions", "observations", "thoughts")  # a run that did nothing has a reward and a validity all the same


def recognises(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    if _is_episode(value):
        return True
    logs = value.get("logs") if "meta" in value else value
    found = list(logs.values())[:5] if isinstance(logs, dict) else lenient.listed(logs)[:5]
    return any(_is_episode(one) for one in found)


def _is_episode(value: object) -> bool:
    if not isinstance(value, dict) or "query" not in value or "environment" not in value:
        return False
    return "turn_history" in value or ("query_idx" in value and "trajectory" in value)


def read(value: object, *, source: str) -> Iterator[Incoming | Problem]:
    """Each episode, or why it is none. The file's name tells the model and the strategy."""
    if not isinstance(value, dict):
        yield Invalid("This is not a result file of InterCode: an object of episodes by task.")
        return
    meta: object = None
    if _is_episode(value):
        items: list[tuple[str, object]] = [("", value)]
    else:
        logs: object = value
        if "meta" in value and "logs" in value:
            meta, logs = value["meta"], value["logs"]
        items = (
            [(str(key), one) for key, one in logs.items()]
            if isinstance(logs, dict)
            else [(str(number), one) for number, one in enumerate(lenient.listed(logs))]
        )
    for key, item in items:
        if not isinstance(item, dict) or not _is_episode(item):
            yield Invalid(f"Task {key[:50]!r} is no episode: it has no query and turn_history.", pointer=f"/{key[:50]}")
            continue
        try:
            yield _incoming(item, key, meta, source)
        except Problem as problem:
            yield problem


def _incoming(item: dict[str, object], key: str, meta: object, source: str) -> Incoming:
    stem = lenient.stem(source)
    strategy = next((one for one in STRATEGIES if one in stem), None)
    environment = str(item.get("environment") or "intercode")
    summary = lenient.mapping(item.get("summary"))
    history = lenient.mapping(item.get("turn_history"))
    task = item.get("task_id", item.get("query_idx", key))
    found = MODEL.search(stem)
    human = "query_idx" in item and "turn_history" not in item
    model = found["model"] if found and not human else None
    query = item.get("query")
    turns = _turns(item, history)
    laid = _human(turns, query) if human else _lay(turns, query, environment, model)
    taken = ("query", "turn_history", "environment", "task_id") if not human else ("query", "environment", "trajectory")
    rest = {name: inner for name, inner in item.items() if name not in taken}
    length = max(len(lenient.listed(history.get(name))) for name in DONE)
    odd = {
        name: inner
        for name, inner in history.items()
        if name not in TURNS or not isinstance(inner, list) or len(inner) > length
    }
    reward = lenient.number(summary.get("max_reward", item.get("reward")))
    canonical = payloads.canonical(item)
    envelope = {
        "trajectory_id": lenient.identifier(
            NAME, stem, environment if not stem else None, task, lenient.digest(item)[:12] if not stem else None
        ),
        "agent_id": lenient.identifier("human" if human else NAME, environment, strategy),
        "scenario": lenient.scenario(
            lenient.identifier(NAME, environment, lenient.stem(str(item.get("dataset") or "")), task),
            query,
            {"private": {"gold": item.get("gold")}} if item.get("gold") is not None else None,
        ),
        "reward": reward,
        "reward_components": {} if reward is None else {"max_reward" if summary else "reward": reward},
        "final_status": _final_status(turns, summary),
        "metadata": {"environment": item["environment"], "strategy": strategy, "task_id": task, "meta": meta},
        "extra": {**rest, **({"turn_history": odd} if odd else {})},
    }
    return conversations.incoming(envelope, laid, name=NAME, canonical=canonical, made_id=True)


class Turn(msgspec.Struct, kw_only=True):
    action: object = None
    observation: object = None
    reward: object = None
    valid: object = None
    thought: object = None
    plan: object = None
    has_observation: bool = False


def _turns(item: Mapping[str, object], history: Mapping[str, object]) -> list[Turn]:
    if "turn_history" not in item:
        return [
            Turn(
                action=one.get("action"),
                observation=one.get("observation"),
                reward=one.get("reward"),
                valid=one.get("valid_action"),
                thought=one.get("thought"),
                has_observation="observation" in one,
            )
            for one in lenient.objects(item.get("trajectory"))
        ]
    lists = {name: lenient.listed(history.get(name)) for name in TURNS}
    length = max(len(lists[name]) for name in DONE)

    def at(name: str, number: int) -> object:
        return lists[name][number] if number < len(lists[name]) else None

    return [
        Turn(
            action=at("actions", number),
            observation=at("observations", number),
            reward=at("rewards", number),
            valid=at("valid_action", number),
            thought=at("thoughts", number),
            plan=at("steps", number),
            has_observation=number < len(lists["observations"]),
        )
        for number in range(length)
    ]


def _is_blocked(turn: Turn) -> bool:
    """What the runner writes when the provider gave no answer: the last action, without an observation."""
    return turn.action == "blocked" and not turn.has_observation


def _lay(turns: Sequence[Turn], query: object, environment: str, model: str | None) -> Laid:
    said: list[Message] = [{"role": "user", "content": _text(query)}]
    calls: list[Call] = []
    for turn in turns:
        extra: dict[str, object] = {}
        if turn.plan is not None:
            extra["plan_step"] = turn.plan
        valid = turn.valid if isinstance(turn.valid, bool) else None
        if turn.valid is not None and valid is None:
            extra["valid_action"] = turn.valid
        reward = lenient.number(turn.reward)
        if turn.reward is not None and (reward is None):
            extra["reward"] = turn.reward
        step: dict[str, object] = {"reward": reward, "extra": extra}
        if _is_blocked(turn):
            call = LlmCallPayload(model=model, error="blocked: the provider gave no answer")
        else:
            thought = _text(turn.thought) if turn.thought is not None else None
            call = LlmCallPayload(
                model=model, response=_text(turn.action) if turn.action is not None else None, reasoning=thought
            )
            step["action"] = ActionPayload(action_type=environment, success=valid)
        calls.append(Call(prompt=list(said), call=call, step=step))
        if call.response is not None:
            said.append({"role": "assistant", "content": call.response})
        elif call.error is None:
            said.append({"role": "assistant", "content": None})
        if turn.has_observation:
            said.append({"role": "user", "content": _text(turn.observation)})
    return conversations.lay(calls, said)


def _human(turns: Sequence[Turn], query: object) -> Laid:
    """A person played: actions, and no call to a model."""
    steps = tuple(
        StepPayload(
            action=ActionPayload(
                action_type="command",
                parameters={"command": turn.action},
                result=turn.observation,
                success=turn.valid if isinstance(turn.valid, bool) else None,
            ),
            reward=lenient.number(turn.reward),
            extra={"thought": turn.thought} if turn.thought is not None else {},
        )
        for turn in turns
    )
    closing: tuple[Message, ...] = ({"role": "user", "content": _text(query)},)
    return Laid(steps=steps, closing=closing, derived_actions=False, final_is_placed=True)


def _text(value: object) -> str:
    return value if isinstance(value, str) else payloads.encode(value).decode()


def _final_status(turns: Sequence[Turn], summary: Mapping[str, object]) -> str:
    if turns and _is_blocked(turns[-1]):
        return "agent_error"
    taken, allowed = lenient.number(summary.get("turns_taken")), lenient.number(summary.get("turns_max"))
    best = lenient.number(summary.get("max_reward"))
    if taken is not None and allowed is not None and taken >= allowed and (best is None or best < 1):
        return "truncated_steps"
    return "completed"
