"""The policy of a project: made with the defaults of the environment when it is first asked for."""

from django.conf import settings

from training.models import TrainingPolicy
from trajectories.models import Project


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
