"""What we make of the recordings: judgments, batches, runs, versions, evaluations, deployments.

Rows of history (judge calls, judgments, approvals, intervals) are added, never overwritten. Every `status` and
`state` is written by one file alone: batches.py, runs.py, model_life.py, evaluation.py, deployments.py.
"""

import uuid

from django.conf import settings
from django.contrib.postgres.constraints import ExclusionConstraint
from django.contrib.postgres.fields import ArrayField, DateTimeRangeField, RangeBoundary, RangeOperators
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Func, Q
from django.db.models.functions import Now

from trajectories import quality
from trajectories.models import ID_LENGTH, Agent, Group, Project, Scenario, Trajectory, finite


def public_id() -> str:
    """An id to show outside: says nothing of how many there are."""
    return uuid.uuid4().hex


class Mode(models.TextChoices):
    GRPO = "grpo", "GRPO: own policy, relative to the group"
    FILTERED = "filtered", "filtered: the best of each group, off-policy"
    SFT = "sft", "SFT: imitate"


class TruncatedRuns(models.TextChoices):
    COUNT = "count", "count: like any other"
    MASK = "mask", "mask: in the baseline, no gradient"
    EXCLUDE = "exclude", "exclude"


class Rubric(models.Model):
    """What a good attempt is, in words for the judge. Never changed: a new text is a new version."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="rubrics", db_index=False)
    name = models.SlugField(max_length=60)
    version = models.PositiveIntegerField(default=1)
    text = models.TextField()
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    created_by = models.CharField(max_length=150, blank=True, editable=False)

    class Meta:
        db_table = "rubrics"
        ordering = ("name", "-version")
        constraints = (models.UniqueConstraint(fields=("project", "name", "version"), name="rubric_version_once"),)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class TrainingPolicy(models.Model):
    """The project's automation settings. Made by `policies.of(project)` with the defaults of the environment."""

    project = models.OneToOneField(Project, on_delete=models.CASCADE, related_name="policy")

    auto_trigger = models.BooleanField(default=True, help_text="start training by itself when ready and due")
    auto_judge = models.BooleanField(default=True, help_text="judge closed groups by itself")
    training_interval_hours = models.FloatField(default=24.0, validators=[MinValueValidator(0)])
    min_trajectories = models.PositiveIntegerField(default=1000)
    min_group_size = models.PositiveIntegerField(default=4, validators=[MinValueValidator(2)])
    min_scenario_groups = models.PositiveIntegerField(default=10)
    data_quality_threshold = models.FloatField(
        default=0.95, validators=[MinValueValidator(0), MaxValueValidator(1)], help_text="mean quality needed, 0 to 1"
    )
    batch_limit = models.PositiveIntegerField(
        null=True, blank=True, help_text="at most so many trajectories in a batch; empty: all"
    )

    mode = models.CharField(max_length=8, choices=Mode, default=Mode.GRPO)
    base_model = models.CharField(max_length=300, default="OpenPipe/Qwen3-14B-Instruct")
    model_name_prefix = models.CharField(
        max_length=60, blank=True, help_text="served names are <prefix>-v1.0.3; empty: the project's slug"
    )
    max_policy_age = models.PositiveIntegerField(default=2, help_text="in versions")
    max_drift = models.FloatField(default=0.2, validators=[MinValueValidator(0)], help_text="mean |ratio − 1|, no unit")
    truncated_runs = models.CharField(max_length=8, choices=TruncatedRuns, default=TruncatedRuns.MASK)
    group_by_window = models.BooleanField(
        default=False, help_text="group by window where there is no scenario: the baseline is then confounded"
    )
    hyperparameters = models.JSONField(
        default=dict, blank=True, help_text="for the trainer; what is not given has its default (docs/training.md)"
    )

    reward_mix = models.JSONField(
        default=dict,
        blank=True,
        help_text='weights by source: {"recorded": 1, "ruler": 1, "rule:exact_answer": 0, "people": 0}',
    )
    rubric = models.ForeignKey(Rubric, null=True, blank=True, on_delete=models.PROTECT, related_name="+")
    rule_judges = ArrayField(models.CharField(max_length=60), default=list, blank=True)

    gate_min_scenarios = models.PositiveIntegerField(default=10, help_text="shared scenarios an evaluation needs")
    gate_min_gain = models.FloatField(
        default=0.0, help_text="the lower end of the interval of the gain must be above this, in reward"
    )
    gate_attempts = models.PositiveIntegerField(
        default=2, help_text="attempts a side at each scenario of an evaluation"
    )
    evaluation_timeout_hours = models.FloatField(default=24.0, validators=[MinValueValidator(0)])

    serving_url = models.CharField(max_length=300, blank=True, help_text="a model server of its own; empty: the site's")
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        db_table = "training_policies"
        verbose_name_plural = "training policies"
        constraints = (
            models.CheckConstraint(condition=Q(min_group_size__gte=2), name="policy_group_of_two"),
            models.CheckConstraint(
                condition=Q(data_quality_threshold__gte=0) & Q(data_quality_threshold__lte=1),
                name="policy_quality_is_a_share",
            ),
            models.CheckConstraint(condition=Q(max_drift__gte=0) & finite("max_drift"), name="policy_drift_finite"),
        )

    def __str__(self) -> str:
        return f"policy of {self.project}"

    @property
    def quality_weights(self) -> dict[str, float]:
        """The weight of every quality check. They lie with the project: recordings are judged when they arrive."""
        return quality.weights_of(self.project.quality_weights)

    def served_name(self, version: str) -> str:
        """The OpenAI `model` that a version answers to: never reused, so that rollback is another name."""
        return f"{self.model_name_prefix or self.project.slug}-{version}"


class JudgeKind(models.TextChoices):
    LLM = "llm", "language model"
    CODE = "code", "rule"
    HUMAN = "human", "person"


class JudgeCall(models.Model):
    """One question about one group (or one part of a group above 8), and its raw answer."""

    class State(models.TextChoices):
        ASKED = "asked", "asked"
        DONE = "done", "answered"
        ERROR = "error", "failed"

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="judge_calls", db_index=False)
    group = models.ForeignKey(Group, on_delete=models.CASCADE, related_name="judge_calls", db_index=False)
    kind = models.CharField(max_length=8, choices=JudgeKind)
    source = models.CharField(max_length=100, help_text='"ruler" or "rule:<name>": the key of its weight in the mix')
    rubric = models.ForeignKey(Rubric, null=True, blank=True, on_delete=models.PROTECT, related_name="judge_calls")
    model = models.CharField(max_length=ID_LENGTH, blank=True)
    attempt = models.PositiveSmallIntegerField(default=1)
    part = models.PositiveSmallIntegerField(default=0, help_text="0-based part of a group above 8")
    parts = models.PositiveSmallIntegerField(default=1)
    seed = models.BigIntegerField(default=0, help_text="of the split into parts and of the order shown")
    permutation = ArrayField(models.BigIntegerField(), default=list, help_text="pks of trajectories in the order shown")
    prompt_hash = models.CharField(
        max_length=64, blank=True, help_text="of rubric, model, parameters and ordered content"
    )
    prompt = models.TextField(blank=True)
    raw_answer = models.TextField(blank=True)
    state = models.CharField(max_length=8, choices=State, default=State.ASKED)
    error_kind = models.CharField(max_length=32, blank=True)
    error = models.TextField(blank=True)
    cached_from = models.ForeignKey("self", null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    prompt_tokens = models.PositiveIntegerField(null=True, blank=True)
    completion_tokens = models.PositiveIntegerField(null=True, blank=True)
    cost = models.FloatField(null=True, blank=True, help_text="in the provider's currency, where it says")
    latency_ms = models.FloatField(null=True, blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "judge_calls"
        ordering = ("-id",)
        constraints = (
            models.CheckConstraint(condition=Q(part__lt=models.F("parts")), name="judge_call_part_of_parts"),
        )
        indexes = (
            models.Index(fields=("project", "-id"), name="judge_calls_newest"),
            models.Index(fields=("group", "-id"), name="judge_calls_of_group"),
            models.Index(fields=("project", "prompt_hash"), condition=Q(state="done"), name="judge_calls_cache"),
        )

    def __str__(self) -> str:
        return f"{self.source} on group {self.group_id}"


class RewardJudgment(models.Model):
    """One opinion on one trajectory: of a judge call, of code, or of a person. Never overwritten."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="judgments", db_index=False)
    trajectory = models.ForeignKey(Trajectory, on_delete=models.CASCADE, related_name="judgments", db_index=False)
    group = models.ForeignKey(
        Group, null=True, blank=True, on_delete=models.SET_NULL, related_name="judgments", db_index=False
    )
    judge_call = models.ForeignKey(JudgeCall, null=True, blank=True, on_delete=models.CASCADE, related_name="judgments")
    kind = models.CharField(max_length=8, choices=JudgeKind)
    source = models.CharField(max_length=100, help_text='"ruler", "rule:<name>", "people", or the name of the feedback')
    name = models.CharField(max_length=100, blank=True, help_text="the feedback's name, where it came by the API")
    score = models.FloatField(null=True, blank=True, help_text="null: looked at, no score given")
    rank = models.PositiveIntegerField(null=True, blank=True, help_text="1 is best, inside the judge call")
    reasoning = models.TextField(blank=True)
    strengths = models.JSONField(default=list, blank=True)
    weaknesses = models.JSONField(default=list, blank=True)
    step = models.PositiveIntegerField(null=True, blank=True)
    author = models.CharField(max_length=150, blank=True)
    is_current = models.BooleanField(default=True)
    counts = models.BooleanField(default=True, help_text="enters the mix; feedback by the API does not")
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "reward_judgments"
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(
                fields=("trajectory", "source"),
                condition=Q(is_current=True, counts=True),
                name="judgment_one_current_a_source",
            ),
            models.CheckConstraint(condition=finite("score"), name="judgment_score_finite"),
            models.CheckConstraint(
                condition=~Q(kind="llm") | Q(score__isnull=True) | (Q(score__gte=0) & Q(score__lte=1)),
                name="judgment_of_llm_0_to_1",
            ),
            models.CheckConstraint(
                condition=~Q(kind="llm") | Q(judge_call__isnull=False), name="judgment_of_llm_has_call"
            ),
        )
        indexes = (
            models.Index(fields=("project", "score", "id"), name="judgments_by_score"),
            models.Index(fields=("group", "rank"), name="judgments_by_rank"),
            models.Index(fields=("trajectory", "-id"), name="judgments_of_trajectory"),
            models.Index(fields=("project", "-id"), name="judgments_newest"),
        )

    def __str__(self) -> str:
        return f"{self.source}: {self.score} for {self.trajectory_id}"


class ReadinessSnapshot(models.Model):
    """What `readiness.check` found at one time, for pages, trends and replays."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="readiness", db_index=False)
    ready = models.BooleanField()
    data = models.JSONField(help_text="the body of GET /api/v1/readiness/")
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "readiness_snapshots"
        ordering = ("-id",)
        indexes = (models.Index(fields=("project", "-id"), name="readiness_newest"),)

    def __str__(self) -> str:
        return f"{self.project}: {'ready' if self.ready else 'not ready'}"


class BoardSnapshot(models.Model):
    """How a project stands, as the first page shows it: made behind the page (`boards.py`), read by it."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="+", db_index=False)
    data = models.JSONField(help_text="boards.Board")
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "board_snapshots"
        ordering = ("-id",)
        indexes = (models.Index(fields=("project", "-id"), name="boards_newest"),)

    def __str__(self) -> str:
        return f"{self.project} at {self.created_at:%Y-%m-%d %H:%M:%S}"


class BatchStatus(models.TextChoices):
    PENDING = "pending", "pending"
    PREPARING = "preparing", "preparing"
    SCORING = "scoring", "scoring"
    TRAINING = "training", "training"
    UPLOADING = "uploading", "uploading"
    COMPLETED = "completed", "completed"
    FAILED = "failed", "failed"
    CANCELLED = "cancelled", "cancelled"


LIVE_BATCH = ("pending", "preparing", "scoring", "training", "uploading")


class TrainingBatch(models.Model):
    """A frozen list of whole groups, and what is learned from them. batches.py alone writes its status."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="batches", db_index=False)
    batch_id = models.CharField(max_length=32, unique=True, default=public_id, editable=False)
    status = models.CharField(max_length=12, choices=BatchStatus, default=BatchStatus.PENDING)
    status_since = models.DateTimeField(db_default=Now())
    mode = models.CharField(max_length=8, choices=Mode)
    purpose = models.CharField(
        max_length=40, blank=True, help_text='"placebo", "warm start", … said by who asked for it'
    )
    base_model = models.CharField(max_length=300)
    parent = models.ForeignKey(
        "TrainedModel", null=True, blank=True, on_delete=models.PROTECT, related_name="child_batches"
    )
    forced = models.BooleanField(default=False)
    limit = models.PositiveIntegerField(null=True, blank=True)
    shuffle_rewards = models.BooleanField(
        default=False, help_text="a placebo: rewards are shuffled inside each group before freezing"
    )
    seed = models.BigIntegerField(default=0)
    hyperparameters = models.JSONField(default=dict, help_text="as frozen")
    reward_mix = models.JSONField(default=dict, help_text="weights as frozen")
    readiness = models.JSONField(default=dict, help_text="what the checks said when it was triggered")
    off_policy = models.BooleanField(default=False, help_text="off-policy, uncorrected")
    n_groups = models.PositiveIntegerField(default=0)
    n_trajectories = models.PositiveIntegerField(default=0)
    manifest_hash = models.CharField(max_length=64, blank=True)
    frozen_at = models.DateTimeField(null=True, blank=True)
    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    requested_by_name = models.CharField(max_length=150, blank=True)
    error = models.TextField(blank=True)
    archived_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    completed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "training_batches"
        ordering = ("-id",)
        verbose_name_plural = "training batches"
        constraints = (
            models.UniqueConstraint(
                fields=("project",), condition=Q(status__in=LIVE_BATCH), name="batch_one_live_a_project"
            ),
            models.CheckConstraint(condition=Q(status__in=BatchStatus.values), name="batch_status_known"),
            models.CheckConstraint(
                condition=~Q(status__in=("training", "uploading", "completed")) | Q(frozen_at__isnull=False),
                name="batch_trains_frozen",
            ),
        )
        indexes = (
            models.Index(fields=("project", "-id"), name="batches_newest"),
            models.Index(fields=("status", "created_at"), name="batches_by_status"),
        )

    def __str__(self) -> str:
        return f"batch {self.pk}"

    def is_live(self) -> bool:
        return self.status in LIVE_BATCH


class BatchGroup(models.Model):
    """A group of a batch, or one that was looked at and left out, with the reason."""

    batch = models.ForeignKey(TrainingBatch, on_delete=models.CASCADE, related_name="groups", db_index=False)
    group = models.ForeignKey(Group, null=True, on_delete=models.SET_NULL, related_name="batch_groups")
    scenario_ref = models.CharField(max_length=ID_LENGTH)
    behaviour = models.CharField(max_length=ID_LENGTH)
    is_used = models.BooleanField(default=True)
    left_out = models.CharField(max_length=200, blank=True, help_text="why, where it is not used")
    n = models.PositiveIntegerField(default=0)
    mean = models.FloatField(null=True, blank=True, help_text="of the mixed reward")
    std = models.FloatField(null=True, blank=True, help_text="population standard deviation of the mixed reward")

    class Meta:
        db_table = "batch_groups"
        constraints = (models.UniqueConstraint(fields=("batch", "group"), name="batch_group_once"),)

    def __str__(self) -> str:
        return f"group {self.group_id} in batch {self.batch_id}"


class BatchItem(models.Model):
    """One trajectory of a batch, by value: the trainer never recomputes what stands here."""

    batch = models.ForeignKey(TrainingBatch, on_delete=models.CASCADE, related_name="items", db_index=False)
    batch_group = models.ForeignKey(BatchGroup, on_delete=models.CASCADE, related_name="items")
    trajectory = models.ForeignKey(
        Trajectory, null=True, on_delete=models.SET_NULL, related_name="batch_items", db_index=False
    )
    trajectory_ref = models.CharField(max_length=ID_LENGTH, help_text="the id, kept after erasure")
    content_hash = models.BinaryField(max_length=32)
    reward = models.FloatField(null=True, blank=True, help_text="mixed")
    parts = models.JSONField(default=dict, help_text='{"recorded": {"raw", "standardised", "weight"}, …}')
    judgments = ArrayField(models.BigIntegerField(), default=list, help_text="pks of the RewardJudgments that counted")
    advantage = models.FloatField()
    weight = models.FloatField(default=1.0)
    judge_part = models.PositiveSmallIntegerField(default=0)
    is_trained = models.BooleanField(default=True, help_text="False: in the baseline, no gradient")
    why_not = models.CharField(max_length=200, blank=True)
    is_active = models.BooleanField(default=True, help_text="the batch is live or completed, so no other may have it")

    class Meta:
        db_table = "batch_items"
        constraints = (
            models.UniqueConstraint(fields=("batch", "trajectory_ref"), name="batch_item_once"),
            models.UniqueConstraint(
                fields=("trajectory",), condition=Q(is_active=True), name="trajectory_in_one_active_batch"
            ),
            models.CheckConstraint(condition=finite("advantage") & finite("reward"), name="batch_item_finite"),
        )
        indexes = (models.Index(fields=("trajectory",), name="batch_items_of_trajectory"),)

    def __str__(self) -> str:
        return f"{self.trajectory_ref} in batch {self.batch_id}"


class RunStatus(models.TextChoices):
    STARTING = "starting", "starting"
    RUNNING = "running", "running"
    STALLED = "stalled", "stalled"
    SUCCEEDED = "succeeded", "succeeded"
    FAILED = "failed", "failed"
    CANCELLED = "cancelled", "cancelled"


LIVE_RUN = ("starting", "running", "stalled")


class TrainingRun(models.Model):
    """One attempt to train a batch. Who holds the lease with the highest fence owns it; results count only then."""

    batch = models.ForeignKey(TrainingBatch, on_delete=models.CASCADE, related_name="runs", db_index=False)
    attempt = models.PositiveSmallIntegerField()
    fence = models.BigIntegerField(help_text="goes up with each lease; an older one may write nothing")
    status = models.CharField(max_length=10, choices=RunStatus, default=RunStatus.STARTING)
    status_since = models.DateTimeField(db_default=Now())
    owner = models.CharField(max_length=200, blank=True, help_text="host, process and start time of the shim")
    lease_until = models.DateTimeField(null=True, blank=True)
    heartbeat_at = models.DateTimeField(null=True, blank=True)
    progressed_at = models.DateTimeField(null=True, blank=True, help_text="when the last step came in")
    phase = models.CharField(max_length=40, blank=True)
    step = models.PositiveIntegerField(default=0)
    total_steps = models.PositiveIntegerField(null=True, blank=True)
    seconds_per_step = models.FloatField(null=True, blank=True, help_text="median of the last steps")
    metrics_offset = models.PositiveBigIntegerField(default=0, help_text="bytes of metrics.jsonl already read")
    folder = models.CharField(max_length=500)
    resumed_from = models.ForeignKey("self", null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    result = models.JSONField(null=True, blank=True)
    log_tail = models.TextField(blank=True)
    error = models.TextField(blank=True)
    started_at = models.DateTimeField(db_default=Now())
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "training_runs"
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(fields=("batch", "attempt"), name="run_attempt_once"),
            models.UniqueConstraint(fields=("batch", "fence"), name="run_fence_once"),
            models.UniqueConstraint(fields=("batch",), condition=Q(status__in=LIVE_RUN), name="run_one_live_a_batch"),
            models.CheckConstraint(condition=Q(status__in=RunStatus.values), name="run_status_known"),
        )
        indexes = (models.Index(fields=("status",), condition=Q(status__in=LIVE_RUN), name="runs_live"),)

    def __str__(self) -> str:
        return f"run {self.attempt} of batch {self.batch_id}"


class RunMetric(models.Model):
    """The numbers of one optimiser step, as the trainer wrote them."""

    run = models.ForeignKey(TrainingRun, on_delete=models.CASCADE, related_name="metrics", db_index=False)
    step = models.PositiveIntegerField()
    values = models.JSONField()
    at = models.DateTimeField()

    class Meta:
        db_table = "run_metrics"
        ordering = ("step",)
        constraints = (models.UniqueConstraint(fields=("run", "step"), name="run_metric_once"),)

    def __str__(self) -> str:
        return f"step {self.step} of {self.run_id}"


class ModelStatus(models.TextChoices):
    TRAINING = "training", "training"
    READY = "ready", "ready"
    DEPLOYED = "deployed", "deployed"
    RETIRED = "retired", "retired"
    REJECTED = "rejected", "rejected"
    FAILED = "failed", "failed"
    ARCHIVED = "archived", "archived"


class TrainedModel(models.Model):
    """A version of the project. model_life.py alone writes its status."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="models", db_index=False)
    version = models.CharField(max_length=32, validators=[RegexValidator(r"^v\d+\.\d+\.\d+$")])
    major = models.PositiveIntegerField(editable=False)
    minor = models.PositiveIntegerField(editable=False)
    patch = models.PositiveIntegerField(editable=False)
    ordinal = models.PositiveIntegerField(editable=False, help_text="1 for the project's first; differences are ages")
    status = models.CharField(max_length=10, choices=ModelStatus, default=ModelStatus.TRAINING)
    status_since = models.DateTimeField(db_default=Now())
    status_before_archive = models.CharField(max_length=10, blank=True)
    parent = models.ForeignKey("self", null=True, blank=True, on_delete=models.PROTECT, related_name="children")
    batch = models.OneToOneField(TrainingBatch, null=True, blank=True, on_delete=models.PROTECT, related_name="model")
    run = models.OneToOneField(TrainingRun, null=True, blank=True, on_delete=models.SET_NULL, related_name="model")
    origin = models.CharField(
        max_length=10, choices=(("trained", "trained here"), ("external", "external")), default="trained"
    )
    mode = models.CharField(max_length=8, choices=Mode)
    off_policy = models.BooleanField(default=False, help_text="off-policy, uncorrected")
    base_model = models.CharField(max_length=300)
    serving_name = models.CharField(max_length=ID_LENGTH, help_text="never reused")
    adapter_path = models.CharField(max_length=500, blank=True)
    adapter_hash = models.CharField(max_length=64, blank=True, help_text="sha256 of adapter_model.safetensors")
    adapter_bytes = models.PositiveBigIntegerField(null=True, blank=True)
    summary = models.JSONField(default=dict, help_text="of the trainer's result: steps, drift stop, weight change, …")
    notes = models.TextField(blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    ready_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "trained_models"
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(fields=("project", "version"), name="model_version_once"),
            models.UniqueConstraint(fields=("project", "major", "minor", "patch"), name="model_numbers_once"),
            models.UniqueConstraint(fields=("project", "ordinal"), name="model_ordinal_once"),
            models.UniqueConstraint(fields=("serving_name",), name="model_serving_name_once"),
            models.CheckConstraint(condition=Q(status__in=ModelStatus.values), name="model_status_known"),
            models.CheckConstraint(
                condition=~Q(status__in=("ready", "deployed")) | ~Q(adapter_path=""), name="model_ready_has_adapter"
            ),
        )
        indexes = (
            models.Index(fields=("project", "-id"), name="models_newest"),
            models.Index(fields=("status", "created_at"), name="models_by_status"),
        )

    def __str__(self) -> str:
        return self.version


class EvaluationState(models.TextChoices):
    PENDING = "pending", "pending"
    RUNNING = "running", "running"
    DONE = "done", "done"
    FAILED = "failed", "failed"


class Evaluation(models.Model):
    """A candidate against another version (none: the bare base) on the same held-out scenarios."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="evaluations", db_index=False)
    evaluation_id = models.CharField(max_length=32, unique=True, default=public_id, editable=False)
    candidate = models.ForeignKey(TrainedModel, on_delete=models.CASCADE, related_name="evaluations")
    baseline = models.ForeignKey(
        TrainedModel, null=True, blank=True, on_delete=models.PROTECT, related_name="evaluations_as_baseline"
    )
    state = models.CharField(max_length=8, choices=EvaluationState, default=EvaluationState.PENDING)
    state_since = models.DateTimeField(db_default=Now())
    split = models.CharField(max_length=8, default="held_out")
    attempts = models.PositiveSmallIntegerField(default=2, help_text="a side at each scenario")
    seed = models.BigIntegerField(default=0, help_text="of scenarios chosen, and of the resampling")
    deadline_at = models.DateTimeField(null=True, blank=True)
    result = models.JSONField(
        null=True,
        blank=True,
        help_text="candidate and baseline mean, gain with interval, better, worse, ties, worst regressions",
    )
    error = models.TextField(blank=True)
    requested_by_name = models.CharField(max_length=150, blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "evaluations"
        ordering = ("-id",)
        constraints = (
            models.CheckConstraint(condition=Q(state__in=EvaluationState.values), name="evaluation_state_known"),
            models.CheckConstraint(
                condition=Q(baseline__isnull=True) | ~Q(baseline=models.F("candidate")), name="evaluation_of_two"
            ),
            models.CheckConstraint(
                condition=~Q(state="done") | Q(result__isnull=False), name="evaluation_done_has_result"
            ),
        )
        indexes = (models.Index(fields=("project", "-id"), name="evaluations_newest"),)

    def __str__(self) -> str:
        return f"evaluation {self.pk}"


class Side(models.TextChoices):
    CANDIDATE = "candidate", "candidate"
    BASELINE = "baseline", "baseline"


class EvaluationWork(models.Model):
    """So many attempts wanted of one side at one scenario; they come back as trajectories."""

    evaluation = models.ForeignKey(Evaluation, on_delete=models.CASCADE, related_name="work", db_index=False)
    scenario = models.ForeignKey(Scenario, on_delete=models.PROTECT, related_name="+")
    side = models.CharField(max_length=9, choices=Side)
    n = models.PositiveSmallIntegerField()
    handed_out_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "evaluation_work"
        constraints = (models.UniqueConstraint(fields=("evaluation", "scenario", "side"), name="evaluation_work_once"),)

    def __str__(self) -> str:
        return f"{self.n} × {self.side} at {self.scenario_id}"


class LockedSetOpening(models.Model):
    """A person opened the locked test set. Openings are counted: each costs some of its worth."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="locked_openings")
    evaluation = models.OneToOneField(Evaluation, on_delete=models.CASCADE, related_name="locked_opening")
    by_user = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="+")
    by_name = models.CharField(max_length=150)
    reason = models.TextField()
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "locked_set_openings"

    def __str__(self) -> str:
        return f"{self.by_name}: {self.reason}"


class Strategy(models.TextChoices):
    IMMEDIATE = "immediate", "immediate"
    GRADUAL = "gradual", "gradual"
    TEST = "test", "test"
    AB = "ab", "A/B"
    SHADOW = "shadow", "shadow"


class DeploymentState(models.TextChoices):
    REQUESTED = "requested", "requested"
    APPROVED = "approved", "approved"
    REJECTED = "rejected", "rejected"
    WITHDRAWN = "withdrawn", "withdrawn"
    ROLLING_OUT = "rolling_out", "rolling out"
    ACTIVE = "active", "active"
    SUPERSEDED = "superseded", "superseded"
    ROLLED_BACK = "rolled_back", "rolled back"
    FAILED = "failed", "failed"


class Deployment(models.Model):
    """A request to let a version serve, with its evidence as it stood, its approval, its rollout."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="deployments", db_index=False)
    model = models.ForeignKey(TrainedModel, on_delete=models.PROTECT, related_name="deployments")
    replaces = models.ForeignKey(
        TrainedModel,
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="+",
        help_text="what served when asked",
    )
    evaluation = models.ForeignKey(
        Evaluation, null=True, blank=True, on_delete=models.PROTECT, related_name="deployments"
    )
    strategy = models.CharField(max_length=9, choices=Strategy, default=Strategy.IMMEDIATE)
    weight = models.FloatField(default=1.0, help_text="share of agents, above 0 and up to 1")
    audience = models.CharField(max_length=ID_LENGTH, default="*", help_text="* is every agent, else one agent_id")
    state = models.CharField(max_length=11, choices=DeploymentState, default=DeploymentState.REQUESTED)
    state_since = models.DateTimeField(db_default=Now())
    gates = models.JSONField(default=list, help_text='rows {"name", "ok", "value", "threshold", "detail"} as frozen')
    evidence = models.JSONField(default=dict)
    reason = models.TextField(blank=True)
    error = models.TextField(blank=True)
    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.PROTECT, related_name="+"
    )
    requested_by_name = models.CharField(max_length=150)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "deployments"
        ordering = ("-id",)
        constraints = (
            models.CheckConstraint(condition=Q(state__in=DeploymentState.values), name="deployment_state_known"),
            models.CheckConstraint(condition=Q(weight__gt=0) & Q(weight__lte=1), name="deployment_weight_is_a_share"),
            models.UniqueConstraint(
                fields=("model",),
                condition=Q(state__in=("requested", "approved", "rolling_out")),
                name="deployment_one_pending_a_version",
            ),
        )
        indexes = (models.Index(fields=("project", "-id"), name="deployments_newest"),)

    def __str__(self) -> str:
        return f"deployment {self.pk}"


class Approval(models.Model):
    """A person's decision on a deployment. One decides; the second to click is told so."""

    deployment = models.OneToOneField(Deployment, on_delete=models.CASCADE, related_name="approval")
    approved = models.BooleanField()
    by_user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    by_name = models.CharField(max_length=150)
    reason = models.TextField()
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "approvals"

    def __str__(self) -> str:
        return f"{'approved' if self.approved else 'rejected'} by {self.by_name}"


class ServingInterval(models.Model):
    """What served whom, from when to when. Added and ended, never changed; no overlap in one slot."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="serving_intervals", db_index=False)
    model = models.ForeignKey(
        TrainedModel,
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="serving_intervals",
        help_text="empty: the bare base",
    )
    deployment = models.ForeignKey(
        Deployment, null=True, blank=True, on_delete=models.PROTECT, related_name="intervals"
    )
    audience = models.CharField(max_length=ID_LENGTH, default="*")
    slot = models.CharField(max_length=8, default="stable", choices=(("stable", "stable"), ("canary", "canary")))
    weight = models.FloatField(default=1.0, help_text="share of the audience, by stable hash with the salt")
    salt = models.CharField(max_length=32, blank=True)
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField(null=True, blank=True)
    by_name = models.CharField(max_length=150)
    reason = models.TextField(blank=True)

    class Meta:
        db_table = "serving_intervals"
        ordering = ("-starts_at", "-id")
        constraints = (
            ExclusionConstraint(
                name="serving_no_overlap",
                expressions=(
                    ("project", RangeOperators.EQUAL),
                    ("audience", RangeOperators.EQUAL),
                    ("slot", RangeOperators.EQUAL),
                    (
                        Func(
                            "starts_at",
                            "ends_at",
                            RangeBoundary(inclusive_lower=True, inclusive_upper=False),
                            function="TSTZRANGE",
                            output_field=DateTimeRangeField(),
                        ),
                        RangeOperators.OVERLAPS,
                    ),
                ),
            ),
            models.CheckConstraint(
                condition=Q(ends_at__isnull=True) | Q(ends_at__gte=models.F("starts_at")),
                name="serving_ends_after_start",
            ),
            models.CheckConstraint(condition=Q(weight__gt=0) & Q(weight__lte=1), name="serving_weight_is_a_share"),
        )
        indexes = (models.Index(fields=("project", "audience"), condition=Q(ends_at__isnull=True), name="serving_now"),)

    def __str__(self) -> str:
        return f"{self.model or 'base'} for {self.audience}"


class AgentRoute(models.Model):
    """The version an agent was last given: keeps routing sticky and answers "who uses it"."""

    agent = models.OneToOneField(Agent, on_delete=models.CASCADE, related_name="route")
    interval = models.ForeignKey(ServingInterval, null=True, on_delete=models.SET_NULL, related_name="routes")
    given_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "agent_routes"

    def __str__(self) -> str:
        return f"{self.agent} → {self.interval}"
