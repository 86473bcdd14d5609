"""Compression with the dictionaries that come with the program."""

import hashlib
import json
from pathlib import Path

import pytest
import zstandard
from django.core.files.storage import storages

from tests import builders
from tests.trajectories import recordings
from trajectories import archive, codec, formats, ingestion, segments
from trajectories.models import Trajectory

FOLDER = Path(codec.__file__).parent / "dictionaries"
WRITTEN = {1: "70de438ee0f3f31291923f59ecb56a1f43009315a023482604c2b3cb53af1bc3"}


def test_a_dictionary_is_never_changed() -> None:
    """What is stored with it could not be read again. A better one gets the next number."""
    found = {int(path.stem): hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.iterdir()}

    assert found == WRITTEN
    assert max(found) == codec.LATEST
    assert all(path.stat().st_size <= 32_768 for path in FOLDER.iterdir())


@pytest.mark.parametrize("number", [None, 1])
def test_what_was_compressed_is_read_back(number: int | None) -> None:
    raws = [b"", b'{"chat":{"sent":{"messages":[]}}}', bytes(range(256)) * 400]

    assert [codec.decompress(codec.compress(raw, number), len(raw), number) for raw in raws] == raws
    packed = codec.compress_many(raws, number)
    assert [codec.decompress(one, len(raw), number) for one, raw in zip(packed, raws, strict=True)] == raws


def test_without_a_dictionary_any_zstd_reads_it() -> None:
    assert zstandard.ZstdDecompressor().decompress(codec.compress(b"abc")) == b"abc"


def test_a_dictionary_of_a_later_version_is_named() -> None:
    with pytest.raises(LookupError, match="dictionary 99"):
        codec.decompress(b"", 0, 99)


@pytest.mark.django_db
def test_an_archived_segment_needs_no_dictionary() -> None:
    project = builders.make_project()
    ingestion.record(project, formats.incoming(json.dumps(recordings.chat("run")).encode(), "messages"))
    row = Trajectory.objects.get()
    before = segments.load(row)
    assert row.segments.get().dictionary == codec.LATEST

    archive.archive(row)

    stored = row.segments.get()
    with storages["archive"].open(stored.location) as file:
        assert b'"messages"' in zstandard.ZstdDecompressor().decompress(file.read())
    assert segments.load(row) == before
    archive.restore(row)
    assert segments.load(row) == before
