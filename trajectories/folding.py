"""JSON as a page shows it: short values on one line, long ones folded by `<details>`, every word of them escaped."""

import json
import re
from collections.abc import Callable, Mapping

from django.utils.html import format_html
from django.utils.safestring import SafeString, mark_safe

from trajectories import shown

ONE_LINE = 88  # characters of JSON that are not broken up
OPEN_DEPTH = 2  # so deep it is open at first …
OPEN_MEMBERS = 24  # … unless there are more members
MOST_VALUES = 600  # of one tree; what is left stands as text
LONG_TEXT = 1_200  # characters of a string that is folded
MOST_TEXT = 20_000  # characters of a string that are shown
DEEPEST = 60  # levels that are looked through for files; recordings have fewer

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)[;,]")
SHORTEST_FILE = 64  # characters; a shorter data URL is left as text


class _Left:
    """How many values may still be broken up."""

    def __init__(self, values: int) -> None:
        self.values = values


def told(value: object) -> str:
    """Any JSON as indented text."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=2, default=str)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def tree(value: object) -> SafeString:
    """HTML of a value, its objects and lists to be folded."""
    return _value(value, 0, _Left(MOST_VALUES))


def _value(value: object, depth: int, left: _Left) -> SafeString:
    left.values -= 1
    if isinstance(value, str):
        return _string(value)
    members = _members(value)
    if members is None or not members:
        return format_html('<span class="lit">{}</span>', _line(value))
    line = _line(value)
    if len(line) <= ONE_LINE:
        return format_html('<span class="one">{}</span>', line)
    if left.values <= 0 or depth > 40:
        return _string(told(value), quoted=False)
    ends = "{}" if isinstance(value, Mapping) else "[]"
    count = f"{len(members)} {'key' if ends == '{}' else 'item'}{'' if len(members) == 1 else 's'}"
    rows = [
        format_html('<li><span class="key">{}</span> {}</li>', _key(name), _value(one, depth + 1, left))
        for name, one in members
    ]
    is_open = " open" if depth < OPEN_DEPTH and len(members) <= OPEN_MEMBERS else ""
    return format_html(
        '<details class="json"{}><summary>{} <span class="note-text">{}</span></summary><ul>{}</ul></details>',
        is_open,
        ends,
        count,
        mark_safe("".join(rows)),  # noqa: S308  # each was escaped
    )


def _members(value: object) -> list[tuple[object, object]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    return None


def _key(name: object) -> str:
    words = name if isinstance(name, str) else f"{name}"
    return shown.visible(words[:200])


def _line(value: object) -> str:
    try:
        return shown.visible(json.dumps(value, ensure_ascii=False, default=str))
    except (TypeError, ValueError, RecursionError):
        return shown.visible(str(value))


def _string(text: str, *, quoted: bool = True) -> SafeString:
    words = shown.visible(text)
    if len(words) <= ONE_LINE and "\n" not in words:
        return format_html('<bdi class="str">{}</bdi>', f'"{words}"' if quoted else words)
    cut = format_html('<p class="note-text">… {} more characters</p>', f"{len(words) - MOST_TEXT:,}")
    body = format_html(
        '<pre dir="auto" class="str">{}</pre>{}', words[:MOST_TEXT], cut if len(words) > MOST_TEXT else ""
    )
    if len(words) <= LONG_TEXT:
        return body
    return format_html(
        '<details class="json"><summary><bdi>{}</bdi> … <span class="note-text">{} characters</span></summary>'
        "{}</details>",
        words[:80].replace("\n", " "),
        f"{len(words):,}",
        body,
    )


# --- files inside ----------------------------------------------------------------------------------------------------


def without_files(value: object, take: Callable[[str, str], str], depth: int = 0) -> object:
    """The value with every data URL replaced by what `take(media_type, url)` says of it."""
    if isinstance(value, str):
        found = _DATA_URL.match(value) if len(value) >= SHORTEST_FILE else None
        return take(found[1].lower(), value) if found else value
    if depth > DEEPEST:
        return value
    if isinstance(value, Mapping):
        return {key: without_files(one, take, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_files(one, take, depth + 1) for one in value]
    return value


def as_value(text: str) -> object:
    """The object or list that a text spells, None where it is none: tools answer in JSON."""
    if len(text) > 200_000 or text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None
