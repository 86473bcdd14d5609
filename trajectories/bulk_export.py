"""An export behind the request: what was chosen goes into a file in the storage, which is kept for some days.

It is written from the beginning when its worker is killed: a file is there whole or not at all.
"""

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import IO

from django.core.files.base import File
from django.core.files.storage import storages
from django.utils import timezone

from trajectories import bulk_actions, export
from trajectories.bulk_actions import Choice, Kind
from trajectories.models import BulkAction, BulkItem, Role, Trajectory

KEEP_DAYS = 7
EVERY = 1.0  # seconds between two looks at whether it is still wanted
FOLDER = "exports"


def write(action: BulkAction, progress: Callable[[int], bool]) -> dict[str, object]:
    """Export what the action has chosen. Returns what its page says of the file.

    Raises:
        Invalid: there is no such format.
        OSError: the storage.
    """
    chosen = BulkItem.objects.filter(action=action).values("object_id")
    rows = Trajectory.objects.filter(project=action.project, pk__in=chosen)
    asked = export.asked(rows, {"format": str(action.options.get("format", "")), "unreadable": "skip"})
    tally = export.Tally(skip_unreadable=True)
    looked = time.monotonic()
    with tempfile.TemporaryFile() as file:
        span = export.span(rows, asked.name, None, None)
        for piece in export.stream(rows, asked.name, span, asked.options, tally):
            file.write(piece)
            if time.monotonic() - looked >= EVERY:
                if not progress(tally.trajectories):
                    return {}
                looked = time.monotonic()
        size = file.tell()
        file.seek(0)
        name = f"{action.project}.{asked.name}.{export.suffix(asked.name)}"
        location = storages["default"].save(f"{FOLDER}/{action.pk}/{name}", File(file))
    progress(tally.trajectories)
    left_out = dict(tally.left_out)
    return {"file": location, "name": name, "bytes": size, "lines": tally.lines, "left_out": left_out}


def opened(action: BulkAction) -> IO[bytes] | None:
    """The file, while it is kept."""
    location = action.options.get("file")
    if not isinstance(location, str) or not storages["default"].exists(location):
        return None
    return storages["default"].open(location)


def sweep() -> int:
    """Delete the files that are older than they are kept."""
    before = timezone.now() - timedelta(days=KEEP_DAYS)
    old = BulkAction.objects.filter(kind=KIND.name, ended_at__lt=before, options__has_key="file")
    for action in old:
        storages["default"].delete(str(action.options["file"]))
        rest = {name: value for name, value in action.options.items() if name != "file"}
        BulkAction.objects.filter(pk=action.pk).update(options=rest)
    return len(old)


KIND = Kind(
    "export",
    "Export",
    "exported",
    Role.READER,
    whole=write,
    warning=f"The file is kept for {KEEP_DAYS} days. Those that still run are left out; gold answers stay here.",
    needs_reason=False,
    choices=(Choice("format", "Format", export.FORMATS),),
)
bulk_actions.register(KIND)
