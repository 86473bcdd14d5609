"""The admin in a real Chromium: every page, light and dark, and the paths of those who use it.

No page may have an error in its console, a violation of its policy, a request to another host, or a serious fault of
accessibility. With SCREENSHOTS=folder the pictures are kept there (`make screenshots`).
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Literal, Protocol

import pytest
from django.contrib.auth.models import User
from django.db.models import Model
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright
from pytest_django.live_server_helper import LiveServer
from typing_extensions import TypedDict

from tests import builders
from tests.admin.test_walk_admin import nouns, rows_of
from tests.admin.world import shop
from training.models import Deployment, DeploymentState, TrainedModel, TrainingBatch
from trajectories.models import Group, Membership, Project, Role, SavedView, Trajectory

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
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()
LIST = "/admin/trajectories/trajectory/"


class SignedIn(Protocol):
    def __call__(
        self, user: User, *, scheme: Scheme = "light", refusals: bool = False, javascript: bool = True
    ) -> Page: ...


@pytest.fixture
def project() -> Project:
    project = builders.make_project("shop", name="The shop", listed_metrics=["turns"])
    shop(project)
    return project


@pytest.fixture
def browser(chromium: str) -> Iterator[Browser]:
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"  # Playwright runs a loop in this thread; the ORM is used beside it
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield found
        found.close()


@contextmanager
def watched(context: BrowserContext, url: str, *, refusals: bool = False) -> Iterator[None]:
    """Nothing in a console, no request to another host, while the pages of a context are open.

    Args:
        refusals: a page that is refused is part of the path: Chromium writes its status to the console.
    """
    faults: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        refused = refusals and "the server responded with a status of 40" in message.text
        ours = bool(message.location["url"])  # and not axe's, which sets styles that the policy blocks
        if message.type in ("error", "warning") and ours and not refused:
            faults.append(f"{message.text} ({message.location})")

    def asked(request: Request) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            faults.append(f"asked {request.url}")

    context.on("console", heard)
    context.on("request", asked)
    context.on("weberror", lambda error: faults.append(str(error.error)))
    yield
    assert not faults, "\n".join(faults)


def sign_in(page: Page, url: str, user: User) -> None:
    user.set_password(PASSWORD)
    user.save()
    page.goto(f"{url}/admin/login/")
    page.fill("#id_username", user.get_username())
    page.fill("#id_password", PASSWORD)
    page.click("input[type=submit]")


@pytest.fixture
def walk(browser: Browser, live_server: LiveServer) -> Iterator[SignedIn]:
    """A page of somebody who signed in, in a context that is watched."""
    with ExitStack() as stack:

        def signed_in(user: User, *, scheme: Scheme = "light", refusals: bool = False, javascript: bool = True) -> Page:
            context = browser.new_context(
                base_url=live_server.url,
                viewport={"width": 1280, "height": 900},
                color_scheme=scheme,
                java_script_enabled=javascript,
            )
            stack.callback(context.close)
            stack.enter_context(watched(context, live_server.url, refusals=refusals))
            page = context.new_page()
            sign_in(page, live_server.url, user)
            return page

        yield signed_in


# --- every page ------------------------------------------------------------------------------------------------------


def addresses(project: Project) -> dict[str, str]:
    """Every list, a page of each noun, what asks before it does, and what stands beside: name → path."""
    found = {"dashboard": "/admin/", "password": "/admin/password_change/"}
    for model, model_admin in nouns():
        noun = str(model._meta.model_name)
        at = f"/admin/{model._meta.app_label}/{noun}/"
        found[f"{noun}-list"] = at
        if rows := rows_of(model, model_admin, project):
            found[noun] = f"{at}{chosen(rows).pk}/change/"
    conversation = Trajectory.objects.get(project=project, trajectory_id="refund-3").pk
    group = Group.objects.filter(project=project).order_by("pk")[0]
    one, other = group.trajectories.order_by("pk").values_list("pk", flat=True)[:2]
    batches, models = TrainingBatch.objects.filter(project=project), TrainedModel.objects.filter(project=project)
    done, live = batches.filter(status="completed")[1], batches.get(status="training")
    ready = models.get(status="ready")
    few = "reward_min=0.5&agent=clerk&o=-reward&col=agent&col=reward_shown&col=metric.turns"
    found |= {
        "trajectory": f"{LIST}{conversation}/change/",
        "trajectory-list-narrowed": f"{LIST}?{few}",
        "trajectory-none": f"{LIST}?agent=nobody",
        "trajectory-search": f"{LIST}search/?q=within+30+days",
        "trajectory-search-none": f"{LIST}search/?q=zeppelin",
        "trajectory-export": f"{LIST}export/",
        "trajectory-exclude": f"{LIST}{conversation}/do/exclude/",
        "group": f"/admin/trajectories/group/{group.pk}/change/",
        "group-diff": f"/admin/trajectories/group/{group.pk}/change/?left={one}&right={other}",
        "trainingbatch": f"/admin/training/trainingbatch/{done.pk}/change/",
        "trainingbatch-live": f"/admin/training/trainingbatch/{live.pk}/change/",
        "trainedmodel": f"/admin/training/trainedmodel/{ready.pk}/change/",
    }
    return found


def chosen(rows: list[Model]) -> Model:
    """The one whose page has most to show."""
    return max(rows, key=lambda row: row.pk)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_page_is_whole_and_accessible(scheme: Scheme, walk: SignedIn, project: Project) -> None:
    user = builders.make_member(project, Role.OPERATOR, name="researcher")
    Membership.objects.create(project=project, user=user, role=Role.APPROVER)
    kept = os.environ.get("SCREENSHOTS")
    faults: list[str] = []
    page = walk(user, scheme=scheme)
    for name, path in addresses(project).items():
        answer = page.goto(path)
        assert answer is not None
        assert answer.status == 200, path
        faults += [f"{name}: {one}" for one in serious(page)]
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            faults.append(f"{name} is {wide} pixels too wide")
        if kept:
            page.screenshot(path=Path(kept) / f"{name}-{scheme}.png", full_page=True)
    assert not faults, "\n".join(faults)


class Node(TypedDict):
    target: list[str]
    html: str


class Violation(TypedDict):
    id: str
    help: str
    impact: str
    nodes: list[Node]


def serious(page: Page) -> list[str]:
    """What axe-core finds serious or critical on the page."""
    page.evaluate(AXE)
    options = "{resultTypes: ['violations'], preload: false}"
    found: list[Violation] = page.evaluate(f"axe.run({options}).then(found => found.violations)")
    return [
        f"{one['id']}: {one['help']} ({len(one['nodes'])}×, {first['target']} {first['html'][:160]})"
        for one in found
        if one["impact"] in ("serious", "critical")
        for first in one["nodes"][:1]
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_whoever_is_not_signed_in_gets_a_page_that_is_whole(
    scheme: Scheme, browser: Browser, live_server: LiveServer
) -> None:
    context = browser.new_context(color_scheme=scheme)
    with watched(context, live_server.url):
        page = context.new_page()
        page.goto(f"{live_server.url}/admin/trajectories/group/")
        assert "/admin/login/" in page.url
        assert serious(page) == []
        if kept := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(kept) / f"login-{scheme}.png", full_page=True)
    context.close()


# --- a researcher ----------------------------------------------------------------------------------------------------


def test_a_researcher_narrows_the_list_keeps_it_and_reads(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_member(project, Role.RESEARCHER))
    page.goto("/admin/")
    page.get_by_role("link", name="Record", exact=True).click()
    page.locator("summary", has_text="Filters").click()
    page.get_by_role("combobox", name="agent", exact=True).press_sequentially("night-", delay=60)
    expect(page.locator("#choices-agent option")).to_have_count(1)
    expect(page.locator("#choices-agent option")).to_have_attribute("value", "night-clerk")
    page.get_by_role("combobox", name="agent", exact=True).fill("night-clerk")
    page.get_by_label("reward from", exact=True).fill("0.2")
    page.locator("details[open] input[type=submit]").click()
    assert page.url.endswith("?agent=night-clerk&reward_min=0.2"), "empty fields stay out of the address"
    expect(page.locator("ul.active li")).to_have_count(2)

    page.locator("summary", has_text="Columns").click()
    page.get_by_label("models", exact=True).check()
    page.locator("details[open] input[type=submit]").click()
    expect(page.locator("th.column-models_shown")).to_be_visible()
    page.locator("summary", has_text="Keep as a view").click()
    page.get_by_label("Name").fill("at night")
    page.get_by_role("button", name="Keep").click()
    expect(page.locator(".messagelist")).to_contain_text("The view 'at night' is kept.")
    assert SavedView.objects.get().query.startswith("agent=night-clerk&col=")

    expected = [one.get_attribute("title") for one in page.locator("#result_list th .id").all()]
    assert len(expected) > 3
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.locator("h1, h2").first).to_contain_text(str(expected[0]))
    page.keyboard.press("j")  # the next one of the list, not of the table
    expect(page.locator("#content")).to_contain_text(str(expected[1]))
    page.keyboard.press("k")
    expect(page.locator("#content")).to_contain_text(str(expected[0]))


def test_a_researcher_searches_opens_the_step_and_folds_out_the_policy(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_member(project, Role.RESEARCHER))
    page.goto(LIST)
    page.get_by_role("link", name="Search in what was said").click()
    page.locator("#content input[name=q]").fill('"within 30 days" card')
    page.keyboard.press("Enter")
    expect(page.locator("mark").first).to_be_visible()
    page.locator("a[href*='step=']").first.click()
    assert re.search(r"#step-\d+$", page.url)
    page.goto(page.url.partition("?")[0])
    folded = page.locator("details", has=page.locator("summary", has_text="You are a clerk of a shop")).first
    assert folded.get_attribute("open") is None
    folded.locator("summary").first.click()
    expect(folded).to_have_attribute("open", "")
    with page.expect_navigation():
        page.get_by_role("link", name="JSON", exact=True).first.click()
    assert "/raw/" in page.url


def test_a_researcher_compares_attempts_and_decides_about_them(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_member(project, Role.RESEARCHER))
    group = Group.objects.filter(project=project).order_by("pk")[0]
    page.goto(f"/admin/trajectories/group/{group.pk}/change/")
    expect(page.locator("#content")).to_contain_text("advantage")
    page.get_by_role("link", name="Judge again").first.click()
    page.fill("#reason", "the rubric has changed")
    page.get_by_role("button", name="Judge again").click()
    expect(page.locator(".messagelist")).to_contain_text("waits for its judges")
    group.refresh_from_db()
    assert group.judging == "pending"


def test_a_researcher_excludes_all_that_match_and_takes_it_back(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_member(project, Role.RESEARCHER))
    page.goto(f"{LIST}?scenario=refund")
    page.check("#action-toggle")
    page.select_option("select[name=action]", label="Exclude")
    page.get_by_role("button", name="Go").click()
    expect(page.locator("#content")).to_contain_text("8")
    page.fill("[name=reason]", "the till was broken")
    page.locator("#content input[type=submit], #content button[type=submit]").first.click()
    expect(page.locator(".messagelist")).to_contain_text("8 trajectories are excluded")
    assert Trajectory.objects.filter(project=project, is_excluded=True).count() == 8
    page.goto("/admin/trajectories/bulkaction/")
    page.locator("#result_list tbody tr").first.locator("th a").click()
    page.get_by_role("link", name="Take back").click()
    page.locator("#content input[type=submit]").first.click()
    expect(page.locator(".messagelist")).to_contain_text("takes back")
    assert Trajectory.objects.filter(project=project, is_excluded=True).count() == 0


def test_keys_work_and_leave_alone_who_types(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_member(project, Role.RESEARCHER))
    page.goto(LIST)
    page.keyboard.press("?")
    expect(page.locator("dialog#keys")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("jk?")
    expect(page.locator("#searchbar")).to_have_value("jk?")
    expect(page.locator("dialog#keys")).not_to_be_visible()


# --- an approver -----------------------------------------------------------------------------------------------------


def test_an_approver_finds_what_waits_and_turns_it_down(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_member(project, Role.APPROVER, name="ann"))
    deployment = Deployment.objects.get(project=project)
    page.goto("/admin/")
    page.locator(f"a[href*='/admin/training/deployment/{deployment.pk}/']").first.click()
    expect(page.locator("#content")).to_contain_text("It asks less often twice.")
    page.click("text=Reject")
    page.fill("#reason", "worse on refunds")
    page.click("input[type=submit][value=Reject]")
    expect(page.locator(".messagelist .success")).to_contain_text("rejected")
    deployment.refresh_from_db()
    assert deployment.state == DeploymentState.REJECTED


def test_the_second_of_two_approvers_is_told(walk: SignedIn, project: Project) -> None:
    deployment = Deployment.objects.get(project=project)
    reject = f"/admin/training/deployment/{deployment.pk}/do/reject/"
    first = walk(builders.make_member(project, Role.APPROVER, name="ann"))
    second = walk(builders.make_member(project, Role.APPROVER, name="ben"), refusals=True)
    for page in (first, second):
        page.goto(reject)
        page.fill("#reason", "worse on refunds")
    first.click("input[type=submit][value=Reject]")
    expect(first.locator(".messagelist .success")).to_contain_text("rejected")
    second.click("input[type=submit][value=Reject]")
    expect(second.locator(".messagelist")).to_contain_text("already")


def test_a_version_leads_down_to_what_it_learned_from(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_member(project, Role.APPROVER))
    model = TrainedModel.objects.get(project=project, status="ready")
    page.goto(f"/admin/training/trainedmodel/{model.pk}/change/")
    expect(page.locator("#content")).to_contain_text("better on")
    page.locator("#content a[href*='/admin/training/trainingbatch/']").first.click()
    page.locator("#content a[href*='/admin/trajectories/group/']").first.click()
    page.locator("#content a[href*='/admin/trajectories/trajectory/']").first.click()
    expect(page.locator("#content")).to_contain_text("You are a clerk of a shop")


# --- who may not -----------------------------------------------------------------------------------------------------


def test_a_reader_sees_everything_and_is_offered_nothing_that_changes_it(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_member(project, Role.READER), refusals=True)
    row = Trajectory.objects.get(project=project, trajectory_id="refund-3")
    page.goto(f"{LIST}{row.pk}/change/")
    expect(page.locator("#content")).to_contain_text("refund-3")
    assert page.locator("a[href*='/do/']").count() == 0
    for noun in ("trajectories/group", "training/deployment", "training/trainingbatch", "training/trainedmodel"):
        page.goto(f"/admin/{noun}/")
        page.locator("#result_list tbody tr").first.locator("a").first.click()
        assert page.locator("a[href*='/do/']").count() == 0, noun
    answer = page.goto(f"{LIST}{row.pk}/do/exclude/")
    assert answer is not None
    assert answer.status == 403


def test_an_outsider_finds_an_empty_site_and_no_page_of_another_project(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_member(builders.make_project("elsewhere"), Role.OPERATOR), refusals=True)
    for name, path in addresses(project).items():
        if re.search(r"/\d+/", path):
            answer = page.goto(path)
            assert answer is not None
            assert answer.status == 404, name
    page.goto(LIST)
    expect(page.locator("#content")).to_contain_text("No trajectories yet.")


def test_whoever_has_no_project_is_told_what_to_do(walk: SignedIn, project: Project) -> None:
    page = walk(builders.make_user("nobody"))
    page.goto("/admin/")
    assert page.locator("#content").inner_text().strip() != ""
    assert "shop" not in page.content()


# --- without JavaScript ----------------------------------------------------------------------------------------------


def test_everything_but_live_parts_works_without_javascript(walk: SignedIn, project: Project) -> None:
    user = builders.make_member(project, Role.RESEARCHER)
    page = walk(user, javascript=False)
    for name, path in addresses(project).items():
        answer = page.goto(path)
        assert answer is not None
        assert answer.status in (200, 403), name
    page.goto(LIST)
    page.locator("summary", has_text="Filters").click()
    page.get_by_role("combobox", name="scenario", exact=True).fill("refund")
    page.locator("details[open] input[type=submit]").click()
    expect(page.locator("#result_list tbody tr")).to_have_count(8)
    page.locator("#result_list tbody th a").first.click()
    page.locator("a[rel=next]").first.click()
    expect(page.locator("#content")).to_contain_text("refund-6")
    page.locator("summary", has_text="You are a clerk").first.click()
    expect(page.locator("details[open]").first).to_contain_text("never promise")
