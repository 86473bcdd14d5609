"""Where each call's answer came from: a version of this project, a foreign model, or nobody knows."""

from collections.abc import Mapping, Sequence

import msgspec

from trajectories.formats.chat import ChatPayload
from trajectories.models import ID_LENGTH, KnownVersion, Origin, Project
from trajectories.payloads import Envelope, LlmCallPayload, TrajectoryPayload
from trajectories.transcripts import OriginOfCall

FOREIGN = "foreign:"
UNKNOWN = "unknown"


class Known(msgspec.Struct, frozen=True):
    version: str
    ordinal: int


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """Who played, over the whole trajectory."""

    origin: str
    behaviour: str  # "v1.0.3", "foreign:gpt-4o" or "unknown"
    calls: tuple[OriginOfCall, ...]
    findings: tuple[str, ...] = ()


# Versions are never renamed or removed, so what was seen once stays true; what was not is asked again.
_seen: dict[tuple[int, str], Known] = {}


def known(project: Project, names: set[str]) -> dict[str, Known]:
    """Those of the names that are a version or a served name of the project."""
    found = {name: seen for name in names if (seen := _seen.get((project.pk, name))) is not None}
    if len(found) < len(names):
        rows = KnownVersion.objects.filter(project=project).values_list("version", "serving_name", "ordinal")
        for version, serving_name, ordinal in rows:
            for name in (version, serving_name):
                _seen[project.pk, name] = Known(version, ordinal)
                if name in names:
                    found[name] = _seen[project.pk, name]
        if len(_seen) > 100_000:
            _seen.clear()
    return found


def claims(sent: Envelope) -> set[str]:
    """Every name in it that may be a version of the project."""
    names: set[str | None] = {sent.policy_version}
    if isinstance(sent, ChatPayload):
        names.add(sent.model)
    elif isinstance(sent, TrajectoryPayload):
        for call in sent.calls():
            names.add(call.model_version)
            names.add(call.model)
    return {name for name in names if name}


def of_call(call: LlmCallPayload, policy_version: str | None, versions: Mapping[str, Known]) -> OriginOfCall:
    """A call names its version, or the served name of one, or the trajectory's policy version counts for it.

    A call that names a foreign model is foreign, whatever the trajectory's policy version says.
    """
    served = versions.get(call.model) if call.model else None
    named = versions.get(call.model_version) if call.model_version else None
    if served and named and served != named:
        return OriginOfCall(Origin.UNKNOWN)
    if served or named:
        one = served or named
        assert one is not None
        return OriginOfCall(Origin.OWN, one.version)
    if call.model_version and not call.model:
        return OriginOfCall(Origin.UNKNOWN)
    if call.model:
        return OriginOfCall(Origin.FOREIGN)
    policy = versions.get(policy_version) if policy_version else None
    return OriginOfCall(Origin.OWN, policy.version) if policy else OriginOfCall(Origin.UNKNOWN)


def of(calls: Sequence[LlmCallPayload], policy_version: str | None, versions: Mapping[str, Known]) -> Behaviour:
    """Context calls count only when there are no others. Several own versions: the oldest, so that ages are honest."""
    origins = tuple(of_call(call, policy_version, versions) for call in calls)
    findings = _contradictions(calls, origins, policy_version, versions)
    counting = [(call, one) for call, one in zip(calls, origins, strict=True) if call.trainable is not False]
    counting = counting or list(zip(calls, origins, strict=True))
    kinds = {one.origin for _, one in counting}
    own = {one.version for _, one in counting if one.origin == Origin.OWN}
    if own:
        ordinals = {one.version: one.ordinal for one in versions.values()}
        behaviour = min(own, key=lambda version: ordinals.get(version, 0))
        return Behaviour(
            origin=Origin.OWN if len(kinds) == 1 else Origin.MIXED,
            behaviour=behaviour,
            calls=origins,
            findings=findings,
        )
    models = sorted({call.model for call, one in counting if one.origin == Origin.FOREIGN and call.model})
    if models:
        return Behaviour(
            origin=Origin.FOREIGN if kinds == {Origin.FOREIGN} else Origin.MIXED,
            behaviour=(FOREIGN + "+".join(models))[:ID_LENGTH].replace("\x00", ""),
            calls=origins,
            findings=findings,
        )
    return Behaviour(origin=Origin.UNKNOWN, behaviour=UNKNOWN, calls=origins, findings=findings)


def _contradictions(
    calls: Sequence[LlmCallPayload],
    origins: Sequence[OriginOfCall],
    policy_version: str | None,
    versions: Mapping[str, Known],
) -> tuple[str, ...]:
    said: list[str] = []
    unknown = sorted(
        {
            call.model_version
            for call, one in zip(calls, origins, strict=True)
            if call.model_version and one.origin == Origin.UNKNOWN and call.model_version not in versions
        }
    )
    if unknown:
        said.append(f"calls claim the version {', '.join(unknown)}, which this project does not have")
    if policy_version and policy_version not in versions:
        said.append(f"policy_version is {policy_version}, which this project does not have")
    for call in calls:
        served, named = versions.get(call.model or ""), versions.get(call.model_version or "")
        if served and named and served != named:
            said.append(f"a call names the version {named.version} and the model of {served.version}")
            break
    return tuple(said)
