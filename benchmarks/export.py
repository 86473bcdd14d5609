"""Going out: MB of source JSON a second on one core, against the floor of the same run.

The floor reads the same trajectories from one bare table (zstd, level 3) with bare psycopg, decompresses, decodes and
encodes each once. Both run in one process with one thread; a second is one of that process's CPU time, so that
neighbours do not count, and PostgreSQL's share does not either (as it does not in the floor). Beside it stands wall
time. Input: the tau-bench recordings of ../shared/data, repeated with fresh ids, as `messages`; what counts as source
is the size of these bodies.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
import psycopg
import zstandard

from benchmarks.ingest import SOURCE, copy_floor, trajectories
from benchmarks.site import site

if TYPE_CHECKING:
    from trajectories.models import Project

REPEATS = 20
TURNS = 3
PAGE = 100  # trajectories that are read at once

Rates = list[tuple[float, float]]  # MB a second of CPU time, and of wall time


def record(bodies: Iterable[bytes]) -> "Project":
    from trajectories import indexing, ingestion, preparing
    from trajectories.formats import messages
    from trajectories.models import Project

    project = Project.objects.get(slug="default")
    recorded = ingestion.record_many(project, (messages.decode(body) for body in bodies))
    faults = [one for one in recorded if not isinstance(one, preparing.Recorded)]
    if faults:
        raise SystemExit(f"recording failed: {faults[0]}")
    indexing.drain(project)
    return project


def measured(work: Callable[[], int], size: int) -> tuple[float, float]:
    """MB of source a second, of CPU and of wall time; `work` says how many bytes it made."""
    wall, cpu = time.perf_counter(), time.process_time()
    if not work():
        raise SystemExit("nothing came out")
    return size / 1e6 / (time.process_time() - cpu), size / 1e6 / (time.perf_counter() - wall)


def floor() -> int:
    decompress = zstandard.ZstdDecompressor().decompress
    decoder, encode = msgspec.json.Decoder(), msgspec.json.Encoder().encode
    made = 0
    with psycopg.connect(os.environ["BENCHMARK_DATABASE_URL"]) as connection:
        with connection.cursor("floor", binary=True) as cursor:
            cursor.itersize = PAGE
            cursor.execute("select body from floor order by id")
            for (body,) in cursor:
                made += len(encode(decoder.decode(decompress(body))))
    return made


def exported(project: "Project", name: str) -> int:
    from trajectories import export
    from trajectories.models import Trajectory

    rows = Trajectory.objects.filter(project=project)
    return sum(map(len, export.stream(rows, name, export.span(rows, name, None, None))))


def read_back(project: "Project") -> int:
    """Every payload opened as pages, judge and trainer open it."""
    from trajectories import segments
    from trajectories.export import pages
    from trajectories.models import Trajectory

    rows = Trajectory.objects.filter(project=project).only(*pages.COLUMNS).order_by("id")
    last = made = 0
    while page := list(rows.filter(pk__gt=last)[:PAGE]):
        made += sum(len(one.steps) for one in segments.load_many(page).values())
        last = page[-1].pk
    return made


def tell(way: str, rates: Rates, floors: Rates) -> None:
    cpu, wall = (statistics.median(one[at] for one in rates) for at in (0, 1))
    ratio = statistics.median(one[0] / under[0] for one, under in zip(rates, floors, strict=True))
    print(f"export {way:<15} {cpu:6.0f} MB/s a core   {wall:6.0f} MB/s wall   {ratio:.2f} of the floor", flush=True)


def main() -> None:
    if not SOURCE.exists():
        print(f"export: needs {SOURCE}")
        return
    with site("export"):
        from trajectories import export

        bodies = trajectories(REPEATS, "export")
        size = sum(map(len, bodies))
        project = record(bodies)
        copy_floor(bodies)
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)  # as the site has it (trainingsite/wsgi.py)
        print(f"export of {len(bodies)} trajectories, {size / 1e6:.1f} MB of source")
        ways: dict[str, Callable[[], int]] = {"read back": lambda: read_back(project)}
        for name in export.FORMATS:
            ways[name] = lambda name=name: exported(project, name)  # type: ignore[misc]  # binds the name of its turn
        found: dict[str, Rates] = {name: [] for name in ("floor", *ways)}
        for _ in range(TURNS):
            found["floor"].append(measured(floor, size))
            for name, work in ways.items():
                found[name].append(measured(work, size))
        for name, rates in found.items():
            tell(name, rates, found["floor"])


if __name__ == "__main__":
    main()
