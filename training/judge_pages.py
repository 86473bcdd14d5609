"""What the pages of a judgment and of a judge's call show. A judge's answer is a stranger's text, whatever it says."""

from collections.abc import Sequence
from dataclasses import dataclass

from training.models import JudgeCall, RewardJudgment
from trajectories import shown

TEXT = 60_000  # characters of a prompt or an answer that are shown
SIBLINGS = 64


@dataclass(frozen=True)
class Said:
    """A text, its controls made visible and its end cut when it is very long."""

    text: str
    left_out: int  # characters


def said(text: str) -> Said:
    return Said(shown.visible(text[:TEXT]), max(0, len(text) - TEXT))


@dataclass(frozen=True)
class CallPage:
    prompt: Said
    answer: Said
    error: Said
    judgments: Sequence[RewardJudgment]  # one an attempt, the best first
    seconds: float | None


@dataclass(frozen=True)
class JudgmentPage:
    reasoning: Said
    strengths: Sequence[Said]
    weaknesses: Sequence[Said]
    siblings: Sequence[RewardJudgment]  # of the same call; else of the same trajectory


def call_page(call: JudgeCall) -> CallPage:
    rows = call.judgments.select_related("trajectory").defer("strengths", "weaknesses").order_by("rank", "pk")
    return CallPage(
        prompt=said(call.prompt),
        answer=said(call.raw_answer),
        error=said(call.error),
        judgments=list(rows[:SIBLINGS]),
        seconds=None if call.latency_ms is None else call.latency_ms / 1000,
    )


def judgment_page(one: RewardJudgment) -> JudgmentPage:
    if one.judge_call_id is not None:
        rows = RewardJudgment.objects.filter(judge_call=one.judge_call_id).order_by("rank", "pk")
    else:
        rows = RewardJudgment.objects.filter(trajectory=one.trajectory_id).order_by("-pk")
    siblings = rows.select_related("trajectory").defer("reasoning", "strengths", "weaknesses")
    return JudgmentPage(said(one.reasoning), _list(one.strengths), _list(one.weaknesses), list(siblings[:SIBLINGS]))


def _list(values: object) -> list[Said]:
    return [said(str(one)) for one in values[:50]] if isinstance(values, list) else []
