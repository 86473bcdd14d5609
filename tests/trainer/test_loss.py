"""The losses, held to numbers worked out by hand and to a slow plain version in float64."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from training.trainer.loss import ClipRange, k3, kl_to_base, likelihood_loss, policy_loss, ratios, token_logp


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([math.log(p) for p in probabilities], dtype=torch.float64)


ONE = torch.zeros(1, dtype=torch.long)


def loss_of(
    logp: Tensor,
    old: Tensor,
    advantage: float,
    loss: Literal["cispo", "ppo"],
    *,
    level: Literal["token", "sequence"] = "token",
) -> tuple[float, list[float]]:
    """Loss and gradient by log-probability, of one sequence with weight 1 a token, averaged over its tokens."""
    leaf = logp.clone().requires_grad_()
    n = len(leaf)
    value = policy_loss(
        leaf,
        old,
        torch.full((n,), advantage, dtype=torch.float64),
        torch.ones(n, dtype=torch.float64),
        torch.zeros(n, dtype=torch.long),
        normaliser=float(n),
        loss=loss,
        level=level,
    )
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient.tolist()


def test_cispo_weighs_the_log_probability_by_a_ratio_that_carries_no_gradient() -> None:
    # One token, played with probability 0.25, now 0.5: ratio 2, advantage 1.5, so loss = -2 x 1.5 x log 0.5.
    value, gradient = loss_of(logs(0.5), logs(0.25), 1.5, "cispo")
    assert value == pytest.approx(-2 * 1.5 * math.log(0.5))
    assert gradient == pytest.approx([-3.0])


def test_cispo_keeps_a_bounded_gradient_outside_its_range() -> None:
    # Ratio 8 is cut to 5; the token still learns.
    value, gradient = loss_of(logs(0.8), logs(0.1), 1.0, "cispo")
    assert value == pytest.approx(-5 * math.log(0.8))
    assert gradient == pytest.approx([-5.0])


def test_ppo_stops_at_the_edge_of_its_range() -> None:
    # Ratio 2 with advantage 1: the minimum is 1.2, without gradient. With advantage -1 it is 2, with gradient 2.
    value, gradient = loss_of(logs(0.5), logs(0.25), 1.0, "ppo")
    assert value == pytest.approx(-1.2)
    assert gradient == pytest.approx([0.0])
    value, gradient = loss_of(logs(0.5), logs(0.25), -1.0, "ppo")
    assert value == pytest.approx(2.0)
    assert gradient == pytest.approx([2.0])


def test_ppo_inside_its_range_is_the_ratio_times_the_advantage() -> None:
    value, gradient = loss_of(logs(0.55, 0.45), logs(0.5, 0.5), 2.0, "ppo")
    assert value == pytest.approx(-2.0 * (1.1 + 0.9) / 2)
    assert gradient == pytest.approx([-1.1, -0.9])


def test_the_sequence_level_takes_one_ratio_the_geometric_mean() -> None:
    # Token ratios 2 and 0.5: their geometric mean is 1, so nothing is clipped.
    ratio = ratios(logs(0.5, 0.25), logs(0.25, 0.5), torch.tensor([0, 0]), "sequence")
    assert ratio.tolist() == pytest.approx([1.0, 1.0])
    value, _ = loss_of(logs(0.5, 0.25), logs(0.25, 0.5), 1.0, "ppo", level="sequence")
    assert value == pytest.approx(-1.0)


def test_sequences_do_not_share_their_ratio() -> None:
    ratio = ratios(logs(0.5, 0.5, 0.5), logs(0.25, 0.25, 0.5), torch.tensor([0, 0, 1]), "sequence")
    assert ratio.tolist() == pytest.approx([2.0, 2.0, 1.0])


def test_likelihood_is_the_weighted_negative_log_probability() -> None:
    value = likelihood_loss(
        logs(0.5, 0.25), torch.tensor([1.0, 1.0]).double(), torch.tensor([1.0, 3.0]).double(), normaliser=4.0
    )
    assert value.item() == pytest.approx(-(math.log(0.5) + 3 * math.log(0.25)) / 4)


def test_k3_is_zero_where_nothing_changed_and_never_negative() -> None:
    assert k3(logs(0.3), logs(0.3)).item() == pytest.approx(0.0)
    # ratio 0.5 / 0.25 = 2 → 2 - log 2 - 1
    assert k3(logs(0.25), logs(0.5)).item() == pytest.approx(1 - math.log(2))
    assert bool((k3(torch.randn(50), torch.randn(50)) >= 0).all())


def test_the_kl_to_the_base_pulls_towards_it() -> None:
    logp = logs(0.25).requires_grad_()
    value = kl_to_base(logp, logs(0.5), torch.ones(1).double(), normaliser=1.0)
    (gradient,) = torch.autograd.grad(value, logp)
    # d/dx (e^(b-x) - (b-x) - 1) = 1 - e^(b-x) = -1: the step goes up, to the base's 0.5
    assert gradient.item() == pytest.approx(-1.0)


def test_token_log_probabilities_are_those_at_the_recorded_temperature() -> None:
    head = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    hidden = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    logp, entropy = token_logp(hidden, head, torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    cool, warm = math.exp(2), math.exp(1)  # logits 2 0 0, and 1 0 0 at temperature 2
    assert logp.tolist() == pytest.approx([math.log(cool / (cool + 2)), math.log(warm / (warm + 2))])
    share = warm / (warm + 2), 1 / (warm + 2)
    assert entropy[1].item() == pytest.approx(-share[0] * math.log(share[0]) - 2 * share[1] * math.log(share[1]))


def test_a_large_head_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    head = nn.Linear(4, 10, bias=False)
    hidden = torch.randn(7, 4, requires_grad=True)
    wanted, heat = torch.randint(0, 10, (7,)), torch.rand(7) + 0.5
    whole, entropy = token_logp(hidden, head, wanted, heat)
    gradient = torch.autograd.grad(whole.sum(), hidden)[0]
    monkeypatch.setattr("training.trainer.loss.HEAD_CHUNK_ELEMENTS", 20)  # two positions a piece
    pieces, entropy_again = token_logp(hidden, head, wanted, heat)
    assert torch.allclose(whole, pieces) and torch.allclose(entropy, entropy_again)
    assert torch.allclose(gradient, torch.autograd.grad(pieces.sum(), hidden)[0])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", ["cispo", "ppo"])
def test_it_agrees_with_a_slow_reference(loss: Literal["cispo", "ppo"], level: Literal["token", "sequence"]) -> None:
    generator = torch.Generator().manual_seed(11)
    lengths = [3, 1, 5, 2]
    sequence = torch.tensor([s for s, n in enumerate(lengths) for _ in range(n)])
    n = len(sequence)
    logp = (-2 * torch.rand(n, generator=generator)).double().requires_grad_()
    old = (logp.detach() + 0.8 * torch.randn(n, generator=generator).double()).clamp(max=-0.01)
    advantage = torch.randn(4, generator=generator).double()[sequence]
    weight = (torch.rand(4, generator=generator).double() + 0.5)[sequence]
    clip = ClipRange(0.7, 1.4)
    value = policy_loss(logp, old, advantage, weight, sequence, normaliser=9.0, loss=loss, level=level, clip=clip)
    (gradient,) = torch.autograd.grad(value, logp)

    def slow(values: list[float], frozen: list[float]) -> float:
        """The loss token by token; `frozen` are the values behind a stopped gradient."""
        total = 0.0
        for i in range(n):
            mine = [j for j in range(n) if sequence[j] == sequence[i]] if level == "sequence" else [i]
            ratio = math.exp(sum(values[j] - float(old[j]) for j in mine) / len(mine))
            still = math.exp(sum(frozen[j] - float(old[j]) for j in mine) / len(mine))
            a, w = float(advantage[i]), float(weight[i])
            if loss == "cispo":
                total -= w * min(max(still, 0.7), 1.4) * a * values[i]
            else:
                total -= w * min(ratio * a, min(max(ratio, 0.7), 1.4) * a)
        return total / 9.0

    at = logp.tolist()
    assert value.item() == pytest.approx(slow(at, at), rel=1e-12)
    step = 1e-6
    for i in range(n):
        up, down = list(at), list(at)
        up[i] += step
        down[i] -= step
        assert gradient[i].item() == pytest.approx((slow(up, at) - slow(down, at)) / (2 * step), abs=1e-7)


def test_an_empty_mask_is_refused() -> None:
    nothing = torch.zeros(0)
    with pytest.raises(ValueError, match="no token is trained"):
        policy_loss(nothing, nothing, nothing, nothing, nothing.long(), normaliser=1.0)
    with pytest.raises(ValueError, match="no token is trained"):
        likelihood_loss(nothing, nothing, nothing, normaliser=1.0)


def test_a_normaliser_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="normaliser is 0"):
        likelihood_loss(logs(0.5), torch.ones(1), torch.ones(1), normaliser=0.0)


def test_default_ranges_are_those_of_the_sources() -> None:
    assert ClipRange.of("cispo", None, None) == ClipRange(0.0, 5.0)
    assert ClipRange.of("ppo", None, None) == ClipRange(0.8, 1.2)
    assert ClipRange.of("ppo", 0.1, 0.3) == ClipRange(0.9, 1.3)
