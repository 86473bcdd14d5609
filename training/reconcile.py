"""Model servers forget on a restart; the database does not. Here what is loaded is brought to what should be.

Should be loaded: what serves, what served until a moment ago (agents may still hold that name), what is being rolled
out, and both sides of an evaluation under way. Names that are no version of ours are left alone.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from django.conf import settings
from django.db.models import Q
from django.utils import timezone

from training import policies
from training.models import (
    Deployment,
    DeploymentState,
    Evaluation,
    EvaluationState,
    ModelStatus,
    ServingInterval,
    TrainedModel,
    TrainingPolicy,
)
from training.serving import ModelServer, ServedModel, ServingRefused, ServingUnavailable
from trajectories.errors import Refused
from trajectories.models import Project

logger = logging.getLogger(__name__)

GRACE = timedelta(minutes=10)  # a version that serves no more stays loaded so long, for agents that hold its name
QUESTION = ({"role": "user", "content": "Hello."},)


@dataclass
class Report:
    """What was found at one model server, and what was done about it."""

    url: str
    loaded: list[str] = field(default_factory=list)  # now, by us
    unloaded: list[str] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)  # sentences: what is not as it should be, and was not put right
    error: str = ""  # the server is away; nothing was done

    @property
    def ok(self) -> bool:
        return not self.error and not self.drift


def url_of(project: Project) -> str:
    """The address of the project's model server; empty: none is configured."""
    return policies.of(project).serving_url or settings.MODEL_SERVER_URL


def public_url_of(project: Project) -> str:
    """The same as agents are told, in OpenAI's form, which ends in /v1; empty: none is configured."""
    url = policies.of(project).serving_url or settings.MODEL_SERVER_PUBLIC_URL or settings.MODEL_SERVER_URL
    return f"{url.rstrip('/').removesuffix('/v1')}/v1" if url else ""


def client(url: str) -> ModelServer:
    return ModelServer(url, settings.MODEL_SERVER_API_KEY or None, timeout=settings.MODEL_SERVER_TIMEOUT_SECONDS)


def ensure(models: Sequence[TrainedModel | None], project: Project, base: str = "") -> None:
    """Have these versions loaded, and each answer a question. None is the bare base, which is only asked.

    Args:
        base: the name of the bare base, where it is among them.

    Raises:
        Refused: no model server is configured.
        ServingRefused: an adapter does not fit, or is not there.
        ServingUnavailable: the server is away.
    """
    url = url_of(project)
    if not url:
        raise Refused("No model server is configured. Set MODEL_SERVER_URL, or the policy's serving_url.")
    with client(url) as server:
        there = {one.id: one for one in server.models()}
        for model in models:
            if model is not None:
                _load(server, model, there)
            server.chat(model.serving_name if model else base, QUESTION, max_tokens=1)


def _load(server: ModelServer, model: TrainedModel, there: dict[str, ServedModel]) -> bool:
    """Load it, unless it is there from the very folder. True: loaded now."""
    known = there.get(model.serving_name)
    if known is not None and known.root == model.adapter_path:
        return False
    if known is not None:  # someone loaded something else under its name
        server.unload(model.serving_name)
    return server.load(model.serving_name, model.adapter_path)


def reconcile_all() -> list[Report]:
    """Every model server that a project of ours uses."""
    own = TrainingPolicy.objects.exclude(serving_url="").order_by().values_list("serving_url", flat=True).distinct()
    urls = {url for url in (settings.MODEL_SERVER_URL, *own) if url}
    return [reconcile(url) for url in sorted(urls)]


def reconcile(url: str) -> Report:
    """Bring one model server to what the database says. May run twice, and at once."""
    report = Report(url)
    try:
        with client(url) as server:
            there = {one.id: one for one in server.models()}
            # The database is read after the server: whatever was loaded by then had its row by then, so that nothing
            # is unloaded that someone has just begun to use.
            mine, pks = _models_at(url), _wanted_pks()
            wanted = {model.serving_name: model for model in mine if model.pk in pks}
            # Those in training are being tried out by their batch.
            names = {model.serving_name for model in mine if model.status != ModelStatus.TRAINING}
            for name, model in wanted.items():
                try:
                    if _load(server, model, there):
                        report.loaded.append(name)
                except ServingRefused as refusal:
                    report.drift.append(f"{name} cannot be loaded: {refusal}")
            for name in sorted(there.keys() & names - wanted.keys()):
                if server.unload(name):
                    report.unloaded.append(name)
    except ServingUnavailable as exc:
        report.error = str(exc)
    if report.loaded or report.unloaded:
        logger.info("%s: loaded %s, unloaded %s", url, report.loaded or "nothing", report.unloaded or "nothing")
    for trouble in (*report.drift, *([report.error] if report.error else [])):
        logger.warning("%s: %s", url, trouble)
    return report


def _models_at(url: str) -> list[TrainedModel]:
    """Every version whose project uses this server."""
    here = Q(project__policy__serving_url=url)
    if url == settings.MODEL_SERVER_URL:
        here |= Q(project__policy__serving_url="") | Q(project__policy__isnull=True)
    return list(TrainedModel.objects.filter(here).exclude(adapter_path=""))


def _wanted_pks() -> set[int]:
    since = timezone.now() - GRACE
    serving = ServingInterval.objects.filter(Q(ends_at__isnull=True) | Q(ends_at__gt=since), model__isnull=False)
    rolling = Deployment.objects.filter(state__in=(DeploymentState.APPROVED, DeploymentState.ROLLING_OUT))
    trying = Evaluation.objects.filter(state__in=(EvaluationState.PENDING, EvaluationState.RUNNING))
    found = {
        *serving.values_list("model", flat=True),
        *rolling.values_list("model", flat=True),
        *trying.values_list("candidate", flat=True),
        *trying.values_list("baseline", flat=True),
    }
    return {pk for pk in found if pk is not None}
