"""The model server's one model thread: whoever asks the same adapter is answered in the same forward passes.

A *row* is one answer being written. Rows come and go while a batch runs: a new request is read (each distinct prompt
once, its cache repeated for the n answers) and joins at the next token. Batches of different adapters take turns.
"""

import logging
import math
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from training.trainer import bases

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

T = TypeVar("T")

TURN = 16  # tokens that a batch writes before another adapter's batch has its turn
PREFILL_TOKENS = 8192  # read in one forward pass, padding counted; more would only cost memory
ROOM = 32  # tokens for which a cache gets room at a time
LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON cannot say (vLLM does the same)


class NoAdapter(FileNotFoundError):
    """There is no adapter in the folder."""


class UnfitAdapter(ValueError):
    """There is one, and it does not fit this base."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of an answer are drawn, in the order in which it applies."""

    max_tokens: int
    temperature: float = 1.0  # 0: the likeliest token, cuts and temperature left out
    top_k: int = 0  # 0: no cut
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0

    @property
    def cuts(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


@dataclass(slots=True, eq=False)
class Sample:
    """One of the n answers. `logprobs` are of the distribution that was drawn from: tempered, cut, normalised."""

    index: int
    draws: random.Random
    token_ids: list[int] = field(default_factory=list)  # the end token included
    logprobs: list[float] = field(default_factory=list)  # nats, as many as token_ids
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length" when it is done
    stop_reason: str | None = None  # the stop text that ended it


@dataclass(slots=True, eq=False)
class Adapter:
    """A loaded adapter. `key` is its name inside PEFT: names there may hold no dot and are never used again."""

    key: str
    name: str
    path: str
    created: int
    base: "Base"
    retired: bool = False


@dataclass(slots=True, eq=False)
class Ask:
    """One request on its way through the model."""

    base: "Base"
    adapter: Adapter | None
    prompt: tuple[int, ...]
    sampling: Sampling
    samples: list[Sample]
    on_token: Callable[[Sample], None] | None  # called in the model's thread, as is on_done
    on_done: Callable[[Exception | None], None]
    cancelled: bool = False
    open: int = 0


def make_samples(n: int, seed: int | None) -> list[Sample]:
    """n answers to come. With a seed each draws from its own stream, whatever else is in the batch."""
    return [Sample(index, random.Random(None if seed is None else f"{seed}:{index}")) for index in range(n)]


class Base:
    """A base model with its tokenizer and the adapters on it; loaded when it is first needed."""

    def __init__(self, name: str, cache: Path, *, max_model_len: int, device: str) -> None:
        self.name = name
        self.device = device
        self._cache = cache
        self.max_model_len = max_model_len
        self._loading = threading.Lock()
        self._peft: PeftModel | None = None
        self._using: str | None = None
        self._count = 0
        self._texts: dict[int, str] = {}
        self.folder: Path | None = None

    @property
    def loaded(self) -> bool:
        return self.folder is not None

    def load(self) -> None:
        """Load it, once, whoever asks first.

        Raises:
            UnknownBase: there is no such base here.
        """
        with self._loading:
            if self.folder is not None:
                return
            folder = bases.materialise(self.name, self._cache)
            self.tokenizer: PreTrainedTokenizerBase = bases.load_tokenizer(folder)
            dtype = torch.float32 if self.device == "cpu" else torch.bfloat16  # CPUs without bf16 units: half as fast
            self.model: PreTrainedModel = bases.load_model(folder, dtype=dtype, device=self.device)
            self.model.requires_grad_(False)
            self.ends = bases.end_tokens(folder, self.tokenizer)
            config = self.model.config
            self.max_model_len = min(self.max_model_len, config.max_position_embeddings)
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            heads = config.num_key_value_heads
            self.bytes_per_token = 2 * config.num_hidden_layers * heads * head * dtype.itemsize
            self.longest_token = max(map(len, self.tokenizer.get_vocab()))
            self.folder = folder

    def is_called(self, wanted: str) -> bool:
        """Whether an adapter that names its base so means this one: its name, its folder, or its folder elsewhere."""
        if wanted == self.name or (self.folder is not None and wanted == str(self.folder)):
            return True
        made = self.folder.name if self.folder else f"{self.name}-r{bases.RECIPE}"
        return self.name in (*bases.TINY, "smollm2") and Path(wanted).name == made

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """The token by itself, special ones too; half a character is a replacement mark."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = str(self.tokenizer.decode([token], skip_special_tokens=False))
        return text

    # --- from here on: the model's thread only ---

    def use(self, adapter: Adapter | None) -> None:
        """Switch to the adapter, or to the bare base.

        PEFT puts its layers into `model` itself, which is what is called: the wrapper keeps asking for the adapter it
        knew last, even when that one is gone.
        """
        key = adapter.key if adapter else None
        if self._peft is None or key == self._using:
            return
        if key is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            if self._using is None:
                self._peft.base_model.enable_adapter_layers()
            self._peft.base_model.set_adapter(key, inference_mode=True)
        self._using = key

    def add(self, name: str, path: str, created: int) -> Adapter:
        """Load the adapter from its folder.

        Raises:
            NoAdapter: no adapter_config.json and adapter_model.safetensors there (pickles are not read).
            UnfitAdapter: it does not fit this base; nothing of it is kept.
        """
        if not is_adapter(Path(path)):
            raise NoAdapter(path)
        self._count += 1
        key = f"a{self._count}"
        try:
            config = PeftConfig.from_pretrained(path)
            config.inference_mode = True
            if self._peft is None:
                self._peft = PeftModel(self.model, config, adapter_name=key)
            found = self._peft.load_adapter(path, key, torch_device=self.device)
            strange = [*found.unexpected_keys, *(one for one in found.missing_keys if f".{key}." in one)]
            if strange:
                raise UnfitAdapter(f"{len(strange)} of its weights have no place in {self.name}, such as {strange[0]}")
        except Exception as exc:
            self._forget(key)
            raise exc if isinstance(exc, UnfitAdapter) else UnfitAdapter(str(exc)) from exc
        self._settle()
        return Adapter(key, name, path, created, self)

    def remove(self, adapter: Adapter) -> None:
        self._forget(adapter.key)

    def _forget(self, key: str) -> None:
        if self._peft is not None and key in self._peft.peft_config:
            self._peft.base_model.disable_adapter_layers()
            self._peft.delete_adapter(key)
        self._settle()

    def _settle(self) -> None:
        """After PEFT changed what is active, by its own lights: back to the bare base."""
        if self._peft is not None:
            self._peft.base_model.disable_adapter_layers()
            self._peft.requires_grad_(False)
            self._peft.eval()
        self._using = None


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """A layer's cache with room for the next tokens.

    transformers' own copies everything for each new token, which took a quarter of the time of 48 rows of 150 tokens.
    `keys` and `values` are views of the filled part; whoever puts others there is noticed.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._seen: Tensor | None = None  # `keys` as this class left it
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        there, new = self.keys.shape[2], key_states.shape[2]
        if self._rooms is None or self.keys is not self._seen or there + new > self._rooms[0].shape[2]:
            length = there + new + ROOM
            self._rooms = (_with_room(self.keys, length), _with_room(self.values, length))
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, there : there + new] = states
        self.keys, self.values = (room[:, :, : there + new] for room in self._rooms)
        self._seen = self.keys
        return self.keys, self.values


def _with_room(filled: Tensor, length: int) -> Tensor:
    room = filled.new_empty((*filled.shape[:2], length, filled.shape[3]))
    room[:, :, : filled.shape[2]] = filled
    return room


@dataclass(slots=True, eq=False)
class Row:
    ask: Ask
    sample: Sample

    @property
    def full_length(self) -> int:
        return len(self.ask.prompt) + self.ask.sampling.max_tokens


class Batch:
    """Rows of one adapter. The cache is (B, heads, T, head) a layer, shorter rows padded on the left."""

    def __init__(self, base: Base, adapter: Adapter | None) -> None:
        self.base = base
        self.adapter = adapter
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []
        self._entering: list[Row] = []  # taken from `waiting`, prompt not read yet
        self._cache: Cache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # (B, T) 1 where the cache holds a token of the row
        self._last = torch.zeros(0, dtype=torch.long)  # (B,) the token that the next step reads

    def admit(self, max_rows: int, cache_bytes: int) -> None:
        """Let waiting rows in while there is room; one row always has room."""
        self._drop(lambda row: row.ask.cancelled)
        longest = max((row.full_length for row in self.rows), default=0)
        chosen = self._entering
        while self.waiting and len(self.rows) + len(chosen) < max_rows:
            row = self.waiting[0]
            if row.ask.cancelled:
                self.waiting.popleft()
                _close(row)
                continue
            length = max(longest, row.full_length)
            taken = len(self.rows) + len(chosen)
            if taken and (taken + 1) * length * self.base.bytes_per_token > cache_bytes:
                break
            longest = length
            chosen.append(self.waiting.popleft())
        for part in _prefill_parts(chosen):
            self._read(part)
        self._entering = []

    def step(self) -> None:
        """Every row writes one token."""
        if not self.rows:
            return
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        out = self.base.model(
            input_ids=self._last[:, None].to(self.base.device),
            attention_mask=self._mask.to(self.base.device),
            position_ids=(self._mask.sum(1, keepdim=True) - 1).to(self.base.device),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._write(self.rows, out.logits[:, -1])
        self._drop(lambda row: row.sample.finish_reason != "")

    def fail(self, exc: Exception) -> None:
        """Tell everyone who waits, and forget them."""
        for ask in {id(row.ask): row.ask for row in [*self.rows, *self._entering, *self.waiting]}.values():
            ask.on_done(exc)
        self.rows, self._entering, self._cache = [], [], None
        self.waiting.clear()
        self._mask, self._last = self._mask.new_zeros(0, 0), self._last.new_zeros(0)

    def _read(self, rows: list[Row]) -> None:
        """Read the prompts of new rows, equal ones once, and write their first tokens."""
        prompts = {row.ask.prompt: 0 for row in rows}
        place = {prompt: index for index, prompt in enumerate(prompts)}
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for prompt, index in place.items():
            ids[index, longest - len(prompt) :] = torch.tensor(prompt)
            mask[index, longest - len(prompt) :] = 1
        out = self.base.model(
            input_ids=ids.to(self.base.device),
            attention_mask=mask.to(self.base.device),
            position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(self.base.device),
            past_key_values=Cache(layer_class_to_replicate=RoomyLayer),
            use_cache=True,
            logits_to_keep=1,
        )
        spread = torch.tensor([place[row.ask.prompt] for row in rows])
        cache: Cache = out.past_key_values
        if len(spread) != len(prompts) or len(rows) > 1:
            cache.batch_select_indices(spread.to(self.base.device))
        mask = mask[spread]
        before = len(self.rows)
        if self._cache is None or not self.rows:
            self._cache, self._mask = cache, mask
        else:
            self._mask = _join_masks(self._mask, mask)
            _join_caches(self._cache, cache)
        self.rows += rows
        self._last = torch.cat([self._last[:before], torch.zeros(len(rows), dtype=torch.long)])
        self._write(rows, out.logits[spread.to(self.base.device), -1], first=before)
        self._drop(lambda row: row.sample.finish_reason != "")

    def _write(self, rows: list[Row], logits: Tensor, first: int = 0) -> None:
        """Draw a token for each of `rows`, which stand at `first` and after in the batch."""
        tokens, logp = draw(logits.float().cpu(), rows)
        self._last[first : first + len(rows)] = tokens
        chosen = logp.gather(1, tokens[:, None])[:, 0].clamp_min(LEAST_LOGPROB).tolist()
        most = max(row.ask.sampling.top_logprobs for row in rows)
        if most:
            values, indices = logp.topk(min(most, logp.shape[1]), dim=1)
            best = [
                list(zip(*pair, strict=True))
                for pair in zip(indices.tolist(), values.clamp_min(LEAST_LOGPROB).tolist(), strict=True)
            ]
        for at, (row, token, value) in enumerate(zip(rows, tokens.tolist(), chosen, strict=True)):
            sample, sampling = row.sample, row.ask.sampling
            sample.token_ids.append(token)
            sample.logprobs.append(value)
            if sampling.top_logprobs:
                sample.top.append(best[at][: sampling.top_logprobs])
            if token in self.base.ends and not sampling.ignore_eos:
                sample.finish_reason = "stop"
            elif sampling.stop and (found := self._stop_text(sample, sampling.stop)) is not None:
                sample.finish_reason, sample.stop_reason = "stop", found
            elif len(sample.token_ids) >= sampling.max_tokens:
                sample.finish_reason = "length"
            if row.ask.on_token is not None:
                row.ask.on_token(sample)

    def _stop_text(self, sample: Sample, stop: tuple[str, ...]) -> str | None:
        tail = 4 * max(map(len, stop)) + 4  # a token of a byte-level model may be a quarter of a character
        text = self.base.decode(sample.token_ids[-tail:])
        return next((one for one in stop if one in text), None)

    def _drop(self, done: Callable[[Row], bool]) -> None:
        keep = [index for index, row in enumerate(self.rows) if not done(row)]
        if len(keep) == len(self.rows):
            return
        for row in self.rows:
            if done(row):
                _close(row)
        self.rows = [self.rows[index] for index in keep]
        chosen = torch.tensor(keep, dtype=torch.long)
        self._mask, self._last = self._mask[chosen], self._last[chosen]
        if not keep:
            self._cache = None
        elif self._cache is not None:
            empty = int((self._mask.sum(0) == 0).long().cumprod(0).sum())  # columns that only left rows had
            self._mask = self._mask[:, empty:]
            chosen = chosen.to(self.base.device)
            for layer in self._cache.layers:
                layer.keys = layer.keys[chosen, :, empty:]
                layer.values = layer.values[chosen, :, empty:]


def draw(logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Draw one token a row from (B, V) logits.

    Returns:
        (B,) tokens, and (B, V) log-probabilities (nats) of the distributions drawn from; of a greedy row those at
        temperature 1.
    """
    settings = [row.ask.sampling for row in rows]
    temperature = torch.tensor([one.temperature or 1.0 for one in settings], dtype=torch.float32)
    logits = logits / temperature[:, None]
    if any(one.cuts for one in settings):
        logits = _cut(logits, settings)
    logp = logits.log_softmax(-1)
    # One number a row through the inverse of the distribution function: a seeded row draws alike in any company.
    total = logp.double().exp().cumsum(-1)
    level = torch.tensor([row.sample.draws.random() for row in rows], dtype=torch.float64) * total[:, -1]
    tokens = torch.searchsorted(total, level[:, None], right=True)[:, 0].clamp_max(logp.shape[1] - 1)
    greedy = torch.tensor([one.temperature == 0 for one in settings])
    best = logp.argmax(-1)
    impossible = logp.gather(1, tokens[:, None])[:, 0] == -math.inf  # only by rounding at the far end
    return torch.where(greedy | impossible, best, tokens), logp


def _cut(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The logits with -inf outside top_k, then top_p, then min_p."""
    vocabulary = logits.shape[1]
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(vocabulary)[None]
    top_k = torch.tensor([one.top_k if one.cuts and one.top_k > 0 else vocabulary for one in settings])
    ordered = ordered.masked_fill(rank >= top_k[:, None], -math.inf)
    share = ordered.softmax(-1)
    top_p = torch.tensor([one.top_p if one.cuts else 1.0 for one in settings], dtype=torch.float32)
    # Kept: every token before which less than top_p lies, so the first one always is.
    beyond = (share.cumsum(-1) - share) >= top_p[:, None]
    beyond[:, 0] = False
    ordered = ordered.masked_fill(beyond & (top_p < 1.0)[:, None], -math.inf)
    share = ordered.softmax(-1)
    min_p = torch.tensor([one.min_p if one.cuts else 0.0 for one in settings], dtype=torch.float32)
    ordered = ordered.masked_fill(share < min_p[:, None] * share[:, :1], -math.inf)
    return torch.full_like(logits, -math.inf).scatter(1, order, ordered)


def _prefill_parts(rows: list[Row]) -> list[list[Row]]:
    """Rows to read together: short prompts with short ones, so many that padding stays bounded."""
    parts: list[list[Row]] = []
    prompts = 0
    for prompt, same in groupby(sorted(rows, key=lambda row: (len(row.ask.prompt), row.ask.prompt)), _prompt):
        if not parts or (prompts + 1) * len(prompt) > PREFILL_TOKENS:
            parts.append([])
            prompts = 0
        parts[-1] += same
        prompts += 1
    return parts


def _prompt(row: Row) -> tuple[int, ...]:
    return row.ask.prompt


def _join_masks(left: Tensor, right: Tensor) -> Tensor:
    longest = max(left.shape[1], right.shape[1])
    padded = [torch.nn.functional.pad(one, (longest - one.shape[1], 0)) for one in (left, right)]
    return torch.cat(padded)


def _join_caches(into: Cache, other: Cache) -> None:
    for mine, theirs in zip(into.layers, other.layers, strict=True):
        longest = max(mine.keys.shape[2], theirs.keys.shape[2])
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in (mine, theirs)]
            padded = [torch.nn.functional.pad(one, (0, 0, longest - one.shape[2], 0)) for one in parts]
            setattr(mine, name, torch.cat(padded))


def _close(row: Row) -> None:
    row.ask.open -= 1
    if row.ask.open == 0:
        row.ask.on_done(None)


class Engine:
    """Owns the model's thread."""

    def __init__(self, *, max_rows: int, cache_bytes: int) -> None:
        self.max_rows = max_rows
        self.cache_bytes = cache_bytes
        self._inbox: queue.SimpleQueue[Ask | Callable[[], None] | None] = queue.SimpleQueue()
        self._batches: dict[tuple[str, str | None], Batch] = {}
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._inbox.put(None)
        self._thread.join(2.0)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, ask: Ask) -> None:
        ask.open = len(ask.samples)
        self._inbox.put(ask)

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Do something with the model between two turns."""
        future: Future[T] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except Exception as exc:
                future.set_exception(exc)

        self._inbox.put(do)
        return future

    def retire(self, adapter: Adapter) -> None:
        """Forget the adapter, as soon as nobody is being answered by it any more. Inside `call` only."""
        adapter.retired = True
        if (adapter.base.name, adapter.key) not in self._batches:
            adapter.base.remove(adapter)

    def _run(self) -> None:
        with torch.inference_mode():
            while self._receive(wait=not self._batches):
                for key, batch in list(self._batches.items()):
                    self._turn(batch)
                    if not batch.rows and not batch.waiting:
                        del self._batches[key]
                        if batch.adapter is not None and batch.adapter.retired:
                            batch.base.remove(batch.adapter)

    def _receive(self, *, wait: bool) -> bool:
        """Take in what has come; False when told to stop."""
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if message is None:
                return False
            if isinstance(message, Ask):
                key = (message.base.name, message.adapter.key if message.adapter else None)
                batch = self._batches.get(key)
                if batch is None:
                    batch = self._batches[key] = Batch(message.base, message.adapter)
                batch.waiting.extend(Row(message, sample) for sample in message.samples)
            else:
                message()

    def _turn(self, batch: Batch) -> None:
        try:
            batch.base.use(batch.adapter)
            for _ in range(TURN):
                batch.admit(self.max_rows, self.cache_bytes)
                if not batch.rows:
                    return
                batch.step()
                if not self._inbox.empty():
                    return  # someone may want to join
        except Exception as exc:  # out of memory, a broken adapter: theirs to hear, ours to survive
            name = batch.adapter.name if batch.adapter else batch.base.name
            logger.exception("%s: the answers under way failed", name)
            batch.fail(exc)
