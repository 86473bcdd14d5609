"""Reward by version, compared where it can be: on scenarios kept apart that all of these versions were tried on.

The mean reward of what agents happened to do says as much about their tasks as about the version.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from training.models import ModelStatus, TrainedModel
from trajectories.models import Group, Project, Split
from trajectories.origins import FOREIGN

VERSIONS = 6
LEAST_KEPT = 0.5  # a version that would cost more of the shared scenarios than this is left out, and named
Z = 1.96  # of a 95 % interval


class VersionReward(msgspec.Struct, frozen=True, kw_only=True):
    """Mean over the shared scenarios of the mean reward there."""

    pk: int | None  # None: the bare base
    name: str
    mean: float
    lower: float
    upper: float
    attempts: int


@dataclass(frozen=True)
class Shared:
    rows: list[VersionReward] = field(default_factory=list)  # oldest first
    scenarios: int = 0
    left_out: list[str] = field(default_factory=list)  # versions that were tried on other scenarios


def of(project: Project, models: Sequence[TrainedModel]) -> Shared:
    """Of the newest of `models` (newest first) and their base.

    Going back from the newest, a version is taken along while at least half of the scenarios shared so far remain.
    """
    real = [one for one in models if one.status not in (ModelStatus.TRAINING, ModelStatus.FAILED)][:VERSIONS]
    if not real:
        return Shared()
    names: dict[str, tuple[int | None, str]] = {one.version: (one.pk, one.version) for one in real}
    names[f"{FOREIGN}{real[0].base_model}"] = (None, "the base")
    played: defaultdict[str, dict[int, tuple[float, int]]] = defaultdict(dict)
    rows = (
        Group.objects.filter(
            project=project, scenario__split=Split.HELD_OUT, is_evaluation=True, behaviour__in=names, reward_n__gt=0
        )
        .order_by()
        .values_list("behaviour", "scenario_id", "reward_sum", "reward_n")
    )
    for behaviour, scenario, total, n in rows:
        before, count = played[behaviour].get(scenario, (0.0, 0))
        played[behaviour][scenario] = before + total, count + n
    shared: set[int] = set()
    taken: list[str] = []
    left_out: list[str] = []
    for behaviour, (_, name) in names.items():
        own = set(played[behaviour])
        both = own & shared if taken else own
        if not own:
            continue
        if taken and len(both) < max(1.0, LEAST_KEPT * len(shared)):
            left_out.append(name)
            continue
        shared = both
        taken.append(behaviour)
    found = []
    for behaviour in reversed(taken):
        means = [total / n for total, n in (played[behaviour][one] for one in shared)]
        mean = statistics.fmean(means)
        half = Z * statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
        pk, name = names[behaviour]
        attempts = sum(played[behaviour][one][1] for one in shared)
        found.append(
            VersionReward(pk=pk, name=name, mean=mean, lower=mean - half, upper=mean + half, attempts=attempts)
        )
    return Shared(found, len(shared), left_out)
