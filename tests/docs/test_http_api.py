"""The examples of docs/http-api.md, run as they stand there, in their order, against the site."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pytest_django.live_server_helper import LiveServer

from tests.builders import make_batch, make_group, make_key, make_model, make_project
from training.models import BatchStatus, Deployment, Evaluation, EvaluationState
from trajectories.models import Group, Project

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(not shutil.which("curl") or not shutil.which("bash"), reason="needs curl and bash"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "http-api.md"
EXAMPLE = re.compile(r"```sh\n(?P<command>.*?)```\n```json (?P<status>\d{3})\n(?P<answer>.*?)```", re.DOTALL)
CURL = 'curl() { command curl -sS --max-time 30 -w "\\n%{http_code}" "$@"; }\n'


def missing(shown: object, found: object, place: str = "") -> list[str]:
    """Fields that the page shows and the answer lacks, or that are of another kind; of lists, the first item."""
    if isinstance(shown, dict):
        if not isinstance(found, dict):
            return [f"{place} is {found!r}, not an object"]
        return [
            line
            for key, value in shown.items()
            for line in (
                missing(value, found[key], f"{place}/{key}") if key in found else [f"{place}/{key} is not there"]
            )
        ]
    if isinstance(shown, list):
        if not isinstance(found, list) or len(found) < bool(shown):
            return [f"{place} is {found!r}, and {shown!r} is shown"]
        return missing(shown[0], found[0], f"{place}/0") if shown else []
    if isinstance(shown, str) and shown != "…" and place.rpartition("/")[2] in EXACT and found != shown:
        return [f"{place} is {found!r}, and {shown!r} is shown"]
    if isinstance(shown, bool) and found is not shown:
        return [f"{place} is {found!r}, and {shown!r} is shown"]
    return []


EXACT = (
    "trajectory_id",
    "state",
    "status",
    "code",
    "fidelity",
    "origin",
    "version",
    "split",
    "side",
    "pointer",
    "model",
)


def ids(project: Project) -> dict[str, str]:
    """What earlier examples made and later ones name."""
    group = Group.objects.filter(project=project, scenario__scenario_id="day-7", behaviour="v1.0.0").first()
    # No model server here: stand in for its word that both sides are loaded.
    Evaluation.objects.filter(project=project, state=EvaluationState.PENDING).update(state=EvaluationState.RUNNING)
    evaluation = Evaluation.objects.filter(project=project).first()
    deployment = Deployment.objects.filter(project=project).first()
    return {
        "GROUP": str(group.pk) if group else "",
        "EVALUATION": evaluation.evaluation_id if evaluation else "",
        "DEPLOYMENT": str(deployment.pk) if deployment else "",
    }


def test_every_example_answers_as_the_page_says(live_server: LiveServer) -> None:
    examples = list(EXAMPLE.finditer(PAGE.read_text(encoding="utf-8")))
    assert len(examples) >= 25
    project = make_project("shop", held_out_share=0.0)
    first = make_model(project, "v1.0.0")
    batch = make_batch(project, groups=(make_group(project),), status=BatchStatus.COMPLETED)
    make_model(project, "v1.0.1", parent=first, batch=batch)
    setting = {
        **os.environ,
        "SITE": live_server.url,
        "AUTH": f"Authorization: Bearer {make_key(project)[1]}",
        "BATCH": batch.batch_id,
    }

    wrong: list[str] = []
    for example in examples:
        ran = subprocess.run(
            ["bash", "-c", CURL + example["command"]],
            env={**setting, **ids(project)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        answer, _, status = ran.stdout.rpartition("\n")
        name = example["command"].strip().splitlines()[0]
        if status != example["status"]:
            wrong.append(f"{name}\n  answered {status}, not {example['status']}: {answer[:500]} {ran.stderr}")
            continue
        wrong.extend(f"{name}\n  {line}" for line in missing(json.loads(example["answer"]), json.loads(answer)))
    assert not wrong, "\n".join(wrong)
