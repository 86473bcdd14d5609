"""The policy of a project: its defaults, what is set by hand, what the environment says for a first start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_django import Settings

from tests import builders
from training import policies
from trajectories.errors import Invalid
from trajectories.models import Project

pytestmark = pytest.mark.django_db

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project() -> Project:
    return builders.make_project("trading")


def test_defaults(project: Project) -> None:
    policy = policies.of(project)

    assert policy.min_trajectories == 1000
    assert policy.min_group_size == 4
    assert policy.min_scenario_groups == 10
    assert policy.data_quality_threshold == 0.95
    assert policy.training_interval_hours == 24
    assert policy.auto_trigger is True
    assert policy.mode == "grpo"
    assert policy.max_policy_age == 2
    assert policy.max_drift == 0.2
    assert policy.truncated_runs == "mask"
    assert policy.group_by_window is False


def test_openpipe_model_by_default(project: Project) -> None:
    assert policies.of(project).base_model == "OpenPipe/Qwen3-14B-Instruct"


def test_custom_values_are_merged_with_the_defaults(project: Project) -> None:
    policy = policies.of(project)
    policy.min_trajectories = 50
    policy.save()

    policy = policies.of(project)
    assert (policy.min_trajectories, policy.min_group_size) == (50, 4)


def test_the_environment_overrides_the_defaults_of_new_projects(project: Project, settings: Settings) -> None:
    policies.of(project)
    settings.TRAINING_MIN_TRAJECTORIES = 7
    settings.TRAINING_BASE_MODEL = "tiny"

    new = policies.of(builders.make_project())

    assert (new.min_trajectories, new.base_model) == (7, "tiny")
    assert policies.of(project).min_trajectories == 1000, "a policy that is there is a person's to change"


def from_environment(name: str, value: str, setting: str) -> subprocess.CompletedProcess[str]:
    code = f"from trainingsite import settings; print(settings.{setting})"
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, name: value}, cwd=ROOT, capture_output=True, text=True
    )


def test_the_environment_is_read_by_its_documented_names() -> None:
    found = from_environment("TRAINING_MIN_TRAJECTORIES", "77", "TRAINING_MIN_TRAJECTORIES")

    assert found.stdout.strip() == "77"


def test_a_value_that_cannot_be_stops_the_start_with_a_sentence() -> None:
    found = from_environment("TRAINING_MIN_GROUP_SIZE", "1", "TRAINING_MIN_GROUP_SIZE")

    assert found.returncode != 0
    assert "TRAINING_MIN_GROUP_SIZE" in found.stderr.splitlines()[-1]


def test_a_project_has_one_policy(project: Project) -> None:
    assert policies.of(project).pk == policies.of(project).pk


def test_versions_are_served_under_the_projects_name_unless_given(project: Project) -> None:
    policy = policies.of(project)
    assert policy.served_name("v1.0.3") == "trading-v1.0.3"

    policy.model_name_prefix = "trader"
    assert policy.served_name("v1.0.3") == "trader-v1.0.3"


def test_hyperparameters_that_the_trainer_does_not_know_are_refused_by_name() -> None:
    with pytest.raises(Invalid, match="There are: "):
        policies.hyperparameters({"learning_rat": 1e-4})
    with pytest.raises(Invalid, match="min_reward"):
        policies.hyperparameters({"min_reward": "much"})

    assert policies.hyperparameters({"learning_rate": 1e-4, "min_reward": 1.0}).learning_rate == 1e-4
