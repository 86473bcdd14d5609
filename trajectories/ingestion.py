"""How a reported episode becomes a row, exactly once. Every way in ends in `record` or `record_many`.

One statement writes a trajectory: row, segments, redaction counts, a line in the indexing queue; it touches no row
that requests share. The id decides: the same content again is a replay, other content a conflict, an erased id is gone.
Groups, counters, call rows and late rewards are made behind the write (`indexing.py`).
"""

import hashlib
import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec
from django.db import IntegrityError, connection, transaction
from django.db.models import F, Sum
from django.utils import timezone

from trajectories import (
    blobs,
    census,
    codec,
    history,
    limits,
    origins,
    payloads,
    pressure,
    quality,
    redaction,
    rewards,
    room,
    scenarios,
    segments,
    statements,
    writing,
)
from trajectories.early_commit import committed_early
from trajectories.errors import Conflict, Full, Gone, Invalid, Problem, TooLarge, Unknown
from trajectories.formats import messages as messages_format
from trajectories.formats.incoming import Incoming, hashes
from trajectories.models import (
    ID_LENGTH,
    Agent,
    FinalStatus,
    IndexingWork,
    Origin,
    Project,
    RedactionCount,
    SharedText,
    State,
    Tombstone,
    Trajectory,
    TrajectorySegment,
)
from trajectories.payloads import EndBody, Envelope, LlmCallPayload, StepPayload, StepsBody, TrajectoryPayload
from trajectories.transcripts import has_image, is_answered, own_prompt
from trajectories.writing import Prepared, Row

logger = logging.getLogger(__name__)

GATEWAY = "gateway"  # source_format of what came through it
PART = 25  # trajectories of one request that are handed to the database together
PART_BYTES = 1024 * 1024  # of them
AHEAD = 4  # parts that are under way while the next one is prepared
AHEAD_BYTES = 2 * 1024 * 1024  # of them
HASH_BYTES = 16  # of a step, in step_hashes
METRICS_KEPT = 50  # numbers of a trajectory that lists show; the payload has all
MODELS_KEPT = 20


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one trajectory."""

    trajectory_id: str
    outcome: Literal["created", "replay", "extended", "sealed"]
    state: str
    fidelity: str
    quality: float
    findings: list[dict[str, object]]

    @property
    def created(self) -> bool:
        return self.outcome == "created"


def record(project: Project, incoming: Incoming) -> Recorded:
    """Record one trajectory; 2xx may be said when this has returned.

    Raises:
        Conflict: the id is taken by other content. Gone: it was erased. Invalid, TooLarge, Refused.
    """
    pressure.check_room()
    found = _insert(project, [incoming])[0]
    if found is None:
        found = _settle_many(project, [incoming])[0]
    if isinstance(found, Problem):
        raise found
    return found


# Each id probes the index that knows it, in whose order it asks: a planner that has no statistics yet would rather read
# all of a project.
_KNOWN = """
    select known.trajectory_id
    from unnest(%s::varchar[]) as sent(trajectory_id)
    cross join lateral (
        select t.trajectory_id from trajectories t
        where t.project_id = %s and t.trajectory_id = sent.trajectory_id
        order by t.project_id, t.trajectory_id limit 1
    ) known
"""


def record_many(project: Project, items: Iterable[Incoming]) -> list[Recorded | Problem]:
    """Record many, each with its own outcome, in their order.

    Raises:
        Full: the disk is. What was acknowledged by then is there; the same again is safe.
    """
    stream = Stream(project)
    for item in items:
        stream.take(item)
    found = stream.finish()
    for one in found:
        if isinstance(one, Full):
            raise one
    return found


class _Part(msgspec.Struct, frozen=True):
    """Items of a stream that are written together."""

    items: Mapping[int, Incoming]  # by their number in the stream
    ready: Mapping[int, Prepared]  # those of them that can be written
    ticket: writing.Ticket
    size: int  # bytes of the items
    room: int  # that is given back when they are there


class Stream:
    """Many trajectories of one request, prepared while they still arrive and while the database writes those before.

    A body that is sent again begins with what is known: as long as known ids come, those of the next part are looked
    up before it is prepared, so that a replay costs no compression.
    """

    def __init__(self, project: Project, *, findings: bool = True) -> None:
        """Without findings ten thousand answers take 30 MB less.

        Raises:
            Full.
        """
        pressure.check_room()
        self.project = project
        self.findings = findings
        self.results: list[Recorded | Problem | None] = []
        self.waiting: dict[int, Incoming] = {}
        self.waiting_bytes = 0
        self.waiting_room = 0
        self.under_way: deque[_Part] = deque()
        self.under_way_bytes = 0
        self.share = room.Share()
        self.names: set[str] = set()  # waiting or under way
        self.replays = True  # may come

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.share.give_back()

    def make_room(self, size: int) -> None:
        """Wait until there is so much room for what comes next; until it is settled it keeps that.

        Raises:
            Away: there was none for long.
        """
        if not self.share.extend(size):
            self._settle_all()
            self.share.give_back()
            self.waiting_room = 0
            self.share.wait(size)
        self.waiting_room += size

    def take(self, item: Incoming) -> None:
        name = item.envelope.trajectory_id
        if name in self.names:  # twice in one request: the first one wins, and is there before the second is looked at
            self._settle_all()
        self.names.add(name)
        self.waiting[len(self.results)] = item
        self.waiting_bytes += len(item.canonical)
        self.results.append(None)
        if len(self.waiting) >= PART or self.waiting_bytes > PART_BYTES:
            self._hand_over()

    def finish(self) -> list[Recorded | Problem]:
        """What became of each, in the order of their coming; all that was created is committed."""
        self._settle_all()
        found = [one for one in self.results if one is not None]
        assert len(found) == len(self.results)
        return found

    def _hand_over(self) -> None:
        items, size, room_taken = self.waiting, self.waiting_bytes, self.waiting_room
        self.waiting, self.waiting_bytes, self.waiting_room = {}, 0, 0
        try:
            pressure.check_room()
            fresh = self._unknown(items)
            context = _Context(self.project, [item.envelope for item in fresh.values()], later=True)
        except Problem as problem:  # a broken redaction rule: each one's answer
            for at, item in items.items():
                self.results[at] = problem
                self.names.discard(item.envelope.trajectory_id)
            self.share.give_back(room_taken)
            return
        ready: dict[int, Prepared] = {}
        for at, item in fresh.items():
            try:
                ready[at] = context.prepare(item)
            except Problem as problem:
                self.results[at] = problem
        context.place_texts(ready.values())
        self.under_way.append(_Part(items, ready, writing.submit(list(ready.values())), size, room_taken))
        self.under_way_bytes += size
        while len(self.under_way) > AHEAD or self.under_way_bytes > AHEAD_BYTES:
            self._settle(self.under_way.popleft())

    def _unknown(self, items: Mapping[int, Incoming]) -> Mapping[int, Incoming]:
        if not self.replays:
            return items
        ids = [item.envelope.trajectory_id for item in items.values()]
        known = {row[0] for row in statements.fetch(_KNOWN, (ids, self.project.pk), prepare=False)}
        self.replays = bool(known)
        return {at: item for at, item in items.items() if item.envelope.trajectory_id not in known} if known else items

    def _settle_all(self) -> None:
        if self.waiting:
            self._hand_over()
        while self.under_way:
            self._settle(self.under_way.popleft())

    def _settle(self, part: _Part) -> None:
        for at, found in zip(part.ready, self._written(part), strict=True):
            self.results[at] = found
        taken = [at for at in part.items if self.results[at] is None]
        self.replays = self.replays or bool(taken)
        for at, settled in zip(taken, _settle_many(self.project, [part.items[at] for at in taken]), strict=True):
            self.results[at] = settled
        if not self.findings:
            for at in part.items:
                found_at = self.results[at]
                if isinstance(found_at, Recorded):
                    self.results[at] = msgspec.structs.replace(found_at, findings=[])
        self.names.difference_update(item.envelope.trajectory_id for item in part.items.values())
        self.under_way_bytes -= part.size
        self.share.give_back(part.room)

    def _written(self, part: _Part) -> list[Recorded | Problem | None]:
        try:
            return _created(part.ready.values(), part.ticket)
        except IntegrityError:
            if connection.in_atomic_block:
                raise
            # An agent, scenario or text that we remember was deleted meanwhile. Nothing of the part was written.
            forget()
            return _insert_once(self.project, [part.items[at] for at in part.ready])


def _insert(project: Project, items: Sequence[Incoming]) -> list[Recorded | Problem | None]:
    """Write those whose id is free. None: it is not, somebody has to look. A Problem stands for its own item alone."""
    try:
        return _insert_once(project, items)
    except IntegrityError:
        if connection.in_atomic_block:
            raise
        forget()
        return _insert_once(project, items)


def _insert_once(project: Project, items: Sequence[Incoming]) -> list[Recorded | Problem | None]:
    results: list[Recorded | Problem | None] = [None] * len(items)
    context = _Context(project, [item.envelope for item in items], later=True)
    ready: dict[int, Prepared] = {}
    for at, item in enumerate(items):
        try:
            ready[at] = context.prepare(item)
        except Problem as problem:
            results[at] = problem
    context.place_texts(ready.values())
    for at, found in zip(ready, _created(ready.values(), writing.submit(list(ready.values()))), strict=True):
        results[at] = found
    return results


def _created(ready: Iterable[Prepared], ticket: writing.Ticket) -> list[Recorded | Problem | None]:
    """Waits for the commit. None: the id is taken."""
    written = ticket.written()
    return [
        _told(one.row, "created") if (one.row.project_id, one.row.trajectory_id) in written else None for one in ready
    ]


def _told(row: Row | Trajectory, outcome: Literal["created", "replay", "extended", "sealed"]) -> Recorded:
    return Recorded(
        trajectory_id=row.trajectory_id,
        outcome=outcome,
        state=str(row.state),
        fidelity=str(row.fidelity),
        quality=row.quality,
        findings=row.findings,
    )


class _Context:
    """What many trajectories of one request share, looked up once."""

    def __init__(self, project: Project, sent: Sequence[Envelope], *, later: bool = False) -> None:
        self.project = project
        self.key = bytes(project.hash_key)
        self.now = timezone.now()
        self.rules = redaction.rules(project)
        self.weights = quality.weights_of(project.quality_weights) if project.quality_weights else None
        self.agents = agents(project, {one.agent_id for one in sent})
        inline = scenarios.described(one.scenario for one in sent)
        wanted = {ref: inline.get(ref) for one in sent if (ref := one.scenario_ref()) is not None}
        self.refused: dict[str, Problem] = {}
        # New ones are made by the writer, together with those of other requests; but one that may be refused, or whose
        # split is to be compared with what is there, is made now.
        self.scenarios, self.later = scenarios.look(project, wanted)
        now = {
            key: one
            for key, one in self.later.items()
            if not later or (one is not None and (one.split is not None or self.rules))
        }
        if now:
            self.scenarios |= scenarios.ensure(project, now, self.refused)
        names = set[str]()
        for one in sent:
            names |= origins.claims(one)
        self.versions = origins.known(project, names) if names else {}

    def prepare(self, incoming: Incoming) -> Prepared:
        """Redact, judge, pack. Raises Invalid."""
        content_hash, twin_hash = incoming.hashes(self.key)
        nul = b"\\u0000" in incoming.canonical
        chat = incoming.chat
        if chat is not None and not self.rules and not nul:
            calls = chat.calls()
            counted = census.of_chat(chat.sent)
            behaviour = origins.of(calls, chat.sent.policy_version, self.versions)
            row = self.row(
                chat.sent,
                counted,
                behaviour,
                n_trainable=counted.candidates if behaviour.origin == Origin.OWN else 0,
                content_hash=content_hash,
                twin_hash=twin_hash,
                source_format=incoming.source_format,
                raw_size=len(incoming.canonical),
            )
            packed = segments.pack_chat(chat, counted.steps, behaviour.calls, key=self.key)
            return Prepared(
                row=row, pieces=packed.pieces, step_hashes=(b"",), texts=packed.texts, wish=self.wish(chat.sent)
            )
        payload, counts = redaction.redact(incoming.payload, self.rules)
        is_open = payload.final_status == "running"
        row, behaviour = self.row_of(
            payload,
            content_hash=content_hash,
            twin_hash=twin_hash,
            source_format=incoming.source_format,
            raw_size=len(incoming.canonical),
            nul=nul,
            redactions=counts,
        )
        payload, held = blobs.take_out(
            self.project,
            payload,
            size=len(incoming.canonical),
            trajectory_id=payload.trajectory_id,
            content_hash=content_hash,
        )
        row.findings.extend(
            {"check": "source", "ok": False, "detail": _column_text(redaction.text(said, self.rules), 1000)}
            for said in incoming.findings
        )
        if is_open:
            pieces, step_hashes = _pack_open(incoming.payload.steps, payload, self.key, content_hash, held)
            return Prepared(row=row, pieces=pieces, step_hashes=step_hashes, redactions=counts, wish=self.wish(payload))
        packed = segments.pack(
            payload, behaviour.calls, key=self.key, derived_actions=incoming.derived_actions, held=held
        )
        return Prepared(
            row=row,
            pieces=packed.pieces,
            step_hashes=(b"",) * len(packed.pieces),
            texts=packed.texts,
            redactions=counts,
            wish=self.wish(payload),
        )

    def wish(self, sent: Envelope) -> scenarios.Wish | None:
        """The scenario that the writer is to make."""
        ref = sent.scenario_ref()
        return None if ref is None or ref in self.scenarios else scenarios.Wish(self.project, ref, self.later[ref])

    def row_of(
        self,
        payload: TrajectoryPayload,
        *,
        content_hash: bytes,
        twin_hash: bytes,
        source_format: str,
        raw_size: int,
        nul: bool,
        redactions: Mapping[str, int],
    ) -> tuple[Row, origins.Behaviour]:
        """The columns of a payload, and who played."""
        calls = list(payload.calls())
        behaviour = origins.of(calls, payload.policy_version, self.versions)
        said = [quality.Finding("redaction", False, one) for one in redaction.said(redactions)]
        if nul and (places := payloads.nul_places(payload)):
            said.append(
                quality.Finding(
                    "nul_characters",
                    False,
                    f"{len(places)} texts contain NUL characters, kept: {', '.join(places[:5])}",
                )
            )
        row = self.row(
            payload,
            census.of(payload),
            behaviour,
            n_trainable=_trainable(calls, behaviour),
            steps=payload.steps,
            said=said,
            content_hash=content_hash,
            twin_hash=twin_hash,
            source_format=source_format,
            raw_size=raw_size,
        )
        return row, behaviour

    def row(
        self,
        sent: Envelope,
        counted: census.Census,
        behaviour: origins.Behaviour,
        *,
        n_trainable: int,
        content_hash: bytes,
        twin_hash: bytes,
        source_format: str,
        raw_size: int,
        steps: Sequence[StepPayload] = (),
        said: Sequence[quality.Finding] = (),
    ) -> Row:
        """The columns of a trajectory from its envelope and what was counted in it."""
        is_open = sent.final_status == "running"
        derived = (
            rewards.Derived(sent.reward, rewards.RECORDED if sent.reward is not None else "")
            if is_open
            else rewards.derive(sent.reward, steps, self.project.reward_aggregation)
        )
        judged = quality.assess(counted, sent.final_status, self.weights)
        findings = [*judged.findings]
        findings.extend(quality.Finding("origin", False, told) for told in behaviour.findings)
        if derived.finding:
            findings.append(quality.Finding("reward", False, derived.finding))
        findings.extend(said)
        stamps = [payloads.utc(step.timestamp) for step in steps if step.timestamp is not None]
        started = payloads.utc(sent.started_at) if sent.started_at else (stamps[0] if stamps else self.now)
        ended = payloads.utc(sent.ended_at) if sent.ended_at else (stamps[-1] if stamps else None)
        if stamps and (stamps[0] < started or (ended and stamps[-1] > ended) or stamps != sorted(stamps)):
            findings.append(quality.Finding("times", False, "step times run backwards or leave the trajectory's span"))
        if ended is not None and ended < started:
            ended = started
        scenario_ref = sent.scenario_ref()
        if scenario_ref in self.refused:
            raise self.refused[scenario_ref]
        scenario = self.scenarios.get(scenario_ref) if scenario_ref is not None else None
        asked = sent.scenario.split if sent.scenario else None
        if scenario is not None and asked is not None and scenarios.SPLITS[asked] != scenario.split:
            findings.append(
                quality.Finding(
                    "split", False, f"its scenario is {scenario.split} here; the {asked} that was sent changes nothing"
                )
            )
        return Row(
            project_id=self.project.pk,
            trajectory_id=sent.trajectory_id,
            agent_id=self.agents[sent.agent_id],
            scenario_id=scenario.pk if scenario else None,
            role=sent.role or "",
            declared_group_id=sent.group_id or "",
            declared_group_size=sent.group_size,
            episode_id=sent.episode_id or "",
            parent_trajectory_id=sent.parent_trajectory_id or "",
            parent_call=sent.parent_call,
            retry_of=sent.retry_of or "",
            is_evaluation=sent.is_evaluation or sent.evaluation_id is not None,
            evaluation_id=sent.evaluation_id or "",
            window=f"{started:%Y-%m-%dT%H}:00",
            started_at=started,
            ended_at=None if is_open else ended,
            last_step_at=self.now if is_open else None,
            state=State.OPEN if is_open else State.SEALED,
            final_status=sent.final_status,
            stop_reason=_column_text(sent.stop_reason, 200) if sent.stop_reason else "",
            reward=derived.reward,
            reward_components=sent.reward_components,
            reward_source=derived.source,
            origin=behaviour.origin,
            behaviour=behaviour.behaviour,
            model_names=[_column_text(name, ID_LENGTH) for name in counted.models[:MODELS_KEPT]],
            n_steps=counted.steps,
            n_calls=counted.calls,
            n_trainable_calls=n_trainable,
            prompt_tokens=_tokens(counted.prompt_tokens, sent, "prompt_tokens"),
            completion_tokens=_tokens(counted.completion_tokens, sent, "completion_tokens"),
            fidelity=judged.fidelity,
            quality=judged.quality,
            findings=[{"check": one.check, "ok": one.ok, "detail": _column_text(one.detail, 1000)} for one in findings],
            metrics=_numbers(sent.metrics) if sent.metrics else {},
            source_format=source_format,
            content_hash="\\x" + content_hash.hex(),
            twin_hash="\\x" + twin_hash.hex(),
            raw_size=raw_size,
            shared_texts=[],
        )

    def place_texts(self, prepared: Iterable[Prepared]) -> None:
        """Make sure that the shared texts are there, and name them in the rows."""
        ready = list(prepared)
        wanted = {text.text_hash: text for one in ready for text in one.texts}
        if wanted:
            pks = shared_texts(self.project, wanted)
            for one in ready:
                one.row.shared_texts = [pks[text.text_hash] for text in one.texts]


def _trainable(calls: Sequence[LlmCallPayload], behaviour: origins.Behaviour) -> int:
    """Calls of this project's own policy with an answer, not context, without a new image."""
    return sum(
        origin.origin == "own"
        and call.trainable is not False
        and is_answered(call)
        and not any(has_image(one) for one in (call.prompt_ref.append if call.prompt_ref else own_prompt(call)))
        for call, origin in zip(calls, behaviour.calls, strict=True)
    )


def _tokens(counted: int | None, payload: Envelope, name: str) -> int | None:
    """What the calls tell; where none does, the total among the trajectory's metrics."""
    total = payload.metrics.get(name)
    if counted is None and type(total) is int and 0 <= total < 2**63:
        return total
    return counted


def _column_text(text: str, limit: int) -> str:
    """As much of a text as a column takes; the payload has all of it."""
    return text.replace("\x00", "\ufffd")[:limit]


def _numbers(metrics: Mapping[str, object]) -> dict[str, object]:
    """The metrics that lists can show: numbers, booleans, short words."""
    shown = {
        _column_text(name, 100): _column_text(value, 200) if isinstance(value, str) else value
        for name, value in metrics.items()
        if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 200)
    }
    return dict(list(shown.items())[:METRICS_KEPT])


# --- what trajectories refer to ----------------------------------------------------------------------------------

_agents: dict[tuple[int, str], int] = {}
_texts: dict[tuple[int, bytes], int] = {}


def forget() -> None:
    """Drop what is remembered of rows that others may have deleted."""
    _agents.clear()
    _texts.clear()
    scenarios.forget()


def agents(project: Project, ids: set[str]) -> dict[str, int]:
    """pks of agents, made on first sight."""
    found = {one: pk for one in ids if (pk := _agents.get((project.pk, one))) is not None}
    missing = sorted(ids - set(found))
    if missing:
        rows = Agent.objects.filter(project=project, agent_id__in=missing).values_list("agent_id", "pk")
        present = dict(rows.iterator())
        new = [one for one in missing if one not in present]
        if new:
            with committed_early():
                Agent.objects.bulk_create((Agent(project=project, agent_id=one) for one in new), ignore_conflicts=True)
            present = dict(rows.iterator())
        found.update(present)
        if not connection.in_atomic_block:  # what is rolled back must not be remembered
            if len(_agents) > 200_000:
                _agents.clear()
            _agents.update({(project.pk, one): pk for one, pk in present.items()})
    return found


def shared_texts(project: Project, wanted: Mapping[bytes, segments.Text]) -> dict[bytes, int]:
    """pks of the texts by hash, stored where they are new. Committed before the rows that name them."""
    found = {one: pk for one in wanted if (pk := _texts.get((project.pk, one))) is not None}
    missing = sorted(set(wanted) - set(found))
    if missing:
        with committed_early():
            SharedText.objects.bulk_create(
                (
                    SharedText(
                        project=project,
                        text_hash=one,
                        kind=wanted[one].kind,
                        raw_size=len(wanted[one].raw),
                        data=codec.compress(wanted[one].raw),
                    )
                    for one in missing
                ),
                ignore_conflicts=True,
            )
        rows = SharedText.objects.filter(project=project, text_hash__in=missing).values_list("text_hash", "pk")
        present = {bytes(text_hash): pk for text_hash, pk in rows}
        found.update(present)
        if not connection.in_atomic_block:
            if len(_texts) > 100_000:
                _texts.clear()
            _texts.update({(project.pk, one): pk for one, pk in present.items()})
    return found


# --- ids that are taken ------------------------------------------------------------------------------------------


def _settle_many(project: Project, items: Sequence[Incoming]) -> list[Recorded | Problem]:
    """What becomes of items whose id is taken."""
    if not items:
        return []
    ids = {item.envelope.trajectory_id for item in items}
    rows = {row.trajectory_id: row for row in Trajectory.objects.filter(project=project, trajectory_id__in=ids)}
    gone = set()
    if len(rows) < len(ids):
        gone = set(
            Tombstone.objects.filter(project=project, trajectory_id__in=ids).values_list("trajectory_id", flat=True)
        )
    results: list[Recorded | Problem] = []
    key = bytes(project.hash_key)
    for item in items:
        trajectory_id = item.envelope.trajectory_id
        row = rows.get(trajectory_id)
        try:
            if row is None:
                if trajectory_id in gone:
                    raise Gone(f"Trajectory {trajectory_id} was erased; its id cannot be used again.")
                results.append(_insert(project, [item])[0] or _raced(trajectory_id))  # its namesake was refused
            else:
                results.append(_settle_row(project, row, item, item.hashes(key)[0]))
        except Problem as problem:
            results.append(problem)
    return results


def _raced(trajectory_id: str) -> Problem:
    return Conflict(f"Trajectory {trajectory_id} came in several times at once. Send it again.")


def _settle_row(project: Project, row: Trajectory, item: Incoming, content_hash: bytes) -> Recorded:
    if bytes(row.content_hash) == content_hash:
        return _told(row, "replay")
    if row.state != State.SEALED:
        return _extend(project, row.pk, item, content_hash)
    header = row.segments.filter(seq=0).values_list("step_hashes", flat=True).first()
    if header and bytes(header)[:32] == content_hash:  # the POST that opened it, come again late
        return _told(row, "replay")
    if _says_the_same(row, item.payload):
        return _told(row, "replay")
    raise Conflict(
        f"Trajectory {row.trajectory_id} is there with other content, received {row.received_at:%Y-%m-%dT%H:%M:%SZ}. "
        "The first one is kept. Send yours under another id.",
        pointer="/trajectory_id",
    )


def _says_the_same(row: Trajectory, sent: TrajectoryPayload) -> bool:
    """What is stored, in another spelling: an export that is read back, the same run in another format."""
    try:
        stored = segments.load(row)
    except (LookupError, OSError, Problem):
        return False
    named = sent.scenario_ref() or ""
    gold = "private" in sent.metadata  # an export leaves it out
    return named == (stored.scenario_ref() or "") and _bare(stored, gold=gold) == _bare(sent, gold=gold)


def _bare(payload: TrajectoryPayload, *, gold: bool) -> bytes:
    """Without the words of its scenario, which has a row of its own."""
    fields = {name: getattr(payload, name) for name in TrajectoryPayload.__struct_fields__}
    fields |= {"scenario": None, "scenario_id": None}
    if not gold:
        fields["metadata"] = scenarios.public(payload.metadata)
    return payloads.canonical(TrajectoryPayload(**fields))


# --- open trajectories -------------------------------------------------------------------------------------------


class Appended(msgspec.Struct, frozen=True):
    """The answer to POST …/steps/."""

    trajectory_id: str
    n_steps: int
    appended: int
    replayed: int


def step_hash(step: StepPayload, key: bytes) -> bytes:
    """Of a step as it was sent, wherever it stands."""
    bare = msgspec.structs.replace(step, index=None)
    return hashlib.blake2b(payloads.canonical(bare), key=key, digest_size=HASH_BYTES).digest()


def _pack_open(
    sent: Sequence[StepPayload],
    payload: TrajectoryPayload,
    key: bytes,
    opening_hash: bytes,
    held: blobs.Held | None,
) -> tuple[tuple[segments.Piece, ...], tuple[bytes, ...]]:
    """Header and steps of an open one. The header's hash is that of the opening POST, so that it may come again."""
    bare = msgspec.structs.replace(payload, steps=())
    header = segments.pack_header(bare, held)
    pieces = segments.pack_steps(payload.steps, seq=1, first_step=0, held=held)
    return (header, *pieces), (opening_hash, *_hashes_of(pieces, sent, key, first=0))


def _hashes_of(pieces: Sequence[segments.Piece], sent: Sequence[StepPayload], key: bytes, *, first: int) -> list[bytes]:
    found = [step_hash(step, key) for step in sent]
    return [b"".join(found[piece.first_step - first : piece.last_step + 1 - first]) for piece in pieces]


def append_steps(project: Project, trajectory_id: str, steps: Sequence[StepPayload]) -> Appended:
    """Append to an open trajectory. A step that is there with the same content is a replay.

    Raises:
        Unknown, Gone: no such trajectory. Conflict: another step stands at an index, a gap, or it is sealed.
        Invalid: an index is missing, a prompt_ref points ahead.
    """
    for number, step in enumerate(steps):
        if step.index is None:
            raise Invalid(
                f"/steps/{number}/index is missing: it makes sending again safe.", pointer=f"/steps/{number}/index"
            )
    pressure.check_room()
    key = bytes(project.hash_key)
    rules = redaction.rules(project)
    _store_large_parts(project, trajectory_id, StepsBody(steps=tuple(steps)), rules)
    with transaction.atomic():
        row = _locked(project, trajectory_id)
        stored = _stored_hashes(row)
        fresh: list[StepPayload] = []
        for number, step in enumerate(steps):
            index = step.index
            assert index is not None
            place = f"/steps/{number}/index"
            if index < len(stored):
                if stored[index] != step_hash(step, key):
                    raise Conflict(
                        f"Step {index} of {trajectory_id} is there with other content; the first one is kept.",
                        pointer=place,
                    )
                continue
            if row.state == State.SEALED:
                raise Conflict(f"Trajectory {trajectory_id} is sealed with {row.n_steps} steps.", pointer=place)
            if index != len(stored):
                raise Conflict(
                    f"Step {index} of {trajectory_id} leaves a gap: the next one is {len(stored)}.", pointer=place
                )
            stored.append(step_hash(step, key))
            fresh.append(step)
        if fresh:
            _append(row, fresh, rules, key)
    return Appended(trajectory_id, row.n_steps, len(fresh), len(steps) - len(fresh))


def _store_large_parts(
    project: Project, trajectory_id: str, sent: StepsBody | TrajectoryPayload, rules: redaction.Rules
) -> None:
    """Before the transaction that will find them there: rolled back, it would forget which files it wrote."""
    size = len(payloads.encode(sent))
    if size > limits.PART_BYTES:
        redacted, _ = redaction.redact(sent, rules)
        blobs.take_out(project, redacted, size=size, trajectory_id=trajectory_id, content_hash=b"")


def _append(row: Trajectory, fresh: Sequence[StepPayload], rules: redaction.Rules, key: bytes) -> None:
    """Inside a transaction that holds the row."""
    n_calls = payloads.check_steps(tuple(fresh), first_step=row.n_steps, first_call=row.n_calls)
    holder, counts = redaction.redact(payloads.StepsBody(steps=tuple(fresh)), rules)
    holder, held = blobs.take_out(
        row.project,
        holder,
        size=None,
        trajectory_id=row.trajectory_id,
        content_hash=bytes(row.content_hash),
    )
    last_seq = row.segments.order_by("-seq").values_list("seq", flat=True)[0]
    pieces = segments.pack_steps(holder.steps, seq=last_seq + 1, first_step=row.n_steps, held=held)
    _check_open_bytes(row, pieces)
    _add_pieces(row, pieces, _hashes_of(pieces, fresh, key, first=row.n_steps))
    _add_redactions(row, counts)
    row.n_steps += len(fresh)
    row.n_calls += n_calls
    row.last_step_at = timezone.now()
    row.save(update_fields=["n_steps", "n_calls", "last_step_at"])


def _check_open_bytes(row: Trajectory, pieces: Sequence[segments.Piece]) -> None:
    there = row.segments.aggregate(size=Sum("raw_size"))["size"] or 0
    there += blobs.size_of(row.trajectory_id, bytes(row.content_hash))
    size = there + sum(len(piece.raw) for piece in pieces)
    if size > limits.OPEN_BYTES:
        raise TooLarge(
            f"The steps of {row.trajectory_id} would have {size} bytes together; {limits.OPEN_BYTES} are allowed. End "
            "it, and go on under another id with this one as parent_trajectory_id.",
            pointer="/steps",
            limit=limits.OPEN_BYTES,
            size=size,
        )


def end(project: Project, trajectory_id: str, body: EndBody) -> Recorded:
    """Seal an open trajectory. The same end again is a replay.

    Raises:
        Unknown, Gone: no such trajectory. Conflict: it was sealed otherwise. Invalid: times, or still running.
    """
    if body.final_status == "running":
        raise Invalid("final_status is running: an end needs another one.", pointer="/final_status")
    pressure.check_room()
    now = datetime.now(UTC)
    payloads.check_time(body.ended_at, "/ended_at", now)
    payloads.check_column(body.reward_components, "/reward_components")
    key = bytes(project.hash_key)
    ending = hashlib.blake2b(payloads.canonical(body), key=key, digest_size=32).digest()
    with transaction.atomic():
        row = _locked(project, trajectory_id)
        header = row.segments.get(seq=0)
        marks = bytes(header.step_hashes)
        if row.state == State.SEALED:
            if marks[32:64] == ending:
                return _told(row, "replay")
            raise Conflict(f"Trajectory {trajectory_id} is sealed already, as {row.final_status}.")
        if body.ended_at and payloads.utc(body.ended_at) < row.started_at:
            raise Invalid(
                f"ended_at ({body.ended_at.isoformat()}) lies before started_at ({row.started_at.isoformat()}).",
                pointer="/ended_at",
            )
        stored = _stored_hashes(row)
        whole = segments.load(row)
        payload = TrajectoryPayload(
            **{
                **{name: getattr(whole, name) for name in TrajectoryPayload.__struct_fields__},
                "final_status": body.final_status,
                "stop_reason": body.stop_reason or whole.stop_reason,
                "ended_at": body.ended_at or whole.ended_at or now,
                "metrics": {**whole.metrics, **body.metrics},
                "reward": body.reward if body.reward is not None else row.reward,
                "reward_components": body.reward_components or whole.reward_components,
            }
        )
        # The gateway sees what tools answered in the prompts of later calls alone.
        derived = row.source_format == GATEWAY and all(
            len(step.llm_calls) == 1 and step.action is None for step in payload.steps
        )
        if derived:
            acted = messages_format.with_actions(payload.steps, payload.closing_messages)
            payload = msgspec.structs.replace(payload, steps=acted)
        payload, counts = redaction.redact(payload, redaction.rules(project))
        content_hash, twin_hash = hashes(key, marks[:32] + b"".join(stored) + ending, trajectory_id)
        _seal(
            project,
            row,
            payload,
            content_hash,
            twin_hash,
            marks=marks[:32] + ending,
            step_hashes=stored,
            redactions=counts,
            source_format=row.source_format,
            derived_actions=derived,
        )
        _add_redactions(row, counts)
    return _told(row, "sealed")


def _extend(project: Project, pk: int, item: Incoming, content_hash: bytes) -> Recorded:
    """A whole trajectory for an id that is open: its steps must begin with those that are there."""
    key = bytes(project.hash_key)
    rules = redaction.rules(project)
    _store_large_parts(project, item.payload.trajectory_id, item.payload, rules)
    with transaction.atomic():
        row = Trajectory.objects.select_for_update().select_related("agent").get(pk=pk)
        header = row.segments.get(seq=0)
        opening = bytes(header.step_hashes)[:32]
        if row.state == State.SEALED:
            if bytes(row.content_hash) == content_hash or opening == content_hash:
                return _told(row, "replay")
            raise Conflict(f"Trajectory {row.trajectory_id} was sealed meanwhile with other content.")
        if row.agent.agent_id != item.envelope.agent_id:
            raise Conflict(f"Trajectory {row.trajectory_id} is of another agent.", pointer="/agent_id")
        stored = _stored_hashes(row)
        sent = [step_hash(step, key) for step in item.payload.steps]
        same = next((at for at, one in enumerate(stored) if at >= len(sent) or sent[at] != one), len(stored))
        is_open = item.envelope.final_status == "running"
        if same < min(len(stored), len(sent)) or (len(sent) < len(stored) and not is_open):
            raise Conflict(
                f"Trajectory {row.trajectory_id} is open with {len(stored)} steps; step {same} is not what was sent "
                "before. A whole trajectory must begin with them.",
                pointer=f"/steps/{same}",
            )
        if is_open:
            if fresh := item.payload.steps[len(stored) :]:
                _append(row, fresh, rules, key)
            return _told(row, "extended" if fresh else "replay")
        payload, counts = redaction.redact(item.payload, rules)
        twin_hash = item.hashes(key)[1]
        _seal(
            project,
            row,
            payload,
            content_hash,
            twin_hash,
            marks=opening,
            step_hashes=sent,
            redactions=counts,
            source_format=item.source_format,
            derived_actions=item.derived_actions,
        )
        RedactionCount.objects.filter(trajectory=row).delete()
        _add_redactions(row, counts)
    return _told(row, "sealed")


def revise(project: Project, item: Incoming) -> Recorded:
    """Make an open trajectory anew of all that is known of it by now; it is sealed unless it still runs.

    For what is put together of pieces that come in any order: a span that comes late may belong between two steps.

    Raises:
        Unknown, Gone: no such trajectory. Conflict: it was sealed with other content.
    """
    key = bytes(project.hash_key)
    rules = redaction.rules(project)
    trajectory_id = item.envelope.trajectory_id
    _store_large_parts(project, trajectory_id, item.payload, rules)
    content_hash, twin_hash = item.hashes(key)
    with transaction.atomic():
        row = _locked(project, trajectory_id)
        if row.state == State.SEALED:
            if bytes(row.content_hash) == content_hash:
                return _told(row, "replay")
            raise Conflict(f"Trajectory {trajectory_id} was sealed with other content.")
        if item.envelope.final_status == "running":
            _rewrite(row, _Context(project, [item.envelope]).prepare(item))
            return _told(row, "extended")
        payload, counts = redaction.redact(item.payload, rules)
        row.agent_id = agents(project, {payload.agent_id})[payload.agent_id]
        _seal(
            project,
            row,
            payload,
            content_hash,
            twin_hash,
            marks=content_hash,
            step_hashes=[step_hash(step, key) for step in item.payload.steps],
            redactions=counts,
            source_format=item.source_format,
            derived_actions=item.derived_actions,
            said=item.findings,
        )
        RedactionCount.objects.filter(trajectory=row).delete()
        _add_redactions(row, counts)
    return _told(row, "sealed")


REWARDED = {"reward", "reward_components", "reward_source"}  # columns that a PATCH may have set while it ran
FIRM = {"project_id", "agent_id", "trajectory_id", "is_superseded", "is_excluded"}  # whatever else is known of it


def _rewrite(row: Trajectory, prepared: Prepared) -> None:
    """Inside a transaction that holds the row: other content for one that stays open."""
    kept = FIRM - {"agent_id"} | (REWARDED if row.reward_source not in ("", rewards.RECORDED) else set())
    for name in Row.__struct_fields__:
        if name not in kept:
            setattr(row, name, getattr(prepared.row, name))
    row.content_hash = bytes.fromhex(prepared.row.content_hash.removeprefix("\\x"))
    row.twin_hash = bytes.fromhex(prepared.row.twin_hash.removeprefix("\\x"))
    row.last_step_at = timezone.now()
    row.segments.all().delete()
    _add_pieces(row, prepared.pieces, prepared.step_hashes)
    row.save()
    RedactionCount.objects.filter(trajectory=row).delete()
    _add_redactions(row, Counter(prepared.redactions))


def _seal(
    project: Project,
    row: Trajectory,
    payload: TrajectoryPayload,
    content_hash: bytes,
    twin_hash: bytes,
    *,
    marks: bytes,
    step_hashes: Sequence[bytes],
    redactions: Mapping[str, int],
    source_format: str = "native",
    derived_actions: bool = False,
    said: Sequence[str] = (),
) -> None:
    """Inside a transaction that holds the row: compact its segments, fill its columns, queue it for its group."""
    context = _Context(project, [payload])
    canonical = payloads.canonical(payload)
    late = row.reward if row.reward_source not in ("", rewards.RECORDED) else None  # came by PATCH while it ran
    columns, behaviour = context.row_of(
        payload,
        content_hash=content_hash,
        twin_hash=twin_hash,
        source_format=source_format,
        raw_size=len(canonical),
        nul=b"\\u0000" in canonical,
        redactions=redactions,
    )
    payload, held = blobs.take_out(
        project, payload, size=len(canonical), trajectory_id=row.trajectory_id, content_hash=content_hash
    )
    packed = segments.pack(payload, behaviour.calls, key=context.key, derived_actions=derived_actions, held=held)
    columns.findings.extend({"check": "source", "ok": False, "detail": _column_text(one, 1000)} for one in said)
    pks = shared_texts(project, {text.text_hash: text for text in packed.texts})
    columns.shared_texts = [pks[text.text_hash] for text in packed.texts]
    row.segments.all().delete()
    # Every step's hash stays, so that a late replay of a step is known for one: after the 64 bytes of the marks.
    kept_hashes = marks.ljust(64, b"\0") + b"".join(step_hashes)
    _add_pieces(row, packed.pieces, [kept_hashes, *(b"" for _ in packed.pieces[1:])])
    was = row.state
    kept = FIRM | {"content_hash", "twin_hash"} | (REWARDED if late is not None else set())
    for name in Row.__struct_fields__:
        if name not in kept:
            setattr(row, name, getattr(columns, name))
    row.content_hash, row.twin_hash = content_hash, twin_hash
    row.save()
    history.record(row, was, row.state, project=project, by=history.SYSTEM, field="state")
    IndexingWork.objects.create(trajectory=row, project=project)


def time_out() -> int:
    """Mark open trajectories without a new step for the project's time; a later end still seals them."""
    now = timezone.now()
    count = 0
    for project in Project.objects.filter(trajectories__state=State.OPEN).distinct():
        before = now - timedelta(minutes=project.open_timeout_minutes)
        with transaction.atomic():
            rows = list(
                Trajectory.objects.select_for_update(skip_locked=True).filter(
                    project=project, state=State.OPEN, last_step_at__lt=before
                )[:1000]
            )
            Trajectory.objects.filter(pk__in=[row.pk for row in rows]).update(
                state=State.TIMED_OUT, final_status=FinalStatus.TIMEOUT
            )
            history.record_many(
                ((row, State.OPEN, State.TIMED_OUT) for row in rows),
                project=project,
                by=history.SYSTEM,
                reason=f"no step for {project.open_timeout_minutes} minutes",
                field="state",
            )
            count += len(rows)
        for row in rows:
            _judge_timed_out(project, row.pk)
    return count


JUDGED = (
    "quality",
    "fidelity",
    "findings",
    "origin",
    "behaviour",
    "model_names",
    "n_trainable_calls",
    "prompt_tokens",
    "completion_tokens",
)


def _judge_timed_out(project: Project, pk: int) -> None:
    """Nobody may ever end it, so its columns say now what came."""
    with transaction.atomic():
        row = Trajectory.objects.select_for_update().filter(pk=pk, state=State.TIMED_OUT).first()
        if row is None:
            return
        try:
            payload = segments.load(row)
            timed_out = TrajectoryPayload(
                **{
                    **{name: getattr(payload, name) for name in TrajectoryPayload.__struct_fields__},
                    "final_status": "timeout",
                }
            )
            columns, _ = _Context(project, [timed_out]).row_of(
                timed_out,
                content_hash=b"",
                twin_hash=b"",
                source_format=row.source_format,
                raw_size=0,
                nul=False,
                redactions={},
            )
        except (Problem, LookupError) as exc:
            logger.warning("trajectory %s timed out and cannot be judged: %s", row.pk, exc)
            return
        for name in JUDGED:
            setattr(row, name, getattr(columns, name))
        row.save(update_fields=JUDGED)


def _locked(project: Project, trajectory_id: str) -> Trajectory:
    row = Trajectory.objects.select_for_update().filter(project=project, trajectory_id=trajectory_id).first()
    if row is None:
        if Tombstone.objects.filter(project=project, trajectory_id=trajectory_id).exists():
            raise Gone(f"Trajectory {trajectory_id[:200]} was erased.")
        raise Unknown("There is no such trajectory in this project. Open it by a POST with final_status running.")
    return row


def _stored_hashes(row: Trajectory) -> list[bytes]:
    """The hash of each step of an open trajectory, or of one that was open."""
    found: list[bytes] = []
    for seq, raw in row.segments.order_by("seq").values_list("seq", "step_hashes"):
        joined = bytes(raw)[64:] if seq == 0 else bytes(raw)
        found.extend(joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES))
    return found


def _add_pieces(row: Trajectory, pieces: Sequence[segments.Piece], step_hashes: Sequence[bytes]) -> None:
    TrajectorySegment.objects.bulk_create(
        TrajectorySegment(
            trajectory=row,
            seq=piece.seq,
            first_step=piece.first_step,
            last_step=piece.last_step,
            raw_size=len(piece.raw),
            dictionary=codec.LATEST,
            data=codec.compress(piece.raw, codec.LATEST),
            step_hashes=hashed,
        )
        for piece, hashed in zip(pieces, step_hashes, strict=True)
    )


def _add_redactions(row: Trajectory, counts: Counter[str]) -> None:
    for rule, count in counts.items():
        if not RedactionCount.objects.filter(trajectory=row, rule=rule).update(count=F("count") + count):
            RedactionCount.objects.create(trajectory=row, rule=rule, count=count)
