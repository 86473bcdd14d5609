"""A trajectory that runs, watched in the admin; and rewards that change after a batch was frozen."""

import json

import pytest
from django.test import Client
from playwright.sync_api import expect, sync_playwright
from pytest_django.live_server_helper import LiveServer

from tests import builders
from tests.admin.test_in_browser import ARGUMENTS, sign_in
from tests.trajectories import recordings
from training import batch_pages
from training.models import BatchItem
from trajectories import ingestion, rewards, running
from trajectories.formats import incoming_value
from trajectories.history import SYSTEM
from trajectories.models import Project, Role, State, Trajectory
from trajectories.payloads import EndBody, RewardBody, StepsBody, decode
from trajectories.trajectory_pages import STEPS_A_PAGE

URL = "/admin/trajectories/trajectory/"


@pytest.fixture
def project() -> Project:
    return builders.make_project()


def opened(project: Project) -> Trajectory:
    body = recordings.native("run", steps=[], final_status="running", ended_at=None, reward=None)
    ingestion.record(project, incoming_value(body))
    return Trajectory.objects.get()


def append(project: Project, *indexes: int) -> None:
    steps = [recordings.step(index=at, environment_state={"tick": f"tick-{at}."}) for at in indexes]
    running.append_steps(project, "run", decode(json.dumps({"steps": steps}).encode(), StepsBody).steps)


@pytest.mark.django_db
def test_the_page_asks_for_new_steps_while_it_runs(client: Client, project: Project) -> None:
    row = opened(project)
    append(project, 0)
    client.force_login(builders.make_member(project, Role.READER))

    page = client.get(f"{URL}{row.pk}/change/").content.decode()
    assert f'hx-get="{URL}{row.pk}/live/?after=1"' in page
    assert "tick-0." in page
    assert client.get(f"{URL}{row.pk}/live/?after=1").status_code == 204
    append(project, 1, 2)
    part = client.get(f"{URL}{row.pk}/live/?after=1").content.decode()

    assert "tick-0." not in part
    assert part.index("tick-1.") < part.index("tick-2.") < part.index("?after=3")
    assert 'id="facts" hx-swap-oob="true"' in part
    assert "3, 3 (" in part  # steps, calls


@pytest.mark.django_db
def test_it_stops_asking_when_it_has_ended(client: Client, project: Project) -> None:
    row = opened(project)
    append(project, 0, 1)
    running.end(project, "run", EndBody(final_status="completed", reward=0.5))
    client.force_login(builders.make_member(project, Role.READER))

    part = client.get(f"{URL}{row.pk}/live/?after=1").content.decode()
    assert "tick-1." in part
    assert "It has ended: completed" in part
    assert "hx-get" not in part
    last = client.get(f"{URL}{row.pk}/live/?after=2").content.decode()
    assert "tick-1." not in last
    assert "hx-get" not in client.get(f"{URL}{row.pk}/change/").content.decode()


@pytest.mark.django_db
def test_a_long_run_is_opened_where_it_goes_on(client: Client, project: Project) -> None:
    row = opened(project)
    append(project, *range(STEPS_A_PAGE + 5))
    client.force_login(builders.make_member(project, Role.READER))

    page = client.get(f"{URL}{row.pk}/change/").content.decode()
    assert f"tick-{STEPS_A_PAGE + 4}." in page
    assert "tick-0." not in page
    assert "hx-get" not in client.get(f"{URL}{row.pk}/change/?step=0").content.decode()


@pytest.mark.django_db
def test_only_members_may_watch(client: Client, project: Project) -> None:
    row = opened(project)
    append(project, 0)
    client.force_login(builders.make_member(builders.make_project(), Role.OPERATOR))

    answer = client.get(f"{URL}{row.pk}/live/?after=0")
    assert answer.status_code in (302, 403, 404)
    assert b"tick-0." not in answer.content


@pytest.mark.browser
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_new_steps_appear_by_themselves(
    scheme: str, chromium: str, live_server: LiveServer, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    user = builders.make_member(project, Role.READER)
    row = opened(project)
    faults: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_context(color_scheme="dark" if scheme == "dark" else "light").new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        sign_in(page, live_server.url, user)
        page.goto(f"{live_server.url}{URL}{row.pk}/change/")
        expect(page.locator("#live")).to_contain_text("New steps appear here")
        append(project, 0)
        expect(page.locator("#step-0")).to_contain_text("tick-0.")
        append(project, 1, 2)
        expect(page.locator("#step-2")).to_contain_text("tick-2.")
        expect(page.locator("article.step")).to_have_count(3)
        running.end(project, "run", EndBody(final_status="completed", reward=0.25))
        expect(page.locator("#live")).to_contain_text("It has ended: completed")
        expect(page.locator("#facts")).to_contain_text("0.25")
        expect(page.locator("article.step")).to_have_count(3)
        browser.close()
    assert faults == []


@pytest.mark.django_db
def test_a_run_that_timed_out_is_judged_by_what_came(project: Project) -> None:
    row = opened(project)
    append(project, 0, 1)
    before = row.quality
    Trajectory.objects.update(last_step_at=row.received_at.replace(year=2020))

    assert running.time_out() == 1
    row.refresh_from_db()
    assert (row.state, row.n_steps) == (State.TIMED_OUT, 2)
    assert row.quality > before
    assert any(one["detail"] == "it ended as timeout" for one in row.findings)
    assert not any(one["check"] == "has_steps" for one in row.findings)


# --- rewards that change later -------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_reward_that_changed_since_is_said_on_both_pages(client: Client, project: Project) -> None:
    group = builders.make_group(project, (0.0, 1.0))
    batch = builders.make_batch(project, status="completed", groups=(group,))
    for item in batch.items.all():
        item.parts = {"recorded": {"raw": item.reward, "standardised": 0.0, "weight": 1.0}}
        item.save()
    changed, same = group.trajectories.order_by("pk")
    client.force_login(builders.make_member(project, Role.READER))
    assert batch_pages.changed_rewards(batch) == []
    assert "changed since" not in client.get(f"{URL}{changed.pk}/change/").content.decode()

    body = RewardBody(reward=0.75, source="shop", reason="paid after all")
    rewards.change(project, changed.trajectory_id, body, by=SYSTEM)

    said = client.get(f"{URL}{changed.pk}/change/").content.decode()
    assert "<strong>Reward changed since</strong>: 0.0 in the batch, 0.75 now" in said
    assert "paid after all" in said
    assert "changed since" not in client.get(f"{URL}{same.pk}/change/").content.decode()
    page = client.get(f"/admin/training/trainingbatch/{batch.pk}/change/").content.decode()
    assert "Reward changed since it was frozen" in page
    assert "1 of 2 trajectories" in page
    assert "Steps 0 to" not in said  # its payload is gone: that is said, and not that it had none
    assert "The payload cannot be read" in said and "No steps are recorded" not in said
    assert [(one.trajectory_ref, one.was, one.now) for one in batch_pages.changed_rewards(batch)] == [
        (changed.trajectory_id, 0.0, 0.75)
    ]
    assert BatchItem.objects.get(trajectory=changed).reward == 0.0  # what was frozen stays

    rewards.change(project, changed.trajectory_id, RewardBody(reward=None, source="shop"), by=SYSTEM)
    assert "0.0 in the batch, unknown now" in client.get(f"{URL}{changed.pk}/change/").content.decode()
