"""`python -m training.trainer --job DIR`: train one job folder. See `job.py` for its files and the exit codes.

Several processes: `torchrun --nproc_per_node N -m training.trainer --job DIR`.
"""

import os

# A waiting OpenMP thread spins by default and takes the core from whoever shares it (measured: 4 times slower beside
# one other process). Read when torch is loaded, so before any import of it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import msgspec

from training.trainer import job as jobs


def main(arguments: list[str] | None = None) -> int:
    """Train, write result.json last, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.trainer", description="Train one job folder.")
    parser.add_argument("--job", type=Path, required=True, metavar="DIR")
    folder: Path = parser.parse_args(arguments).job
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, ask)
    earlier = jobs.read_result(folder)
    if earlier is not None and earlier.state == "succeeded":
        return jobs.EXIT_DONE

    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        (folder / "result.json").unlink(missing_ok=True)  # of a failed try; it must not be taken for this one's
    job: jobs.Job | None = None
    try:
        job = jobs.read_job(folder)
        from training.trainer import checkpoints, loop

        with _together() as (rank, size):
            result = loop.run(folder, job, world=loop.World(rank, size), stop=lambda: bool(asked))
        if first:
            _write(folder, result)
            checkpoints.clear(folder)
    except jobs.InvalidJob as exc:
        if first:
            _write(folder, _failed(job, exc.kind, str(exc)))
        print(f"cannot be trained: {exc}", file=sys.stderr)
        return jobs.EXIT_INVALID
    except Exception as exc:
        from training.trainer import loop

        if isinstance(exc, loop.Stopped):
            print(exc, file=sys.stderr)
            return jobs.EXIT_STOPPED
        traceback.print_exc()
        if first:
            _write(folder, _failed(job, "fault", f"{type(exc).__name__}: {exc}"))
        return jobs.EXIT_FAILED
    return jobs.EXIT_DONE


@contextmanager
def _together() -> Iterator[tuple[int, int]]:
    """Rank and size: of the processes that torchrun started, else of this one alone."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _write(folder: Path, result: jobs.Result) -> None:
    jobs.write_atomically(folder / "result.json", msgspec.json.format(msgspec.json.encode(result), indent=2))


def _failed(job: jobs.Job | None, kind: str, detail: str) -> jobs.Result:
    return jobs.Result(
        job_id=job.job_id if job else "",
        fence=job.fence if job else 0,
        state="failed",
        mode=job.mode if job else "grpo",
        error_kind=kind,
        error=detail,
    )


if __name__ == "__main__":
    sys.exit(main())
