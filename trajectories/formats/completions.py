"""OpenAI chat completions as calls: messages, choices with their log-probabilities, and what a request told of
sampling."""

import re
from collections.abc import Mapping

from trajectories.formats import lenient, turns
from trajectories.formats.turns import Answer

TOKEN_ID = re.compile(r"token_id:(\d+)\Z")  # vLLM's return_tokens_as_token_ids


def answer(message: Mapping[str, object], told: Mapping[str, object] | None = None) -> Answer:
    """An assistant message as a call. What has no place in a call is kept in extra["message"].

    Raises:
        Invalid: a field of `told` is not of its kind.
    """
    fields = {key: value for key, value in (told or {}).items() if value is not None}
    rest = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", "tool_calls") and value is not None
    }
    content = message.get("content")
    if isinstance(content, str):
        fields["response"] = content
    elif content is not None:
        rest["content"] = content if isinstance(content, list) else [content]
    asked = message.get("tool_calls")
    if isinstance(asked, str) or (isinstance(asked, list) and all(isinstance(one, dict | str) for one in asked)):
        if asked:
            fields["tool_calls"] = asked
    elif asked is not None:
        rest["tool_calls"] = asked
    for name in ("reasoning_content", "reasoning"):
        if isinstance(rest.get(name), str) and "reasoning" not in fields:
            fields["reasoning"] = rest.pop(name)
    if message.get("weight") == 0:
        fields["trainable"] = False
    extra = dict(lenient.mapping(fields.get("extra")))
    if rest:
        extra["message"] = rest
    return Answer(call=turns.call_of({**fields, "extra": extra}))


def choice_fields(choice: Mapping[str, object]) -> dict[str, object]:
    """Finish reason, token ids and log-probabilities of a choice; what is left of it under `extra`."""
    rest = {
        key: value
        for key, value in choice.items()
        if value is not None and key not in ("message", "finish_reason", "index")
    }
    if choice.get("index") not in (None, 0):
        rest["index"] = choice["index"]
    fields: dict[str, object] = {}
    if isinstance(choice.get("finish_reason"), str):
        fields["finish_reason"] = choice["finish_reason"]
    elif choice.get("finish_reason") is not None:
        rest["finish_reason"] = choice["finish_reason"]
    for name in ("token_ids", "prompt_token_ids"):
        if (ids := lenient.token_ids(rest.get(name))) is not None:
            fields[name] = ids
            del rest[name]
    if isinstance(rest.get("logprobs"), dict):
        left = _take_logprobs(lenient.mapping(rest.pop("logprobs")), fields)
        if left:
            rest["logprobs"] = left
    if rest:
        fields["extra"] = {"choice": rest}
    return fields


def _take_logprobs(logprobs: Mapping[str, object], fields: dict[str, object]) -> dict[str, object]:
    """Token ids and log-probabilities into `fields` where the ids are known; returns what is left."""
    entries = logprobs.get("content")
    left = {key: value for key, value in logprobs.items() if key != "content" and value is not None}
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        return {**left, "content": entries} if entries is not None else left
    tokens = [TOKEN_ID.match(str(one.get("token"))) for one in entries]
    ids = [int(found[1]) for found in tokens if found] if all(tokens) else None
    known = lenient.token_ids(fields.get("token_ids"))
    values = lenient.logprobs([one.get("logprob") for one in entries])
    if values is None or (ids is None and (known is None or len(known) != len(values))):
        return {**left, "content": entries}
    if known is None:
        fields["token_ids"] = ids
    fields["logprobs"] = values
    taken = ("logprob", "token") if ids is not None else ("logprob",)
    details = [
        {key: value for key, value in one.items() if key not in taken and value not in (None, [])} for one in entries
    ]
    return {**left, "content": details} if any(details) else left


def sampling(request: Mapping[str, object]) -> dict[str, object]:
    """The fields of a call that a request, or a run's settings, tell."""
    found: dict[str, object] = {
        "temperature": lenient.number(request.get("temperature")),
        "top_p": lenient.number(request.get("top_p")),
        "top_k": lenient.whole(request.get("top_k")),
        "min_p": lenient.number(request.get("min_p")),
        "seed": lenient.whole(request.get("seed")),
        "max_tokens": next(
            (
                size
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")
                if (size := lenient.whole(request.get(name))) is not None
            ),
            None,
        ),
    }
    return {name: value for name, value in found.items() if value is not None}


def usage(value: object) -> dict[str, object]:
    """The counts of a call in OpenAI's, Anthropic's and the Responses API's words."""
    told = lenient.mapping(value)
    found = {
        "prompt_tokens": next(
            (n for name in ("prompt_tokens", "input_tokens") if (n := lenient.count(told.get(name))) is not None), None
        ),
        "completion_tokens": next(
            (n for name in ("completion_tokens", "output_tokens") if (n := lenient.count(told.get(name))) is not None),
            None,
        ),
    }
    return {name: count for name, count in found.items() if count is not None}


def tools(offered: object, functions: object = None) -> list[dict[str, object]] | None:
    """Tools as they are; the older `functions` in the layer that tools have."""
    found = lenient.objects(offered)
    found += [{"type": "function", "function": one} for one in lenient.objects(functions)]
    return found or None
