"""Files that are on the disk when `save` returns: what is acknowledged may lie in one."""

import os
from pathlib import Path

from django.core.files import File
from django.core.files.storage import FileSystemStorage


class DurableFiles(FileSystemStorage):
    """A folder whose files and names are flushed before they count; a file is whole under its name or not there."""

    def _save(self, name: str, content: "File[bytes]") -> str:
        whole = Path(self.path(name))
        whole.parent.mkdir(parents=True, exist_ok=True)
        waiting = whole.with_name(f".{whole.name}.part")
        with waiting.open("wb") as file:
            for chunk in content.chunks():
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        waiting.replace(whole)
        folder = whole.parent
        while folder.is_relative_to(self.location):
            _flush(folder)
            folder = folder.parent
        return name


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
