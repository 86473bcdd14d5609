"""The one statement that writes trajectories, and the threads that run it for many requests at once.

A request hands over what it has prepared and goes on preparing; a writer takes all that waits, of whatever request,
writes it by one statement with one commit, and only then tells each of them. So the database works while Python
does, and eight small requests cost one flush of the log.
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime

import msgspec
from django.db import close_old_connections, connection

from trajectories import payloads, segments, statements

WRITERS = 2  # while one waits for the log to be flushed, the other one's statement runs
ROWS = 100  # of one statement

_idle_seconds = 30.0  # after which a writer ends, and its connection


class Row(msgspec.Struct, kw_only=True):
    """The columns of `trajectories` that ingestion writes, as JSON takes them to PostgreSQL."""

    project_id: int
    trajectory_id: str
    agent_id: int
    scenario_id: int | None
    role: str
    declared_group_id: str
    declared_group_size: int | None
    episode_id: str
    parent_trajectory_id: str
    parent_call: int | None
    retry_of: str
    is_superseded: bool = False
    is_evaluation: bool
    evaluation_id: str
    window: str
    started_at: datetime
    ended_at: datetime | None
    last_step_at: datetime | None
    state: str
    final_status: str
    stop_reason: str
    is_excluded: bool = False
    reward: float | None
    reward_components: dict[str, float | None]
    reward_source: str
    origin: str
    behaviour: str
    model_names: list[str]
    n_steps: int
    n_calls: int
    n_trainable_calls: int
    prompt_tokens: int | None
    completion_tokens: int | None
    fidelity: str
    quality: float
    findings: list[dict[str, object]]
    metrics: dict[str, object]
    source_format: str
    content_hash: str  # "\\x…", PostgreSQL's hex
    twin_hash: str
    raw_size: int
    shared_texts: list[int]


class Prepared(msgspec.Struct, kw_only=True):
    """A trajectory ready to be written."""

    row: Row
    pieces: tuple[segments.Piece, ...]
    step_hashes: tuple[bytes, ...]  # one a piece
    texts: tuple[segments.Text, ...]
    redactions: Counter[str]


_TYPES: Mapping[str, str] = {
    "project_id": "int8",
    "trajectory_id": "varchar",
    "agent_id": "int8",
    "scenario_id": "int8",
    "role": "varchar",
    "declared_group_id": "varchar",
    "declared_group_size": "int4",
    "episode_id": "varchar",
    "parent_trajectory_id": "varchar",
    "parent_call": "int4",
    "retry_of": "varchar",
    "is_superseded": "bool",
    "is_evaluation": "bool",
    "evaluation_id": "varchar",
    "window": "varchar",
    "started_at": "timestamptz",
    "ended_at": "timestamptz",
    "last_step_at": "timestamptz",
    "state": "varchar",
    "final_status": "varchar",
    "stop_reason": "varchar",
    "is_excluded": "bool",
    "reward": "float8",
    "reward_components": "jsonb",
    "reward_source": "varchar",
    "origin": "varchar",
    "behaviour": "varchar",
    "model_names": "varchar[]",
    "n_steps": "int4",
    "n_calls": "int4",
    "n_trainable_calls": "int4",
    "prompt_tokens": "int8",
    "completion_tokens": "int8",
    "fidelity": "varchar",
    "quality": "float8",
    "findings": "jsonb",
    "metrics": "jsonb",
    "source_format": "varchar",
    "content_hash": "bytea",
    "twin_hash": "bytea",
    "raw_size": "int8",
    "shared_texts": "int8[]",
}
_COLUMNS = ", ".join(f'"{name}"' for name in _TYPES)
_RECORD = ", ".join(f'"{name}" {kind}' for name, kind in _TYPES.items())
# S608: names and types are the constants above
_WRITE = f"""
    with incoming as (select * from json_to_recordset(%s::json) as r({_RECORD})),
    fresh as (
        insert into trajectories ({_COLUMNS})
        select {_COLUMNS} from incoming i
        where not exists (
            select from tombstones t where t.project_id = i.project_id and t.trajectory_id = i.trajectory_id)
        order by i.project_id, i.trajectory_id
        on conflict (project_id, trajectory_id) do nothing
        returning id, project_id, trajectory_id, state
    ),
    pieces as (
        insert into trajectory_segments
            (trajectory_id, seq, first_step, last_step, codec, raw_size, data, location, step_hashes)
        select f.id, p.seq, p.first_step, p.last_step, 'zstd', p.raw_size, p.data, '', p.step_hashes
        from unnest(%b::int8[], %b::text[], %b::int4[], %b::int4[], %b::int4[], %b::int8[], %b::bytea[], %b::bytea[])
            as p(project_id, trajectory_id, seq, first_step, last_step, raw_size, data, step_hashes)
        join fresh f using (project_id, trajectory_id)
    ),
    taken_out as (
        insert into redaction_counts (trajectory_id, rule, count)
        select f.id, r.rule, r.count
        from unnest(%b::int8[], %b::text[], %b::text[], %b::int4[]) as r(project_id, trajectory_id, rule, count)
        join fresh f using (project_id, trajectory_id)
    ),
    queue as (
        insert into indexing_work (trajectory_id, project_id)
        select id, project_id from fresh where state = 'sealed'
    )
    select project_id, trajectory_id from fresh
"""  # noqa: S608


def write(ready: Sequence[Prepared]) -> set[tuple[int, str]]:
    """One statement, and outside a transaction one commit. Returns (project, id) of those that are new.

    Raises:
        IntegrityError: an agent, scenario or project that a row refers to is not there any more.
    """
    if not ready:
        return set()
    pieces = [
        (one.row.project_id, one.row.trajectory_id, piece, step_hashes)
        for one in ready
        for piece, step_hashes in zip(one.pieces, one.step_hashes, strict=True)
    ]
    taken_out = [
        (one.row.project_id, one.row.trajectory_id, rule, count)
        for one in ready
        for rule, count in one.redactions.items()
    ]
    parameters = (
        payloads.encode([one.row for one in ready]).decode(),
        [one[0] for one in pieces],
        [one[1] for one in pieces],
        [piece.seq for _, _, piece, _ in pieces],
        [piece.first_step for _, _, piece, _ in pieces],
        [piece.last_step for _, _, piece, _ in pieces],
        [len(piece.raw) for _, _, piece, _ in pieces],
        segments.compress_many([piece.raw for _, _, piece, _ in pieces]),
        [step_hashes for _, _, _, step_hashes in pieces],
        [one[0] for one in taken_out],
        [one[1] for one in taken_out],
        [one[2] for one in taken_out],
        [one[3] for one in taken_out],
    )
    return {(int(str(project)), str(name)) for project, name in statements.fetch(_WRITE, parameters)}


# --- many requests, one commit -----------------------------------------------------------------------------------

Job = tuple[Sequence[Prepared], "Future[set[tuple[int, str]]]"]

_waiting: deque[Job] = deque()
_arrived = threading.Condition()
_writers: set[threading.Thread] = set()


def submit(ready: Sequence[Prepared]) -> "Future[set[tuple[int, str]]]":
    """Have them written. When the result is there, they are committed.

    Inside a transaction they become a part of it, at once.
    """
    future: Future[set[tuple[int, str]]] = Future()
    if connection.in_atomic_block:
        _answer(future, ready)
        return future
    with _arrived:
        _waiting.append((ready, future))
        if len(_writers) < WRITERS:
            writer = threading.Thread(target=_work, name="writer", daemon=True)
            _writers.add(writer)
            writer.start()
        _arrived.notify()
    return future


def rest() -> None:
    """End the writers and their connections once nothing waits; the next recording starts new ones."""
    global _idle_seconds
    with _arrived:
        writers, was = list(_writers), _idle_seconds
        _idle_seconds = 0.0
        _arrived.notify_all()
    for writer in writers:
        writer.join()
    _idle_seconds = was


def _forget_writers() -> None:
    """After a fork they are the parent's."""
    global _arrived
    _arrived = threading.Condition()
    _writers.clear()
    _waiting.clear()


os.register_at_fork(after_in_child=_forget_writers)


def _work() -> None:
    try:
        while jobs := _take():
            close_old_connections()
            for ready, future in _together(jobs) if len(jobs) > 1 else jobs:
                _answer(future, ready)
    finally:
        connection.close()


def _take() -> list[Job]:
    """As much of what waits as one statement takes; [] after a while without any: the writer ends."""
    with _arrived:
        while not _waiting:
            if (_idle_seconds == 0 or not _arrived.wait(_idle_seconds)) and not _waiting:
                _writers.discard(threading.current_thread())
                return []
        jobs = [_waiting.popleft()]
        rows = len(jobs[0][0])
        while _waiting and rows + len(_waiting[0][0]) <= ROWS:
            jobs.append(_waiting.popleft())
            rows += len(jobs[-1][0])
        return jobs


def _together(jobs: list[Job]) -> list[Job]:
    """Write them by one statement. Returns those that must be tried by themselves: one of them cannot be written."""
    seen: set[tuple[int, str]] = set()
    first: list[Job] = []
    again: list[Job] = []  # the same id twice: which one wins is told by the second statement
    for ready, future in jobs:
        names = {(one.row.project_id, one.row.trajectory_id) for one in ready}
        (again if seen & names else first).append((ready, future))
        seen |= names
    try:
        written = write([one for ready, _ in first for one in ready])
    except Exception:  # whatever is wrong with one of them, its own request shall hear of it
        return jobs
    for ready, future in first:
        future.set_result(written & {(one.row.project_id, one.row.trajectory_id) for one in ready})
    return again


def _answer(future: "Future[set[tuple[int, str]]]", ready: Sequence[Prepared]) -> None:
    try:
        future.set_result(write(ready))
    except BaseException as exc:  # the request that waits for it raises it
        future.set_exception(exc)
