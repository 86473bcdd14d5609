"""The one statement that writes trajectories, and the threads that run it for many requests at once.

A request hands over what it has prepared and goes on preparing; a writer takes all that waits, of whatever request,
writes it by one statement with one commit, and only then tells each of them. So the database works while Python
does, and eight small requests cost one flush of the log.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from queue import Empty, SimpleQueue

import msgspec
from django.db import close_old_connections, connection

from trajectories import codec, payloads, scenarios, segments, statements

WRITERS = 1  # two take half of what waits each, and so need twice the statements: 800 requests a second for 1,000
ROWS = 100  # of one statement, about
FEW = 5  # of rows: the request compresses them itself; there are many requests, and one writer for all
IDLE_SECONDS = 30.0  # after which a writer ends, and its connection


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
    packed: list[bytes] = []  # the pieces compressed, if they already are
    texts: tuple[segments.Text, ...] = ()
    redactions: Mapping[str, int] = {}
    wish: scenarios.Wish | None = None  # its row has no scenario yet


class _PieceRow(msgspec.Struct):
    n: int  # its place in the array of the segments' bytes, from 1
    project_id: int
    trajectory_id: str
    seq: int
    first_step: int
    last_step: int
    raw_size: int
    step_hashes: str  # "\\x…"


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
            (trajectory_id, seq, first_step, last_step, codec, dictionary, raw_size, data, location, step_hashes)
        select f.id, p.seq, p.first_step, p.last_step, 'zstd', {codec.LATEST}, p.raw_size, d.data, '', p.step_hashes
        from json_to_recordset(%s::json) as p(
            n int8, project_id int8, trajectory_id varchar, seq int4, first_step int4, last_step int4, raw_size int8,
            step_hashes bytea)
        join unnest(%b::bytea[]) with ordinality as d(data, n) using (n)
        join fresh f using (project_id, trajectory_id)
    ),
    taken_out as (
        insert into redaction_counts (trajectory_id, rule, count)
        select f.id, r.rule, r.count
        from json_to_recordset(%s::json) as r(project_id int8, trajectory_id varchar, rule varchar, count int4)
        join fresh f using (project_id, trajectory_id)
    ),
    queue as (
        insert into indexing_work (trajectory_id, project_id, is_arrival)
        select id, project_id, true from fresh where state = 'sealed'
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
    if wishes := [one.wish for one in ready if one.wish is not None]:
        pks = scenarios.fulfil(wishes)
        for one in ready:
            if one.wish is not None:
                one.row.scenario_id = pks[one.wish.project.pk, one.wish.scenario_id]
    _compress([one for one in ready if len(one.packed) < len(one.pieces)])
    pieces: list[_PieceRow] = []
    packed: list[bytes] = []
    for one in ready:
        packed += one.packed
        name = (one.row.project_id, one.row.trajectory_id)
        for piece, step_hashes in zip(one.pieces, one.step_hashes, strict=True):
            hashes = "\\x" + step_hashes.hex()
            span = (piece.seq, piece.first_step, piece.last_step, len(piece.raw))
            pieces.append(_PieceRow(len(pieces) + 1, *name, *span, hashes))
    taken_out = [
        {"project_id": one.row.project_id, "trajectory_id": one.row.trajectory_id, "rule": rule, "count": count}
        for one in ready
        if one.redactions
        for rule, count in one.redactions.items()
    ]
    # Numbers and names in JSON: psycopg would put each into its array by itself, at four times the cost.
    parameters = (
        payloads.encode([one.row for one in ready]).decode(),
        payloads.encode(pieces).decode(),
        packed,
        payloads.encode(taken_out).decode(),
    )
    return {(int(str(project)), str(name)) for project, name in statements.fetch(_WRITE, parameters)}


def _compress(ready: Sequence[Prepared]) -> None:
    packed = iter(codec.compress_many([piece.raw for one in ready for piece in one.pieces], codec.LATEST))
    for one in ready:
        one.packed = [next(packed) for _ in one.pieces]


# --- many requests, one commit -----------------------------------------------------------------------------------


class Ticket:
    """What a request waits for. A bare lock: of all ways to wait it costs the least."""

    __slots__ = ("_done", "_error", "_written", "ready")

    def __init__(self, ready: Sequence[Prepared]) -> None:
        self.ready = ready
        self._done = threading.Lock()
        self._done.acquire()
        self._written: set[tuple[int, str]] = set()
        self._error: BaseException | None = None

    def written(self) -> set[tuple[int, str]]:
        """(project, id) of those that are new, when they are committed. Raises what went wrong."""
        with self._done:
            if self._error is not None:
                raise self._error
            return self._written

    def settle(self, written: set[tuple[int, str]]) -> None:
        self._written = written
        self._done.release()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._done.release()


_waiting: "SimpleQueue[Ticket | None]" = SimpleQueue()
_lock = threading.Lock()
_writers: set[threading.Thread] = set()


def submit(ready: Sequence[Prepared]) -> Ticket:
    """Have them written, together with what other requests wait for.

    Inside a transaction they become a part of it, at once.
    """
    ticket = Ticket(ready)
    if connection.in_atomic_block:
        _write_alone(ticket)
        return ticket
    if len(ready) < FEW:
        _compress(ready)
    with _lock:
        _waiting.put(ticket)
        if len(_writers) < WRITERS:
            writer = threading.Thread(target=_work, name="writer", daemon=True)
            _writers.add(writer)
            writer.start()
    return ticket


def rest() -> None:
    """End the writers and their connections once nothing waits; the next recording starts new ones."""
    with _lock:
        writers = list(_writers)
        for _ in writers:
            _waiting.put(None)
    for writer in writers:
        writer.join()


def _forget_writers() -> None:
    """After a fork they are the parent's."""
    global _waiting, _lock
    _waiting, _lock = SimpleQueue(), threading.Lock()
    _writers.clear()


os.register_at_fork(after_in_child=_forget_writers)


def _work() -> None:
    try:
        while tickets := _take():
            _write(tickets)
            del tickets  # while waiting for the next ones these would be kept
    finally:
        connection.close()


def _take() -> list[Ticket]:
    """As much of what waits as one statement takes; [] after a while without any, or when asked: the writer ends."""
    while True:
        try:
            first = _waiting.get(timeout=IDLE_SECONDS)
        except Empty:
            with _lock:  # nobody can have put one in and counted on this writer
                if not _waiting.empty():
                    continue
                _writers.discard(threading.current_thread())
                return []
        if first is None:
            with _lock:
                _writers.discard(threading.current_thread())
            return []
        return [first, *_more([first])]


def _more(tickets: list[Ticket]) -> list[Ticket]:
    """What waits and goes into the same statement."""
    rows = sum(len(ticket.ready) for ticket in tickets)
    more: list[Ticket] = []
    with suppress(Empty):
        while rows < ROWS:
            ticket = _waiting.get_nowait()
            if ticket is None:
                _waiting.put(None)  # somebody is asked to end, later
                break
            more.append(ticket)
            rows += len(ticket.ready)
    return more


def _write(tickets: list[Ticket]) -> None:
    close_old_connections()
    for ticket in _write_together(tickets) if len(tickets) > 1 else tickets:
        _write_alone(ticket)


def _write_together(tickets: list[Ticket]) -> list[Ticket]:
    """Write them by one statement. Returns those that must be tried by themselves: one of them cannot be written."""
    seen: set[tuple[int, str]] = set()
    first: list[Ticket] = []
    again: list[Ticket] = []  # the same id twice: which one wins is told by the second statement
    for ticket in tickets:
        names = _names(ticket)
        (again if seen & names else first).append(ticket)
        seen |= names
    try:
        written = write([one for ticket in first for one in ticket.ready])
    except Exception:  # whatever is wrong with one of them, its own request shall hear of it
        return tickets
    for ticket in first:
        ticket.settle(written & _names(ticket))
    return again


def _names(ticket: Ticket) -> set[tuple[int, str]]:
    return {(one.row.project_id, one.row.trajectory_id) for one in ticket.ready}


def _write_alone(ticket: Ticket) -> None:
    try:
        ticket.settle(write(ticket.ready))
    except BaseException as exc:  # the request that waits for it raises it
        ticket.fail(exc)
