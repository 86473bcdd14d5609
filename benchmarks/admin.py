"""The admin at a hundred thousand and at a million trajectories: every list, order, filter and page, and how it grows.

    python -m benchmarks.admin [ROWS …]        default 100000 1000000; 5000 20000 to try it

Rows are made by the database (`insert … select generate_series`, with payloads of 1.5 to 3.5 kB), small nouns and the
trajectories whose pages are opened are real. A page is a request through the whole of Django in this process, by a
researcher of one project; p50 and p95 are of `TIMES` requests. The floor, in the same run, is the site's smallest page
with a frame (the list of projects): what no page can be faster than. Targets are milliseconds on two quiet cores; on a
noisy machine the ratio to the floor and the growth count.
"""

import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.site import site

if TYPE_CHECKING:
    from django.db.models import Model
    from django.test import Client

    from trajectories.listing import Ordering
    from trajectories.models import Project

SIZES = (100_000, 1_000_000)
TIMES = 21
SEARCHED = 100_000  # trajectories that have a search text
ATTEMPTS = 8  # of a group
QUERIES = 12  # on a page, at most
PAYLOAD = ("trajectory_segments", "search_texts")  # tables that no list reads

LIST_MS, PAGE_MS, BOARD_MS, GROUP_MS, SEARCH_MS = 150, 150, 200, 300, 500


# --- rows ------------------------------------------------------------------------------------------------------------


def fill(model: "type[Model]", low: int, high: int, /, **columns: str) -> None:
    """A row for each number from low to high, by SQL over `n`; columns that are not named have their defaults."""
    from django.db import connection
    from django.db.models.fields import NOT_PROVIDED

    values: dict[str, str] = {}
    told: list[str] = []
    for one in model._meta.local_concrete_fields:
        column = str(one.column)
        if one.name in columns:
            values[column] = columns[one.name]
        elif not (one.primary_key or one.null or one.db_default is not NOT_PROVIDED):
            values[column] = "%s"
            told.append(one.get_db_prep_save(one.get_default(), connection))
    names = ", ".join(f'"{name}"' for name in values)
    table = model._meta.db_table
    with connection.cursor() as cursor:
        step = 100_000
        for begin in range(low, high + 1, step):
            cursor.execute(
                f"insert into {table} ({names}) select {', '.join(values.values())} "
                f"from generate_series({begin}, {min(high, begin + step - 1)}) as n",
                told,
            )
        if "id" in columns:
            cursor.execute(f"select setval(pg_get_serial_sequence('{table}', 'id'), (select max(id) from {table}))")


def grow(project: "Project", rows: int) -> None:
    """Up to so many trajectories. What is there stays: the newest are the last."""
    from django.db import connection, transaction

    from training import boards, readiness
    from training.models import JudgeCall, RewardJudgment
    from trajectories import arrivals
    from trajectories.models import (
        Agent,
        Group,
        LlmCallLog,
        MetricValue,
        RewardChange,
        Scenario,
        StateChange,
        Trajectory,
        TrajectorySegment,
    )

    began = time.perf_counter()
    first = (Trajectory.objects.order_by("-id").values_list("id", flat=True).first() or 0) + 1
    last = first + rows - Trajectory.objects.count() - 1
    mine = str(project.pk)
    if not Agent.objects.filter(pk=1001).exists():
        fill(Agent, 1001, 1040, id="n", project=mine, agent_id="'agent-' || n")
    low, high = Group.objects.filter(pk__gte=10_000).count(), last // ATTEMPTS + 1
    known = Scenario.objects.filter(pk__gte=10_000).count()
    fill(
        Scenario, 10_000 + known, 10_000 + high // 2 + 1,
        id="n", project=mine, scenario_id="'day-' || n", description="'Buy or sell.'",
        split="case when n %% 10 = 0 then 'held_out' else 'train' end",
    )  # fmt: skip
    fill(
        Group, 10_000 + low, 10_000 + high,
        id="n", project=mine, scenario="10000 + (n - 10000) / 2", behaviour="'v1.0.' || n %% 12", cohort="'#' || n",
        state="'closed'", judging="case when n %% 3 = 0 then 'pending' else 'judged' end", n=str(ATTEMPTS),
        n_trainable=str(ATTEMPTS), reward_n=str(ATTEMPTS), reward_min="0", reward_max="(n %% 5) / 4.0",
        reward_sum="n %% 8", judged_n="case when n %% 3 = 0 then 0 else 8 end", quality_sum="6.5",
        policy_minor="n %% 12", last_received_at="now()",
    )  # fmt: skip
    late = f"(now() - ({last} - n) * interval '20 seconds')"
    fill(
        Trajectory, first, last,
        id="n", project=mine, trajectory_id="'run-' || lpad(n::text, 9, '0')", agent="1001 + (n * 7) %% 40",
        scenario=f"10000 + (n / {ATTEMPTS}) / 2", group=f"10000 + n / {ATTEMPTS}",
        window=f"to_char({late} at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:00')",
        started_at=late, ended_at=f"{late} + interval '40 seconds'", received_at=late,
        final_status="case when n %% 50000 = 0 then 'timeout' when n %% 9 = 0 then 'agent_error' else 'completed' end",
        is_excluded="n %% 997 = 0", is_evaluation="n %% 10 = 0",
        reward="case when n %% 20 = 0 then null else round((hashint8(n)::float8 / 2147483648)::numeric, 3) end",
        origin="'own'", behaviour=f"'v1.0.' || (n / {ATTEMPTS}) %% 12", model_names="array['tiny']",
        n_steps="1 + n %% 40", n_calls="1 + n %% 40", n_trainable_calls="1 + n %% 40",
        prompt_tokens="1000 + n %% 5000", completion_tokens="100 + n %% 900",
        fidelity="case when n %% 3 = 0 then 'retokenised' else 'exact' end", quality="(n %% 101) / 100.0",
        metrics="jsonb_build_object('score', n %% 1000, 'turns', n %% 40, 'cost', n %% 17 / 10.0, 'tool', 'search')",
        content_hash="decode(md5(n::text) || md5('c' || n), 'hex')",
        twin_hash="decode(md5(n::text) || md5('t' || n), 'hex')", raw_size="15000 + n %% 9000",
    )  # fmt: skip
    noise = random.Random(7).randbytes(4000).hex()
    fill(
        TrajectorySegment, first, last,
        trajectory="n", seq="0", first_step="0", last_step="-1", raw_size="15000",
        data=f"substr(decode('{noise}', 'hex'), (1 + n %% 499)::int, (1500 + n %% 2000)::int)",
    )  # fmt: skip
    fill(
        LlmCallLog, first, last,
        trajectory="n", position="0", step="0", model="'tiny'", model_version="'v1.0.0'", origin="'own'",
        prompt_tokens="1000", completion_tokens="100", latency_ms="900 + n %% 3000",
    )  # fmt: skip
    fill(MetricValue, first, last, project=mine, trajectory="n", name="'score'", value="n %% 1000")
    llm = {"project": mine, "kind": "'llm'", "source": "'ruler'"}
    fill(JudgeCall, 10_000 + low, 10_000 + high, id="n", group="n", state="'done'", **llm)
    fill(
        RewardJudgment, first, last,
        trajectory="n", group=f"10000 + n / {ATTEMPTS}", judge_call=f"10000 + n / {ATTEMPTS}",
        score="(n %% 11) / 10.0", rank="1 + n %% 8", reasoning="'It went well.'", **llm,
    )  # fmt: skip
    by = {"project": mine, "by_name": "'x'"}
    fill(StateChange, first, last, kind="'group'", object_id="n", was="'open'", to="'closed'", **by)
    fill(RewardChange, first, last, trajectory="n", reward="1", source="'test'", **by)
    with connection.cursor() as cursor:
        cursor.execute("vacuum analyze")
    with transaction.atomic():
        arrivals.recount(project)
    readiness.snapshot(project)
    boards.take(project)
    print(f"{rows:,} trajectories after {time.perf_counter() - began:.0f} s", flush=True)


def texts(rows: int) -> None:
    """Words for the search, as common as in talk: the r-th most common has 1/r of the first one's share."""
    import psycopg
    from django.db import connection

    from trajectories import search_texts
    from trajectories.models import Trajectory
    from trajectories.search_texts import Said

    dice = random.Random(11)
    vocabulary = [f"word{number}" for number in range(30_000)]
    weights = [1 / (1 + number) for number in range(30_000)]
    drawn = dice.choices(vocabulary, weights, k=400_000)
    some = list(Trajectory.objects.filter(search_text=None).order_by("id").only("pk", "project_id")[:rows])
    with connection.wrap_database_errors, psycopg.Cursor(connection.connection) as cursor:
        names = "trajectory_id, project_id, words, body, n_characters, is_cut"
        with cursor.copy(f"copy search_texts ({names}) from stdin") as copy:
            for number, row in enumerate(some):
                at = dice.randrange(len(drawn) - 300)
                said = [*drawn[at : at + 200], "parcel"]
                said += ["needle"] if number % 20_000 == 7 else []
                parts = [Said(0, "assistant", " ".join(said))]
                marks = search_texts.marks_of(row)
                packed = search_texts.packed(parts)
                copy.write_row((row.pk, row.project_id, search_texts.vector(parts, marks), packed, 1500, False))
    with connection.cursor() as cursor:
        cursor.execute("vacuum analyze search_texts")


def real(project: "Project") -> dict[str, int]:
    """Trajectories of 10 and of 2,000 steps, a group of 16 × 50, recorded as an agent's would be: their pages' keys."""
    from trajectories import formats, indexing, ingestion
    from trajectories.models import Group, Trajectory

    def body(name: str, steps: int, **more: object) -> dict[str, object]:
        return {
            "trajectory_id": name,
            "agent_id": "walker",
            "steps": [
                {
                    "timestamp": "2026-03-01T08:00:00Z",
                    "llm_calls": [
                        {
                            "model": "gpt-4o",
                            "messages": [{"role": "user", "content": f"{name}, tick {number}. " + "What now? " * 20}],
                            "response": f"I go on, {number} for {name}. " + "Because of this and that. " * 15,
                            "latency_ms": 700 + number % 90,
                        }
                    ],
                    "reward": 0.01 * (number % 7),
                }
                for number in range(steps)
            ],
            "final_status": "completed",
            "reward": 0.5,
            **more,
        }

    sent = [body("walk-10", 10), body("walk-2000", 2000)]
    sent += [
        body(f"same-{n}", 50, scenario_id="the-same", group_id="g", group_size=16, reward=n / 16) for n in range(16)
    ]
    for one in sent:
        ingestion.record(project, formats.incoming_value(one, "native"))
    indexing.drain(project)
    pk = dict(Trajectory.objects.filter(agent__agent_id="walker").values_list("trajectory_id", "pk"))
    group = Group.objects.get(project=project, scenario__scenario_id="the-same")
    return {"10": pk["walk-10"], "2000": pk["walk-2000"], "group": group.pk}


# --- pages -----------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    kind: str
    name: str
    target: int  # milliseconds, p95
    p50: float = 0.0
    p95: float = 0.0
    queries: int = 0
    faults: list[str] = field(default_factory=list)


def measure(client: "Client", kind: str, name: str, url: str, target: int, *, times: int = TIMES) -> Measured:
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    found = Measured(kind, name, target)
    with CaptureQueriesContext(connection) as queries:
        answer = client.get(url)
    if answer.status_code != 200:
        found.faults.append(f"status {answer.status_code} {answer.headers.get('Location', '')}")
        return found
    counted = [one["sql"] for one in queries if not one["sql"].startswith(("BEGIN", "COMMIT", "SAVEPOINT", "RELEASE"))]
    found.queries = len(counted)
    if found.queries > QUERIES:
        found.faults.append(f"{found.queries} queries")
    if kind in ("list", "order", "filter", "deep") and any(table in sql for sql in counted for table in PAYLOAD):
        found.faults.append("reads payloads")
    took = []
    for _ in range(times):
        began = time.perf_counter()
        client.get(url)
        took.append((time.perf_counter() - began) * 1000)
    took.sort()
    found.p50, found.p95 = statistics.median(took), took[math.ceil(0.95 * len(took)) - 1]
    return found


VALUES: Mapping[str, Sequence[str]] = {  # of the declared filters: a common one, and a rare one where there is one
    "agent": ("agent-1008",), "scenario": ("day-10003",), "version": ("v1.0.3", "v9.9.9"), "origin": ("own", "foreign"),
    "group": ("10005",), "episode": ("none",), "evaluation_id": ("none",), "since": ("2026-01-01", "2030-01-01"),
    "until": ("2030-01-01", "2001-01-01"), "window": ("2001-01-01T00:00",), "window_from": ("2001",),
    "window_to": ("2001", "2999"), "reward_min": ("-1", "0.999"), "reward_max": ("1", "-0.999"), "rewarded": ("1", "0"),
    "judged": ("1", "0"), "status": ("completed", "timeout"), "state": ("sealed", "open"), "steps_min": ("1", "999"),
    "steps_max": ("10", "0"), "fidelity": ("exact", "text"), "quality_min": ("0.5", "2"), "quality_max": ("0.5", "-1"),
    "recorded_as": ("native", "otlp"), "evaluation": ("0", "1"), "excluded": ("0", "1"), "superseded": ("0", "1"),
    "archived": ("0", "1"), "used": ("0", "1"),
}  # fmt: skip


def pages(client: "Client", project: "Project", opened: Mapping[str, int]) -> Iterator[tuple[str, str, str, int]]:
    """Kind, name, address, target of everything that is offered, found in the admin's own registry."""
    from django.contrib import admin

    from trajectories import filters, listing
    from trajectories.models import Trajectory
    from trajectories.project_admin import ProjectAdmin

    assert set(filters.offered()) == set(VALUES), "a filter is not measured"
    for model, model_admin in admin.site._registry.items():
        if not isinstance(model_admin, ProjectAdmin):
            continue
        noun = str(model._meta.verbose_name_plural)
        at = f"/admin/{model._meta.app_label}/{model._meta.model_name}/"
        yield "list", noun, at, LIST_MS
        for ordering in model_admin.orderings[1:]:
            yield "order", f"{noun}: {ordering.label}", f"{at}?o={ordering.name}", LIST_MS
        if model is Trajectory:
            continue
        for address in offered_choices(client, at):
            yield "filter", f"{noun}: {address}", f"{at}{address}", LIST_MS
    at = "/admin/trajectories/trajectory/"
    for name, values in VALUES.items():
        for value in values:
            yield "filter", f"trajectories: {name}={value}", f"{at}?{name}={value}", LIST_MS
    for question in ("metric.score.min=500", "metric.score.min=998.5", "metric.score.min=5000"):
        yield "filter", f"trajectories: {question}", f"{at}?{question}&col=metric.score", LIST_MS
    for question in ("agent=agent-1008&status=agent_error&reward_min=0", "status=timeout&o=-reward", "q=run-0000001"):
        yield "filter", f"trajectories: {question}", f"{at}?{question}", LIST_MS
    middle = Trajectory.objects.count() // 2
    for ordering in listing_orders():
        row = Trajectory.objects.filter(pk__gte=middle, reward__isnull=False).order_by("pk")[0]
        place = listing.Cursor(listing.key_of(row, ordering)).encode(ordering)
        yield "deep", f"trajectories, half way, {ordering.label}", f"{at}?o={ordering.name}&p={place}", LIST_MS
    yield "page", "trajectory of 10 steps", f"{at}{opened['10']}/change/", PAGE_MS
    yield "page", "trajectory of 2,000 steps", f"{at}{opened['2000']}/change/", PAGE_MS
    yield "page", "trajectory of 2,000 steps, in the middle", f"{at}{opened['2000']}/change/?step=1000", PAGE_MS
    yield "page", "group of 16 × 50 steps", f"/admin/trajectories/group/{opened['group']}/change/", GROUP_MS
    yield "board", "dashboard", "/admin/", BOARD_MS
    for name, words in {"common word": "word0", "in every one": "parcel", "rare": "needle", "in none": "nowhere",
                        "phrase": "%22word1 word0%22", "two words": "word3 needle"}.items():  # fmt: skip
        yield "search", name, f"{at}search/?q={words}", SEARCH_MS


def listing_orders() -> "Sequence[Ordering]":
    from django.contrib import admin

    from trajectories.models import Trajectory
    from trajectories.project_admin import ProjectAdmin

    found = admin.site._registry[Trajectory]
    assert isinstance(found, ProjectAdmin)
    return found.orderings


def offered_choices(client: "Client", at: str) -> list[str]:
    """The addresses behind a list's filters, as its page links them."""
    import re
    from html import unescape

    page = client.get(at).content.decode().partition('id="changelist-filter"')[2]
    found = [unescape(one) for one in re.findall(r'href="(\?[^"]+)"', page)]
    return list(dict.fromkeys(one for one in found if "=" in one))


def main(sizes: Sequence[int] = ()) -> None:
    sizes = sizes or [int(one) for one in sys.argv[1:] if one.isdigit()] or SIZES
    with site("admin"):
        from django.test import Client

        from tests import builders
        from tests.admin.test_walk_admin import furnish
        from trajectories.models import Role

        project = builders.make_project("large", listed_metrics=["score"])
        furnish(project, "words")
        opened = real(project)
        client = Client()
        client.force_login(builders.make_member(project, Role.OPERATOR))
        runs: list[dict[str, Measured]] = []
        floors: list[float] = []
        for size in sizes:
            grow(project, size)
            if not runs:
                texts(min(SEARCHED, size))
            floor = measure(client, "floor", "projects", "/admin/trajectories/project/", 0, times=3 * TIMES)
            found = [measure(client, *one) for one in pages(client, project, opened)]
            after = measure(client, "floor", "projects", "/admin/trajectories/project/", 0, times=3 * TIMES)
            floors.append((floor.p50 + after.p50) / 2)
            runs.append({f"{one.kind} {one.name}": one for one in found})
            report(size, found, floors[-1])
        if len(runs) > 1:
            growth(sizes, runs, floors)


def report(size: int, found: Sequence[Measured], floor: float) -> None:
    print(f"\n{size:,} trajectories; floor (a page with a frame): p50 {floor:.1f} ms\n")
    print(f"{'':72} {'p50':>6} {'p95':>6} {'×floor':>7} {'target':>6} {'sql':>4}")
    for kind in dict.fromkeys(one.kind for one in found):
        some = sorted((one for one in found if one.kind == kind), key=lambda one: -one.p95)
        over = [one for one in some if one.faults or one.p95 > one.target]
        shown = some if len(some) <= 12 else list(dict.fromkeys([f.name for f in over] + [f.name for f in some[:8]]))
        names = {one if isinstance(one, str) else one.name for one in shown}
        for one in some:
            if one.name in names:
                mark = " ! " + ", ".join(one.faults) if one.faults else " over" if one.p95 > one.target else ""
                print(
                    f"{kind + ' ' + one.name:72.72} {one.p50:6.0f} {one.p95:6.0f} {one.p95 / floor:7.1f} "
                    f"{one.target:6} {one.queries:4}{mark}"
                )
        if len(some) > len(names):
            print(f"{kind + f': and {len(some) - len(names)} others, all faster':72}")
        print(f"{kind + ': of ' + str(len(some)) + ', over target ' + str(len(over)):72}", flush=True)


def growth(sizes: Sequence[int], runs: Sequence[Mapping[str, Measured]], floors: Sequence[float]) -> None:
    """From the first size to the last: of p50, the floor's own change divided out."""
    drift = floors[-1] / floors[0]
    ratios = {
        name: one.p50 / runs[0][name].p50 / drift for name, one in runs[-1].items() if name in runs[0] and one.p50
    }
    worst = sorted(ratios.items(), key=lambda one: -one[1])
    print(f"\ngrowth of p50 from {sizes[0]:,} to {sizes[-1]:,} (floor's drift {drift:.2f} divided out), target 1.3")
    for name, ratio in worst[:15]:
        print(f"{name:72.72} {runs[0][name].p50:6.0f} {runs[-1][name].p50:6.0f} {ratio:7.2f}")
    told = {"median": statistics.median(ratios.values()), "over 1.3": sum(one > 1.3 for one in ratios.values())}
    print(json.dumps({name: round(value, 2) for name, value in told.items()} | {"of": len(ratios)}))


if __name__ == "__main__":
    main()
