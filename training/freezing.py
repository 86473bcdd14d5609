"""What a group becomes inside a batch: items by value, which the trainer never recomputes.

The mixed reward and its parts come from `mixing`; here they meet the rules of learning: who stands in the baseline,
who gets a gradient, and with which advantage.
"""

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from django.db.models import QuerySet

from training import mixing, selection
from training.models import BatchGroup, BatchItem, Mode, TrainedModel, TrainingBatch, TrainingPolicy, TruncatedRuns
from training.policies import MIN_REWARD
from trajectories.models import Fidelity, FinalStatus, Group, GroupState, Origin, Split, State, Trajectory

TRUNCATED = (FinalStatus.TRUNCATED_STEPS, FinalStatus.TRUNCATED_TOKENS, FinalStatus.TIMEOUT)


@dataclass(frozen=True)
class FrozenGroup:
    """A group with what it gives to a batch, or with the reason why it gives nothing."""

    items: Sequence[BatchItem] = ()
    why_not: str = ""
    mean: float | None = None  # of the mixed rewards
    std: float | None = None  # of the same, population
    off_policy: bool = False  # something in it was not played by the version that is trained on from


def freeze(batch: TrainingBatch, row: BatchGroup, policy: TrainingPolicy) -> FrozenGroup:
    """The items of one of the batch's groups, not saved yet."""
    truncated = TruncatedRuns(policy.truncated_runs)
    if row.group is not None:
        why_not = _wall(row.group)
        if why_not:
            return FrozenGroup(why_not=why_not)
        members = members_of(row.group, truncated)
    else:
        members = selection.alone(batch.project, row.behaviour)[: row.n]
    chosen = list(members.defer("metrics", "findings", "reward_components"))
    mixed = mixing.mix(chosen, batch.reward_mix)
    if batch.mode == Mode.SFT:
        items = _imitated(batch, row, truncated, chosen, mixed)
    else:
        items = _compared(batch, row, truncated, chosen, mixed)
    trained = any(item.is_trained and (batch.mode == Mode.SFT or item.advantage != 0) for item in items)
    why_not = "" if trained else _why_nothing(batch, items)
    rewards = [item.reward for item in items if item.reward is not None]
    parent = batch.parent.version if batch.parent else None
    return FrozenGroup(
        items=items,
        why_not=why_not,
        mean=statistics.fmean(rewards) if rewards else None,
        std=statistics.pstdev(rewards) if rewards else None,
        off_policy=batch.mode != Mode.GRPO
        and any(one.origin != Origin.OWN or one.behaviour != parent for one in chosen),
    )


def _wall(group: Group) -> str:
    """What may have changed since the group was chosen, and keeps it out whatever was asked for."""
    if group.state != GroupState.CLOSED:
        return str(GroupState(group.state).label)
    if group.is_evaluation or group.scenario.split != Split.TRAIN:
        return selection.HELD_OUT
    return ""


def members_of(group: Group, truncated: TruncatedRuns) -> QuerySet[Trajectory]:
    """The attempts that stand in a group's baseline. A fault of the environment says nothing about the policy."""
    members = (
        group.trajectories.filter(is_evaluation=False, is_excluded=False, is_superseded=False, twin_of__isnull=True)
        .exclude(state=State.OPEN)
        .exclude(final_status=FinalStatus.ENVIRONMENT_ERROR)
    )
    if truncated == TruncatedRuns.EXCLUDE:
        members = members.exclude(final_status__in=TRUNCATED)
    return members.order_by("pk")


def _compared(
    batch: TrainingBatch,
    row: BatchGroup,
    truncated: TruncatedRuns,
    chosen: Sequence[Trajectory],
    mixed: Sequence[mixing.MixedReward],
) -> list[BatchItem]:
    """Items of the modes that compare attempts: advantages against the group's mean."""
    known = [one for one in mixed if one.advantage is not None]
    by_pk = {one.pk: one for one in chosen}
    members = [by_pk[one.trajectory_id] for one in known]
    if batch.shuffle_rewards:
        # Everything that hangs on a reward goes to another attempt together; seeded, so that it can be done again.
        known = random.Random(f"{batch.seed}:{row.group_id}").sample(known, len(known))
    items = []
    for member, one in zip(members, known, strict=True):
        assert one.advantage is not None
        why_not = no_gradient(Mode(batch.mode), batch.parent, member, truncated)
        advantage = one.advantage
        if batch.mode == Mode.FILTERED and not why_not and advantage <= 0:
            why_not = "not above its group's mean"
        items.append(_item(batch, row, member, one, advantage, why_not))
    return items


def _imitated(
    batch: TrainingBatch,
    row: BatchGroup,
    truncated: TruncatedRuns,
    chosen: Sequence[Trajectory],
    mixed: Sequence[mixing.MixedReward],
) -> list[BatchItem]:
    """Items of the mode sft: each attempt counts alike, or only those with at least so much reward."""
    by_pk = {one.trajectory_id: one for one in mixed}
    least = batch.hyperparameters.get(MIN_REWARD)
    items = []
    for member in chosen:
        one = by_pk[member.pk]
        why_not = no_gradient(Mode(batch.mode), batch.parent, member, truncated)
        if not why_not and least is not None and (member.reward is None or member.reward < least):
            had = "unknown" if member.reward is None else f"{member.reward:g}"
            why_not = f"reward {had}, {MIN_REWARD} is {least:g}"
        items.append(_item(batch, row, member, one, 1.0, why_not))
    return items


def no_gradient(mode: Mode, parent: TrainedModel | None, member: Trajectory, truncated: TruncatedRuns) -> str:
    """Why an attempt stands in the baseline alone; "" when it is trained."""
    calls = member.n_trainable_calls if mode == Mode.GRPO else member.n_calls
    if calls == 0:
        return selection.NOTHING_TO_TRAIN
    version = parent.version if parent else None
    if mode == Mode.GRPO and member.fidelity != Fidelity.EXACT and member.behaviour != version:
        return "no log-probabilities, and not played by the parent"
    if member.final_status in TRUNCATED and truncated == TruncatedRuns.MASK:
        return str(FinalStatus(member.final_status).label)
    return ""


def _item(
    batch: TrainingBatch, row: BatchGroup, member: Trajectory, one: mixing.MixedReward, advantage: float, why_not: str
) -> BatchItem:
    return BatchItem(
        batch=batch,
        batch_group=row,
        trajectory=member,
        trajectory_ref=member.trajectory_id,
        content_hash=bytes(member.content_hash),
        reward=one.reward,
        parts=one.parts,
        judgments=one.judgments,
        advantage=advantage,
        judge_part=one.part,
        is_trained=not why_not,
        why_not=why_not,
    )


def _why_nothing(batch: TrainingBatch, items: Sequence[BatchItem]) -> str:
    if batch.mode != Mode.SFT and len(items) < selection.AT_LEAST:
        return selection.NO_REWARD
    if batch.mode != Mode.SFT and not any(item.advantage for item in items):
        return selection.NO_SPREAD
    return f"nothing to train: {items[0].why_not}" if items else selection.TOO_SMALL


def manifest_line(item: BatchItem) -> bytes:
    """One item in the text whose SHA-256, over all items in order, is the batch's manifest hash.

    A JSON array, no spaces: trajectory id, content hash (hex), mixed reward or null, advantage, weight, trained or not.
    """
    values = [
        item.trajectory_ref,
        bytes(item.content_hash).hex(),
        item.reward,
        item.advantage,
        item.weight,
        item.is_trained,
    ]
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
