"""Chat messages in the dialects of those who log them, as OpenAI's chat has them.

Understood: OpenAI chat and Responses, Anthropic's blocks, Gemini's contents, LangChain (serialised, dumped, pairs),
OpenTelemetry's parts, Vercel's AI SDK; each as an object or as JSON text in a text. What a message says beside its
role, words and tool calls stays in it under its own name.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from trajectories import payloads
from trajectories.errors import Invalid
from trajectories.formats import lenient, responses
from trajectories.payloads import Message

Object = dict[str, object]

ROLES: Mapping[str, str] = {
    "human": "user",
    "ai": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "AIMessageChunk": "assistant",
    "HumanMessageChunk": "user",
}
CLASSES: Mapping[str, str] = {
    "HumanMessage": "user",
    "AIMessage": "assistant",
    "SystemMessage": "system",
    "ToolMessage": "tool",
    "FunctionMessage": "tool",
    "ChatMessage": "user",
    "DeveloperMessage": "developer",
}
TYPES: Mapping[str, str] = {
    "human": "user",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "developer": "developer",
    **CLASSES,
    **{f"{name}Chunk": role for name, role in CLASSES.items()},
}
KNOWN = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


def opened(value: object) -> object:
    """JSON that was written into a text, once or twice, as what it says; anything else as it is."""
    for _ in range(3):
        if not isinstance(value, str) or value[:1] not in ("{", "[", '"'):
            return value
        try:
            inner: object = msgspec.json.decode(value)
            lenient.check_depth(inner)
        except (msgspec.MsgspecError, RecursionError, Invalid):
            return value
        value = inner
    return value


def opened_deep(value: object) -> object:
    """The same with all JSON inside of it opened."""
    value = opened(value)
    if isinstance(value, dict):
        return {key: opened_deep(one) for key, one in value.items()}
    if isinstance(value, list):
        return [opened_deep(one) for one in value]
    return value


def prompt(value: object) -> list[Message]:
    """What a model was sent. Whatever is no conversation becomes the words of a user."""
    value = opened(value)
    if value is None:
        return []
    if isinstance(value, dict):
        return _prompt_of(value)
    if isinstance(value, list):
        return _conversation(value)
    return [{"role": "user", "content": words(value)}]


def _prompt_of(value: Object) -> list[Message]:
    if is_message(value):
        return message(value)
    before: list[Message] = []
    config = lenient.mapping(value.get("config"))
    system = value.get("system", value.get("instructions", value.get("system_instruction")))
    if system is None:
        system = value.get("systemInstruction", config.get("system_instruction", config.get("systemInstruction")))
    if system not in (None, "", []):
        before = [{"role": "system", "content": _system(system)}]
    for name in ("messages", "contents", "input", "prompts", "prompt"):
        if value.get(name) not in (None, "", []):
            return [*before, *prompt(value[name])]
    inner = lenient.mapping(value.get("kwargs"))
    if any(name in inner for name in ("messages", "contents", "input", "prompt")):
        return prompt(inner)
    if before and set(value) <= {"system", "instructions"}:
        return before
    return [*before, {"role": "user", "content": words(value)}]


def _system(value: object) -> str | list[object]:
    value = opened(value)
    if isinstance(value, dict):
        value = value.get("parts", value.get("content", value))
    if isinstance(value, list) and all(isinstance(one, dict | str) for one in value):
        texts = [one if isinstance(one, str) else one.get("text", one.get("content")) for one in value]
        if all(isinstance(one, str) for one in texts):
            return "\n".join(str(one) for one in texts)
        return list(value)
    return words(value)


def _conversation(value: Sequence[object]) -> list[Message]:
    if len(value) == 1 and isinstance(value[0], list) and not _is_pair(value[0]):
        return _conversation(value[0])  # LangChain's batches of conversations
    if any(_is_item(one) for one in value):
        return responses.messages(list(value))
    if value and all(isinstance(one, str) for one in value):
        return [{"role": "user", "content": words(one)} for one in value]
    return [made for one in value if definition(one) is None for made in message(one)]


def definition(value: object) -> Object | None:
    """The tool that is defined: LangChain's tracers put definitions behind the messages, as messages of a tool."""
    content = opened(lenient.mapping(value).get("content"))
    if isinstance(content, dict) and content.get("type") == "function" and isinstance(content.get("function"), dict):
        return content if "arguments" not in lenient.mapping(content["function"]) else None
    return None


def answer(value: object) -> Message | None:
    """The assistant message of what a model answered; None where it said nothing."""
    value = opened(value)
    if value in (None, "", [], {}):
        return None
    if isinstance(value, dict):
        found = _answer_of(value)
    elif isinstance(value, list):
        found = _answer_in(value)
    else:
        found = {"role": "assistant", "content": words(value)}
    if found is None:
        return {"role": "assistant", "content": words(value)}
    return {**found, "role": "assistant"}


def _answer_of(value: Object) -> Message | None:
    choices = lenient.listed(value.get("choices"))
    if choices and isinstance(choices[0], dict):
        chosen = choices[0].get("message", choices[0].get("delta", choices[0].get("text")))
        return answer(chosen)
    if "generations" in value:
        return _answer_of_generations(value["generations"])
    if isinstance(value.get("output"), list) and value["output"]:
        return _answer_in(lenient.listed(value["output"]))
    if isinstance(value.get("candidates"), list) and value["candidates"]:
        return answer(lenient.listed(value["candidates"])[0])
    content = value.get("content")
    if isinstance(content, dict) and "parts" in content:
        return _one(message(content))
    if is_message(value):
        return _one(message(value))
    if isinstance(content, str | list) and not isinstance(value.get("role"), str):
        return _one(message({"role": "assistant", **value}))
    asked = value.get("toolCalls", value.get("tool_calls"))
    text = value.get("text", value.get("completion", value.get("response")))
    if asked or isinstance(text, str):
        return _one(
            message({"role": "assistant", "content": text if isinstance(text, str) else None, "tool_calls": asked})
        )
    for name in ("messages", "output", "message", "generation", "kwargs"):
        if value.get(name) not in (None, "", [], {}):
            return answer(value[name])
    return None


def _answer_in(value: Sequence[object]) -> Message | None:
    """Of a list: output items, messages of which the last is the answer, tool calls, or blocks of one message."""
    if any(_is_item(one) for one in value):
        made = [one for one in responses.messages(list(value)) if one["role"] == "assistant"]
        return _one(made)
    if any(is_message(one) for one in value):
        made = [each for one in value for each in message(one)]
        last = next((at for at in reversed(range(len(made))) if made[at]["role"] != "assistant"), -1)
        return _one(made[last + 1 :] or [one for one in made if one["role"] == "assistant"][-1:])
    if value and isinstance(value[0], list):
        return _answer_in(value[0])
    if value and all(isinstance(one, dict) for one in value):
        if all("toolName" in one or "function" in one for one in lenient.objects(list(value))):
            return _one(message({"role": "assistant", "content": None, "tool_calls": list(value)}))
        return _one(message({"role": "assistant", "content": list(value)}))
    return None


def _answer_of_generations(value: object) -> Message | None:
    """LangChain: [[{text, message, generation_info}]]"""
    found = value
    while isinstance(found, list):
        if not found:
            return None
        found = found[0]
    first = lenient.mapping(found)
    if isinstance(first.get("message"), dict):
        return _one(message(first["message"]))
    return {"role": "assistant", "content": words(first.get("text"))} if first.get("text") is not None else None


def _one(made: Sequence[Message]) -> Message | None:
    """Several assistant messages in a row were one answer."""
    if not made:
        return None
    first = dict(made[0])
    for more in made[1:]:
        if isinstance(more.get("content"), str):
            first["content"] = "\n".join(str(one) for one in (first.get("content"), more["content"]) if one)
        asked = [*lenient.listed(first.get("tool_calls")), *lenient.listed(more.get("tool_calls"))]
        if asked:
            first["tool_calls"] = asked
    return first


def _is_item(value: object) -> bool:
    """An item of the Responses API that is not also a chat message."""
    if not isinstance(value, dict):
        return False
    kind = value.get("type")
    if kind in ("function_call", "function_call_output", "item_reference") or (
        kind == "reasoning" and "summary" in value
    ):
        return True
    first = next(iter(lenient.objects(value.get("content"))), {})
    return kind == "message" and first.get("type") in ("output_text", "input_text", "refusal")


def _is_pair(value: object) -> bool:
    """LangChain's ("human", "words")."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and (value[0] in KNOWN or value[0] in TYPES)
        and isinstance(value[1], str | list)
    )


def is_message(value: object) -> bool:
    if not isinstance(value, dict):
        return _is_pair(value)
    if value.get("lc") is not None and isinstance(value.get("kwargs"), dict):
        return _class(value) is not None
    if isinstance(value.get("role"), str) and ({"content", "parts", "tool_calls", "function_call"} & set(value)):
        return True
    return str(value.get("type")) in TYPES and bool({"content", "data"} & set(value))


def _class(value: Mapping[str, object]) -> str | None:
    """The class of a serialised object, where it is a message."""
    names = lenient.listed(value.get("id"))
    name = str(names[-1]).removesuffix("Chunk") if names else ""
    return name if name in CLASSES else None


def message(value: object) -> list[Message]:
    """One message, which may stand for several: results of tools beside words are messages of their own."""
    value = opened(value) if isinstance(value, str) and value[:1] == "{" else value
    if _is_pair(value):
        pair = lenient.listed(value)
        return message({"role": TYPES.get(str(pair[0]), str(pair[0])), "content": pair[1]})
    if not isinstance(value, dict):
        return [{"role": "user", "content": words(value)}]
    if value.get("lc") is not None and isinstance(value.get("kwargs"), dict):
        name = _class(value)
        inner = lenient.mapping(value["kwargs"])
        return message(
            {**inner, "role": inner.get("role") if name == "ChatMessage" else CLASSES.get(name or "", "user")}
        )
    if str(value.get("type")) in TYPES and "role" not in value:
        inner = lenient.mapping(value["data"]) if isinstance(value.get("data"), dict) else value
        return message({**{key: one for key, one in inner.items() if key != "type"}, "role": TYPES[str(value["type"])]})
    return _spread(_role(value), value)


def _role(value: Mapping[str, object]) -> str:
    role = value.get("role")
    if not isinstance(role, str) or not role:
        return "user"
    role = ROLES.get(role, role)
    if role not in KNOWN and "additional_kwargs" in value:  # LangChain's tracer of OpenAI puts the tool's name there
        return "tool"
    return role


def _spread(role: str, value: Object) -> list[Message]:
    rest = {
        key: one
        for key, one in value.items()
        if key not in ("role", "content", "parts", "tool_calls") and one is not None
    }
    if isinstance(value.get("role"), str) and role == "tool" and value["role"] not in KNOWN:
        rest.setdefault("name", value["role"])
    content = opened(value["parts"]) if "parts" in value and "content" not in value else value.get("content")
    inner = opened(content) if isinstance(content, str) and content[:2] in ("[{", '{"') else content
    blocks = inner if isinstance(inner, list) and inner and all(_is_block(one) for one in inner) else None
    if inner is not content and isinstance(inner, list) and inner and all(_is_call(one) for one in inner):
        return [{"role": "assistant", "content": None, **rest, "tool_calls": tool_calls(inner)}]  # Koog
    if blocks is None and not isinstance(content, list | dict):
        made: Message = {"role": role, "content": content if content is None else words(content), **rest}
        _ask(made, tool_calls(value.get("tool_calls")), value)
        return [made]
    if isinstance(content, dict):
        blocks = [content]
    elif blocks is None:
        blocks = lenient.listed(content)
    return _of_blocks(role, blocks, rest, value)


def _is_block(one: object) -> bool:
    return isinstance(one, dict) and ("type" in one or "text" in one or "functionCall" in one or "function_call" in one)


def _is_call(one: object) -> bool:
    return isinstance(one, dict) and "arguments" in lenient.mapping(one.get("function"))


class _Blocks(msgspec.Struct):
    texts: list[str] = []
    parts: list[object] = []
    thoughts: list[str] = []
    asked: list[Object] = []
    results: list[Message] = []
    left: list[object] = []


def _of_blocks(role: str, blocks: Sequence[object], rest: Object, value: Object) -> list[Message]:
    found = _Blocks()
    for one in blocks:
        _sort(one, found)
    asked = [*tool_calls(value.get("tool_calls"))]
    seen = {str(one.get("id")) for one in asked if one.get("id") is not None}
    asked.extend(one for one in found.asked if str(one.get("id")) not in seen or one.get("id") is None)
    made = [{**one, "role": "tool"} for one in found.results]
    if not made or found.parts or found.thoughts or asked or role == "assistant":
        plain = all(isinstance(one, dict) and set(one) == {"type", "text"} for one in found.parts)
        content: object = list(found.parts)
        if plain and (role in ("assistant", "system", "developer") or len(found.parts) == 1):
            content = "".join(found.texts) if found.parts else None
        own: Message = {"role": role, "content": content, **rest}
        if found.thoughts:
            own["reasoning_content"] = "\n\n".join(found.thoughts)
        if found.left:
            own["parts"] = found.left
        _ask(own, asked, value)
        made.append(own)
    elif rest:
        made[0] = {**rest, **made[0]}
    return made


def _sort(one: object, found: _Blocks) -> None:
    if not isinstance(one, dict):
        found.texts.append(words(one))
        found.parts.append({"type": "text", "text": words(one)})
        return
    kind = one.get("type")
    thought = one.get("thinking", one.get("reasoning"))
    text = one.get("text", one.get("content") if kind in ("text", "reasoning", "thinking") else None)
    call = one.get("functionCall", one.get("function_call"))
    answered = one.get("functionResponse", one.get("function_response"))
    if kind in ("thinking", "reasoning") or one.get("thought") is True:
        said = thought if isinstance(thought, str) else text
        if isinstance(said, str):
            found.thoughts.append(said)
        more = {key: inner for key, inner in one.items() if inner != said and key != "type" and inner is not None}
        if more:
            found.left.append(more)
    elif isinstance(call, dict):
        found.asked.extend(tool_calls([{**call, **{k: v for k, v in one.items() if v is not call}}]))
    elif isinstance(answered, dict):
        more = {key: inner for key, inner in answered.items() if key not in ("response", "id")}
        found.results.append({"tool_call_id": answered.get("id"), "content": _result(answered.get("response")), **more})
    elif kind in ("tool_use", "tool_call", "tool-call", "server_tool_use", "mcp_tool_use"):
        found.asked.extend(tool_calls([one]))
    elif kind in ("tool_result", "tool_call_response", "tool-result", "mcp_tool_result"):
        found.results.append(_tool_result(one))
    elif isinstance(text, str):
        found.texts.append(text)
        more = {
            key: inner for key, inner in one.items() if key not in ("type", "text", "content") and inner is not None
        }
        found.parts.append({"type": "text", "text": text, **more})
    else:
        found.parts.append(_part(one))


def _tool_result(one: Object) -> Message:
    names = ("tool_use_id", "toolCallId", "tool_call_id", "id")
    key = next((name for name in names if one.get(name) is not None), None)
    held = next((name for name in ("content", "response", "result", "output") if name in one), None)
    more = {name: inner for name, inner in one.items() if name not in (key, held, "type") and inner is not None}
    if "toolName" in more:
        more["name"] = more.pop("toolName")
    return {"tool_call_id": one.get(key) if key else None, "content": _result(one.get(held) if held else None), **more}


def _result(value: object) -> object:
    if isinstance(value, list) and all(_is_block(one) for one in value):
        return [_part(one) for one in value]
    return value if value is None or isinstance(value, str) else words(value)


def _part(one: object) -> object:
    if not isinstance(one, dict):
        return {"type": "text", "text": words(one)}
    source = lenient.mapping(one.get("source"))
    if one.get("type") == "image" and isinstance(source.get("data"), str):
        url = f"data:{source.get('media_type') or 'image/png'};base64,{source['data']}"
        return {
            **{key: inner for key, inner in one.items() if key != "source"},
            "type": "image_url",
            "image_url": {"url": url},
        }
    return one if "type" in one else {"type": "data", **one}


def _ask(made: Message, asked: Sequence[Object], value: Object) -> None:
    """Tool calls where the sender has them, each once."""
    if not asked:
        more = lenient.mapping(value.get("additional_kwargs")).get("tool_calls")
        asked = tool_calls(more)
        call = value.get("function_call")
        if not asked and isinstance(call, dict) and made["role"] == "assistant":
            asked = tool_calls([call])
    if asked:
        made["tool_calls"] = list(asked)


def tool_calls(value: object) -> list[Object]:
    """The calls of tools as OpenAI's chat has them; arguments stay as they were sent: JSON text, or an object."""
    return [_tool_call(one) for one in _calls_in(opened(value))]


def _calls_in(value: object) -> Iterable[Object]:
    for one in lenient.listed(value) if isinstance(value, list) else [value]:
        found = opened(one)
        if isinstance(found, dict) and found:
            yield found


def _tool_call(one: Object) -> Object:
    inner = one.get("function")
    if isinstance(inner, dict):
        return one if "type" in one else {"type": "function", **one}
    held = next((name for name in ("arguments", "args", "input") if name in one), None)
    key = next((name for name in ("id", "call_id", "toolCallId", "tool_call_id") if one.get(name) is not None), None)
    name = one.get("name", one.get("toolName", inner))
    taken = {"type", "name", "toolName", "function", held, key}
    rest = {field: value for field, value in one.items() if field not in taken and value is not None}
    return {
        **({"id": one[key]} if key else {}),
        "type": "function",
        **rest,
        "function": {"name": name, "arguments": one.get(held) if held else "{}"},
    }


def words(value: object) -> str:
    return value if isinstance(value, str) else payloads.encode(value).decode()
