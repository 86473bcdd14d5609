"""The stock asynchronous OpenAI client works against the gateway unchanged, and each of its calls is recorded once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import openai
import pytest

from tests.gateway.backend import Backend, Reply
from tests.gateway.recorded import QUESTION, calls_of, row_of
from tests.gateway.running import RunningGateway
from trajectories.models import Project, Trajectory

AT_ONCE = 12


@asynccontextmanager
async def client_of(gateway: RunningGateway, key: str, trajectory_id: str) -> AsyncIterator[openai.AsyncOpenAI]:
    headers = {"X-Trajectory-Id": trajectory_id}
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key=key, default_headers=headers, max_retries=0
    ) as client:
        yield client


async def whole(client: openai.AsyncOpenAI) -> str:
    answer = await client.chat.completions.create(model="tiny", messages=QUESTION)
    return answer.choices[0].message.content or ""


async def streamed(client: openai.AsyncOpenAI) -> str:
    words = ""
    async for chunk in await client.chat.completions.create(model="tiny", messages=QUESTION, stream=True):
        words += chunk.choices[0].delta.content or ""
    return words


@pytest.mark.parametrize("ask", [whole, streamed])
def test_an_answer_comes_whole_or_streamed_and_is_recorded(
    gateway: RunningGateway,
    backend: Backend,
    key: str,
    project: Project,
    ask: Callable[[openai.AsyncOpenAI], Awaitable[str]],
) -> None:
    async def main() -> str:
        async with client_of(gateway, key, "t1") as client:
            return await ask(client)

    assert asyncio.run(main()) == "Buy on good news."
    [call] = calls_of(project, "t1")
    assert (call.response, call.finish_reason) == ("Buy on good news.", "stop")
    assert call.token_ids == [100, 101, 102, 103, 104]
    assert len(backend.asked) == 1


def test_many_calls_at_once_are_each_recorded_once(gateway: RunningGateway, key: str, project: Project) -> None:
    async def one(number: int) -> str:
        async with client_of(gateway, key, f"t{number % 3}") as client:
            return await (streamed if number % 2 else whole)(client)

    async def main() -> list[str]:
        return await asyncio.gather(*(one(number) for number in range(AT_ONCE)))

    assert asyncio.run(main()) == ["Buy on good news."] * AT_ONCE
    for name in ("t0", "t1", "t2"):
        assert len(calls_of(project, name, AT_ONCE // 3)) == AT_ONCE // 3
    assert Trajectory.objects.filter(project=project).count() == 3


def test_an_error_of_the_backend_reaches_it_as_its_own_exception(
    gateway: RunningGateway, backend: Backend, key: str, project: Project
) -> None:
    body = b'{"error": {"message": "Too many requests.", "type": "rate_limit", "code": "busy", "param": null}}'
    backend.replies = [Reply(status=429, raw=body, headers={"Retry-After": "7"}), Reply()]

    async def main() -> openai.RateLimitError:
        async with client_of(gateway, key, "t1") as client:
            with pytest.raises(openai.RateLimitError, match="Too many requests") as refused:
                await whole(client)
            assert await whole(client) == "Buy on good news."
            return refused.value

    refused = asyncio.run(main())
    assert (refused.code, refused.response.headers["Retry-After"]) == ("busy", "7")
    failed, served = calls_of(project, "t1", 2)
    assert isinstance(failed.error, dict) and failed.error["status"] == 429
    assert (failed.response, served.response) == (None, "Buy on good news.")
    assert row_of(project, "t1").n_calls == 2
