"""Move payloads of a project to the archive storage, or bring them back with --restore. Rows and pages stay.

May be killed and repeated: what is done is done. What a live version learned from stays, unless --even-if-needed.
"""

import time
from collections import Counter
from datetime import timedelta

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db.models import QuerySet
from django.utils import timezone

from trajectories import api, archive, indexing
from trajectories.errors import Problem
from trajectories.history import Actor
from trajectories.models import Project, State, Trajectory

TOGETHER = 100  # rows that are looked up at once
EVERY = 2.0  # seconds between two lines of progress
BY = Actor("manage.py archive")


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--project", default="default", metavar="SLUG")
        parser.add_argument("--older-than", type=int, metavar="DAYS", help="only what was received before")
        parser.add_argument(
            "--filter", action="append", default=[], metavar="NAME=VALUE", help="as GET /api/v1/trajectories/ has them"
        )
        parser.add_argument("--all", action="store_true", help="all of the project, where nothing else is said")
        parser.add_argument("--restore", action="store_true", help="the other way")
        parser.add_argument("--even-if-needed", action="store_true", help="also what a live version learned from")
        parser.add_argument("--reason", default="", help="kept with each change")
        parser.add_argument("--dry-run", action="store_true", help="say how many, change nothing")

    def handle(
        self,
        *,
        project: str,
        older_than: int | None,
        filter: list[str],
        all: bool,
        restore: bool,
        even_if_needed: bool,
        reason: str,
        dry_run: bool,
        **options: object,
    ) -> None:
        of = Project.objects.filter(slug=project).first()
        if of is None:
            raise CommandError(f"There is no project {project!r}.")
        if older_than is None and not filter and not all:
            raise CommandError("Say which: --older-than DAYS, --filter NAME=VALUE, or --all.")
        try:
            rows = api.filtered(Trajectory.objects.filter(project=of), api.filters_of(filter), of)
        except Problem as problem:
            raise CommandError(problem.detail) from problem
        if older_than is not None:
            rows = rows.filter(received_at__lt=timezone.now() - timedelta(days=older_than))
        rows = rows.filter(archived_at__isnull=not restore).exclude(state=State.OPEN)
        if dry_run:
            self.stdout.write(f"{rows.count()} would be {'restored' if restore else 'archived'}.")
            return
        done, refused = self._work(of, rows, restore=restore, even_if_needed=even_if_needed, reason=reason)
        self.stdout.write(f"{done} {'restored' if restore else 'archived'}, {sum(refused.values())} refused.")
        for why, count in refused.most_common(10):
            self.stderr.write(f"  {count} × {why}")

    def _work(
        self, project: Project, rows: "QuerySet[Trajectory]", *, restore: bool, even_if_needed: bool, reason: str
    ) -> tuple[int, Counter[str]]:
        last, done, told = 0, 0, time.monotonic()
        refused: Counter[str] = Counter()
        while part := list(rows.filter(pk__gt=last).order_by("pk")[:TOGETHER]):
            last = part[-1].pk
            needed = {} if restore or even_if_needed else archive.needed([row.pk for row in part])
            groups = set[int | None]()
            for row in part:
                if row.pk in needed:
                    refused[needed[row.pk]] += 1
                    continue
                try:
                    if restore:
                        archive.restore(row, by=BY, reason=reason)
                    else:
                        archive.archive(row, by=BY, reason=reason, even_if_needed=True)
                except Problem as problem:  # somebody else was there first, or its object is lost
                    refused[str(problem).replace(str(row), "It")] += 1
                else:
                    done += 1
                    groups.add(row.group_id)
            indexing.touch(project, groups)
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                self.stderr.write(f"{done} so far, to number {last}")
        indexing.drain(project)
        return done, refused
