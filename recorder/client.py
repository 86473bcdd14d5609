"""Reading and steering for notebooks and scripts: every call is one request, and answers plain lists and dictionaries.

Unlike the recorder this one raises: see `problems.py`. `AsyncClient` has the same methods as coroutines.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar, cast
from urllib.parse import quote

import httpx

from . import problems
from .plain import encode, plain
from .problems import ApiError, Unavailable
from .recording import address
from .shapes import (
    Batch,
    BatchRow,
    Deployment,
    DeploymentRow,
    Evaluation,
    EvaluationRow,
    Group,
    GroupRow,
    JudgmentRow,
    Mode,
    Model,
    Readiness,
    RecordedTrajectory,
    RewardAnswer,
    Route,
    ScenarioRow,
    Status,
    Strategy,
    TrajectoryRow,
    Work,
)

Filter = str | int | float | bool | None
Row = TypeVar("Row")

SERVING: Literal["serving"] = "serving"  # what serves now, where a version may be named
PAGE = 200  # rows asked for at once
TRIES = 3  # of reads that get no answer, or "later"
LONGEST_WAIT = 30.0  # seconds between two of them
ENDED = frozenset({"completed", "failed", "cancelled"})


class Client:
    """The site through one key: its project's trajectories, groups, batches, models.

    Args:
        url: `http://127.0.0.1:8000`; else the environment's TRAININGSITE_URL.
        api_key: with the scopes that the calls need (read; operate; approve); else TRAININGSITE_API_KEY.

    Raises:
        ValueError: one of them is missing.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url, key = address(url, api_key)
        self._http = httpx.Client(
            base_url=f"{self.url}/api/v1/",
            headers={"Authorization": f"Bearer {key}", "User-Agent": "trainingsite-recorder/0.1.0"},
            timeout=timeout,
            transport=transport,
        )
        self._routes: dict[str, tuple[str, Route]] = {}  # by agent: ETag and answer

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what the agents did -------------------------------------------------------------------------------------

    def trajectory(self, trajectory_id: str) -> RecordedTrajectory:
        """One trajectory, whole: its steps, and under `recorded` what the site knows of it."""
        found = self._get(f"trajectories/{_id(trajectory_id)}/")
        # The site leaves out what has its default; these are always asked for.
        return cast(RecordedTrajectory, {"final_status": "completed", "reward": None, "steps": [], **found})

    def trajectories(self, **filters: Filter) -> Iterator[TrajectoryRow]:
        """Rows, newest first, page by page. Filters are those of the site's list (docs/http-api.md): agent,
        scenario, version, reward_min, reward_max, judged, since, until, and others."""
        return cast(Iterator[TrajectoryRow], self._pages("trajectories/", filters))

    def groups(self, **filters: Filter) -> Iterator[GroupRow]:
        """Groups, newest first. Filters: scenario, role, behaviour, state, judging, evaluation."""
        return cast(Iterator[GroupRow], self._pages("groups/", filters))

    def group(self, group_id: int) -> Group:
        """A group as plain lists: `trajectory_ids`, `rewards`, `scores[source]`, in one order; its `trajectories`
        with their judgments."""
        return cast(Group, self._get(f"groups/{group_id}/"))

    def scenario(self, scenario_id: str) -> ScenarioRow:
        return cast(ScenarioRow, self._get(f"scenarios/{_id(scenario_id)}/"))

    def scenarios(self, **filters: Filter) -> Iterator[ScenarioRow]:
        """Scenarios, newest first. Filter: split."""
        return cast(Iterator[ScenarioRow], self._pages("scenarios/", filters))

    def put_scenario(
        self,
        scenario_id: str,
        *,
        description: str | None = None,
        split: Literal["train", "held_out", "locked"] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> ScenarioRow:
        """Tell of a task. Gold answers belong in metadata["private"]: they reach neither judge nor export."""
        body = _given(description=description, split=split, metadata=metadata)
        return cast(ScenarioRow, self._ask("PUT", f"scenarios/{_id(scenario_id)}/", body))

    def set_reward(
        self,
        trajectory_id: str,
        reward: float | None,
        *,
        reward_components: Mapping[str, float | None] | None = None,
        source: str = "api",
        reason: str = "",
    ) -> RewardAnswer:
        """A reward that is known later; None withdraws it. For an unknown trajectory it waits for 24 hours."""
        body = {"reward": reward, "source": source, "reason": reason, **_given(reward_components=reward_components)}
        return cast(RewardAnswer, self._ask("PATCH", f"trajectories/{_id(trajectory_id)}/reward/", body))

    def add_judgment(
        self,
        trajectory_id: str,
        *,
        name: str,
        score: float | None = None,
        comment: str = "",
        annotator_kind: Literal["human", "code", "llm"] = "human",
        author: str = "",
        step: int | None = None,
    ) -> JudgmentRow:
        """Feedback: kept beside the reward, which it never touches."""
        body = _given(annotator_kind=annotator_kind, name=name, score=score, comment=comment, author=author, step=step)
        return cast(JudgmentRow, self._ask("POST", f"trajectories/{_id(trajectory_id)}/judgments/", body))

    def judgments(self, trajectory_id: str) -> Iterator[JudgmentRow]:
        return cast(Iterator[JudgmentRow], self._pages(f"trajectories/{_id(trajectory_id)}/judgments/", {}))

    # --- how the loop stands -------------------------------------------------------------------------------------

    def readiness(self, mode: Mode | None = None) -> Readiness:
        """Whether a batch could start now; if not, every reason, and when it is expected."""
        return cast(Readiness, self._get("readiness/", _given(mode=mode)))

    def status(self) -> Status:
        return cast(Status, self._get("status/"))

    def limits(self) -> dict[str, object]:
        """The published limits on what may be sent."""
        return self._get("limits/")

    # --- batches and models --------------------------------------------------------------------------------------

    def trigger_batch(
        self,
        *,
        force: bool = False,
        limit: int | None = None,
        mode: Mode | None = None,
        purpose: str = "",
        behaviour: str = "",
        parent: str | None = SERVING,
        hyperparameters: Mapping[str, object] | None = None,
    ) -> BatchRow:
        """Start a batch. What is left out is the policy's.

        Args:
            force: waive amounts and schedule; what makes a group valid is never waived.
            limit: at most so many trajectories, in whole groups.
            parent: a version, None for the bare base; SERVING: what serves now.

        Raises:
            Refused: not ready, or no group is fit; `reasons` say why.
        """
        body = _given(
            force=force,
            limit=limit,
            mode=mode,
            purpose=purpose or None,
            behaviour=behaviour or None,
            hyperparameters=hyperparameters,
        )
        if parent != SERVING:
            body["parent"] = parent
        return cast(BatchRow, self._ask("POST", "batches/", body))

    def batches(self) -> Iterator[BatchRow]:
        """Batches, newest first."""
        return cast(Iterator[BatchRow], self._pages("batches/", {}))

    def batch(self, batch_id: str) -> Batch:
        return cast(Batch, self._get(f"batches/{_id(batch_id)}/"))

    def wait_for_batch(self, batch_id: str, timeout: float = 3600.0, every: float = 2.0) -> Batch:
        """Ask until the batch has ended, however it did.

        Raises:
            TimeoutError: it has not after `timeout` seconds.
        """
        until = time.monotonic() + timeout
        while (batch := self.batch(batch_id))["status"] not in ENDED:
            if time.monotonic() >= until:
                raise TimeoutError(f"batch {batch_id} is still {batch['status']} after {timeout:g} seconds")
            time.sleep(every)
        return batch

    def cancel_batch(self, batch_id: str, reason: str = "") -> Batch:
        return cast(Batch, self._ask("POST", f"batches/{_id(batch_id)}/cancel/", {"reason": reason}))

    def retry_batch(self, batch_id: str, reason: str = "") -> Batch:
        return cast(Batch, self._ask("POST", f"batches/{_id(batch_id)}/retry/", {"reason": reason}))

    def batch_data(self, batch_id: str) -> Iterator[dict[str, object]]:
        """What our trainer reads of a frozen batch, line by line: first the manifest, then a line a group."""
        try:
            with self._http.stream("GET", f"batches/{_id(batch_id)}/data/") as response:
                if response.status_code >= 300:
                    response.read()
                    raise problems.of(response)
                for line in response.iter_lines():
                    if line:
                        yield _mapping(line)
        except httpx.HTTPError as exc:
            raise problems.no_answer(exc) from exc

    def models(self, **filters: Filter) -> Iterator[Model]:
        """Versions, newest first. Filter: status."""
        return cast(Iterator[Model], self._pages("models/", filters))

    def model(self, version: str) -> Model:
        return cast(Model, self._get(f"models/{_id(version)}/"))

    def send_model(self, batch_id: str, adapter: Path | str) -> Model:
        """A PEFT adapter that was trained elsewhere on a batch's data: a folder with adapter_config.json and
        adapter_model.safetensors."""
        folder = Path(adapter)
        with (folder / "adapter_config.json").open("rb") as config:
            with (folder / "adapter_model.safetensors").open("rb") as weights:
                response = self._send(
                    lambda: self._http.post(
                        "models/", data={"batch_id": batch_id}, files={"config": config, "adapter": weights}
                    )
                )
        return cast(Model, _object(response))

    # --- evaluate, decide, serve ---------------------------------------------------------------------------------

    def evaluate(
        self,
        version: str,
        *,
        baseline: str | None = SERVING,
        split: Literal["held_out", "locked"] = "held_out",
        attempts: int | None = None,
        scenarios: int | None = None,
        reason: str = "",
    ) -> Evaluation:
        """Start an evaluation of a ready version.

        Args:
            baseline: the version it is held against, None for the bare base; SERVING: what serves now.
            attempts: of each side at each scenario.
        """
        body = _given(version=version, split=split, attempts=attempts, scenarios=scenarios, reason=reason or None)
        if baseline != SERVING:
            body["baseline"] = baseline
        return cast(Evaluation, self._ask("POST", "evaluations/", body))

    def evaluation(self, evaluation_id: str) -> Evaluation:
        return cast(Evaluation, self._get(f"evaluations/{_id(evaluation_id)}/"))

    def evaluations(self) -> Iterator[EvaluationRow]:
        return cast(Iterator[EvaluationRow], self._pages("evaluations/", {}))

    def evaluation_work(self, evaluation_id: str, limit: int = 100) -> list[Work]:
        """Take pieces of work; [] when there is none now. Each is answered by `n` trajectories that carry the
        evaluation_id and the scenario."""
        answer = self._get(f"evaluations/{_id(evaluation_id)}/work/", {"limit": limit})
        return cast(list[Work], _rows(answer))

    def deploy(
        self,
        version: str,
        *,
        strategy: Strategy = "immediate",
        weight: float | None = None,
        audience: str | None = None,
        evaluation_id: str | None = None,
        reason: str = "",
    ) -> Deployment:
        """Ask for a version to serve. A second person decides, by `approve` or in the admin."""
        body = _given(
            version=version,
            strategy=strategy,
            weight=weight,
            audience=audience,
            evaluation_id=evaluation_id,
            reason=reason or None,
        )
        return cast(Deployment, self._ask("POST", "deployments/", body))

    def deployment(self, deployment_id: int) -> Deployment:
        return cast(Deployment, self._get(f"deployments/{deployment_id}/"))

    def deployments(self) -> Iterator[DeploymentRow]:
        return cast(Iterator[DeploymentRow], self._pages("deployments/", {}))

    def approve(self, deployment_id: int, reason: str = "", *, override: bool = False) -> Deployment:
        """With a key of the scope `approve` whose owner is an approver and not the requester."""
        body: dict[str, object] = {"reason": reason, "override": override}
        return cast(Deployment, self._ask("POST", f"deployments/{deployment_id}/approve/", body))

    def reject(self, deployment_id: int, reason: str) -> Deployment:
        return cast(Deployment, self._ask("POST", f"deployments/{deployment_id}/reject/", {"reason": reason}))

    def roll_back(self, deployment_id: int, reason: str = "") -> Deployment:
        """Agents go back to what served before."""
        return cast(Deployment, self._ask("POST", f"deployments/{deployment_id}/rollback/", {"reason": reason}))

    def model_for(self, agent_id: str) -> Route:
        """Which version an agent uses now, and where. Asking before each episode costs a 304 while nothing changed.

        An agent that the site does not know yet is made known.
        """
        known = self._routes.get(agent_id)
        headers = {"If-None-Match": known[0]} if known else {}
        path = f"agents/{_id(agent_id)}/"
        try:
            response = self._read(f"{path}model/", headers=headers)
        except problems.NotFound:
            self._ask("PUT", path, {})
            response = self._read(f"{path}model/")
        if response.status_code == 304 and known:
            return known[1]
        route = cast(Route, _object(response))
        self._routes[agent_id] = (response.headers.get("ETag", ""), route)
        return route

    # --- the wire ------------------------------------------------------------------------------------------------

    def _get(self, path: str, params: Mapping[str, object] | None = None) -> dict[str, object]:
        return _object(self._read(path, params=params))

    def _read(
        self, path: str, *, params: Mapping[str, object] | None = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """A GET, asked again for a while when there is no answer or it says later."""
        sent = {name: _parameter(value) for name, value in (params or {}).items() if value is not None}
        for _ in range(TRIES - 1):
            try:
                return self._send(lambda: self._http.get(path, params=sent, headers=headers))
            except Unavailable as later:
                time.sleep(min(0.5 if later.retry_after is None else later.retry_after, LONGEST_WAIT))
        return self._send(lambda: self._http.get(path, params=sent, headers=headers))

    def _ask(self, method: str, path: str, body: Mapping[str, object]) -> dict[str, object]:
        sent = plain(body, [])
        assert isinstance(sent, dict)
        content = encode(sent)
        headers = {"Content-Type": "application/json"}
        return _object(self._send(lambda: self._http.request(method, path, content=content, headers=headers)))

    def _send(self, request: Callable[[], httpx.Response]) -> httpx.Response:
        try:
            response = request()
        except httpx.HTTPError as exc:
            raise problems.no_answer(exc) from exc
        if response.status_code >= 300 and response.status_code != 304:
            raise problems.of(response)
        return response

    def _pages(self, path: str, filters: Mapping[str, Filter]) -> Iterator[object]:
        params: dict[str, object] = {"limit": PAGE, **filters}
        while True:
            page = self._get(path, params)
            yield from _rows(page)
            following = page.get("next")
            if not following:
                return
            params["cursor"] = following


class AsyncClient:
    """`Client` for asyncio: the same requests, each in a thread, so that the loop goes on."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.sync = Client(url, api_key, timeout=timeout, transport=transport)  # what is not named below

    async def aclose(self) -> None:
        await asyncio.to_thread(self.sync.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def trajectory(self, trajectory_id: str) -> RecordedTrajectory:
        return await asyncio.to_thread(self.sync.trajectory, trajectory_id)

    def trajectories(self, **filters: Filter) -> AsyncIterator[TrajectoryRow]:
        return _in_thread(self.sync.trajectories(**filters))

    async def group(self, group_id: int) -> Group:
        return await asyncio.to_thread(self.sync.group, group_id)

    def groups(self, **filters: Filter) -> AsyncIterator[GroupRow]:
        return _in_thread(self.sync.groups(**filters))

    async def set_reward(
        self, trajectory_id: str, reward: float | None, *, source: str = "api", reason: str = ""
    ) -> RewardAnswer:
        return await asyncio.to_thread(self.sync.set_reward, trajectory_id, reward, source=source, reason=reason)

    async def readiness(self, mode: Mode | None = None) -> Readiness:
        return await asyncio.to_thread(self.sync.readiness, mode)

    async def status(self) -> Status:
        return await asyncio.to_thread(self.sync.status)

    def batches(self) -> AsyncIterator[BatchRow]:
        return _in_thread(self.sync.batches())

    async def batch(self, batch_id: str) -> Batch:
        return await asyncio.to_thread(self.sync.batch, batch_id)

    def models(self, **filters: Filter) -> AsyncIterator[Model]:
        return _in_thread(self.sync.models(**filters))

    async def evaluation_work(self, evaluation_id: str, limit: int = 100) -> list[Work]:
        return await asyncio.to_thread(self.sync.evaluation_work, evaluation_id, limit)

    async def model_for(self, agent_id: str) -> Route:
        return await asyncio.to_thread(self.sync.model_for, agent_id)


async def _in_thread(rows: Iterator[Row]) -> AsyncIterator[Row]:
    """Rows of pages that are fetched in a thread."""
    nothing = object()
    while (row := await asyncio.to_thread(next, rows, nothing)) is not nothing:
        yield cast(Row, row)


def _id(value: str) -> str:
    """An id as a part of a path: what URLs give a meaning to is escaped, slashes stay."""
    if not value:
        raise ValueError("the id is empty")
    return quote(value)


def _given(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _parameter(value: object) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _object(response: httpx.Response) -> dict[str, object]:
    try:
        return _mapping(response.content)
    except (ValueError, RecursionError):
        raise ApiError(
            f"{response.request.url} answered {response.status_code} with something else than a JSON object. "
            "Is this the address of the site?",
            status=response.status_code,
        ) from None


def _mapping(raw: bytes | str) -> dict[str, object]:
    value: object = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _rows(page: Mapping[str, object]) -> list[object]:
    rows = page.get("results")
    return rows if isinstance(rows, list) else []
