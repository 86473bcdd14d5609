"""train --project SLUG: start a batch as the API does, and go with it to its end where that is asked for."""

import json
import time

from django.core.management.base import BaseCommand, CommandError, CommandParser

from training import batches, tasks
from training.models import BatchStatus, Mode
from trainingsite.celery import nudge
from trajectories import people
from trajectories.errors import Invalid, Refused
from trajectories.history import SYSTEM

ENDED = (BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.CANCELLED)
LOOK_EVERY = 1.0  # seconds


class Command(BaseCommand):
    help = "Start a training batch."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--project", default="default")
        parser.add_argument("--force", action="store_true", help="waive amounts and schedule, never validity")
        parser.add_argument("--limit", type=int, help="at most so many trajectories, in whole groups")
        parser.add_argument("--mode", choices=Mode.values, help="the policy's unless given")
        parser.add_argument("--hyperparameters", default="{}", help='JSON over the policy\'s: {"epochs": 2}')
        parser.add_argument("--wait", action="store_true", help="tend the batch here until it ends; needs no worker")

    def handle(
        self,
        *,
        project: str,
        force: bool,
        limit: int | None,
        mode: str | None,
        hyperparameters: str,
        wait: bool,
        **options: object,
    ) -> None:
        try:
            chosen = json.loads(hyperparameters)
        except ValueError as exc:
            raise CommandError(f"--hyperparameters is not JSON: {exc}") from exc
        if not isinstance(chosen, dict):
            raise CommandError("--hyperparameters must be a JSON object.")
        wish = batches.Wish(force=force, limit=limit, mode=Mode(mode) if mode else None, hyperparameters=chosen)
        try:
            batch = batches.trigger(people.project(project), wish, by=SYSTEM)
        except (Refused, Invalid) as problem:
            raise CommandError(str(problem)) from problem
        self.stdout.write(f"Batch {batch.batch_id}: {batch.n_trajectories} trajectories, {batch.n_groups} groups.")
        nudge(tasks.tend_batch, batch.pk)
        if not wait:
            return
        told = ""
        while batch.status not in ENDED:
            batches.tend(batch)
            batch.refresh_from_db()
            line = f"{batch.get_status_display()}, {batches.progress(batch):.0%}"
            if line != told:
                self.stdout.write(line)
                told = line
            if batch.status not in ENDED:
                time.sleep(LOOK_EVERY)
        if batch.status != BatchStatus.COMPLETED:
            raise CommandError(f"The batch {batch.get_status_display()}: {batch.error}")
        self.stdout.write(f"{batch.model.version} is ready. {batch.model.notes}")
