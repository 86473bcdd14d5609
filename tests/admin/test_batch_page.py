"""A batch's page: what went in, what it was worth, how the training goes, and who may stop it."""

from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from tests import builders
from tests.admin.test_walk_admin import ESCAPED, HOSTILE
from training import batch_pages, batches, policies, selection, shim
from training.models import BatchGroup, RunMetric, TrainingBatch
from trajectories import history
from trajectories.history import SYSTEM
from trajectories.models import Project, Role, Trajectory

pytestmark = pytest.mark.django_db
MOST_QUERIES = 12


def sign_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def address(batch: TrainingBatch, what: str = "change") -> str:
    return f"/admin/training/trainingbatch/{batch.pk}/{what}/"


def read(user: User, page: str) -> str:
    response = sign_in(user).get(page)
    assert response.status_code == 200
    return response.content.decode()


def frozen(project: Project, n_groups: int = 2, status: str = "completed") -> TrainingBatch:
    """With items whose parts are as the mix leaves them."""
    groups = tuple(builders.make_group(project, (0.0, 0.25, 1.0), policy_minor=1) for _ in range(n_groups))
    batch = builders.make_batch(project, status=status, groups=groups, reward_mix={"recorded": 1.0})
    for item in batch.items.all():
        item.parts = {"recorded": {"raw": item.reward, "standardised": 0.0, "weight": 1.0}}
        item.save()
    return batch


def test_what_went_in_is_told_before_and_after_the_mix() -> None:
    project = builders.make_project()
    batch = frozen(project)
    item = batch.items.all()[0]
    item.is_trained, item.why_not = False, "cut at the token limit"
    item.save()
    Trajectory.objects.filter(pk__in=batch.items.values("trajectory")[:2]).update(fidelity="exact")
    BatchGroup.objects.create(
        batch=batch, scenario_ref="s", behaviour="v1.0.0", is_used=False, left_out=selection.NO_SPREAD, n=4
    )
    went = batch_pages.batch_page(TrainingBatch.objects.get(pk=batch.pk)).went_in
    assert (went.n, went.n_trained) == (6, 5)
    assert list(went.why_not) == [("cut at the token limit", 1)]
    assert [(one.name, one.n, one.low, one.high) for one in went.sources] == [("recorded", 6, 0.0, 1.0)]
    assert [(one.name, one.n) for one in went.fidelity] == [("exact", 2), ("text", 4)]
    assert sum(int(bar.label.rpartition(" ")[2]) for bar in went.advantages) == 6
    page = read(builders.make_member(project), address(batch))
    for words in (
        "before the mix",
        "after the mix",
        "advantages, as trained",
        selection.NO_SPREAD,
        'data-copy="000000',
    ):
        assert words in page


def test_the_age_of_who_played_is_counted_from_the_parent() -> None:
    project = builders.make_project()
    builders.make_model(project)
    parent = builders.make_model(project)
    batch = frozen(project)
    TrainingBatch.objects.filter(pk=batch.pk).update(parent=parent)
    (played,) = batch_pages.batch_page(TrainingBatch.objects.get(pk=batch.pk)).went_in.behaviours
    assert (played.name, played.n, played.age) == ("v1.0.0", 6, 1)
    assert "1 version<" in read(builders.make_member(project), address(batch))


def test_its_life_has_the_time_in_each_state() -> None:
    project = builders.make_project()
    batch = frozen(project, status="failed")
    for was, to in (("", "pending"), ("pending", "preparing"), ("preparing", "failed")):
        history.record(batch, was, to, project=project, by=SYSTEM, reason="no groups" if to == "failed" else "")
    life = batch_pages.live_part(batch).life
    assert [one.label for one in life] == ["pending", "preparing", "failed"]
    assert life[-1].seconds == 0.0
    assert life[-1].reason == "no groups"


def test_the_page_asks_for_as_much_however_large_the_batch() -> None:
    project = builders.make_project()
    policies.of(project)
    small, large = frozen(project, 1), frozen(project, 12)
    for batch in (small, large):
        parent = builders.make_model(project)
        TrainingBatch.objects.filter(pk=batch.pk).update(parent=parent)
        run = builders.make_run(batch, status="succeeded", step=2)
        RunMetric.objects.create(run=run, step=1, values={"loss": 1.0}, at=timezone.now())
        builders.make_model(project, batch=batch, run=run)
    client = sign_in(builders.make_member(project, Role.OPERATOR))
    asked = []
    for page in (address(small), address(large), address(large, "live")):
        with CaptureQueriesContext(connection) as queries:
            assert client.get(page).status_code == 200
        asked.append(len(queries))
    assert asked[1] <= asked[0] <= MOST_QUERIES
    assert asked[2] <= 8


def test_a_batch_without_anything_says_what_happens_next() -> None:
    project = builders.make_project()
    batch = builders.make_batch(project, frozen_at=None, manifest_hash="")
    page = read(builders.make_member(project), address(batch))
    for words in ("No groups yet", "Not trained yet", "not frozen yet", "Plots appear with the first step"):
        assert words in page


# --- while it trains -------------------------------------------------------------------------------------------------


def test_the_live_part_asks_again_while_it_trains_and_reloads_the_page_when_it_ends() -> None:
    project = builders.make_project()
    batch = builders.make_batch(project, status="training")
    run = builders.make_run(batch, status="running", step=2, total_steps=8, seconds_per_step=30.0)
    for step in (1, 2):
        values = {"reward_mean": 0.5, "loss": 1.0, "kl_behaviour": 0.1, "entropy": 1.0, "grad_norm": 1.0}
        RunMetric.objects.create(run=run, step=step, values=values, at=timezone.now())
    client = sign_in(builders.make_member(project))
    live = client.get(address(batch, "live"))
    text = live.content.decode()
    for words in ('hx-trigger="every 3s"', "about 3 min to go", "entropy", "gradient norm", "KL to the behaviour"):
        assert words in text
    assert "HX-Refresh" not in live.headers
    TrainingBatch.objects.filter(pk=batch.pk).update(status="failed")
    ended = client.get(address(batch, "live"))
    assert ended.headers["HX-Refresh"] == "true"
    assert "hx-get" not in ended.content.decode()
    running = client.get(f"/admin/training/trainingrun/{run.pk}/live/").content.decode()
    assert "step 2 of 8" in running


def test_the_log_is_read_from_its_end_and_its_controls_are_made_visible(tmp_path: Path) -> None:
    project = builders.make_project()
    batch = builders.make_batch(project, status="training")
    run = builders.make_run(batch, status="running", folder=str(tmp_path))
    lines = ["the first line", *("x" * 1000 for _ in range(500)), f"{HOSTILE}\x00", "y" * 10_000]
    (tmp_path / shim.LOG).write_text("\n".join(lines))
    found = batch_pages.log_of(run)
    assert "the first line" not in found
    assert sum(len(one) for one in found) <= batch_pages.LOG_BYTES
    assert found[-1].endswith("8,000 more characters")
    page = read(builders.make_member(project), f"/admin/training/trainingrun/{run.pk}/change/")
    assert ESCAPED in page
    assert "\x1b" not in page
    assert "␛[31m" in page


def test_a_log_that_is_not_on_this_machine_is_as_the_run_kept_it() -> None:
    run = builders.make_run(builders.make_batch(status="failed"), status="failed", log_tail="the last words")
    assert batch_pages.log_of(run) == ["the last words"]
    assert batch_pages.log_of(builders.make_run(builders.make_batch())) == []


def test_of_a_long_run_every_nth_step_is_drawn() -> None:
    run = builders.make_run(builders.make_batch(status="training"), status="running", step=3 * batch_pages.STEPS)
    RunMetric.objects.bulk_create(
        RunMetric(run=run, step=step, values={"loss": 1.0}, at=timezone.now())
        for step in range(1, 3 * batch_pages.STEPS + 1)
    )
    (plot,) = batch_pages.curves(run, 0.2)
    assert len(plot.points.split()) == batch_pages.STEPS


# --- who may ---------------------------------------------------------------------------------------------------------


def test_a_reader_sees_no_buttons_and_another_project_nothing() -> None:
    project = builders.make_project()
    batch = builders.make_batch(project, status="training")
    run = builders.make_run(batch, status="running")
    reader, outsider = builders.make_member(project), builders.make_member(builders.make_project(), Role.OPERATOR)
    assert "/do/" not in read(reader, address(batch))
    assert sign_in(reader).post(address(batch, "do/cancel"), {"reason": "x"}).status_code == 403
    for page in (address(batch, "live"), address(batch, "do/cancel"), f"/admin/training/trainingrun/{run.pk}/live/"):
        assert sign_in(outsider).get(page).status_code == 404


def test_cancelling_asks_first_and_the_second_is_told() -> None:
    project = builders.make_project()
    batch = builders.make_batch(project, status="pending", frozen_at=None)
    researcher = builders.make_member(project, Role.RESEARCHER)
    assert "../do/cancel/" in read(researcher, address(batch))
    assert "cannot be resumed" in read(researcher, address(batch, "do/cancel"))
    batches.cancel(TrainingBatch.objects.get(pk=batch.pk), by=SYSTEM)
    told = sign_in(researcher).post(address(batch, "do/cancel"), {"reason": "too late"}, follow=True)
    assert b"is cancelled, so it cannot become cancelled" in told.content


def test_hostile_words_are_shown_as_words() -> None:
    project = builders.make_project()
    batch = builders.make_batch(project, status="failed", error=HOSTILE, purpose=HOSTILE[:40])
    builders.make_run(batch, status="failed", error=HOSTILE, log_tail=HOSTILE)
    page = read(builders.make_member(project), address(batch))
    assert ESCAPED in page
    assert "<script>alert" not in page
