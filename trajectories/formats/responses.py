"""Items of OpenAI's Responses API as turns of a conversation: which of them are one answer of the model, and which
the agent's surroundings said.

An answer is a run of reasoning, text and tool calls; it ends where a result or somebody else's message follows, where
an item carries the token ids of the whole answer, and where a new message or thought begins.
"""

from collections.abc import Iterator, Mapping, Sequence

from trajectories.formats import lenient
from trajectories.formats.turns import Answer, Turn, call_of
from trajectories.payloads import LlmCallPayload, Message

Item = dict[str, object]

TOKEN_FIELDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
ROLES = {"developer": "developer", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def kind(item: Item) -> str:
    """message, reasoning, call (of a tool), or result."""
    found = item.get("type")
    if found in (None, "message"):
        return "message"
    if found == "reasoning":
        return "reasoning"
    name = str(found)
    return "result" if name.endswith("_output") or name == "mcp_approval_response" else "call"


def is_answer(item: Item) -> bool:
    of = kind(item)
    return of in ("reasoning", "call") or (of == "message" and item.get("role") == "assistant")


def has_tokens(item: Item) -> bool:
    return bool(item.get("generation_token_ids"))


def messages(value: object) -> list[Message]:
    """An `input`, which nobody answered here: text is a user's message."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    made: list[Message] = []
    items = lenient.listed(value)
    for group in _grouped(items):
        if isinstance(group, tuple):
            call = answer(group)
            shown: Message = {"role": "assistant", "content": call.response}
            if call.reasoning is not None:
                shown["reasoning_content"] = call.reasoning
            if call.tool_calls is not None:
                shown["tool_calls"] = call.tool_calls
            made.append({**shown, **call.extra})
        else:
            made.append(_message(group))
    return made


def turns(items: Sequence[object], told: Mapping[str, object]) -> Iterator[Turn]:
    """An `output`: answers as calls, the rest as messages. `told`: fields that every call has."""
    for group in _grouped(items):
        if isinstance(group, tuple):
            yield Answer(call=answer(group, told))
        else:
            yield _message(group)


def _grouped(items: Sequence[object]) -> Iterator[tuple[Item, ...] | object]:
    """Runs of items that are one answer, as tuples, which JSON has not; any other item by itself."""
    run: list[Item] = []
    for number, item in enumerate(items):
        is_part = isinstance(item, dict) and is_answer(item)
        if run and not (is_part and not _begins_another(run, lenient.mapping(item), items[number + 1 : number + 2])):
            yield tuple(run)
            run = []
        if is_part:
            run.append(lenient.mapping(item))
        else:
            yield item
    if run:
        yield tuple(run)


def _begins_another(run: Sequence[Item], item: Item, following: Sequence[object]) -> bool:
    before = {kind(one) for one in run}
    if has_tokens(run[-1]):
        return True
    if kind(item) == "message":
        return bool(before & {"message", "call"})
    if kind(item) == "reasoning":
        if "message" in before and "call" not in before:
            return True
        # some senders put the thought behind the tool call that it led to
        goes_on = bool(following) and isinstance(following[0], dict) and is_answer(following[0])
        return "call" in before and goes_on
    return False


def answer(items: Sequence[Item], told: Mapping[str, object] | None = None) -> LlmCallPayload:
    """The call that gave these items. What has no place in a call is kept in extra["items"], by position."""
    texts: list[str] = []
    parts: list[object] = []
    thoughts: list[str] = []
    asked: list[dict[str, object] | str] = []
    rests: list[Item] = []
    fields: dict[str, object] = dict(told or {})
    for item in items:
        rest = dict(item)
        of = kind(item)
        if of == "message":
            rest.pop("role", None)
            _take_content(rest, texts, parts)
        elif of == "reasoning":
            _take_thoughts(rest, thoughts)
        else:
            asked.append(_tool_call(rest))
        if all(name in item for name in TOKEN_FIELDS):
            _take_tokens(rest, fields)
        if rest.get("type") in ("message", "reasoning", "function_call"):
            del rest["type"]
        rests.append({key: value for key, value in rest.items() if value not in (None, [], {})})
    extra: dict[str, object] = {}
    if any(rests):
        extra["items"] = rests
    if parts:
        extra["message"] = {"content": [*({"type": "text", "text": text} for text in texts), *parts]}
    elif texts or not asked:
        fields["response"] = "".join(texts) if texts else None
    if thoughts:
        fields["reasoning"] = "\n\n".join(thoughts)
    if asked:
        fields["tool_calls"] = asked
    return call_of({**fields, "extra": extra})


def _take_content(rest: Item, texts: list[str], parts: list[object]) -> None:
    content = rest.pop("content", None)
    if isinstance(content, str):
        texts.append(content)
        return
    left: list[object] = []
    for part in lenient.listed(content):
        if isinstance(part, dict) and part.get("type") in ("output_text", "text") and isinstance(part.get("text"), str):
            texts.append(str(part["text"]))
            more = {
                key: value for key, value in part.items() if key not in ("type", "text") and value not in (None, [])
            }
            if more:
                left.append(more)
        else:
            parts.append(part)
    if left:
        rest["content"] = left
    if content is not None and not isinstance(content, list):
        rest["content"] = content


def _take_thoughts(rest: Item, thoughts: list[str]) -> None:
    for name in ("summary", "content"):
        left: list[object] = []
        for part in lenient.listed(rest.get(name)):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                thoughts.append(str(part["text"]))
                more = {key: value for key, value in part.items() if key not in ("text", "type")}
                if more:
                    left.append(more)
            elif isinstance(part, str):
                thoughts.append(part)
            else:
                left.append(part)
        if isinstance(rest.get(name), list):
            del rest[name]
            if left:
                rest[name] = left
        elif isinstance(rest.get(name), str):
            thoughts.append(str(rest.pop(name)))


def _tool_call(rest: Item) -> dict[str, object]:
    """As OpenAI's chat has it; a tool that the provider ran itself has its own fields as arguments."""
    is_function = rest.get("type") == "function_call"
    call_id = rest.pop("call_id", None) or rest.get("id")
    name = rest.pop("name", None) or rest.get("type")
    arguments = rest.pop("arguments", rest.pop("input", None)) if not is_function else rest.pop("arguments", None)
    if arguments is None and not is_function:
        arguments = rest.pop("action", None)
    return {
        **({"id": call_id} if call_id is not None else {}),
        "type": "function",
        "function": {"name": name, "arguments": arguments if arguments is not None else "{}"},
    }


def _take_tokens(rest: Item, fields: dict[str, object]) -> None:
    prompt, written, logprobs = (rest.get(name) for name in TOKEN_FIELDS)
    ids, prompt_ids, logs = lenient.token_ids(written), lenient.token_ids(prompt), lenient.logprobs(logprobs)
    if ids is None or prompt_ids is None or logs is None:
        return  # they stay as they are, under extra
    fields |= {"prompt_token_ids": prompt_ids, "token_ids": ids, "logprobs": logs}
    if ids:
        fields |= {"prompt_tokens": len(prompt_ids), "completion_tokens": len(ids)}
    for name in TOKEN_FIELDS:
        del rest[name]


def _message(item: object) -> Message:
    """What is not the model's: a message or a result, as OpenAI's chat has it."""
    if not isinstance(item, dict):
        return {"role": "user", "content": None, "item": item}
    rest = {key: value for key, value in item.items() if value is not None}
    if kind(item) == "result":
        made: Message = {"role": "tool", "tool_call_id": rest.pop("call_id", None)}
        made["content"] = _content(rest.pop("output", None))
        if rest.get("type") == "function_call_output":
            del rest["type"]
        return {**made, **rest}
    if rest.get("type") == "message":
        del rest["type"]
    role = rest.pop("role", "user")
    return {
        "role": role if isinstance(role, str) and role else "user",
        "content": _content(rest.pop("content", None)),
        **rest,
    }


def _content(content: object) -> object:
    """Text parts as OpenAI's chat names them; anything else as it is."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        return [content] if isinstance(content, dict) else str(content)
    return [_part(part) for part in content]


def _part(part: object) -> object:
    if not isinstance(part, dict):
        return {"type": "text", "text": str(part)}
    if part.get("type") in ("input_text", "output_text"):
        return {**part, "type": "text"}
    if part.get("type") == "input_image" and isinstance(part.get("image_url"), str):
        detail = {"detail": part["detail"]} if part.get("detail") else {}
        rest = {key: value for key, value in part.items() if key not in ("type", "image_url", "detail")}
        return {"type": "image_url", "image_url": {"url": part["image_url"], **detail}, **rest}
    return part


def tools(value: object) -> list[dict[str, object]] | None:
    """Function tools as OpenAI's chat has them, others as they are; None where there are none."""
    found = lenient.objects(value)
    return [_tool(one) for one in found] or None


def _tool(tool: Item) -> dict[str, object]:
    if tool.get("type") == "function" and "function" not in tool:
        inner = {key: value for key, value in tool.items() if key != "type" and value is not None}
        return {"type": "function", "function": inner}
    return tool
