"""The quarantine: what came over OTLP and could not be placed is seen, tried again, or given up."""

import json

import pytest
from django.test import Client

from tests import builders
from tests.trajectories.test_otlp import FIRST, TRACES, chat, export, said, span
from trajectories import otlp
from trajectories.models import OtelRecord, Project, Role, SpanState

pytestmark = pytest.mark.django_db

HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m"


@pytest.fixture
def project() -> Project:
    return builders.make_project("here")


@pytest.fixture
def row(client: Client, project: Project) -> OtelRecord:
    headers = builders.bearer(builders.make_key(project)[1])
    bad = {**chat(1, None, FIRST, said("assistant", HOSTILE)), "traceId": "none", "name": HOSTILE}
    body = json.dumps(export(bad, span(2, None, "fine")))
    assert client.post(TRACES, body, content_type="application/json", headers=headers).status_code == 200
    return OtelRecord.objects.get(state=SpanState.QUARANTINED)


def test_a_span_s_page_says_why_and_shows_what_came_as_text(client: Client, project: Project, row: OtelRecord) -> None:
    client.force_login(builders.make_member(project, Role.RESEARCHER))
    listed = client.get("/admin/trajectories/otelrecord/?state__exact=quarantined")
    page = client.get(f"/admin/trajectories/otelrecord/{row.pk}/change/")

    for answer in (listed, page):
        assert answer.status_code == 200
        assert b"<script>alert(1)" not in answer.content
        assert b"32 hexadecimal digits" in answer.content
    assert b"&lt;script&gt;alert(1)" in page.content
    assert b"do/discard/" in page.content


def test_a_span_is_given_up_with_a_reason(client: Client, project: Project, row: OtelRecord) -> None:
    client.force_login(builders.make_member(project, Role.RESEARCHER))
    url = f"/admin/trajectories/otelrecord/{row.pk}/do/"

    assert b"deleted for good" in client.get(f"{url}discard/").content
    client.post(f"{url}discard/", {"reason": ""})
    row.refresh_from_db()
    assert row.state == SpanState.QUARANTINED
    client.post(f"{url}retry/", {"reason": ""})
    row.refresh_from_db()
    assert row.state == SpanState.QUARANTINED  # it can never be placed
    client.post(f"{url}discard/", {"reason": "a broken sender"})
    row.refresh_from_db()
    assert (row.state, row.data) == (SpanState.DISCARDED, None)
    assert b"a broken sender" in client.get(f"/admin/trajectories/otelrecord/{row.pk}/change/").content


def test_others_do_not_see_it_and_readers_change_nothing(client: Client, project: Project, row: OtelRecord) -> None:
    page = f"/admin/trajectories/otelrecord/{row.pk}/"
    client.force_login(builders.make_member(builders.make_project("there"), Role.RESEARCHER))
    assert client.get(f"{page}do/discard/").status_code in (302, 404)
    client.force_login(builders.make_member(project, Role.READER))
    assert b"do/discard/" not in client.get(f"{page}change/").content
    assert client.post(f"{page}do/discard/", {"reason": "mine"}).status_code == 403
    assert otlp.counts(project).quarantined == 1
