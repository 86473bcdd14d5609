"""Parts too large for a segment: a text, or a value of a step, above `limits.PART_BYTES`.

In the segment stands a mark that was drawn after the sender had spoken; the part itself lies in the default storage,
once a project by its content, and is put back where the payload is read. Order of writing: a row that names the file
(`LooseFile`), the file, the blob's row with its use, the trajectory. Killed in between, what is left belongs to nobody
and is swept away; so is what the last trajectory that held it leaves behind.
"""

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
import zstandard
from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.db import IntegrityError, connection, transaction
from django.db.models import Sum
from django.utils import timezone

from trajectories import limits, payloads
from trajectories.early_commit import committed_early
from trajectories.errors import Away
from trajectories.models import Blob, BlobUse, LooseFile, Project
from trajectories.payloads import Payload

P = TypeVar("P", bound=Payload)

GRACE = timedelta(hours=1)  # what nobody owns is kept so long: somebody may be about to
PREVIEW = 300  # characters
TRIES = 3
SWEPT = 1000  # rows at once
# Where any JSON may stand, so that a mark may take its place; texts may be anywhere.
FREE: Mapping[str, str] = {
    "environment_state": "inside",
    "parameters": "inside",
    "metadata": "inside",
    "metrics": "inside",
    "extra": "inside",
    "data": "itself",
    "result": "itself",
    "error": "itself",
}
DATA_URL = re.compile(r"data:([\w.+-]{1,40}/[\w.+-]{1,57})((?:;[\w=.+-]{1,40})*),")


class Held(msgspec.Struct, frozen=True):
    """The parts that were taken out of a payload; `mark:n` stands in the place of number n."""

    blob_mark: str
    blobs: tuple[int, ...]

    def prefix(self) -> bytes:
        """The first fields of a segment that holds some of them."""
        return b'{"blobs":' + payloads.encode(self.blobs) + b',"blob_mark":' + payloads.encode(self.blob_mark) + b","

    def marks(self) -> dict[str, int]:
        return {f"{self.blob_mark}:{number}": pk for number, pk in enumerate(self.blobs)}


class Part(msgspec.Struct, frozen=True):
    kind: str  # text or json
    raw: bytes
    content_hash: bytes


# --- in ------------------------------------------------------------------------------------------------------------


def take_out(
    project: Project, payload: P, *, size: int | None, trajectory_id: str, content_hash: bytes
) -> tuple[P, Held | None]:
    """The payload, redacted already, with a mark in the place of each large part; the parts are stored on return.

    Args:
        size: bytes of the payload as JSON, as nearly as it is known; None: it is measured.
        content_hash: of the trajectory that will hold them.

    Raises:
        Away: the storage took longer than the sweep waits.
    """
    if (len(payloads.encode(payload)) if size is None else size) <= limits.PART_BYTES:
        return payload, None
    finder = _Finder()
    value = finder.look(msgspec.json.decode(payloads.encode(payload)))
    parts = list(finder.parts.values())
    if not parts:
        return payload, None
    pks = _keep(project, parts, trajectory_id, content_hash)
    return msgspec.convert(value, type(payload)), Held(finder.mark, tuple(pks))


class _Finder:
    """One look through a payload; equal parts get one mark."""

    def __init__(self) -> None:
        self.mark = f"blob:{secrets.token_hex(16)}"
        self.parts: dict[str, Part] = {}
        self.places: dict[tuple[str, bytes], str] = {}

    def look(self, found: object, *, free: bool = False, inside: bool = False) -> object:
        """`free`: any JSON may stand here; `inside`: in the values of this object."""
        if isinstance(found, str):
            if 4 * len(found) <= limits.PART_BYTES:
                return found
            raw = found.encode()
            return self._take("text", raw) if len(raw) > limits.PART_BYTES else found
        if not isinstance(found, dict | list):
            return found
        before = len(self.parts)
        looked: object
        if isinstance(found, dict):
            looked = {key: self._value(key, value, free or inside) for key, value in found.items()}
        else:
            looked = [self.look(value, free=free) for value in found]
        if free and len(payloads.encode(looked)) > limits.PART_BYTES:
            while len(self.parts) > before:  # the whole holds them
                mark, _ = self.parts.popitem()
                self.places = {key: place for key, place in self.places.items() if place != mark}
            return self._take("json", payloads.encode(found))
        return looked

    def _value(self, key: str, value: object, free: bool) -> object:
        if key == "tools" and not free:  # a shared text, stored once by itself
            return value
        return self.look(value, free=free or FREE.get(key) == "itself", inside=FREE.get(key) == "inside")

    def _take(self, kind: str, raw: bytes) -> str:
        content_hash = hashlib.sha256(raw).digest()
        mark = self.places.get((kind, content_hash))
        if mark is None:
            mark = self.places[kind, content_hash] = f"{self.mark}:{len(self.parts)}"
            self.parts[mark] = Part(kind, raw, content_hash)
        return mark


def _keep(project: Project, parts: Sequence[Part], trajectory_id: str, content_hash: bytes) -> list[int]:
    """pks of the blobs in the order of the parts, stored and in use."""
    for attempt in range(TRIES):
        try:
            return _keep_once(project, parts, trajectory_id, content_hash)
        except IntegrityError:  # the sweep took one that nobody used until now
            if connection.in_atomic_block or attempt == TRIES - 1:
                raise
    raise AssertionError("the loop returns or raises")


def _keep_once(project: Project, parts: Sequence[Part], trajectory_id: str, content_hash: bytes) -> list[int]:
    known = _known(project, parts)
    written: list[Blob] = []
    for part in parts:
        if (part.kind, part.content_hash) not in known:
            written.append(_write(project, part))
    with committed_early():
        if written:
            names = [one.location for one in written]
            if LooseFile.objects.filter(location__in=names).delete()[0] < len(names):
                raise Away("The blob storage took too long; nothing is kept. Send the same again.", retry_after=30)
            Blob.objects.bulk_create(written, ignore_conflicts=True)
            known = _known(project, parts)
            kept = set(Blob.objects.filter(location__in=names).values_list("location", flat=True))
            # Somebody stored the same at the same moment: one of the two files is left over.
            LooseFile.objects.bulk_create(LooseFile(location=name) for name in names if name not in kept)
        pks = [known[part.kind, part.content_hash] for part in parts]
        BlobUse.objects.bulk_create(
            [
                BlobUse(blob_id=pk, trajectory_ref=trajectory_id, content_hash=content_hash, used_at=timezone.now())
                for pk in pks
            ],
            update_conflicts=True,
            update_fields=["used_at"],
            unique_fields=["blob", "trajectory_ref", "content_hash"],
        )
    return pks


def _known(project: Project, parts: Sequence[Part]) -> dict[tuple[str, bytes], int]:
    rows = Blob.objects.filter(project=project, content_hash__in=[part.content_hash for part in parts])
    return {(kind, bytes(found)): pk for pk, kind, found in rows.values_list("pk", "kind", "content_hash")}


def _write(project: Project, part: Part) -> Blob:
    """The file, under a name that no other try has; a row says that it is there before it is."""
    data = zstandard.ZstdCompressor(level=3).compress(part.raw)
    digest = part.content_hash.hex()
    name = f"{project.pk}/{digest[:2]}/{digest}-{secrets.token_hex(4)}.zst"
    LooseFile.objects.create(location=name)
    name = storages["default"].save(name, ContentFile(data))
    return Blob(
        project=project,
        kind=part.kind,
        content_hash=part.content_hash,
        media_type=_media_type(part),
        raw_size=len(part.raw),
        stored_size=len(data),
        preview=part.raw[: 4 * PREVIEW].decode(errors="ignore").replace("\x00", "\ufffd")[:PREVIEW],
        location=name,
    )


def _media_type(part: Part) -> str:
    found = DATA_URL.match(part.raw[:400].decode(errors="ignore")) if part.kind == "text" else None
    return found[1].lower() if found else ""


# --- out -----------------------------------------------------------------------------------------------------------


class _Holding(msgspec.Struct):
    blobs: tuple[int, ...] = ()
    blob_mark: str = ""


_holding = msgspec.json.Decoder(_Holding)


def held_in(raw: bytes) -> Held | None:
    """What a segment's JSON says of parts that are elsewhere."""
    if not raw.startswith(b'{"blobs":'):
        return None
    found = _holding.decode(raw)
    return Held(found.blob_mark, found.blobs)


def put_back(raw: bytes) -> bytes:
    """A segment's JSON with its parts in their places.

    Raises:
        Away: a part cannot be read from the storage.
    """
    held = held_in(raw)
    if held is None:
        return raw
    rows = Blob.objects.in_bulk(held.blobs)
    parts: dict[int, bytes] = {}

    def part(found: "re.Match[bytes]") -> bytes:
        number = int(found[1])
        if number not in parts:
            row = rows.get(held.blobs[number])
            if row is None:
                raise Away(f"A part of it (blob {held.blobs[number]}) is not in the database any more.")
            content = read(row)
            parts[number] = content if row.kind == "json" else payloads.encode(content.decode())
        return parts[number]

    return re.sub(b'"' + held.blob_mark.encode() + rb':(\d+)"', part, raw)


def read(row: Blob) -> bytes:
    """The content, byte for byte.

    Raises:
        Away: it cannot be read, or is not what was written.
    """
    try:
        with storages["default"].open(row.location, "rb") as stored:
            raw = zstandard.ZstdDecompressor().decompress(stored.read(), max_output_size=row.raw_size)
    except (OSError, zstandard.ZstdError) as exc:
        raise Away(f"A part of it (blob {row.pk}) cannot be read from the blob storage: {exc}.") from exc
    if hashlib.sha256(raw).digest() != bytes(row.content_hash):
        raise Away(f"A part of it (blob {row.pk}) is not what was stored: its hash differs.")
    return raw


def file_of(row: Blob, raw: bytes) -> tuple[str, bytes]:
    """(media type, bytes) to hand to a person: a data URL as the file it spells."""
    if row.kind == "json":
        return "application/json", raw
    found = DATA_URL.match(raw[:400].decode(errors="ignore"))
    if found is not None and "base64" in found[2]:
        try:
            return found[1].lower(), base64.b64decode(raw[found.end() :], validate=True)
        except (binascii.Error, ValueError):
            pass
    return "text/plain; charset=utf-8", raw


def size_of(trajectory_id: str, content_hash: bytes) -> int:
    """Bytes of all parts that a trajectory holds."""
    uses = BlobUse.objects.filter(trajectory_ref=trajectory_id, content_hash=content_hash)
    return uses.aggregate(size=Sum("blob__raw_size"))["size"] or 0


# --- away ----------------------------------------------------------------------------------------------------------


def sweep(grace: timedelta = GRACE) -> int:
    """Delete what no trajectory holds: uses by content that was refused or is gone, blobs, files. Returns how many."""
    before = timezone.now() - grace
    with connection.cursor() as cursor:
        cursor.execute(
            """delete from blob_uses u where u.used_at < %s and not exists (
                   select from blobs b
                   join trajectories t on t.project_id = b.project_id and t.trajectory_id = u.trajectory_ref
                   where b.id = u.blob_id and t.content_hash = u.content_hash)""",
            [before],
        )
    try:
        with transaction.atomic():
            free = Blob.objects.filter(created_at__lt=before).exclude(pk__in=BlobUse.objects.values("blob"))
            locked = free.select_for_update(of=("self",), skip_locked=True).order_by("pk")
            doomed = dict(locked.values_list("pk", "location")[:SWEPT])
            with connection.cursor() as cursor:
                cursor.execute("delete from blobs where id = any(%s)", [list(doomed)])
            LooseFile.objects.bulk_create(
                (LooseFile(location=name, since=before - GRACE) for name in doomed.values()), ignore_conflicts=True
            )
    except IntegrityError:  # somebody uses one of them again: they are looked at again in an hour
        pass
    return _delete_files(LooseFile.objects.filter(since__lt=before).values_list("location", flat=True)[:SWEPT])


def _delete_files(names: Iterable[str]) -> int:
    """The row goes first: whoever still wrote the file finds it missing and begins anew."""
    count = 0
    for name in list(names):
        with transaction.atomic():
            if LooseFile.objects.filter(location=name).delete()[0]:
                storages["default"].delete(name)
                count += 1
    return count
