"""Versions that may be evaluated and served: with an adapter folder, a summary, an evaluation."""

from pathlib import Path

from tests.builders import make_evaluation, make_model, make_scenario, make_trajectory
from training import evaluation
from training.models import Evaluation, TrainedModel
from trajectories.models import FinalStatus, Project, Scenario, Split, State

LEARNED: dict[str, object] = {"steps_done": 10, "steps_planned": 10, "weight_change": 0.5}


Rewards = tuple[tuple[float, ...], tuple[float, ...]]  # candidate's and baseline's, one a scenario
BETTER: Rewards = ((1.0,) * 12, (0.0,) * 12)


def candidate(
    project: Project,
    folder: Path,
    version: str = "v1.0.0",
    *,
    status: str = "ready",
    summary: dict[str, object] | None = None,
) -> TrainedModel:
    """A version whose adapter folder is there."""
    path = folder / version
    path.mkdir(exist_ok=True)
    return make_model(
        project, version, status=status, adapter_path=str(path), summary=LEARNED if summary is None else summary
    )


def evaluated(model: TrainedModel, baseline: TrainedModel | None = None, rewards: Rewards = BETTER) -> Evaluation:
    """A finished evaluation with these rewards, one attempt a side at each scenario."""
    pairs = {f"s{index:02}": ((mine,), (other,)) for index, (mine, other) in enumerate(zip(*rewards, strict=True))}
    return make_evaluation(model, baseline, state="done", result=evaluation.compare(pairs, seed=0))


def held_out(project: Project, count: int) -> list[Scenario]:
    return [make_scenario(project, f"held-out-{index:02}", split=Split.HELD_OUT) for index in range(count)]


def attempt(
    evaluation: Evaluation,
    scenario: Scenario,
    behaviour: str,
    reward: float | None,
    *,
    state: str = State.SEALED,
    final_status: str = FinalStatus.COMPLETED,
    is_excluded: bool = False,
    is_superseded: bool = False,
) -> None:
    """One attempt that came back."""
    make_trajectory(
        evaluation.project,
        scenario=scenario,
        reward=reward,
        behaviour=behaviour,
        is_evaluation=True,
        evaluation_id=evaluation.evaluation_id,
        state=state,
        final_status=final_status,
        is_excluded=is_excluded,
        is_superseded=is_superseded,
    )
