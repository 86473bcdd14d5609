"""The folder through which a trainer is given work and gives it back: every shape in it, with units.

    JOB/job.json         `Job`: what to train and how; written once, before the start
    JOB/groups.jsonl     one `GroupLine` a line: the frozen batch, advantages by value
    JOB/metrics.jsonl    one `Progress` a line, appended while it runs (by rank 0)
    JOB/checkpoint/      adapter, optimiser, random state, step: what a restart goes on from
    JOB/adapter/         the result: a PEFT folder (adapter_config.json, adapter_model.safetensors)
    JOB/result.json      `Result`: written last, by rename; without it the job has not ended

`python -m training.trainer --job JOB` exits with one of the `EXIT_…` codes below. Started again on the same folder it
goes on from `checkpoint/`; with a `result.json` of state "succeeded" there it does nothing and exits 0.
Needs msgspec alone: whoever writes a job or reads a result imports this without torch.
"""

import os
from pathlib import Path
from typing import Literal

import msgspec

EXIT_DONE = 0  # result.json says "succeeded"
EXIT_FAILED = 1  # a fault: memory, disk, a bug; trying again may help. result.json says "failed" where it could
EXIT_INVALID = 2  # job or data cannot be trained as they are; trying again cannot help. result.json says why
EXIT_STOPPED = 75  # SIGTERM: a checkpoint was saved, no result.json; started again it goes on (EX_TEMPFAIL)

Mode = Literal["grpo", "filtered", "sft"]
Phase = Literal["loading", "encoding", "reference", "training", "saving", "done"]


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to learn. The defaults suit a 14B base; `training/demo_task.py` has those of the tiny one."""

    loss: Literal["cispo", "ppo"] = "cispo"
    level: Literal["token", "sequence"] = "token"  # what the probability ratio is taken over
    length_normalisation: Literal["token", "trajectory", "constant"] = "token"
    # token: every trained token of a step counts alike; trajectory: every trajectory does, whatever its length;
    # constant: sums over tokens are divided by `length_constant` (Dr. GRPO)
    length_constant: int = 1024  # tokens; read with "constant" only
    clip_low: float | None = None  # ratio is kept above 1 - clip_low; None: cispo 1.0 (no lower bound), ppo 0.2
    clip_high: float | None = None  # … and below 1 + clip_high; None: cispo 4.0 (ratio at most 5), ppo 0.2
    kl_beta: float = 0.0  # weight of the k3 KL (nats a token) to the base with the adapter off; 0: not computed
    max_drift: float = 0.2  # mean |ratio - 1| over trained tokens at which the epochs end; 0: never
    epochs: int = 1  # passes over the batch
    trajectories_per_step: int = 256  # about this many trajectories an optimiser step, in whole groups
    learning_rate: float = 1e-5  # peak; constant after the warm-up
    warmup_steps: int = 3  # optimiser steps from 1/(n+1) of the rate up to all of it
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # gradient norm is cut to this
    lora_rank: int = 16  # read when there is no parent adapter; with one, its rank stays
    lora_alpha: int = 32
    max_tokens_per_batch: int = 16384  # tokens (with padding) of one forward pass; bounds the memory
    max_sequence_tokens: int = 16384  # a longer trajectory is dropped whole and reported
    share_prefix_tokens: int = 640  # sequences with a common beginning share its computation in rows of up to this many
    # tokens (the attention inside a row is dense, so long rows do not pay); 0: every sequence is a row
    checkpoint_every: int = 20  # optimiser steps between checkpoints; also one at SIGTERM


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One attempt to train one batch."""

    format: Literal["trainingsite-job-1"] = "trainingsite-job-1"
    job_id: str  # of the attempt; comes back in result.json
    fence: int = 0  # of the lease; comes back in result.json, so that a result counts only for its owner
    mode: Mode
    base_model: str  # "tiny", "smollm2", a local folder or a hub id: see bases.materialise
    base_cache: str  # folder for bases made here; shared between jobs
    parent_adapter: str | None = None  # PEFT folder to go on from; None: a fresh adapter on the base
    resume_from: str | None = None  # folder of an earlier attempt of the same batch, whose checkpoint/ to go on from
    seed: int = 0
    threads: int = 0  # of torch; 0: as torch finds
    device: str = "auto"  # "auto": cuda when there is one, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base; auto: bfloat16 on cuda, float32 on cpu
    hyperparameters: Hyperparameters = msgspec.field(default_factory=Hyperparameters)


class CallLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One LLM call: the assistant message `messages[at]` of its history, its prompt being `messages[:at]`.

    An assistant message that no call names is context, as is one whose call is not trainable.
    """

    at: int  # index into the history's messages
    trainable: bool = True  # whether it enters the loss
    parent_policy: bool = False  # sampled by the parent of this job: log-probabilities may be recomputed
    prompt_token_ids: list[int] | None = None  # of the base's tokenizer, as the server gave them
    token_ids: list[int] | None = None  # the sampled ones; used before any rendering when both are there
    logprobs: list[float] | None = None  # nats, one a token of token_ids (else of the rendered answer)
    temperature: float | None = None  # None: 1.0; the trainer divides the logits by it
    approximate: bool = False  # cut distribution or raw log-probabilities at T != 1: the ratio is approximate (counted)


class HistoryLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One conversation of a trajectory."""

    messages: list[dict[str, object]]  # OpenAI chat messages
    tools: list[dict[str, object]] | None = None  # OpenAI tool definitions
    calls: list[CallLine] = []


class TrajectoryLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt, with its share in the update frozen by value."""

    trajectory_id: str
    content_hash: str = ""
    reward: float | None = None  # the mixed reward; for the log alone, the loss reads `advantage`
    advantage: float = 0.0  # used as it stands in grpo and filtered (there only above 0); sft takes 1.0
    weight: float = 1.0  # of the trajectory, shared by its sequences; 0 or less: context for the statistics alone
    train: bool = True  # False: counted in its group's mean, no gradient (masked, truncated)
    role: str = ""
    histories: list[HistoryLine] = []


class GroupLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of groups.jsonl: attempts that share a baseline."""

    group: str  # id, unique in the file
    scenario: str = ""
    trajectories: list[TrajectoryLine]


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of metrics.jsonl.

    Lines of phase "training" are one an optimiser step, steps counted from 1 without a gap; after a restart the file
    is first cut back to the checkpoint's step, so a step may be written again: the later line counts.
    Other phases have the step reached so far and no measures.
    """

    phase: Phase
    step: int  # optimiser steps done
    total_steps: int  # planned; 0 while not known (loading, encoding)
    at: float  # seconds since 1970
    seconds: float  # since this process started
    eta_seconds: float | None = None  # to the end of training, from the pace of the last steps
    detail: str = ""  # for people
    epoch: int | None = None  # from 1
    loss: float | None = None
    drift: float | None = None  # mean |ratio - 1| over the trained tokens, before this step's update
    ratio_p95: float | None = None  # 95th percentile of the ratio
    clipped_share: float | None = None  # of trained tokens whose ratio lies outside the clip range
    kl_behaviour: float | None = None  # k3 KL to the policy that played, nats a token
    kl_base: float | None = None  # k3 KL to the base, nats a token; only with kl_beta
    entropy: float | None = None  # of the next-token distribution at trained positions, at their temperature, nats
    logprob: float | None = None  # mean log-probability of the trained tokens, nats
    grad_norm: float | None = None  # before clipping
    learning_rate: float | None = None
    trajectories: int | None = None  # with gradient in this step
    trained_tokens: int | None = None  # in this step; equal sequences count each time
    computed_tokens: int | None = None  # tokens that went through the model in this step (after sharing)
    tokens_per_second: float | None = None  # sequence tokens (prompt and answer, each trajectory) a second
    reward_mean: float | None = None  # over the step's trajectories whose reward is known
    reward_std: float | None = None
    share_without_spread: float | None = None  # of the step's groups: all advantages 0


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the whole batch's gradient weight, sum of |advantage| x token weight, falls on one slice."""

    name: str  # a role, or a range of trained tokens such as "65-128"
    trajectories: int
    trained_tokens: int
    share: float  # 0 to 1; the shares of one table add up to 1


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """Trajectories that were in the batch and gave no gradient, or calls that became context, and why."""

    reason: Literal[
        "too_long",  # more than max_sequence_tokens
        "not_trained",  # train: false, or weight 0
        "no_advantage",  # advantage 0 (grpo), or not above 0 (filtered)
        "no_trainable_call",
        "greedy_call",  # grpo: temperature 0 has no ratio; the call is context
        "empty_answer",  # a call without tokens
    ]
    count: int
    examples: list[str] = []  # up to five trajectory ids


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """result.json. Everything after `error` is set when it succeeded."""

    job_id: str
    fence: int
    state: Literal["succeeded", "failed"]
    mode: Mode
    error_kind: str = ""  # "invalid_job", "invalid_data", "no_signal", "fault"
    error: str = ""  # for people: what is the case, and the way out
    base_model: str = ""  # name as in job.json
    base_fingerprint: str = ""  # sha256 over the base's config, tokenizer and weight files
    adapter: str = ""  # folder, relative to the job's
    adapter_sha256: str = ""  # of adapter/adapter_model.safetensors
    data_sha256: str = ""  # of groups.jsonl as it was read
    steps_planned: int = 0
    steps_done: int = 0  # updates that are in the adapter
    drift_stopped: bool = False
    drift_detail: str = ""  # a sentence for people: how far, after which step, and which weights are the result
    final_drift: float | None = None  # of the weights that are the result, as last measured
    weight_change: float = 0.0  # Frobenius norm of the change of all adapted weights (scale x B A) against the parent
    groups: int = 0
    groups_without_spread: int = 0
    trajectories: int = 0  # in the batch
    trajectories_trained: int = 0  # of these, with gradient
    sequences: int = 0  # with gradient, before equal ones were merged
    sequences_merged: int = 0  # … and after
    trained_tokens: int = 0  # in one pass; equal sequences count each time
    approximate_calls: int = 0
    recomputed_calls: int = 0  # log-probabilities recomputed: the parent's own calls
    uncorrected: bool = False  # off-policy without a ratio: filtered and sft
    tokens_per_second: float = 0.0  # sequence tokens of the whole training over its seconds
    seconds: float = 0.0  # of training, all attempts that this one continued not counted
    peak_memory_bytes: int = 0
    resumed_from_step: int = 0
    world_size: int = 1
    dropped: list[Dropped] = []
    gradient_by_length: list[Share] = []
    gradient_by_role: list[Share] = []
    versions: dict[str, str] = {}  # torch, transformers, peft, python


class InvalidJob(ValueError):
    """Job or data cannot be trained as they are. `kind` goes into `Result.error_kind`."""

    def __init__(
        self, detail: str, *, kind: Literal["invalid_job", "invalid_data", "no_signal"] = "invalid_data"
    ) -> None:
        super().__init__(detail)
        self.kind = kind


def write_job(folder: Path, job: Job, groups: list[GroupLine]) -> None:
    """Write groups.jsonl, then job.json, so that a folder with a job.json is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = msgspec.json.Encoder()
    with (folder / "groups.jsonl.part").open("wb") as lines:
        for group in groups:
            lines.write(encoder.encode(group) + b"\n")
        lines.flush()
        os.fsync(lines.fileno())
    (folder / "groups.jsonl.part").replace(folder / "groups.jsonl")
    write_atomically(folder / "job.json", msgspec.json.format(encoder.encode(job), indent=2))


def read_job(folder: Path) -> Job:
    """Raises InvalidJob: no job.json there, or not of this shape."""
    try:
        return msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    except (OSError, msgspec.MsgspecError) as exc:
        raise InvalidJob(f"{folder / 'job.json'} cannot be read: {exc}", kind="invalid_job") from exc


def read_groups(raw: bytes) -> list[GroupLine]:
    """The lines of a groups.jsonl. Raises InvalidJob naming the line."""
    decoder = msgspec.json.Decoder(GroupLine)
    groups: list[GroupLine] = []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            groups.append(decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise InvalidJob(f"groups.jsonl line {number} is not a group: {exc}") from exc
    return groups


def read_progress(folder: Path) -> list[Progress]:
    """The lines of metrics.jsonl so far; a last line that is still being written is left for the next look."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    raw = path.read_bytes()
    decoder = msgspec.json.Decoder(Progress)
    return [decoder.decode(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines() if line.strip()]


def read_result(folder: Path) -> Result | None:
    """The result, or None while there is none."""
    path = folder / "result.json"
    return msgspec.json.decode(path.read_bytes(), type=Result) if path.exists() else None


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, also after a power cut."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
