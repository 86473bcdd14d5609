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
        choice: which of `n` answers the agent took; the others are kept beside it.
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
    choices = response.get("choices")
    others = [one for at, one in enumerate(choices) if at != choice] if isinstance(choices, list) else []
    more = {name: value for name, value in (("request", left), ("other_choices", others)) if value}
    if more:
        extra = call.setdefault("extra", {})
        if isinstance(extra, dict):
            extra.update(more)
    return call


def answer(message: Mapping[str, object]) -> Body:
    """An assistant message as fields of a call; what has no field is kept beside them, so that nothing is lost."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    fields: Body = {"response": message.get("content"), "tool_calls": _bare(message.get("tool_calls")) or None}
    kept = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", "tool_calls", "reasoning_content", "reasoning", "parsed")
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


def tool_calls(call: Mapping[str, object]) -> list[tuple[str, str]]:
    """(id, name of the function) of the tool calls that a recorded call asked for."""
    asked = call.get("tool_calls")
    found: list[tuple[str, str]] = []
    for one in asked if isinstance(asked, list) else []:
        tool_call = _mapping(one)
        inner = _mapping(tool_call.get("function") or tool_call.get("custom"))
        tool_call_id, name = tool_call.get("id"), inner.get("name")
        if isinstance(tool_call_id, str) and isinstance(name, str):
            found.append((tool_call_id, name))
    return found


def same(one: object, other: object) -> bool:
    """Equal messages; a key that holds nothing is as good as one that is not there."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one == other
    return _filled(one) == _filled(other)


def _filled(message: Mapping[str, object]) -> Body:
    """Without what says nothing, and what the client made of it."""
    # An answer of tool calls alone has the content "" or none; frameworks send back the other of the two.
    filled = {key: value for key, value in message.items() if value not in (None, "", [], {}) and key != "parsed"}
    if "tool_calls" in filled:
        filled["tool_calls"] = _bare(filled["tool_calls"])
    return filled


def _bare(tool_calls: object) -> object:
    """Tool calls without the arguments that the client has parsed, and the index of streams."""
    if not isinstance(tool_calls, list):
        return tool_calls
    bare: list[object] = []
    for one in tool_calls:
        if not isinstance(one, dict):
            bare.append(one)
            continue
        call = {key: value for key, value in one.items() if key != "index"}
        if isinstance(function := call.get("function"), dict):
            call["function"] = {key: value for key, value in function.items() if key != "parsed_arguments"}
        bare.append(call)
    return bare


def _logprobs(value: object) -> list[object] | None:
    content = _mapping(value).get("content")
    if not isinstance(content, list):
        return None
    return [_mapping(token).get("logprob") for token in content]


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _at(values: object, index: int) -> object:
    return values[index] if isinstance(values, Sequence) and index < len(values) else None
