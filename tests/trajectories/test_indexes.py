"""The main queries are answered by indexes: EXPLAIN on 50,000 analysed rows, never a scan of a big table."""

import json
from collections.abc import Iterator
from typing import TypeVar

import pytest
from django.db import connection
from django.db.models import Model, QuerySet

from tests import builders
from training.models import BatchItem, RewardJudgment, TrainingBatch
from trajectories.models import Group, Project, Scenario, State, Trajectory

pytestmark = pytest.mark.django_db

Row = TypeVar("Row", bound=Model)

ROWS = 50_000
BIG = {"trajectories", "reward_judgments", "groups", "training_batches", "batch_items"}


def seed(project: Project, other: Project) -> None:
    """50,000 trajectories in 12,500 groups of 2,500 scenarios, judged, most in batches; a hundredth is another's."""
    agents = [builders.make_agent(project) for _ in range(50)]
    with connection.cursor() as cursor:
        cursor.execute(
            """insert into scenarios (project_id, scenario_id, description, split, split_given, metadata)
               select %s, 's' || i, '', case when i %% 10 = 0 then 'held_out' else 'train' end, false, '{}'
               from generate_series(1, 2500) i""",
            [project.pk],
        )
        cursor.execute("select min(id) from scenarios where project_id = %s", [project.pk])
        scenario = cursor.fetchone()[0]
        cursor.execute(
            """insert into groups (project_id, scenario_id, role, behaviour, cohort, is_evaluation, by_window, state,
                   judging, judge_attempts, judge_error, n, n_trainable, reward_n, reward_sum, judged_n, judged_sum,
                   quality_sum, last_received_at)
               select %s, %s + i %% 2500, '', 'v1.0.0', '#' || i, i %% 10 = 0,  false,
                   case when i %% 50 = 0 then 'open' else 'closed' end,
                   case when i %% 100 = 1 then 'pending' else 'judged' end,
                   0, '', 4, 4, 4, 2, 4, 2, 4, now() - i * interval '1 minute'
               from generate_series(1, 12500) i""",
            [project.pk, scenario],
        )
        cursor.execute("select min(id) from groups where project_id = %s", [project.pk])
        group = cursor.fetchone()[0]
        cursor.execute(
            """insert into trajectories (project_id, trajectory_id, agent_id, scenario_id, group_id, role,
                   declared_group_id, episode_id, parent_trajectory_id, retry_of, is_superseded, is_evaluation,
                   evaluation_id, "window", started_at, received_at, last_step_at, state, final_status, stop_reason,
                   is_excluded, reward, reward_components, reward_source, origin, behaviour, model_names, n_steps,
                   n_calls, n_trainable_calls, fidelity, quality, findings, metrics, source_format, content_hash,
                   twin_hash, raw_size, shared_texts)
               select case when i %% 100 = 0 then %s else %s end, 't' || i, %s + i %% 50, g.scenario_id, g.id,
                   '', '', '', '', '', false, false, '',
                   to_char(now() - i * interval '1 minute', 'YYYY-MM-DD"T"HH24:00'), now() - i * interval '1 minute',
                   now() - i * interval '1 minute', now(), case when i %% 500 = 0 then 'open' else 'sealed' end,
                   'completed', '', false, (i %% 1000) / 1000.0, '{}', '', 'own', 'v1.0.0', '{}', 5, 5, 5, 'exact', 1,
                   '[]', '{}', 'native', '', '', 1000, '{}'
               from generate_series(1, %s) i join groups g on g.id = %s + i %% 12500""",
            [other.pk, project.pk, agents[0].pk, ROWS, group],
        )
        cursor.execute(
            """insert into judge_calls (project_id, group_id, kind, source, model, attempt, part, parts, seed,
                   permutation, prompt_hash, prompt, raw_answer, state, error_kind, error)
               select %s, id, 'llm', 'ruler', '', 1, 0, 1, 0, '{}', '', '', '', 'done', '', ''
               from groups where project_id = %s""",
            [project.pk, project.pk],
        )
        cursor.execute(
            """insert into reward_judgments (project_id, trajectory_id, group_id, judge_call_id, kind, source, name,
                   score, rank, reasoning, strengths, weaknesses, author, is_current, counts)
               select t.project_id, t.id, t.group_id, c.id, 'llm', 'ruler', '', t.reward, 1 + t.id % 4, '', '[]', '[]',
                   '', true, true
               from trajectories t join judge_calls c on c.group_id = t.group_id""",
        )
        cursor.execute(
            """insert into training_batches (project_id, batch_id, status, mode, purpose, base_model, forced,
                   shuffle_rewards, seed, hyperparameters, reward_mix, readiness, off_policy, n_groups, n_trajectories,
                   manifest_hash, frozen_at, requested_by_name, error)
               select %s, md5(i::text), case when i %% 10 = 0 then 'failed' else 'completed' end, 'grpo', '', 'tiny',
                   false, false, 0, '{}', '{}', '{}', false, 1, 4, '', now(), '', '' from generate_series(1, 2000) i""",
            [project.pk],
        )
        cursor.execute(
            """insert into batch_groups (batch_id, group_id, scenario_ref, behaviour, is_used, left_out, n)
               select b.id, %s + b.id %% 2000, 's', 'v1.0.0', true, '', 4 from training_batches b""",
            [group],
        )
        cursor.execute(
            """insert into batch_items (batch_id, batch_group_id, trajectory_id, trajectory_ref, content_hash, parts,
                   judgments, advantage, weight, judge_part, is_trained, why_not, is_active)
               select distinct on (t.id) g.batch_id, g.id, t.id, t.trajectory_id, '', '{}', '{}'::bigint[], 0, 1, 0,
                   true, '', true
               from trajectories t join batch_groups g on g.group_id = t.group_id""",
        )
        for table in (*BIG, "scenarios", "agents", "batch_groups", "judge_calls"):
            cursor.execute(f"analyze {table}")


def nodes(plan: dict[str, object]) -> Iterator[dict[str, object]]:
    yield plan
    children = plan.get("Plans", [])
    assert isinstance(children, list)
    for child in children:
        yield from nodes(child)


def explain(rows: QuerySet[Row]) -> list[dict[str, object]]:
    """The nodes of the plan PostgreSQL chooses, flattened."""
    return list(nodes(json.loads(rows.explain(format="json"))[0]["Plan"]))


def test_each_main_query_is_answered_by_its_index() -> None:
    project = builders.make_project()
    other = builders.make_project()
    seed(project, other)
    agent = project.agents.all()[7]
    some = Trajectory.objects.filter(project=project).order_by("id")[1000]
    scenario = Scenario.objects.filter(project=project)[99]
    group = Group.objects.filter(project=project).order_by("id")[777]
    mine = Trajectory.objects.filter(project=project)

    unused = (
        Trajectory.objects.filter(group=group, state=State.SEALED, is_evaluation=False)
        .exclude(pk__in=BatchItem.objects.filter(is_active=True, trajectory__group=group).values("trajectory"))
        .order_by("id")
    )
    wanted = {
        "by window and agent": (mine.filter(window=some.window, agent=agent), "traj_window_agent"),
        "by agent and start": (Trajectory.objects.filter(agent=agent).order_by("-started_at")[:50], "traj_agent_start"),
        "by scenario and created": (
            Trajectory.objects.filter(scenario=scenario).order_by("-received_at")[:50],
            "traj_scenario_received",
        ),
        "newest first": (Trajectory.objects.filter(project=other).order_by("-id")[:50], "traj_newest"),
        "by id": (mine.filter(trajectory_id=some.trajectory_id), "trajectory_id_once_a_project"),
        "by reward": (mine.filter(reward__gte=0.99).order_by("reward", "id")[:50], "traj_reward"),
        "training data not yet used": (unused, "traj_group"),
        "groups for training": (
            Group.objects.filter(project=project, state="closed", is_evaluation=False).order_by("id")[:100],
            "groups_for_training",
        ),
        "groups to judge": (
            Group.objects.filter(project=project, state="closed", judging__in=("pending", "judge_error")).order_by(
                "judge_again_at"
            )[:20],
            "groups_to_judge",
        ),
        "judgments by score": (
            RewardJudgment.objects.filter(project=project, score__gte=0.99).order_by("score", "id")[:50],
            "judgments_by_score",
        ),
        "judgments by group and rank": (
            RewardJudgment.objects.filter(group=group).order_by("rank")[:16],
            "judgments_by_rank",
        ),
        "batches by status and created": (
            TrainingBatch.objects.filter(status="failed").order_by("-created_at")[:20],
            "batches_by_status",
        ),
        "open trajectories by age": (
            Trajectory.objects.filter(state=State.OPEN).order_by("last_step_at")[:100],
            "traj_open",
        ),
    }
    faults: dict[str, str] = {}
    for name, (rows, index) in wanted.items():
        plan = explain(rows)
        scanned = [str(node["Relation Name"]) for node in plan if node["Node Type"] == "Seq Scan"]
        used = {str(node["Index Name"]) for node in plan if "Index Name" in node}
        if BIG & set(scanned) or index not in used:
            faults[name] = f"uses {sorted(used)}, scans {scanned}"
    assert faults == {}


def test_trajectories_have_at_most_seven_indexes_beside_keys() -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            """select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid
               where i.indrelid = 'trajectories'::regclass and not i.indisunique"""
        )
        names = {row[0] for row in cursor.fetchall()}
    assert len(names) <= 7, names
