"""What of a trajectory can be found by its words: what was said in it, capped, and the words of that.

Said is what users, agents (with reasoning and tool calls), tools and environments' errors said, as it was stored: after
redaction. System prompts, tool lists, metadata and the calls of graders are not. Cutting into words happens here alone,
for texts and for questions, so that what is asked meets what was kept: a word is a run of letters and digits without
regard to case; an underscore, a dot, a slash part words, and Chinese and Japanese have one a character. A question of
several adjacent words is a phrase, so `get_user` and `src/main.py` are found as they stand and by their parts.
"""

import logging
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import psycopg
from django.db import connection

from trajectories import codec, segments, transcripts
from trajectories.models import Blob, SearchText, Trajectory
from trajectories.payloads import ActionPayload, LlmCallPayload, Message, TrajectoryPayload

logger = logging.getLogger(__name__)

LIMIT = 32_768  # characters of one trajectory: its first half and its last
PART = 6_000  # characters of one message, so that no single tool result takes the room of all others
WORD = 64  # characters of a word that count
LEVELS = (1 << 18, 1 << 14, 1 << 10)  # trajectories in a block, by pk; a walk asks for the largest that fit

NO_SPACES = "\u2e80-\ua4cf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
WORDS = re.compile(f"[{NO_SPACES}]|[^\\W_{NO_SPACES}]+")
_OUT = re.compile("[\x00\x1e\x1f]")  # PostgreSQL keeps none of the first; the others part a body
_ASCII_WORDS = str.maketrans({chr(code): " " for code in range(128) if not chr(code).isalnum()})
_UNSAID = ("system", "developer")
RECORD, FIELD = "\x1e", "\x1f"


class Said(NamedTuple):
    """One thing that was said."""

    step: int
    role: str  # user, assistant, reasoning, call, tool, error, action, or as the sender has it
    text: str


# --- what was said -------------------------------------------------------------------------------------------------


def said(payload: TrajectoryPayload, previews: Mapping[str, str] | None = None) -> Iterator[Said]:
    """All that was said, each thing once, in order. `previews`: of large parts that lie elsewhere, by their mark."""
    told: set[tuple[str, str]] = set()
    seen: set[int] = set()  # by identity: prompts of growing conversations share their messages
    for number, step in enumerate(payload.steps):
        for call in step.llm_calls:
            if call.purpose == transcripts.GRADING:
                continue
            for message in _fresh(call, seen):
                yield from _once(number, _of_message(message, previews), told)
            answer = transcripts.answer_of(call)
            if answer is not None:
                yield from _once(number, _of_message(answer, previews), told)
            if call.error is not None:
                yield from _once(number, [("error", _text(call.error, previews))], told)
            for message in call.closing_messages:
                yield from _once(number, _of_message(message, previews), told)
        if step.action is not None:
            yield from _once(number, _of_action(step.action, previews), told)
    for message in payload.closing_messages:
        yield from _once(max(0, len(payload.steps) - 1), _of_message(message, previews), told)


def _once(step: int, parts: Iterable[tuple[str, str]], told: set[tuple[str, str]]) -> Iterator[Said]:
    for part in parts:
        if part[1] and part not in told:
            told.add(part)
            yield Said(step, *part)


def _fresh(call: LlmCallPayload, seen: set[int]) -> Sequence[Message]:
    """The messages of a prompt that no earlier prompt had, as far as can be told without reading them."""
    if call.messages is None:
        return call.prompt_ref.append if call.prompt_ref is not None else transcripts.own_prompt(call)
    fresh: list[Message] = []
    for message in reversed(call.messages):  # these live as long as the payload, so that an identity is one message's
        if id(message) in seen:
            break
        seen.add(id(message))
        fresh.append(message)
    return fresh[::-1]


def _of_message(message: Message, previews: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    role = str(message.get("role") or "message")[:40]
    if role in _UNSAID:
        return
    if reasoning := message.get("reasoning_content"):
        yield "reasoning", _text(reasoning, previews)
    yield role, _text(transcripts.text_of(message), previews)
    called = message.get("tool_calls")
    for one in called if isinstance(called, list) else ():
        function = one.get("function") if isinstance(one, dict) else None
        if isinstance(function, dict):
            yield "call", f"{function.get('name')} {_text(function.get('arguments'), previews)}"
        else:
            yield "call", _text(one, previews)


def _of_action(action: ActionPayload, previews: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    if action.reasoning:
        yield "reasoning", _text(action.reasoning, previews)
    if action.action_type or action.parameters:
        yield "action", f"{action.action_type} {_text(action.parameters, previews)}".strip()
    yield "tool", _text(action.result, previews)
    yield "error", _text(action.error, previews)
    for one in action.calls:
        yield "tool", _text(one.result, previews)
        yield "error", _text(one.error, previews)


def _text(value: object, previews: Mapping[str, str] | None) -> str:
    """Any value as text; in the place of a large part its beginning."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    for mark in sorted(previews or (), key=len, reverse=True):  # mark:1 is the beginning of mark:12
        if previews and mark in text:
            text = text.replace(mark, previews[mark])
    return text


def capped(parts: Iterable[Said]) -> tuple[list[Said], bool]:
    """The first and the last of them, `LIMIT` characters in all; and whether anything is missing."""
    half = LIMIT // 2
    head: list[Said] = []
    tail: deque[Said] = deque()
    room, held, cut = half, 0, False
    for whole in parts:
        text = whole.text
        if len(text) > PART:
            cut = True
            pieces = [text[: PART * 2 // 3], text[-PART // 3 :]]  # two, so that no phrase reaches over the gap
        else:
            pieces = [text]
        for piece in pieces:
            if not tail and len(piece) <= room:
                head.append(Said(whole.step, whole.role, piece))
                room -= len(piece)
                continue
            tail.append(Said(whole.step, whole.role, piece))
            held += len(piece)
            while held > half:
                held -= len(tail.popleft().text)
                cut = True
    return [*head, *tail], cut


# --- as it is kept -------------------------------------------------------------------------------------------------


def packed(parts: Iterable[Said]) -> bytes:
    joined = "".join([f"{RECORD}{one.step}{FIELD}{_clean(one.role)}{FIELD}{_clean(one.text)}" for one in parts])
    return codec.compress(joined.encode("utf-8", "replace"))


def _clean(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return _OUT.sub(" ", text) if _OUT.search(text) else text


def opened(body: "bytes | memoryview[int]") -> str:
    return codec.decompress(bytes(body), 16 * LIMIT).decode()


def parted(body: str) -> list[Said]:
    """What was said, of an opened body."""
    parts = (one.split(FIELD, 2) for one in body.split(RECORD)[1:])
    return [Said(int(step), role, text) for step, role, text in parts]


def words_of(text: str) -> list[str]:
    """The words of a text, in order, as they are kept and asked for."""
    if text.isascii():  # a quarter of the time
        found = text.lower().translate(_ASCII_WORDS).split()
    else:
        found = WORDS.findall(unicodedata.normalize("NFC", text).casefold())
    return [word[:WORD] for word in found]


def vector(parts: Iterable[Said], marks: Sequence[str]) -> str:
    """The words and marks, each once, as PostgreSQL's tsvector reads them.

    Their places are not kept: they would double it, and whether words are neighbours is soon seen in the text itself.
    """
    words = set(words_of("\n".join([part.text for part in parts])))
    return " ".join(map(quoted, (*marks, *words)))


def quoted(lexeme: str) -> str:
    """For PostgreSQL's tsvector and tsquery."""
    return "'" + lexeme.replace("\\", "\\\\").replace("'", "''") + "'"


# What stands in no text, because it is no word: which project, and which blocks of trajectories.


def project_mark(pk: int) -> str:
    return f"@{pk}"


def block_mark(size: int, number: int) -> str:
    return f"#{LEVELS.index(size)}.{number}"


def marks_of(trajectory: Trajectory) -> list[str]:
    return [project_mark(trajectory.project_id), *(block_mark(size, trajectory.pk // size) for size in LEVELS)]


# --- writing -------------------------------------------------------------------------------------------------------

_COLUMNS = "trajectory_id, project_id, words, body, n_characters, is_cut"


def write(rows: Sequence[Trajectory], loaded: Mapping[int, segments.LoadedPayload]) -> None:
    """The search texts of some trajectories, made anew from their payloads, whose large parts are left closed."""
    SearchText.objects.filter(trajectory__in=[row.pk for row in rows]).delete()
    previews = _previews(loaded.values())
    with connection.wrap_database_errors, psycopg.Cursor(connection.connection) as cursor:
        with cursor.copy(f"copy search_texts ({_COLUMNS}) from stdin") as copy:
            for row in rows:
                parts, cut = _searched(row, loaded[row.pk], previews)
                size = sum(len(part.text) for part in parts)
                copy.write_row((row.pk, row.project_id, vector(parts, marks_of(row)), packed(parts), size, cut))


def _searched(row: Trajectory, payload: segments.LoadedPayload, previews: Mapping[int, str]) -> tuple[list[Said], bool]:
    own = {mark: previews.get(pk, "") for mark, pk in payload.marks.items()}
    try:
        parts, cut = capped(said(payload, own))
    except Exception:  # one recording that nobody thought of must not hold up the groups of all others
        logger.exception("trajectory %s cannot be made searchable", row.pk)
        return [], True
    return parts, cut or bool(own)


def _previews(payloads: Iterable[segments.LoadedPayload]) -> dict[int, str]:
    pks = {pk for payload in payloads for pk in payload.marks.values()}
    return dict(Blob.objects.filter(pk__in=pks).values_list("pk", "preview")) if pks else {}
