"""A region that fails throughout: calls fail at once, and single ones look for its return."""

import asyncio

import pytest

from proxy.errors import RegionDown
from proxy.observability.metrics import Metrics
from proxy.request.upstream import circuit_breaker as circuit_module
from proxy.request.upstream.circuit_breaker import FAILURES, FIRST_PROBE, MAX_PROBE, MIN_OUTAGE, CircuitBreakers, Where
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, Received, http_response
from tests.support.raw_client import call, connect, request

EU: Where = ("production", "eu")
NA: Where = ("production", "na")
OPERATIONS = ("orders.v0.getOrders", "sellers.v1.getMarketplaceParticipations", "feeds.2021-06-30.getFeeds")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def circuits(clock: FakeClock) -> CircuitBreakers:
    return CircuitBreakers(Metrics(), clock)


def fail(
    circuits: CircuitBreakers, clock: FakeClock, *, operations: int = 3, answered: bool = True, seconds: float = 0.5
) -> None:
    for number in range(FAILURES):
        circuits.record_failure(EU, OPERATIONS[number % operations], answered=answered)
        clock.advance(seconds)


def is_refused(circuits: CircuitBreakers) -> float | None:
    try:
        circuits.check(EU)
    except RegionDown as error:
        return error.retry_after
    return None


@pytest.mark.parametrize(("operations", "answered"), [(3, True), (1, False)])
def test_a_region_that_fails_throughout_is_down(
    circuits: CircuitBreakers, clock: FakeClock, operations: int, answered: bool
) -> None:
    fail(circuits, clock, operations=operations, answered=answered)
    assert is_refused(circuits) is not None
    circuits.check(NA)
    assert (
        circuits._metrics.registry.get_sample_value(
            "spapi_proxy_circuit_open", {"environment": "production", "region": "eu"}
        )
        == 1
    )


def test_one_operation_that_fails_alone_stops_no_others(circuits: CircuitBreakers, clock: FakeClock) -> None:
    fail(circuits, clock, operations=2)
    assert is_refused(circuits) is None


def test_a_burst_of_failures_is_no_outage_yet(circuits: CircuitBreakers, clock: FakeClock) -> None:
    fail(circuits, clock, seconds=MIN_OUTAGE / FAILURES / 2)
    assert is_refused(circuits) is None


def test_one_response_among_them_says_that_the_region_is_there(circuits: CircuitBreakers, clock: FakeClock) -> None:
    for _ in range(10):
        for number in range(FAILURES - 1):
            circuits.record_failure(EU, OPERATIONS[number % 3], answered=True)
            clock.advance(1)
        circuits.record_success(EU)
    assert is_refused(circuits) is None


def test_what_failed_before_the_last_good_response_counts_no_more(circuits: CircuitBreakers, clock: FakeClock) -> None:
    for number in range(FAILURES - 1):
        circuits.record_failure(EU, OPERATIONS[number % 3], answered=False)
        clock.advance(1)
    circuits.record_success(EU)
    fail(circuits, clock, operations=1)
    assert is_refused(circuits) is None, "one operation alone, and all of it answered"


def test_single_calls_look_for_its_return_ever_more_rarely(circuits: CircuitBreakers, clock: FakeClock) -> None:
    fail(circuits, clock)
    pauses = []
    for _ in range(8):
        begin = clock()
        while is_refused(circuits) is not None:
            clock.advance(0.5)
        pauses.append(clock() - begin)
        assert is_refused(circuits) is not None, "one at a time"
        circuits.record_failure(EU, OPERATIONS[0], answered=True)
    assert pauses[1:] == [min(FIRST_PROBE * 2**number, MAX_PROBE) for number in range(7)]
    circuits.record_success(EU)
    assert is_refused(circuits) is None


async def test_while_a_region_is_down_nothing_is_sent_but_probes(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_module, "MIN_OUTAGE", 0.0)
    monkeypatch.setattr(circuit_module, "FIRST_PROBE", 0.2)

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("503 Unavailable", b"amazons own"))

    fake_upstream.script = script
    proxy: RunningProxy = await start_proxy(retry={"attempts": 1}, limits={"pace": False})
    paths = ("/orders/v0/orders", "/sellers/v1/marketplaceParticipations", "/feeds/2021-06-30/feeds")
    got = [await call(proxy.addresses[0], "GET", paths[number % 3]) for number in range(FAILURES)]
    assert {(one.status, one.error, one.body) for one in got} == {(503, None, b"amazons own")}
    down = await call(proxy.addresses[0], "GET", paths[0])
    assert (down.status, down.error, down.get("retry-after")) == (503, "RegionDown", "1")
    assert len(fake_upstream.received) == FAILURES
    fake_upstream.script = None
    async with asyncio.timeout(10):
        while (await call(proxy.addresses[0], "GET", paths[0])).status != 200:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.02)
    assert (await call(proxy.addresses[0], "GET", paths[1])).status == 200, "it is back for everybody"


async def test_a_region_that_is_silent_is_down_too(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_module, "MIN_OUTAGE", 0.0)
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    proxy = await start_proxy(limits={"pace": False}, timeouts={"upstream_idle": "100ms"})
    got = await asyncio.gather(*(call(proxy.addresses[0], "GET", "/brand/new") for _ in range(FAILURES)))
    assert {one.error for one in got} == {"UpstreamTimeout"}
    assert (await call(proxy.addresses[0], "GET", "/brand/new")).error == "RegionDown"


async def test_clients_that_leave_say_nothing_about_a_region(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    proxy = await start_proxy()
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", "/brand/new"))
        await fake_upstream.arrived.wait()
    reader = fake_upstream.received[0].reader
    assert reader is not None
    assert await asyncio.wait_for(reader.read(), 10) == b"", "the connection to Amazon ends with the client's"
    assert (
        proxy.metrics.registry.get_sample_value(
            "spapi_proxy_circuit_open", {"environment": "production", "region": "eu"}
        )
        is None
    )
