"""A trajectory that nobody ends is sealed by itself."""

from pathlib import Path

import pytest

from tests.gateway.backend import Backend
from tests.gateway.recorded import QUESTION, row_of
from tests.gateway.running import RunningGateway, eventually
from trajectories.models import Project, State, Trajectory


@pytest.mark.parametrize(("named", "status"), [("t1", "timeout"), ("", "completed")])
def test_an_idle_trajectory_ends_by_itself(
    project: Project, backend: Backend, key: str, folder: Path, named: str, status: str
) -> None:
    """One that was named was meant to be ended; of one whose id was made, nobody knows more than that it is over."""
    project.gateway_idle_minutes = 0
    project.save()
    with RunningGateway(folder, backend.url) as gateway:
        headers = {"X_Trajectory_Id": named} if named else {}
        raw = gateway.client(key, **headers).chat.completions.with_raw_response.create(model="tiny", messages=QUESTION)
        trajectory_id = raw.headers["X-Trajectory-Id"]
        sealed = Trajectory.objects.filter(project=project, trajectory_id=trajectory_id, state=State.SEALED)
        assert eventually(sealed.exists, 60)
    row = row_of(project, trajectory_id)
    assert (row.final_status, row.n_calls, row.reward) == (status, 1, None)
    assert "no call through the gateway" in row.stop_reason
