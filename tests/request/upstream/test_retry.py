"""When a call that failed is sent again: every rule, with a far side that records exactly what it received."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import Retry
from proxy.request.upstream.call import MAX_BUFFERED
from proxy.request.upstream.retry import INITIAL_BALANCE, MAX_BALANCE, RetryBudget, backoff
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response
from tests.support.raw_client import RawResponse, call, connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"
FEEDS = "/feeds/2021-06-30/feeds"
FEES = "/products/fees/v0/feesEstimate"  # a POST that only reads
SHIPMENT = "/mfn/v0/shipments/1"
QUICK = {"retry": {"first_pause": "1ms", "budget": 100}, "limits": {"pace": False}}

REPEATABLE = [("GET", SELLERS), ("HEAD", SELLERS), ("PUT", FEEDS), ("DELETE", FEEDS), ("POST", FEES)]
ONCE = [("POST", FEEDS), ("PATCH", FEEDS), ("POST", "/brand/new")]


def fails(fake_upstream: FakeUpstream, times: int, how: Callable[[asyncio.StreamWriter], None]) -> None:
    """Let the far side fail so many times, and then work."""

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        if len(fake_upstream.received) <= times:
            how(writer)
        else:
            writer.write(http_response("200 OK", b"" if received.method == "HEAD" else received.body))
        await writer.drain()

    fake_upstream.script = script


def status(line: str, **fields: str) -> Callable[[asyncio.StreamWriter], None]:
    return lambda writer: writer.write(http_response(line, b"failed", **fields))


def closes(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def send(proxy: RunningProxy, method: str, target: str, **fields: str) -> RawResponse:
    body = None if method in {"GET", "HEAD"} else b"body"
    return await call(proxy.addresses[0], method, target, body, **fields)


def retried(proxy: RunningProxy, reason: str) -> float | None:
    return proxy.metrics.registry.get_sample_value("spapi_proxy_upstream_retries_total", {"reason": reason})


@pytest.mark.parametrize("line", ["500 Internal", "502 Bad Gateway", "503 Unavailable", "504 Timeout"])
@pytest.mark.parametrize(("method", "target"), REPEATABLE)
async def test_what_does_the_same_when_done_twice_is_sent_again(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, method: str, target: str, line: str
) -> None:
    if method == "HEAD":
        fails(fake_upstream, 2, lambda writer: writer.write(http_response(line)))
    else:
        fails(fake_upstream, 2, status(line))
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, method, target)
    assert (got.status, got.decided["attempts"]) == (200, "3")
    assert [(one.method, one.target, one.body) for one in fake_upstream.received] == [
        (method, target, b"" if method in {"GET", "HEAD"} else b"body")
    ] * 3
    assert retried(proxy, f"status_{line[:3]}") == 2


async def test_a_response_that_does_not_count_is_not_read_to_its_end(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    fails(fake_upstream, 1, lambda writer: writer.write(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 100\r\n\r\nhalf"))
    proxy = await start_proxy(**QUICK)
    assert (await send(proxy, "GET", SELLERS)).status == 200
    reader = fake_upstream.received[0].reader
    assert reader is not None
    async with asyncio.timeout(10):
        while not reader.at_eof():  # noqa: ASYNC110 - the server reads it too
            await asyncio.sleep(0)


@pytest.mark.parametrize("how", [status("500 Internal"), status("503 Unavailable"), closes])
@pytest.mark.parametrize(("method", "target"), ONCE)
async def test_what_may_have_been_acted_on_is_sent_once(
    start_proxy: StartProxy,
    fake_upstream: FakeUpstream,
    method: str,
    target: str,
    how: Callable[[asyncio.StreamWriter], None],
) -> None:
    fails(fake_upstream, 10, how)
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, method, target)
    assert got.status in {500, 502, 503}
    assert got.decided["attempts"] == "1"
    assert len(fake_upstream.received) == 1


async def test_what_may_have_been_acted_on_is_sent_once_on_a_stale_connection_too(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    proxy = await start_proxy(**QUICK)
    await send(proxy, "GET", SELLERS)
    fails(fake_upstream, 10, closes)
    got = await send(proxy, "POST", FEEDS)
    assert (got.status, got.error) == (502, "UpstreamBroken")
    assert len(fake_upstream.received) == 2


@pytest.mark.parametrize(("method", "target"), REPEATABLE)
async def test_a_connection_that_breaks_before_a_response_is_tried_again(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, method: str, target: str
) -> None:
    fails(fake_upstream, 2, closes)
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, method, target)
    assert (got.status, got.decided["attempts"]) == (200, "3")


async def test_attempts_have_an_end_and_the_last_response_is_passed_on(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    fails(fake_upstream, 100, status("503 Unavailable", x_mark="amazons"))
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, "GET", SELLERS)
    assert (got.status, got.body, got.get("x-mark"), got.error) == (503, b"failed", "amazons", None)
    assert len(fake_upstream.received) == 3
    fails(fake_upstream, 100, closes)
    got = await send(proxy, "GET", SELLERS)
    assert (got.status, got.error) == (502, "UpstreamBroken")
    assert len(fake_upstream.received) == 6


@pytest.mark.parametrize(
    "line", ["400 Bad Request", "404 Not Found", "408 Timeout", "409 Conflict", "501 Not Implemented"]
)
async def test_other_responses_count(start_proxy: StartProxy, fake_upstream: FakeUpstream, line: str) -> None:
    fails(fake_upstream, 1, status(line))
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, "GET", SELLERS)
    assert (got.status, got.decided["attempts"]) == (int(line[:3]), "1")


async def test_retry_off_sends_once(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    proxy = await start_proxy(**QUICK)
    await send(proxy, "GET", SELLERS)
    for how in (status("503 Unavailable"), closes, status("429 Too Many")):
        fake_upstream.received.clear()
        fails(fake_upstream, 1, how)
        got = await send(proxy, "GET", SELLERS, x_sp_retry="off")
        assert got.status in {429, 502, 503}
        assert len(fake_upstream.received) == 1
    bad = await send(proxy, "GET", SELLERS, x_sp_retry="perhaps")
    assert (bad.status, bad.error) == (400, "BadOption")


async def test_each_application_has_its_own_rules(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    token_keys = {"client_id": "client", "client_secret": "client-secret"}
    proxy = await start_proxy(
        **QUICK,
        applications={"main": token_keys, "careful": {**token_keys, "retry": {"attempts": 1}}},
        accounts={
            name: {"application": name, "refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("main", "careful")
        },
    )
    for account, attempts in (("main", "3"), ("careful", "1")):
        fake_upstream.received.clear()
        fails(fake_upstream, 10, status("500 Internal"))
        got = await send(proxy, "GET", SELLERS, x_sp_account=account)
        assert got.decided["attempts"] == attempts


async def test_an_outage_is_not_multiplied(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    proxy = await start_proxy(retry={"first_pause": "1ms", "budget": 10}, limits={"pace": False})
    fails(fake_upstream, 10_000, status("500 Internal"))
    for _ in range(100):
        await send(proxy, "GET", "/brand/new")
    assert len(fake_upstream.received) <= 100 + INITIAL_BALANCE + 100 * 0.1 + 1


async def test_a_body_that_was_not_kept_is_not_sent_again(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    proxy = await start_proxy(**QUICK)
    fails(fake_upstream, 1, status("500 Internal"))
    got = await call(proxy.addresses[0], "PUT", FEEDS, b"x" * (MAX_BUFFERED + 1))
    assert (got.status, len(fake_upstream.received)) == (500, 1)


async def test_amazon_silent_is_not_tried_again(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    proxy = await start_proxy(**QUICK, timeouts={"upstream_idle": "100ms"})
    got = await send(proxy, "GET", SELLERS)
    assert (got.status, got.error, len(fake_upstream.received)) == (504, "UpstreamTimeout", 1)


async def test_a_response_that_broke_off_is_not_tried_again(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    def half(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        writer.close()

    fails(fake_upstream, 10, half)
    proxy = await start_proxy(**QUICK)
    got = await send(proxy, "GET", SELLERS)
    assert (got.complete, len(fake_upstream.received)) == (False, 1)


async def test_a_refused_connection_is_tried_again(start_proxy: StartProxy, token_host: TokenHost) -> None:
    gone = FakeUpstream()
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
    start_proxy: StartProxy, fake_upstream: FakeUpstream, method: str
) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        is_first = len(fake_upstream.received) == 2
        body = b"failed" if is_first else received.body
        writer.write(
            http_response("429 Too Many", body)
            if is_first
            else http_response("200 OK", body, x_amzn_ratelimit_limit="20")
        )

    fake_upstream.script = script
    proxy = await start_proxy()
    await send(proxy, method, "/mfn/v0/shipments" if method == "POST" else SHIPMENT)  # the rate is 20 from now on
    got = await send(proxy, method, "/mfn/v0/shipments" if method == "POST" else SHIPMENT)
    assert (got.status, got.decided["attempts"]) == (200, "2")
    assert float(got.decided["wait"]) >= 0.04
    assert fake_upstream.received[1].body == fake_upstream.received[2].body
    assert retried(proxy, "throttled") == 1


async def test_a_throttled_call_without_a_place_in_time_is_passed_on_with_the_time_to_retry(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    fails(fake_upstream, 10, status("429 Too Many"))
    proxy = await start_proxy(limits={"max_wait": "500ms"})
    got = await send(proxy, "GET", SHIPMENT)  # 1 per second
    assert (got.status, got.body, got.error, got.get("retry-after")) == (429, b"failed", None, "2")
    assert len(fake_upstream.received) == 1


async def test_amazons_own_retry_after_stays(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    fails(fake_upstream, 10, status("429 Too Many", retry_after="77"))
    proxy = await start_proxy(limits={"max_wait": "0"})
    assert (await send(proxy, "GET", SHIPMENT)).get("retry-after") == "77"


async def test_a_throttled_call_is_given_up_with_its_time(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    fails(fake_upstream, 1000, status("429 Too Many"))
    proxy = await start_proxy(limits={"max_wait": "300ms"})
    await proxy_learns_a_rate(proxy, fake_upstream)
    got = await send(proxy, "GET", SHIPMENT)
    assert got.status == 429
    assert float(got.decided["wait"]) <= 0.8
    assert 2 <= len(fake_upstream.received) <= 12


async def proxy_learns_a_rate(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    script = fake_upstream.script
    fails(fake_upstream, 0, closes)

    async def announced(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("200 OK", x_amzn_ratelimit_limit="20"))

    fake_upstream.script = announced
    await send(proxy, "GET", SHIPMENT)
    fake_upstream.received.clear()
    fake_upstream.script = script


# The caller's own time.


async def test_the_callers_time_bounds_everything(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    proxy = await start_proxy()
    got = await send(proxy, "GET", SELLERS, x_sp_timeout="200ms")
    assert (got.status, got.error) == (504, "CallTimeout")


async def test_the_callers_time_bounds_retries(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    fails(fake_upstream, 10, status("500 Internal"))
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
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    fails(fake_upstream, 10, status("500 Internal"))
    proxy = await start_proxy(retry={"first_pause": "1h", "longest_pause": "1h"})
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS))
        await fake_upstream.arrived.wait()
        await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        while proxy.metrics.in_flight:  # noqa: ASYNC110 - a gauge tells nobody
            await asyncio.sleep(0)
    assert len(fake_upstream.received) == 1


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
