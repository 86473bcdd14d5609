"""OpenAI's Responses API as recorded calls: items in and out as the chat messages that they stand for."""

from collections.abc import Iterator, Mapping

from .completions import Body

SAMPLING = ("temperature", "top_p", "tools")
HERE = (*SAMPLING, "model", "input", "instructions", "max_output_tokens", "stream", "text_format")
STATUS = {"completed": "stop", "incomplete": "length", "failed": "error", "cancelled": "cancelled"}


def call_of(request: Mapping[str, object], answer: Mapping[str, object]) -> Body:
    """The fields of a call; both sides have been through `plain`.

    Reasoning items and what else has no place in a chat message are kept under `extra`. A prompt that goes on from
    `previous_response_id` lies with the provider: the recording has its new part, and the id.
    """
    extra_body = request.get("extra_body")
    asked = {**request, **(extra_body if isinstance(extra_body, dict) else {})}
    asked.pop("extra_body", None)
    usage = _mapping(answer.get("usage"))
    output = _list(answer.get("output"))
    said, kept = _said(output)
    details = _mapping(answer.get("incomplete_details"))
    error = answer.get("error")
    call: Body = {
        "model": answer.get("model") or asked.get("model"),
        "messages": _messages(asked.get("instructions"), asked.get("input")),
        "finish_reason": _finish(answer, said, details),
        "max_tokens": asked.get("max_output_tokens"),
        "prompt_tokens": usage.get("input_tokens"),
        "completion_tokens": usage.get("output_tokens"),
        "error": str(_mapping(error).get("message") or error)[:1000] if error else None,
        **{name: asked.get(name) for name in SAMPLING},
        **said,
    }
    left = {key: value for key, value in asked.items() if key not in HERE and value is not None}
    extra: Body = {"api": "responses"}
    if left:
        extra["request"] = left
    if kept:
        extra["output"] = kept
    if isinstance(answer.get("id"), str):
        extra["response_id"] = answer["id"]
    call["extra"] = extra
    return call


def whole(chunks: Iterator[Body]) -> Body:
    """The events of a stream as the response that they tell of: as the last event has it, else from the pieces."""
    latest: Body = {}
    texts: dict[object, str] = {}
    items: dict[object, object] = {}
    for event in chunks:
        kind = event.get("type")
        found = event.get("response")
        if isinstance(found, dict):
            latest = found
        if kind == "response.output_item.done":
            items[event.get("output_index")] = event.get("item")
        elif kind == "response.output_text.delta" and isinstance(event.get("delta"), str):
            at = event.get("output_index")
            texts[at] = texts.get(at, "") + str(event["delta"])
        elif kind == "error":
            latest = {**latest, "error": event.get("error") or event}
    if not latest.get("output"):
        pieces: dict[object, object] = {
            at: {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
            for at, text in texts.items()
        }
        latest = {**latest, "output": list({**pieces, **items}.values())}
    return latest


def _said(output: list[object]) -> tuple[Body, list[object]]:
    """(the fields of the answer, the items that have no field)."""
    texts: list[str] = []
    reasons: list[str] = []
    calls: list[object] = []
    kept: list[object] = []
    for one in output:
        item = _mapping(one)
        kind = item.get("type")
        if kind == "message":
            for part in _list(item.get("content")):
                text = _mapping(part).get("text")
                if isinstance(text, str):
                    texts.append(text)
                else:
                    kept.append(part)
        elif kind == "function_call":
            calls.append(_tool_call(item))
        else:
            if kind == "reasoning":
                parts = [*_list(item.get("summary")), *_list(item.get("content"))]
                found = [_mapping(part).get("text") for part in parts]
                reasons += [text for text in found if isinstance(text, str)]
            kept.append(one)
    fields: Body = {"response": "".join(texts) if texts else None, "tool_calls": calls or None}
    if reasons:
        fields["reasoning"] = "\n\n".join(reasons)
    return fields, kept


def _messages(instructions: object, given: object) -> list[object]:
    messages: list[object] = []
    if isinstance(instructions, str) and instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for one in _list(given):
        item = _mapping(one)
        kind = item.get("type")
        if kind == "function_call":
            _add_tool_call(messages, item)
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif "role" in item:
            role = "system" if item.get("role") == "developer" else item.get("role")
            messages.append({"role": role, "content": _content(item.get("content"))})
        elif kind == "reasoning":
            continue  # it stands with the call that it came from
        else:
            messages.append({"role": "user", "content": [one]})
    return messages


def _add_tool_call(messages: list[object], item: Mapping[str, object]) -> None:
    """Calls follow the message that they belong to as items of their own."""
    last: object = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        last = Body(role="assistant", content=None)
        messages.append(last)
    last["tool_calls"] = [*_list(last.get("tool_calls")), _tool_call(item)]


def _tool_call(item: Mapping[str, object]) -> Body:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def _content(content: object) -> object:
    """Parts of text alone as one text; others as they are."""
    parts = _list(content)
    texts = [_mapping(part).get("text") for part in parts]
    if parts and all(isinstance(text, str) for text in texts):
        return "".join(str(text) for text in texts)
    return content


def _finish(answer: Mapping[str, object], said: Mapping[str, object], details: Mapping[str, object]) -> object:
    if said.get("tool_calls") and answer.get("status") == "completed":
        return "tool_calls"
    if details.get("reason") == "content_filter":
        return "content_filter"
    return STATUS.get(str(answer.get("status")))


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
