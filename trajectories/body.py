"""A request's body, read as a stream under the published limits; gzip and zstd unpacked as it comes.

Django's `request.body` would hold all of it and knows one limit of 2.5 MB; these hold at most what one item may be.
"""

import time
import zlib
from collections.abc import Iterator
from typing import IO, cast

import zstandard
from django.http.request import UnreadablePostError
from rest_framework.request import Request

from trajectories import limits
from trajectories.errors import Invalid, Problem, TooLarge

CHUNK = 256 * 1024  # bytes read or unpacked at once


class Unsupported(Problem):
    """The body is packed in a way that we cannot unpack."""

    status = 415
    code = "unsupported-encoding"


def read(request: Request, limit: int, *, what: str = "The body") -> bytes:
    """The whole body, unpacked.

    Raises:
        TooLarge: it has more than `limit` bytes, packed or unpacked. What is left of it is read and dropped, so that
            the sender, who may still be sending, sees the answer.
        Invalid: it broke off or cannot be unpacked.
    """
    declared = _declared(request)
    if declared is not None and declared > limit:
        drain(request)
        raise _too_large(what, limit, declared)
    parts: list[bytes] = []
    size = 0
    for part in chunks(request):
        size += len(part)
        if size > limit:
            drain(request)
            raise _too_large(what, limit, None)
        parts.append(part)
    return b"".join(parts)


def lines(request: Request, *, limit: int | None = None, total: int | None = None) -> Iterator[bytes | None]:
    """The lines of NDJSON, empty ones left out. None stands for a line above the limit: its neighbours go on.

    Raises:
        TooLarge: the body as a whole has more than `total` bytes, unpacked.
        Invalid: it broke off or cannot be unpacked. Lines before that were given.
    """
    limit = limits.ITEM_BYTES if limit is None else limit
    total = limits.NDJSON_BYTES if total is None else total
    held: list[bytes] = []  # of the line at hand
    length = 0
    size = 0
    for part in chunks(request):
        size += len(part)
        if size > total:
            drain(request)
            raise _too_large("The body", total, None)
        *whole, rest = part.split(b"\n")
        if whole:
            if length + len(whole[0]) > limit:
                yield None
            elif line := (b"".join((*held, whole[0])) if held else whole[0]).strip():
                yield line
            for line in whole[1:]:
                if len(line) > limit:
                    yield None
                elif stripped := line.strip():
                    yield stripped
            held, length = [], 0
        length += len(rest)
        if length > limit:
            held.clear()  # known to be too long: its length is enough
        elif rest:
            held.append(rest)
    if length > limit:
        yield None
    elif line := b"".join(held).strip():
        yield line


def chunks(request: Request) -> Iterator[bytes]:
    """The body in unpacked pieces of bounded size, whatever it is packed from: a bomb unfolds a piece at a time."""
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    source = _source(request)
    try:
        if encoding in ("", "identity"):
            while part := source.read(CHUNK):
                yield part
        elif encoding in ("gzip", "x-gzip"):
            yield from _gunzip(source)
        elif encoding == "zstd":
            with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(
                source, read_size=CHUNK, read_across_frames=True, closefd=False
            ) as reader:
                while part := reader.read(CHUNK):
                    yield part
        else:
            drain(request)
            raise Unsupported(f"Content-Encoding {encoding[:40]!r} is not known here. Send identity, gzip or zstd.")
    except (zlib.error, zstandard.ZstdError) as exc:
        drain(request)
        raise Invalid(f"The body is not {encoding}: {exc}.") from exc
    except (UnreadablePostError, EOFError) as exc:
        raise Invalid(f"The body broke off: {exc}.") from exc


def _gunzip(source: IO[bytes]) -> Iterator[bytes]:
    """Members one after another, as `cat a.gz b.gz` makes them."""
    unpack = zlib.decompressobj(16 + zlib.MAX_WBITS)
    packed = b""
    begun = False
    while True:
        packed = packed or source.read(CHUNK)
        if not packed:
            rest = unpack.flush() if begun else b""
            if begun and not unpack.eof:
                raise EOFError("gzip without its end")
            if rest:
                yield rest
            return
        if unpack.eof:
            unpack = zlib.decompressobj(16 + zlib.MAX_WBITS)
        part = unpack.decompress(packed, CHUNK)
        begun = True
        packed = unpack.unconsumed_tail or unpack.unused_data
        if part:
            yield part


def drain(request: Request) -> None:
    """Read and drop what is left, within reason: a server that closes first looks like a broken connection."""
    left = limits.DRAIN_BYTES
    until = time.monotonic() + 20
    try:
        source = _source(request)
        while left > 0 and time.monotonic() < until and (part := source.read(CHUNK)):
            left -= len(part)
    except (UnreadablePostError, OSError, EOFError):
        return


def _source(request: Request) -> IO[bytes]:
    """What has the body's read().

    Django takes a body without Content-Length for empty; one sent in chunks has its end marked by the server itself.
    """
    meta = request._request.META
    declared = str(meta.get("CONTENT_LENGTH") or "")
    if meta.get("wsgi.input_terminated") and not declared:
        return cast(IO[bytes], meta["wsgi.input"])
    source = cast(IO[bytes], request._request)  # of a file it has read(), which is all that is used
    return cast(IO[bytes], _Whole(source, int(declared))) if declared.isdigit() else source


class _Whole:
    """A body of a declared length: a server may hand over one that broke off as if it had ended."""

    def __init__(self, source: IO[bytes], declared: int) -> None:
        self.source = source
        self.left = declared

    def read(self, size: int) -> bytes:
        part = self.source.read(size)
        self.left -= len(part)
        if not part and self.left > 0:
            raise EOFError(f"{self.left} bytes of its Content-Length did not come")
        return part


def _declared(request: Request) -> int | None:
    if request.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        return None
    try:
        return int(request.headers.get("Content-Length", ""))
    except ValueError:
        return None


def _too_large(what: str, limit: int, size: int | None) -> TooLarge:
    have = f"has {size} bytes" if size is not None else f"has more than {limit} bytes unpacked"
    return TooLarge(
        f"{what} {have}; {limit} are allowed. GET /api/v1/limits/ lists all limits; send many trajectories as NDJSON "
        "to bulk/, long ones step by step.",
        pointer="",
        limit=limit,
        size=size,
    )
