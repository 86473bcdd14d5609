"""The memory of a web process stays under 300 MB, whatever is sent: it does not grow with the body."""

import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard

from tests.trajectories.served import BULK, SINGLE, Answer, ServedSite, rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

MEGABYTES = 300
MB = 1_000_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedSite]:
    site = ServedSite(tmp_path_factory.mktemp("memory"))
    try:
        site.start()
        yield site
    finally:
        site.stop()


def conversations(name: str, total: int, each: int) -> Iterator[bytes]:
    """Lines of `each` bytes, `total` together, that zstd cannot make much smaller."""
    noise = os.urandom(each // 4).hex()
    talk = [{"role": "user", "content": noise}, {"role": "assistant", "content": noise[::-1]}]
    before, after = json.dumps({"trajectory_id": "ID", "agent_id": "a", "messages": talk}).encode().split(b"ID")
    for number in range(total // each):
        yield before + f"{name}-{number}".encode() + after + b"\n"


def bulk(site: ServedSite, body: bytes | Iterator[bytes], encoding: str = "identity") -> Answer:
    kinds = {"Content_Type": "application/x-ndjson", "Content_Encoding": encoding}
    return site.ask("POST", f"{BULK}?format=messages", body, seconds=300, **kinds)


def within(site: ServedSite, send: Callable[[], Answer]) -> Answer:
    site.peak_megabytes(reset=True)
    answer = send()
    peak = site.peak_megabytes()
    print(f"peak {peak:.0f} MB")
    assert peak < MEGABYTES
    return answer


@pytest.mark.parametrize(
    ("total", "each"), [(400 * MB, 45_000), (200 * MB, 200_000), (400 * MB, MB), (90 * MB, 30 * MB)]
)
def test_a_long_body_takes_no_more_than_a_short_one(site: ServedSite, total: int, each: int) -> None:
    answer = within(site, lambda: bulk(site, conversations(f"long-{each}", total, each)))

    assert answer[0] == 207
    assert (len(rows(answer, "successes")), rows(answer, "errors")) == (total // each, [])


@pytest.mark.parametrize(("total", "each"), [(40 * MB, 45_000), (40 * MB, MB), (60 * MB, 20 * MB)])
def test_eight_at_once_share_the_room(site: ServedSite, total: int, each: int) -> None:
    def eight() -> Answer:
        with ThreadPoolExecutor(8) as pool:
            bodies = [conversations(f"eight-{each}-{number}", total, each) for number in range(8)]
            answers = list(pool.map(lambda body: bulk(site, body), bodies))
        return 207, {"successes": [row for answer in answers for row in rows(answer, "successes")]}

    assert len(rows(within(site, eight), "successes")) == 8 * (total // each)


def test_one_huge_line_is_refused_and_its_neighbours_are_kept(site: ServedSite) -> None:
    def body() -> Iterator[bytes]:
        yield from conversations("before", 20_000, 20_000)
        yield from (b"x" * MB for _ in range(300))
        yield b"\n"
        yield from conversations("after", 20_000, 20_000)

    answer = within(site, lambda: bulk(site, body()))

    assert [row["trajectory_id"] for row in rows(answer, "successes")] == ["before-0", "after-0"]
    assert [(row["index"], row["status"]) for row in rows(answer, "errors")] == [(1, 413)]


@pytest.mark.parametrize("line", [b"{}", b"[]", b"x"])
def test_millions_of_tiny_lines_are_refused_together(site: ServedSite, line: bytes) -> None:
    answer = within(site, lambda: bulk(site, ((line + b"\n") * 500_000 for _ in range(20))))

    assert len(rows(answer, "errors")) == 20_001


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
@pytest.mark.parametrize("byte", [b"x", b"\n", b"["])
def test_a_bomb_unfolds_a_piece_at_a_time(site: ServedSite, encoding: str, byte: bytes) -> None:
    whole = byte * 500 * MB
    packed = gzip.compress(whole, 1) if encoding == "gzip" else zstandard.ZstdCompressor().compress(whole)

    answer = within(site, lambda: bulk(site, packed, encoding))

    assert answer[0] == 207
    assert len(rows(answer, "errors")) == (0 if byte == b"\n" else 1)


def test_a_frame_that_asks_for_a_large_window_is_refused(site: ServedSite) -> None:
    far = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=far).compressobj()  # of unknown length
    packed = packer.compress(b"".join(conversations("window", 20_000, 20_000))) + packer.flush()

    status, answer = within(site, lambda: bulk(site, packed, "zstd"))

    assert (status, answer["code"]) == (400, "invalid")


def test_one_large_trajectory_and_a_large_batch_fit(site: ServedSite) -> None:
    one = next(conversations("single", 20 * MB, 20 * MB))
    assert within(site, lambda: site.ask("POST", f"{SINGLE}?format=messages", one))[0] == 201

    batch = b'{"batch": [' + b",".join(conversations("batch", 30 * MB, MB)) + b"]}"
    answer = within(site, lambda: site.ask("POST", f"{BULK}?format=messages", batch, Content_Type="application/json"))
    assert len(rows(answer, "successes")) == 30
