"""Scenarios: made on first sight, train or held out by salted hash unless someone said which."""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec
from django.db import connection, transaction

from trajectories import history, payloads, pressure, redaction, statements
from trajectories.errors import Invalid, Problem
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


class Wish(msgspec.Struct, frozen=True):
    """A scenario that a trajectory names and that may not be there yet."""

    project: Project
    scenario_id: str
    inline: ScenarioPayload | None


def ensure(
    project: Project, wanted: Mapping[str, ScenarioPayload | None], refused: dict[str, Problem] | None = None
) -> dict[str, Seen]:
    """The scenarios by id, made where they are new. An inline one fills a description that was missing.

    Those that redaction refuses go into `refused`, where it is given, so that they cost their neighbours nothing.
    """
    found, missing = look(project, wanted)
    if missing:
        made = _make(project, missing, refused)
        found |= made
        if not connection.in_atomic_block:  # what is rolled back must not be remembered
            if len(_seen) > 200_000:
                _seen.clear()
            _seen.update({(project.pk, key): one for key, one in made.items()})
    return found


def fulfil(wishes: Iterable[Wish]) -> dict[tuple[int, str], int]:
    """pks by (project, id): the attempts of a group arrive together, and one statement makes what all of them name."""
    projects: dict[int, Project] = {}
    inline: dict[int, list[ScenarioPayload]] = {}
    wanted: dict[int, set[str]] = {}
    for wish in wishes:
        projects[wish.project.pk] = wish.project
        wanted.setdefault(wish.project.pk, set()).add(wish.scenario_id)
        if wish.inline is not None:
            inline.setdefault(wish.project.pk, []).append(wish.inline)
    found: dict[tuple[int, str], int] = {}
    for pk, names in wanted.items():
        told = described(inline.get(pk, ()))
        seen = ensure(projects[pk], {name: told.get(name) for name in names})
        found.update({(pk, name): one.pk for name, one in seen.items()})
    return found


def look(
    project: Project, wanted: Mapping[str, ScenarioPayload | None]
) -> tuple[dict[str, Seen], dict[str, ScenarioPayload | None]]:
    """(those that are remembered, those that are not or lack the description that is here)."""
    found: dict[str, Seen] = {}
    missing: dict[str, ScenarioPayload | None] = {}
    for key, inline in wanted.items():
        seen = _seen.get((project.pk, key))
        if seen is None or (not seen.described and inline is not None and inline.description):
            missing[key] = inline
        else:
            found[key] = seen
    return found, missing


def forget() -> None:
    _seen.clear()


class _New(msgspec.Struct):
    """The columns of a scenario that is seen for the first time."""

    scenario_id: str
    description: str
    split: str
    split_given: bool
    metadata: object


_ENSURE = """
    with wanted as (
        select * from json_to_recordset(%s::json)
            as w(scenario_id varchar, description text, split varchar, split_given bool, metadata jsonb)
    ),
    made as (
        insert into scenarios (project_id, scenario_id, description, split, split_given, metadata)
        select %s, scenario_id, description, split, split_given, metadata from wanted w
        where not exists (select from scenarios s where s.project_id = %s and s.scenario_id = w.scenario_id)
        order by scenario_id
        on conflict (project_id, scenario_id) do nothing
        returning id, scenario_id, split, description
    )
    select scenario_id, id, split, description <> '' from made
    union all
    select s.scenario_id, s.id, s.split, s.description <> ''
    from scenarios s join wanted w using (scenario_id) where s.project_id = %s
"""


def _make(
    project: Project, wanted: Mapping[str, ScenarioPayload | None], refused: dict[str, Problem] | None
) -> dict[str, Seen]:
    rules = redaction.rules(project)
    new: dict[str, _New] = {}
    for key, inline in wanted.items():
        try:
            new[key] = _new(project, key, inline, rules)
        except Problem as problem:
            if refused is None:
                raise
            refused[key] = problem
    found: dict[str, Seen] = {}
    while missing := [one for key, one in new.items() if key not in found]:  # again: another request is making it too
        parameters = (payloads.encode(missing).decode(), project.pk, project.pk, project.pk)
        for scenario_id, pk, split, told in statements.fetch_early(_ENSURE, parameters):
            assert isinstance(scenario_id, str) and isinstance(pk, int) and isinstance(split, str)
            found[scenario_id] = Seen(pk, split, bool(told))
    for scenario_id, one in new.items():
        if one.description and not found[scenario_id].described:
            _describe(found[scenario_id].pk, one)
            found[scenario_id] = msgspec.structs.replace(found[scenario_id], described=True)
    return found


def _new(project: Project, scenario_id: str, inline: ScenarioPayload | None, rules: redaction.Rules) -> _New:
    given = inline.split if inline else None
    description, metadata = redaction.scenario(inline.description, inline.metadata, rules) if inline else (None, None)
    return _New(
        scenario_id,
        description or "",
        SPLITS[given] if given else split_of(project, scenario_id),
        given is not None,
        metadata or {},
    )


def _describe(pk: int, told: _New) -> None:
    """Fill a description that was missing; metadata that is there stays."""
    with transaction.atomic():
        row = Scenario.objects.select_for_update().get(pk=pk)
        if not row.description:
            row.description = told.description
            if isinstance(told.metadata, dict):
                row.metadata = {**told.metadata, **(row.metadata or {})}
            row.save(update_fields=["description", "metadata"])


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
    description, metadata = redaction.scenario(body.description, body.metadata, redaction.rules(project))
    defaults = {"split": SPLITS[body.split] if body.split else split_of(project, scenario_id)}
    with transaction.atomic():
        _, new = Scenario.objects.get_or_create(project=project, scenario_id=scenario_id, defaults=defaults)
        row = Scenario.objects.select_for_update().get(project=project, scenario_id=scenario_id)
        was = row.split
        if body.description is not None:
            row.description = description or ""
        if body.metadata is not None:
            row.metadata = metadata or {}
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
