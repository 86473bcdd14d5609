"""The demo's side of the wire: the site's API and the model server's, with just the fields it reads."""

from typing import TypeVar

import httpx
import msgspec

Shape = TypeVar("Shape", bound=msgspec.Struct)


class DemoStopped(Exception):
    """The demo cannot go on; the text says why, for a person."""


class Refusal(DemoStopped):
    """The site answered 409: the request is understood and not done, for the reasons in the text."""


class BatchAnswer(msgspec.Struct):
    batch_id: str
    status: str
    progress: float = 0.0
    eta_seconds: float | None = None
    error: str | None = None
    model_version: str | None = None
    trajectories: int = 0
    groups: int = 0


class RouteAnswer(msgspec.Struct):
    agent_id: str
    version: str | None
    model: str
    base_url: str


class WorkRow(msgspec.Struct):
    scenario_id: str
    side: str
    model: str
    base_url: str
    n: int
    version: str | None = None


class WorkAnswer(msgspec.Struct):
    results: list[WorkRow]


class EvaluationAnswer(msgspec.Struct):
    evaluation_id: str
    state: str
    error: str | None = None
    sentence: str = ""


class GateRow(msgspec.Struct):
    name: str
    ok: bool
    detail: str = ""


class DeploymentAnswer(msgspec.Struct):
    id: int
    version: str
    state: str
    gates: list[GateRow] = []
    error: str | None = None


class BulkRow(msgspec.Struct):
    detail: str = ""
    trajectory_id: str | None = None


class BulkAnswer(msgspec.Struct):
    successes: list[BulkRow]
    errors: list[BulkRow]


class ReadinessAnswer(msgspec.Struct):
    ready: bool
    reason: str


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float


class ChoiceLogprobs(msgspec.Struct):
    content: list[TokenLogprob]


class ChoiceMessage(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    index: int
    message: ChoiceMessage
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None
    token_ids: list[int] | None = None


class Completion(msgspec.Struct):
    model: str
    choices: list[Choice]
    prompt_token_ids: list[int] | None = None


class Nothing(msgspec.Struct):
    """An answer of which nothing is read."""


class Site:
    """The site as agents, a researcher and an approver see it: one address, a key each."""

    def __init__(self, url: str, *, agents: str, operator: str, approver: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=f"{self.url}/api/v1", timeout=120.0)
        self._keys = {"agents": agents, "operator": operator, "approver": approver}

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, shape: type[Shape], *, who: str = "operator") -> Shape:
        return self._ask("GET", path, shape, who=who)

    def post(self, path: str, shape: type[Shape], body: object = None, *, who: str = "operator") -> Shape:
        return self._ask("POST", path, shape, who=who, content=msgspec.json.encode(body or {}))

    def put(self, path: str, shape: type[Shape], body: object, *, who: str = "agents") -> Shape:
        return self._ask("PUT", path, shape, who=who, content=msgspec.json.encode(body))

    def post_lines(self, path: str, shape: type[Shape], lines: bytes, *, who: str = "agents") -> Shape:
        """NDJSON, compressed by gzip already."""
        headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
        return self._ask("POST", path, shape, who=who, content=lines, headers=headers)

    def _ask(
        self,
        method: str,
        path: str,
        shape: type[Shape],
        *,
        who: str,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Shape:
        """One request and its answer in the shape asked for.

        Raises:
            Refusal: 409, with the site's own sentences.
            DemoStopped: any other refusal, or the site cannot be reached.
        """
        sent = {"Authorization": f"Bearer {self._keys[who]}", "Content-Type": "application/json", **(headers or {})}
        try:
            response = self._http.request(method, path, content=content, headers=sent)
        except httpx.HTTPError as exc:
            raise DemoStopped(f"{self.url} cannot be reached: {exc}. Is `make run` up?") from exc
        if response.status_code == 409:
            raise Refusal(sentences(response))
        if response.status_code >= 400:
            raise DemoStopped(f"{method} {path}: {response.status_code} {sentences(response)}")
        return msgspec.convert(response.json(), type=shape)


class ModelEndpoint:
    """An OpenAI-compatible endpoint that returns token ids and processed log-probabilities, as vLLM does."""

    def __init__(self, connections: int) -> None:
        limits = httpx.Limits(max_connections=connections)
        self._http = httpx.Client(timeout=300.0, limits=limits)

    def close(self) -> None:
        self._http.close()

    def sample(
        self,
        base_url: str,
        model: str,
        messages: list[dict[str, object]],
        *,
        n: int,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> Completion:
        """`n` answers to one conversation.

        Raises:
            DemoStopped: the server refused or cannot be reached.
        """
        base = base_url.rstrip("/")
        url = f"{base}/chat/completions" if base.endswith("/v1") else f"{base}/v1/chat/completions"
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        body = {
            "model": model,
            "messages": plain,
            "n": n,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
            "logprobs": True,
            "return_token_ids": True,
        }
        try:
            response = self._http.post(url, json=body)
        except httpx.HTTPError as exc:
            raise DemoStopped(f"The model server at {base} cannot be reached: {exc}") from exc
        if response.status_code >= 400:
            raise DemoStopped(f"The model server answered {response.status_code}: {response.text[:300]}")
        return msgspec.json.decode(response.content, type=Completion)


def sentences(response: httpx.Response) -> str:
    """The sentence of a problem+json answer, followed by those of the reasons that are not met."""
    try:
        problem = msgspec.json.decode(response.content, type=dict[str, object])
    except msgspec.MsgspecError:
        return response.text[:300]
    reasons = problem.get("reasons")
    rows = reasons if isinstance(reasons, list) else []
    detail = str(problem.get("detail", ""))
    unmet = [str(row.get("detail", "")) for row in rows if isinstance(row, dict) and not row.get("ok")]
    return " ".join([detail, *(one for one in unmet if one not in detail)]).strip()
