"""The recorder an agent holds: hands out trajectories, and sends them in the background when they have ended."""

import asyncio
import atexit
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, ParamSpec, Self, TypeVar, overload

import httpx

from . import actions, openai_calls
from .courier import Counts, Courier, Limits
from .current import here
from .plain import PREVIEW, Size, encode, mapping, plain
from .spool import Item, Spool, assemble, opening
from .step import Step
from .trajectory import Trajectory

logger = logging.getLogger("recorder")

GiB = 1024**3

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")


class Recorder:
    """Records what agents do. Its methods never raise into the agent and never wait for the network, but for
    `flush` and `close`, which wait as long as they are told. The same object serves threads and asyncio alike.

    Args:
        url: of the site, `http://127.0.0.1:8000`; else the environment's TRAININGSITE_URL.
        api_key: with the scope `ingest`; else TRAININGSITE_API_KEY.
        agent_id: of trajectories that name none; else TRAININGSITE_AGENT_ID, else "agent".
        spool: a folder, one for each project; else TRAININGSITE_SPOOL. With it, what was recorded survives the end of
            this process and the absence of the site. None: in memory, up to `limits`, what does not fit is counted.
        spool_bytes: the most that the spool may hold.
        fsync: write through to the disk at every event (milliseconds each); without, what was recorded survives the
            end of the process, not that of the machine.
        exit_seconds: how long the end of the process may wait for deliveries; with a spool, only while they go well.
        live: steps are shown on the site while the trajectory runs. What is shown is sent twice; what could not be
            shown loses nothing, since the whole goes when it has ended.
        enabled: False records nothing.

    Raises:
        ValueError: url or key are missing. It is raised here, at the start, and never later.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        agent_id: str | None = None,
        spool: Path | str | None = None,
        spool_bytes: int = GiB,
        fsync: bool = False,
        limits: Limits = Limits(),  # noqa: B008 — frozen
        timeout: float = 30.0,
        exit_seconds: float = 10.0,
        live: bool = False,
        enabled: bool = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.enabled = enabled
        self.live = live
        self.agent_id = agent_id or os.environ.get("TRAININGSITE_AGENT_ID") or "agent"
        self.exit_seconds = exit_seconds
        base, key = address(url, api_key) if enabled else ("http://recorder.invalid", "off")

        def connect() -> httpx.Client:
            return httpx.Client(
                base_url=f"{base}/api/v1/",
                headers={"Authorization": f"Bearer {key}", "User-Agent": "trainingsite-recorder/0.1.0"},
                timeout=timeout,
                transport=transport,
            )

        self._open: dict[str, Trajectory] = {}
        self._on_disk: set[str] = set()  # open ones of which every event so far is in the spool
        self._courier = Courier(connect, limits, self._make_spool(spool, spool_bytes, fsync) if enabled else None)
        self._closed = not enabled
        if enabled:
            _live.add(self)
            if self._courier.spool is not None:
                self._courier.start()

    def _make_spool(self, folder: Path | str | None, most_bytes: int, fsync: bool) -> Spool | None:
        folder = folder or os.environ.get("TRAININGSITE_SPOOL")
        if not folder:
            return None
        try:
            return Spool(Path(folder).expanduser(), most_bytes=most_bytes, fsync=fsync)
        except OSError as exc:
            logger.error("The recorder has no spool and goes on in memory: %s", exc)
            return None

    def start_trajectory(
        self,
        agent_id: str | None = None,
        *,
        trajectory_id: str | None = None,
        scenario_id: str | None = None,
        scenario: Mapping[str, object] | None = None,
        role: str | None = None,
        group_id: str | None = None,
        group_size: int | None = None,
        episode_id: str | None = None,
        parent_trajectory_id: str | None = None,
        parent_call: int | None = None,
        retry_of: str | None = None,
        evaluation_id: str | None = None,
        is_evaluation: bool | None = None,
        policy_version: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        metadata: Mapping[str, object] | None = None,
        live: bool | None = None,
    ) -> Trajectory:
        """Begin one agent's view of one episode.

        Args:
            trajectory_id: unique in the project; made here unless given.
            scenario_id: the exact task and start state. Without one, there is no group and no GRPO.
            scenario: {"id", "description", "split", "metadata"} in its place, when the site should learn of it.
            group_id, group_size: attempts that may share a baseline, where the sender knows them.
            policy_version: the version that plays, as `Client.model_for` told it.
            parent_trajectory_id: the trajectory whose sub-agent this is; else the current one, where there is one.
            live: show its steps while it runs; None: as the recorder does.
            retry_of: the trajectory_id that this is a new try of, after a failure.
        """
        trajectory_id = trajectory_id or uuid.uuid4().hex
        around = here(self)
        if around is not None and parent_trajectory_id is None:
            parent_trajectory_id = around.trajectory.trajectory_id
            parent_call = around.trajectory.last_call if parent_call is None else parent_call
        return Trajectory(
            self,
            trajectory_id,
            {
                "agent_id": agent_id or self.agent_id,
                "role": role,
                "scenario_id": scenario_id,
                "scenario": scenario,
                "group_id": group_id,
                "group_size": group_size,
                "episode_id": episode_id,
                "parent_trajectory_id": parent_trajectory_id,
                "parent_call": parent_call,
                "retry_of": retry_of,
                "evaluation_id": evaluation_id,
                "is_evaluation": is_evaluation,
                "policy_version": policy_version,
                "tools": tools,
                "metadata": metadata,
            },
            live=self.live if live is None else live,
        )

    @property
    def current_trajectory(self) -> Trajectory | None:
        """The trajectory that this code runs in: of the innermost `with`, in this thread or task."""
        place = here(self)
        return None if place is None else place.trajectory

    @property
    def current_step(self) -> Step | None:
        place = here(self)
        return None if place is None or place.step is None or place.step.completed else place.step

    def wrap(
        self,
        client: C,
        *,
        outside: bool = True,
        purpose: str | None = None,
        trainable: bool | None = None,
        model_version: str | None = None,
        logprobs_mode: Literal["raw", "processed"] | None = None,
        tokenizer: str | None = None,
    ) -> C:
        """Record what is asked of an OpenAI client, sync or async, or of a LangChain chat model that holds some: the
        same object, listened to.

        Inside a trajectory a call goes to the current step, else to a step of its own.

        Args:
            outside: a call outside of all trajectories is recorded as a trajectory of one step; False: not at all.
            purpose, trainable, model_version, tokenizer: of all its calls, as in `Step.log_llm_call`.
            logprobs_mode: what the server gives; "processed" for Trainingsite's own and for vLLM with
                `--logprobs-mode processed_logprobs`.
        """
        if self.enabled:
            try:
                told = openai_calls.Told(purpose, trainable, model_version, logprobs_mode, tokenizer)
                return openai_calls.wrap(self, client, told, outside=outside)
            except Exception:
                self.fault("wrap")
        return client

    @overload
    def action(self, function: Callable[P, R], /) -> Callable[P, R]: ...

    @overload
    def action(
        self, function: None = None, /, *, name: str | None = None, size: Size = PREVIEW
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def action(
        self, function: Callable[P, R] | None = None, /, *, name: str | None = None, size: Size = PREVIEW
    ) -> Callable[P, R] | Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a function that acts: `@recorder.action`, or `@recorder.action(name="BUY")`. Its calls inside a
        trajectory are recorded in the current step with arguments, result or exception, and time; outside, it runs
        as it is. Functions, coroutines, generators, methods.

        Args:
            size: how much of arguments and result is kept.
        """

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            return actions.recorded(self, function, name, size) if self.enabled else function

        return decorate if function is None else decorate(function)

    def reward(
        self,
        trajectory_id: str,
        reward: float | None,
        *,
        reward_components: Mapping[str, float | None] | None = None,
        source: str = "agent",
        reason: str = "",
    ) -> None:
        """A reward that is known later, sent in the background as trajectories are. None withdraws it."""
        try:
            running = self._open.get(trajectory_id)
            if running is not None:
                running.set_reward(reward, reward_components=reward_components)
                return
            if not self.enabled:
                return
            said = {"reward": plain(reward, []), "source": source, "reason": reason}
            if reward_components is not None:
                said["reward_components"] = mapping(reward_components, [], "")
            body = encode({"trajectory_id": trajectory_id, **(mapping(said, [], "") or {})})
            self._courier.offer(self._reward_item(trajectory_id, body))
        except Exception:
            self.fault("reward")

    def _reward_item(self, trajectory_id: str, body: bytes) -> Item:
        spool = self._courier.spool
        if spool is not None:
            try:
                return spool.keep_reward(trajectory_id, body)
            except OSError as exc:
                logger.error("The reward of trajectory %s goes on in memory: %s", trajectory_id, exc)
        return Item(trajectory_id, len(body), body=body, reward=True, alone=True)

    @property
    def counts(self) -> Counts:
        """What became of what was recorded so far."""
        return self._courier.counts()

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything that has ended is delivered; False: something still waits after `timeout` seconds."""
        return self._courier.flush(timeout) if self.enabled else True

    async def aflush(self, timeout: float = 10.0) -> bool:
        return await asyncio.to_thread(self.flush, timeout)

    def close(self, timeout: float | None = None) -> None:
        """End open trajectories as cancelled and deliver what waits, for at most `timeout` (else exit_seconds).

        Called at the end of the process for every recorder that is still open.
        """
        if self._closed:
            return
        self._closed = True
        for trajectory in list(self._open.values()):
            trajectory.end("cancelled", stop_reason="the recorder was closed")
        self._courier.close(self.exit_seconds if timeout is None else timeout)
        _live.discard(self)

    async def aclose(self, timeout: float | None = None) -> None:
        await asyncio.to_thread(self.close, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # What a trajectory tells its recorder; called with the trajectory's lock held.

    def begun(self, trajectory: Trajectory, envelope: bytes) -> None:
        if not self._closed:
            self._open[trajectory.trajectory_id] = trajectory
            self._on_disk.add(trajectory.trajectory_id)
            self._spool(trajectory.trajectory_id, "B", envelope)
            if trajectory.live and self.enabled:
                self._courier.open_live(trajectory.trajectory_id, opening(envelope))

    def added(self, trajectory: Trajectory, step: bytes) -> None:
        self._spool(trajectory.trajectory_id, "S", step)
        if trajectory.live and self.enabled:
            self._courier.add_live(trajectory.trajectory_id, step)

    def ended(self, trajectory: Trajectory, envelope: bytes, steps: list[bytes]) -> None:
        if not self.enabled:
            return
        trajectory_id = trajectory.trajectory_id
        self._open.pop(trajectory_id, None)
        self._courier.end_live(trajectory_id)
        self._spool(trajectory_id, "E", envelope)
        item = self._finished(trajectory_id)
        if item is None:  # no spool, or it could not take all of it: the copy in memory goes
            body = assemble(envelope, steps)
            item = Item(trajectory_id, len(body), body=body)
        self._courier.offer(item)

    def start_call(self, started_at: str) -> Trajectory:
        """For a call of a wrapped client that is made outside of all trajectories."""
        return Trajectory(self, uuid.uuid4().hex, {"agent_id": self.agent_id, "started_at": started_at})

    def fault(self, what: str) -> None:
        self._courier.fault()
        logger.exception("The recorder failed in %s; the agent goes on.", what)

    def _finished(self, trajectory_id: str) -> Item | None:
        spool = self._courier.spool
        if spool is None or trajectory_id not in self._on_disk:
            return None
        self._on_disk.discard(trajectory_id)
        try:
            return spool.ready(trajectory_id)
        except OSError as exc:
            logger.error("Trajectory %s goes on in memory: %s", trajectory_id, exc)
            return None

    def _spool(self, trajectory_id: str, kind: str, line: bytes) -> None:
        spool = self._courier.spool
        if spool is None or trajectory_id not in self._on_disk:
            return
        try:
            spool.write(trajectory_id, kind, line)
        except OSError as exc:
            self._on_disk.discard(trajectory_id)
            logger.error("Trajectory %s goes on in memory: %s", trajectory_id, exc)
            spool.forget(trajectory_id)

    def _forked(self) -> None:
        """In the child: what waits and what is open is the parent's; it would come twice, with two ends."""
        for trajectory in self._open.values():
            trajectory.left_behind()
        self._open = {}
        self._on_disk = set()
        self._courier.forked()


def address(url: str | None, api_key: str | None) -> tuple[str, str]:
    """(address without a slash at its end, key), from the arguments or the environment.

    Raises:
        ValueError: one of them is given in neither.
    """
    url = url or os.environ.get("TRAININGSITE_URL")
    api_key = api_key or os.environ.get("TRAININGSITE_API_KEY")
    if not url:
        raise ValueError("No address: give url, or set TRAININGSITE_URL (http://127.0.0.1:8000 on one machine).")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url is {url!r}; it begins with http:// or https://.")
    if not api_key:
        raise ValueError(
            "No key: give api_key, or set TRAININGSITE_API_KEY. `manage.py create_api_key --project SLUG --name NAME` "
            "makes one."
        )
    return url.rstrip("/").removesuffix("/api/v1"), api_key


_live: set[Recorder] = set()


def _close_all() -> None:
    for recorder in list(_live):
        recorder.close()


def _forked() -> None:
    for recorder in list(_live):
        try:
            recorder._forked()
        except Exception:
            logger.exception("The recorder could not start anew after a fork.")


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
