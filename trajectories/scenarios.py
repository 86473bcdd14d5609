"""Scenarios: made on first sight, train or held out by salted hash unless someone said which."""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec
from django.db import connection, transaction

from trajectories import history, payloads, pressure, redaction
from trajectories.early_commit import committed_early
from trajectories.errors import Invalid
from trajectories.history import Actor
from trajectories.models import Project, Scenario, Split
from trajectories.payloads import ScenarioBody, ScenarioPayload

SPLITS = {"train": Split.TRAIN, "held_out": Split.HELD_OUT, "locked": Split.LOCKED}


class Seen(msgspec.Struct, frozen=True):
    """What ingestion needs to know of a scenario."""

    pk: int
    split: str
    described: bool


# pks never change; what is not here is asked for. A scenario that was deleted fails its foreign key, and
# ingestion then forgets and tries again.
_seen: dict[tuple[int, str], Seen] = {}


def split_of(project: Project, scenario_id: str) -> Split:
    """By salted hash, so that the same scenario falls alike whoever sends it, and nobody can choose."""
    digest = hashlib.blake2b(scenario_id.encode(), key=project.split_salt.encode(), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") / 2**64 < project.held_out_share
    return Split.HELD_OUT if held_out else Split.TRAIN


def ensure(project: Project, wanted: Mapping[str, ScenarioPayload | None]) -> dict[str, Seen]:
    """The scenarios by id, made where they are new. An inline one fills a description that was missing."""
    found: dict[str, Seen] = {}
    for scenario_id, inline in wanted.items():
        seen = _seen.get((project.pk, scenario_id))
        if seen is not None and (seen.described or inline is None or not inline.description):
            found[scenario_id] = seen
    missing = {key: value for key, value in wanted.items() if key not in found}
    if missing:
        with committed_early():
            made = _make(project, missing)
        found.update(made)
        if not connection.in_atomic_block:  # what is rolled back must not be remembered
            if len(_seen) > 200_000:
                _seen.clear()
            _seen.update({(project.pk, key): found[key] for key in missing})
    return found


def forget() -> None:
    _seen.clear()


def _make(project: Project, wanted: Mapping[str, ScenarioPayload | None]) -> dict[str, Seen]:
    rules = redaction.rules(project)
    present = {row.scenario_id: row for row in Scenario.objects.filter(project=project, scenario_id__in=list(wanted))}
    new = sorted(set(wanted) - set(present))
    if new:
        Scenario.objects.bulk_create(
            (_row(project, scenario_id, wanted[scenario_id], rules) for scenario_id in new), ignore_conflicts=True
        )
        present.update((row.scenario_id, row) for row in Scenario.objects.filter(project=project, scenario_id__in=new))
    for scenario_id, row in present.items():
        inline = wanted[scenario_id]
        if inline is not None and inline.description and not row.description and scenario_id not in new:
            row.description = redaction.text(inline.description, rules)
            metadata = redaction.value(inline.metadata, rules)
            if isinstance(metadata, dict):
                row.metadata = {**metadata, **row.metadata}
            Scenario.objects.filter(pk=row.pk, description="").update(
                description=row.description, metadata=row.metadata
            )
    return {key: Seen(row.pk, row.split, bool(row.description)) for key, row in present.items()}


def _row(project: Project, scenario_id: str, inline: ScenarioPayload | None, rules: list[redaction.Rule]) -> Scenario:
    given = inline.split if inline else None
    metadata = redaction.value(inline.metadata, rules) if inline else {}
    return Scenario(
        project=project,
        scenario_id=scenario_id,
        description=redaction.text(inline.description or "", rules) if inline else "",
        metadata=metadata if isinstance(metadata, dict) else {},
        split=SPLITS[given] if given else split_of(project, scenario_id),
        split_given=given is not None,
    )


def put(project: Project, scenario_id: str, body: ScenarioBody, *, by: Actor) -> tuple[Scenario, bool]:
    """Make or change a scenario; what is not in the body stays. Returns (row, whether it is new).

    Raises:
        Invalid: with pointer and limit.
    """
    pressure.check_room()
    payloads.check_id(scenario_id, "/id")
    payloads.check_scenario(body.description, body.metadata, "")
    if body.extra:
        name = next(iter(body.extra))
        raise Invalid(
            f"A scenario has description, split and metadata; {name!r} belongs into metadata.",
            pointer=f"/{payloads.escape(name)}",
        )
    rules = redaction.rules(project)
    defaults = {"split": SPLITS[body.split] if body.split else split_of(project, scenario_id)}
    with transaction.atomic():
        _, new = Scenario.objects.get_or_create(project=project, scenario_id=scenario_id, defaults=defaults)
        row = Scenario.objects.select_for_update().get(project=project, scenario_id=scenario_id)
        was = row.split
        if body.description is not None:
            row.description = redaction.text(body.description, rules)
        if body.metadata is not None:
            metadata = redaction.value(body.metadata, rules)
            row.metadata = metadata if isinstance(metadata, dict) else {}
        if body.split is not None:
            row.split, row.split_given = SPLITS[body.split], True
        row.save()
        if row.split != was:
            history.record(row, was, row.split, project=project, by=by, field="split")
    _seen.pop((project.pk, scenario_id), None)
    return row, new


def public(metadata: Mapping[str, object]) -> dict[str, object]:
    """Metadata without the gold answers."""
    return {key: value for key, value in metadata.items() if key != "private"}


def public_payload(row: Scenario) -> ScenarioPayload:
    split = next(name for name, value in SPLITS.items() if value == row.split)
    return msgspec.convert(
        {
            "id": row.scenario_id,
            "description": row.description or None,
            "split": split,
            "metadata": public(row.metadata or {}),
        },
        ScenarioPayload,
    )


def described(rows: Iterable[ScenarioPayload | None]) -> dict[str, ScenarioPayload]:
    """Of several inline mentions of one scenario the first that has a description."""
    best: dict[str, ScenarioPayload] = {}
    for one in rows:
        if one is not None and (one.id not in best or (one.description and not best[one.id].description)):
            best[one.id] = one
    return best
