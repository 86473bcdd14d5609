"""One reward and one advantage for each attempt of a group, out of all that is said about it.

Every source (the recorded reward, each judge, people) is standardised inside the group, so that a judge's 0 to 1 and
an environment's dollars weigh as their weights say. Judge scores compare only inside one judge call: where a group
was judged in parts, everything is computed inside each part.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from django.conf import settings

from training.models import RewardJudgment, TrainingPolicy
from trajectories.models import Trajectory

RECORDED = "recorded"  # the reward that came with the trajectory, or later for it
RULER = "ruler"  # the LLM judge
PEOPLE = "people"  # overrides and reviews by persons
RULE = "rule:"  # before the name of a rule judge

EPSILON = 1e-6  # beside the standard deviation, as ART has it


@dataclass(frozen=True)
class MixedReward:
    """What an attempt is worth beside its siblings."""

    trajectory_id: int  # pk
    reward: float | None  # one source: its raw value; several: the weighted sum of standardised ones
    advantage: float | None  # (reward - mean) / (population std + 1e-6) inside the part; None: a source is missing
    parts: dict[str, object] = field(default_factory=dict)  # by source: {"raw", "standardised", "weight"}
    judgments: list[int] = field(default_factory=list)  # pks of the RewardJudgments that counted
    part: int = 0  # of the judge call, 0-based


def weights(policy: TrainingPolicy) -> dict[str, float]:
    """The weight of each source, above 0. A policy that says nothing means the LLM judge where there is one,
    else the policy's rule judges, else the recorded reward."""
    said = {str(source): float(weight) for source, weight in policy.reward_mix.items() if float(weight) > 0}
    if said:
        return said
    if settings.JUDGE_BASE_URL and settings.JUDGE_MODEL:
        return {RULER: 1.0}
    rules = {f"{RULE}{name}": 1.0 for name in policy.rule_judges}
    return rules or {RECORDED: 1.0}


def mix(members: Sequence[Trajectory], weights: Mapping[str, float]) -> list[MixedReward]:
    """Mix the rewards of attempts that share a baseline.

    Args:
        members: the attempts of one group; who stands in the baseline is the caller's choice.
        weights: by source, see `weights`; those at 0 or below do not count.

    Returns:
        One for each member, in their order. A member for which a source is missing has no advantage and does not
        enter the baseline; a source without spread among the others weighs nothing.
    """
    wanted = {source: float(weight) for source, weight in weights.items() if weight > 0}
    said = _judgments(members, wanted)
    by_part: dict[int, list[Trajectory]] = defaultdict(list)
    for member in members:
        by_part[_part(said[member.pk])].append(member)
    mixed: dict[int, MixedReward] = {}
    for part, siblings in by_part.items():
        mixed.update(_mix_part(part, siblings, wanted, said))
    return [mixed[member.pk] for member in members]


def _judgments(members: Sequence[Trajectory], wanted: Mapping[str, float]) -> dict[int, dict[str, RewardJudgment]]:
    """The current judgment of each member by each source that counts."""
    found: dict[int, dict[str, RewardJudgment]] = {member.pk: {} for member in members}
    sources = [source for source in wanted if source != RECORDED]
    if sources:
        rows = RewardJudgment.objects.filter(
            trajectory__in=list(found), source__in=sources, is_current=True, counts=True
        ).select_related("judge_call")
        for row in rows:
            found[row.trajectory_id][row.source] = row
    return found


def _part(said: Mapping[str, RewardJudgment]) -> int:
    return max((row.judge_call.part for row in said.values() if row.judge_call is not None), default=0)


def _mix_part(
    part: int,
    siblings: Sequence[Trajectory],
    wanted: Mapping[str, float],
    said: Mapping[int, Mapping[str, RewardJudgment]],
) -> dict[int, MixedReward]:
    raw: dict[int, dict[str, float | None]] = {}
    for member in siblings:
        rows = said[member.pk]
        raw[member.pk] = {
            source: member.reward if source == RECORDED else (rows[source].score if source in rows else None)
            for source in wanted
        }
    whole = [pk for pk, values in raw.items() if all(value is not None for value in values.values())]
    standardised: dict[str, dict[int, float]] = {}
    spread: dict[str, float] = {}
    for source in wanted:
        known = {pk: value for pk in whole if (value := raw[pk][source]) is not None}
        mean = statistics.fmean(known.values()) if known else 0.0
        std = statistics.pstdev(known.values(), mean) if known else 0.0
        spread[source] = std
        standardised[source] = {pk: (value - mean) / (std + EPSILON) if std > 0 else 0.0 for pk, value in known.items()}
    active = {source: weight for source, weight in wanted.items() if spread[source] > 0}
    rewards: dict[int, float] = {}
    for pk in whole:
        if len(wanted) == 1:
            (value,) = raw[pk].values()
            assert value is not None
            rewards[pk] = value
        else:
            rewards[pk] = sum(weight * standardised[source][pk] for source, weight in active.items())
    mean = statistics.fmean(rewards.values()) if rewards else 0.0
    std = statistics.pstdev(rewards.values(), mean) if rewards else 0.0
    return {
        member.pk: MixedReward(
            trajectory_id=member.pk,
            reward=rewards.get(member.pk),
            advantage=(rewards[member.pk] - mean) / (std + EPSILON) if member.pk in rewards else None,
            parts={
                source: {
                    "raw": raw[member.pk][source],
                    "standardised": standardised[source].get(member.pk),
                    "weight": active.get(source, 0.0),
                }
                for source in wanted
            },
            judgments=[row.pk for row in said[member.pk].values()],
            part=part,
        )
        for member in siblings
    }
