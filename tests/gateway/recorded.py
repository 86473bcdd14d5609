"""What was recorded, waited for."""

from openai.types.chat import ChatCompletionMessageParam

from tests.gateway.running import eventually
from trajectories import segments
from trajectories.models import Project, Trajectory
from trajectories.payloads import LlmCallPayload

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Answer BUY or SELL."},
    {"role": "user", "content": "The company reports a gain."},
]


def row_of(project: Project, trajectory_id: str) -> Trajectory:
    return Trajectory.objects.get(project=project, trajectory_id=trajectory_id)


def calls_of(project: Project, trajectory_id: str, count: int = 1) -> list[LlmCallPayload]:
    """The recorded calls, once there are so many."""
    there = Trajectory.objects.filter(project=project, trajectory_id=trajectory_id, n_calls__gte=count)
    assert eventually(there.exists)
    return list(segments.load(row_of(project, trajectory_id)).calls())
