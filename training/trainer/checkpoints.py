"""What a killed trainer goes on from: adapter, optimiser, random state, step; never half-written.

A checkpoint is written to `checkpoint.part`, synced, and renamed. The two renames of a replacement leave at every
moment either `checkpoint` or `checkpoint.old` whole, and `load` looks at both.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

FILE = "state.pt"


class OptimiserState(TypedDict):
    """As `Optimizer.state_dict` gives it."""

    state: dict[int, dict[str, Tensor]]
    param_groups: list[dict[str, object]]


@dataclass(slots=True)
class Checkpoint:
    """Everything that the next step depends on and that job and data do not give."""

    step: int  # optimiser steps done
    seconds: float  # of training so far, all processes
    identity: str  # sha256 over data, settings and base: a checkpoint of another job is refused
    adapter: dict[str, Tensor]
    last_good: dict[str, Tensor]  # weights before the last update: the result if the next step finds them drifted
    last_drift: float | None
    optimiser: OptimiserState
    random: Tensor


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `folder`."""
    part, final, old = folder / "checkpoint.part", folder / "checkpoint", folder / "checkpoint.old"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with (part / FILE).open("wb") as out:
        torch.save({name: getattr(checkpoint, name) for name in Checkpoint.__slots__}, out)
        out.flush()
        os.fsync(out.fileno())
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> Checkpoint | None:
    """The last whole checkpoint in `folder`; None when there is none. Reads tensors and plain values, no code."""
    for name in ("checkpoint", "checkpoint.old"):
        path = folder / name / FILE
        if path.exists():
            return Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    return None


def clear(folder: Path) -> None:
    """Take the checkpoint away, once a result stands."""
    for name in ("checkpoint", "checkpoint.old", "checkpoint.part"):
        shutil.rmtree(folder / name, ignore_errors=True)
