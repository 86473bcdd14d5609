"""What the site answers, as plain dictionaries and lists. The site may say more than what stands here.

Times are ISO 8601 texts in UTC; a reward or score of None is unknown, which is not 0.
"""

from typing import Literal, TypedDict

Mode = Literal["grpo", "filtered", "sft"]
Strategy = Literal["immediate", "gradual", "test", "ab", "shadow"]


class Check(TypedDict):
    check: str
    value: float
    threshold: float
    ok: bool
    detail: str


class ReadinessStats(TypedDict):
    total_trajectories: int
    unscored_trajectories: int
    scenario_groups: int
    usable_groups: int
    data_quality: float


class Readiness(TypedDict):
    ready: bool
    reason: str
    reasons: list[Check]
    forecast: str | None
    stats: ReadinessStats
    as_of: str


class Health(TypedDict):
    ok: bool
    detail: str


class Collection(TypedDict):
    last_24h: int
    last_7d: int
    rate_per_hour: float


class StatusBatch(TypedDict):
    batch_id: str
    status: str
    progress: float
    eta_seconds: float | None


class StatusTraining(TypedDict):
    current_batch: StatusBatch | None
    last_completed: StatusBatch | None
    next_scheduled: str | None


class StatusModels(TypedDict):
    latest: str | None
    deployed: str | None
    training: str | None


class Status(TypedDict):
    data_collection: Collection
    training: StatusTraining
    models: StatusModels
    health: dict[str, Health]


class TrajectoryRow(TypedDict):
    """A trajectory as lists show it."""

    trajectory_id: str
    agent_id: str
    role: str
    scenario_id: str | None
    group: int | None
    window: str
    started_at: str
    ended_at: str | None
    received_at: str
    state: str
    final_status: str
    reward: float | None
    origin: str
    version: str
    models: list[str]
    steps: int
    llm_calls: int
    trainable_calls: int
    fidelity: str
    quality: float
    is_evaluation: bool
    evaluation_id: str | None
    metrics: dict[str, object]


class RecordedTrajectory(TypedDict, total=False):
    """The native trajectory, whole, and what the site knows of it under `recorded`."""

    trajectory_id: str
    agent_id: str
    role: str
    scenario_id: str
    group_id: str
    episode_id: str
    policy_version: str
    started_at: str
    ended_at: str
    tools: list[dict[str, object]]
    steps: list[dict[str, object]]
    final_status: str
    stop_reason: str
    reward: float | None
    reward_components: dict[str, float | None]
    metrics: dict[str, object]
    metadata: dict[str, object]
    recorded: TrajectoryRow


class JudgmentRow(TypedDict):
    """One opinion on one trajectory."""

    source: str
    annotator_kind: str
    score: float | None
    rank: int | None
    comment: str
    author: str
    created_at: str


class Attempt(TrajectoryRow):
    """A trajectory in its group, with the current judgments of it."""

    judgments: list[JudgmentRow]


class GroupRow(TypedDict):
    """Attempts at one scenario by one behaviour, as lists show them."""

    id: int
    scenario_id: str
    role: str
    behaviour: str
    cohort: str
    state: str
    judging: str
    is_evaluation: bool
    n: int
    reward_n: int
    reward_min: float | None
    reward_max: float | None
    reward_mean: float | None
    judged_n: int
    created_at: str


class Group(GroupRow):
    """A group with its attempts, and their numbers as lists of one length and order."""

    scenario_description: str
    trajectories: list[Attempt]
    trajectory_ids: list[str]
    rewards: list[float | None]
    scores: dict[str, list[float | None]]  # by the judgments' source


class BatchRow(TypedDict):
    batch_id: str
    status: str
    mode: Mode
    purpose: str
    groups: int
    trajectories: int
    model_version: str | None
    created_at: str


class Batch(BatchRow):
    progress: float  # 0 to 1
    eta_seconds: float | None
    error: str | None
    base_model: str
    parent: str | None
    off_policy: bool


class Model(TypedDict):
    version: str
    status: str
    parent: str | None
    batch_id: str | None
    base_model: str
    evaluation: dict[str, object] | None
    created_at: str
    serving_name: str


class EvaluationRow(TypedDict):
    evaluation_id: str
    version: str
    baseline: str | None
    state: str
    split: str
    sentence: str
    error: str | None


class Evaluation(EvaluationRow):
    progress: float  # 0 to 1
    result: dict[str, object] | None


class Task(TypedDict):
    """The scenario of a piece of work, without its gold answers."""

    id: str
    description: str
    metadata: dict[str, object]


class Work(TypedDict):
    """Play the scenario `n` times with `model`, and send the trajectories with the evaluation_id."""

    scenario_id: str
    scenario: Task
    side: str
    version: str | None
    model: str
    base_url: str
    n: int


class Gate(TypedDict):
    name: str
    ok: bool
    detail: str


class DeploymentRow(TypedDict):
    id: int
    version: str
    strategy: Strategy
    state: str
    replaces: str | None
    requested_by: str
    error: str | None


class Deployment(DeploymentRow):
    gates: list[Gate]
    reason: str


class Route(TypedDict):
    """What an agent samples from now: `model` and `base_url` go into an OpenAI client as they are."""

    agent_id: str
    version: str | None
    model: str
    base_url: str
    deployment: int | None


class ScenarioRow(TypedDict):
    id: str
    description: str
    split: str
    metadata: dict[str, object]
    created_at: str


class RewardAnswer(TypedDict, total=False):
    trajectory_id: str
    reward: float | None
    applied: bool  # False: the trajectory is not known yet; the reward waits for it
    changed: bool
