"""How a payload is stored and read back: compressed segments of bounded size, each text once.

A prompt that goes on from an earlier one is kept as what it adds; system prompts and tool lists lie in `shared_texts`,
named by their place in the row's list. Segment 0 is the header with, where all of it is small, all steps; else it has
no steps (first 0, last -1) and a page of a long run opens one other segment.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
from django.core.files.storage import storages
from django.db.models import Q

from trajectories import blobs, digests, payloads
from trajectories.codec import decompress
from trajectories.formats import messages as messages_format
from trajectories.formats.chat import SHARED_BYTES, Chat, ChatPayload
from trajectories.models import SharedText, Trajectory, TrajectorySegment
from trajectories.payloads import LlmCallPayload, Message, PromptRef, StepPayload, TrajectoryPayload
from trajectories.transcripts import OriginOfCall, answer_as_sent

SEGMENT_BYTES = 256 * 1024  # of JSON before compression; one step alone may be larger
LOOK_BACK = 4  # earlier calls whose prompt may be the beginning of this one's

Tools = list[dict[str, object]]


class StoredPrompt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`messages` of a call without what is stored elsewhere."""

    call: int | None = None  # it begins as that call's prompt …
    keep: int = 0  # … with its first so many messages …
    answer: bool = False  # … and its answer …
    append: tuple[Message, ...] = ()  # … and goes on with these
    system: int | None = None  # the content of append[0] is this shared text


class StoredCall(LlmCallPayload, frozen=True, kw_only=True):
    stored_prompt: StoredPrompt | None = None
    system_text: int | None = None
    tools_text: int | None = None


class StoredStep(StepPayload, frozen=True, kw_only=True):
    llm_calls: tuple[StoredCall, ...] = ()


class StoredHeader(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    payload: TrajectoryPayload  # without steps, reward, inline scenario, shared tools
    tools_text: int | None = None
    origins: tuple[OriginOfCall, ...] = ()  # one for all calls, or one a call
    derived_actions: bool = False  # actions are made from the tool messages again


class StoredChat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A plain conversation, as it was sent (formats/chat.py), without reward, inline scenario and shared texts."""

    sent: messages_format.MessagesPayload
    system: int | None = None  # the content of messages[0] is this shared text
    tools_text: int | None = None
    origins: tuple[OriginOfCall, ...] = ()


class StoredSegment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Header and steps, or in place of both a conversation. Where parts lie elsewhere, it begins with `blobs.Held`."""

    header: StoredHeader | None = None
    steps: tuple[StoredStep, ...] = ()
    chat: StoredChat | None = None


class LoadedPayload(TrajectoryPayload, frozen=True, kw_only=True):
    """A payload from the store: it knows where its calls' answers came from."""

    origins: tuple[OriginOfCall, ...] = ()
    marks: dict[str, int] = {}  # texts that stand for blobs, where those were left closed


class Text(msgspec.Struct, frozen=True):
    """A text to be shared; compressed only where it turns out to be new."""

    kind: str  # system or tools
    text_hash: bytes
    raw: bytes


class Piece(msgspec.Struct, frozen=True):
    """A segment to be written."""

    seq: int
    first_step: int
    last_step: int
    raw: bytes  # JSON, compressed when it is written


class Stored(NamedTuple):
    """Of a segment's row what it takes to read it: a model's instance would cost as much as decompressing."""

    data: "bytes | memoryview[int] | None"
    raw_size: int
    dictionary: int | None
    location: str


class Packed(msgspec.Struct, frozen=True):
    pieces: tuple[Piece, ...]
    texts: tuple[Text, ...]  # in the order of the row's `shared_texts`


_decoder = msgspec.json.Decoder(StoredSegment)


class _Texts:
    """The shared texts of one trajectory, by content."""

    def __init__(self, key: bytes, known: Sequence[bytes] = ()) -> None:
        self.key = key
        self.places: dict[bytes, int] = {one: place for place, one in enumerate(known)}
        self.new: list[Text] = []
        self.last_tools: tuple[Tools, int | None] | None = None

    def place(self, kind: str, raw: bytes, digest: bytes = b"") -> int | None:
        """Where the text will be found, or None when it is too short to share. `digest`: its SHA-256, if known."""
        if len(raw) < SHARED_BYTES:
            return None
        text_hash = digests.keyed(self.key, digest or digests.sha256(raw))
        place = self.places.get(text_hash)
        if place is None:
            place = self.places[text_hash] = len(self.places)
            self.new.append(Text(kind, text_hash, raw))
        return place

    def tools(self, tools: Tools) -> int | None:
        if self.last_tools is None or self.last_tools[0] != tools:
            self.last_tools = (tools, self.place("tools", payloads.encode(tools)))
        return self.last_tools[1]


def pack(
    payload: TrajectoryPayload,
    origins: Sequence[OriginOfCall],
    *,
    key: bytes,
    derived_actions: bool = False,
    held: blobs.Held | None = None,
) -> Packed:
    """The payload as segments and shared texts. `key` keys the hashes of the texts; `held`: what was taken out."""
    texts = _Texts(key)
    steps = messages_format.without_actions(payload.steps) if derived_actions else payload.steps
    shared_tools = texts.tools(payload.tools) if payload.tools else None
    header = StoredHeader(
        payload=msgspec.structs.replace(
            payload,
            steps=(),
            reward=None,
            reward_components={},
            scenario=None,
            scenario_id=payload.scenario_ref(),
            tools=None if shared_tools is not None else payload.tools,
        ),
        tools_text=shared_tools,
        origins=tuple(origins[:1]) if len(set(origins)) <= 1 else tuple(origins),
        derived_actions=derived_actions,
    )
    stored = _compact(steps, texts)
    whole = payloads.encode(StoredSegment(header=header, steps=()))
    parts = [payloads.encode(step) for step in stored]
    if len(whole) + sum(map(len, parts)) <= SEGMENT_BYTES:
        return Packed((_piece(0, 0, whole, parts, held, with_header=True),), tuple(texts.new))
    return Packed((_piece(0, 0, whole, [], held, with_header=True), *_pieces(1, 0, parts, held)), tuple(texts.new))


class _Chat(msgspec.Struct, omit_defaults=True):
    """StoredChat on the way in: its messages are JSON already."""

    sent: ChatPayload
    system: int | None = None
    tools_text: int | None = None
    origins: tuple[OriginOfCall, ...] = ()


def pack_chat(chat: Chat, steps: int, origins: Sequence[OriginOfCall], *, key: bytes) -> Packed:
    """A plain conversation of so many steps in one segment."""
    texts = _Texts(key)
    sent = chat.sent
    shared_tools = texts.tools(sent.tools) if sent.tools else None
    bare = msgspec.structs.replace(
        sent,
        reward=None,
        reward_components={},
        scenario=None,
        scenario_id=sent.scenario_ref(),
        tools=None if shared_tools is not None else sent.tools,
        messages=msgspec.Raw(chat.body),
    )
    system = texts.place("system", chat.system.raw, chat.system.digest) if chat.system else None
    raw = b'{"chat":%b}' % payloads.encode(_Chat(bare, system, shared_tools, tuple(origins[:1])))
    return Packed((Piece(0, 0, steps - 1, raw),), tuple(texts.new))


def pack_header(payload: TrajectoryPayload, held: blobs.Held | None = None) -> Piece:
    """The header of an open trajectory; sealing makes it anew."""
    bare = msgspec.structs.replace(
        payload, steps=(), reward=None, reward_components={}, scenario=None, scenario_id=payload.scenario_ref()
    )
    return _piece(0, 0, payloads.encode(StoredSegment(header=StoredHeader(payload=bare))), [], held, with_header=True)


def pack_steps(
    steps: Sequence[StepPayload], *, seq: int, first_step: int, held: blobs.Held | None = None
) -> tuple[Piece, ...]:
    """Steps that are appended to an open trajectory: whole as they are; sealing compacts them."""
    return tuple(_pieces(seq, first_step, [payloads.encode(step) for step in steps], held))


def _pieces(seq: int, first_step: int, parts: Sequence[bytes], held: blobs.Held | None) -> Iterable[Piece]:
    waiting: list[bytes] = []
    size = 0
    for part in parts:
        if waiting and size + len(part) > SEGMENT_BYTES:
            yield _piece(seq, first_step, b"", waiting, held)
            seq, first_step, waiting, size = seq + 1, first_step + len(waiting), [], 0
        waiting.append(part)
        size += len(part)
    if waiting:
        yield _piece(seq, first_step, b"", waiting, held)


def _piece(
    seq: int,
    first_step: int,
    header: bytes,
    steps: Sequence[bytes],
    held: blobs.Held | None = None,
    *,
    with_header: bool = False,
) -> Piece:
    """One segment from JSON that is made already: encoding the steps twice would cost as much as compressing them."""
    head = header[:-1] + (b"," if steps else b"") if with_header else b"{"
    raw = head + (b'"steps":[' + b",".join(steps) + b"]" if steps else b"") + b"}"
    if held is not None and held.blob_mark.encode() in raw:
        raw = held.prefix() + raw[1:]
    return Piece(seq, first_step, first_step + len(steps) - 1, raw)


def _compact(steps: Sequence[StepPayload], texts: _Texts) -> list[StepPayload]:
    """The steps with every call's prompt, system prompt and tools as references where they are known already."""
    made: list[StepPayload] = []
    recent: list[tuple[int, tuple[Message, ...], Message | None]] = []  # (position, prompt, answer) of whole prompts
    position = 0
    for step in steps:
        calls: list[LlmCallPayload] = []
        for call in step.llm_calls:
            calls.append(_compact_call(call, recent, texts))
            if call.messages is not None:
                recent = [*recent[-LOOK_BACK + 1 :], (position, call.messages, answer_as_sent(call))]
            position += 1
        made.append(msgspec.structs.replace(step, llm_calls=tuple(calls)) if calls else step)
    return made


def _compact_call(
    call: LlmCallPayload, recent: Sequence[tuple[int, tuple[Message, ...], Message | None]], texts: _Texts
) -> LlmCallPayload:
    changed: dict[str, object] = {}
    if call.tools and (place := texts.tools(call.tools)) is not None:
        changed |= {"tools": None, "tools_text": place}
    if call.system_prompt and (place := texts.place("system", call.system_prompt.encode())) is not None:
        changed |= {"system_prompt": None, "system_text": place}
    if call.messages:
        stored = _stored_prompt(call.messages, recent, texts)
        if stored is not None:
            changed |= {"messages": None, "stored_prompt": stored}
    if not changed:
        return call
    kept = {name: getattr(call, name) for name in LlmCallPayload.__struct_fields__}
    return StoredCall(**{**kept, **changed})


def _stored_prompt(
    prompt: tuple[Message, ...],
    recent: Sequence[tuple[int, tuple[Message, ...], Message | None]],
    texts: _Texts,
) -> StoredPrompt | None:
    best: StoredPrompt | None = None
    for position, earlier, answer in reversed(recent):
        keep = 0
        for one, other in zip(prompt, earlier, strict=False):
            if one != other:
                break
            keep += 1
        if keep > (best.keep if best else 0):
            # only what equals the answer exactly can be put back in its place
            whole = keep == len(earlier) and keep < len(prompt) and prompt[keep] == answer
            best = StoredPrompt(call=position, keep=keep, answer=whole, append=prompt[keep + whole :])
            if whole:
                break
    if best is not None:
        return best
    head = prompt[0]
    content = head.get("content")
    if head.get("role") in ("system", "developer") and isinstance(content, str):
        place = texts.place("system", content.encode())
        if place is not None:
            bare = {key: value for key, value in head.items() if key != "content"}
            return StoredPrompt(append=(bare, *prompt[1:]), system=place)
    return None


def load(trajectory: Trajectory, *, open_blobs: bool = True) -> LoadedPayload:
    """The payload as it was sent (after redaction), with the reward as it is known now.

    `open_blobs=False` leaves the marks of parts that lie elsewhere, which `marks` then names.

    Raises:
        LookupError: the row has no payload. Away: a part that lies elsewhere cannot be read.
    """
    return load_many([trajectory], open_blobs=open_blobs)[trajectory.pk]


def load_many(
    trajectories: Sequence[Trajectory],
    *,
    with_actions: bool = True,
    open_blobs: bool = True,
    before_step: int | None = None,
    faults: dict[int, Exception] | None = None,
) -> dict[int, LoadedPayload]:
    """The same for many in two queries, by pk. `with_actions=False` spares making them where calls alone matter.

    Args:
        before_step: segments that begin at this step or later are left closed.
        faults: where given, what cannot be read is noted here and left out; else the first fault is raised.
    """
    rows: dict[int, list[Stored]] = {trajectory.pk: [] for trajectory in trajectories}
    found = TrajectorySegment.objects.filter(trajectory__in=list(rows)).order_by("trajectory_id", "seq")
    if before_step is not None:
        found = found.filter(first_step__lt=before_step)
    columns = found.values_list("trajectory_id", "data", "raw_size", "dictionary", "location")
    for pk, data, raw_size, dictionary, location in columns:
        rows[pk].append(Stored(data, raw_size, dictionary, location))
    wanted = {pk for trajectory in trajectories for pk in trajectory.shared_texts}
    texts = {text.pk: decompress(bytes(text.data), text.raw_size) for text in SharedText.objects.filter(pk__in=wanted)}
    loaded: dict[int, LoadedPayload] = {}
    for trajectory in trajectories:
        try:
            own = [texts[pk] for pk in trajectory.shared_texts]
            loaded[trajectory.pk] = _unpack(trajectory, rows[trajectory.pk], own, with_actions, open_blobs)
        except Exception as fault:
            if faults is None:
                raise
            faults[trajectory.pk] = fault
    return loaded


def has_payload(trajectory: Trajectory) -> bool:
    return trajectory.segments.exists()


def raw_of(row: TrajectorySegment | Stored) -> bytes:
    """The JSON of a segment, wherever it lies, with marks for what lies elsewhere."""
    if row.data is not None:
        return decompress(bytes(row.data), row.raw_size, row.dictionary)
    with storages["archive"].open(row.location, "rb") as stored:
        data: bytes = stored.read()
    return decompress(data, row.raw_size, row.dictionary)


def _unpack(
    trajectory: Trajectory,
    rows: Sequence[Stored],
    texts: Sequence[bytes],
    with_actions: bool,
    open_blobs: bool,
) -> LoadedPayload:
    header: StoredHeader | None = None
    stored: list[StoredStep] = []
    marks: dict[str, int] = {}
    for row in rows:
        raw = raw_of(row)
        if open_blobs:
            raw = blobs.put_back(raw)
        elif held := blobs.held_in(raw):
            marks |= held.marks()
        segment = _decoder.decode(raw)
        if segment.chat is not None:
            told = _of_chat(segment.chat, texts, with_actions=with_actions)
            return _loaded(trajectory, told, segment.chat.origins)
        header = header or segment.header
        stored.extend(segment.steps)
    if header is None:
        raise LookupError(f"trajectory {trajectory.trajectory_id} (row {trajectory.pk}) has no payload")
    steps = _expand(stored, texts)
    told = header.payload
    if header.derived_actions and with_actions:
        steps = messages_format.with_actions(steps, told.closing_messages)
    tools = told.tools
    if header.tools_text is not None:
        tools = msgspec.json.decode(texts[header.tools_text], type=Tools)
    told = msgspec.structs.replace(told, steps=tuple(steps), tools=tools)
    return _loaded(trajectory, told, header.origins, marks)


def _loaded(
    trajectory: Trajectory,
    told: TrajectoryPayload,
    origins: tuple[OriginOfCall, ...],
    marks: Mapping[str, int] | None = None,
) -> LoadedPayload:
    """With what the row knows better: the reward."""
    if len(origins) == 1:
        origins *= sum(len(step.llm_calls) for step in told.steps)
    components = {
        str(name): float(value) if isinstance(value, int | float) else None
        for name, value in (trajectory.reward_components or {}).items()
    }
    fields = {name: getattr(told, name) for name in TrajectoryPayload.__struct_fields__}
    fields |= {"reward": trajectory.reward, "reward_components": components}
    return LoadedPayload(**fields, origins=origins, marks=dict(marks or {}))


def _of_chat(chat: StoredChat, texts: Sequence[bytes], *, with_actions: bool = True) -> TrajectoryPayload:
    """A shared text that is not in `texts` is left out."""
    sent = chat.sent
    if chat.system is not None and chat.system < len(texts) and sent.messages:
        first, *rest = sent.messages
        sent = msgspec.structs.replace(sent, messages=({**first, "content": texts[chat.system].decode()}, *rest))
    if chat.tools_text is not None and chat.tools_text < len(texts):
        sent = msgspec.structs.replace(sent, tools=msgspec.json.decode(texts[chat.tools_text], type=Tools))
    return messages_format.laid_out(sent, actions=with_actions)


def _expand(stored: Sequence[StoredStep], texts: Sequence[bytes]) -> tuple[StepPayload, ...]:
    prompts: dict[int, tuple[Message, ...]] = {}
    calls_so_far: list[LlmCallPayload] = []
    steps: list[StepPayload] = []
    tools: dict[int, Tools] = {}
    for step in stored:
        calls: list[LlmCallPayload] = []
        for call in step.llm_calls:
            whole = _expand_call(call, texts, prompts, calls_so_far, tools)
            if whole.messages is not None:
                prompts[len(calls_so_far)] = whole.messages
            calls_so_far.append(whole)
            calls.append(whole)
        steps.append(_plain_step(step, tuple(calls)))
    return tuple(steps)


_STEP_FIELDS = tuple(name for name in StepPayload.__struct_fields__ if name != "llm_calls")
_CALL_FIELDS = LlmCallPayload.__struct_fields__


def _plain_step(step: StoredStep, calls: tuple[LlmCallPayload, ...]) -> StepPayload:
    return StepPayload(**{name: getattr(step, name) for name in _STEP_FIELDS}, llm_calls=calls)


def _expand_call(
    call: StoredCall,
    texts: Sequence[bytes],
    prompts: Mapping[int, tuple[Message, ...]],
    before: Sequence[LlmCallPayload],
    tools: dict[int, Tools],
) -> LlmCallPayload:
    fields = {name: getattr(call, name) for name in _CALL_FIELDS}
    if call.tools_text is not None:
        if call.tools_text not in tools:
            tools[call.tools_text] = msgspec.json.decode(texts[call.tools_text], type=Tools)
        fields["tools"] = tools[call.tools_text]
    if call.system_text is not None:
        fields["system_prompt"] = texts[call.system_text].decode()
    prompt = call.stored_prompt
    if prompt is not None:
        append = prompt.append
        if prompt.system is not None:
            append = ({**append[0], "content": texts[prompt.system].decode()}, *append[1:])
        if prompt.call is not None:
            answer = answer_as_sent(before[prompt.call]) if prompt.answer else None
            append = (*prompts[prompt.call][: prompt.keep], *((answer,) if answer else ()), *append)
        fields["messages"] = append
    return LlmCallPayload(**fields)


class Part(NamedTuple):
    """Some steps of a trajectory, and what is in no step. A prompt that goes on from an earlier call's is given as a
    reference to that call with what it adds; actions that are made from tool messages are not made."""

    header: TrajectoryPayload  # without steps; tools among it
    steps: tuple[StepPayload, ...]
    first: int  # number of the first of them
    marks: Mapping[str, int]  # texts that stand for blobs
    is_whole: bool  # one segment holds all steps
    stored: Sequence[Stored]
    texts: Sequence[bytes]


def part(trajectory: Trajectory, start: int, end: int) -> Part:
    """The steps from `start` to before `end`: as many segments are opened as they lie in, and the header's.

    Raises:
        LookupError: the row has no payload. OSError: an archived segment cannot be read.
    """
    found = list(
        TrajectorySegment.objects.filter(trajectory=trajectory)
        .filter(Q(seq=0) | Q(first_step__lt=end, last_step__gte=start))
        .order_by("seq")
        .values_list("first_step", "data", "raw_size", "dictionary", "location")
    )
    marks: dict[str, int] = {}
    opened: list[tuple[int, StoredSegment]] = []
    stored = [Stored(data, raw_size, dictionary, location) for _, data, raw_size, dictionary, location in found]
    for (first_step, *_), row in zip(found, stored, strict=True):
        raw = raw_of(row)
        if held := blobs.held_in(raw):
            marks |= held.marks()
        opened.append((first_step, _decoder.decode(raw)))
    texts = _texts_of(trajectory, [segment for _, segment in opened])
    for _, segment in opened:
        if segment.chat is not None:
            told = _of_chat(segment.chat, texts, with_actions=False)
            return Part(told, told.steps[start:end], start, marks, True, stored, texts)
    header = next((segment.header for _, segment in opened if segment.header is not None), None)
    if header is None:
        raise LookupError(f"trajectory {trajectory.trajectory_id} (row {trajectory.pk}) has no payload")
    told = header.payload
    if header.tools_text is not None:
        told = msgspec.structs.replace(told, tools=msgspec.json.decode(texts[header.tools_text], type=Tools))
    steps = tuple(
        _by_reference(step, texts)
        for first, segment in opened
        for number, step in enumerate(segment.steps, start=first)
        if start <= number < end
    )
    is_whole = bool(opened[0][1].steps) or not trajectory.n_steps
    return Part(told, steps, start, marks, is_whole, stored, texts)


def whole(trajectory: Trajectory, part: Part) -> LoadedPayload:
    """The payload, of a part that is all of it: what was read is not read again."""
    return _unpack(trajectory, part.stored, part.texts, True, False)


def _texts_of(trajectory: Trajectory, opened: Sequence[StoredSegment]) -> list[bytes]:
    """The shared texts that these segments name, at their places; empty ones at those of others."""
    places: set[int | None] = set()
    for segment in opened:
        for named in (segment.header, segment.chat):
            places.add(named.tools_text if named else None)
        places.add(segment.chat.system if segment.chat else None)
        for call in (call for step in segment.steps for call in step.llm_calls):
            places |= {call.system_text, call.tools_text, call.stored_prompt.system if call.stored_prompt else None}
    wanted = [trajectory.shared_texts[place] for place in places if place is not None]
    rows = SharedText.objects.filter(pk__in=wanted) if wanted else ()
    texts = {text.pk: decompress(bytes(text.data), text.raw_size) for text in rows}
    return [texts.get(pk, b"") for pk in trajectory.shared_texts]


def _by_reference(step: StoredStep, texts: Sequence[bytes]) -> StepPayload:
    calls: list[LlmCallPayload] = []
    for call in step.llm_calls:
        fields = {name: getattr(call, name) for name in _CALL_FIELDS}
        prompt = call.stored_prompt
        if prompt is not None and prompt.call is not None:
            fields["prompt_ref"] = PromptRef(call=prompt.call, append=prompt.append)
        elif prompt is not None:
            append = prompt.append
            if prompt.system is not None:
                append = ({**append[0], "content": texts[prompt.system].decode()}, *append[1:])
            fields["messages"] = append
        if call.system_text is not None:
            fields["system_prompt"] = texts[call.system_text].decode()
        if call.tools_text is not None:
            fields["tools"] = msgspec.json.decode(texts[call.tools_text], type=Tools)
        calls.append(LlmCallPayload(**fields))
    return _plain_step(step, tuple(calls))
