"""The trainer as its own process: stopped, killed, and several at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.batches import make_groups, make_job, put_job
from tests.trainer.test_train import finish, same, steps_of
from training.trainer.job import EXIT_STOPPED, read_result

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds until a started trainer must have got anywhere


def start(folder: Path, *before: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, *before, "-m", "training.trainer", "--job", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def wait_for_step(folder: Path, process: "subprocess.Popen[bytes]", step: int) -> None:
    until = time.monotonic() + PATIENCE
    while not any(line.step >= step for line in steps_of(folder)):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_says_so_and_sigkill_costs_the_steps_since(cache: Path, tmp_path: Path) -> None:
    job = make_job(cache, epochs=60, learning_rate=1e-3, checkpoint_every=5)
    groups = make_groups(12)
    whole, hit = put_job(tmp_path / "whole", job, groups), put_job(tmp_path / "hit", job, groups)

    stopped = start(hit)
    wait_for_step(hit, stopped, 2)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(PATIENCE) == EXIT_STOPPED, (hit / "log").read_text()
    assert read_result(hit) is None
    reached = steps_of(hit)[-1].step

    killed = start(hit)
    wait_for_step(hit, killed, reached + 7)
    killed.kill()
    killed.wait(PATIENCE)
    assert read_result(hit) is None

    result = finish(hit)
    assert result.resumed_from_step >= reached
    finish(whole)
    assert same(whole, hit)
    assert [line.step for line in steps_of(hit)] == list(range(1, result.steps_planned + 1))


@pytest.mark.slow
def test_two_processes_learn_what_one_does(cache: Path, tmp_path: Path) -> None:
    job = make_job(cache, epochs=2, kl_beta=0.05, max_tokens_per_batch=64, share_prefix_tokens=0)
    alone, together = put_job(tmp_path / "alone", job), put_job(tmp_path / "together", job)
    finish(alone)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", sys.executable]
    process = start(together, *run)
    assert process.wait(PATIENCE) == 0, (together / "log").read_text()
    result = read_result(together)
    assert result is not None and result.world_size == 2
    for one, two in zip(steps_of(alone), steps_of(together), strict=True):
        assert two.loss == pytest.approx(one.loss, abs=1e-5)
        assert two.drift == pytest.approx(one.drift, abs=1e-4)
        assert two.ratio_p95 == pytest.approx(one.ratio_p95, abs=1e-3)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
    left = load_file(alone / "adapter" / "adapter_model.safetensors")
    right = load_file(together / "adapter" / "adapter_model.safetensors")
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-4
    assert all(torch.isfinite(weight).all() for weight in right.values())
