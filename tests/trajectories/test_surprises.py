"""What recordings really look like, and where each surprise is held: `PROOFS` by subject, the rest in this file.

PROOFS names tests of other files, of which each must be there.
"""

import json
import re
from pathlib import Path

import pytest
from django.test import Client

from tests import builders
from tests.trajectories import recordings

pytestmark = pytest.mark.django_db

URL = "/api/v1/trajectories/"
HERE = Path(__file__).parent
PROOFS = {
    "tool call ids repeat": (
        "test_transcripts::test_results_find_their_calls_though_ids_repeat_and_come_out_of_order",
    ),
    "calls without results, results without calls": (
        "formats/test_atif::test_results_find_their_calls_and_one_may_be_missing",
        "formats/test_atif::test_an_observation_without_a_call_is_what_the_surroundings_said",
    ),
    "the same call twice, totals repeated by parents": (
        "formats/test_langfuse::test_a_call_that_was_seen_twice_counts_once_with_its_own_tokens",
        "formats/test_langsmith::test_a_call_inside_of_a_call_counts_once",
        "test_otlp::test_a_run_is_one_trajectory_with_its_calls_tools_and_tokens_once",
    ),
    "content in attributes, events, log records": (
        "test_otlp::test_content_in_log_records_of_the_stock_exporter_reaches_the_call",
        "formats/test_otlp::test_a_call_is_read_from_every_kind_of_file",
    ),
    "OTLP's JSON": (
        "test_otlp::test_protobuf_json_and_gzip_say_the_same",
        "test_otlp::test_every_order_gives_the_same_trajectory",
    ),
    "long texts, data URLs, long runs": (
        "test_blobs::test_what_is_too_large_lies_in_the_storage_and_comes_back_as_it_was",
        "test_transcripts::test_a_page_of_a_long_run_opens_one_segment",
    ),
    "JSON inside of JSON": (
        "test_transcripts::test_tool_calls_as_json_text_and_arguments_as_objects_become_openais",
        "formats/test_swe_agent::test_state_of_old_files_is_json_text_and_messages_of_the_next_prompt_are_not_kept_twice",
    ),
    "several step rewards": ("test_post_trajectory::test_several_step_rewards_without_a_rule_are_no_reward",),
    "rewards of any kind": (
        "formats/test_nemo_gym::test_a_reward_is_any_number_and_unknown_is_not_zero",
        "formats/test_art::test_a_reward_that_is_no_number_is_unknown",
    ),
    "the same run twice": (
        "test_import::test_a_row_that_stands_twice_in_a_file_is_two_attempts_and_still_a_replay_later",
    ),
    "empty token lists": ("formats/test_nemo_gym::test_empty_token_lists_are_kept_as_empty_and_end_nothing",),
    "lists of different length": ("formats/test_intercode::test_lists_of_different_length_lose_nothing",),
    "files that are not what their name says": (
        "formats/test_verifiers::test_the_recorded_pointer_is_refused_with_the_way_out",
        "formats/test_inspect::test_a_cut_or_empty_archive_is_said",
    ),
    "runs completed later": ("formats/test_langsmith::test_posts_and_patches_make_one_trajectory_of_a_trace",),
    "sub-agents embedded or referenced": (
        "formats/test_atif::test_embedded_sub_agents_become_trajectories_that_name_their_parent_and_its_call",
        "formats/test_atif::test_sub_agents_in_the_same_file_are_joined_by_the_reference",
    ),
    "NaN and halves of characters": (
        "test_bulk::test_nan_and_lone_surrogates_in_a_batch_cost_no_neighbour",
        "test_import::test_numbers_that_json_does_not_know_are_kept_as_text_in_foreign_rows",
    ),
}


@pytest.mark.parametrize("surprise", list(PROOFS))
def test_the_proof_of_each_is_there(surprise: str) -> None:
    for proof in PROOFS[surprise]:
        path, _, name = proof.partition("::")
        assert re.search(rf"^def {name}\(", (HERE / f"{path}.py").read_text(), re.MULTILINE), proof


@pytest.fixture
def headers() -> dict[str, str]:
    return builders.bearer(builders.make_key(builders.make_project())[1])


def kept(client: Client, headers: dict[str, str], body: dict[str, object], name: str = "native") -> dict[str, object]:
    """What is given back of what was posted."""
    told = client.post(f"{URL}?format={name}", json.dumps(body), content_type="application/json", headers=headers)
    assert told.status_code == 201, told.content
    found: dict[str, object] = client.get(f"{URL}{body['trajectory_id']}/", headers=headers).json()
    return found


@pytest.mark.parametrize(
    "text", ["\x1b[31mred\x1b[0m", "page\x0cpage", "one\r\ntwo\rthree", "a\x00b", "\u202eשלום עולם", " "]
)
def test_what_tools_print_comes_back_as_it_was(client: Client, headers: dict[str, str], text: str) -> None:
    body = recordings.native("t", steps=[recordings.step(action={"action_type": "ls", "result": text})])

    steps = kept(client, headers, body)["steps"]

    assert isinstance(steps, list)
    assert steps[0]["action"]["result"] == text


@pytest.mark.parametrize("reward", [0, 1, -100, -0.5, 3.25, 1e300, None])
def test_a_reward_is_any_number_or_unknown(client: Client, headers: dict[str, str], reward: float | None) -> None:
    recorded = kept(client, headers, recordings.native("t", reward=reward))["recorded"]

    assert isinstance(recorded, dict)
    assert recorded["reward"] == reward


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "C", True])
def test_what_is_no_number_is_refused_as_a_reward(client: Client, headers: dict[str, str], reward: object) -> None:
    body = json.dumps(recordings.native("t", reward=reward))
    told = client.post(URL, body, content_type="application/json", headers=headers)

    assert (told.status_code, told.json()["pointer"]) == (400, "/reward")


@pytest.mark.parametrize(
    ("ids", "logprobs"), [([], []), ([5], [-9999.0]), ([5, 6], [None, -0.1]), ([5, 6], [-0.0, 0.0]), (None, None)]
)
def test_token_lists_come_back_as_they_were(
    client: Client, headers: dict[str, str], ids: list[int] | None, logprobs: list[float | None] | None
) -> None:
    call = recordings.call(token_ids=ids, logprobs=logprobs)
    steps = kept(client, headers, recordings.native("t", steps=[{"llm_calls": [call]}]))["steps"]

    assert isinstance(steps, list)
    found = steps[0]["llm_calls"][0]
    assert (found.get("token_ids"), json.dumps(found.get("logprobs"))) == (ids, json.dumps(logprobs))


@pytest.mark.parametrize("content", [None, "", "text", [{"type": "text", "text": "a part"}]])
def test_content_may_be_null_empty_a_text_or_parts(client: Client, headers: dict[str, str], content: object) -> None:
    arguments = '{"of":  "ACME"}'  # as the model wrote it, two blanks included
    call = {"id": "c", "type": "function", "function": {"name": "headline", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Trade."},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "up"},
    ]
    body: dict[str, object] = {"trajectory_id": "t", "agent_id": "a", "messages": messages}
    text = json.dumps(kept(client, headers, body, "messages"))

    assert json.dumps(arguments) in text
    assert "a part" in text or not isinstance(content, list)


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"trajectory_id": "x" * 10_000}, "/trajectory_id"),
        ({"ended_at": "9999-12-31T23:59:59Z"}, "/ended_at"),
        ({"metadata": {"x": "\ud800"}}, "/metadata/x"),
    ],
)
def test_what_cannot_be_is_refused_by_its_place(
    client: Client, headers: dict[str, str], fields: dict[str, object], pointer: str
) -> None:
    body = json.dumps({**recordings.native("t"), **fields})
    told = client.post(URL, body, content_type="application/json", headers=headers)

    assert (told.status_code, told.json()["pointer"]) == (400, pointer)
