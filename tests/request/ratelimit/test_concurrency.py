"""Room for one more: requests of a caller in flight, requests of an account at Amazon, in turn and without a leak."""

import asyncio
from collections.abc import Callable

import pytest

from proxy.config import Bounds
from proxy.errors import AccountBusy, CallerBusy
from proxy.observability.metrics import Metrics
from proxy.request.ratelimit.concurrency import ConcurrencyLimiter

LONG = 60.0  # seconds that no test waits for


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def concurrency(metrics: Metrics) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(Bounds(requests=2, account_requests=2), metrics)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it takes some rounds of the loop, and no time
        await asyncio.sleep(0)


def test_a_caller_has_its_own_number(concurrency: ConcurrencyLimiter) -> None:
    concurrency.acquire_caller("one")
    concurrency.acquire_caller("one")
    with pytest.raises(CallerBusy) as caught:
        concurrency.acquire_caller("one")
    assert caught.value.headers()["Retry-After"] == "1"
    concurrency.acquire_caller("two")
    concurrency.release_caller("one")
    concurrency.acquire_caller("one")


async def test_an_account_waits_in_turn(concurrency: ConcurrencyLimiter) -> None:
    came: list[int] = []

    async def go(number: int) -> None:
        await concurrency.acquire_account("acme", LONG)
        came.append(number)

    tasks = [asyncio.create_task(go(number)) for number in range(6)]
    await until(lambda: len(came) == 2)
    await concurrency.acquire_account("other", LONG)
    for count in range(3, 7):
        concurrency.release_account("acme")
        await until(lambda expected=count: len(came) == expected)  # type: ignore[misc]  # a default is a binding
    assert came == list(range(6))
    await asyncio.gather(*tasks)


async def test_who_waits_too_long_is_told_so_and_takes_no_place(concurrency: ConcurrencyLimiter) -> None:
    for _ in range(2):
        await concurrency.acquire_account("acme", LONG)
    with pytest.raises(AccountBusy):
        await concurrency.acquire_account("acme", 0)
    concurrency.release_account("acme")
    await concurrency.acquire_account("acme", 0)


async def test_a_newcomer_does_not_pass_those_who_wait(concurrency: ConcurrencyLimiter) -> None:
    for _ in range(2):
        await concurrency.acquire_account("acme", LONG)
    waiting = asyncio.create_task(concurrency.acquire_account("acme", LONG))
    await asyncio.sleep(0)
    concurrency.release_account("acme")  # to the one who waits, though it has not noticed yet
    with pytest.raises(AccountBusy):
        await concurrency.acquire_account("acme", 0)
    await waiting


@pytest.mark.parametrize("place_came", ["never", "before", "in the very moment"])
async def test_who_leaves_while_waiting_leaves_nothing_behind(
    concurrency: ConcurrencyLimiter, metrics: Metrics, place_came: str
) -> None:
    for _ in range(2):
        await concurrency.acquire_account("acme", LONG)
    leaving, staying = (asyncio.create_task(concurrency.acquire_account("acme", LONG)) for _ in range(2))
    await asyncio.sleep(0)
    if place_came == "before":
        concurrency.release_account("acme")
    leaving.cancel()
    if place_came == "in the very moment":
        concurrency.release_account("acme")
    with pytest.raises(asyncio.CancelledError):
        await leaving
    if place_came == "never":
        concurrency.release_account("acme")
    await staying
    for _ in range(2):
        concurrency.release_account("acme")
    samples = {
        sample.labels["account"]: sample.value
        for family in metrics.registry.collect()
        if family.name == "spapi_proxy_account_requests_in_flight"
        for sample in family.samples
    }
    assert samples == {"acme": 0}
    assert not concurrency._waiting
