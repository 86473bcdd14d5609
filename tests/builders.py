"""Valid rows with defaults, so that a test states only what it is about.

Each takes what matters by keyword and makes the rest. They write rows straight into the tables; what goes
through the API or the domain is built by the tests that are about it.
"""

import itertools
import secrets
from datetime import datetime, timedelta

from django.contrib.auth.models import User
from django.utils import timezone

from training.models import (
    BatchGroup,
    BatchItem,
    BatchStatus,
    Deployment,
    Evaluation,
    Mode,
    Rubric,
    TrainedModel,
    TrainingBatch,
    TrainingRun,
)
from trajectories import auth
from trajectories.models import (
    Agent,
    ApiKey,
    Group,
    GroupState,
    KnownVersion,
    Membership,
    Origin,
    Project,
    Role,
    Scenario,
    Scope,
    Split,
    Trajectory,
)

_number = itertools.count(1)


def make_project(slug: str = "", **fields: object) -> Project:
    return Project.objects.create(slug=slug or f"project-{next(_number)}", **fields)


def make_user(name: str = "", *, superuser: bool = False, staff: bool = True) -> User:
    name = name or f"user-{next(_number)}"
    user = User(username=name, is_staff=staff or superuser, is_superuser=superuser)
    user.set_unusable_password()
    user.save()
    return user


def make_member(project: Project, role: str = Role.READER, *, name: str = "") -> User:
    user = make_user(name)
    Membership.objects.create(project=project, user=user, role=role)
    return user


def make_key(
    project: Project, *scopes: str, owner: User | None = None, expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    """The row and the key. Without scopes: all of them."""
    return auth.make_key(
        project, f"key-{next(_number)}", scopes or tuple(Scope.values), owner=owner, expires_at=expires_at
    )


def bearer(key: str) -> dict[str, str]:
    """Headers for Django's test client: `client.get(url, headers=bearer(key))`."""
    return {"Authorization": f"Bearer {key}"}


def make_agent(project: Project, agent_id: str = "") -> Agent:
    return Agent.objects.create(project=project, agent_id=agent_id or f"agent-{next(_number)}")


def make_scenario(project: Project, scenario_id: str = "", *, split: str = Split.TRAIN, **fields: object) -> Scenario:
    return Scenario.objects.create(
        project=project, scenario_id=scenario_id or f"scenario-{next(_number)}", split=split, **fields
    )


def make_version(project: Project, version: str = "v1.0.0") -> KnownVersion:
    """A version that calls may claim to come from."""
    ordinal = KnownVersion.objects.filter(project=project).count() + 1
    return KnownVersion.objects.create(
        project=project, version=version, serving_name=f"{project.slug}-{version}", ordinal=ordinal
    )


def make_trajectory(
    project: Project,
    *,
    agent: Agent | None = None,
    scenario: Scenario | None = None,
    group: Group | None = None,
    reward: float | None = 0.5,
    trajectory_id: str = "",
    origin: str = Origin.OWN,
    behaviour: str = "v1.0.0",
    **fields: object,
) -> Trajectory:
    """A sealed trajectory row without payload."""
    started = timezone.now() - timedelta(minutes=5)
    values: dict[str, object] = {
        "started_at": started,
        "ended_at": started + timedelta(seconds=30),
        "window": started.strftime("%Y-%m-%dT%H:00"),
        "n_steps": 1,
        "n_calls": 1,
        "n_trainable_calls": 1 if origin == Origin.OWN else 0,
        "quality": 1.0,
        "content_hash": secrets.token_bytes(32),
        "twin_hash": secrets.token_bytes(32),
    }
    values.update(fields)
    return Trajectory.objects.create(
        project=project,
        agent=agent or Agent.objects.get_or_create(project=project, agent_id="agent")[0],
        scenario=scenario or (group.scenario if group else None),
        group=group,
        trajectory_id=trajectory_id or f"trajectory-{next(_number)}",
        reward=reward,
        origin=origin,
        behaviour=behaviour,
        **values,
    )


def make_group(
    project: Project,
    rewards: tuple[float | None, ...] = (0.0, 0.0, 1.0, 1.0),
    *,
    scenario: Scenario | None = None,
    state: str = GroupState.CLOSED,
    behaviour: str = "v1.0.0",
    origin: str = Origin.OWN,
    is_evaluation: bool = False,
    **fields: object,
) -> Group:
    """A group with one trajectory a reward and its counters as `indexing` would have them."""
    scenario = scenario or make_scenario(project)
    known = [reward for reward in rewards if reward is not None]
    group = Group.objects.create(
        project=project,
        scenario=scenario,
        behaviour=behaviour,
        cohort=f"#{next(_number)}",
        state=state,
        is_evaluation=is_evaluation,
        n=len(rewards),
        n_trainable=len(rewards) if origin == Origin.OWN else 0,
        reward_n=len(known),
        reward_min=min(known, default=None),
        reward_max=max(known, default=None),
        reward_sum=sum(known),
        quality_sum=float(len(rewards)),
        last_received_at=timezone.now(),
        **fields,
    )
    for reward in rewards:
        make_trajectory(
            project, group=group, reward=reward, origin=origin, behaviour=behaviour, is_evaluation=is_evaluation
        )
    return group


def make_rubric(project: Project, text: str = "Prefer the attempt that reaches the goal.") -> Rubric:
    return Rubric.objects.create(project=project, name=f"rubric-{next(_number)}", text=text)


def make_batch(
    project: Project | None = None,
    *,
    status: str = BatchStatus.PENDING,
    groups: tuple[Group, ...] = (),
    mode: str = Mode.GRPO,
    **fields: object,
) -> TrainingBatch:
    """A batch in any state; with groups it is frozen, advantages being reward less mean."""
    project = project or make_project()
    values: dict[str, object] = {"base_model": "tiny", "frozen_at": timezone.now(), "manifest_hash": "0" * 64}
    values.update(fields)
    batch = TrainingBatch.objects.create(project=project, status=status, mode=mode, **values)
    for group in groups:
        members = list(group.trajectories.all())
        rewards = [member.reward or 0.0 for member in members]
        mean = sum(rewards) / len(rewards)
        row = BatchGroup.objects.create(
            batch=batch,
            group=group,
            scenario_ref=group.scenario.scenario_id,
            behaviour=group.behaviour,
            n=len(members),
            mean=mean,
            std=(sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5,
        )
        BatchItem.objects.bulk_create(
            BatchItem(
                batch=batch,
                batch_group=row,
                trajectory=member,
                trajectory_ref=member.trajectory_id,
                content_hash=member.content_hash,
                reward=reward,
                advantage=reward - mean,
                is_active=status not in (BatchStatus.FAILED, BatchStatus.CANCELLED),
            )
            for member, reward in zip(members, rewards, strict=True)
        )
    if groups:
        batch.n_groups = len(groups)
        batch.n_trajectories = batch.items.count()
        batch.save()
    return batch


def make_run(batch: TrainingBatch, **fields: object) -> TrainingRun:
    attempt = batch.runs.count() + 1
    values: dict[str, object] = {"attempt": attempt, "fence": attempt, "folder": f"/nowhere/{batch.pk}/{attempt}"}
    values.update(fields)
    return TrainingRun.objects.create(batch=batch, **values)


def make_model(
    project: Project | None = None,
    version: str = "",
    *,
    status: str = "ready",
    parent: TrainedModel | None = None,
    batch: TrainingBatch | None = None,
    **fields: object,
) -> TrainedModel:
    """A version, known to ingestion as well."""
    project = project or (batch.project if batch else make_project())
    ordinal = TrainedModel.objects.filter(project=project).count() + 1
    version = version or f"v1.0.{ordinal - 1}"
    major, minor, patch = (int(part) for part in version.removeprefix("v").split("."))
    values: dict[str, object] = {"mode": Mode.GRPO, "base_model": "tiny", "adapter_path": f"/nowhere/{version}"}
    values.update(fields)
    KnownVersion.objects.get_or_create(
        project=project,
        version=version,
        defaults={"serving_name": f"{project.slug}-{version}", "ordinal": ordinal},
    )
    return TrainedModel.objects.create(
        project=project,
        version=version,
        major=major,
        minor=minor,
        patch=patch,
        ordinal=ordinal,
        status=status,
        parent=parent,
        batch=batch,
        serving_name=f"{project.slug}-{version}",
        **values,
    )


def make_evaluation(candidate: TrainedModel, baseline: TrainedModel | None = None, **fields: object) -> Evaluation:
    return Evaluation.objects.create(project=candidate.project, candidate=candidate, baseline=baseline, **fields)


def make_deployment(model: TrainedModel, *, requested_by: User | None = None, **fields: object) -> Deployment:
    return Deployment.objects.create(
        project=model.project,
        model=model,
        requested_by=requested_by,
        requested_by_name=requested_by.get_username() if requested_by else "key",
        **fields,
    )
