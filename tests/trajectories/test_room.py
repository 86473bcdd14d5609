"""What a web process holds at once is bounded, and nobody waits for ever."""

import threading
from collections.abc import Iterator

import pytest

from tests.trainingsite.console import until
from trajectories import room
from trajectories.errors import Away


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(room, "BYTES", 100)
    yield
    assert room._held == 0
    assert not room._queue


def test_there_is_room_until_it_is_full() -> None:
    with room.Share() as first, room.Share() as second:
        assert first.extend(60)
        assert second.extend(40)
        assert not second.extend(1)
        first.give_back(10)
        assert second.extend(10)


def test_what_is_larger_than_all_the_room_gets_it_alone() -> None:
    with room.Share() as large:
        large.wait(1_000)
        with room.Share() as other:
            assert not other.extend(1)


def test_who_waits_goes_on_when_there_is_room_and_before_those_who_come_later() -> None:
    first, waiting, later = room.Share(), room.Share(), room.Share()
    assert first.extend(80)
    went_on = threading.Event()

    def wait() -> None:
        waiting.wait(50)
        went_on.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert until(lambda: len(room._queue) == 1, 20)
    assert not later.extend(1)  # there would be room for it, but somebody was here before
    assert not went_on.is_set()

    first.give_back()

    assert went_on.wait(20)
    thread.join(20)
    waiting.give_back()


def test_who_waits_in_vain_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "WAIT_SECONDS", 0.01)
    with room.Share() as first, room.Share() as second:
        assert first.extend(100)
        with pytest.raises(Away) as told:
            second.wait(10)
    assert told.value.retry_after is not None
