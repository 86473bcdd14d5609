"""From recorded groups to the tokens that are trained: encoding, merging, steps, rows that share their beginnings.

Words: a *sequence* is one token list with some trained positions (a history gives one, or several where a later
prompt does not extend the earlier one); a *row* is what goes through the model as one line: one sequence, or several
laid out as a tree so that a common beginning is computed once; a *micro-batch* is rows padded to one length.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.trainer import bases
from training.trainer.job import (
    CallLine,
    Dropped,
    GroupLine,
    HistoryLine,
    Hyperparameters,
    InvalidJob,
    Mode,
    Share,
    TrajectoryLine,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MISSING = float("nan")  # an old log-probability that the loop recomputes before the first step
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")
LENGTH_RANGES = (1, 17, 65, 257, 1025, 4097)  # lower ends, trained tokens of a trajectory


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence. The i-th trained token stands at `trained[i]` and is predicted by what stands before it."""

    ids: tuple[int, ...]
    trained: tuple[int, ...]  # positions in ids, rising, each at least 1
    old_logp: tuple[float, ...]  # nats, one a trained token; MISSING where it is to be recomputed
    temperature: tuple[float, ...]  # one a trained token
    advantage: float
    weight: float  # of each trained token in the loss's sum, before the division by the step's normaliser
    count: int = 1  # trajectories' sequences merged into this one
    base_logp: tuple[float, ...] = ()  # nats, under the base with the adapter off; filled when a KL to it is wanted


@dataclass(slots=True)
class Trajectory:
    """What one attempt gives to the update."""

    trajectory_id: str
    role: str
    advantage: float
    weight: float
    sequences: list[Encoded]

    @property
    def trained_tokens(self) -> int:
        return sum(len(sequence.trained) for sequence in self.sequences)


@dataclass(slots=True)
class Group:
    """One group after encoding: `sequences` are those with gradient, equal ones merged."""

    group: str
    sequences: list[Encoded]
    trajectories: int  # with gradient
    trained_tokens: int  # equal sequences count each time
    sequence_tokens: int  # the same for whole sequences, prompt included
    normaliser: float  # its part of the step's
    rewards: list[float]
    spread: bool


@dataclass(slots=True)
class Batch:
    """A frozen batch, ready to train."""

    groups: list[Group]  # those with gradient
    groups_total: int
    groups_without_spread: int
    trajectories_total: int
    sequences: int
    trained_tokens: int
    dropped: list[Dropped]
    approximate_calls: int
    recomputed_calls: int
    by_length: list[Share]
    by_role: list[Share]

    @property
    def sequences_merged(self) -> int:
        return sum(len(group.sequences) for group in self.groups)

    @property
    def trajectories(self) -> int:
        return sum(group.trajectories for group in self.groups)


@dataclass(slots=True)
class _Tally:
    """What was left out, and what is to be said about the rest."""

    reasons: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    approximate: int = 0
    recomputed: int = 0

    def drop(self, reason: str, trajectory_id: str) -> None:
        self.reasons[reason] += 1
        if len(self.examples[reason]) < 5:
            self.examples[reason].append(trajectory_id)


class Encoder:
    """Turns histories into sequences for one tokenizer."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", ends: frozenset[int], mode: Mode, *, vocabulary: int
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary  # ids of the base are below this
        self.ends = ends
        self.mode = mode
        self._ids_of_text: dict[str, list[int]] = {}  # system prompts and headlines come thousands of times

    def history(self, history: HistoryLine, tally: _Tally, trajectory_id: str) -> list[Encoded]:
        """The sequences of one conversation; advantage 0 and weight 1, to be set by the caller.

        Recorded ids come before any rendering. A call whose prompt extends what is there goes on in the same
        sequence, any other opens a new one.

        Raises:
            InvalidJob: a call names no assistant message; ids and log-probabilities do not match; grpo without
                log-probabilities on a call that is not the parent's own; a template that is not prefix-preserving.
        """
        done: list[Encoded] = []
        open_one = _Open()
        for call in sorted(history.calls, key=lambda call: call.at):
            if not (0 <= call.at < len(history.messages)) or history.messages[call.at].get("role") != "assistant":
                raise InvalidJob(f"{trajectory_id}: a call names message {call.at}, which is not the assistant's.")
            if not call.trainable:
                continue
            if self.mode == "grpo" and call.temperature is not None and call.temperature <= 0:
                tally.drop("greedy_call", trajectory_id)
                continue
            if call.prompt_token_ids is not None and call.token_ids is not None:
                prompt, answer, text = call.prompt_token_ids, call.token_ids, None
                if prompt + answer and not 0 <= min(prompt + answer) <= max(prompt + answer) < self.vocabulary:
                    raise InvalidJob(
                        f"{trajectory_id}: the recorded token ids of the call at message {call.at} are outside this "
                        f"base's vocabulary of {self.vocabulary}: another tokenizer made them."
                    )
                extends = open_one.text is None and prompt[: len(open_one.ids)] == open_one.ids
                lead = prompt[len(open_one.ids) :] if extends else prompt
            else:
                before, thought, said = self.rendered(history, call.at, trajectory_id)
                extends = open_one.text is not None and before.startswith(open_one.text)
                lead = self.ids(before[len(open_one.text or "") :] if extends else before) + self.ids(thought)
                answer, text = self.ids(said), before + thought + said
            if not answer:
                tally.drop("empty_answer", trajectory_id)
                continue
            if not extends:
                done += open_one.closed()
                open_one = _Open()
            tally.approximate += call.approximate
            # Outside grpo nothing is compared with the policy that played, so its temperature is not ours.
            temperature = (call.temperature or 1.0) if self.mode == "grpo" else 1.0
            open_one.add(lead, answer, self.old_logp(call, len(answer), tally, trajectory_id), temperature)
            open_one.text = text
        return done + open_one.closed()

    def rendered(self, history: HistoryLine, at: int, trajectory_id: str) -> tuple[str, str, str]:
        """Prompt, empty think block, and answer of the call at `at`, as text.

        The answer ends with its end token: templates write a newline behind it that no server ever samples. The
        think block that some templates put before an answer without thoughts belongs to the prompt.

        Raises:
            InvalidJob: the template writes the prompt otherwise once the answer follows.
        """
        before = bases.chat_text(self.tokenizer, history.messages[:at], history.tools, answer_follows=True)
        after = bases.chat_text(self.tokenizer, history.messages[: at + 1], history.tools, answer_follows=False)
        if not after.startswith(before):
            raise InvalidJob(
                f"{trajectory_id}: the chat template of this base is not prefix-preserving: it writes messages 0 to "
                f"{at - 1} otherwise once the answer at {at} follows, so the answer's tokens cannot be told apart. "
                "Record token ids (return_token_ids), or use a base with a template that keeps earlier turns."
            )
        said = after[len(before) :]
        thought = match.group() if (match := EMPTY_THOUGHT.match(said)) else ""
        said = said[len(thought) :]
        cut = max((said.rfind(end) + len(end) for end in self.end_texts() if end in said), default=None)
        return before, thought, said[:cut] if cut is not None else said.rstrip()

    def end_texts(self) -> list[str]:
        return [str(self.tokenizer.convert_ids_to_tokens(end)) for end in sorted(self.ends)]

    def ids(self, text: str) -> list[int]:
        if not text:
            return []
        known = self._ids_of_text.get(text)
        if known is None:
            known = self._ids_of_text[text] = bases.token_ids(self.tokenizer, text)
        return known

    def old_logp(self, call: CallLine, tokens: int, tally: _Tally, trajectory_id: str) -> list[float]:
        """Recorded log-probabilities of the call's answer, MISSING ones for the parent's own, zeros outside grpo."""
        if self.mode != "grpo":
            return [0.0] * tokens
        if call.logprobs is not None and len(call.logprobs) == tokens:
            return call.logprobs
        if call.parent_policy:
            tally.recomputed += 1
            return [MISSING] * tokens
        have = "no log-probabilities" if call.logprobs is None else f"{len(call.logprobs)} of them"
        raise InvalidJob(
            f"{trajectory_id}: the call at message {call.at} has {have} for {tokens} tokens, and the parent of this "
            "job did not sample it, so its probability ratio is unknown. Train it in the mode filtered or sft."
        )


@dataclass(slots=True)
class _Open:
    """A sequence that is still growing."""

    ids: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    old_logp: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    text: str | None = None  # what `ids` were rendered from; None: they are recorded

    def add(self, lead: list[int], answer: list[int], old_logp: list[float], temperature: float) -> None:
        self.ids += lead
        start = len(self.ids)
        self.ids += answer
        positions = [at for at in range(start, len(self.ids)) if at > 0]  # nothing predicts a first token
        self.trained += positions
        self.old_logp += old_logp[len(answer) - len(positions) :]
        self.temperature += [temperature] * len(positions)

    def closed(self) -> list[Encoded]:
        if not self.trained:
            return []
        return [
            Encoded(
                ids=tuple(self.ids),
                trained=tuple(self.trained),
                old_logp=tuple(self.old_logp),
                temperature=tuple(self.temperature),
                advantage=0.0,
                weight=1.0,
            )
        ]


def encode(groups: Iterable[GroupLine], encoder: Encoder, hyper: Hyperparameters) -> Batch:
    """Encode a frozen batch: what has gradient, what was left out and why, and on whom the gradient falls.

    Raises:
        InvalidJob: as `Encoder.history`; or nothing in the batch gives a gradient (kind "no_signal").
    """
    tally = _Tally()
    encoded: list[Group] = []
    kept: list[Trajectory] = []
    groups_total = flat = trajectories_total = sequences = 0
    for line in groups:
        groups_total += 1
        trajectories_total += len(line.trajectories)
        spread = any(trajectory.advantage != 0.0 for trajectory in line.trajectories)
        flat += not spread
        members = [member for t in line.trajectories if (member := _trajectory(t, encoder, hyper, tally))]
        if not members:
            continue
        kept += members
        mine = [sequence for member in members for sequence in member.sequences]
        sequences += len(mine)
        encoded.append(
            Group(
                group=line.group,
                sequences=merge_identical(mine),
                trajectories=len(members),
                trained_tokens=sum(member.trained_tokens for member in members),
                sequence_tokens=sum(len(sequence.ids) for sequence in mine),
                normaliser=sum(_normaliser(member, hyper) for member in members),
                rewards=[t.reward for t in line.trajectories if t.reward is not None],
                spread=spread,
            )
        )
    if not encoded:
        reasons = [f"{count} {reason.replace('_', ' ')}" for reason, count in tally.reasons.items()]
        why = ", ".join(reasons) or "it is empty"
        raise InvalidJob(
            f"none of the {trajectories_total} trajectories in {groups_total} groups gives a gradient ({why}).",
            kind="no_signal",
        )
    return Batch(
        groups=encoded,
        groups_total=groups_total,
        groups_without_spread=flat,
        trajectories_total=trajectories_total,
        sequences=sequences,
        trained_tokens=sum(group.trained_tokens for group in encoded),
        dropped=[
            Dropped(reason=reason, count=count, examples=tally.examples[reason])  # type: ignore[arg-type]  # our literals
            for reason, count in sorted(tally.reasons.items())
        ],
        approximate_calls=tally.approximate,
        recomputed_calls=tally.recomputed,
        by_length=_shares(kept, lambda trajectory: _length_range(trajectory.trained_tokens)),
        by_role=_shares(kept, lambda trajectory: trajectory.role),
    )


def _trajectory(line: TrajectoryLine, encoder: Encoder, hyper: Hyperparameters, tally: _Tally) -> Trajectory | None:
    """The trajectory's sequences with advantage and weight set; None, and counted, when it gives no gradient."""
    if not line.train or line.weight <= 0:
        tally.drop("not_trained", line.trajectory_id)
        return None
    advantage = 1.0 if encoder.mode == "sft" else line.advantage
    if advantage == 0.0 or (encoder.mode == "filtered" and advantage < 0):
        tally.drop("no_advantage", line.trajectory_id)
        return None
    sequences = [
        sequence for history in line.histories for sequence in encoder.history(history, tally, line.trajectory_id)
    ]
    if not sequences:
        tally.drop("no_trainable_call", line.trajectory_id)
        return None
    if max(len(sequence.ids) for sequence in sequences) > hyper.max_sequence_tokens:
        tally.drop("too_long", line.trajectory_id)
        return None
    trained = sum(len(sequence.trained) for sequence in sequences)
    per_token = {
        "token": line.weight,
        "trajectory": line.weight / trained,
        "constant": line.weight / hyper.length_constant,
    }[hyper.length_normalisation]
    return Trajectory(
        trajectory_id=line.trajectory_id,
        role=line.role,
        advantage=advantage,
        weight=line.weight,
        sequences=[replace(sequence, advantage=advantage, weight=per_token) for sequence in sequences],
    )


def _normaliser(trajectory: Trajectory, hyper: Hyperparameters) -> float:
    """What the trajectory adds to the divisor of its step: its weighted tokens, or its weight."""
    if hyper.length_normalisation == "token":
        return trajectory.weight * trajectory.trained_tokens
    return trajectory.weight


def merge_identical(sequences: list[Encoded]) -> list[Encoded]:
    """Equal sequences become one, with summed weight and weighted mean advantage: the gradient stays the same.

    The losses are linear in the advantage as long as its sign does not change (PPO's minimum turns with it), so the
    sign is part of what must be equal. Old log-probabilities of one answer differ by rounding between requests; up to
    1e-4 nats they count as equal and the first one's are kept.
    """
    merged: dict[object, Encoded] = {}
    for sequence in sequences:
        old = tuple(round(value, 4) for value in sequence.old_logp if value == value)  # MISSING is equal to MISSING
        key = (sequence.ids, sequence.trained, sequence.temperature, old, sequence.advantage > 0)
        first = merged.get(key)
        if first is None:
            merged[key] = sequence
            continue
        weight = first.weight + sequence.weight
        mean = (first.weight * first.advantage + sequence.weight * sequence.advantage) / weight
        merged[key] = replace(first, advantage=mean, weight=weight, count=first.count + sequence.count)
    return list(merged.values())


def steps(groups: Sequence[Group], hyper: Hyperparameters, *, seed: int, epoch: int) -> list[list[Group]]:
    """The groups of each optimiser step of an epoch: shuffled by (seed, epoch), whole groups, near-equal shares."""
    total = sum(group.trajectories for group in groups)
    amount = min(len(groups), max(1, round(total / hyper.trajectories_per_step)))
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:7]))
    order = torch.randperm(len(groups), generator=generator).tolist()
    shares: list[list[Group]] = [[] for _ in range(amount)]
    taken = share = 0
    for place, index in enumerate(order):
        if place and taken * amount // total > share:  # one further at a time, so that a huge group leaves none empty
            share += 1
        share = max(share, amount - (len(order) - place))  # and enough groups for the shares that follow
        shares[share].append(groups[index])
        taken += groups[index].trajectories
    return shares


@dataclass(slots=True)
class MicroBatch:
    """`B` rows of `T` tokens and the `N` trained tokens in them, flat. `S` sequences."""

    ids: Tensor  # (B, T) long
    positions: Tensor  # (B, T) long, of each token in its own sequence
    mask: Tensor | None  # (B, 1, T, T) bool, True where a token may look; None: plain causal rows
    predictor: Tensor  # (N,) long, index into the flattened (B x T) of the position that predicts the token
    target: Tensor  # (N,) long, token ids
    old_logp: Tensor  # (N,) float32, nats
    temperature: Tensor  # (N,) float32
    advantage: Tensor  # (N,) float32
    weight: Tensor  # (N,) float32, token weights (summed over merged sequences)
    count: Tensor  # (N,) float32, merged sequences behind the token
    sequence: Tensor  # (N,) long, 0 … S-1
    base_logp: Tensor | None  # (N,) float32, nats; None: no KL to the base
    sources: list[Encoded]  # the S sequences
    tokens: int  # that are computed, padding left out

    def to(self, device: str) -> "MicroBatch":
        return replace(
            self,
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            predictor=self.predictor.to(device),
            target=self.target.to(device),
            old_logp=self.old_logp.to(device),
            temperature=self.temperature.to(device),
            advantage=self.advantage.to(device),
            weight=self.weight.to(device),
            count=self.count.to(device),
            sequence=self.sequence.to(device),
            base_logp=None if self.base_logp is None else self.base_logp.to(device),
        )


@dataclass(slots=True)
class _Row:
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    paths: list[tuple[Encoded, list[int], int]] = field(default_factory=list)  # sequence, its tokens' places, new from


def micro_batches(sequences: Sequence[Encoded], hyper: Hyperparameters) -> list[MicroBatch]:
    """Lay sequences out in rows, rows of like length in micro-batches of at most `max_tokens_per_batch`.

    Deterministic in the order of nothing but the content, so every process cuts the same micro-batches.
    """
    rows = sorted(_rows(sequences, hyper.share_prefix_tokens), key=lambda row: (len(row.ids), row.ids))
    batches: list[MicroBatch] = []
    waiting: list[_Row] = []
    for row in rows:
        if waiting and (len(waiting) + 1) * len(row.ids) > hyper.max_tokens_per_batch:
            batches.append(_tensors(waiting))
            waiting = []
        waiting.append(row)
    if waiting:
        batches.append(_tensors(waiting))
    return batches


def _rows(sequences: Sequence[Encoded], limit: int) -> list[_Row]:
    """Sequences in rows of up to `limit` tokens; neighbours in sorted order share their common beginning."""
    rows: list[_Row] = []
    row = _Row()
    for sequence in sorted(sequences, key=lambda one: (one.ids, one.trained, one.old_logp)):
        path: list[int] = []
        shared = 0
        if row.paths:
            last, last_path, _ = row.paths[-1]
            shared = _common(last.ids, sequence.ids)
            path = last_path[:shared]
        if row.paths and len(row.ids) + len(sequence.ids) - shared > limit:
            rows.append(row)
            row, path, shared = _Row(), [], 0
        start = len(row.ids)
        row.ids += sequence.ids[shared:]
        row.positions += range(shared, len(sequence.ids))
        row.paths.append((sequence, path + list(range(start, len(row.ids))), shared))
    if row.paths:
        rows.append(row)
    return rows


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # slices compare in C, token by token in Python would be most of the packing time
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _tensors(rows: list[_Row]) -> MicroBatch:
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    plain = all(len(row.paths) == 1 for row in rows)  # padding stands behind, where causal rows never look
    # Every token sees itself, padding too: attention over nothing is NaN.
    mask = None if plain else torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    predictor: list[int] = []
    target: list[int] = []
    old_logp: list[float] = []
    temperature: list[float] = []
    lengths: list[int] = []
    sources: list[Encoded] = []
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        positions[index, : len(row.ids)] = torch.tensor(row.positions)
        for sequence, path, new in row.paths:
            if mask is not None and new < len(path):
                places = torch.tensor(path)
                seen = torch.ones(len(path) - new, len(path), dtype=torch.bool).tril(diagonal=new)
                mask[index, places[new:, None], places[None, :]] = seen
            predictor += [index * width + path[at - 1] for at in sequence.trained]
            target += [sequence.ids[at] for at in sequence.trained]
            old_logp += sequence.old_logp
            temperature += sequence.temperature
            lengths.append(len(sequence.trained))
            sources.append(sequence)
    each = torch.tensor(lengths)
    return MicroBatch(
        ids=ids,
        positions=positions,
        mask=None if mask is None else mask.unsqueeze(1),
        predictor=torch.tensor(predictor),
        target=torch.tensor(target),
        old_logp=torch.tensor(old_logp, dtype=torch.float32),
        temperature=torch.tensor(temperature, dtype=torch.float32),
        advantage=torch.tensor([s.advantage for s in sources], dtype=torch.float32).repeat_interleave(each),
        weight=torch.tensor([s.weight for s in sources], dtype=torch.float32).repeat_interleave(each),
        count=torch.tensor([s.count for s in sources], dtype=torch.float32).repeat_interleave(each),
        sequence=torch.arange(len(sources)).repeat_interleave(each),
        base_logp=(
            torch.tensor([value for s in sources for value in s.base_logp], dtype=torch.float32)
            if all(s.base_logp for s in sources)
            else None
        ),
        sources=sources,
        tokens=sum(len(row.ids) for row in rows),
    )


def _length_range(tokens: int) -> str:
    below = [start for start in LENGTH_RANGES if start <= tokens][-1]
    above = [start for start in LENGTH_RANGES if start > tokens]
    return f"{below}-{above[0] - 1}" if above else f"{below} and more"


def _shares(trajectories: list[Trajectory], name: Callable[[Trajectory], str]) -> list[Share]:
    """Shares of the batch's gradient weight, sum of |advantage| x token weight, by `name`; largest first."""
    weight: defaultdict[str, float] = defaultdict(float)
    amount: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for trajectory in trajectories:
        key = name(trajectory)
        weight[key] += sum(abs(s.advantage) * s.weight * len(s.trained) for s in trajectory.sequences)
        amount[key] += 1
        tokens[key] += trajectory.trained_tokens
    total = sum(weight.values())
    return [
        Share(name=key, trajectories=amount[key], trained_tokens=tokens[key], share=value / total)
        for key, value in sorted(weight.items(), key=lambda item: -item[1])
    ]
