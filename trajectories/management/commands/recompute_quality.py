"""Judge what is recorded again: quality, fidelity, findings. Run it when weights, checks or tokenizers have changed.

May be killed and repeated; beside running recording it is safe. `--after N` goes on where a run was interrupted.
"""

import time
from datetime import datetime

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils.dateparse import parse_date, parse_datetime

from trajectories import api, indexing, payloads, recomputing
from trajectories.errors import Problem
from trajectories.models import Project

SHOWN = 20  # changes of a dry run


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--project", metavar="SLUG", help="all of them unless given")
        parser.add_argument("--since", metavar="TIME", help="only what was received since: 2026-11-01, or with a time")
        parser.add_argument(
            "--filter", action="append", default=[], metavar="NAME=VALUE", help="as GET /api/v1/trajectories/ has them"
        )
        parser.add_argument("--after", type=int, default=0, metavar="N", help="only rows with a higher number")
        parser.add_argument("--dry-run", action="store_true", help="say what would change, change nothing")

    def handle(
        self,
        *,
        project: str | None,
        since: str | None,
        filter: list[str],
        after: int,
        dry_run: bool,
        **options: object,
    ) -> None:
        chosen = Project.objects.order_by("pk")
        if project is not None:
            chosen = chosen.filter(slug=project)
            if not chosen.exists():
                raise CommandError(f"There is no project {project!r}.")
        begin = _time(since) if since else None
        looked_at = changed = unreadable = 0
        for one in chosen:
            try:
                rows = api.filtered(recomputing.chosen(one), api.filters_of(filter), one)
            except Problem as problem:
                raise CommandError(problem.detail) from problem
            if begin is not None:
                rows = rows.filter(received_at__gte=begin)
            total = rows.filter(pk__gt=after).count()
            done, began = 0, time.monotonic()
            for progress in recomputing.recompute(one, rows, after=after, dry_run=dry_run):
                done += progress.looked_at
                changed += len(progress.changes)
                unreadable += len(progress.unreadable)
                rate = done / max(time.monotonic() - began, 1e-6)
                self.stderr.write(
                    f"{one.slug}: {done} of {total}, {changed} changed, {rate:.0f}/s; --after {progress.last} goes on"
                )
                for why in progress.unreadable:
                    self.stderr.write(f"  cannot be read: {why}")
                if dry_run:
                    for change in progress.changes[:SHOWN]:
                        self.stdout.write(f"{change.trajectory_id}: {change.was} → {change.now}")
            looked_at += done
            if not dry_run:
                indexing.drain(one)
        would = "would change" if dry_run else "changed"
        self.stdout.write(f"{looked_at} looked at, {changed} {would}, {unreadable} could not be read.")


def _time(text: str) -> datetime:
    """Raises CommandError: no time."""
    try:
        found = parse_datetime(text)
        day = parse_date(text) if found is None else None
    except ValueError:
        found = day = None
    if day is not None:
        found = datetime(day.year, day.month, day.day)  # noqa: DTZ001  (made UTC below)
    if found is None:
        raise CommandError(f"--since {text!r} is no time. Give 2026-11-01, or 2026-11-01T08:00:00Z.")
    return payloads.utc(found)
