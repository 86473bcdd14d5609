"""TRL: `messages` with `tools` for supervised fine-tuning; `prompt`, `chosen`, `rejected` for preferences.

Rows keep their columns and their types, so that `datasets.load_dataset("json")` reads a file of any length. `tools` is
JSON text, which TRL decodes: schemas of different tools do not fit one inferred column.
"""

from collections.abc import Iterator, Sequence

from trajectories.export import said
from trajectories.export.pages import Opened
from trajectories.export.said import Conversation, Said
from trajectories.models import FinalStatus, Trajectory


def sft(one: Opened) -> Iterator[dict[str, object]]:
    """A row a conversation that has something to learn. `weights` says of each message whether it is to be learnt."""
    for conversation in said.learnable(one.payload):
        yield {
            "messages": said.trl(conversation.said),
            "tools": said.tools_text(conversation.tools),
            "weights": [int(message.is_learnt) for message in conversation.said],
            **_told(one),
        }


def _told(one: Opened) -> dict[str, object]:
    row = one.row
    return {
        "trajectory_id": row.trajectory_id,
        "scenario_id": one.payload.scenario_id,
        "split": one.scenario.split if one.scenario else None,
        "group": row.group_id,
        "reward": row.reward,
        "final_status": row.final_status,
        "version": row.behaviour,
    }


def best_and_worst(members: Sequence[Trajectory], margin: float) -> tuple[Trajectory, Trajectory] | None:
    """The pair of a group: the first of the best and the first of the worst, at least `margin` and more than 0 apart.

    Attempts that do not count in their group are not compared, nor those whose reward is unknown.
    """
    known = [(row.reward, row) for row in members if row.reward is not None and _counts(row)]
    if not known:
        return None
    best = max(known, key=lambda pair: pair[0])
    worst = min(known, key=lambda pair: pair[0])
    apart = best[0] - worst[0]
    return (best[1], worst[1]) if apart > 0 and apart >= margin else None


def _counts(row: Trajectory) -> bool:
    failed = row.final_status == FinalStatus.ENVIRONMENT_ERROR  # which says nothing of the agent
    return not (row.is_superseded or row.is_excluded or row.twin_of_id is not None or failed)


def preference(best: Opened, worst: Opened) -> dict[str, object] | None:
    """The pair as a row: what both conversations begin with is the prompt. None: they have nothing in common, or one
    has nothing to learn."""
    chosen, rejected = _main(best), _main(worst)
    if chosen is None or rejected is None or chosen.tools != rejected.tools:
        return None
    shared = _shared(chosen.said, rejected.said)
    if not shared or shared == len(chosen.said) or shared == len(rejected.said):
        return None
    high, low = best.row.reward, worst.row.reward
    assert high is not None and low is not None, "best_and_worst compares known rewards"
    return {
        "prompt": said.trl(chosen.said[:shared]),
        "chosen": said.trl(chosen.said[shared:]),
        "rejected": said.trl(rejected.said[shared:]),
        "tools": said.tools_text(chosen.tools),
        "margin": high - low,
        "score_chosen": high,
        "score_rejected": low,
        "chosen_id": best.row.trajectory_id,
        "rejected_id": worst.row.trajectory_id,
        "scenario_id": best.payload.scenario_id,
        "split": best.scenario.split if best.scenario else None,
        "group": best.row.group_id,
    }


def _main(one: Opened) -> Conversation | None:
    """The first conversation with something to learn; sub-conversations are not compared."""
    found = said.learnable(one.payload)
    return found[0] if found else None


def _shared(one: Sequence[Said], other: Sequence[Said]) -> int:
    """How many messages both begin with, up to the first answer: from there on they are what is compared."""
    size = 0
    for left, right in zip(one, other, strict=False):
        if left.is_learnt or right.is_learnt or not _same(left, right):
            break
        size += 1
    return size


def _same(one: Said, other: Said) -> bool:
    return (one.role, one.text, one.asked) == (other.role, other.text, other.asked)
