"""The main pages in a real Chromium, light and dark: they load, obey their policy, and ask nobody else.

With SCREENSHOTS=folder the pictures are kept there (`make screenshots`).
"""

import os
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.test import Client
from playwright.sync_api import ConsoleMessage, Page, Request, sync_playwright
from pytest_django.live_server_helper import LiveServer

from tests import builders
from tests.admin.test_walk_admin import furnish
from training.models import Deployment, DeploymentState, Evaluation, RewardJudgment, TrainedModel, TrainingBatch
from trajectories import indexing
from trajectories.models import Group, Project, Role, Trajectory

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PASSWORD = "a-long-enough-one"


@pytest.fixture
def project() -> Project:
    """A project as the walk has it, and a conversation with a tool in it."""
    project = builders.make_project("shop")
    furnish(project, "It refunds within the policy and says so.")
    body = {
        "trajectory_id": "a-conversation",
        "agent_id": "clerk",
        "scenario_id": "refund",
        "group_size": 2,
        "messages": [
            {"role": "system", "content": "You are a clerk. Follow the policy."},
            {"role": "user", "content": "I want my money back for order 17."},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "find_order", "arguments": '{"order": 17}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": '{"order": 17, "paid": 40, "days": 3}'},
            {"role": "assistant", "content": "It is within 30 days, so 40 are on their way back to you."},
        ],
        "reward": 1.0,
    }
    _, key = builders.make_key(project)
    answer = Client().post(
        "/api/v1/trajectories/?format=messages", body, content_type="application/json", headers=builders.bearer(key)
    )
    assert answer.status_code == 201
    indexing.drain(project)
    return project


def sign_in(page: Page, url: str, user: User) -> None:
    user.set_password(PASSWORD)
    user.save()
    page.goto(f"{url}/admin/login/")
    page.fill("#id_username", user.get_username())
    page.fill("#id_password", PASSWORD)
    page.click("input[type=submit]")


def addresses(project: Project) -> dict[str, str]:
    """One page of each kind."""
    mine = {"project": project}
    rows = {
        "trajectory": ("trajectories/trajectory", Trajectory.objects.get(**mine, trajectory_id="a-conversation").pk),
        "group": ("trajectories/group", Group.objects.filter(**mine).order_by("pk")[0].pk),
        "batch": ("training/trainingbatch", TrainingBatch.objects.get(**mine).pk),
        "model": ("training/trainedmodel", TrainedModel.objects.get(**mine, status="ready").pk),
        "evaluation": ("training/evaluation", Evaluation.objects.get(**mine).pk),
        "deployment": ("training/deployment", Deployment.objects.get(**mine).pk),
        "judgment": ("training/rewardjudgment", RewardJudgment.objects.get(**mine).pk),
    }
    found = {"dashboard": "/admin/", "trajectories": "/admin/trajectories/trajectory/"}
    found.update({name: f"/admin/{path}/{pk}/change/" for name, (path, pk) in rows.items()})
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_load_and_ask_nobody_else(scheme: str, chromium: str, live_server: LiveServer, project: Project) -> None:
    user = builders.make_member(project, Role.APPROVER)
    kept = os.environ.get("SCREENSHOTS")
    faults: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type == "error":
            faults.append(f"{message.text} ({message.location})")

    def asked(request: Request) -> None:
        if not request.url.startswith((live_server.url, "data:")):
            faults.append(f"asked {request.url}")

    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"  # Playwright runs a loop in this thread; the ORM is used beside it
    where = addresses(project)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        context = browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light", viewport={"width": 1280, "height": 900}
        )
        page = context.new_page()
        page.on("console", heard)
        page.on("request", asked)
        sign_in(page, live_server.url, user)
        for name, path in where.items():
            answer = page.goto(f"{live_server.url}{path}")
            assert answer is not None
            assert answer.status == 200, path
            if kept:
                page.screenshot(path=Path(kept) / f"{name}-{scheme}.png", full_page=True)
        browser.close()
    assert faults == []


def test_an_approver_turns_a_version_down_by_clicking(chromium: str, live_server: LiveServer, project: Project) -> None:
    user = builders.make_member(project, Role.APPROVER)
    deployment = Deployment.objects.get(project=project)
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page()
        sign_in(page, live_server.url, user)
        page.goto(f"{live_server.url}/admin/training/deployment/{deployment.pk}/change/")
        page.click("text=Reject")
        page.fill("#reason", "worse on refunds")
        page.click("input[type=submit][value=Reject]")
        page.wait_for_selector(".messagelist .success")
        assert "rejected" in page.inner_text(".messagelist")
        browser.close()
    deployment.refresh_from_db()
    assert deployment.state == DeploymentState.REJECTED
