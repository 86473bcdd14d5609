"""Opening files of recordings: unpacked as they are read, line by line where they have lines, never held whole."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import zstandard

from trajectories import limits
from trajectories.errors import Invalid, TooLarge

CHUNK = 1024 * 1024
LINE_BYTES = 4 * limits.ITEM_BYTES  # a foreign row repeats what we keep once
DOCUMENT_BYTES = 1024 * limits.MiB  # of one JSON document that must be held whole
BOM = b"\xef\xbb\xbf"
BROKEN = (OSError, EOFError, zlib.error, zstandard.ZstdError)  # what reading a file that is cut or damaged raises


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, unpacked by what it is, not by what it is called: gzip, zstd, or as it is."""
    with path.open("rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        if magic[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast(IO[bytes], unpacked)
        elif magic == b"\x28\xb5\x2f\xfd":
            with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(
                raw, read_across_frames=True
            ) as reader:
                yield cast(IO[bytes], reader)
        else:
            yield raw


def head(path: Path, size: int = 64 * 1024) -> bytes:
    """The first bytes, unpacked; b"" for a file that cannot be read."""
    try:
        with opened(path) as file:
            return _read(file, size)
    except BROKEN:
        return b""


def _read(file: IO[bytes], size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0 and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def whole(path: Path, limit: int = DOCUMENT_BYTES) -> bytes:
    """Raises TooLarge."""
    with opened(path) as file:
        raw = _read(file, limit + 1)
    if len(raw) > limit:
        raise TooLarge(
            f"This is one JSON document of more than {limit} bytes. Write its items as lines (NDJSON).", limit=limit
        )
    return raw.removeprefix(BOM)


def lines(path: Path, limit: int = LINE_BYTES) -> Iterator[bytes | Invalid]:
    """The lines of a file, empty ones left out; one above the limit is refused alone."""
    with opened(path) as file:
        yield from split(file, limit)


def split(file: IO[bytes], limit: int = LINE_BYTES) -> Iterator[bytes | Invalid]:
    held: list[bytes] = []
    size = 0
    first = True
    while part := file.read(CHUNK):
        if first:
            part, first = part.removeprefix(BOM), False
        *ended, rest = part.split(b"\n")
        for piece in ended:
            held.append(piece)
            size += len(piece)
            yield from _line(held, size, limit)
            held, size = [], 0
        size += len(rest)
        if size <= limit:
            held.append(rest)
        else:
            held.clear()
    yield from _line(held, size, limit)


def _line(held: list[bytes], size: int, limit: int) -> Iterator[bytes | Invalid]:
    if size > limit:
        yield Invalid(f"A line of {size} bytes; {limit} are allowed.", limit=limit)
    elif stripped := b"".join(held).strip():
        yield stripped
