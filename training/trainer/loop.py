"""Train one frozen batch: from a job folder to an adapter, told in order.

The batch was played by a policy that is fixed, so every pass over it moves the model away from the data. Each step
measures how far (mean |ratio - 1|) before it updates; past `max_drift` the passes end, and the weights from before
the breach are the result.
"""

import hashlib
import math
import os
import platform
import resource
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.trainer import bases, checkpoints, data, loss
from training.trainer.job import (
    Hyperparameters,
    InvalidJob,
    Job,
    Phase,
    Progress,
    Result,
    read_groups,
    read_progress,
    write_atomically,
)

if TYPE_CHECKING:
    from peft import PeftModel


class Stopped(Exception):
    """Asked to stop: a checkpoint of the last whole step is on disk."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that train together; gradients are summed over all."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, mine: list[tuple[int, list[float]]]) -> list[tuple[int, list[float]]]:
        if self.size == 1:
            return mine
        parts: list[list[tuple[int, list[float]]]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, mine)
        return [one for part in parts for one in part]


class Policy:
    """A base with a LoRA adapter in training, and the one way to ask it for log-probabilities."""

    def __init__(self, model: "PeftModel", device: str) -> None:
        self.model = model
        self.device = device
        plain = model.get_base_model()
        # PEFT puts its layers into the base in place, so trunk and head can be called apart.
        self.trunk: nn.Module = getattr(plain, plain.base_model_prefix)
        self.head: nn.Linear = plain.get_output_embeddings()
        self.weights: dict[str, nn.Parameter] = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }

    def logp(self, batch: data.MicroBatch) -> tuple[Tensor, Tensor]:
        """(N,) log-probabilities and entropies of the batch's trained tokens; only these go through the head."""
        hidden = self.hidden(batch.ids, batch.mask, batch.positions)
        wanted = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.predictor)
        return loss.token_logp(wanted, self.head, batch.target, batch.temperature)

    def hidden(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        # Without a mask the rows are plain; positions would make transformers look for packed sequences in them.
        states: Tensor = self.trunk(
            input_ids=ids, attention_mask=mask, position_ids=None if mask is None else positions, use_cache=False
        ).last_hidden_state
        return states

    def copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def restore(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])


@dataclass(slots=True)
class Measures:
    """Sums over the trained tokens of a step, of this process until they are summed over all."""

    sums: Tensor  # (len(NAMES),) float64
    ratios: list[Tensor]
    counts: list[Tensor]

    NAMES = ("loss", "count", "drift", "clipped", "kl_behaviour", "kl_base", "entropy", "logp", "tokens", "stop")

    @classmethod
    def empty(cls) -> "Measures":
        return cls(sums=torch.zeros(len(cls.NAMES), dtype=torch.float64), ratios=[], counts=[])

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.sums[self.NAMES.index(name)] += value

    def __getitem__(self, name: str) -> float:
        return float(self.sums[self.NAMES.index(name)])

    def mean(self, name: str) -> float:
        """Mean over trained tokens, equal sequences counted each time."""
        return self[name] / self["count"]


@dataclass(slots=True)
class Outcome:
    """Where training ended."""

    steps_done: int
    drift_stopped: bool
    drift_detail: str
    final_drift: float | None
    seconds: float
    sequence_tokens: int


class Log:
    """metrics.jsonl of this job, written by the first process."""

    def __init__(self, folder: Path, world: World, started: float) -> None:
        self.path = folder / "metrics.jsonl"
        self.silent = world.rank > 0
        self.started = started
        self.step = 0
        self.total = 0

    def go_on_from(self, step: int) -> None:
        """Forget the lines of steps that will be done again."""
        self.step = step
        if not self.silent and self.path.exists():
            kept = [line for line in read_progress(self.path.parent) if line.step <= step]
            write_atomically(self.path, b"".join(msgspec.json.encode(line) + b"\n" for line in kept))

    def phase(self, phase: Phase, detail: str = "") -> None:
        self.write(
            Progress(
                phase=phase, step=self.step, total_steps=self.total, detail=detail, at=time.time(), seconds=self.age()
            )
        )

    def age(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def write(self, line: Progress) -> None:
        if not self.silent:
            with self.path.open("ab") as out:
                out.write(msgspec.json.encode(line) + b"\n")


def run(folder: Path, job: Job, *, world: World | None = None, stop: Callable[[], bool] = lambda: False) -> Result:
    """Train the job in `folder`; its adapter and metrics are on disk when this returns, result.json is the caller's.

    Args:
        world: of several processes that share the folder; None: alone.
        stop: asked between micro-batches (between steps when there are several processes).

    Raises:
        InvalidJob: job or data cannot be trained as they are.
        Stopped: `stop` said so; a checkpoint is on disk.
    """
    world = world or World()
    started = time.monotonic()
    log = Log(folder, world, started)
    hyper = job.hyperparameters
    if job.threads:
        torch.set_num_threads(job.threads)

    log.phase("loading", job.base_model)
    policy, base_folder = load_policy(job)
    raw = (folder / "groups.jsonl").read_bytes()
    print_of_base = bases.fingerprint(base_folder)
    identity = _identity(job, raw, print_of_base)
    going_on = _checkpoint(folder, job, identity)
    log.go_on_from(going_on.step if going_on else 0)

    log.phase("encoding")
    tokenizer = bases.load_tokenizer(base_folder)
    ends = bases.end_tokens(base_folder, tokenizer)
    encoder = data.Encoder(tokenizer, ends, job.mode, vocabulary=policy.head.out_features)
    batch = data.encode(read_groups(raw), encoder, hyper)
    _check_head(policy, batch)
    parent = policy.copy()
    if batch.recomputed_calls or (hyper.kl_beta and job.mode == "grpo"):
        log.phase("reference", "log-probabilities under the parent and the base")
        _reference(policy, batch, hyper, world)

    outcome = _train(folder, job, policy, batch, log, world, identity, going_on, stop)
    if outcome.steps_done == 0:
        raise InvalidJob(
            f"{outcome.drift_detail} Those are the parent's, so nothing was learned. Lower learning_rate "
            f"({hyper.learning_rate:g}), or raise max_drift.",
            kind="invalid_job",
        )

    log.phase("saving")
    sha256 = _save_adapter(policy, job, folder) if world.rank == 0 else ""
    log.phase("done", outcome.drift_detail)
    return Result(
        job_id=job.job_id,
        fence=job.fence,
        state="succeeded",
        mode=job.mode,
        base_model=job.base_model,
        base_fingerprint=print_of_base,
        adapter="adapter",
        adapter_sha256=sha256,
        data_sha256=hashlib.sha256(raw).hexdigest(),
        steps_planned=log.total,
        steps_done=outcome.steps_done,
        drift_stopped=outcome.drift_stopped,
        drift_detail=outcome.drift_detail,
        final_drift=outcome.final_drift,
        weight_change=weight_change(policy, parent),
        groups=batch.groups_total,
        groups_without_spread=batch.groups_without_spread,
        trajectories=batch.trajectories_total,
        trajectories_trained=batch.trajectories,
        sequences=batch.sequences,
        sequences_merged=batch.sequences_merged,
        trained_tokens=batch.trained_tokens,
        approximate_calls=batch.approximate_calls,
        recomputed_calls=batch.recomputed_calls,
        uncorrected=job.mode != "grpo",
        tokens_per_second=round(outcome.sequence_tokens / outcome.seconds, 1) if outcome.seconds else 0.0,
        seconds=round(outcome.seconds, 3),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        resumed_from_step=going_on.step if going_on else 0,
        world_size=world.size,
        dropped=batch.dropped,
        gradient_by_length=batch.by_length,
        gradient_by_role=batch.by_role,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
    )


def load_policy(job: Job) -> tuple[Policy, Path]:
    """The base with the parent's adapter, or with a fresh one (B = 0, so that it starts as the base).

    Raises:
        InvalidJob: no such base, or the adapter does not fit it.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    hyper = job.hyperparameters
    device = ("cuda" if torch.cuda.is_available() else "cpu") if job.device == "auto" else job.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    on_gpu = device.startswith("cuda")
    dtype = {"auto": torch.bfloat16 if on_gpu else torch.float32}.get(job.dtype) or getattr(torch, job.dtype)
    try:
        folder = bases.materialise(job.base_model, Path(job.base_cache))
    except bases.UnknownBase as exc:
        raise InvalidJob(str(exc), kind="invalid_job") from exc
    torch.manual_seed(job.seed)  # LoRA's A is drawn
    base = bases.load_model(folder, dtype=dtype, device=device)
    if job.parent_adapter is None:
        model = get_peft_model(
            base,
            LoraConfig(
                r=hyper.lora_rank,
                lora_alpha=hyper.lora_alpha,
                lora_dropout=0.0,
                bias="none",
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    else:
        if not (Path(job.parent_adapter) / "adapter_config.json").is_file():
            raise InvalidJob(f"parent adapter {job.parent_adapter} has no adapter_config.json.", kind="invalid_job")
        try:
            model = PeftModel.from_pretrained(base, job.parent_adapter, is_trainable=True)
        except (RuntimeError, ValueError, OSError) as exc:
            raise InvalidJob(
                f"parent adapter {job.parent_adapter} does not fit base {job.base_model}: {exc}", kind="invalid_job"
            ) from exc
    model.eval()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # AdamW's small steps vanish in bfloat16
    if on_gpu:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
        model.train()  # checkpointing is off in evaluation mode; no base we load has dropout left
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return Policy(model, device), folder


def _check_head(policy: Policy, batch: data.Batch) -> None:
    """Trunk and head called apart must give the model's own logits (soft-capping, scaling, … would not show)."""
    ids = torch.tensor([batch.groups[0].sequences[0].ids[:16]], device=policy.device)
    with torch.no_grad():
        apart = policy.head(policy.hidden(ids, None, ids))
        whole = policy.model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(apart.float(), whole.float(), atol=1e-2, rtol=1e-2):
        raise InvalidJob(
            "this base does more than a linear head after its decoder, which is not supported.", kind="invalid_job"
        )


def _identity(job: Job, raw: bytes, base: str) -> str:
    """What a checkpoint must share with the job that goes on from it."""
    settings = msgspec.json.encode([job.mode, job.base_model, job.parent_adapter, job.seed, job.hyperparameters])
    return hashlib.sha256(b"\n".join([hashlib.sha256(raw).digest(), settings, base.encode()])).hexdigest()


def _checkpoint(folder: Path, job: Job, identity: str) -> checkpoints.Checkpoint | None:
    """Ours, else the earlier attempt's.

    Raises:
        InvalidJob: `resume_from` holds the checkpoint of other data or settings.
    """
    own = checkpoints.load(folder)
    if own is not None and own.identity == identity:
        return own
    if job.resume_from is None:
        return None
    earlier = checkpoints.load(Path(job.resume_from))
    if earlier is not None and earlier.identity != identity:
        raise InvalidJob(
            f"the checkpoint in {job.resume_from} was made with other data, settings or base. Start without it.",
            kind="invalid_job",
        )
    return earlier


def _reference(policy: Policy, batch: data.Batch, hyper: Hyperparameters, world: World) -> None:
    """Fill in what is compared with: missing old log-probabilities under the parent, all of them under the base."""
    every = [sequence for group in batch.groups for sequence in group.sequences]
    place = {id(sequence): index for index, sequence in enumerate(every)}
    missing = [sequence for sequence in every if any(math.isnan(value) for value in sequence.old_logp)]
    under_parent = dict(world.gather(_logp_of(policy, missing, place, hyper, world)))
    under_base: dict[int, list[float]] = {}
    if hyper.kl_beta:
        with policy.model.disable_adapter():
            under_base = dict(world.gather(_logp_of(policy, every, place, hyper, world)))
    for group in batch.groups:
        filled: list[data.Encoded] = []
        for sequence in group.sequences:
            index = place[id(sequence)]
            again = under_parent.get(index, [])
            old = tuple(again[i] if math.isnan(value) else value for i, value in enumerate(sequence.old_logp))
            filled.append(replace(sequence, old_logp=old, base_logp=tuple(under_base.get(index, ()))))
        group.sequences = filled


def _logp_of(
    policy: Policy, sequences: Sequence[data.Encoded], place: dict[int, int], hyper: Hyperparameters, world: World
) -> list[tuple[int, list[float]]]:
    """This process's part: (index, log-probabilities of the trained tokens) of each sequence."""
    found: list[tuple[int, list[float]]] = []
    for micro in data.micro_batches(sequences, hyper)[world.rank :: world.size]:
        with torch.no_grad():
            values = policy.logp(micro.to(policy.device))[0].cpu()
        at = 0
        for source in micro.sources:
            found.append((place[id(source)], values[at : at + len(source.trained)].tolist()))
            at += len(source.trained)
    return found


def _train(
    folder: Path,
    job: Job,
    policy: Policy,
    batch: data.Batch,
    log: Log,
    world: World,
    identity: str,
    going_on: checkpoints.Checkpoint | None,
    stop: Callable[[], bool],
) -> Outcome:
    hyper = job.hyperparameters
    epochs = range(1, hyper.epochs + 1)
    plan = [
        (epoch, groups) for epoch in epochs for groups in data.steps(batch.groups, hyper, seed=job.seed, epoch=epoch)
    ]
    log.total = len(plan)
    optimiser = torch.optim.AdamW(policy.weights.values(), lr=hyper.learning_rate, weight_decay=hyper.weight_decay)
    # The weights before the last update: what a breach falls back to.
    last_good, last_drift = policy.copy(), None
    first, before, sequence_tokens = 0, 0.0, 0
    if going_on is not None:
        policy.restore(going_on.adapter)
        optimiser.load_state_dict(dict(going_on.optimiser))
        torch.set_rng_state(going_on.random)
        last_good = {name: weight.to(policy.device) for name, weight in going_on.last_good.items()}
        last_drift, first, before = going_on.last_drift, going_on.step, going_on.seconds
    log.step = first
    if first:  # under "training" this line would stand in for the measures of the step it goes on from
        log.phase("encoding", f"going on after step {first}")
    else:
        log.phase("training", f"{len(plan)} steps over {batch.trajectories} trajectories")
    started = time.monotonic()
    paces: deque[float] = deque(maxlen=10)

    def keep(step: int) -> None:
        if world.rank == 0:
            checkpoints.save(
                folder,
                checkpoints.Checkpoint(
                    step=step,
                    seconds=before + time.monotonic() - started,
                    identity=identity,
                    adapter=policy.copy(),
                    last_good=last_good,
                    last_drift=last_drift,
                    optimiser=optimiser.state_dict(),  # type: ignore[arg-type]  # torch types it as dict[str, Any]
                    random=torch.get_rng_state(),
                ),
            )

    def outcome(steps_done: int, drift: float | None, detail: str = "") -> Outcome:
        return Outcome(
            steps_done=steps_done,
            drift_stopped=bool(detail),
            drift_detail=detail,
            final_drift=drift,
            seconds=time.monotonic() - started,
            sequence_tokens=sequence_tokens,
        )

    for step in range(first, len(plan)):
        epoch, groups = plan[step]
        begun = time.monotonic()
        optimiser.zero_grad(set_to_none=False)
        measures = _accumulate(policy, groups, job, world, stop)
        if measures is None or measures["stop"]:
            keep(step)
            raise Stopped(f"stopped after {step} of {len(plan)} steps")
        drift = measures.mean("drift") if job.mode == "grpo" else None
        if drift is not None and 0 < hyper.max_drift < drift:
            if step == 0:
                raise InvalidJob(
                    f"before the first step mean |ratio - 1| is {drift:.3f}, above max_drift {hyper.max_drift}: the "
                    "recorded log-probabilities are far from the parent's. Train newer trajectories or raise max_drift."
                )
            policy.restore(last_good)
            return outcome(step - 1, last_drift, _breach(drift, step, hyper))
        last_good, last_drift = policy.copy(), drift
        norm = float(nn.utils.clip_grad_norm_(policy.weights.values(), hyper.clip_norm))
        rate = hyper.learning_rate * min(1.0, (step + 1) / (hyper.warmup_steps + 1))
        for parameters in optimiser.param_groups:
            parameters["lr"] = rate
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient of step {step + 1} is {norm}; it was not applied.")
        optimiser.step()
        paces.append(time.monotonic() - begun)
        sequence_tokens += sum(group.sequence_tokens for group in groups)
        log.step = step + 1
        log.write(_progress(log, epoch, groups, measures, drift, norm, rate, paces, len(plan), hyper.kl_beta))
        if (step + 1) % hyper.checkpoint_every == 0 and step + 1 < len(plan):
            keep(step + 1)

    if job.mode != "grpo":
        return outcome(len(plan), last_drift)
    # No step looks at the last update, so it is looked at here, over the groups that a next epoch would begin with.
    after = data.steps(batch.groups, hyper, seed=job.seed, epoch=hyper.epochs + 1)[0]
    with torch.no_grad():
        measures = _accumulate(policy, after, job, world, stop=lambda: False)
    assert measures is not None
    drift = measures.mean("drift")
    if 0 < hyper.max_drift < drift:
        policy.restore(last_good)
        return outcome(len(plan) - 1, last_drift, _breach(drift, len(plan), hyper))
    return outcome(len(plan), drift)


def _breach(drift: float, step: int, hyper: Hyperparameters) -> str:
    return (
        f"mean |ratio - 1| was {drift:.3f} after step {step}, above max_drift {hyper.max_drift}: "
        f"the weights after step {step - 1} are the result."
    )


def _accumulate(
    policy: Policy, groups: Iterable[data.Group], job: Job, world: World, stop: Callable[[], bool]
) -> Measures | None:
    """Gradient (unless it is off) and measures of one step, summed over all processes; None: alone and stopped."""
    hyper = job.hyperparameters
    clip = loss.ClipRange.of(hyper.loss, hyper.clip_low, hyper.clip_high)
    groups = list(groups)
    normaliser = sum(group.normaliser for group in groups)
    sequences = [sequence for group in groups for sequence in group.sequences]
    measures = Measures.empty()
    for micro in data.micro_batches(sequences, hyper)[world.rank :: world.size]:
        if world.size == 1 and stop():
            return None
        part = micro.to(policy.device)
        logp, entropy = policy.logp(part)
        if job.mode == "grpo":
            value = loss.policy_loss(
                logp,
                part.old_logp,
                part.advantage,
                part.weight,
                part.sequence,
                normaliser=normaliser,
                loss=hyper.loss,
                level=hyper.level,
                clip=clip,
            )
            if part.base_logp is not None:
                away = loss.kl_to_base(logp, part.base_logp, part.weight, normaliser=normaliser)
                value = value + hyper.kl_beta * away
        else:
            value = loss.likelihood_loss(logp, part.advantage, part.weight, normaliser=normaliser)
        if torch.is_grad_enabled():
            value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        _measure(measures, part, value.detach(), logp.detach(), entropy, job, clip)
    measures.add(stop=float(world.size > 1 and stop()))
    if world.size > 1:
        _sum_over_processes(policy, measures, world)
    return measures


def _measure(
    measures: Measures,
    part: data.MicroBatch,
    value: Tensor,
    logp: Tensor,
    entropy: Tensor,
    job: Job,
    clip: loss.ClipRange,
) -> None:
    """Add one micro-batch. Means are over trained tokens, equal sequences counted each time."""
    count = part.count
    measures.add(
        loss=float(value),
        count=float(count.sum()),
        entropy=float((count * entropy).sum()),
        logp=float((count * logp).sum()),
        tokens=part.tokens,
    )
    if job.mode != "grpo":
        return
    ratio = loss.ratios(logp, part.old_logp, part.sequence, job.hyperparameters.level)
    outside = ((ratio < clip.low) | (ratio > clip.high)).float()
    measures.add(
        drift=float((count * (ratio - 1.0).abs()).sum()),
        clipped=float((count * outside).sum()),
        kl_behaviour=float((count * loss.k3(part.old_logp, logp)).sum()),
    )
    if part.base_logp is not None:
        measures.add(kl_base=float((count * loss.k3(logp, part.base_logp)).sum()))
    measures.ratios.append(ratio.cpu())
    measures.counts.append(count.cpu())


def _sum_over_processes(policy: Policy, measures: Measures, world: World) -> None:
    """One all-reduce of gradient and sums; the ratios, for their percentile, are gathered."""
    weights = list(policy.weights.values())
    grads = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    # float64 for the sums' sake; adapters are small.
    flat = torch.cat([grad.flatten().double() for grad in grads] + [measures.sums.to(policy.device)])
    world.sum(flat)
    at = 0
    for weight in weights:
        weight.grad = flat[at : at + weight.numel()].view_as(weight).to(weight.dtype)
        at += weight.numel()
    measures.sums = flat[at:].cpu()
    pairs = (
        [(0, torch.cat(measures.ratios).tolist()), (1, torch.cat(measures.counts).tolist())] if measures.ratios else []
    )
    gathered = world.gather(pairs)
    measures.ratios = [torch.tensor(values) for kind, values in gathered if kind == 0]
    measures.counts = [torch.tensor(values) for kind, values in gathered if kind == 1]


def _percentile(ratios: list[Tensor], counts: list[Tensor], share: float) -> float | None:
    """The ratio below which `share` of the tokens lie."""
    if not ratios:
        return None
    ordered, order = torch.cat(ratios).sort()
    reached = torch.cat(counts)[order].cumsum(0)
    return float(ordered[torch.searchsorted(reached, share * reached[-1]).clamp(max=len(ordered) - 1)])


def _progress(
    log: Log,
    epoch: int,
    groups: list[data.Group],
    measures: Measures,
    drift: float | None,
    norm: float,
    rate: float,
    paces: Iterable[float],
    total: int,
    beta: float,
) -> Progress:
    pace = list(paces)
    rewards = torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float64)
    on_policy = drift is not None
    return Progress(
        phase="training",
        step=log.step,
        total_steps=total,
        at=time.time(),
        seconds=log.age(),
        eta_seconds=round((total - log.step) * sum(pace) / len(pace), 1),
        epoch=epoch,
        loss=measures["loss"],
        drift=drift,
        ratio_p95=_percentile(measures.ratios, measures.counts, 0.95),
        clipped_share=measures.mean("clipped") if on_policy else None,
        kl_behaviour=measures.mean("kl_behaviour") if on_policy else None,
        kl_base=measures.mean("kl_base") if on_policy and beta else None,
        entropy=measures.mean("entropy"),
        logprob=measures.mean("logp"),
        grad_norm=norm,
        learning_rate=rate,
        trajectories=sum(group.trajectories for group in groups),
        trained_tokens=sum(group.trained_tokens for group in groups),
        computed_tokens=round(measures["tokens"]),
        tokens_per_second=round(sum(group.sequence_tokens for group in groups) / pace[-1], 1),
        reward_mean=float(rewards.mean()) if len(rewards) else None,
        reward_std=float(rewards.std(correction=0)) if len(rewards) else None,
        share_without_spread=sum(not group.spread for group in groups) / len(groups),
    )


def weight_change(policy: Policy, parent: dict[str, Tensor]) -> float:
    """Frobenius norm of the change of all adapted weights, scale x (B A - B0 A0), without building any of them.

    With L = [B, -B0] and R = [A; A0] the change is L R, and its squared norm is the trace of (L'L)(R R'): matrices of
    twice the rank.
    """
    config = policy.model.peft_config[policy.model.active_adapter]
    squared = 0.0
    for name, weight in policy.weights.items():
        if ".lora_A." not in name:
            continue
        partner = name.replace(".lora_A.", ".lora_B.")
        right = torch.cat([weight.detach(), parent[name]], dim=0).double()
        left = torch.cat([policy.weights[partner].detach(), -parent[partner]], dim=1).double()
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        squared += scale**2 * float(((left.T @ left) * (right @ right.T)).sum())
    return math.sqrt(max(0.0, squared))


def _save_adapter(policy: Policy, job: Job, folder: Path) -> str:
    """Write adapter/ by rename; returns the sha256 of its weights file."""
    part, final = folder / "adapter.part", folder / "adapter"
    shutil.rmtree(part, ignore_errors=True)
    config = policy.model.peft_config[policy.model.active_adapter]
    config.base_model_name_or_path = job.base_model  # not the path of this machine's cache
    policy.model.save_pretrained(str(part), save_embedding_layers=False)
    (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    return hashlib.sha256((final / "adapter_model.safetensors").read_bytes()).hexdigest()
