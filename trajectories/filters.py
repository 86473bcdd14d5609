"""What lists of trajectories may be narrowed by: one declared list for the admin, the API, exports and commands.

No filter has an index of its own that every recording would have to pay for. A list is walked along an index in windows
(listing.py), so a filter costs the windows that are looked at; agent, scenario, group, hour, reward and declared
metrics have an index besides.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from django.db.models import Exists, OuterRef, Q, QuerySet
from django.utils.dateparse import parse_date, parse_datetime
from django.utils.timezone import is_naive

from trajectories import limits, payloads
from trajectories.errors import Invalid
from trajectories.models import Fidelity, FinalStatus, Judging, MetricValue, Origin, State, Trajectory


class Kind(Enum):
    """How a value is given."""

    TEXT = "text"
    CHOICE = "choice"
    FLAG = "flag"
    NUMBER = "number"
    TIME = "time"


@dataclass(frozen=True)
class Filter:
    """One argument of a list."""

    name: str  # in addresses
    narrow: Callable[[str], Q]  # raises Invalid: a value that it cannot have
    kind: Kind
    choices: Sequence[tuple[str, str]] = ()
    suggests: bool = False  # values can be looked up: choices.py
    example: str = ""


@dataclass(frozen=True)
class Field:
    """One or two filters under one label; of two the first is the lower end of a range."""

    label: str
    filters: tuple[Filter, ...]


# --- values ----------------------------------------------------------------------------------------------------------


def text(name: str, value: str) -> str:
    if "\x00" in value or len(value) > limits.ID_CHARACTERS:
        raise Invalid(f"{name} is no value of that column.", pointer=f"?{name}")
    return value


def integer(name: str, value: str) -> int:
    try:
        found = int(value)
    except ValueError:
        raise Invalid(f"{name} must be a whole number, not {value[:50]!r}.", pointer=f"?{name}") from None
    if abs(found) >= 2**63:
        raise Invalid(f"{name} is too large.", pointer=f"?{name}")
    return found


def number(name: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = float("nan")
    if not abs(found) < float("inf"):
        raise Invalid(f"{name} must be a finite number, not {value[:50]!r}.", pointer=f"?{name}")
    return found


_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def flag(name: str, value: str) -> bool:
    if value.lower() not in _FLAGS:
        raise Invalid(f"{name} must be true or false, not {value[:50]!r}.", pointer=f"?{name}")
    return _FLAGS[value.lower()]


def moment(name: str, value: str) -> datetime:
    try:
        found = parse_datetime(value.replace(" ", "+"))  # a plus sign that was not escaped arrives as a blank
        if found is None and (day := parse_date(value)) is not None:
            found = datetime(day.year, day.month, day.day)  # noqa: DTZ001  (made UTC below)
    except ValueError:
        found = None
    if found is None:
        raise Invalid(f"{name} must be a time such as 2026-11-23T08:00:00Z, not {value[:50]!r}.", pointer=f"?{name}")
    try:
        return payloads.utc(found) if is_naive(found) else found
    except OverflowError:
        raise Invalid(f"{name} is too far away.", pointer=f"?{name}") from None


# --- the list --------------------------------------------------------------------------------------------------------


def _is(name: str, column: str, *, suggests: bool = False, example: str = "") -> Filter:
    return Filter(name, lambda value: Q(**{column: text(name, value)}), Kind.TEXT, suggests=suggests, example=example)


def _one_of(name: str, column: str, choices: Sequence[tuple[str, str]]) -> Filter:
    def narrow(value: str) -> Q:
        if value not in (known := [one for one, _ in choices]):
            raise Invalid(f"{name} is one of {', '.join(known)}, not {value[:50]!r}.", pointer=f"?{name}")
        return Q(**{column: value})

    return Filter(name, narrow, Kind.CHOICE, choices=[(one, label.partition(":")[0]) for one, label in choices])


def flagged(name: str, holds: Callable[[], Q]) -> Filter:
    def narrow(value: str) -> Q:
        return holds() if flag(name, value) else ~holds()

    return Filter(name, narrow, Kind.FLAG, choices=(("1", "yes"), ("0", "no")))


def _numbers(stem: str, column: str) -> tuple[Filter, Filter]:
    low, high = f"{stem}_min", f"{stem}_max"
    return (
        Filter(low, lambda value: Q(**{f"{column}__gte": number(low, value)}), Kind.NUMBER),
        Filter(high, lambda value: Q(**{f"{column}__lte": number(high, value)}), Kind.NUMBER),
    )


def _wholes(stem: str, column: str) -> tuple[Filter, Filter]:
    low, high = f"{stem}_min", f"{stem}_max"
    return (
        Filter(low, lambda value: Q(**{f"{column}__gte": integer(low, value)}), Kind.NUMBER),
        Filter(high, lambda value: Q(**{f"{column}__lte": integer(high, value)}), Kind.NUMBER),
    )


_HOUR = "2026-11-23T08:00"

PARTS: Mapping[str, Sequence[Field]] = {
    "Who": (
        Field("agent", (_is("agent", "agent__agent_id", suggests=True),)),
        Field("scenario", (_is("scenario", "scenario__scenario_id", suggests=True),)),
        Field("version", (_is("version", "behaviour", suggests=True, example="v1.0.3"),)),
        Field("origin", (_one_of("origin", "origin", Origin.choices),)),
        Field("group", (Filter("group", lambda value: Q(group=integer("group", value)), Kind.NUMBER),)),
        Field("episode", (_is("episode", "episode_id"),)),
        Field("of evaluation", (_is("evaluation_id", "evaluation_id"),)),
    ),
    "When": (
        Field(
            "received",
            (
                Filter("since", lambda value: Q(received_at__gte=moment("since", value)), Kind.TIME),
                Filter("until", lambda value: Q(received_at__lt=moment("until", value)), Kind.TIME),
            ),
        ),
        Field("hour of the start", (_is("window", "window", example=_HOUR),)),
        Field(
            "hours of the start",
            (
                Filter("window_from", lambda v: Q(window__gte=text("window_from", v)), Kind.TEXT, example=_HOUR),
                Filter("window_to", lambda v: Q(window__lte=text("window_to", v)), Kind.TEXT, example=_HOUR),
            ),
        ),
    ),
    "How it went": (
        Field("reward", _numbers("reward", "reward")),
        Field("reward known", (flagged("rewarded", lambda: Q(reward__isnull=False)),)),
        Field("judged", (flagged("judged", lambda: Q(group__judging=Judging.JUDGED)),)),
        Field("ended", (_one_of("status", "final_status", FinalStatus.choices),)),
        Field("state", (_one_of("state", "state", State.choices),)),
        Field("steps", _wholes("steps", "n_steps")),
    ),
    "How it was recorded": (
        Field("fidelity", (_one_of("fidelity", "fidelity", Fidelity.choices),)),
        Field("quality, 0 to 1", _numbers("quality", "quality")),
        Field("format", (_is("recorded_as", "source_format", example="native"),)),
    ),
    "What it is for": (
        Field("for evaluation", (flagged("evaluation", lambda: Q(is_evaluation=True)),)),
        Field("excluded", (flagged("excluded", lambda: Q(is_excluded=True)),)),
        Field("retried since", (flagged("superseded", lambda: Q(is_superseded=True)),)),
        Field("archived", (flagged("archived", lambda: Q(archived_at__isnull=False)),)),
    ),
}

_further: dict[str, list[Field]] = {}


def also(part: str, field: Field) -> None:
    """A filter that another app knows how to answer; called when it is ready."""
    some = _further.setdefault(part, [])
    if field.label not in [one.label for one in some]:
        some.append(field)


def parts() -> dict[str, list[Field]]:
    """All that are offered, by what they are about."""
    return {part: [*fields, *_further.get(part, ())] for part, fields in PARTS.items()}


def offered() -> dict[str, Filter]:
    """By name; metrics, which projects declare, are not among them."""
    return {one.name: one for fields in parts().values() for field in fields for one in field.filters}


# --- metrics ---------------------------------------------------------------------------------------------------------

_METRIC = re.compile(r"metric\.(.{1,100})\.(min|max)", re.DOTALL)


def metric_fields(names: Iterable[str]) -> list[Field]:
    return [Field(name, (_metric(name, "min"), _metric(name, "max"))) for name in names]


def _metric(metric: str, end: str) -> Filter:
    name = f"metric.{metric}.{end}"

    def narrow(value: str) -> Q:
        compared = {"value__gte" if end == "min" else "value__lte": number(name, value)}
        return Q(Exists(MetricValue.objects.filter(trajectory=OuterRef("pk"), name=metric, **compared)))

    return Filter(name, narrow, Kind.NUMBER)


# --- narrowing -------------------------------------------------------------------------------------------------------


def is_one(name: str) -> bool:
    """Whether an argument of an address is a filter, known or not to a project."""
    return name in offered() or _METRIC.fullmatch(name) is not None


def narrowed(
    rows: "QuerySet[Trajectory]", arguments: Mapping[str, str], metrics: Collection[str] = ()
) -> "QuerySet[Trajectory]":
    """Those that all filters let through. An empty value filters nothing.

    Args:
        metrics: names that the project has declared.

    Raises:
        Invalid: an unknown filter, or a value that it cannot have.
    """
    known = offered()
    for name, value in arguments.items():
        found = known.get(name)
        if found is None and (told := _METRIC.fullmatch(name)) is not None:
            if told[1] not in metrics:
                declared = f"Declared: {', '.join(metrics)}." if metrics else "None is."
                raise Invalid(
                    f"The metric {told[1][:50]!r} is not declared. {declared} The project's page declares them.",
                    pointer=f"?{payloads.escape(name)}",
                )
            found = _metric(told[1], told[2])
        if found is None:
            there = ", ".join([*sorted(known), "metric.NAME.min", "metric.NAME.max"])
            raise Invalid(f"There is no filter {name[:50]!r}. There are: {there}.", pointer=f"?{payloads.escape(name)}")
        if value:
            rows = rows.filter(found.narrow(value))
    return rows
