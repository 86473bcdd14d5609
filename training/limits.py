"""The limits that the calls of the loop enforce; `GET /api/v1/limits/` lists them with those of recording."""

from training.adapters import MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES
from trajectories.limits import Limit

BODY_BYTES = 256 * 1024
PAGE = 500
NAME_CHARACTERS = 80  # of feedback
COMMENT_CHARACTERS = 20_000
AUTHOR_CHARACTERS = 150
REASON_CHARACTERS = 2_000
PURPOSE_CHARACTERS = 40
BASE_MODEL_CHARACTERS = 300
WORK = 1_000  # pieces of an evaluation handed out at once
ATTEMPTS = 64  # of an evaluation: a side at each scenario
SCENARIOS = 2_000  # of an evaluation
ADAPTER_BYTES = MAX_WEIGHTS_BYTES
ADAPTER_CONFIG_BYTES = MAX_CONFIG_BYTES


def listed() -> list[Limit]:
    return [
        Limit(name="loop_body_bytes", value=BODY_BYTES, unit="bytes", what="a JSON body of feedback and of the loop"),
        Limit(
            name="feedback_name_characters",
            value=NAME_CHARACTERS,
            unit="characters",
            what="name of feedback",
            status=400,
        ),
        Limit(
            name="feedback_comment_characters",
            value=COMMENT_CHARACTERS,
            unit="characters",
            what="comment of feedback",
            status=400,
        ),
        Limit(
            name="feedback_author_characters",
            value=AUTHOR_CHARACTERS,
            unit="characters",
            what="author of feedback",
            status=400,
        ),
        Limit(
            name="reason_characters",
            value=REASON_CHARACTERS,
            unit="characters",
            what="reason of a decision or a cancelled batch",
            status=400,
        ),
        Limit(
            name="purpose_characters",
            value=PURPOSE_CHARACTERS,
            unit="characters",
            what="purpose of a batch",
            status=400,
        ),
        Limit(
            name="base_model_characters",
            value=BASE_MODEL_CHARACTERS,
            unit="characters",
            what="base_model of a batch",
            status=400,
        ),
        Limit(name="loop_page", value=PAGE, unit="rows", what="`limit` of the other lists", status=400),
        Limit(name="evaluation_work", value=WORK, unit="pieces", what="`limit` of an evaluation's work", status=400),
        Limit(
            name="evaluation_attempts",
            value=ATTEMPTS,
            unit="attempts",
            what="of an evaluation: a side at each scenario",
            status=400,
        ),
        Limit(
            name="evaluation_scenarios",
            value=SCENARIOS,
            unit="scenarios",
            what="scenarios of an evaluation",
            status=400,
        ),
        Limit(name="adapter_bytes", value=ADAPTER_BYTES, unit="bytes", what="an adapter that is sent"),
        Limit(
            name="adapter_config_bytes",
            value=ADAPTER_CONFIG_BYTES,
            unit="bytes",
            what="the adapter_config.json of an adapter that is sent",
        ),
    ]
