"""Where a person can go, in the order of the loop: record, judge, train, deploy, operate."""

from collections.abc import Iterator
from dataclasses import dataclass

from django.contrib.admin import AdminSite
from django.contrib.admin.options import ModelAdmin
from django.db.models import Model
from django.http import HttpRequest
from django.urls import reverse


@dataclass(frozen=True)
class Stage:
    """A part of the loop and its nouns, "app.model", the one that its name leads to first."""

    label: str
    models: tuple[str, ...]


STAGES = (
    Stage(
        "Record",
        (
            "trajectories.trajectory",
            "trajectories.scenario",
            "trajectories.agent",
            "trajectories.otelrecord",
            "trajectories.llmcalllog",
            "trajectories.rewardchange",
        ),
    ),
    Stage(
        "Judge",
        ("trajectories.group", "training.rewardjudgment", "training.judgecall", "training.rubric"),
    ),
    Stage(
        "Train",
        (
            "training.trainingbatch",
            "training.trainingrun",
            "training.trainingpolicy",
            "training.readinesssnapshot",
        ),
    ),
    Stage(
        "Deploy",
        (
            "training.trainedmodel",
            "training.evaluation",
            "training.deployment",
            "training.servinginterval",
        ),
    ),
    Stage(
        "Operate",
        (
            "trajectories.bulkaction",
            "trajectories.statechange",
            "trajectories.project",
            "trajectories.membership",
            "trajectories.apikey",
            "auth.user",
            "trajectories.blob",
            "trajectories.sharedtext",
            "trajectories.tombstone",
        ),
    ),
)
LABELS = {  # where the model's own name is longer than a tab wants
    "trajectories.otelrecord": "Spans",
    "trajectories.llmcalllog": "LLM calls",
    "trajectories.statechange": "History",
    "trajectories.apikey": "API keys",
    "trajectories.membership": "Members",
    "training.rewardjudgment": "Judgments",
    "training.trainingbatch": "Batches",
    "training.trainingrun": "Runs",
    "training.trainingpolicy": "Policies",
    "training.readinesssnapshot": "Readiness",
    "training.trainedmodel": "Models",
    "training.servinginterval": "What served when",
}


@dataclass(frozen=True)
class Tab:
    label: str
    url: str
    is_here: bool


@dataclass(frozen=True)
class Door:
    """A stage as the bar shows it."""

    label: str
    url: str
    is_here: bool
    tabs: tuple[Tab, ...]


def stage_of(name: str) -> Stage:
    """Of "app.model"; what no stage names belongs to Operate."""
    return next((stage for stage in STAGES if name in stage.models), STAGES[-1])


def doors(site: AdminSite, request: HttpRequest) -> list[Door]:
    """The stages that this person may enter, with their lists."""
    here = _here(request, site)
    found = []
    for stage in STAGES:
        tabs = tuple(
            Tab(label, reverse(f"admin:{name.replace('.', '_')}_changelist"), name == here)
            for name, label in _open(site, request, stage)
        )
        if tabs:
            is_here = here is not None and stage_of(here) is stage
            found.append(Door(stage.label, tabs[0].url, is_here, tabs))
    return found


def _open(site: AdminSite, request: HttpRequest, stage: Stage) -> Iterator[tuple[str, str]]:
    held = {model._meta.label_lower: model_admin for model, model_admin in site._registry.items()}
    for name in stage.models:
        model_admin = held.get(name)
        if model_admin is not None and model_admin.has_view_permission(request):
            yield name, label_of(model_admin)


def label_of(model_admin: "ModelAdmin[Model]") -> str:
    """What the tab of a list says."""
    opts = model_admin.model._meta
    plural = str(opts.verbose_name_plural)
    return LABELS.get(opts.label_lower, plural[:1].upper() + plural[1:])


def _here(request: HttpRequest, site: AdminSite) -> str | None:
    """The "app.model" whose page this is."""
    match = request.resolver_match
    url_name = match.url_name if match is not None else None
    if not url_name:
        return None
    names = (model._meta for model in site._registry)
    return next((one.label_lower for one in names if url_name.startswith(f"{one.app_label}_{one.model_name}_")), None)
