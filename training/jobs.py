"""A frozen batch as text: the trainer's job folder, and the same for everyone else by GET …/batches/{id}/data/.

What is in memory at a time is bounded: an episode is about 3 MB, so that a group, let alone a batch, might not fit.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from django.conf import settings

from training.models import BatchGroup, BatchItem, Mode, TrainedModel, TrainingBatch
from training.policies import hyperparameters
from training.trainer import job as wire
from trajectories import segments, transcripts
from trajectories.errors import Refused
from trajectories.models import Origin, Trajectory
from trajectories.payloads import TrajectoryPayload

MODES: dict[Mode, wire.Mode] = {Mode.GRPO: "grpo", Mode.FILTERED: "filtered", Mode.SFT: "sft"}

AT_ONCE = 100  # payloads fetched by one query …
AT_ONCE_BYTES = 8 * 2**20  # … unless they are larger together than this (of JSON)

_encoder = msgspec.json.Encoder()


def write(batch: TrainingBatch, folder: Path, *, job_id: str, fence: int, resume_from: Path | None) -> None:
    """Fill the folder of one attempt and fence: groups.jsonl, then job.json, so that a folder with a job.json is whole.

    Raises:
        Refused: what was frozen is no longer there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "groups.jsonl.part"
    with part.open("wb") as lines:
        for piece in groups(batch):
            lines.write(piece)
        lines.flush()
        os.fsync(lines.fileno())
    part.replace(folder / "groups.jsonl")
    job = wire.Job(
        job_id=job_id,
        fence=fence,
        mode=MODES[Mode(batch.mode)],
        base_model=batch.base_model,
        base_cache=str(settings.MODELS_CACHE),
        parent_adapter=batch.parent.adapter_path if batch.parent else None,
        resume_from=str(resume_from) if resume_from else None,
        seed=batch.seed,
        hyperparameters=hyperparameters(batch.hyperparameters),
    )
    wire.write_atomically(folder / "job.json", msgspec.json.format(_encoder.encode(job), indent=2))


def data(batch: TrainingBatch) -> Iterator[bytes]:
    """The batch for trainers of others, as NDJSON: a first line that says what it is, then a line a group.

    The first line has the manifest hash: SHA-256 over `freezing.manifest_line` of all items in order.

    Raises:
        Refused: it is not frozen yet, or what was frozen is no longer there.
    """
    _check(batch)
    said = {
        "format": "trainingsite-batch-1",
        "batch_id": batch.batch_id,
        "mode": batch.mode,
        "base_model": batch.base_model,
        "parent": batch.parent.version if batch.parent else None,
        "off_policy": batch.off_policy,
        "seed": batch.seed,
        "hyperparameters": hyperparameters(batch.hyperparameters),
        "reward_mix": batch.reward_mix,
        "groups": batch.n_groups,
        "trajectories": batch.n_trajectories,
        "manifest_hash": batch.manifest_hash,
    }
    yield _encoder.encode(said) + b"\n"
    yield from groups(batch)


def groups(batch: TrainingBatch) -> Iterator[bytes]:
    """The lines of groups.jsonl (`wire.GroupLine`), in pieces of a trajectory each.

    Raises:
        Refused: what was frozen is no longer there.
    """
    _check(batch)
    versions = TrainedModel.objects.filter(project=batch.project, base_model=batch.base_model)
    of_this_base = frozenset(versions.values_list("version", flat=True))
    items = batch.items.filter(batch_group__is_used=True).select_related("trajectory", "batch_group")
    group: int | None = None  # whose line is not closed yet
    for item, payload in _with_payloads(batch, items.order_by("batch_group", "pk").iterator(chunk_size=100)):
        row = item.batch_group
        line = _encoder.encode(_trajectory_line(batch, item, payload, of_this_base))
        if group == row.pk:
            yield b"," + line
            continue
        if group is not None:
            yield b"]}\n"
        if not row.scenario_ref:  # no scenario, so nothing shared: each alone
            yield _opening(f"alone-{item.trajectory_ref}", row) + line + b"]}\n"
            group = None
        else:
            yield _opening(str(row.group_id or f"deleted-{row.pk}"), row) + line
            group = row.pk
    if group is not None:
        yield b"]}\n"


def _with_payloads(batch: TrainingBatch, items: Iterable[BatchItem]) -> Iterator[tuple[BatchItem, TrajectoryPayload]]:
    """Each item with what was recorded: small payloads are fetched together, large ones one by one.

    Raises:
        Refused: an item was erased, or is not what was frozen.
    """
    waiting: list[tuple[BatchItem, Trajectory]] = []
    size = 0
    for item in items:
        trajectory = item.trajectory
        if trajectory is None:
            raise Refused(f"Trajectory {item.trajectory_ref} of batch {batch.batch_id} was erased. Start a new batch.")
        if bytes(trajectory.content_hash) != bytes(item.content_hash):
            raise Refused(
                f"Trajectory {item.trajectory_ref} of batch {batch.batch_id} is not what was frozen any more."
            )
        if waiting and (size + trajectory.raw_size > AT_ONCE_BYTES or len(waiting) == AT_ONCE):
            yield from _load(waiting)
            waiting, size = [], 0
        waiting.append((item, trajectory))
        size += trajectory.raw_size
    yield from _load(waiting)


def _load(waiting: Sequence[tuple[BatchItem, Trajectory]]) -> Iterator[tuple[BatchItem, TrajectoryPayload]]:
    payloads = segments.load_many([trajectory for _, trajectory in waiting], with_actions=False)
    for item, trajectory in waiting:
        yield item, payloads[trajectory.pk]


def _check(batch: TrainingBatch) -> None:
    if batch.frozen_at is None:
        raise Refused(f"Batch {batch.batch_id} is {batch.get_status_display()}: its data are frozen before training.")
    lost = batch.items.filter(trajectory__isnull=True).count()
    if lost:
        raise Refused(f"{lost} trajectories of batch {batch.batch_id} were erased. Start a new batch.")


def _opening(name: str, row: BatchGroup) -> bytes:
    """A `wire.GroupLine` up to its first trajectory."""
    empty = _encoder.encode(wire.GroupLine(group=name, scenario=row.scenario_ref, trajectories=[]))
    assert empty.endswith(b'"trajectories":[]}'), "the trajectories stand last in a line"
    return empty.removesuffix(b"]}")


def _trajectory_line(
    batch: TrainingBatch, item: BatchItem, payload: TrajectoryPayload, of_this_base: frozenset[str]
) -> wire.TrajectoryLine:
    """One frozen attempt with its conversations."""
    assert item.trajectory is not None, "_with_payloads lets no erased one through"
    return wire.TrajectoryLine(
        trajectory_id=item.trajectory_ref,
        content_hash=bytes(item.content_hash).hex(),
        reward=item.reward,
        advantage=item.advantage,
        weight=item.weight,
        train=item.is_trained,
        role=item.trajectory.role,
        histories=[
            wire.HistoryLine(
                messages=one.messages, tools=one.tools, calls=[_call(batch, call, of_this_base) for call in one.calls]
            )
            for one in transcripts.histories(payload)
        ],
    )


def _call(batch: TrainingBatch, call: transcripts.HistoryCall, of_this_base: frozenset[str]) -> wire.CallLine:
    ours = call.origin == Origin.OWN and call.version in of_this_base
    # Token ids mean something to their own tokenizer alone; everything else is rendered from its messages.
    tokens = call.token_ids if ours or call.tokenizer == batch.base_model else None
    known = [one for one in call.logprobs or () if one is not None]
    logprobs = known if tokens and len(known) == len(tokens) else None
    by_parent = ours and batch.parent is not None and call.version == batch.parent.version
    # A wall: in grpo a ratio stands for this project's own policy, so nobody else's words are trained; and where the
    # log-probabilities were not recorded, only the parent can say them again.
    has_ratio = ours and (logprobs is not None or by_parent)
    return wire.CallLine(
        at=call.at,
        trainable=call.trainable and (has_ratio or batch.mode != Mode.GRPO),
        parent_policy=by_parent,
        prompt_token_ids=call.prompt_token_ids if tokens else None,
        token_ids=tokens,
        logprobs=logprobs,
        temperature=call.temperature,
        approximate=_is_approximate(call),
    )


def _is_approximate(call: transcripts.HistoryCall) -> bool:
    """The recorded log-probabilities are not those of the distribution that was sampled from."""
    cut = call.top_p not in (None, 1.0) or call.top_k not in (None, 0, -1) or call.min_p not in (None, 0.0)
    return cut or (call.logprobs_mode != "processed" and call.temperature not in (None, 1.0))
