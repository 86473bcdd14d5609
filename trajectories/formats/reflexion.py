"""Reflexion's HotPotQA runs: a line an attempt, {question, trial, outcome, reward, steps, correct_answer, raw}.

Each step is a call: its thought is the reasoning, its action the answer, its observation what came back.
"""

from collections.abc import Iterator

from trajectories.errors import Problem
from trajectories.formats import lenient, turns
from trajectories.formats.incoming import Incoming
from trajectories.formats.turns import Answer, Turn

NAME = "reflexion"

TAKEN = ("question", "steps", "correct_answer", "reward")
ENDS = {"halted": "truncated_steps"}


def recognises(value: object) -> bool:
    return (
        isinstance(value, dict)
        and {"question", "trial", "outcome"} <= set(value)
        and isinstance(value.get("steps"), list)
    )


def read(value: object, *, source: str) -> Iterator[Incoming | Problem]:
    row = lenient.mapping(value)
    question = row.get("question")
    said: list[Turn] = [{"role": "user", "content": question if isinstance(question, str) else [question]}]
    try:
        for step in lenient.listed(row.get("steps")):
            said.extend(_turns(step))
        gold = {"answer": row["correct_answer"]} if row.get("correct_answer") is not None else {}
        task = lenient.digest(question)[:12]
        reward = lenient.number(row.get("reward"))
        rest = lenient.rest(row, TAKEN if reward is not None else TAKEN[:-1])
        yield turns.incoming(
            {
                "trajectory_id": lenient.identifier(NAME, lenient.stem(source), task, row.get("trial")),
                "agent_id": lenient.identifier(NAME, lenient.stem(source)),
                "scenario": lenient.scenario(
                    lenient.identifier(NAME, "hotpotqa", task), question, {"private": gold} if gold else None
                ),
                "final_status": ENDS.get(str(row.get("outcome")), "completed"),
                "stop_reason": lenient.text(row.get("outcome")),
                "reward": reward,
                "metadata": {"private": gold} if gold else None,
                "extra": rest,
            },
            [said],
            name=NAME,
            made_id=True,
        )
    except Problem as problem:
        yield problem


def _turns(step: object) -> Iterator[Turn]:
    if not isinstance(step, dict):
        yield {"role": "user", "content": None, "step": step}
        return
    rest = lenient.rest(step, ("n", "observation", "thought", "action"))
    for name in ("thought", "action"):
        if step.get(name) is not None and not isinstance(step[name], str):
            rest[name] = step[name]
    yield Answer(
        call=turns.call_of(
            {
                "response": lenient.text(step.get("action")),
                "reasoning": lenient.text(step.get("thought")),
                "extra": rest,
            }
        )
    )
    if step.get("observation") is not None:
        yield turns.shown({"role": "user", "content": step["observation"]})
