"""A trainer without tensors: keeps the job folder's contract, in milliseconds, and fails as it is told to.

    python -m tests.training.scripted_trainer JOB [--steps N] [--pause SECONDS] [--end WORD] [--once FILE] [--child]

`--end`: ok, crash, invalid, hang (no more lines), unchanged, short (fewer steps than planned). With `--once`, an end
other than ok happens only while FILE is not there, and makes it.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from training.trainer import job as wire


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--end", default="ok")
    parser.add_argument("--once", type=Path)
    parser.add_argument("--child", action="store_true")
    given = parser.parse_args()
    folder: Path = given.job
    job = wire.read_job(folder)
    groups = wire.read_groups((folder / "groups.jsonl").read_bytes())
    print(f"training {len(groups)} groups as {job.mode}", flush=True)
    if given.child:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "child").write_text(str(child.pid))
    end = given.end
    if given.once is not None:
        end = "ok" if given.once.exists() else end
        given.once.touch()
    (folder / "pid").write_text(str(os.getpid()))

    done = 0
    if job.resume_from:
        done = int((Path(job.resume_from) / "checkpoint" / "step").read_text())
    (folder / "resumed-at").write_text(str(done))
    say(folder, "loading", done, 0)
    while done < given.steps:
        time.sleep(given.pause)
        done += 1
        say(folder, "training", done, given.steps)
        (folder / "checkpoint").mkdir(exist_ok=True)
        (folder / "checkpoint" / "step").write_text(str(done))
        if end == "hang" and done == 2:
            time.sleep(600)
        if end == "crash" and done >= 2:
            sys.exit(f"out of luck at step {done}")
        if end == "short" and done == 2:
            break
    if end == "invalid":
        result(folder, job, state="failed", error_kind="no_signal", error="No group has any spread in its rewards.")
        return wire.EXIT_INVALID
    save_adapter(folder / "adapter", value=float(1 + job.seed % 1000) / 1000)
    result(
        folder,
        job,
        state="succeeded",
        steps_planned=given.steps,
        steps_done=done,
        weight_change=0.0 if end == "unchanged" else 0.5,
        groups=len(groups),
        trajectories=sum(len(group.trajectories) for group in groups),
        resumed_from_step=int((folder / "resumed-at").read_text()),
    )
    return wire.EXIT_DONE


def say(folder: Path, phase: wire.Phase, step: int, total: int) -> None:
    line = wire.Progress(phase=phase, step=step, total_steps=total, at=time.time(), seconds=1.0, loss=1.0 / (1 + step))
    with (folder / "metrics.jsonl").open("ab") as lines:
        lines.write(msgspec.json.encode(line) + b"\n")


def result(folder: Path, job: wire.Job, **said: object) -> None:
    whole = {"job_id": job.job_id, "fence": job.fence, "mode": job.mode, **said}
    wire.write_atomically(folder / "result.json", msgspec.json.encode(msgspec.convert(whole, wire.Result)))


def save_adapter(folder: Path, value: float) -> None:
    """The smallest PEFT folder there is: one pair of 2 x 2 matrices in float32."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "tiny", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors({"lora_A": [1.0] * 4, "lora_B": [value] * 4}))


def safetensors(tensors: dict[str, list[float]]) -> bytes:
    """Float32 matrices of two columns in the safetensors format."""
    header, data = {}, b""
    for name, values in tensors.items():
        begin = len(data)
        data += struct.pack(f"<{len(values)}f", *values)
        header[f"base_model.model.q_proj.{name}.weight"] = {
            "dtype": "F32",
            "shape": [len(values) // 2, 2],
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


if __name__ == "__main__":
    sys.exit(main())
