"""tau-bench result files: a JSON list of runs, each {task_id, trial, reward, info, traj}, traj being chat messages."""

import hashlib
from collections.abc import Iterator

import msgspec

from trajectories import payloads
from trajectories.errors import Invalid
from trajectories.formats import messages
from trajectories.formats.incoming import Incoming

NAME = "tau-bench"


class Run(msgspec.Struct, kw_only=True):
    task_id: int | str
    trial: int = 0
    reward: float | None = None
    info: dict[str, object] = {}
    traj: list[dict[str, object]]


def recognises(value: object) -> bool:
    """A file's list of runs, or one run."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and {"task_id", "traj"} <= set(first)


def read(value: object, *, source: str) -> Iterator[Incoming | Invalid]:
    """Each run, or why it is none. `source` is the file's name: it tells the model and keeps ids of files apart."""
    runs = value if isinstance(value, list) else [value]
    stem = source.partition(".")[0]
    for number, item in enumerate(runs):
        try:
            run = msgspec.convert(item, Run)
        except msgspec.ValidationError as exc:
            yield Invalid(f"run {number}: {exc}")
            continue
        try:
            yield _incoming(run, item, stem)
        except Invalid as exc:
            yield exc


def _incoming(run: Run, item: object, stem: str) -> Incoming:
    domain = stem.rpartition("-")[2] or "tau"
    task = run.info.get("task")
    gold = task if isinstance(task, dict) else {}
    known = run.info.get("reward_info") is not None
    # The scenario of a task of this domain is the same whichever model ran it.
    value = {
        "trajectory_id": f"tau-bench/{stem}/{run.task_id}/{run.trial}"[:200],
        "agent_id": f"tau-bench-{domain}",
        "scenario": {
            "id": f"tau-bench/{domain}/{run.task_id}",
            "description": str(gold.get("instruction") or ""),
            "metadata": {"domain": domain, "private": {"actions": gold.get("actions"), "outputs": gold.get("outputs")}},
        },
        "messages": run.traj,
        "model": stem.rpartition("-")[0] or None,
        "reward": run.reward,
        "final_status": "completed" if known or not run.info else "truncated_steps",
        "metadata": {"trial": run.trial, "source": run.info.get("source"), "user_cost": run.info.get("user_cost")},
        "reward_components": {},
    }
    found = messages.from_value(value)
    digest = payloads.canonical({"source": stem, "run": item})
    return Incoming(
        payload=found.payload,
        canonical=hashlib.sha256(digest).digest(),
        source_format=NAME,
        derived_actions=True,
        made_id=True,
    )
