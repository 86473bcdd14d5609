"""tau-bench result files: a JSON list of runs, each {task_id, trial, reward, info, traj}, traj being chat messages.

The file's name tells model and domain; the scenario of a task of a domain is the same whichever model ran it.
"""

import re
from collections.abc import Iterator, Mapping

from trajectories.errors import Invalid, Problem
from trajectories.formats import lenient, turns
from trajectories.formats.completions import answer
from trajectories.formats.incoming import Incoming
from trajectories.formats.turns import Turn

NAME = "tau-bench"
ALIASES = ("tau-bench-results",)

DOMAIN = re.compile(r"(?P<model>.*?)[-_]?(?P<domain>airline|retail|telecom)(?=[-_.]|\Z)")
RUN_NAME = re.compile(r"(?:tool-calling|act|react|few-shot)-(?P<model>.+?)-\d+\.\d+_range")
TAKEN = ("task_id", "trial", "reward", "traj", "info")
GOLD = ("actions", "outputs")


def recognises(value: object) -> bool:
    """A file's list of runs, or one run."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and {"task_id", "traj"} <= set(first)


def read(value: object, *, source: str) -> Iterator[Incoming | Problem]:
    """Each run, or why it is none. `source` is the file's name: it tells the model and keeps ids of files apart."""
    for number, item in enumerate(value if isinstance(value, list) else [value]):
        run = lenient.mapping(item)
        if not isinstance(run.get("task_id"), int | str) or not isinstance(run.get("traj"), list):
            yield Invalid(f"Run {number} has no task_id and traj (a list of messages).")
            continue
        try:
            yield _incoming(run, source)
        except Problem as problem:
            yield problem


def names(source: str) -> tuple[str, str, str | None]:
    """(what keeps files apart, domain, model) in a file's name."""
    stem = lenient.stem(source)
    if found := DOMAIN.match(stem):
        return found[0], found["domain"], found["model"] or None
    found = RUN_NAME.match(stem)
    domain = stem.rpartition("-")[2] if "-" in stem and not found else ""
    return stem, domain or "tau", found["model"] if found else stem.rpartition("-")[0] or None


def _incoming(run: Mapping[str, object], source: str) -> Incoming:
    stem, domain, model = names(source)
    info = lenient.mapping(run.get("info"))
    task = lenient.mapping(info.get("task"))
    reward = lenient.number(run.get("reward"))
    gold = {name: task[name] for name in GOLD if task.get(name) is not None}
    scored = lenient.rest({"reward_info": info.get("reward_info")})
    said: list[Turn] = [
        answer(one, {"model": model}) if one.get("role") == "assistant" else turns.shown(one)
        for one in (
            lenient.mapping(message) or {"content": None, "message": message} for message in lenient.listed(run["traj"])
        )
    ]
    rest = lenient.rest(run, TAKEN if reward is not None else [name for name in TAKEN if name != "reward"])
    told = lenient.rest(info, ("task", "reward_info"))
    if left := lenient.rest(task, GOLD):
        told["task"] = left
    if told or not isinstance(run.get("info"), dict | None):
        rest["info"] = told or run["info"]
    private = {**gold, **scored}
    return turns.incoming(
        {
            "trajectory_id": lenient.identifier(NAME, stem, run["task_id"], run.get("trial") or 0),
            "agent_id": lenient.identifier(f"{NAME}-{domain}"),
            "scenario": lenient.scenario(
                lenient.identifier(NAME, domain, run["task_id"]),
                task.get("instruction"),
                {"domain": domain, **({"private": gold} if gold else {})},
            ),
            "final_status": _status(info),
            "stop_reason": lenient.text(info.get("error")),
            "reward": reward,
            "metadata": {"trial": run.get("trial"), **({"private": private} if private else {})},
            "extra": rest,
        },
        [said],
        name=NAME,
        made_id=True,
    )


def _status(info: Mapping[str, object]) -> str:
    """Runs that hit the step limit have no reward_info; those that broke have an error."""
    if info.get("error"):
        return "environment_error"
    return "completed" if info.get("reward_info") is not None or not info else "truncated_steps"
