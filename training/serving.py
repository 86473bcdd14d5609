"""Talk to a model server over vLLM's wire: list, load, unload, ask. No database, no retries.

Production is vLLM (`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`, `--enable-lora`, a folder it shares with the site); one
machine has `training/trainer/serve.py`, which answers alike. What failed is split by what to do next: ask again
later (`ServingUnavailable`), or do not (`ServingRefused`).
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import httpx
import msgspec

Shape = TypeVar("Shape")

ALREADY = "already been loaded"  # vLLM's words; its status is the same 400 as for an adapter that does not fit
SHOWN = 500  # characters of an answer that end up in a message


class ServingError(Exception):
    """The model server did not do what it was asked."""


class ServingUnavailable(ServingError):
    """Nobody answered, or a fault was the answer. Asking again later can help."""


class ServingRefused(ServingError):
    """It answered, and will answer the same next time."""

    def __init__(self, detail: str, *, status: int) -> None:
        super().__init__(detail)
        self.status = status


class ServedModel(msgspec.Struct, frozen=True):
    """A name that the server answers to: a base, or an adapter with its folder as `root`."""

    id: str
    root: str | None = None
    parent: str | None = None


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class ChoiceLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob] | None = None


class Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: Function


class AnswerMessage(msgspec.Struct, frozen=True):
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None
    token_ids: list[int] | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Answer(msgspec.Struct, frozen=True):
    """An answer to a chat: `n` choices."""

    model: str
    choices: list[Choice]
    prompt_token_ids: list[int] | None = None
    usage: Usage = Usage()

    @property
    def text(self) -> str:
        """Of the first choice."""
        return (self.choices[0].message.content or "") if self.choices else ""


class _Models(msgspec.Struct, frozen=True):
    data: list[ServedModel]


class _Error(msgspec.Struct, frozen=True):
    message: str


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Error


class ModelServer:
    """One model server.

    Args:
        base_url: with or without the closing /v1.
        timeout: seconds for one answer. vLLM's first request with log-probabilities took 20 s on a CPU.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0)),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            transport=transport,
        )

    def __enter__(self) -> "ModelServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[ServedModel]:
        """What it answers to now: bases and adapters."""
        return self._decode(self._ask("GET", "/v1/models"), _Models).data

    def load(self, name: str, path: str) -> bool:
        """Have the adapter in the folder `path`, as the server sees it, answer to `name`.

        Returns:
            Whether it was loaded now; False: the name was there already, whatever it was loaded from.

        Raises:
            ServingRefused: no adapter there (status 404), or one that does not fit the base (400).
        """
        try:
            self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except ServingRefused as refusal:
            if refusal.status == 400 and ALREADY in str(refusal):
                return False
            raise
        return True

    def unload(self, name: str) -> bool:
        """Have `name` answered no more. False: it was not."""
        try:
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except ServingRefused as refusal:
            if refusal.status == 404:
                return False
            raise
        return True

    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, object]],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        n: int = 1,
        seed: int | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        logprobs: bool = False,
        return_token_ids: bool = False,
    ) -> Answer:
        """`n` answers to one conversation."""
        body: dict[str, object] = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "n": n,
        }
        if seed is not None:
            body["seed"] = seed
        if tools:
            body["tools"] = list(tools)
        if logprobs:
            body["logprobs"] = True
        if return_token_ids:
            body["return_token_ids"] = True
        return self._decode(self._ask("POST", "/v1/chat/completions", body), Answer)

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> bytes:
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            response = self._http.request(method, path, content=content, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise ServingUnavailable(f"{self.url} does not answer: {exc or type(exc).__name__}") from exc
        status = response.status_code
        if status < 300:
            return response.content
        said = _message(response)
        if status >= 500 or status in (408, 425, 429):
            raise ServingUnavailable(f"{self.url} answered {status}: {said}")
        if status in (404, 405) and path.endswith("_lora_adapter") and "adapter" not in said.lower():
            said = f"{said} (vLLM has {path} only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora)"
            status = 501  # the route is missing, not the adapter
        raise ServingRefused(said, status=status)

    def _decode(self, content: bytes, shape: type[Shape]) -> Shape:
        try:
            return msgspec.json.decode(content, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise ServingUnavailable(f"{self.url} answered something else than a model server: {exc}") from exc


def _message(response: httpx.Response) -> str:
    """What the server says is wrong: vLLM's error JSON, else the text as it is."""
    try:
        return msgspec.json.decode(response.content, type=_ErrorBody).error.message[:SHOWN]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return response.text[:SHOWN] or response.reason_phrase
