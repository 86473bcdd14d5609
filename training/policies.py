"""The policy of a project: made with the defaults of the environment when it is first asked for."""

from collections.abc import Mapping

import msgspec
from django.conf import settings

from training.models import TrainingPolicy
from training.trainer.job import Hyperparameters
from trajectories.errors import Invalid
from trajectories.models import Project

MIN_REWARD = "min_reward"  # beside the trainer's; mode sft: imitate only what has at least this recorded reward


def of(project: Project) -> TrainingPolicy:
    """The project's policy. The defaults are read once; later changes of the environment do not reach it."""
    policy, _ = TrainingPolicy.objects.select_related("project", "rubric").get_or_create(
        project=project,
        defaults={
            "auto_trigger": settings.TRAINING_AUTO_TRIGGER,
            "training_interval_hours": settings.TRAINING_INTERVAL_HOURS,
            "min_trajectories": settings.TRAINING_MIN_TRAJECTORIES,
            "min_group_size": settings.TRAINING_MIN_GROUP_SIZE,
            "min_scenario_groups": settings.TRAINING_MIN_SCENARIO_GROUPS,
            "data_quality_threshold": settings.TRAINING_DATA_QUALITY_THRESHOLD,
            "base_model": settings.TRAINING_BASE_MODEL,
            "max_policy_age": settings.TRAINING_MAX_POLICY_AGE,
            "max_drift": settings.TRAINING_MAX_DRIFT,
        },
    )
    return policy


def hyperparameters(chosen: Mapping[str, object]) -> Hyperparameters:
    """What the trainer gets of a policy's or a batch's hyperparameters.

    Raises:
        Invalid: there is none of that name, or its value has the wrong type.
    """
    least = chosen.get(MIN_REWARD)
    if least is not None and (isinstance(least, bool) or not isinstance(least, int | float)):
        raise Invalid(f"{MIN_REWARD} is {least!r}; it must be a number.", pointer=f"/hyperparameters/{MIN_REWARD}")
    known = {name: value for name, value in chosen.items() if name != MIN_REWARD}
    try:
        return msgspec.convert(known, Hyperparameters)
    except msgspec.ValidationError as exc:
        names = ", ".join((*Hyperparameters.__struct_fields__, MIN_REWARD))
        raise Invalid(f"hyperparameters: {exc}. There are: {names}.", pointer="/hyperparameters") from exc
