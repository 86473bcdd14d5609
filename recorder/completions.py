"""An OpenAI-compatible request and its answer as one recorded call; token ids and log-probabilities where given."""

from collections.abc import Mapping, Sequence

Body = dict[str, object]

# Parts of a request that the recording has fields of its own for.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "tools")


def call_of(request: Mapping[str, object], response: Mapping[str, object], choice: int = 0) -> Body:
    """The fields of a call; both sides have been through `plain`.

    Args:
        request: what `chat.completions.create` was given: model, messages, sampling, tools.
        response: the ChatCompletion as a mapping. vLLM's `token_ids` and `prompt_token_ids` are read
            (asked for by `extra_body={"return_token_ids": True}`), and `logprobs` of the chosen tokens.
        choice: which of `n` answers the agent took; the others are not recorded.
    """
    extra_body = _mapping(request.get("extra_body"))
    asked = {**{key: value for key, value in request.items() if key != "extra_body"}, **extra_body}
    chosen = _mapping(_at(response.get("choices"), choice))
    message = _mapping(chosen.get("message"))
    usage = _mapping(response.get("usage"))
    call: Body = {
        "model": response.get("model") or asked.get("model"),
        "messages": asked.get("messages"),
        "finish_reason": chosen.get("finish_reason"),
        "max_tokens": asked.get("max_completion_tokens", asked.get("max_tokens")),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "prompt_token_ids": response.get("prompt_token_ids") or chosen.get("prompt_token_ids"),
        "token_ids": chosen.get("token_ids"),
        "logprobs": _logprobs(chosen.get("logprobs")),
        **{name: asked.get(name) for name in SAMPLING},
        **answer(message),
    }
    left = {
        key: value
        for key, value in asked.items()
        if key not in (*SAMPLING, "model", "messages", "max_tokens", "max_completion_tokens", "stream", "timeout")
        and not key.startswith("extra_")  # headers may hold keys
        and value is not None
    }
    if left:
        extra = call.setdefault("extra", {})
        if isinstance(extra, dict):
            extra["request"] = left
    return call


def answer(message: Mapping[str, object]) -> Body:
    """An assistant message as fields of a call; what has no field is kept beside them, so that nothing is lost."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    fields: Body = {"response": message.get("content"), "tool_calls": message.get("tool_calls") or None}
    kept = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", "tool_calls", "reasoning_content", "reasoning")
        and value not in (None, [], {})
    }
    if isinstance(reasoning, str):
        fields["reasoning"] = reasoning
    if fields["response"] is not None and not isinstance(fields["response"], str):
        kept["content"] = fields.pop("response")  # a list of parts
    if kept:
        fields["extra"] = {"message": kept}
    return fields


def message_of(call: Mapping[str, object]) -> Body:
    """The assistant message that the site rebuilds from a recorded call."""
    message: Body = {
        "role": "assistant",
        "content": call.get("response"),
        "reasoning_content": call.get("reasoning"),
        "tool_calls": call.get("tool_calls"),
    }
    extra = _mapping(call.get("extra"))
    return {**message, **_mapping(extra.get("message"))}


def same(one: object, other: object) -> bool:
    """Equal messages; a key that holds nothing is as good as one that is not there."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one == other
    return _filled(one) == _filled(other)


def _filled(message: Mapping[str, object]) -> Body:
    return {key: value for key, value in message.items() if value is not None}


def _logprobs(value: object) -> list[object] | None:
    content = _mapping(value).get("content")
    if not isinstance(content, list):
        return None
    return [_mapping(token).get("logprob") for token in content]


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _at(values: object, index: int) -> object:
    return values[index] if isinstance(values, Sequence) and index < len(values) else None
