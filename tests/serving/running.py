"""The small model server as its own process, and adapters to put on it, made without torch."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
KEY = "only-for-tests"
BASE = "tiny-test"
HIDDEN, LAYERS = 64, 2  # of tiny-test
MAX_MODEL_LEN = 256


class RunningServer:
    """`python -m training.trainer.serve` on a free port; on the same port again after a restart."""

    def __init__(self, cache: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._cache, self._log = cache, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "training.trainer.serve", "--base", BASE, "--cache", str(self._cache)),
            *("--port", str(self.port), "--max-model-len", str(MAX_MODEL_LEN)),
        ]
        environment = {
            **os.environ,
            "MODEL_SERVER_API_KEY": KEY,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"The model server did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)

    def __enter__(self) -> "RunningServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def write_adapter(folder: Path, *, seed: int, hidden: int = HIDDEN, strength: float = 1.0, rank: int = 4) -> Path:
    """A LoRA adapter on the attention's output of every layer, drawn from `seed`; its base has `hidden` channels."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    weights = {}
    for layer in range(LAYERS):
        place = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        weights[f"{place}.lora_A.weight"] = draw.normal(size=(rank, hidden)).astype(np.float32)
        weights[f"{place}.lora_B.weight"] = strength * draw.normal(size=(hidden, rank)).astype(np.float32)
    save_file(weights, str(folder / "adapter_model.safetensors"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["o_proj"],
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
