"""Versions that may be evaluated and served: with an adapter folder, a summary, an evaluation."""

from pathlib import Path

from tests.builders import make_evaluation, make_model, make_scenario, make_trajectory
from training import evaluation
from training.models import Evaluation, TrainedModel
from trajectories.models import Project, Scenario, Split

LEARNED: dict[str, object] = {"steps_done": 10, "steps_planned": 10, "weight_change": 0.5}


def candidate(project: Project, folder: Path, version: str = "v1.0.0", **fields: object) -> TrainedModel:
    """A version whose adapter folder is there."""
    path = folder / version
    path.mkdir(exist_ok=True)
    values: dict[str, object] = {"adapter_path": str(path), "summary": LEARNED, **fields}
    return make_model(project, version, **values)


def evaluated(
    model: TrainedModel,
    baseline: TrainedModel | None = None,
    *,
    ours: tuple[float, ...] = (1.0,) * 12,
    theirs: tuple[float, ...] = (0.0,) * 12,
) -> Evaluation:
    """A finished evaluation with these rewards, one attempt a side at each scenario."""
    pairs = {f"s{index:02}": ((mine,), (other,)) for index, (mine, other) in enumerate(zip(ours, theirs, strict=True))}
    return make_evaluation(model, baseline, state="done", result=evaluation.compare(pairs, seed=0))


def held_out(project: Project, count: int) -> list[Scenario]:
    return [make_scenario(project, f"held-out-{index:02}", split=Split.HELD_OUT) for index in range(count)]


def attempt(evaluation: Evaluation, scenario: Scenario, behaviour: str, reward: float | None, **fields: object) -> None:
    """One attempt that came back."""
    make_trajectory(
        evaluation.project,
        scenario=scenario,
        reward=reward,
        behaviour=behaviour,
        is_evaluation=True,
        evaluation_id=evaluation.evaluation_id,
        **fields,
    )
