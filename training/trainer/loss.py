"""The losses, and what is measured of them. Tensors only: `N` trained tokens of `S` sequences, flat, on one device.

Every loss is a *sum* over tokens divided by a normaliser that the caller counted over the whole optimiser step, so
that micro-batches and processes can be added up: the gradient does not depend on how a step was cut.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD_CHUNK_ELEMENTS = 1 << 26  # logits of one piece: 256 MB in fp32; a 49,152-word head takes 1,365 positions at once


@dataclass(frozen=True, slots=True)
class ClipRange:
    """The ratio is trusted from `low` to `high` (no unit)."""

    low: float
    high: float

    @classmethod
    def of(cls, loss: Literal["cispo", "ppo"], clip_low: float | None, clip_high: float | None) -> "ClipRange":
        """1 - clip_low to 1 + clip_high; by default 0 to 5 for cispo, 0.8 to 1.2 for ppo."""
        default_low, default_high = {"cispo": (1.0, 4.0), "ppo": (0.2, 0.2)}[loss]
        return cls(
            low=1.0 - (default_low if clip_low is None else clip_low),
            high=1.0 + (default_high if clip_high is None else clip_high),
        )


def token_logp(hidden: Tensor, head: nn.Linear, target: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each trained token, and the entropy where it was chosen, at the recorded temperature.

    Args:
        hidden: (N, H) last hidden states at the positions that predict the tokens; only these go through the head,
            since logits over all positions would be most of the memory.
        head: (n, H) → (n, V) logits; computed in pieces, recomputed in the backward pass when there are several.
        target: (N,) token ids.
        temperature: (N,) above 0; logits are divided by it, as the server did when it sampled.

    Returns:
        (N,) log-probabilities in nats with gradient, (N,) entropies in nats without.
    """

    def piece(states: Tensor, wanted: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float() / heat[:, None]
        everything = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            entropy = -(everything.exp() * everything).sum(dim=-1)
        return everything.gather(1, wanted[:, None]).squeeze(1), entropy

    size = max(1, HEAD_CHUNK_ELEMENTS // head.out_features)
    if len(hidden) <= size:
        return piece(hidden, target, temperature)
    parts = [
        checkpoint(piece, hidden[i : i + size], target[i : i + size], temperature[i : i + size], use_reentrant=False)
        for i in range(0, len(hidden), size)
    ]
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])


def ratios(logp: Tensor, old_logp: Tensor, sequence: Tensor, level: Literal["token", "sequence"]) -> Tensor:
    """(N,) probability ratio of each token: its own, or its sequence's geometric mean (GSPO), with gradient.

    Args:
        logp: (N,) nats, under the model in training.
        old_logp: (N,) nats, under the model that played.
        sequence: (N,) long, 0 … S-1, which sequence a token belongs to.

    Source: sequence level: Zheng et al. 2025, arXiv:2507.18071, eq. 7.
    """
    difference = logp - old_logp
    if level == "sequence":
        amount = int(sequence.max()) + 1
        total = torch.zeros(amount, dtype=difference.dtype, device=logp.device).index_add(0, sequence, difference)
        length = torch.zeros_like(total).index_add(0, sequence, torch.ones_like(difference))
        difference = (total / length)[sequence]
    return difference.exp()


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    weight: Tensor,
    sequence: Tensor,
    *,
    normaliser: float,
    loss: Literal["cispo", "ppo"] = "cispo",
    level: Literal["token", "sequence"] = "token",
    clip: ClipRange | None = None,
) -> Tensor:
    """Policy-gradient loss of recorded tokens against the policy that played them.

    cispo: sum of weight x -stop_gradient(clip(ratio)) x advantage x logp: a token outside the range keeps a
    gradient, of bounded size. ppo: sum of weight x -min(ratio x advantage, clip(ratio) x advantage).

    Args:
        logp: (N,) nats, under the model in training, with gradient.
        old_logp: (N,) nats, the same under the model that played; carries no gradient.
        advantage: (N,) of the token's trajectory, in standard deviations of its group (frozen in the batch).
        weight: (N,) of the token; see `Hyperparameters.length_normalisation`.
        sequence: (N,) long, 0 … S-1.
        normaliser: what the sum is divided by: the weighted tokens (or trajectories) of the whole step.
        clip: trusted range of the ratio; None: the loss's default.

    Returns:
        A scalar in standard deviations; its gradient is the average over the step's tokens (or trajectories).

    Raises:
        ValueError: no token, or a normaliser that is not above 0. Without this the mean is NaN, and one optimiser
            step would spread it to every weight.

    Source: cispo: MiniMax 2025, arXiv:2506.13585, eq. 4 and 5; ppo: Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    _refuse_empty(logp, normaliser)
    trusted = clip or ClipRange.of(loss, None, None)
    ratio = ratios(logp, old_logp, sequence, level)
    if loss == "cispo":
        gain = ratio.detach().clamp(trusted.low, trusted.high) * advantage * logp
    else:
        gain = torch.minimum(ratio * advantage, ratio.clamp(trusted.low, trusted.high) * advantage)
    return -(weight * gain).sum() / normaliser


def likelihood_loss(logp: Tensor, advantage: Tensor, weight: Tensor, *, normaliser: float) -> Tensor:
    """Negative log-likelihood, weighted: the modes sft (advantage 1) and filtered (advantage above 0), no ratio.

    Args, returns and raises as `policy_loss`; in nats for advantage 1.
    """
    _refuse_empty(logp, normaliser)
    return -(weight * advantage * logp).sum() / normaliser


def k3(logp: Tensor, other_logp: Tensor) -> Tensor:
    """(N,) estimate of KL(model ‖ other) from tokens the model chose, nats, never negative: r - log r - 1.

    Args:
        logp: (N,) nats, under the model the tokens came from.
        other_logp: (N,) nats, under the model it is compared with.

    Source: Schulman 2020, "Approximating KL divergence" (estimator k3).
    """
    difference = other_logp - logp
    return difference.exp() - difference - 1.0


def kl_to_base(logp: Tensor, base_logp: Tensor, weight: Tensor, *, normaliser: float) -> Tensor:
    """Weighted mean of `k3` to the base model, nats a token, with gradient: what `kl_beta` multiplies.

    Source: Shao et al. 2024, arXiv:2402.03300, eq. 4.
    """
    _refuse_empty(logp, normaliser)
    return (weight * k3(logp, base_logp)).sum() / normaliser


def _refuse_empty(logp: Tensor, normaliser: float) -> None:
    if logp.numel() == 0:
        raise ValueError("no token is trained here: the mask is empty, and a mean over nothing is NaN.")
    if not normaliser > 0:
        raise ValueError(f"the normaliser is {normaliser}; it counts weighted tokens or trajectories and is above 0.")
