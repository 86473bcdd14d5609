"""The small model server answers as vLLM does (statuses and texts as measured on vLLM 0.32)."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serving.running import BASE, MAX_MODEL_LEN, write_adapter

HELLO = [{"role": "user", "content": "BUY or SELL?"}]


def load(http: httpx.Client, name: str, path: Path | str, **more: object) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def chat(http: httpx.Client, **fields: object) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 8, **fields})


def greedy(http: httpx.Client, model: str, content: str = "BUY or SELL?") -> list[int]:
    """Token ids of the likeliest answer."""
    body = chat(
        http,
        model=model,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
    ).json()
    ids: list[int] = body["choices"][0]["token_ids"]
    return ids


def names(http: httpx.Client) -> list[str]:
    return [card["id"] for card in http.get("/v1/models").json()["data"]]


# --- adapters -----------------------------------------------------------------------------------------------------


def test_a_loaded_adapter_is_listed_and_chosen_by_its_name(http: httpx.Client, adapters: tuple[Path, Path]) -> None:
    answer = load(http, "p-v1.0.0", adapters[0])

    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'p-v1.0.0' added successfully.")
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert list(cards) == [BASE, "p-v1.0.0"]
    assert (cards["p-v1.0.0"]["parent"], cards["p-v1.0.0"]["root"]) == (BASE, str(adapters[0]))
    assert chat(http, model="p-v1.0.0").json()["model"] == "p-v1.0.0"
    assert greedy(http, "p-v1.0.0") != greedy(http, BASE)


def test_loading_a_name_again_is_a_400_unless_in_place(http: httpx.Client, adapters: tuple[Path, Path]) -> None:
    load(http, "p-v1.0.0", adapters[0])
    first = greedy(http, "p-v1.0.0")

    again = load(http, "p-v1.0.0", adapters[1])

    assert again.status_code == 400
    assert again.json()["error"]["type"] == "InvalidUserInput"
    assert "already been loaded" in again.json()["error"]["message"]
    assert greedy(http, "p-v1.0.0") == first
    assert load(http, "p-v1.0.0", adapters[1], load_inplace=True).status_code == 200
    assert greedy(http, "p-v1.0.0") != first


def test_a_path_without_an_adapter_is_a_404(http: httpx.Client, tmp_path: Path) -> None:
    answer = load(http, "p-v1.0.0", tmp_path)

    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
    assert f"No adapter found for {tmp_path}" in answer.json()["error"]["message"]
    assert names(http) == [BASE]


def test_a_pickled_adapter_is_no_adapter(http: httpx.Client, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((adapters[0] / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n")

    assert load(http, "p-v1.0.0", tmp_path).status_code == 404


def test_an_adapter_of_another_base_is_a_400_and_leaves_nothing_behind(
    http: httpx.Client, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    before = greedy(http, BASE)
    unfit = write_adapter(tmp_path / "unfit", seed=3, hidden=96)

    answer = load(http, "p-v1.0.0", unfit)

    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadRequestError")
    assert names(http) == [BASE]
    assert greedy(http, BASE) == before
    assert load(http, "p-v1.0.0", adapters[0]).status_code == 200


def test_an_adapter_with_weights_that_have_no_place_is_a_400(http: httpx.Client, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "odd", seed=3)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))

    answer = load(http, "p-v1.0.0", folder)

    assert answer.status_code == 400
    assert names(http) == [BASE]


def test_unloading_is_a_200_once_and_then_a_404(http: httpx.Client, adapters: tuple[Path, Path]) -> None:
    base = greedy(http, BASE)
    load(http, "p-v1.0.0", adapters[0])
    greedy(http, "p-v1.0.0")

    first, second = unload(http, "p-v1.0.0"), unload(http, "p-v1.0.0")

    assert (first.status_code, first.text) == (200, "Success: LoRA adapter 'p-v1.0.0' removed successfully.")
    assert (second.status_code, second.json()["error"]["type"]) == (404, "NotFoundError")
    assert chat(http, model="p-v1.0.0").status_code == 404
    assert greedy(http, BASE) == base


def test_an_unknown_model_is_a_404_in_vllms_shape(http: httpx.Client) -> None:
    answer = chat(http, model="nobody")

    assert answer.status_code == 404
    assert answer.json() == {
        "error": {
            "message": "The model `nobody` does not exist.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
    }


def test_names_and_paths_must_be_given(http: httpx.Client) -> None:
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "x"}).json()["error"]["type"] == "InvalidUserInput"
    assert http.post("/v1/unload_lora_adapter", json={}).status_code == 400
    assert load(http, BASE, "/nowhere").status_code == 400


# --- answers ------------------------------------------------------------------------------------------------------


def test_token_ids_and_logprobs_are_as_many(http: httpx.Client) -> None:
    body = chat(http, n=3, logprobs=True, top_logprobs=2, return_token_ids=True, temperature=0.7).json()

    assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    for choice in body["choices"]:
        content = choice["logprobs"]["content"]
        assert 1 <= len(choice["token_ids"]) == len(content) <= 8
        assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in content)
        assert all(token["top_logprobs"][0]["logprob"] >= token["logprob"] for token in content)
    assert body["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in body["choices"])


def test_without_asking_there_are_neither(http: httpx.Client) -> None:
    body = chat(http).json()

    assert "prompt_token_ids" not in body
    assert "token_ids" not in body["choices"][0]
    assert body["choices"][0]["logprobs"] is None


def test_a_seed_repeats_its_answers_in_any_company(http: httpx.Client) -> None:
    def ids(seed: int) -> list[list[int]]:
        body = chat(http, seed=seed, n=4, return_token_ids=True).json()
        return [choice["token_ids"] for choice in body["choices"]]

    alone = ids(7)
    with ThreadPoolExecutor(6) as pool:
        in_company = list(pool.map(ids, [7, 1, 2, 7, 3, 4]))

    assert in_company[0] == in_company[3] == alone
    assert in_company[1] != alone
    assert len({tuple(one) for one in alone}) > 1


def test_requests_of_several_adapters_at_once_are_answered_as_alone(
    http: httpx.Client, adapters: tuple[Path, Path]
) -> None:
    load(http, "p-v1.0.0", adapters[0])
    load(http, "p-v1.0.1", adapters[1])
    asked = [(model, f"Company {number} {'grows ' * number}") for number in range(8)
             for model in (BASE, "p-v1.0.0", "p-v1.0.1")]  # fmt: skip
    alone = [greedy(http, *one) for one in asked]

    with ThreadPoolExecutor(12) as pool:
        at_once = list(pool.map(lambda one: greedy(http, *one), asked))

    assert at_once == alone


def test_an_answer_ends_at_its_limit_or_its_stop_text(http: httpx.Client) -> None:
    whole = chat(http, seed=5, max_tokens=12, ignore_eos=True, temperature=2.0).json()["choices"][0]
    letter = next(one for one in whole["message"]["content"] if one.isascii())

    cut = chat(http, seed=5, max_tokens=12, ignore_eos=True, temperature=2.0, stop=[letter]).json()["choices"][0]

    assert (whole["finish_reason"], whole["stop_reason"]) == ("length", None)
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", letter)
    assert cut["message"]["content"] == whole["message"]["content"].split(letter)[0]


def test_a_stream_says_the_same_as_a_whole_answer(http: httpx.Client) -> None:
    wish = {"seed": 11, "n": 2, "logprobs": True, "return_token_ids": True, "temperature": 1.5}
    whole = chat(http, **wish).json()
    said, ends, usage = {0: "", 1: ""}, {}, None
    ids: dict[int, list[int]] = {0: [], 1: []}
    logprobs: dict[int, list[float]] = {0: [], 1: []}
    body = {"messages": HELLO, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}, **wish}

    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]

    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for chunk in chunks:
        usage = chunk.get("usage", usage)
        for choice in chunk["choices"]:
            index = choice["index"]
            said[index] += choice["delta"].get("content") or ""
            ids[index] += choice.get("token_ids", [])
            logprobs[index] += [token["logprob"] for token in (choice.get("logprobs") or {"content": []})["content"]]
            if choice.get("finish_reason"):
                ends[index] = choice["finish_reason"]
    for choice in whole["choices"]:
        index = choice["index"]
        assert said[index] == choice["message"]["content"]
        assert ids[index] == choice["token_ids"]
        assert logprobs[index] == pytest.approx([one["logprob"] for one in choice["logprobs"]["content"]], abs=1e-4)
        assert ends[index] == choice["finish_reason"]
    assert usage == whole["usage"]


def test_tools_are_rendered_into_the_prompt(http: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "news", "parameters": {"properties": {"company": {}}}}}

    with_tool = chat(http, tools=[tool]).json()["usage"]["prompt_tokens"]

    assert with_tool > chat(http).json()["usage"]["prompt_tokens"]
    assert chat(http, tools=[tool], tool_choice="none").json()["usage"]["prompt_tokens"] < with_tool


# --- what is refused ----------------------------------------------------------------------------------------------


def test_it_lives_without_a_key_and_says_nothing_else(http: httpx.Client) -> None:
    stranger = httpx.Client(base_url=http.base_url)

    assert stranger.get("/health").status_code == 200
    assert stranger.get("/v1/models").status_code == 401
    assert stranger.post("/v1/chat/completions", json={"messages": HELLO}).status_code == 401
    assert stranger.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", -1, "temperature must be non-negative"),
        ("top_p", 0, "top_p must be in"),
        ("n", 0, "n must be at least 1"),
        ("n", 1000, "n must be at least 1 and at most"),
        ("max_tokens", 0, "max_tokens must be at least 1"),
        ("max_tokens", 10_000, f"maximum context length is {MAX_MODEL_LEN} tokens"),
        ("top_logprobs", 3, "`logprobs` must be set"),
        ("messages", [], "at least one message"),
        ("messages", "hello", "Expected `array`"),
        ("messages", [{"content": "hello"}], "no role"),
        ("messages", [{"role": "user", "content": 3}], "neither text nor"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "not text"),
        ("messages", [{"role": "user", "content": "word " * 400}], "Please reduce the length"),
        ("messages", [{"role": "user", "content": "x" * 3_000_000}], "Please reduce the length"),
        ("response_format", {"type": "json_object"}, "not supported by this server"),
        ("presence_penalty", 0.5, "not supported by this server"),
        ("seed", "seven", "Expected `int"),
        ("stop", [""], "stop takes up to"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_says_why(http: httpx.Client, field: str, value: object, said: str) -> None:
    answer = chat(http, **{field: value})

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert said in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b"[1]", b'{"messages": [{"role": "user"}], "temperature": NaN}',
        b'{"messages": ' + b"[" * 100_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "' + b"x" * 10_000_000 + b'"}]}',
    ],
    ids=["empty", "cut", "no-utf8", "list", "nan", "deep", "surrogate", "10-mb"],
)  # fmt: skip
def test_a_garbage_body_is_a_400(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/chat/completions", content=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "BadRequestError"
    assert chat(http).status_code == 200


def test_unknown_paths_and_methods_have_the_same_shape(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").json()["error"]["code"] == 404
    assert http.get("/v1/chat/completions").json()["error"]["code"] == 405


# --- tool calls in an answer --------------------------------------------------------------------------------------


def test_tool_calls_are_read_from_the_chatml_form() -> None:
    from training.trainer.serve import parse_tool_calls

    text = 'Let me look.\n<tool_call>\n{"name": "news", "arguments": {"company": "Arlo"}}\n</tool_call>'

    before, calls = parse_tool_calls(text)

    assert before == "Let me look."
    assert [call["function"] for call in calls] == [{"name": "news", "arguments": '{"company": "Arlo"}'}]


@pytest.mark.parametrize("block", ["no json", "[1]", '{"arguments": {}}', '{"name": 3}', '{"name": "news"'], ids=str)
def test_a_broken_tool_call_is_plain_text(block: str) -> None:
    from training.trainer.serve import parse_tool_calls

    text = f"<tool_call>{block}</tool_call>"

    assert parse_tool_calls(text) == (text, [])
