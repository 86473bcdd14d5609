"""Which groups a batch takes, in which order, and why it leaves the others."""

import pytest

from tests import builders
from training import policies, selection
from training.models import BatchStatus, Mode, TrainedModel
from trajectories.models import Group, GroupState, Project, Scenario, Split

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project()


def rules(project: Project, mode: Mode = Mode.GRPO, *, force: bool = False, behaviour: str = "") -> selection.Rules:
    policy = policies.of(project)
    parent = selection.parent(project, policy.base_model)
    return selection.Rules.of(policy, mode, parent, force=force, behaviour=behaviour)


def own_group(
    project: Project,
    *rewards: float,
    ordinal: int = 1,
    state: str = GroupState.CLOSED,
    scenario: Scenario | None = None,
    is_evaluation: bool = False,
) -> Group:
    return builders.make_group(
        project,
        rewards or (0.0, 0.0, 1.0, 1.0),
        policy_minor=ordinal,
        state=state,
        scenario=scenario,
        is_evaluation=is_evaluation,
    )


def chosen(project: Project, mode: Mode = Mode.GRPO, limit: int | None = None, *, force: bool = False) -> list[Group]:
    return selection.choose(project, rules(project, mode, force=force), limit)


def why_not(project: Project, mode: Mode = Mode.GRPO, *, force: bool = False) -> dict[str, int]:
    return selection.standing(project, rules(project, mode, force=force)).left_out()


@pytest.fixture(autouse=True)
def version(project: Project) -> TrainedModel:
    return builders.make_model(project, "v1.0.0", status="deployed", base_model=policies.of(project).base_model)


def test_ids_for_training(project: Project) -> None:
    group = own_group(project)

    assert chosen(project) == [group]


def test_all_when_no_limit(project: Project) -> None:
    groups = [own_group(project) for _ in range(7)]

    assert chosen(project, limit=None) == groups


def test_whole_groups_until_the_next_would_pass_the_limit(project: Project) -> None:
    first, second, _ = (own_group(project) for _ in range(3))

    assert chosen(project, limit=11) == [first, second]


def test_a_limit_below_the_first_group_takes_none(project: Project) -> None:
    own_group(project)

    assert chosen(project, limit=3) == []


def test_newest_behaviour_first_then_oldest_group(project: Project) -> None:
    old, older_version = own_group(project, ordinal=1), own_group(project, ordinal=1)
    newest = own_group(project, ordinal=2)

    assert chosen(project) == [newest, old, older_version]


@pytest.mark.parametrize(
    ("state", "reason"), [(GroupState.EXCLUDED, selection.EXCLUDED), (GroupState.HELD, selection.HELD)]
)
def test_excluded_and_held_groups_never(project: Project, state: str, reason: str) -> None:
    own_group(project, state=state)

    assert chosen(project, force=True) == []
    assert why_not(project, force=True) == {reason: 1}


def test_open_groups_never(project: Project) -> None:
    own_group(project, state=GroupState.OPEN)

    assert chosen(project, force=True) == []


@pytest.mark.parametrize("split", [Split.HELD_OUT, Split.LOCKED])
@pytest.mark.parametrize("mode", list(Mode))
def test_scenarios_kept_apart_never_whoever_sends_them(project: Project, split: str, mode: Mode) -> None:
    own_group(project, scenario=builders.make_scenario(project, split=split))

    assert chosen(project, mode, force=True) == []
    assert why_not(project, mode, force=True) == {selection.HELD_OUT: 1}


@pytest.mark.parametrize("mode", list(Mode))
def test_evaluation_never(project: Project, mode: Mode) -> None:
    own_group(project, is_evaluation=True)

    assert chosen(project, mode, force=True) == []


def test_another_projects_groups_never(project: Project) -> None:
    own_group(builders.make_project())

    assert chosen(project) == []


@pytest.mark.parametrize("status", ["training", "completed"])
def test_groups_of_a_live_or_completed_batch_are_taken(project: Project, status: str) -> None:
    builders.make_batch(project, status=status, groups=(own_group(project),))

    assert chosen(project) == []


@pytest.mark.parametrize("status", [BatchStatus.FAILED, BatchStatus.CANCELLED])
def test_groups_of_a_batch_that_came_to_nothing_are_free(project: Project, status: str) -> None:
    group = own_group(project)
    builders.make_batch(project, status=status, groups=(group,))

    assert chosen(project) == [group]


def test_foreign_and_unknown_behaviour_never_in_grpo(project: Project) -> None:
    builders.make_group(project, behaviour="foreign:gpt-4o", origin="foreign")
    builders.make_group(project, behaviour="unknown", origin="unknown")

    assert chosen(project, Mode.GRPO, force=True) == []
    assert why_not(project) == {selection.NOT_OURS: 2}


def test_foreign_behaviour_in_the_filtered_mode(project: Project) -> None:
    group = builders.make_group(project, behaviour="foreign:gpt-4o", origin="foreign")

    assert chosen(project, Mode.FILTERED) == [group]


def test_behaviour_older_than_the_policy_allows_never_in_grpo(project: Project) -> None:
    base_model = policies.of(project).base_model
    for patch in (1, 2, 3):
        builders.make_model(project, f"v1.0.{patch}", status="deployed", base_model=base_model)
    just_young_enough = own_group(project, ordinal=2)
    own_group(project, ordinal=1)

    assert chosen(project, force=True) == [just_young_enough]
    assert why_not(project, force=True) == {selection.TOO_OLD: 1}


def test_groups_below_the_policys_size_only_when_forced(project: Project) -> None:
    pair = own_group(project, 0.0, 1.0)

    assert chosen(project) == []
    assert why_not(project) == {selection.TOO_SMALL: 1}
    assert chosen(project, force=True) == [pair]


def test_one_attempt_alone_is_no_group_even_when_forced(project: Project) -> None:
    own_group(project, 1.0)

    assert chosen(project, force=True) == []


def test_equal_rewards_teach_nothing(project: Project) -> None:
    own_group(project, 1.0, 1.0, 1.0, 1.0)

    assert chosen(project, force=True) == []
    assert why_not(project, force=True) == {selection.NO_SPREAD: 1}


def test_unknown_rewards_are_not_zero(project: Project) -> None:
    builders.make_group(project, (None, None, None, 1.0), policy_minor=1)

    assert why_not(project, force=True) == {selection.NO_REWARD: 1}


def test_imitation_needs_neither_rewards_nor_siblings(project: Project) -> None:
    group = builders.make_group(project, (None,), behaviour="foreign:coin", origin="foreign")

    assert chosen(project, Mode.SFT) == [group]


def test_imitation_also_takes_what_has_no_scenario(project: Project) -> None:
    alone = builders.make_trajectory(project, origin="foreign", behaviour="foreign:coin")
    builders.make_trajectory(project, is_evaluation=True)
    builders.make_trajectory(project, is_excluded=True)
    builders.make_trajectory(project, state="open")

    assert list(selection.alone(project)) == [alone]


def test_only_groups_of_one_behaviour_when_asked(project: Project) -> None:
    coin = builders.make_group(project, behaviour="foreign:coin", origin="foreign")
    builders.make_group(project, behaviour="foreign:oracle", origin="foreign")

    assert selection.choose(project, rules(project, Mode.SFT, behaviour="foreign:coin"), None) == [coin]


def test_training_goes_on_from_the_version_that_serves(project: Project, version: TrainedModel) -> None:
    base_model = policies.of(project).base_model
    builders.make_model(project, "v1.0.1", status="ready", base_model=base_model)
    builders.make_model(project, "v1.0.2", status="rejected", base_model=base_model)

    assert selection.parent(project, base_model) == version


def test_training_goes_on_from_the_newest_ready_version_where_none_serves(
    project: Project, version: TrainedModel
) -> None:
    TrainedModel.objects.filter(pk=version.pk).update(status="rejected")
    base_model = policies.of(project).base_model
    builders.make_model(project, "v1.0.1", status="ready", base_model="another base")
    ready = builders.make_model(project, "v1.0.2", status="ready", base_model=base_model)

    assert selection.parent(project, base_model) == ready


def test_the_bare_base_comes_before_the_first_version(project: Project) -> None:
    assert selection.parent(project, "a base without versions") is None
