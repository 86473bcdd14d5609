"""Files of recordings, recognised by what is in them, read item by item; a bad item is reported and passed over."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import zstandard

from trajectories import formats, ingestion, limits, payloads
from trajectories.errors import Invalid, Problem
from trajectories.formats import messages, tau_bench
from trajectories.formats.incoming import Incoming
from trajectories.models import Project

NAMES = ("native", "messages", tau_bench.NAME)
SUFFIXES = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".json.gz",
    ".jsonl.gz",
    ".ndjson.gz",
    ".json.zst",
    ".jsonl.zst",
    ".ndjson.zst",
)
LFS = b"version https://git-lfs"


class Failure(msgspec.Struct, frozen=True):
    """What could not be imported."""

    file: str
    item: int | str | None
    detail: str


class Report(msgspec.Struct):
    """The last line of `import_trajectories --json`."""

    files: int = 0
    trajectories: int = 0  # new ones
    replayed: int = 0
    failed: int = 0
    llm_calls: int = 0  # of new ones
    tool_calls: int = 0
    errors: list[Failure] = []


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and those in folders that look like recordings."""
    for path in paths:
        if path.is_dir():
            yield from sorted(one for one in path.rglob("*") if one.is_file() and one.name.endswith(SUFFIXES))
        else:
            yield path


def load(project: Project, path: Path, report: Report, name: str | None = None) -> None:
    """Import one file into the project; what happened goes into the report."""
    report.files += 1
    waiting: list[tuple[int, Incoming]] = []
    size = 0
    number = -1
    try:
        for number, item in enumerate(items(path, name)):
            if isinstance(item, Problem):
                _fail(report, path, number, item.detail)
                continue
            waiting.append((number, item))
            size += len(item.canonical)
            if len(waiting) >= ingestion.CHUNK or size > limits.ITEM_BYTES:
                _record(project, path, waiting, report)
                waiting, size = [], 0
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, Problem) as exc:
        _fail(report, path, None if number < 0 else number + 1, str(exc) or type(exc).__name__)
    _record(project, path, waiting, report)


def _record(project: Project, path: Path, waiting: list[tuple[int, Incoming]], report: Report) -> None:
    found = ingestion.record_many(project, [incoming for _, incoming in waiting])
    for (number, incoming), one in zip(waiting, found, strict=True):
        if isinstance(one, Problem):
            _fail(report, path, incoming.payload.trajectory_id or number, one.detail)
        elif one.outcome == "replay":
            report.replayed += 1
        else:
            report.trajectories += 1
            for call in incoming.payload.calls():
                report.llm_calls += 1
                report.tool_calls += len(messages.tool_calls(call))


def _fail(report: Report, path: Path, item: int | str | None, detail: str) -> None:
    report.failed += 1
    report.errors.append(Failure(str(path), item, detail[:1000]))


def items(path: Path, name: str | None = None) -> Iterator[Incoming | Problem]:
    """Each trajectory of a file, or why it is none.

    Raises:
        Invalid: the file as a whole is nothing that we read.
    """
    raw = _unpacked(path)
    if raw.startswith(LFS):
        raise Invalid("This is a Git LFS pointer, not the file. Fetch it with `git lfs pull`.")
    if not raw.strip():
        raise Invalid("The file is empty.")
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        yield from _lines(raw, name)
        return
    if name == tau_bench.NAME or (name is None and tau_bench.recognises(value)):
        if not tau_bench.recognises(value):
            raise Invalid("This is no tau-bench result file: a list of runs with task_id and traj.")
        yield from tau_bench.read(value, source=path.name)
        return
    if isinstance(value, dict) and isinstance(value.get("batch"), list):
        value = value["batch"]
    for one in value if isinstance(value, list) else [value]:
        yield _value(one, name)


def _lines(raw: bytes, name: str | None) -> Iterator[Incoming | Problem]:
    lines = [line for line in raw.split(b"\n") if line.strip()]
    if len(lines) == 1 or not lines[0].lstrip().startswith((b"{", b"<")):
        # one broken document: the tolerant reader names the place, or reads NaN where a field allows none
        try:
            payloads.loads(raw)
        except Invalid as exc:
            yield exc
        return
    for line in lines:
        try:
            yield _value(payloads.loads(line), name)
        except Invalid as exc:
            yield exc


def _value(value: object, name: str | None) -> Incoming | Problem:
    try:
        return formats.incoming_value(value, name or _recognise(value))
    except Problem as exc:
        return exc


def _recognise(value: object) -> str:
    """Raises Invalid: none of the formats."""
    if isinstance(value, dict):
        if "messages" in value or "histories" in value:
            return "messages"
        if "steps" in value and ({"trajectory_id", "trajectoryId"} & set(value)):
            return "native"
    raise Invalid(f"This is in none of the formats that are read: {', '.join(NAMES)}.")


def _unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        return gzip.decompress(raw)
    if raw[:4] == b"\x28\xb5\x2f\xfd":
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read()
    return raw


def last_line(report: Report) -> str:
    return json.dumps(msgspec.to_builtins(report), ensure_ascii=False)
