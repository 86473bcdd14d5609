"""Single model calls: {request, response} pairs of OpenAI's chat completions, its Responses API or Gemini, as proxies
and test cassettes write them, a trajectory each."""

from collections.abc import Iterator, Mapping, Sequence

from trajectories.errors import Invalid, Problem
from trajectories.formats import completions, lenient, responses, turns
from trajectories.formats.incoming import Incoming
from trajectories.formats.turns import Answer, Turn
from trajectories.payloads import Message

NAME = "llm-calls"

Pair = Mapping[str, object]


def recognises(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("request"), dict):
        return False
    request, response = value["request"], lenient.mapping(value.get("response"))
    asked = any(isinstance(request.get(name), list) for name in ("messages", "contents")) or "input" in request
    return asked and any(name in response for name in ("choices", "output", "candidates", "error"))


def read(value: object, *, source: str) -> Iterator[Incoming | Problem]:
    try:
        yield _pair(lenient.mapping(value), source)
    except Problem as problem:
        yield problem


def _pair(pair: Pair, source: str) -> Incoming:
    request, response = lenient.mapping(pair["request"]), lenient.mapping(pair.get("response"))
    if "contents" in request:
        shown, said, taken = _gemini(request, response)
    elif "messages" in request:
        shown, said, taken = _chat(request, response)
    else:
        shown, said, taken = _responses(request, response)
    if not said and response.get("error") is None:
        raise Invalid("The response holds no answer.")
    if not said:
        said = [Answer(call=turns.call_of({"model": lenient.text(request.get("model")), "error": response["error"]}))]
    rest = lenient.rest(pair, ("request", "response"))
    for name, whole, keys in (("request", request, taken[0]), ("response", response, taken[1])):
        if left := lenient.rest(whole, keys):
            rest[name] = left
    stem = lenient.stem(source) or NAME
    times = (lenient.time(response.get(name)) for name in ("created", "created_at", "createTime"))
    first, *others = said
    return turns.incoming(
        {
            "trajectory_id": lenient.identifier(stem, response.get("id"), lenient.digest(pair)[:12]),
            "agent_id": lenient.identifier(stem),
            "started_at": next((time for time in times if time is not None), None),
            "tools": _tools(request),
            "final_status": "completed" if response.get("error") is None else "agent_error",
            "extra": rest,
        },
        # several choices answer one prompt: each is a conversation of its own
        [[*shown, first, *([] if any(isinstance(one, Answer) for one in others) else others)]]
        + [[*shown, one] for one in others if isinstance(one, Answer) and isinstance(first, Answer)],
        name=NAME,
        made_id=True,
    )


def _tools(request: Pair) -> list[dict[str, object]] | None:
    if "contents" in request:
        return lenient.objects(request.get("tools")) or None
    found = responses.tools(request.get("tools"))
    return found or completions.tools(None, request.get("functions"))


Read = tuple[list[Turn], list[Turn], tuple[Sequence[str], Sequence[str]]]


def _chat(request: Pair, response: Pair) -> Read:
    shown: list[Turn] = [turns.shown(one) for one in lenient.objects(request.get("messages"))]
    told = {
        "model": lenient.text(response.get("model")) or lenient.text(request.get("model")),
        **completions.sampling(request),
    }
    said: list[Turn] = []
    for number, choice in enumerate(lenient.objects(response.get("choices"))):
        used = completions.usage(response.get("usage")) if number == 0 else {}
        fields = {**told, **used, **completions.choice_fields(choice)}
        said.append(completions.answer(lenient.mapping(choice.get("message")), fields))
    return shown, said, (("messages", "tools", "functions"), ("choices",))


def _responses(request: Pair, response: Pair) -> Read:
    shown: list[Turn] = []
    if isinstance(request.get("instructions"), str):
        shown.append({"role": "system", "content": request["instructions"]})
    shown.extend(responses.messages(request.get("input")))
    told = {
        "model": lenient.text(response.get("model")) or lenient.text(request.get("model")),
        **completions.sampling(request),
        **completions.usage(response.get("usage")),
    }
    # one response is one call, whatever items it has
    items = [one for one in lenient.objects(response.get("output")) if responses.is_answer(one)]
    others = [one for one in lenient.objects(response.get("output")) if not responses.is_answer(one)]
    said: list[Turn] = [Answer(call=responses.answer(items, told))] if items else []
    said.extend(responses.messages(others))
    return shown, said, (("input", "instructions", "tools"), ("output",))


def _gemini(request: Pair, response: Pair) -> Read:
    shown: list[Turn] = []
    system = lenient.mapping(request.get("systemInstruction") or request.get("system_instruction"))
    if system:
        shown.append({"role": "system", "content": _parts(system)})
    for one in lenient.objects(request.get("contents")):
        role = "assistant" if one.get("role") == "model" else "user"
        shown.append({"role": role, "content": _parts(one), **lenient.rest(one, ("role", "parts"))})
    config = lenient.mapping(request.get("generationConfig"))
    used = lenient.mapping(response.get("usageMetadata"))
    said: list[Turn] = []
    for number, candidate in enumerate(lenient.objects(response.get("candidates"))):
        fields: dict[str, object] = {
            "model": lenient.text(response.get("modelVersion")),
            "temperature": lenient.number(config.get("temperature")),
            "top_p": lenient.number(config.get("topP")),
            "max_tokens": lenient.whole(config.get("maxOutputTokens")),
            "finish_reason": lenient.text(candidate.get("finishReason")),
        }
        if number == 0:
            fields["prompt_tokens"] = lenient.count(used.get("promptTokenCount"))
            fields["completion_tokens"] = lenient.count(used.get("candidatesTokenCount"))
        chosen = lenient.mapping(candidate.get("logprobsResult")).get("chosenCandidates")
        ids = lenient.token_ids([lenient.mapping(one).get("tokenId") for one in lenient.listed(chosen)])
        values = lenient.logprobs([lenient.mapping(one).get("logProbability") for one in lenient.listed(chosen)])
        if ids and values:
            fields |= {"token_ids": ids, "logprobs": values}
        fields["extra"] = {"candidate": lenient.rest(candidate, ("content", "finishReason", "index"))}
        said.append(completions.answer(_answer_of(lenient.mapping(candidate.get("content"))), fields))
    return (
        shown,
        said,
        (("contents", "systemInstruction", "system_instruction", "tools"), ("candidates", "modelVersion")),
    )


def _parts(content: Pair) -> object:
    parts = lenient.listed(content.get("parts"))
    texts = [one.get("text") for one in parts if isinstance(one, dict) and set(one) == {"text"}]
    if len(texts) == len(parts) == 1:
        return texts[0]
    return [{"type": "text", **one} if isinstance(one, dict) and set(one) == {"text"} else one for one in parts]


def _answer_of(content: Pair) -> Message:
    parts = lenient.objects(content.get("parts"))
    texts = [str(one["text"]) for one in parts if isinstance(one.get("text"), str) and not one.get("thought")]
    thoughts = [str(one["text"]) for one in parts if isinstance(one.get("text"), str) and one.get("thought")]
    calls = [lenient.mapping(one["functionCall"]) for one in parts if isinstance(one.get("functionCall"), dict)]
    others = [one for one in parts if not isinstance(one.get("text"), str) and "functionCall" not in one]
    asked = [
        {
            **lenient.rest({"id": one.get("id")}),
            "type": "function",
            "function": {"name": one.get("name"), "arguments": one.get("args")},
        }
        for one in calls
    ]
    message: Message = {"role": "assistant", "content": "".join(texts) if texts else None}
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if asked:
        message["tool_calls"] = asked
    if others:
        message["parts"] = others
    return message
