"""Sharing beginnings, merging equals and cutting steps must not change what is learned."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.trainer.batches import make_encoder, make_groups, make_policy
from training.trainer import data, loop, loss
from training.trainer.job import Hyperparameters

PLAIN = Hyperparameters(share_prefix_tokens=0)
SHARED = Hyperparameters(share_prefix_tokens=300)


def drawn_sequences(amount: int = 9) -> list[data.Encoded]:
    """Sequences with common beginnings of every length, some equal."""
    draw = random.Random(5)
    start = [draw.randrange(256) for _ in range(20)]
    sequences = []
    for index in range(amount):
        ids = start[: draw.randrange(5, 20)] + [draw.randrange(256) for _ in range(draw.randrange(2, 12))]
        trained = tuple(sorted(draw.sample(range(1, len(ids)), 2)))
        sequences.append(
            data.Encoded(
                ids=tuple(ids),
                trained=trained,
                old_logp=(-1.0, -2.0),
                temperature=(1.0, 0.8),
                advantage=draw.choice((-1.0, 0.5)),
                weight=1.0 + index % 3,
            )
        )
    return [*sequences, sequences[0], replace(sequences[0], advantage=2 * sequences[0].advantage, weight=3.0)]


def values(policy: loop.Policy, sequences: list[data.Encoded], hyper: Hyperparameters) -> dict[object, list[float]]:
    """Log-probabilities of each sequence's trained tokens."""
    found: dict[object, list[float]] = {}
    for micro in data.micro_batches(sequences, hyper):
        with torch.no_grad():
            logp, _ = policy.logp(micro)
        for index, source in enumerate(micro.sources):
            found[(source.ids, source.trained)] = logp[micro.sequence == index].tolist()
    return found


def gradient(
    policy: loop.Policy, sequences: list[data.Encoded], hyper: Hyperparameters, kind: Literal["cispo", "ppo"]
) -> Tensor:
    for weight in policy.weights.values():
        weight.grad = None
    for micro in data.micro_batches(sequences, hyper):
        logp, _ = policy.logp(micro)
        value = loss.policy_loss(
            logp, micro.old_logp, micro.advantage, micro.weight, micro.sequence, normaliser=7.0, loss=kind
        )
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return torch.cat([w.grad.flatten() for w in policy.weights.values() if w.grad is not None])


def test_rows_that_share_beginnings_give_the_same_log_probabilities(cache: Path) -> None:
    policy, sequences = make_policy(cache), drawn_sequences()
    plain, shared = values(policy, sequences, PLAIN), values(policy, sequences, SHARED)
    assert plain.keys() == shared.keys()
    for key, expected in plain.items():
        assert shared[key] == pytest.approx(expected, abs=1e-4)


def test_sharing_computes_fewer_tokens() -> None:
    sequences = drawn_sequences()
    tokens = {hyper: sum(m.tokens for m in data.micro_batches(sequences, hyper)) for hyper in (PLAIN, SHARED)}
    assert tokens[PLAIN] == sum(len(one.ids) for one in sequences)
    assert tokens[SHARED] < 0.8 * tokens[PLAIN]


def test_rows_that_share_beginnings_give_the_same_gradient(cache: Path) -> None:
    policy, sequences = make_policy(cache), drawn_sequences()
    plain, shared = (gradient(policy, sequences, hyper, "cispo") for hyper in (PLAIN, SHARED))
    assert torch.allclose(plain, shared, atol=1e-5, rtol=1e-3)


def test_small_micro_batches_give_the_same_gradient(cache: Path) -> None:
    policy, sequences = make_policy(cache), drawn_sequences()
    small = Hyperparameters(share_prefix_tokens=0, max_tokens_per_batch=64)
    assert len(data.micro_batches(sequences, small)) > 1
    parts = gradient(policy, sequences, small, "cispo")
    assert torch.allclose(gradient(policy, sequences, PLAIN, "cispo"), parts, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["cispo", "ppo"])
def test_merged_is_the_same_as_not_merged(cache: Path, kind: Literal["cispo", "ppo"]) -> None:
    policy, sequences = make_policy(cache), drawn_sequences()
    merged = data.merge_identical(sequences)
    assert len(merged) == len(sequences) - 2
    assert sum(one.count for one in merged) == len(sequences)
    assert torch.allclose(
        gradient(policy, sequences, PLAIN, kind), gradient(policy, merged, PLAIN, kind), atol=1e-5, rtol=1e-3
    )


def test_what_was_played_with_other_odds_is_not_merged() -> None:
    one = drawn_sequences()[0]
    assert len(data.merge_identical([one, replace(one, old_logp=(-1.1, -2.0))])) == 2
    assert len(data.merge_identical([one, replace(one, advantage=-one.advantage)])) == 2
    assert len(data.merge_identical([one, replace(one, temperature=(1.0, 0.9))])) == 2


def test_every_group_is_in_exactly_one_step_of_an_epoch(cache: Path) -> None:
    groups = data.encode(make_groups(13), make_encoder(cache, "grpo"), PLAIN).groups
    hyper = Hyperparameters(trajectories_per_step=12)
    for epoch in (1, 2):
        cut = data.steps(groups, hyper, seed=1, epoch=epoch)
        assert len(cut) == 4
        assert all(cut)
        assert sorted(group.group for step in cut for group in step) == sorted(group.group for group in groups)


def test_the_order_of_steps_hangs_on_seed_and_epoch_alone(cache: Path) -> None:
    groups = data.encode(make_groups(13), make_encoder(cache, "grpo"), PLAIN).groups

    def order(seed: int, epoch: int) -> list[str]:
        return [group.group for step in data.steps(groups, PLAIN, seed=seed, epoch=epoch) for group in step]

    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}) == 4


def test_a_group_larger_than_a_step_leaves_no_step_empty(cache: Path) -> None:
    groups = data.encode(make_groups(6), make_encoder(cache, "grpo"), PLAIN).groups
    groups[0].trajectories = 100
    for seed in range(5):
        assert all(data.steps(groups, Hyperparameters(trajectories_per_step=25), seed=seed, epoch=1))
