"""An independent trainer as a witness; runs where TRL is installed (`pip install trl==1.16.0`), it is no dependency."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.trainer.batches import make_encoder, make_history, make_job, make_policy
from training.trainer import data, loss
from training.trainer.loss import ClipRange

TEMPERATURE = 0.8


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["cispo", "ppo"])
def test_loss_and_gradient_are_those_of_trl(
    cache: Path, tmp_path: Path, kind: Literal["cispo", "ppo"], level: Literal["token", "sequence"]
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    policy = make_policy(cache)
    encoder = make_encoder(cache)
    answers = ("yes", "no, never", "perhaps", "yes it is")
    sequences = [one for answer in answers for one in encoder.history(make_history("now?", answer), data._Tally(), "t")]
    generator = torch.Generator().manual_seed(2)
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9])
    drawn = [torch.randn(len(one.trained), generator=generator) for one in sequences]
    tokens = sum(len(one.trained) for one in sequences)

    def ours(old: list[Tensor]) -> tuple[float, Tensor]:
        value = torch.zeros(())
        for index, sequence in enumerate(sequences):
            (micro,) = data.micro_batches([sequence], make_job(cache).hyperparameters)
            micro.temperature.fill_(TEMPERATURE)
            logp, _ = policy.logp(micro)
            if len(old) <= index:
                old.append(logp.detach() + 0.4 * drawn[index])
            value = value + loss.policy_loss(
                logp,
                old[index],
                advantages[index].expand(len(logp)),
                torch.ones(len(logp)),
                micro.sequence,
                normaliser=float(tokens),
                loss=kind,
                level=level,
                clip=ClipRange(0.0 if kind == "cispo" else 0.8, 1.3),
            )
        return value.item(), gradient(value)

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.weights.values()))])

    old: list[Tensor] = []
    expected, steepest = ours(old)

    # The trainer wants a data set and never reads it. A given fingerprint spares the hashing of Arrow's classes.
    table = datasets.table.InMemoryTable.from_pydict({"prompt": ["now?"] * 4})
    unread = datasets.Dataset(table, fingerprint="unread")
    trainer = trl.GRPOTrainer(
        model=policy.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            num_generations=4,
            per_device_train_batch_size=4,
            loss_type="cispo" if kind == "cispo" else "dapo",
            importance_sampling_level=level,
            epsilon=0.2,
            epsilon_high=1.3 if kind == "cispo" else 0.3,
            temperature=TEMPERATURE,
            beta=0.0,
        ),
        train_dataset=unread,
        processing_class=encoder.tokenizer,
    )
    starts = [one.trained[0] for one in sequences]
    width = max(len(one.trained) for one in sequences)
    padded = torch.zeros(4, width, dtype=torch.long)
    mask = torch.zeros(4, width, dtype=torch.long)
    played = torch.zeros(4, width)
    for index, one in enumerate(sequences):
        padded[index, : len(one.trained)] = torch.tensor(one.ids[starts[index] :])
        mask[index, : len(one.trained)] = 1
        played[index, : len(one.trained)] = old[index]
    prompts = torch.tensor([one.ids[: starts[0]] for one in sequences])
    value = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": padded,
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": played,
            "num_items_in_batch": torch.tensor(float(tokens)),
        },
    )
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(gradient(value), steepest, atol=1e-5, rtol=1e-3)
