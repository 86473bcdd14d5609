"""Which groups to ask the judges about, and keeping what they say.

    pending → judged | judge_error        judged | judge_error → pending, to judge again        any → excluded → pending

Nothing outside this file writes a group's `judging`. A worker claims a group for a while before it asks, so that two
never pay for the same question; each answer is kept when it arrives; the judgments of a whole group become current in
one transaction. "Not judged" is never 0.
"""

import contextlib
import enum
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import httpx
from django.conf import settings
from django.db import InterfaceError, OperationalError, transaction
from django.db.models import F, Q, QuerySet
from django.utils import timezone

from training import judge, mixing, policies, rules
from training.models import JudgeCall, JudgeKind, RewardJudgment, TrainingPolicy
from trajectories import bulk_actions, history, indexing, segments, transcripts
from trajectories.errors import Refused
from trajectories.history import SYSTEM, Actor
from trajectories.models import ID_LENGTH, FinalStatus, Group, GroupState, Judging, Project, Split, State, Trajectory
from trajectories.payloads import TrajectoryPayload

logger = logging.getLogger(__name__)

NEXT: dict[Judging, frozenset[Judging]] = {
    Judging.PENDING: frozenset({Judging.JUDGED, Judging.ERROR, Judging.EXCLUDED}),
    Judging.JUDGED: frozenset({Judging.PENDING, Judging.EXCLUDED}),
    Judging.ERROR: frozenset({Judging.JUDGED, Judging.ERROR, Judging.PENDING, Judging.EXCLUDED}),
    Judging.EXCLUDED: frozenset({Judging.PENDING}),
}

MOST_TRIES = 10  # of a group whose judge is away, over about three hours, before a person must ask for more
MOST_ANSWERS = 3  # of a group whose answers cannot be used: each is paid for
FIRST_WAIT = timedelta(seconds=30)  # doubles with every try
LONGEST_WAIT = timedelta(hours=1)
A_TURN = 60.0  # seconds that one pass begins new questions; a worker has other things to do as well
TEMPERATURE = 0.0


def sources(policy: TrainingPolicy) -> tuple[str, ...]:
    """The judges that count in this project's mix and can be asked here."""
    wanted = [source for source in mixing.weights(policy) if source not in (mixing.RECORDED, mixing.PEOPLE)]
    return tuple(
        source
        for source in wanted
        if (source == mixing.RULER and has_llm_judge()) or source.removeprefix(mixing.RULE) in rules.RULES
    )


def has_llm_judge() -> bool:
    return bool(settings.JUDGE_BASE_URL and settings.JUDGE_MODEL)


def can_judge(policy: TrainingPolicy) -> bool:
    """Whether what is not judged yet can be."""
    return bool(sources(policy))


@contextmanager
def judge_client() -> Iterator[httpx.Client]:
    """The LLM judge as the settings name it."""
    headers = {"Authorization": f"Bearer {settings.JUDGE_API_KEY}"} if settings.JUDGE_API_KEY else {}
    base = settings.JUDGE_BASE_URL.rstrip("/") + "/"
    with httpx.Client(base_url=base, headers=headers, timeout=settings.JUDGE_TIMEOUT_SECONDS) as client:
        yield client


# Attempts that are compared: those that the group's counters count (indexing.py says the same in SQL).
COUNTING = Q(is_superseded=False, twin_of=None, is_excluded=False, state=State.SEALED, archived_at__isnull=True) & ~Q(
    final_status=FinalStatus.ENVIRONMENT_ERROR
)


# --- which ---------------------------------------------------------------------------------------------------------


def due(groups: QuerySet[Group]) -> QuerySet[Group]:
    """Those that wait for a judge now: never asked, or failed and waited long enough, and claimed by nobody."""
    now = timezone.now()
    waited = Q(judge_again_at__isnull=True, judging=Judging.PENDING) | Q(judge_again_at__lte=now)
    return groups.filter(waited, state=GroupState.CLOSED, judging__in=(Judging.PENDING, Judging.ERROR))


def judge_due(project: Project) -> int:
    """Ask about the groups of a project that are due; how many were asked about."""
    policy = policies.of(project)
    if not can_judge(policy):
        return 0
    # Judgments of what never enters a batch would be paid for and never read.
    mine = Group.objects.filter(project=project, is_evaluation=False, scenario__split=Split.TRAIN)
    return _take_a_turn(due(mine).order_by(F("judge_again_at").asc(nulls_first=True), "pk"))


def judge_groups(project: Project, groups: QuerySet[Group]) -> bool:
    """Ask about those of some groups that are due.

    Returns:
        True when nothing of them is left to wait for: judged, given up, or no judge counts here.
    """
    if not can_judge(policies.of(project)):
        return True
    _take_a_turn(due(groups).order_by("pk"))
    return not groups.filter(
        Q(judging=Judging.PENDING) | Q(judging=Judging.ERROR, judge_again_at__isnull=False), state=GroupState.CLOSED
    ).exists()


def _take_a_turn(groups: QuerySet[Group]) -> int:
    """Ask about one after the other until time is up, or the judge is away: the next one would only wait as well."""
    until = time.monotonic() + A_TURN
    asked = 0
    for group in groups.select_related("project", "scenario").iterator(chunk_size=100):
        outcome = _judge(group)
        asked += outcome != Outcome.NOT_OURS
        if outcome == Outcome.AWAY or time.monotonic() > until:
            break
    return asked


def retry_failed(project: Project, *, by: Actor, reason: str) -> int:
    """Ask again about every group whose judge failed; how many that are."""
    failed = list(Group.objects.filter(project=project, judging=Judging.ERROR))
    for group in failed:
        judge_again(group, by=by, reason=reason)
    return len(failed)


def judge_again(group: Group, *, by: Actor, reason: str) -> None:
    """Send a group to its judges once more; what they said before stays in its history.

    Raises:
        Refused: it waits for them already, or is excluded.
    """
    _move(group, Judging.PENDING, by=by, reason=reason, judge_attempts=0, judge_again_at=None, judge_error="")


def judge_many(chunk: bulk_actions.Chunk) -> bulk_actions.Refusals:
    """`judge_again` of each group of a bulk action."""
    groups, refused = bulk_actions.locked_groups(chunk)
    for pk, group in groups.items():
        try:
            judge_again(group, by=chunk.by, reason=chunk.reason)
        except Refused as problem:
            refused[pk] = str(problem)
    return refused


def exclude(group: Group, *, by: Actor, reason: str) -> None:
    """Leave a group out of judging.

    Raises:
        Refused: it is left out already.
    """
    _move(group, Judging.EXCLUDED, by=by, reason=reason)


# --- asking --------------------------------------------------------------------------------------------------------


class Outcome(enum.Enum):
    NOT_OURS = "another worker has it, or there is nothing to do"
    JUDGED = "judged"
    FAILED = "failed; another group may fare better"
    AWAY = "the judge is away"


def judge_group(group: Group) -> bool:
    """Ask every judge that counts about one group. Safe to run twice, at once, and to be killed anywhere.

    Returns:
        False when another worker has it, or there was nothing to do.
    """
    return _judge(group) != Outcome.NOT_OURS


def _judge(group: Group) -> Outcome:
    if not _claim(group):
        return Outcome.NOT_OURS
    policy = policies.of(group.project)
    members = members_of(group)
    attempt = group.judge_attempts + 1
    try:
        payloads = segments.load_many(members)
        said: list[tuple[JudgeCall, list[RewardJudgment]]] = []
        for source in sources(policy):
            if source == mixing.RULER:
                said += _ask_llm(group, members, payloads, policy, attempt=attempt)
            else:
                said.append(_ask_rule(group, members, payloads, source))
    except judge.JudgeFailed as failed:
        _failed(group, failed, attempt)
        return Outcome.AWAY if isinstance(failed, judge.JudgeUnavailable) else Outcome.FAILED
    except (OperationalError, InterfaceError):
        raise  # the database is away; the claim runs out by itself
    except Exception as fault:
        logger.exception("group %s: a fault while it was judged", group.pk)
        _failed(group, judge.JudgeFailed(f"A fault of ours; the log has more: {fault!r}"), attempt)
        return Outcome.FAILED
    _keep(group, said)
    return Outcome.JUDGED


def members_of(group: Group) -> list[Trajectory]:
    """The attempts that are compared: those that the group's counters count."""
    return list(group.trajectories.filter(COUNTING).order_by("pk"))


def _claim(group: Group) -> bool:
    """Take the group for as long as the judge may need; True for one of several that try."""
    parts = max(1, -(-max(group.n, 1) // judge.MOST_ATTEMPTS))
    lease = timedelta(seconds=2 * settings.JUDGE_TIMEOUT_SECONDS * parts + 30)
    claimed = due(Group.objects.filter(pk=group.pk)).update(judge_again_at=timezone.now() + lease)
    if claimed:
        group.refresh_from_db()
    return bool(claimed)


def split(members: Sequence[Trajectory], seed: int) -> list[list[Trajectory]]:
    """Parts of at most 8, as equal as can be, each shuffled: by the seed alone, so that it can be done again."""
    shuffled = list(members)
    random.Random(seed).shuffle(shuffled)
    parts = max(1, -(-len(shuffled) // judge.MOST_ATTEMPTS))
    return [shuffled[number::parts] for number in range(parts)]


def _ask_llm(
    group: Group,
    members: Sequence[Trajectory],
    payloads: dict[int, segments.LoadedPayload],
    policy: TrainingPolicy,
    *,
    attempt: int,
) -> list[tuple[JudgeCall, list[RewardJudgment]]]:
    """One question a part. An answer is kept when it arrives, so a later failure does not cost it again.

    Raises:
        judge.JudgeFailed: of the first part that failed.
    """
    # The seed is of the group, not of the try: the same question finds the answer that was paid for.
    seed = split_seed(group)
    parts = split(members, seed)
    rubric = policy.rubric.text if policy.rubric else judge.DEFAULT_RUBRIC
    said = []
    with judge_client() as client:
        for number, part in enumerate(parts):
            attempts = [attempt_of(payloads[member.pk]) for member in part]
            call = JudgeCall(
                project=group.project,
                group=group,
                kind=JudgeKind.LLM,
                source=mixing.RULER,
                rubric=policy.rubric,
                model=settings.JUDGE_MODEL[:ID_LENGTH],
                attempt=attempt,
                part=number,
                parts=len(parts),
                seed=seed,
                permutation=[member.pk for member in part],
            )
            if judge.are_identical(attempts):
                why = (
                    "All attempts are identical, so the judge was not asked." if len(part) > 1 else "Only one attempt."
                )
                call.state, call.raw_answer, call.finished_at = JudgeCall.State.DONE, why, timezone.now()
                call.save()
                said.append((call, [_judgment(call, member, score=None, reasoning=why) for member in part]))
                continue
            question = judge.Question(group.scenario.description, rubric, attempts)
            said.append((call, _answered(call, client, question, part)))
    return said


def split_seed(group: Group) -> int:
    """The seed of a group's order and parts: fixed for the group, unlike any order the sender could choose."""
    return int.from_bytes(random.Random(f"{group.project.split_salt}:{group.pk}").randbytes(4), "big")


def _answered(
    call: JudgeCall, client: httpx.Client, question: judge.Question, part: Sequence[Trajectory]
) -> list[RewardJudgment]:
    """Ask, or find the answer to the same question; keep the call either way."""
    sent = judge.prompt(question)
    call.prompt_hash = judge.prompt_hash(sent, model=call.model, temperature=TEMPERATURE)
    call.prompt = "\n\n".join(str(message["content"]) for message in sent).replace("\0", "")
    earlier = (
        JudgeCall.objects.filter(project=call.project, prompt_hash=call.prompt_hash, state=JudgeCall.State.DONE)
        .filter(cached_from__isnull=True)
        .order_by("-pk")
        .first()
    )
    if earlier is not None and not _wants_new(call.group):
        call.cached_from, call.raw_answer = earlier, earlier.raw_answer
        scores = judge.read(earlier.raw_answer, len(part))
    else:
        _refuse_beyond_budget(call.project)
        call.save()
        try:
            verdict = judge.ask(client, settings.JUDGE_MODEL, sent, len(part), temperature=TEMPERATURE)
        except judge.JudgeFailed as failed:
            call.state, call.error_kind, call.error = JudgeCall.State.ERROR, failed.kind, str(failed)
            call.raw_answer, call.finished_at = failed.raw.replace("\0", ""), timezone.now()
            call.save()
            raise
        scores = verdict.scores
        call.raw_answer = verdict.raw.replace("\0", "")
        call.prompt_tokens, call.completion_tokens = verdict.prompt_tokens, verdict.completion_tokens
        call.latency_ms = verdict.latency_ms
    call.state, call.finished_at = JudgeCall.State.DONE, timezone.now()
    call.save()
    return [
        _judgment(
            call,
            member,
            score=score.score,
            rank=score.rank,
            reasoning=score.explanation,
            strengths=list(score.strengths),
            weaknesses=list(score.weaknesses),
        )
        for member, score in zip(part, scores, strict=True)
    ]


def _wants_new(group: Group) -> bool:
    """Somebody asked to judge again what was judged: then the earlier answer is not what they want."""
    return RewardJudgment.objects.filter(group=group, source=mixing.RULER, is_current=True).exists()


def _refuse_beyond_budget(project: Project) -> None:
    """Raises judge.JudgeUnavailable: the day's calls are used up; it resets at midnight UTC."""
    today = timezone.now().replace(hour=0, minute=0, second=0, microsecond=0)
    asked = JudgeCall.objects.filter(
        project=project, kind=JudgeKind.LLM, cached_from__isnull=True, created_at__gte=today
    ).exclude(prompt_hash="")
    if asked.count() >= settings.JUDGE_DAILY_CALLS:
        raise judge.JudgeUnavailable(
            f"The judge has been asked {settings.JUDGE_DAILY_CALLS} times today, as often as JUDGE_DAILY_CALLS allows.",
            retry_after=(today + timedelta(days=1) - timezone.now()).total_seconds(),
        )


def attempt_of(payload: TrajectoryPayload) -> judge.Attempt:
    """What the judge sees: the conversations one after the other; the steps' actions where nothing was said."""
    found = transcripts.played(payload)
    messages = [message for one in found for message in one.messages]
    if not messages:
        messages = [
            {"role": "assistant", "content": f"{step.action.action_type} {step.action.parameters or ''}".strip()}
            for step in payload.steps
            if step.action is not None
        ]
    return judge.Attempt(messages, next((one.tools for one in found if one.tools), None))


def _ask_rule(
    group: Group, members: Sequence[Trajectory], payloads: dict[int, segments.LoadedPayload], source: str
) -> tuple[JudgeCall, list[RewardJudgment]]:
    rule = rules.RULES[source.removeprefix(mixing.RULE)]
    call = JudgeCall(
        project=group.project,
        group=group,
        kind=JudgeKind.CODE,
        source=source,
        permutation=[member.pk for member in members],
        state=JudgeCall.State.DONE,
        finished_at=timezone.now(),
    )
    rulings = [rule(seen(member, payloads[member.pk], group)) for member in members]
    falling = sorted((one.score for one in rulings if one.score is not None), reverse=True)
    call.save()
    return call, [
        _judgment(
            call,
            member,
            score=ruling.score,
            rank=falling.index(ruling.score) + 1 if ruling.score is not None else None,
            reasoning=ruling.reasoning,
        )
        for member, ruling in zip(members, rulings, strict=True)
    ]


def seen(member: Trajectory, payload: TrajectoryPayload, group: Group) -> rules.Seen:
    """What a rule may look at of one attempt."""
    answers = [
        transcripts.text_of(message)
        for one in transcripts.played(payload)
        for message in one.messages
        if message.get("role") == "assistant" and transcripts.text_of(message)
    ]
    actions = [step.action.action_type for step in payload.steps if step.action is not None]
    metadata = group.scenario.metadata
    private = metadata.get("private") if isinstance(metadata, dict) else None
    valid = metadata.get("valid_answers") if isinstance(metadata, dict) else None
    return rules.Seen(
        reward=member.reward,
        final_status=member.final_status,
        answer=answers[-1] if answers else None,
        last_action=actions[-1] if actions else None,
        gold=private.get("answer") if isinstance(private, dict) else None,
        valid_answers=[str(one) for one in valid] if isinstance(valid, list) else (),
        n_steps=member.n_steps,
    )


def _judgment(
    call: JudgeCall,
    member: Trajectory,
    *,
    score: float | None,
    reasoning: str,
    rank: int | None = None,
    strengths: list[str] | None = None,
    weaknesses: list[str] | None = None,
) -> RewardJudgment:
    return RewardJudgment(
        project_id=call.project_id,
        trajectory=member,
        group_id=call.group_id,
        judge_call=call,
        kind=call.kind,
        source=call.source,
        score=score,
        rank=rank,
        reasoning=reasoning,
        strengths=strengths or [],
        weaknesses=weaknesses or [],
        author=(call.model or call.source)[:150],
    )


# --- keeping -------------------------------------------------------------------------------------------------------


def _keep(group: Group, said: Sequence[tuple[JudgeCall, list[RewardJudgment]]]) -> None:
    """Make what was said current, all of it at once, and the group judged."""
    judgments = [one for _, rows in said for one in rows]
    with transaction.atomic():
        Group.objects.select_for_update(no_key=True).get(pk=group.pk)
        current = RewardJudgment.objects.filter(
            trajectory__in={one.trajectory_id for one in judgments},
            source__in={one.source for one in judgments},
            is_current=True,
            counts=True,
        )
        by_people = set(current.filter(kind=JudgeKind.HUMAN).values_list("trajectory_id", "source"))
        current.exclude(kind=JudgeKind.HUMAN).update(is_current=False)
        for one in judgments:  # a person's word outlasts a judge's
            one.is_current = (one.trajectory_id, one.source) not in by_people
        RewardJudgment.objects.bulk_create(judgments, batch_size=500)
        recount(group)
        # A person may have excluded it, or asked for more, while the judge thought; the answers are kept.
        with contextlib.suppress(Refused):
            _move(group, Judging.JUDGED, by=SYSTEM, judge_again_at=None, judge_error="")


def recount(group: Group) -> None:
    """Count the current judgments again, in the mix of the policy: attempts that every judge of the mix has scored.

    With several sources the counters are of their mean; they say whether anything tells the attempts apart, the mix
    itself is made when a batch is frozen.
    """
    policy = policies.of(group.project)
    wanted = [source for source in mixing.weights(policy) if source != mixing.RECORDED]
    rows = RewardJudgment.objects.filter(
        trajectory__in=group.trajectories.filter(COUNTING),
        source__in=wanted,
        is_current=True,
        counts=True,
        score__isnull=False,
    ).values_list("trajectory_id", "source", "score")
    by_attempt: dict[int, dict[str, float]] = {}
    for trajectory, source, score in rows:
        assert score is not None
        by_attempt.setdefault(trajectory, {})[source] = score
    whole = [sum(one.values()) / len(one) for one in by_attempt.values() if len(one) == len(wanted)]
    Group.objects.filter(pk=group.pk).update(
        judged_n=len(whole),
        judged_min=min(whole, default=None),
        judged_max=max(whole, default=None),
        judged_sum=sum(whole),
    )


def _failed(group: Group, failed: judge.JudgeFailed, attempt: int) -> None:
    """Say so on the group, and when it will be asked again: never, once asking again cannot help."""
    most = MOST_TRIES if isinstance(failed, judge.JudgeUnavailable) else MOST_ANSWERS
    give_up = isinstance(failed, judge.JudgeRefused) or attempt >= most
    wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
    if failed.retry_after is not None:
        wait = max(wait, timedelta(seconds=min(failed.retry_after, 86_400.0)))
    logger.warning("group %s: judge %s: %s", group.pk, failed.kind, failed)
    try:
        _move(
            group,
            Judging.ERROR,
            by=SYSTEM,
            reason=str(failed)[:1000],
            judge_attempts=attempt,
            judge_again_at=None if give_up else timezone.now() + wait,
            judge_error=str(failed)[:2000],
        )
    except Refused:
        return  # a person moved it meanwhile


def override(judgment: RewardJudgment, score: float, *, by: Actor, reason: str) -> RewardJudgment:
    """A person's score in place of a judge's, for one attempt. What the judge said stays in the history.

    It stands in the same judge call, so its siblings stay those it is compared with; and it outlasts "judge again":
    only another override takes its place.

    Raises:
        Refused: no reason; a score outside 0 to 1; or the judgment is no longer current.
    """
    _check(score, reason)
    with transaction.atomic():
        # The WHERE repeats what we read: of two persons who correct the same score, the second is told.
        replaced = RewardJudgment.objects.filter(pk=judgment.pk, is_current=True, counts=True).update(is_current=False)
        if not replaced:
            raise Refused(f"{judgment} is no longer current. Reload and try again.")
        row = RewardJudgment.objects.create(
            project=judgment.project,
            trajectory=judgment.trajectory,
            group=judgment.group,
            judge_call=judgment.judge_call,
            kind=JudgeKind.HUMAN,
            source=judgment.source,
            score=score,
            reasoning=reason,
            author=by.name[:150],
        )
        if judgment.group is not None:
            recount(judgment.group)
    return row


def review(trajectory: Trajectory, score: float, *, by: Actor, reason: str) -> RewardJudgment:
    """A person's own score for one attempt, beside the judges' (source `people`). The one before stays in the history.

    Raises:
        Refused: no reason, or a score outside 0 to 1.
    """
    _check(score, reason)
    with transaction.atomic():
        Trajectory.objects.select_for_update(no_key=True, of=("self",)).get(pk=trajectory.pk)
        RewardJudgment.objects.filter(trajectory=trajectory, source=mixing.PEOPLE, is_current=True, counts=True).update(
            is_current=False
        )
        row = RewardJudgment.objects.create(
            project=trajectory.project,
            trajectory=trajectory,
            group=trajectory.group,
            kind=JudgeKind.HUMAN,
            source=mixing.PEOPLE,
            score=score,
            reasoning=reason,
            author=by.name[:150],
        )
        if trajectory.group is not None:
            recount(trajectory.group)
    return row


def leave_out(trajectory: Trajectory, *, by: Actor, reason: str) -> None:
    """Keep one attempt out of its group's baseline, of judging and of every batch to come.

    Raises:
        Refused: no reason, or it is left out already.
    """
    _set_excluded(trajectory, True, by=by, reason=reason)


def take_back(trajectory: Trajectory, *, by: Actor, reason: str) -> None:
    """Let an attempt that was left out count again.

    Raises:
        Refused: no reason, or it is not left out.
    """
    _set_excluded(trajectory, False, by=by, reason=reason)


def _set_excluded(trajectory: Trajectory, excluded: bool, *, by: Actor, reason: str) -> None:
    if not reason.strip():
        raise Refused("Give a reason: it is kept with the change.")
    words = ("included", "excluded")
    with transaction.atomic():
        moved = Trajectory.objects.filter(pk=trajectory.pk, is_excluded=not excluded).update(is_excluded=excluded)
        if not moved:
            raise Refused(f"{trajectory} is {words[excluded]} already.")
        was, to = words[not excluded], words[excluded]
        history.record(trajectory, was, to, project=trajectory.project, by=by, reason=reason, field="is_excluded")
        indexing.touch(trajectory.project, [trajectory.group_id])
        if trajectory.group is not None:
            recount(trajectory.group)
    trajectory.is_excluded = excluded


def _check(score: float, reason: str) -> None:
    if not reason.strip():
        raise Refused("Give a reason: it is kept with the score.")
    if not 0.0 <= score <= 1.0:
        raise Refused(f"The score {score} is outside 0 to 1.")


def _move(group: Group, to: Judging, *, by: Actor, reason: str = "", **also: object) -> None:
    was = Judging(group.judging)
    if to not in NEXT[was]:
        raise Refused(f"The judging of {group} is {was.label!r}, so it cannot become {to.label!r}.")
    with transaction.atomic():
        moved = Group.objects.filter(pk=group.pk, judging=was).update(judging=to, judging_since=timezone.now(), **also)
        if not moved:
            raise Refused(f"{group} changed while you were looking at it. Reload and try again.")
        history.record(group, was, to, project=group.project, by=by, reason=reason, field="judging")
    group.refresh_from_db()
