"""Groups that came in as they do in life: recorded, indexed, closed at their size, with a payload to train on."""

import itertools

from trajectories import formats, indexing, ingestion
from trajectories.models import Group, Project

_number = itertools.count(1)

WORDS = ("BUY", "SELL", "HOLD", "WAIT")


def recorded_group(
    project: Project,
    rewards: tuple[float | None, ...] = (0.0, 0.0, 1.0, 1.0),
    *,
    version: str | None = "v1.0.0",
    model: str | None = None,
    scenario_id: str = "",
    **fields: object,
) -> Group:
    """A closed group of one-call trajectories; with `model` of a foreign one, else of a version of the project."""
    scenario_id = scenario_id or f"headline-{next(_number)}"
    for place, reward in enumerate(rewards):
        call: dict[str, object] = {
            "messages": [{"role": "user", "content": f"{scenario_id}: BUY or SELL?"}],
            "response": WORDS[place % len(WORDS)],
            "finish_reason": "stop",
            "temperature": 1.0,
            "logprobs_mode": "processed",
            "prompt_token_ids": [1, 2, 3],
            "token_ids": [66 + place, 67],
            "logprobs": [-0.5, -0.25],
        }
        call |= {"model": model} if model else {"model_version": version}
        trajectory: dict[str, object] = {
            "trajectory_id": f"{scenario_id}-{place}",
            "agent_id": "agent",
            "scenario": {"id": scenario_id, "description": "Trade on a headline.", "split": "train"},
            "group_size": len(rewards),
            "started_at": "2026-01-05T10:00:00Z",
            "ended_at": "2026-01-05T10:00:30Z",
            "steps": [{"llm_calls": [call]}],
            **fields,
        }
        if reward is not None:
            trajectory["reward"] = reward
        ingestion.record(project, formats.incoming_value(trajectory))
    indexing.drain(project)
    return Group.objects.get(project=project, scenario__scenario_id=scenario_id)
