"""What the engine draws, and that company changes nothing: held to a plain forward pass of one row."""

import math
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.serving.conftest import cache
from tests.serving.running import BASE
from training.trainer.engine import Adapter, Ask, Base, Engine, Row, Sampling, draw, make_samples


@pytest.fixture(scope="module")
def base() -> Base:
    base = Base(BASE, cache(), max_model_len=256, device="cpu")
    base.load()
    return base


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(max_rows=12, cache_bytes=1 << 20)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def adapter(engine: Engine, base: Base, adapters: tuple[Path, Path]) -> Adapter:
    return engine.call(lambda: base.add("one", str(adapters[0]), 0)).result(60)


def prompt(seed: int) -> tuple[int, ...]:
    draws = random.Random(seed)
    return tuple(draws.randrange(256) for _ in range(draws.randrange(3, 40)))


def ask_all(engine: Engine, asks: list[Ask]) -> None:
    done = threading.Semaphore(0)
    for ask in asks:
        ask.on_done = lambda exc: done.release()
    for ask in asks:
        engine.submit(ask)
    for _ in asks:
        assert done.acquire(timeout=60)


def ask(base: Base, adapter: Adapter | None, ids: tuple[int, ...], n: int, sampling: Sampling) -> Ask:
    return Ask(base, adapter, ids, sampling, make_samples(n, sampling.seed), None, lambda exc: None)


def plain_logprobs(base: Base, ids: list[int], start: int, temperature: float) -> list[float]:
    """Log-probabilities of the tokens from `start` on, by one forward pass without cache, padding or company."""
    with torch.inference_mode():
        logits = base.model(input_ids=torch.tensor([ids])).logits[0].float() / temperature
    logp = logits.log_softmax(-1)
    return [float(logp[at - 1, ids[at]]) for at in range(start, len(ids))]


def test_log_probabilities_are_those_of_a_plain_forward_pass(base: Base, engine: Engine, adapter: Adapter) -> None:
    """Rows of many lengths that come and go, more than fit at once, two adapters taking turns."""
    asks = [
        ask(base, (None, adapter)[index % 2], prompt(index), 3,
            Sampling(max_tokens=4 + index % 5, temperature=0.5 + index / 8, seed=index, ignore_eos=True))
        for index in range(10)
    ]  # fmt: skip

    ask_all(engine, asks)

    for one in asks:
        engine.call(partial(base.use, one.adapter)).result(60)
        for sample in one.samples:
            assert len(sample.token_ids) == len(sample.logprobs) == one.sampling.max_tokens
            whole = [*one.prompt, *sample.token_ids]
            expected = plain_logprobs(base, whole, len(one.prompt), one.sampling.temperature)
            assert sample.logprobs == pytest.approx(expected, abs=2e-4)
    engine.call(lambda: base.use(None)).result(60)
    bare = plain_logprobs(base, [*asks[1].prompt, *asks[1].samples[0].token_ids], len(asks[1].prompt), 1.0)
    assert bare != pytest.approx(asks[1].samples[0].logprobs, abs=0.01)


def rows(sampling: Sampling, count: int) -> list[Row]:
    one = Ask(None, None, (1,), sampling, make_samples(count, 0), None, lambda exc: None)  # type: ignore[arg-type]  # draw asks no base
    return [Row(one, sample) for sample in one.samples]


def drawn(probabilities: list[float], sampling: Sampling, count: int = 4000) -> tuple[list[float], list[float]]:
    """Shares of each token over `count` draws, and the log-probabilities that were reported."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    tokens, logp = draw(logits.clone(), rows(sampling, count))
    return (torch.bincount(tokens, minlength=len(probabilities)) / count).tolist(), logp[0].tolist()


def test_tokens_come_as_often_as_their_probability_says() -> None:
    shares, logp = drawn([0.5, 0.3, 0.15, 0.05], Sampling(max_tokens=1))

    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)  # standard error at most 0.008
    assert [math.exp(one) for one in logp] == pytest.approx([0.5, 0.3, 0.15, 0.05])


def test_temperature_is_part_of_the_reported_distribution() -> None:
    """At temperature 0.5 probabilities are squared and normalised: 0.25, 0.09, 0.0225, 0.0025 over 0.365."""
    expected = [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]

    shares, logp = drawn([0.5, 0.3, 0.15, 0.05], Sampling(max_tokens=1, temperature=0.5))

    assert shares == pytest.approx(expected, abs=0.03)
    assert [math.exp(one) for one in logp] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"top_k": 2}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_p": 0.8}, [0.625, 0.375, 0.0, 0.0]),  # 0.5 + 0.3 reaches it
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),
        ({"top_p": 0.0001}, [1.0, 0.0, 0.0, 0.0]),  # the likeliest always stays
        ({"min_p": 0.3}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),  # 0.15 is 0.3 of 0.5
        ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0.0, 0.0]),
    ],
    ids=str,
)
def test_what_is_cut_off_is_never_drawn_and_the_rest_is_normalised(
    cut: dict[str, float], expected: list[float]
) -> None:
    shares, logp = drawn([0.5, 0.3, 0.15, 0.05], Sampling(max_tokens=1, **cut), count=1000)  # type: ignore[arg-type]  # a table

    assert [share == 0 for share in shares] == [one == 0 for one in expected]
    assert [math.exp(one) for one in logp] == pytest.approx(expected, abs=1e-6)


def test_greedy_takes_the_likeliest_and_leaves_cuts_out() -> None:
    shares, logp = drawn([0.3, 0.5, 0.2], Sampling(max_tokens=1, temperature=0.0, top_k=1), count=50)

    assert shares == [0.0, 1.0, 0.0]
    assert [math.exp(one) for one in logp] == pytest.approx([0.3, 0.5, 0.2])


def test_a_cancelled_request_leaves_its_place_to_others(base: Base, engine: Engine) -> None:
    endless = ask(base, None, prompt(1), 12, Sampling(max_tokens=200, ignore_eos=True))
    endless.cancelled = True

    ask_all(engine, [endless, ask(base, None, prompt(2), 1, Sampling(max_tokens=2, ignore_eos=True))])

    assert all(len(sample.token_ids) < 200 for sample in endless.samples)


def test_a_fault_is_told_to_everyone_who_waits_and_costs_nobody_else(base: Base, engine: Engine) -> None:
    told: list[Exception | None] = []
    done = threading.Semaphore(0)

    def on_done(exc: Exception | None) -> None:
        told.append(exc)
        done.release()

    bad = ask(base, None, (10**6,), 2, Sampling(max_tokens=2))  # no such token: the embedding cannot be looked up
    bad.on_done = on_done
    engine.submit(bad)
    assert done.acquire(timeout=60)

    assert isinstance(told[0], Exception)
    ask_all(engine, [ask(base, None, prompt(3), 1, Sampling(max_tokens=2, ignore_eos=True))])
    assert engine.alive
