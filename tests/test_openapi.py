"""The API under fire from its own OpenAPI schema: schemathesis makes requests of it, wrong ones too; none is a 500.

A quick profile runs with the others, the long one is `pytest -m slow`.
"""

import json
from collections.abc import Callable
from functools import cache
from typing import Protocol, TypedDict, cast

import pytest
import requests
import schemathesis
from django.test import Client
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from tests import builders
from tests.trajectories import recordings
from trajectories import formats, ingestion
from trajectories.models import Role


class Described(TypedDict):
    security: list[dict[str, list[str]]]
    responses: dict[str, dict[str, dict[str, object]]]


class Definition(Protocol):
    raw: Described


class Made(Protocol):
    """A request that schemathesis has made."""

    operation: "Operation"

    def as_transport_kwargs(self, base_url: str) -> dict[str, object]: ...


class Operation(Protocol):
    """What of its operations is used here; its own types are generic in four ways."""

    label: str
    definition: Definition

    def as_strategy(self, *, generation_mode: GenerationMode) -> st.SearchStrategy[Made]: ...


pytestmark = pytest.mark.django_db

CHECKS = [
    HealthCheck.function_scoped_fixture,
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
]
QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=CHECKS,
    database=None,
    phases=[Phase.generate],
)
LONG = settings(QUICK, max_examples=3_000, derandomize=False, print_blob=True)


@cache
def operations() -> dict[str, Operation]:
    """Every operation of the schema by its label, `GET /api/v1/limits/`."""
    answer = Client().get("/api/schema/", {"format": "json"}, headers={"Accept": "application/vnd.oai.openapi+json"})
    schema = schemathesis.openapi.from_dict(json.loads(answer.content))
    found: dict[str, Operation] = {}
    for one in schema.get_all_operations():
        assert isinstance(one, Ok), one
        operation = cast(Operation, one.ok())
        found[operation.label] = operation
    return found


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Made]], Made], negative: bool) -> Made:
    found = operations()
    name = draw(st.sampled_from(sorted(found)))
    mode = GenerationMode.NEGATIVE if negative else GenerationMode.POSITIVE
    return draw(found[str(name)].as_strategy(generation_mode=mode))


@pytest.fixture
def furnished() -> dict[str, str]:
    """A project with one of most things, and the headers of a key that may do all."""
    project = builders.make_project()
    builders.make_batch(project)
    ingestion.record(project, formats.incoming(json.dumps(recordings.native("here", scenario_id="s")).encode()))
    builders.make_evaluation(builders.make_model(project))
    owner = builders.make_member(project, Role.APPROVER)
    return builders.bearer(builders.make_key(project, owner=owner)[1])


def ask(client: Client, headers: dict[str, str], case: Made) -> None:
    """Send it; the answer is one that the schema tells of."""
    told = requests.Request(**case.as_transport_kwargs("http://testserver")).prepare()  # type: ignore[arg-type]
    body = told.body.encode() if isinstance(told.body, str) else told.body or b""
    assert isinstance(body, bytes)
    kind = str(told.headers.get("Content-Type", "application/json"))
    answer = client.generic(told.method or "GET", told.path_url, body, content_type=kind, headers=headers)
    raw = answer.getvalue()
    shown = f"{told.method} {told.path_url} {body[:500]!r} → {answer.status_code} {raw[:500]!r}"
    assert answer.status_code < 500, shown
    if told.path_url.startswith("/otel/") and answer.status_code >= 400:
        assert json.loads(raw)["message"], shown  # google.rpc.Status, as OTLP says
    elif answer.status_code >= 400:
        assert answer["Content-Type"] == "application/problem+json", shown
        assert json.loads(raw)["detail"], shown
    else:
        assert str(answer.status_code) in case.operation.definition.raw["responses"], shown


@pytest.mark.parametrize("negative", [False, True])
@QUICK
@given(data=st.data())
def test_no_request_of_the_schema_is_a_500(
    client: Client, furnished: dict[str, str], negative: bool, data: st.DataObject
) -> None:
    ask(client, furnished, data.draw(cases(negative)))


@pytest.mark.slow
@pytest.mark.parametrize("negative", [False, True])
@LONG
@given(data=st.data())
def test_no_request_is_a_500_for_long(
    client: Client, furnished: dict[str, str], negative: bool, data: st.DataObject
) -> None:
    ask(client, furnished, data.draw(cases(negative)))


def test_every_operation_tells_of_keys_and_refusals() -> None:
    for label, operation in operations().items():
        if label != "GET /api/schema/":
            raw = operation.definition.raw
            assert raw["security"] == [{"key": []}, {"keyHeader": []}], label
            assert bool(raw["responses"]["default"]["content"].get("application/problem+json")) != ("/otel/" in label)
