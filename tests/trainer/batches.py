"""Small batches and a small base for the trainer's tests."""

import random
from pathlib import Path

import msgspec
import pytest
import torch

from training.trainer import bases, data, loop
from training.trainer.job import (
    CallLine,
    GroupLine,
    HistoryLine,
    Hyperparameters,
    Job,
    Mode,
    TrajectoryLine,
    write_job,
)

BASE = "tiny-test"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small base in it, made once."""
    folder = tmp_path_factory.getbasetemp() / "bases"
    bases.materialise(BASE, folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_encoder(cache: Path, mode: Mode = "sft") -> data.Encoder:
    folder = bases.materialise(BASE, cache)
    tokenizer = bases.load_tokenizer(folder)
    return data.Encoder(tokenizer, bases.end_tokens(folder, tokenizer), mode, vocabulary=len(tokenizer))


def make_history(prompt: str, answer: str, **call: object) -> HistoryLine:
    """One question, one answer."""
    messages: list[dict[str, object]] = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
    return HistoryLine(messages=messages, calls=[msgspec.convert({"at": 1, **call}, CallLine)])


def make_groups(amount: int = 6, size: int = 4, *, seed: int = 0, parent_policy: bool = True) -> list[GroupLine]:
    """Groups whose answers are drawn, half of them good; without log-probabilities, as the parent's own."""
    draw = random.Random(seed)
    groups = []
    for g in range(amount):
        trajectories = []
        for t in range(size):
            answer = draw.choice(("yes", "no", "perhaps so"))
            trajectories.append(
                TrajectoryLine(
                    trajectory_id=f"{g}-{t}",
                    reward=float(t % 2),
                    advantage=1.0 if t % 2 else -1.0,
                    role="trader" if g % 2 else "seller",
                    histories=[make_history(f"question {g}", answer, parent_policy=parent_policy)],
                )
            )
        groups.append(GroupLine(group=f"g{g}", scenario=f"s{g}", trajectories=trajectories))
    return groups


def make_job(cache: Path, mode: Mode = "grpo", **hyper: object) -> Job:
    settings = {"learning_rate": 1e-2, "lora_rank": 4, "trajectories_per_step": 8, "max_drift": 0, **hyper}
    return Job(
        job_id="job",
        fence=3,
        mode=mode,
        base_model=BASE,
        base_cache=str(cache),
        threads=1,
        hyperparameters=msgspec.convert(settings, Hyperparameters),
    )


def put_job(folder: Path, job: Job, groups: list[GroupLine] | None = None) -> Path:
    write_job(folder, job, make_groups() if groups is None else groups)
    return folder


def make_policy(cache: Path, *, lively: bool = True) -> loop.Policy:
    """The small base with an adapter; `lively`: moved off zero, so that it differs from the base."""
    policy, _ = loop.load_policy(make_job(cache))
    if lively:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in policy.weights.values():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return policy
