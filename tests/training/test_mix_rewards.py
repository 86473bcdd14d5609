"""One reward and one advantage out of all that is said about an attempt, against numbers worked out by hand."""

import pytest
from pytest_django import Settings

from tests import builders
from training import mixing, policies
from training.models import JudgeCall, RewardJudgment
from trajectories.errors import Refused
from trajectories.models import Group, Project, Trajectory

pytestmark = pytest.mark.django_db


@pytest.fixture
def project() -> Project:
    return builders.make_project()


def members(group: Group) -> list[Trajectory]:
    return list(group.trajectories.order_by("pk"))


def judge(group: Group, scores: list[float | None], source: str = "ruler", **fields: object) -> None:
    """One judge call about the whole group."""
    judge_part(group, members(group), scores, source, **fields)


def judge_part(
    group: Group, attempts: list[Trajectory], scores: list[float | None], source: str = "ruler", **fields: object
) -> None:
    call = JudgeCall.objects.create(project=group.project, group=group, kind="llm", source=source, **fields)
    for member, score in zip(attempts, scores, strict=True):
        RewardJudgment.objects.create(
            project=group.project,
            trajectory=member,
            group=group,
            judge_call=call,
            kind="llm",
            source=source,
            score=score,
        )


def advantages(group: Group, weights: dict[str, float]) -> list[float | None]:
    return [one.advantage for one in mixing.mix(members(group), weights)]


def rewards(group: Group, weights: dict[str, float]) -> list[float | None]:
    return [one.reward for one in mixing.mix(members(group), weights)]


# --- numbers -------------------------------------------------------------------------------------------------------


def test_one_source_is_its_raw_value_and_its_advantage_by_population_std(project: Project) -> None:
    """Rewards 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5, std 1.870829."""
    group = builders.make_group(project, (1.0, 2.0, 3.0, 6.0))

    assert rewards(group, {"recorded": 1.0}) == [1.0, 2.0, 3.0, 6.0]
    assert advantages(group, {"recorded": 1.0}) == pytest.approx([-1.069044, -0.534522, 0.0, 1.603567], abs=2e-6)


def test_epsilon_stands_beside_the_standard_deviation(project: Project) -> None:
    """Rewards 0 and 2e-6: std 1e-6, so the advantage is 1e-6 / (1e-6 + 1e-6) = 0.5."""
    group = builders.make_group(project, (0.0, 2e-6))

    assert advantages(group, {"recorded": 1.0}) == pytest.approx([-0.5, 0.5])


def test_the_weight_of_a_single_source_changes_nothing(project: Project) -> None:
    group = builders.make_group(project, (0.0, 1.0, 1.0))

    assert advantages(group, {"recorded": 7.0}) == advantages(group, {"recorded": 1.0})


def test_several_sources_are_standardised_before_they_are_weighed(project: Project) -> None:
    """Recorded 0, 10, 20, 30: z = ∓1.341641, ∓0.447214. Judge 0.9, 0.1, 0.5, 0.5: z = ±1.414214, 0, 0.
    With weights 1 and 3: 2.901000, −4.689854, 0.447214, 1.341641; their mean is 0, their std 2.846511."""
    group = builders.make_group(project, (0.0, 10.0, 20.0, 30.0))
    judge(group, [0.9, 0.1, 0.5, 0.5])

    weights = {"recorded": 1.0, "ruler": 3.0}
    assert rewards(group, weights) == pytest.approx([2.901000, -4.689854, 0.447214, 1.341641], abs=1e-4)
    assert advantages(group, weights) == pytest.approx([1.019143, -1.647580, 0.157110, 0.471328], abs=1e-4)


def test_dollars_and_shares_weigh_alike_at_equal_weights(project: Project) -> None:
    """The judge says the opposite of the reward, which is a million times larger: they cancel."""
    group = builders.make_group(project, (0.0, 1_000_000.0))
    judge(group, [1.0, 0.0])

    assert rewards(group, {"recorded": 1.0, "ruler": 1.0}) == pytest.approx([0.0, 0.0], abs=1e-5)


def test_a_source_without_spread_weighs_nothing(project: Project) -> None:
    group = builders.make_group(project, (1.0, 1.0, 1.0, 1.0))
    judge(group, [0.2, 0.8, 0.2, 0.8])

    mixed = mixing.mix(members(group), {"recorded": 100.0, "ruler": 1.0})

    assert [one.advantage for one in mixed] == pytest.approx([-1.0, 1.0, -1.0, 1.0], abs=1e-5)
    assert mixed[0].parts["recorded"] == {"raw": 1.0, "standardised": 0.0, "weight": 0.0}


@pytest.mark.parametrize("reward", [0.1, 0.7, 1e9 + 0.1])
@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_equal_rewards_give_exactly_nothing(project: Project, reward: float, n: int) -> None:
    """The mean of equal floats may differ from them in the last bit; that is no spread."""
    group = builders.make_group(project, (reward,) * n)

    assert advantages(group, {"recorded": 1.0}) == [0.0] * n


def test_raw_values_stay_beside_the_mix(project: Project) -> None:
    group = builders.make_group(project, (0.0, 10.0))
    judge(group, [0.25, 0.75])

    first = mixing.mix(members(group), {"recorded": 1.0, "ruler": 2.0})[0]

    assert first.parts["recorded"] == {"raw": 0.0, "standardised": pytest.approx(-1.0, abs=1e-5), "weight": 1.0}
    assert first.parts["ruler"] == {"raw": 0.25, "standardised": pytest.approx(-1.0, abs=1e-5), "weight": 2.0}
    assert first.judgments == [RewardJudgment.objects.get(score=0.25).pk]


# --- what is missing -----------------------------------------------------------------------------------------------


def test_an_attempt_without_a_source_is_left_out_and_never_zero(project: Project) -> None:
    """Without the third: mean 1, std 1."""
    group = builders.make_group(project, (0.0, 2.0, None))

    assert rewards(group, {"recorded": 1.0}) == [0.0, 2.0, None]
    assert advantages(group, {"recorded": 1.0}) == [pytest.approx(-1.0, abs=1e-5), pytest.approx(1.0, abs=1e-5), None]


def test_an_attempt_that_one_of_several_sources_does_not_know_is_left_out(project: Project) -> None:
    group = builders.make_group(project, (0.0, 2.0, 100.0))
    judge(group, [0.0, 1.0, None])

    assert advantages(group, {"recorded": 1.0, "ruler": 1.0})[2] is None
    assert advantages(group, {"recorded": 1.0, "ruler": 1.0})[:2] == pytest.approx([-1.0, 1.0], abs=1e-5)


def test_a_source_at_weight_zero_is_not_missed(project: Project) -> None:
    group = builders.make_group(project, (0.0, 2.0))

    assert None not in advantages(group, {"recorded": 1.0, "ruler": 0.0})


def test_where_nothing_is_known_there_is_no_advantage(project: Project) -> None:
    group = builders.make_group(project, (None, None))

    assert advantages(group, {"recorded": 1.0}) == [None, None]


# --- parts ---------------------------------------------------------------------------------------------------------


def test_advantages_are_computed_inside_each_part_of_a_judged_group(project: Project) -> None:
    """A judge's 0.6 in one call says nothing beside its 0.2 in another."""
    group = builders.make_group(project, (None,) * 4)
    first, second, third, fourth = members(group)
    judge_part(group, [first, third], [0.9, 0.6], part=0, parts=2)
    judge_part(group, [second, fourth], [0.2, 0.1], part=1, parts=2)

    mixed = mixing.mix(members(group), {"ruler": 1.0})

    assert [one.part for one in mixed] == [0, 1, 0, 1]
    assert [one.advantage for one in mixed] == pytest.approx([1.0, 1.0, -1.0, -1.0], abs=1e-4)


def test_the_recorded_reward_is_compared_inside_the_same_parts(project: Project) -> None:
    group = builders.make_group(project, (0.0, 10.0, 1.0, 11.0))
    first, second, third, fourth = members(group)
    judge_part(group, [first, third], [0.5, 0.5], part=0, parts=2)
    judge_part(group, [second, fourth], [0.5, 0.5], part=1, parts=2)

    assert advantages(group, {"recorded": 1.0, "ruler": 1.0}) == pytest.approx([-1.0, -1.0, 1.0, 1.0], abs=1e-5)


# --- which judgments count -----------------------------------------------------------------------------------------


def test_only_the_current_judgment_counts(project: Project) -> None:
    group = builders.make_group(project, (None, None))
    judge(group, [1.0, 0.0])
    RewardJudgment.objects.update(is_current=False)
    judge(group, [0.0, 1.0])

    assert rewards(group, {"ruler": 1.0}) == [0.0, 1.0]


def test_feedback_by_the_api_does_not_count(project: Project) -> None:
    group = builders.make_group(project, (0.0, 1.0))
    for member in members(group):
        RewardJudgment.objects.create(
            project=project, trajectory=member, group=group, kind="human", source="ruler", score=0.3, counts=False
        )

    assert rewards(group, {"ruler": 1.0}) == [None, None]


# --- weights -------------------------------------------------------------------------------------------------------


def test_a_policy_that_says_nothing_means_the_recorded_reward(project: Project) -> None:
    assert mixing.weights(policies.of(project)) == {"recorded": 1.0}


def test_a_policy_that_says_nothing_means_the_judge_where_there_is_one(project: Project, settings: Settings) -> None:
    settings.JUDGE_BASE_URL, settings.JUDGE_MODEL = "http://judge/v1", "judge-1"

    assert mixing.weights(policies.of(project)) == {"ruler": 1.0}


def test_a_policy_that_names_rules_means_them_where_there_is_no_judge(project: Project) -> None:
    policy = policies.of(project)
    policy.rule_judges = ["exact_answer", "completed"]

    assert mixing.weights(policy) == {"rule:exact_answer": 1.0, "rule:completed": 1.0}


def test_a_policy_that_names_weights_means_those_above_zero(project: Project) -> None:
    policy = policies.of(project)
    policy.reward_mix = {"recorded": 1, "ruler": 0, "people": 0.5}

    assert mixing.weights(policy) == {"recorded": 1.0, "people": 0.5}


@pytest.mark.parametrize(
    "reward_mix", [{"rulr": 1}, {"recorded": "much"}, {"recorded": True}, {"recorded": float("nan")}, ["recorded"]]
)
def test_a_mix_that_cannot_be_used_says_what_to_change(project: Project, reward_mix: object) -> None:
    policy = policies.of(project)
    policy.reward_mix = reward_mix

    with pytest.raises(Refused, match="reward mix"):
        mixing.weights(policy)
