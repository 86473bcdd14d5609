"""Keys, copying and the dialog of keys, in a real Chromium."""

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, sync_playwright
from pytest_django.live_server_helper import LiveServer

from tests import builders
from tests.admin.test_in_browser import ARGUMENTS, sign_in
from trajectories.models import Project, Role, Trajectory

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

LIST = "/admin/trajectories/trajectory/"


@pytest.fixture
def project() -> Project:
    project = builders.make_project("shop")
    for _ in range(3):
        builders.make_trajectory(project)
    return project


@pytest.fixture
def page(chromium: str, live_server: LiveServer, project: Project) -> Iterator[Page]:
    user = builders.make_member(project, Role.RESEARCHER)
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        page = context.new_page()
        sign_in(page, live_server.url, user)
        yield page
        browser.close()


def test_keys_walk_a_list_and_open_a_row(page: Page, live_server: LiveServer, project: Project) -> None:
    page.goto(live_server.url + LIST)
    newest = Trajectory.objects.filter(project=project).order_by("-pk")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert str(newest[1]) in page.inner_text("tr.here")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{newest[1].pk}/change/**")


def test_a_slash_goes_to_the_search_and_letters_typed_there_stay_letters(page: Page, live_server: LiveServer) -> None:
    page.goto(live_server.url + LIST)
    page.keyboard.press("/")
    page.keyboard.type("jk?/")
    assert page.input_value("#searchbar") == "jk?/"
    assert not page.is_visible("dialog#keys")


def test_a_question_mark_shows_the_keys_and_escape_closes_them(page: Page, live_server: LiveServer) -> None:
    page.goto(live_server.url + LIST)
    page.keyboard.press("?")
    assert page.is_visible("dialog#keys")
    page.keyboard.press("Escape")
    assert not page.is_visible("dialog#keys")
    page.click("button[data-opens=keys]")
    assert page.is_visible("dialog#keys")


def test_without_javascript_a_list_works_and_offers_no_dead_button(
    chromium: str, live_server: LiveServer, project: Project
) -> None:
    user = builders.make_member(project, Role.READER)
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_context(java_script_enabled=False).new_page()
        sign_in(page, live_server.url, user)
        page.goto(live_server.url + LIST)
        assert page.locator("#result_list tbody tr").count() == 3
        assert not page.is_visible("button[data-opens=keys]")
        page.locator("#result_list tbody tr th a").first.click()
        page.wait_for_url("**/change/**")
        browser.close()
