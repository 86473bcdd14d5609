"""The body of an answer, read back from its bytes: JSON in one piece, or server-sent events put together."""

import json
from collections.abc import Iterator, Mapping

Body = dict[str, object]

ONCE = ("id", "type", "index", "role", "name", "object", "model", "created")  # of these, pieces do not add up


def events(raw: bytes) -> Iterator[Body]:
    """The JSON of each `data:` of a stream of events; what is no JSON object, `[DONE]` too, is left out."""
    for block in raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        data = b"\n".join(line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:"))
        found = document(data)
        if found:
            yield found


def document(raw: bytes) -> Body:
    """A JSON object; {} where it is none."""
    try:
        found: object = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def chat_completion(chunks: Iterator[Body]) -> Body:
    """The chunks of a streamed chat completion as the completion that they are pieces of."""
    whole: Body = {}
    choices: dict[int, Body] = {}
    for chunk in chunks:
        whole.update({key: value for key, value in chunk.items() if key != "choices" and value is not None})
        found = chunk.get("choices")
        for piece in found if isinstance(found, list) else []:
            if isinstance(piece, dict):
                at = piece.get("index")
                _add_choice(choices.setdefault(at if isinstance(at, int) else 0, {}), piece)
    if choices:
        whole["choices"] = [choices[at] for at in sorted(choices)]
    return whole


def _add_choice(choice: Body, piece: Mapping[str, object]) -> None:
    for key, value in piece.items():
        if key == "delta" and isinstance(value, Mapping):
            message = choice.setdefault("message", {})
            if isinstance(message, dict):
                _add(message, value)
        elif key == "logprobs" and isinstance(value, Mapping):
            logprobs = choice.setdefault("logprobs", {})
            if isinstance(logprobs, dict):
                _add(logprobs, value)
        elif key == "token_ids" and isinstance(value, list):
            _add(choice, {key: value})
        elif value is not None:
            choice[key] = value


def _add(whole: Body, piece: Mapping[str, object]) -> None:
    """Texts are joined, lists go on; the parts of tool calls meet by their index."""
    for key, value in piece.items():
        known = whole.get(key)
        if value is None:
            continue
        if known is None:
            value = [{**one} if isinstance(one, dict) else one for one in value] if isinstance(value, list) else value
            whole[key] = {**value} if isinstance(value, dict) else value
        elif key in ONCE:
            whole[key] = known or value
        elif isinstance(known, str) and isinstance(value, str):
            whole[key] = known + value
        elif isinstance(known, dict) and isinstance(value, Mapping):
            known = {**known}
            _add(known, value)
            whole[key] = known
        elif isinstance(known, list) and isinstance(value, list):
            _extend(known, value)
        else:
            whole[key] = value


def _extend(known: list[object], value: list[object]) -> None:
    for one in value:
        index = one.get("index") if isinstance(one, dict) else None
        same = next((old for old in known if isinstance(old, dict) and old.get("index") == index), None)
        if index is not None and same is not None and isinstance(one, dict):
            _add(same, one)
        else:
            known.append({**one} if isinstance(one, dict) else one)
