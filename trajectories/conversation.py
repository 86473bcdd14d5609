"""The steps of a trajectory as its page shows them: what was said, tool calls with what came of them, each thing once.

A step's lines are what its calls' prompts add to the calls before, the answers, and what the agent did. A tool's
message belongs to the call that asked for it: it stands below that one, and not again in the next prompt.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from trajectories import folding, shown, transcripts
from trajectories.models import Blob
from trajectories.payloads import LlmCallPayload, Message, StepPayload

RASTER = ("image/png", "image/jpeg", "image/gif", "image/webp")  # shown; an SVG may hold scripts and is only handed out
KINDS = frozenset(
    ("system", "developer", "user", "assistant", "tool", "function", "environment", "provider", "action", "reasoning",
     "call", "error")
)  # fmt: skip
LONG = 1_500  # characters; a longer text is folded
LONG_RESULT = 600  # of a tool's answer
SHOWN = 20_000  # characters of one text that a page has
LINES_A_STEP = 200
CHARACTERS_A_PAGE = 600_000  # of HTML, roughly: then the page ends early, with one step at least


@dataclass(frozen=True)
class Picture:
    """An image or another file inside a recording, handed out by an address of its own."""

    url: str
    media_type: str
    characters: int  # of the data URL, or bytes of a blob
    sha256: str
    is_shown: bool


@dataclass
class Line:
    """One thing that was said or done."""

    role: str  # as it was sent; `kind` is the one that pages know the look of
    text: str = ""
    note: str = ""  # tool, provider
    facts: str = ""  # model, tokens
    tree: str = ""  # HTML, in place of the text: JSON to be folded
    is_context: bool = False
    is_folded: bool = False
    left_out: int = 0  # characters
    files: Sequence[Picture] = ()
    results: "list[Line]" = field(default_factory=list)  # of a tool call
    latency_ms: float | None = None
    share: float | None = None  # of the slowest call on the page, 0 to 100

    @property
    def kind(self) -> str:
        return self.role if self.role in KINDS else "other"

    @property
    def seconds(self) -> float | None:
        return None if self.latency_ms is None else self.latency_ms / 1000

    @property
    def start(self) -> str:
        return " ".join(self.text[:160].split())

    @property
    def characters(self) -> int:
        return len(self.text) + self.left_out

    @property
    def weight(self) -> int:
        """Characters of the page that it takes."""
        own = len(self.tree) + len(self.text) + 300
        return own + sum(one.weight for one in self.results)


@dataclass(frozen=True)
class StepView:
    number: int
    timestamp: object
    lines: Sequence[Line]
    reward: float | None
    left_out: int = 0  # lines
    judged: Sequence[object] = ()  # what was said of this step alone

    @property
    def weight(self) -> int:
        return sum(line.weight for line in self.lines)


class Files:
    """Large parts and pictures of a trajectory: put marks' previews into texts, and addresses to files."""

    def __init__(self, url: str, marks: Mapping[str, int]) -> None:
        self.url = url  # of the trajectory's pages, with a slash at its end
        rows = Blob.objects.in_bulk(set(marks.values())) if marks else {}
        self.blobs = {mark: rows.get(pk) for mark, pk in marks.items()}
        names = sorted(marks, key=len, reverse=True)  # mark:1 is the beginning of mark:12
        self.any = re.compile("|".join(map(re.escape, names))) if names else None

    def of_blob(self, row: Blob) -> Picture:
        return Picture(
            f"{self.url}blob/{row.pk}/",
            row.media_type or row.kind,
            row.raw_size,
            bytes(row.content_hash).hex(),
            row.media_type in RASTER,
        )

    def of_url(self, step: int, media_type: str, data_url: str) -> Picture:
        digest = hashlib.sha256(data_url.encode("utf-8", "surrogatepass")).hexdigest()
        return Picture(f"{self.url}file/{step}/{digest}/", media_type[:80], len(data_url), digest, media_type in RASTER)


class _Spoken(NamedTuple):
    """A tool call that waits for what comes of it."""

    tool_call_id: str
    line: Line


class Reader:
    """Makes lines of steps that come one after the other."""

    def __init__(self, files: Files, position: int | None) -> None:
        """`position`: of the first call to come, through the whole trajectory; None: not known."""
        self.files = files
        self.position = position
        self.prompt: Sequence[Message] = ()  # of the call before, where it is known whole
        self.answer: Message | None = None
        self.waiting: list[_Spoken] = []
        self.step = 0

    def view(self, number: int, step: StepPayload) -> StepView:
        self.step = number
        lines: list[Line] = []
        if step.environment_state:
            lines.append(self.json("environment", step.environment_state))
        for access in step.provider_accesses:
            lines.append(self.json("provider", access.data, f"{access.provider_name} {access.purpose or ''}"))
        for call in step.llm_calls:
            lines += self.prompt_lines(call)
            lines += self.answer_lines(call)
            lines += self.messages(call.closing_messages)
        lines += self.action_lines(step)
        kept = lines[:LINES_A_STEP]
        return StepView(number, step.timestamp, kept, step.reward, len(lines) - len(kept))

    def results_of(self, step: StepPayload) -> None:
        """What the beginning of the next step, which is not shown, tells of this one's tool calls."""
        if step.llm_calls:
            fresh, _ = self.fresh(step.llm_calls[0])
            for message in fresh:
                if not self._pair(message):
                    break

    # --- prompts -----------------------------------------------------------------------------------------------------

    def fresh(self, call: LlmCallPayload) -> tuple[Sequence[Message], str]:
        """What the call's prompt adds to what stands on the page, and where it goes on from when that is not the
        call before."""
        reference = call.prompt_ref
        if reference is not None and call.messages is None:
            added: Sequence[Message] = reference.append
            is_next = self.position is None or reference.call == self.position - 1
            if added and added[0].get("role") == "assistant" and self._is_answer(added[0]):
                added = added[1:]
            return added, "" if is_next else f"goes on from call {reference.call}"
        prompt = transcripts.own_prompt(call)
        same = 0
        for one, other in zip(prompt, self.prompt, strict=False):
            if one != other:
                break
            same += 1
        if same and same == len(self.prompt) and same < len(prompt) and prompt[same].get("role") == "assistant":
            same += 1
        return prompt[same:], ""

    def _is_answer(self, message: Message) -> bool:
        """Whether it is what the call before answered, decorated on its way back."""
        return self.answer is None or transcripts.text_of(message) == transcripts.text_of(self.answer)

    def prompt_lines(self, call: LlmCallPayload) -> list[Line]:
        fresh, note = self.fresh(call)
        lines = [Line("note", note, is_context=True)] if note else []
        if call.messages is not None or call.prompt_ref is None:
            self.prompt = transcripts.own_prompt(call)
        else:
            before = (self.answer,) if self.answer is not None else ()
            self.prompt = (*self.prompt, *before, *fresh) if self.prompt else ()
        return lines + self.messages(fresh)

    def messages(self, said: Sequence[Message]) -> list[Line]:
        return [line for message in said if not self._pair(message) for line in self.message(message)]

    def _pair(self, message: Message) -> bool:
        """Put a tool's message below its call. Ids repeat in real recordings, and some are missing: then the order
        tells which."""
        if message.get("role") not in ("tool", "function") or not self.waiting:
            return False
        told = message.get("tool_call_id")
        named = [one for one in self.waiting if told and one.tool_call_id == told]
        free = [one for one in named or ([] if told else self.waiting) if not one.line.results]
        if not free and not named:
            return False
        target = (free or named)[0]
        lines = self.message(message)
        known = [line.text for line in target.line.results]
        target.line.results += [line for line in lines if line.tree or line.text not in known]
        return True

    def message(self, message: Message) -> list[Line]:
        role = shown.visible(str(message.get("role") or "message")[:40])
        name = message.get("name")
        files: list[Picture] = []
        text = transcripts.text_of(message)
        content = message.get("content")
        if isinstance(content, list):
            words = []
            for part in content:
                self.take(part, files)
                kind = str(part.get("type") or "") if isinstance(part, dict) else ""
                if isinstance(part, dict) and not part.get("text") and kind not in ("text", ""):
                    words.append(f"[{kind[:40]}{_address(part)}]")
            text = "\n".join(one for one in (text.strip("\n"), *words) if one)
        elif content is not None and not isinstance(content, str):
            text = folding.told(content)
        calls = message.get("tool_calls")
        context = role == "assistant"
        lines = []
        if text or files or not calls:
            is_result = role in ("tool", "function")
            lines.append(self.text(role, text, str(name or ""), files=files, context=context, is_result=is_result))
        lines += [self.call(one, context=True) for one in calls] if isinstance(calls, list) else []
        return lines

    # --- answers and actions -----------------------------------------------------------------------------------------

    def answer_lines(self, call: LlmCallPayload) -> list[Line]:
        lines: list[Line] = []
        if call.reasoning:
            lines.append(self.text("reasoning", call.reasoning))
        answer = transcripts.answer_of(call)
        self.answer = answer
        text = transcripts.text_of(answer) if answer else ""
        called = answer.get("tool_calls") if answer else None
        listed = [one for one in called if isinstance(one, dict)] if isinstance(called, list) else []
        is_context = call.trainable is False
        if text or not (listed or lines):
            lines.append(self.text("assistant", text, context=is_context))
        if listed:
            self.waiting = []
        for one in listed:
            line = self.call(one, context=is_context)
            self.waiting.append(_Spoken(str(one.get("id") or ""), line))
            lines.append(line)
        if call.error is not None:
            lines.append(self.json("error", call.error))
        lines[0].facts = _facts(call, self.position)
        lines[0].latency_ms = call.latency_ms
        if self.position is not None:
            self.position += 1
        return lines

    def call(self, one: object, *, context: bool = False) -> Line:
        function = one.get("function") if isinstance(one, dict) else None
        inner = function if isinstance(function, dict) else one
        if not isinstance(inner, dict):
            return self.json("call", one)
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            arguments = folding.as_value(arguments) or arguments
        line = self.json("call", arguments, str(inner.get("name") or "unnamed"))
        line.is_context = context
        return line

    def action_lines(self, step: StepPayload) -> list[Line]:
        action = step.action
        if action is None:
            return []
        outcome = "" if action.success is None else (", succeeded" if action.success else ", failed")
        told = {"parameters": action.parameters, "reasoning": action.reasoning, "result": action.result}
        known = {key: value for key, value in told.items() if value not in (None, "", {})}
        lines = [self.json("action", known or None, f"{action.action_type}{outcome}")]
        if action.error is not None:
            lines.append(self.json("error", action.error))
        by_order = iter(list(self.waiting))
        for one in action.calls:
            result = self.json("tool", one.result if one.error is None else one.error)
            result.is_folded = result.characters > LONG_RESULT
            named = (two for two in self.waiting if one.tool_call_id and two.tool_call_id == one.tool_call_id)
            given = next((two for two in named if not two.line.results), None) or next(by_order, None)
            if given is None:
                lines.append(result)
            elif result.text not in [line.text for line in given.line.results]:
                given.line.results.append(result)
        return lines

    # --- parts -------------------------------------------------------------------------------------------------------

    def take(self, value: object, files: list[Picture]) -> object:
        """The value without the files in it, which are added to `files`."""

        def one(media_type: str, url: str) -> str:
            files.append(self.files.of_url(self.step, media_type, url))
            return f"[{media_type[:80]}, {shown.size(len(url))}]"

        return folding.without_files(value, one)

    def text(
        self,
        role: str,
        words: str,
        note: str = "",
        *,
        files: Sequence[Picture] = (),
        context: bool = False,
        is_result: bool = False,
    ) -> Line:
        held = list(files)
        told = self.take(words, held)
        said = self.unmark(str(told), held)
        value = folding.as_value(said) if is_result else None
        line = Line(role, note=shown.visible(note[:200].strip()), is_context=context, files=held)
        line.text = shown.visible(said[:SHOWN])
        line.left_out = max(0, len(said) - SHOWN)
        if value is not None:
            line.tree = folding.tree(value)
        limit = LONG_RESULT if is_result else LONG
        is_prompt = role in ("system", "developer")
        line.is_folded = len(said) > limit or said.count("\n") > 24 or (is_prompt and len(said) > 240)
        return line

    def json(self, role: str, value: object, note: str = "") -> Line:
        if isinstance(value, str):
            return self.text(role, value, note, is_result=role == "tool")
        files: list[Picture] = []
        told = self.take(value, files)
        if self.files.any is not None:
            told = self._unmarked(told, files)
        line = Line(role, note=shown.visible(note[:200].strip()), files=files)
        if value is not None:
            line.tree = folding.tree(told)
            said = folding.told(told)
            line.text, line.left_out = shown.visible(said[:SHOWN]), max(0, len(said) - SHOWN)
            line.is_folded = len(said) > 4 * LONG
        return line

    def unmark(self, text: str, files: list[Picture]) -> str:
        """Previews in the places of marks, whose parts are added to `files`."""
        if self.files.any is None:
            return text
        seen: list[int] = []

        def preview(found: "re.Match[str]") -> str:
            row = self.files.blobs.get(found[0])
            if row is None:
                return "(a part that is lost)"
            if row.pk not in seen:
                seen.append(row.pk)
                files.append(self.files.of_blob(row))
            return f"[{row.media_type}, {shown.size(row.raw_size)}]" if row.media_type else f"{row.preview} …"

        return self.files.any.sub(preview, text)

    def _unmarked(self, value: object, files: list[Picture], depth: int = 0) -> object:
        if isinstance(value, str):
            return self.unmark(value, files)
        if depth > folding.DEEPEST:
            return value
        if isinstance(value, Mapping):
            return {key: self._unmarked(one, files, depth + 1) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._unmarked(one, files, depth + 1) for one in value]
        return value


def _facts(call: LlmCallPayload, position: int | None) -> str:
    told = [] if position is None else [f"call {position}"]
    told.append(call.model_version or call.model or "model not named")
    if call.purpose:
        told.append(call.purpose)
    if call.temperature is not None:
        told.append(f"T {call.temperature:g}")
    counts = [
        (call.prompt_tokens if call.prompt_tokens is not None else _length(call.prompt_token_ids), "in"),
        (call.completion_tokens if call.completion_tokens is not None else _length(call.token_ids), "out"),
    ]
    if known := [f"{n:,} {way}" for n, way in counts if n is not None]:
        told.append(f"{', '.join(known)} tokens")
    if call.finish_reason and call.finish_reason not in ("stop", "tool_calls"):
        told.append(f"ended by {call.finish_reason}")
    if call.trainable is False:
        told.append("context, not trained")
    return shown.visible(" · ".join(one[:120] for one in told))


def _length(ids: Sequence[int] | None) -> int | None:
    return None if ids is None else len(ids)


def _address(part: Mapping[str, object]) -> str:
    """Of an image that lies elsewhere: told, never asked for."""
    found = part.get("image_url") or part.get("url")
    url = found.get("url") if isinstance(found, dict) else found
    return f" {url[:300]}" if isinstance(url, str) and not url.startswith("data:") else ""
