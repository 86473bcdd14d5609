"""Which version an agent uses now. The same agent gets the same answer until someone deploys or rolls back.

An agent's share is decided by a hash of its id with the interval's salt, so that raising a weight moves agents one
way only, and no table of agents is needed to route.
"""

import hashlib
from dataclasses import dataclass

from django.db.models import Q

from training import policies, reconcile
from training.models import AgentRoute, ServingInterval, TrainedModel
from trajectories.models import Agent, Project

EVERYONE = "*"
STABLE, CANARY = "stable", "canary"


@dataclass(frozen=True)
class Route:
    """What an agent is told."""

    agent_id: str
    version: str | None  # None: the bare base
    model: str  # for the OpenAI `model` field
    base_url: str  # ends in /v1; empty: no model server is configured
    deployment: int | None
    interval: int | None

    def etag(self) -> str:
        """Changes when anything of the answer does."""
        parts = "\n".join((self.agent_id, self.model, self.base_url, str(self.deployment), str(self.interval)))
        return f'"{hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:32]}"'


def model_for(agent: Agent) -> Route:
    """The agent's version and endpoint now; what it was last given is kept for the pages."""
    interval = interval_of(agent.project, agent.agent_id)
    known = AgentRoute.objects.filter(agent=agent).values_list("interval", flat=True).first()
    if interval is not None and known != interval.pk:
        AgentRoute.objects.update_or_create(agent=agent, defaults={"interval": interval})
    elif interval is None and known is not None:
        AgentRoute.objects.filter(agent=agent).update(interval=None)
    return route(agent.project, agent.agent_id, interval)


def route(project: Project, agent_id: str, interval: ServingInterval | None) -> Route:
    model = interval.model if interval else None
    return Route(
        agent_id=agent_id,
        version=model.version if model else None,
        model=model.serving_name if model else policies.of(project).base_model,
        base_url=reconcile.public_url_of(project),
        deployment=interval.deployment_id if interval else None,
        interval=interval.pk if interval else None,
    )


def interval_of(project: Project, agent_id: str) -> ServingInterval | None:
    """The open interval that serves this agent: its own, else the canary's share, else everyone's."""
    rows = (
        ServingInterval.objects.filter(Q(audience=agent_id) | Q(audience=EVERYONE), project=project, ends_at=None)
        .select_related("model", "deployment")
        .order_by("-starts_at", "-pk")
    )
    found = {(one.audience == EVERYONE, one.slot): one for one in rows}
    own = found.get((False, STABLE)) if agent_id != EVERYONE else None
    if own is not None:
        return own
    canary = found.get((True, CANARY))
    if canary is not None and share(canary.salt, agent_id) < canary.weight:
        return canary
    return found.get((True, STABLE))


def share(salt: str, agent_id: str) -> float:
    """Where the agent stands between 0 and 1 (1 excluded), evenly over agents and alike on every machine."""
    digest = hashlib.sha256(f"{salt}:{agent_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48


def serving_now(project: Project) -> TrainedModel | None:
    """What serves everyone who is in no share of a newer one; None: the bare base."""
    interval = (
        ServingInterval.objects.filter(project=project, audience=EVERYONE, slot=STABLE, ends_at=None)
        .select_related("model")
        .first()
    )
    return interval.model if interval else None


def agents_of(model: TrainedModel) -> int:
    """How many agents were last given this version."""
    return AgentRoute.objects.filter(interval__model=model, interval__ends_at=None).count()
