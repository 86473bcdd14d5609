"""Rows that a recording refers to are committed before it, without a flush of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connection, transaction


@contextmanager
def committed_early() -> Iterator[None]:
    """A short transaction whose commit does not wait for the disk.

    The write-ahead log is flushed in order: when the recording that follows is on the disk, so is this. Were the
    server to die in between, neither was acknowledged. Inside another transaction it is a part of that one.
    """
    if connection.in_atomic_block:
        yield
        return
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("set local synchronous_commit = off")
        yield
