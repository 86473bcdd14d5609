"""judge [--project SLUG] [--again]: ask the judges about the closed groups that are due, here and now."""

from django.core.management.base import BaseCommand, CommandError, CommandParser

from training import judging, policies
from trajectories import indexing, people
from trajectories.errors import Refused
from trajectories.history import SYSTEM
from trajectories.models import Group, GroupState, Judging


class Command(BaseCommand):
    help = "Judge the closed groups of a project that are due."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--project", default="default")
        parser.add_argument("--again", action="store_true", help="also ask again where the judge failed for good")

    def handle(self, *, project: str, again: bool, **options: object) -> None:
        try:
            found = people.project(project)
        except Refused as refusal:
            raise CommandError(str(refusal)) from refusal
        indexing.drain(found)
        if not judging.can_judge(policies.of(found)):
            self.stdout.write(
                "No judge counts in this project's mix, so the recorded reward does. Name an LLM judge by "
                "JUDGE_BASE_URL and JUDGE_MODEL, or rule judges in the policy."
            )
            return
        if again:
            judging.retry_failed(found, by=SYSTEM, reason="judge --again")
        asked = 0
        while (now := judging.judge_due(found)) > 0:
            asked += now
        failed = Group.objects.filter(project=found, state=GroupState.CLOSED, judging=Judging.ERROR).count()
        self.stdout.write(f"Asked about {asked} groups; {failed} have a judge error.")
        if failed:
            raise CommandError("The errors stand on the groups' pages; those that can be mended are asked about again.")
