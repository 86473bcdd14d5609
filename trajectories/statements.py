"""SQL on the hot path, by psycopg's own cursor: parameters travel in binary, and a statement is prepared once a
connection, where Django's would be put together as text each time."""

from collections.abc import Sequence

import psycopg
from django.db import connection

NEVER = 2**31 - 1  # executions after which psycopg prepares a statement by itself


def fetch(statement: str, parameters: Sequence[object], *, prepare: bool = True) -> list[tuple[object, ...]]:
    """All rows of a statement, which runs in the transaction that is open, else in one of its own.

    `prepare=False` has it planned each time (0.1 ms), for one that looks rows up: a plan made while the table was
    empty, when all its indexes look alike, is kept until the table is next analyzed.

    Raises:
        django.db.DatabaseError: as Django's cursors do.
    """
    connection.ensure_connection()
    raw: psycopg.Connection[tuple[object, ...]] = connection.connection
    if raw.prepare_threshold is None:  # as Django leaves it: nothing is prepared, whatever `prepare` says
        raw.prepare_threshold = NEVER
    with connection.wrap_database_errors, psycopg.Cursor(raw) as cursor:
        cursor.execute(statement.encode(), parameters, prepare=prepare)
        return cursor.fetchall()


_EARLY = "with early as materialized (select set_config('synchronous_commit', 'off', true)), "


def fetch_early(statement: str, parameters: Sequence[object]) -> list[tuple[object, ...]]:
    """The same of a `with …` statement that makes rows which a recording refers to; its commit waits for no disk.

    The write-ahead log is flushed in order: when the recording that follows is on the disk, so is this. Were the
    server to die in between, neither was acknowledged. Inside another transaction it is a part of that one.
    """
    if connection.in_atomic_block:
        return fetch(statement, parameters)
    # Joined to what comes out, so that it runs; the rows are few.
    return fetch(statement.replace("with", _EARLY, 1).replace("from made", "from made, early", 1), parameters)
