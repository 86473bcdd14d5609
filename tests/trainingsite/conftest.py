"""A site of its own for a test, taken down at its end however it went."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainingsite.console import Console, until
from trainingsite import embedded


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Console]:
    console = Console(tmp_path / "data folder")
    yield console
    if console.process is not None and not console.ended():
        console.process.kill()
        console.process.wait()
        until(lambda: not console.programs() and not console.servers(), 30)
    embedded.leave_runtime_folder(embedded.runtime_folder(console.data))
