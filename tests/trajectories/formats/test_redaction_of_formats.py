"""A project's rules reach all that a format was read from: messages, actions, what is kept under `extra`, findings."""

import json
import re

import pytest

from tests import builders
from tests.trajectories.formats import reading
from tests.trajectories.formats.seeds import SEEDS
from tests.trajectories.test_redaction import everything
from trajectories import indexing, ingestion, payloads, transcripts
from trajectories.errors import Problem
from trajectories.formats.incoming import Incoming
from trajectories.models import RedactionCount

pytestmark = pytest.mark.django_db


def longest(found: list[Incoming]) -> str:
    """The longest line that somebody said, of those that look the same in JSON."""
    calls = [call for one in found for call in one.payload.calls()]
    told = [
        line
        for call in calls
        for text in (call.response or "", *map(transcripts.text_of, transcripts.own_prompt(call)))
        for line in text.splitlines()
    ]
    return max((line for line in told if json.dumps(line) == f'"{line}"'), key=len)


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name in SEEDS for seed in SEEDS[name]])
def test_what_a_rule_names_is_nowhere(name: str, seed: object) -> None:
    spoken = json.loads(json.dumps(seed).replace('"?"', '"Where is it?"').replace('"Go."', '"Go and look."'))
    found = [one for one in reading.read(spoken, name) if isinstance(one, Incoming)]
    line = longest(found)
    assert len(line) >= 4
    assert line.encode() in b"".join(payloads.canonical(one.payload) for one in found)
    project = builders.make_project(redaction_rules=[{"name": "line", "pattern": re.escape(line)}])

    results = ingestion.record_many(project, found)
    indexing.drain(project)

    assert not [one for one in results if isinstance(one, Problem)]
    assert RedactionCount.objects.filter(rule="line", count__gte=1).exists()
    assert line.encode() not in everything()
