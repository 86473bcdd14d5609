"""Adapter folders: looked at without running anything of theirs, and put where the model servers read them.

An adapter is a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`. Safetensors hold numbers alone;
pickles (`.bin`, `.pt`) can run code when they are opened, so they are never taken. No Django here.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_HEADER_BYTES = 25_000_000
MAX_CONFIG_BYTES = 1_000_000
MAX_WEIGHTS_BYTES = 8 * 2**30  # rank 64 on every matrix of a 70B base is about 3 GB in bf16
CHUNK = 16 * 2**20

# Bytes an element, and the bits that are all set in a NaN or an infinity: enough to tell without a tensor library.
DTYPES = {"F64": (8, 0x7FF0000000000000), "F32": (4, 0x7F800000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}


class BadAdapter(ValueError):
    """The files are no adapter that can be served. The text is for people."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was looked at."""

    path: Path
    sha256: str  # of adapter_model.safetensors, hex
    n_bytes: int  # of the same
    tensors: int
    base_model: str  # as its config names it


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    begin: int  # bytes, from the end of the header
    end: int


def inspect(folder: Path) -> Adapter:
    """Read an adapter folder, every byte of it.

    Raises:
        BadAdapter: a file is missing or is not what its name says; a weight is NaN or infinite; or every `lora_B` is
            zero, so that the adapter changes nothing.
    """
    config = read_config(folder / CONFIG)
    path = folder / WEIGHTS
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            tensors = _header(file, n_bytes)
            changes = _look_at_weights(file, tensors)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise BadAdapter(f"{WEIGHTS} cannot be read: {exc.strerror}.") from exc
    if not changes:
        raise BadAdapter(f"Every lora_B in {WEIGHTS} is zero: the adapter changes nothing. Was it saved untrained?")
    return Adapter(folder, sha256, n_bytes, len(tensors), str(config.get("base_model_name_or_path") or ""))


def read_config(path: Path) -> dict[str, object]:
    """adapter_config.json.

    Raises:
        BadAdapter: missing, too large, not a JSON object, or not of a LoRA adapter.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise BadAdapter(f"{CONFIG} is above {MAX_CONFIG_BYTES} bytes.")
        config = json.loads(path.read_bytes())
    except OSError as exc:
        raise BadAdapter(f"{CONFIG} cannot be read: {exc.strerror}.") from exc
    except (ValueError, RecursionError) as exc:
        raise BadAdapter(f"{CONFIG} is not JSON: {exc}.") from exc
    if not isinstance(config, dict):
        raise BadAdapter(f"{CONFIG} is not a JSON object.")
    if config.get("peft_type") != "LORA":
        raise BadAdapter(f"{CONFIG} says peft_type {config.get('peft_type')!r}. Only LORA can be served.")
    if config.get("auto_mapping"):
        raise BadAdapter(f"{CONFIG} has an auto_mapping, which names code to load. Save the adapter without it.")
    return config


def _header(file: IO[bytes], n_bytes: int) -> list[_Tensor]:
    """The tensors that a safetensors file says it has, checked against its size.

    Source: the format's own description, https://github.com/huggingface/safetensors#format
    """
    start = file.read(8)
    if len(start) < 8:
        raise BadAdapter(f"{WEIGHTS} has {n_bytes} bytes: no safetensors file.")
    (length,) = struct.unpack("<Q", start)
    if length > min(MAX_HEADER_BYTES, n_bytes - 8):
        raise BadAdapter(f"{WEIGHTS} is no safetensors file: its header would have {length} bytes.")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as exc:
        raise BadAdapter(f"{WEIGHTS} is no safetensors file: its header is not JSON ({exc}).") from exc
    if not isinstance(header, dict):
        raise BadAdapter(f"{WEIGHTS} is no safetensors file: its header is not a JSON object.")
    tensors = sorted(
        (_tensor(name, said) for name, said in header.items() if name != "__metadata__"), key=lambda one: one.begin
    )
    end = 0
    for tensor in tensors:
        if tensor.begin != end:
            raise BadAdapter(f"{WEIGHTS}: {tensor.name} begins at byte {tensor.begin}, where {end} is next.")
        end = tensor.end
    if 8 + length + end != n_bytes:
        raise BadAdapter(f"{WEIGHTS} has {n_bytes} bytes where its header says {8 + length + end}. Was it cut off?")
    return tensors


def _tensor(name: str, said: object) -> _Tensor:
    try:
        assert isinstance(said, dict)
        dtype, shape, (begin, end) = said["dtype"], said["shape"], said["data_offsets"]
        elements = 1
        for size in shape:
            assert isinstance(size, int) and size >= 0
            elements *= size
        assert isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end
    except (AssertionError, KeyError, TypeError, ValueError) as exc:
        raise BadAdapter(f"{WEIGHTS}: the header's entry of {name[:100]} cannot be read.") from exc
    if dtype not in DTYPES:
        raise BadAdapter(f"{WEIGHTS}: {name[:100]} is of type {dtype!r}. LoRA weights are one of {', '.join(DTYPES)}.")
    if end - begin != elements * DTYPES[dtype][0]:
        raise BadAdapter(f"{WEIGHTS}: {name[:100]} has {end - begin} bytes for {elements} elements of {dtype}.")
    return _Tensor(name, dtype, begin, end)


def _look_at_weights(file: IO[bytes], tensors: list[_Tensor]) -> bool:
    """Whether the weights change anything: some `lora_B` is not zero. Raises BadAdapter for NaN and infinities."""
    changes = False
    for tensor in tensors:  # in the file's order, one behind the other
        size, not_finite = DTYPES[tensor.dtype]
        for part in _parts(file, tensor.end - tensor.begin):
            bits = np.frombuffer(part, dtype=f"<u{size}")
            if bool(((bits & not_finite) == not_finite).any()):
                raise BadAdapter(f"{WEIGHTS}: {tensor.name[:100]} holds NaN or an infinity.")
            changes = changes or ("lora_B" in tensor.name and bool(bits.any()))
    return changes


def _parts(file: IO[bytes], length: int) -> Iterator[bytes]:
    while length:
        part = file.read(min(CHUNK, length))
        if not part:
            raise BadAdapter(f"{WEIGHTS} ended early.")
        length -= len(part)
        yield part


def place(adapter: Adapter, under: Path) -> Adapter:
    """Copy the two files of an adapter to where the model servers read it, whole or not at all.

    The folder's name ends in the hash of the weights. So doing it twice, or by two at once, ends in the same folder,
    and what an earlier, failed try of the same version left there is never taken for this one.
    """
    target = under.with_name(f"{under.name}-{adapter.sha256[:12]}")
    placed = replace(adapter, path=target)
    if target.is_dir():
        return placed
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(adapter.path / name, part / name)
        with (part / name).open("rb") as file:
            os.fsync(file.fileno())
    try:
        part.rename(target)
    except OSError:  # another put it there first
        shutil.rmtree(part, ignore_errors=True)
        if not target.is_dir():
            raise
    return placed
