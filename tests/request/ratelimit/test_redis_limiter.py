"""Replicas keep to one usage plan: all of it is used, never more, whoever asks and whatever becomes of Redis."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis

from proxy.config import Secret
from proxy.config.store_address import parse_store
from proxy.errors import UsagePlanExhausted
from proxy.observability.metrics import Metrics
from proxy.request.ratelimit.redis_limiter import MIN_SHARE, SHARE_SAMPLE, RedisPlan, RedisRateLimiter
from proxy.request.ratelimit.token_bucket import Bucket
from proxy.request.request_options import AdmissionRequest
from proxy.request.routing import Route
from proxy.store.encryption import TokenCipher
from proxy.store.redis_buckets import RedisBuckets
from proxy.store.redis_client import RedisClient
from tests.conftest import needs
from tests.request.ratelimit.test_limiter import config, drain, target
from tests.store.test_redis_tokens import KEY, sample
from tests.support.redis_server import PROGRAM, RedisServer, redis_server

CONTENT = "/aplus/2020-11-01/contentDocuments"  # 10 calls a second, 10 at once
LATENESS = 0.05  # seconds by which a timer may be late on a busy machine


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    needs(PROGRAM is not None, "redis-server")
    with redis_server(tmp_path) as server:
        yield server


class Fleet:
    """Limits of several processes, in one."""

    def __init__(self, redis: RedisServer, stack: AsyncExitStack) -> None:
        self._redis = redis
        self._stack = stack

    async def replica(self) -> RedisRateLimiter:
        metrics = Metrics()
        link = RedisClient(parse_store(self._redis.url), metrics, timeout=5.0)
        plans = RedisBuckets(link, TokenCipher((Secret(KEY),)))
        self._stack.push_async_callback(link.close)
        self._stack.push_async_callback(plans.close)
        await link.start()
        return RedisRateLimiter(metrics, plans, pace=True)


@pytest.fixture
async def fleet(redis: RedisServer) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(redis, stack)


@pytest.fixture
async def client(redis: RedisServer) -> AsyncIterator[Redis]:
    opened = Redis(port=redis.port)
    yield opened
    await opened.aclose()


@pytest.fixture
def content(tmp_path: Path) -> Route:
    return target(config(tmp_path), CONTENT)


async def told(limits: RedisRateLimiter) -> None:
    """Wait until Redis knows what it was told without anybody waiting for the answer."""
    while (asking := limits._shared._running) is not None:
        await asyncio.wait([asking])


async def until_reserved(limits: RedisRateLimiter, content: Route) -> None:
    """Wait until Redis has reserved the next place for those who wait."""
    plan = limits._plan(content)
    assert isinstance(plan, RedisPlan)
    async with asyncio.timeout(5):
        while plan._granted is None:  # noqa: ASYNC110 - each question takes a few turns of the loop
            await asyncio.sleep(0)


def rate_of(limits: RedisRateLimiter, content: Route) -> float:
    plan = limits._plan(content)
    assert plan is not None
    return plan.bucket.rate


async def test_what_one_replica_takes_the_others_do_not_have(fleet: Fleet, content: Route) -> None:
    one, other = await fleet.replica(), await fleet.replica()
    assert await drain(one, content) == 10
    assert await drain(other, content) == 0
    assert await other.acquire(content, AdmissionRequest(1)) > 0


@pytest.mark.parametrize("replicas", [1, 3, 10])
async def test_a_fleet_uses_its_plan_and_keeps_to_it(fleet: Fleet, content: Route, replicas: int) -> None:
    rate, burst, seconds = 60.0, 10.0, 1.5
    all_limits = [await fleet.replica() for _ in range(replicas)]
    all_limits[0].observe_response(content, 200, str(rate))
    taken: list[tuple[float, int]] = []
    end = time.monotonic() + seconds

    async def call_on(index: int) -> None:
        while (left := end - time.monotonic()) > 0:
            try:
                await all_limits[index].acquire(content, AdmissionRequest(left))
            except UsagePlanExhausted:
                return
            taken.append((time.monotonic(), index))

    await asyncio.gather(*(call_on(index) for index in range(replicas) for _ in range(30 // replicas)))
    amazon = Bucket.full(rate, burst, taken[0][0])
    for moment, _ in taken:
        amazon.refill(moment)
        assert amazon.tokens >= 1 - rate * LATENESS
        amazon.consume()
    permitted = burst + rate * seconds
    assert permitted * 0.9 <= sum(moment <= end for moment, _ in taken) <= permitted + 1
    shares = [sum(index == mine for _, index in taken) for mine in range(replicas)]
    assert min(shares) >= len(taken) / replicas * 0.4


async def test_a_call_that_has_its_place_at_once_costs_one_question_and_has_not_waited(
    fleet: Fleet, content: Route, client: Redis
) -> None:
    limits = await fleet.replica()
    await limits.acquire(content, AdmissionRequest(0))  # loads the script
    before = (await client.info("stats"))["total_commands_processed"]
    waits = [await limits.acquire(content, AdmissionRequest(0)) for _ in range(5)]
    after = (await client.info("stats"))["total_commands_processed"]
    # Of each script: itself, TIME, GET and SET; and this question.
    assert after - before <= 5 * 4 + 1
    assert waits == [0.0] * 5


async def test_calls_of_one_moment_go_in_one_pipeline(fleet: Fleet, content: Route) -> None:
    limits = await fleet.replica()
    await limits.acquire(content, AdmissionRequest(0))
    asked: list[int] = []
    responses = limits._shared._responses

    async def counted(requests: object) -> list[object]:
        asked.append(len(requests))  # type: ignore[arg-type]
        return await responses(requests)  # type: ignore[arg-type]

    limits._shared._responses = counted  # type: ignore[method-assign]  # listens
    await asyncio.gather(*(limits.acquire(content, AdmissionRequest(0)) for _ in range(8)))
    assert asked == [8]


async def test_a_rate_that_one_replica_learns_holds_for_all(fleet: Fleet, content: Route) -> None:
    one, other = await fleet.replica(), await fleet.replica()
    for limits in (one, other):
        await limits.acquire(content, AdmissionRequest(0))
    one.observe_response(content, 200, "25")
    await one.acquire(content, AdmissionRequest(0))
    await other.acquire(content, AdmissionRequest(0))
    assert rate_of(other, content) == 25


async def test_a_429_that_one_replica_gets_empties_the_bucket_of_all(fleet: Fleet, content: Route) -> None:
    one, other = await fleet.replica(), await fleet.replica()
    await other.acquire(content, AdmissionRequest(0))
    one.observe_response(content, 429, None)
    await told(one)
    with pytest.raises(UsagePlanExhausted):
        await other.acquire(content, AdmissionRequest(0))
    assert rate_of(other, content) == 8


async def test_whoever_leaves_gives_its_place_back_to_all(fleet: Fleet, content: Route) -> None:
    one, other = await fleet.replica(), await fleet.replica()
    await drain(one, content)
    waiting = asyncio.create_task(one.acquire(content, AdmissionRequest(10)))
    await until_reserved(one, content)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await told(one)
    assert await other.acquire(content, AdmissionRequest(1)) < 0.3


async def test_a_place_that_was_not_used_is_given_to_any_of_them(fleet: Fleet, content: Route) -> None:
    one, other = await fleet.replica(), await fleet.replica()
    await drain(one, content)
    plan = one._plan(content)
    assert plan is not None
    plan.refund()
    await told(one)
    assert await drain(other, content) == 1


async def test_one_that_leaves_before_redis_responses_takes_nothing_with_it(fleet: Fleet, content: Route) -> None:
    one = await fleet.replica()
    await one.acquire(content, AdmissionRequest(0))
    leaving = [asyncio.create_task(one.acquire(content, AdmissionRequest(0))) for _ in range(5)]
    while one._shared._running is None or one._shared._waiting:  # noqa: ASYNC110 - until the questions are on their way
        await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await told(one)
    assert await drain(one, content) >= 9


async def test_a_call_that_would_wait_too_long_is_refused_at_once(fleet: Fleet, content: Route) -> None:
    one, other = await fleet.replica(), await fleet.replica()
    await drain(one, content)
    await drain(other, content)
    began = time.monotonic()
    with pytest.raises(UsagePlanExhausted):
        await other.acquire(content, AdmissionRequest(0.01))
    assert time.monotonic() - began < 0.1


async def test_without_redis_a_process_paces_by_what_it_knew_last(
    fleet: Fleet, content: Route, redis: RedisServer
) -> None:
    limits = await fleet.replica()
    await drain(limits, content)
    redis.stop()
    assert await limits.acquire(content, AdmissionRequest(1)) > 0  # the bucket is empty still
    assert sample(limits._metrics, "store_up") == 0
    assert not limits.try_acquire(content, AdmissionRequest(0))
    assert await limits.acquire(content, AdmissionRequest(1)) > 0
    redis.start()
    async with asyncio.timeout(8):
        while not limits._shared.redis.is_up:  # noqa: ASYNC110 - a probe by its own clock
            await asyncio.sleep(0.02)
    # A new Redis knows nothing of the bucket, and is told.
    assert await drain(limits, content) < 10


async def test_without_redis_each_has_the_share_that_it_took_before(
    fleet: Fleet, content: Route, redis: RedisServer
) -> None:
    all_limits = [await fleet.replica() for _ in range(4)]
    all_limits[0].observe_response(content, 200, "200")
    for _ in range(4 * 40):
        await asyncio.gather(*(limits.acquire(content, AdmissionRequest(5)) for limits in all_limits))
    redis.stop()
    for limits in all_limits:
        await limits.acquire(content, AdmissionRequest(5))
    rates = [rate_of(limits, content) for limits in all_limits]
    assert 150 < sum(rates) < 250
    assert all(30 < rate < 70 for rate in rates)


async def test_a_connection_that_redis_closed_while_it_was_idle_is_no_loss(
    fleet: Fleet, content: Route, client: Redis
) -> None:
    limits = await fleet.replica()
    await limits.acquire(content, AdmissionRequest(0))
    await client.client_kill_filter(_type="normal", skipme=True)
    assert await limits.acquire(content, AdmissionRequest(0)) == 0
    assert sample(limits._metrics, "store_up") == 1
    assert sample(limits._metrics, "store_failures_total") == 0


async def test_those_in_the_queue_go_on_when_redis_goes(fleet: Fleet, content: Route, redis: RedisServer) -> None:
    limits = await fleet.replica()
    await drain(limits, content)
    waiting = [asyncio.create_task(limits.acquire(content, AdmissionRequest(5))) for _ in range(5)]
    await until_reserved(limits, content)
    redis.stop()
    async with asyncio.timeout(3):
        await asyncio.gather(*waiting)


async def taken_mostly_by_others(fleet: Fleet, content: Route) -> tuple[RedisRateLimiter, RedisPlan]:
    """Return one of two replicas that takes a twentieth of the plan's places, and its plan, which is empty."""
    one, other = await fleet.replica(), await fleet.replica()
    one.observe_response(content, 200, "1000")
    await one.acquire(content, AdmissionRequest(0))
    for _ in range(3 * SHARE_SAMPLE):
        await other.acquire(content, AdmissionRequest(5))
    await one.acquire(content, AdmissionRequest(5))
    one.observe_response(content, 200, "10")
    await drain(one, content)
    plan = one._plan(content)
    assert isinstance(plan, RedisPlan)
    assert plan._own_fraction == MIN_SHARE
    return one, plan


async def test_who_waits_when_redis_goes_is_not_refused_because_of_a_small_share(
    fleet: Fleet, content: Route, redis: RedisServer
) -> None:
    """Eight places are 0.8 s of the whole plan, and 16 s of a twentieth of it."""
    limits, plan = await taken_mostly_by_others(fleet, content)
    waiting = [asyncio.create_task(limits.acquire(content, AdmissionRequest(2))) for _ in range(8)]
    while len(plan.queue) < 8:  # noqa: ASYNC110 - each asks Redis first
        await asyncio.sleep(0)
    redis.stop()
    waits = await asyncio.gather(*waiting)
    assert max(waits) <= 2.5
    assert not limits._shared.redis.is_up
    assert rate_of(limits, content) < 10, "no faster than it has to be"


async def test_who_waits_when_redis_is_back_takes_turns_again_at_once(
    fleet: Fleet, content: Route, redis: RedisServer
) -> None:
    limits, plan = await taken_mostly_by_others(fleet, content)
    limits.observe_response(content, 200, "0.5")
    waiting = asyncio.create_task(limits.acquire(content, AdmissionRequest(60)))
    while not len(plan.queue):  # noqa: ASYNC110 - it asks Redis first
        await asyncio.sleep(0)
    redis.stop()
    while limits._shared.redis.is_up:
        limits._shared.send("look", (plan.to_request(),))
        await asyncio.sleep(0)
    assert plan.estimated_wait(AdmissionRequest(60)) > 20, "at a twentieth of a place in two seconds"
    redis.start()
    assert await waiting < 8


async def test_an_outage_is_no_reason_to_refuse_who_comes_when_redis_is_back(
    fleet: Fleet, content: Route, redis: RedisServer
) -> None:
    """A dozen callers need no more than 1.2 s each, before the outage and after it."""
    limits = await fleet.replica()
    is_over = asyncio.Event()
    served = 0

    async def call_on() -> None:
        nonlocal served
        while not is_over.is_set():
            await limits.acquire(content, AdmissionRequest(4))
            served += 1

    callers = [asyncio.create_task(call_on()) for _ in range(12)]
    await at_least(lambda: served, 20)
    redis.stop()
    await at_least(lambda: not limits._shared.redis.is_up, 1)
    await at_least(lambda: served, served + 10)
    redis.start()
    await at_least(lambda: limits._shared.redis.is_up, 1)
    await at_least(lambda: served, served + 25)
    is_over.set()
    await asyncio.gather(*callers)


async def at_least(count: Callable[[], int], wanted: int) -> None:
    """Wait until this count is reached: by turns and probes that go by the clock."""
    async with asyncio.timeout(10):
        while count() < wanted:  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "spoilt",
    [
        b"",
        b"nonsense",
        b"nan 1 1 1",
        b"5 nan 2 1",
        b"1e9 0 10 1",
        b"-100 0 10 1",
        b"1 99999999999 10 1",
        b"1 1 1 x",
        b"x" * 100_000,
    ],
)
async def test_a_bucket_that_was_spoilt_is_begun_anew(
    fleet: Fleet, content: Route, client: Redis, spoilt: bytes
) -> None:
    limits = await fleet.replica()
    await limits.acquire(content, AdmissionRequest(0))
    (name,) = await client.keys("sp-api-proxy:plan:*")
    await client.set(name, spoilt)
    assert 0 < await drain(limits, content) <= 10
    await client.delete(name)
    await client.lpush(name, "x")
    assert await limits.acquire(content, AdmissionRequest(1)) >= 0
    assert await client.type(name) == b"string"
    assert sample(limits._metrics, "store_up") == 1


async def test_a_bucket_lives_until_it_is_full_again_and_little_longer(
    fleet: Fleet, content: Route, client: Redis
) -> None:
    limits = await fleet.replica()
    await drain(limits, content)
    (name,) = await client.keys("sp-api-proxy:plan:*")
    assert 55_000 < await client.pttl(name) < 62_000
