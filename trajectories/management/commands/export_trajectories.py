"""Write trajectories of a project to a file, or to a folder in parts, oldest first. --resume goes on after a cut."""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
from django.core.management.base import BaseCommand, CommandError, CommandParser, OutputWrapper
from django.db.models import QuerySet

from trajectories import api, export
from trajectories.errors import Away, Problem
from trajectories.models import Project, Trajectory

EVERY = 5.0  # seconds between two lines of progress; a terminal's line is rewritten more often
EVERY_ON_TERMINAL = 0.2
TAIL = 1024 * 1024  # bytes of a file that are read at once to find its last line
STATE = "export.json"


class State(msgspec.Struct):
    """In the folder of the parts: which comes next."""

    format: str
    part: int
    cursor: str | None
    done: bool = False


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--project", default="default", metavar="SLUG")
        parser.add_argument("--format", choices=export.FORMATS, default="native")
        parser.add_argument("--output", default="-", metavar="PATH", help="a file, or - for standard output")
        parser.add_argument(
            "--part-size", type=int, metavar="N", help="PATH is a folder of files of N trajectories (by group: groups)"
        )
        parser.add_argument("--resume", action="store_true", help="go on with what PATH has")
        parser.add_argument(
            "--filter", action="append", default=[], metavar="NAME=VALUE", help="as GET /api/v1/trajectories/ has them"
        )
        parser.add_argument("--margin", default="0", help="trl-preference: least difference of rewards")
        parser.add_argument("--private", action="store_true", help="native: gold answers too")
        parser.add_argument("--skip-unreadable", action="store_true", help="leave out what cannot be read, and say so")

    def handle(self, *args: object, **options: object) -> None:
        project = Project.objects.filter(slug=str(options["project"])).first()
        if project is None:
            raise CommandError(f"There is no project {options['project']!r}.")
        tally = export.Tally(skip_unreadable=options["skip_unreadable"] is True)
        every = Trajectory.objects.filter(project=project)
        told, resume = options["filter"], options["resume"] is True
        assert isinstance(told, list)
        try:
            rows = api.filtered(every, api.filters_of(told), project)
            asked = export.asked(
                every,
                {
                    "format": str(options["format"]),
                    "margin": str(options["margin"]),
                    "private": "1" if options["private"] else "",
                    "limit": "" if options["part_size"] is None else str(options["part_size"]),
                },
            )
            progress = Progress(self.stderr, tally)
            if options["output"] == "-":
                if resume or asked.limit:
                    raise CommandError("--resume and --part-size need an --output that is no stream.")
                span = export.span(rows, asked.name, None, None)
                for piece in progress.of(export.stream(rows, asked.name, span, asked.options, tally)):
                    sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
            elif asked.limit:
                _in_parts(rows, asked, Path(str(options["output"])), resume, progress)
            else:
                _in_one(rows, asked, Path(str(options["output"])), resume, progress)
        except (LookupError, Away, OSError) as exc:
            raise CommandError(f"{exc}. --resume goes on; --skip-unreadable leaves out what cannot be read.") from exc
        except Problem as problem:
            raise CommandError(problem.detail) from None
        progress.end()
        if tally.unreadable:
            sys.exit(1)


def _in_one(rows: "QuerySet[Trajectory]", asked: export.Asked, path: Path, resume: bool, progress: "Progress") -> None:
    begin = None
    if path.exists() and path.stat().st_size:
        if not resume:
            raise CommandError(f"{path} is there already. --resume goes on with it; else remove it.")
        if asked.name == "openai-ft" or export.suffix(asked.name) == "parquet":
            raise CommandError(f"A file of {asked.name} cannot be gone on with. Use --part-size and a folder.")
        begin = _end_of(path, rows, asked.name)
    span = export.span(rows, asked.name, begin, None)
    with path.open("ab") as out:
        for piece in progress.of(export.stream(rows, asked.name, span, asked.options, progress.tally)):
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())


class _Line(msgspec.Struct):
    """What of a line says where it stands."""

    trajectory_id: str | None = None
    cursor: str | None = None
    metadata: dict[str, object] = {}


def _end_of(path: Path, rows: "QuerySet[Trajectory]", name: str) -> export.Place | None:
    """The place after the last whole line; a torn one is cut off. None: there is no whole line."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail = b""
        at = end
        while at and tail.count(b"\n") < 2:
            step = min(TAIL, at)
            at -= step
            file.seek(at)
            tail = file.read(step) + tail
        whole = tail.rpartition(b"\n")[0]
        file.truncate(at + len(whole) + 1 if b"\n" in tail else 0)
    if b"\n" not in tail:
        return None
    try:
        told = msgspec.json.decode(whole.rpartition(b"\n")[2], type=_Line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise CommandError(f"The last line of {path} is no line of an export. Is it another file?") from None
    cursor = told.metadata.get("cursor") if name == "art-jsonl" else told.cursor
    if name != "native":
        if not isinstance(cursor, str):
            raise CommandError(f"The last line of {path} is no line of {name}.")
        return export.place_of(cursor)
    return export.asked(rows, {"format": name, "after": told.trajectory_id or ""}).begin


def _in_parts(
    rows: "QuerySet[Trajectory]", asked: export.Asked, folder: Path, resume: bool, progress: "Progress"
) -> None:
    """Each part is written under another name, and gets its own when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    state = State(asked.name, 0, None)
    known = folder / STATE
    if known.exists():
        if not resume:
            raise CommandError(f"{folder} has an export already. --resume goes on with it; else remove it.")
        state = msgspec.json.decode(known.read_bytes(), type=State)
        if state.format != asked.name:
            raise CommandError(f"{folder} has an export in the format {state.format}, not {asked.name}.")
    while not state.done:
        begin = export.place_of(state.cursor) if state.cursor else None
        span = export.span(rows, asked.name, begin, asked.limit)
        pieces = export.stream(rows, asked.name, span, asked.options, progress.tally)
        _write(folder / f"part-{state.part:05}.{export.suffix(asked.name)}", progress.of(pieces))
        following = export.cursor(span.following) if span.following is not None else None
        state = State(asked.name, state.part + 1, following, done=following is None)
        _write(known, [msgspec.json.encode(state)])


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    unready = path.with_name(f".{path.name}.unready")
    with unready.open("wb") as out:
        for piece in pieces:
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    unready.replace(path)


class Progress:
    """How far it is: one line that is rewritten on a terminal, else a line every few seconds; and the end of it."""

    def __init__(self, out: OutputWrapper, tally: export.Tally) -> None:
        self.out = out
        self.tally = tally
        self.on_terminal = out.isatty()
        self.began = self.shown = time.monotonic()
        self.size = 0

    def of(self, pieces: Iterable[bytes]) -> Iterable[bytes]:
        """The pieces, counted."""
        for piece in pieces:
            self.size += len(piece)
            yield piece
            now = time.monotonic()
            if now - self.shown >= (EVERY_ON_TERMINAL if self.on_terminal else EVERY):
                self.shown = now
                self._say(f"{self._so_far()} …")

    def _so_far(self) -> str:
        tally = self.tally
        return f"{tally.trajectories} trajectories, {tally.lines} rows, {self.size / 1e6:.1f} MB"

    def _say(self, line: str) -> None:
        self.out.write(f"\r\x1b[2K{line}" if self.on_terminal else line, ending="" if self.on_terminal else "\n")
        self.out.flush()

    def end(self) -> None:
        seconds = time.monotonic() - self.began
        self._say(f"{self._so_far()} in {seconds:.1f} s")
        if self.on_terminal:
            self.out.write("")
        for reason, count in self.tally.left_out.items():
            if count:
                self.out.write(f"left out: {count} ({reason})")
        for ident in self.tally.unreadable:
            self.out.write(f"cannot be read: {ident!r}")
