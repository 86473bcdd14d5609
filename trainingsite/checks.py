"""Settings that cannot work together, found at start-up, each with the way out."""

from collections.abc import Sequence

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register


@register()
def judge_settings(app_configs: Sequence[AppConfig] | None, **kwargs: object) -> list[CheckMessage]:
    """The judge needs both an address and a model, or neither."""
    if bool(settings.JUDGE_BASE_URL) != bool(settings.JUDGE_MODEL):
        return [
            Error(
                "JUDGE_BASE_URL and JUDGE_MODEL belong together: "
                f"{settings.JUDGE_BASE_URL!r} and {settings.JUDGE_MODEL!r} are given.",
                hint="Set both, or neither; without them the recorded reward counts.",
                id="trainingsite.E001",
            )
        ]
    return []


@register()
def trainer_command(app_configs: Sequence[AppConfig] | None, **kwargs: object) -> list[CheckMessage]:
    """A trainer that is not told where its job lies trains nothing."""
    command = settings.TRAINER_COMMAND
    if command and not any("{job}" in word for word in command):
        return [
            Error(
                f"TRAINER_COMMAND={','.join(command)!r} does not contain {{job}}.",
                hint="Put {job} where the trainer expects the job's folder, for example: mytrainer,--job,{job}",
                id="trainingsite.E002",
            )
        ]
    return []


@register(deploy=True)
def model_server(app_configs: Sequence[AppConfig] | None, **kwargs: object) -> list[CheckMessage]:
    """Versions can be trained, but not served, without a model server."""
    if not settings.MODEL_SERVER_URL:
        return [
            Warning(
                "MODEL_SERVER_URL is not set: versions are trained but cannot be evaluated or served.",
                hint="Point it at a vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, on a private network.",
                id="trainingsite.W001",
            )
        ]
    return []
