"""The native format out: what the API takes, so that another site reads it as the same content."""

from collections.abc import Mapping

import msgspec

from trajectories import payloads, scenarios
from trajectories.export.pages import Opened
from trajectories.models import Scenario
from trajectories.payloads import ScenarioPayload, TrajectoryPayload
from trajectories.segments import LoadedPayload


def line(one: Opened, *, private: bool) -> bytes:
    return payloads.encode(native(one.payload, one.scenario, private=private))


def native(loaded: LoadedPayload, scenario: Scenario | None, *, private: bool = False) -> TrajectoryPayload:
    """The trajectory as it may be sent to another site: its scenario inline; without gold answers, unless named."""
    fields = {name: getattr(loaded, name) for name in TrajectoryPayload.__struct_fields__}
    if scenario is not None and (scenario.description or scenario.metadata):
        fields["scenario"] = described(scenario, private=private)
        fields["scenario_id"] = None
    if not private:
        fields["metadata"] = public(loaded.metadata)
    return TrajectoryPayload(**fields)


def described(scenario: Scenario, *, private: bool) -> ScenarioPayload:
    told = scenarios.public_payload(scenario)
    if private and scenario.metadata:
        return msgspec.structs.replace(told, metadata=dict(scenario.metadata))
    return told


def public(metadata: Mapping[str, object]) -> dict[str, object]:
    """Metadata without the gold answers."""
    return scenarios.public(metadata) if "private" in metadata else dict(metadata)
