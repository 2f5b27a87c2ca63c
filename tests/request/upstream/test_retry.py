"""When a call that failed is sent again: every rule, with a far side that records exactly what it received."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import Retry
from proxy.request.upstream.forward import MAX_BUFFERED
from proxy.request.upstream.retry import INITIAL_BALANCE, MAX_BALANCE, RetryBudget, backoff
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.fake_upstream import FarSide, Received, TokenHost, answer
from tests.support.raw_client import Answer, call, connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"
FEEDS = "/feeds/2021-06-30/feeds"
FEES = "/products/fees/v0/feesEstimate"  # a POST that only reads
SHIPMENT = "/mfn/v0/shipments/1"
QUICK = {"retry": {"first_pause": "1ms", "budget": 100}, "limits": {"pace": False}}

REPEATABLE = [("GET", SELLERS), ("HEAD", SELLERS), ("PUT", FEEDS), ("DELETE", FEEDS), ("POST", FEES)]
ONCE = [("POST", FEEDS), ("PATCH", FEEDS), ("POST", "/brand/new")]


def fails(far_side: FarSide, times: int, how: Callable[[asyncio.StreamWriter], None]) -> None:
    """Let the far side fail so many times, and then work."""

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        if len(far_side.received) <= times:
            how(writer)
        else:
            writer.write(answer("200 OK", b"" if received.method == "HEAD" else received.body))
        await writer.drain()

    far_side.script = script


def status(line: str, **fields: str) -> Callable[[asyncio.StreamWriter], None]:
    return lambda writer: writer.write(answer(line, b"failed", **fields))


def closes(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def send(proxy: RunningProxy, method: str, target: str, **fields: str) -> Answer:
    body = None if method in {"GET", "HEAD"} else b"body"
    return await call(proxy.addresses[0], method, target, body, **fields)


def retried(proxy: RunningProxy, reason: str) -> float | None:
    return proxy.metrics.registry.get_sample_value("spapi_proxy_upstream_retries_total", {"reason": reason})


@pytest.mark.parametrize("line", ["500 Internal", "502 Bad Gateway", "503 Unavailable", "504 Timeout"])
@pytest.mark.parametrize(("method", "target"), REPEATABLE)
async def test_what_does_the_same_when_done_twice_is_sent_again(
    start_proxy: StartProxy, far_side: FarSide, method: str, target: str, line: str
) -> None:
    if method == "HEAD":
        fails(far_side, 2, lambda writer: writer.write(answer(line)))
    else:
        fails(far_side, 2, status(line))
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, method, target)
    assert (got.status, got.decided["attempts"]) == (200, "3")
    assert [(one.method, one.target, one.body) for one in far_side.received] == [
        (method, target, b"" if method in {"GET", "HEAD"} else b"body")
    ] * 3
    assert retried(proxy, f"status_{line[:3]}") == 2


async def test_an_answer_that_does_not_count_is_not_read_to_its_end(start_proxy: StartProxy, far_side: FarSide) -> None:
    fails(far_side, 1, lambda writer: writer.write(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 100\r\n\r\nhalf"))
    proxy = await start_proxy(**QUICK)
    assert (await send(proxy, "GET", SELLERS)).status == 200
    reader = far_side.received[0].reader
    assert reader is not None
    async with asyncio.timeout(10):
        while not reader.at_eof():  # noqa: ASYNC110 - the server reads it too
            await asyncio.sleep(0)


@pytest.mark.parametrize("how", [status("500 Internal"), status("503 Unavailable"), closes])
@pytest.mark.parametrize(("method", "target"), ONCE)
async def test_what_may_have_been_acted_on_is_sent_once(
    start_proxy: StartProxy,
    far_side: FarSide,
    method: str,
    target: str,
    how: Callable[[asyncio.StreamWriter], None],
) -> None:
    fails(far_side, 10, how)
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, method, target)
    assert got.status in {500, 502, 503}
    assert got.decided["attempts"] == "1"
    assert len(far_side.received) == 1


async def test_what_may_have_been_acted_on_is_sent_once_on_a_stale_connection_too(
    start_proxy: StartProxy, far_side: FarSide
) -> None:
    proxy = await start_proxy(**QUICK)
    await send(proxy, "GET", SELLERS)
    fails(far_side, 10, closes)
    got = await send(proxy, "POST", FEEDS)
    assert (got.status, got.error) == (502, "UpstreamBroken")
    assert len(far_side.received) == 2


@pytest.mark.parametrize(("method", "target"), REPEATABLE)
async def test_a_connection_that_breaks_before_an_answer_is_tried_again(
    start_proxy: StartProxy, far_side: FarSide, method: str, target: str
) -> None:
    fails(far_side, 2, closes)
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, method, target)
    assert (got.status, got.decided["attempts"]) == (200, "3")


async def test_attempts_have_an_end_and_the_last_answer_is_passed_on(
    start_proxy: StartProxy, far_side: FarSide
) -> None:
    fails(far_side, 100, status("503 Unavailable", x_mark="amazons"))
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, "GET", SELLERS)
    assert (got.status, got.body, got.get("x-mark"), got.error) == (503, b"failed", "amazons", None)
    assert len(far_side.received) == 3
    fails(far_side, 100, closes)
    got = await send(proxy, "GET", SELLERS)
    assert (got.status, got.error) == (502, "UpstreamBroken")
    assert len(far_side.received) == 6


@pytest.mark.parametrize(
    "line", ["400 Bad Request", "404 Not Found", "408 Timeout", "409 Conflict", "501 Not Implemented"]
)
async def test_other_answers_count(start_proxy: StartProxy, far_side: FarSide, line: str) -> None:
    fails(far_side, 1, status(line))
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, "GET", SELLERS)
    assert (got.status, got.decided["attempts"]) == (int(line[:3]), "1")


async def test_retry_off_sends_once(start_proxy: StartProxy, far_side: FarSide) -> None:
    proxy = await start_proxy(**QUICK)
    await send(proxy, "GET", SELLERS)
    for how in (status("503 Unavailable"), closes, status("429 Too Many")):
        far_side.received.clear()
        fails(far_side, 1, how)
        got = await send(proxy, "GET", SELLERS, x_sp_retry="off")
        assert got.status in {429, 502, 503}
        assert len(far_side.received) == 1
    bad = await send(proxy, "GET", SELLERS, x_sp_retry="perhaps")
    assert (bad.status, bad.error) == (400, "BadOption")


async def test_each_application_has_its_own_rules(start_proxy: StartProxy, far_side: FarSide) -> None:
    credentials = {"client_id": "client", "client_secret": "client-secret"}
    proxy = await start_proxy(
        **QUICK,
        applications={"main": credentials, "careful": {**credentials, "retry": {"attempts": 1}}},
        accounts={
            name: {"application": name, "refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("main", "careful")
        },
    )
    for account, attempts in (("main", "3"), ("careful", "1")):
        far_side.received.clear()
        fails(far_side, 10, status("500 Internal"))
        got = await send(proxy, "GET", SELLERS, x_sp_account=account)
        assert got.decided["attempts"] == attempts


async def test_an_outage_is_not_multiplied(start_proxy: StartProxy, far_side: FarSide) -> None:
    proxy = await start_proxy(retry={"first_pause": "1ms", "budget": 10}, limits={"pace": False})
    fails(far_side, 10_000, status("500 Internal"))
    for _ in range(100):
        await send(proxy, "GET", "/brand/new")
    assert len(far_side.received) <= 100 + INITIAL_BALANCE + 100 * 0.1 + 1


async def test_a_body_that_was_not_kept_is_not_sent_again(start_proxy: StartProxy, far_side: FarSide) -> None:
    proxy = await start_proxy(**QUICK)
    fails(far_side, 1, status("500 Internal"))
    got = await call(proxy.addresses[0], "PUT", FEEDS, b"x" * (MAX_BUFFERED + 1))
    assert (got.status, len(far_side.received)) == (500, 1)


async def test_amazon_silent_is_not_tried_again(start_proxy: StartProxy, far_side: FarSide) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    far_side.script = script
    proxy = await start_proxy(**QUICK, timeouts={"upstream_idle": "100ms"})
    got = await send(proxy, "GET", SELLERS)
    assert (got.status, got.error, len(far_side.received)) == (504, "UpstreamTimeout", 1)


async def test_an_answer_that_broke_off_is_not_tried_again(start_proxy: StartProxy, far_side: FarSide) -> None:
    def half(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        writer.close()

    fails(far_side, 10, half)
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, "GET", SELLERS)
    assert (got.complete, len(far_side.received)) == (False, 1)


async def test_a_refused_connection_is_tried_again(start_proxy: StartProxy, token_host: TokenHost) -> None:
    gone = FarSide()
    async with gone:
        url = gone.url
    endpoints = {"na": url, "eu": url, "fe": url, "lwa": token_host.url}
    proxy = await start_proxy(**QUICK, endpoints=endpoints)
    got = await send(proxy, "GET", SELLERS)
    assert (got.status, got.error, got.decided["attempts"]) == (502, "UpstreamUnreachable", "3")
    got = await send(proxy, "POST", FEEDS)
    assert (got.status, got.decided["attempts"]) == (502, "1")


# 429: not executed, whatever the method.


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
async def test_a_throttled_call_is_sent_again_at_its_plans_pace(
    start_proxy: StartProxy, far_side: FarSide, method: str
) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        is_first = len(far_side.received) == 2
        body = b"failed" if is_first else received.body
        writer.write(answer("429 Too Many", body) if is_first else answer("200 OK", body, x_amzn_ratelimit_limit="20"))

    far_side.script = script
    proxy = await start_proxy()
    await send(proxy, method, "/mfn/v0/shipments" if method == "POST" else SHIPMENT)  # the rate is 20 from now on
    got = await send(proxy, method, "/mfn/v0/shipments" if method == "POST" else SHIPMENT)
    assert (got.status, got.decided["attempts"]) == (200, "2")
    assert float(got.decided["wait"]) >= 0.04
    assert far_side.received[1].body == far_side.received[2].body
    assert retried(proxy, "throttled") == 1


async def test_a_throttled_call_without_a_place_in_time_is_passed_on_with_the_time_to_come_back(
    start_proxy: StartProxy, far_side: FarSide
) -> None:
    fails(far_side, 10, status("429 Too Many"))
    proxy = await start_proxy(limits={"max_wait": "500ms"})
    got = await send(proxy, "GET", SHIPMENT)  # 1 per second
    assert (got.status, got.body, got.error, got.get("retry-after")) == (429, b"failed", None, "2")
    assert len(far_side.received) == 1


async def test_amazons_own_retry_after_stays(start_proxy: StartProxy, far_side: FarSide) -> None:
    fails(far_side, 10, status("429 Too Many", retry_after="77"))
    proxy = await start_proxy(limits={"max_wait": "0"})
    assert (await send(proxy, "GET", SHIPMENT)).get("retry-after") == "77"


async def test_a_throttled_call_is_given_up_with_its_time(start_proxy: StartProxy, far_side: FarSide) -> None:
    fails(far_side, 1000, status("429 Too Many"))
    proxy = await start_proxy(limits={"max_wait": "300ms"})
    await proxy_learns_a_rate(proxy, far_side)
    got = await send(proxy, "GET", SHIPMENT)
    assert got.status == 429
    assert float(got.decided["wait"]) <= 0.8
    assert 2 <= len(far_side.received) <= 12


async def proxy_learns_a_rate(proxy: RunningProxy, far_side: FarSide) -> None:
    script = far_side.script
    fails(far_side, 0, closes)

    async def announced(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(answer("200 OK", x_amzn_ratelimit_limit="20"))

    far_side.script = announced
    await send(proxy, "GET", SHIPMENT)
    far_side.received.clear()
    far_side.script = script


# The caller's own time.


async def test_the_callers_time_bounds_everything(start_proxy: StartProxy, far_side: FarSide) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    far_side.script = script
    proxy = await start_proxy()
    got = await send(proxy, "GET", SELLERS, x_sp_timeout="200ms")
    assert (got.status, got.error) == (504, "CallTimeout")


async def test_the_callers_time_bounds_retries(start_proxy: StartProxy, far_side: FarSide) -> None:
    fails(far_side, 10, status("500 Internal"))
    proxy = await start_proxy(retry={"first_pause": "1h", "longest_pause": "1h"})
    got = await asyncio.wait_for(send(proxy, "GET", SELLERS, x_sp_timeout="1s"), 10)
    assert (got.status, got.decided["attempts"]) == (500, "1")


@pytest.mark.parametrize("text", ["", "soon", "-1s", "0", "9" * 5000, "NaN"])
async def test_a_time_that_means_nothing_is_refused(proxy: RunningProxy, text: str) -> None:
    got = await send(proxy, "GET", SELLERS, x_sp_timeout=text)
    assert (got.status, got.error) == (400, "BadOption")


@pytest.mark.parametrize("fields", [{"x_sp_priority": "high"}, {"x_sp_client": "a b"}, {"x_sp_client": "x" * 65}])
async def test_other_options_that_mean_nothing_are_refused(proxy: RunningProxy, fields: dict[str, str]) -> None:
    got = await send(proxy, "GET", SELLERS, **fields)
    assert (got.status, got.error) == (400, "BadOption")


async def test_a_client_that_leaves_during_a_pause_is_not_sent_again(
    start_proxy: StartProxy, far_side: FarSide
) -> None:
    fails(far_side, 10, status("500 Internal"))
    proxy = await start_proxy(retry={"first_pause": "1h", "longest_pause": "1h"})
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS))
        await far_side.arrived.wait()
        await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        while proxy.metrics.in_flight:  # noqa: ASYNC110 - a gauge tells nobody
            await asyncio.sleep(0)
    assert len(far_side.received) == 1


# The arithmetic.


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_a_pause_is_a_share_of_a_doubling_time(failures: int, share: float) -> None:
    retry = Retry(first_pause=0.1, longest_pause=2.0)
    assert 0 <= backoff(retry, failures, share) <= min(2.0, 0.1 * 2.0 ** min(failures - 1, 50))
    assert backoff(retry, 2, 1.0) == 0.2


@given(st.lists(st.booleans(), max_size=500), st.floats(0, 1))
def test_a_budget_gives_no_more_than_it_was_given(calls: list[bool], share: float) -> None:
    budget, given_back = RetryBudget(share), 0
    for is_call in calls:
        if is_call:
            budget.deposit()
        else:
            given_back += budget.withdraw()
        assert 0 <= budget.balance <= MAX_BALANCE
    assert given_back <= INITIAL_BALANCE + share * sum(calls) + 1e-6
