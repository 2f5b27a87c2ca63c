"""The requests that came lately: bounded, names and numbers alone; and the samples of the last minutes."""

import gc
import tracemalloc
from collections.abc import Iterator

from proxy.observability.metrics import Metrics
from proxy.observability.request_history import MAX_REQUESTS, MAX_SAMPLES, RequestHistory, Sampler
from proxy.request.context import RequestContext
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, http_response
from tests.support.raw_client import call

ORDER = "/orders/v0/orders/902-1845936-5435065?secret-query=1"
LABELS = ("acme", "eu", "orders.v0.getOrders", "GET", "200", "lwa", "amazon")


def note(recent: RequestHistory, ended: float, duration: float = 0.1, status: int = 200) -> None:
    labels = (*LABELS[:4], str(status), *LABELS[5:])
    recent.append((recent.number(), labels, "", ended - duration, duration, 0.0, 0.0, duration, 1, "", ""))


def test_the_newest_are_remembered_and_asked_for_by_number() -> None:
    recent = RequestHistory(most=3)
    assert (recent.after(), recent.last_number) == ([], 0)
    for second in range(5):
        note(recent, float(second))
    assert [request.number for request in recent.after()] == [3, 4, 5]
    assert [request.number for request in recent.after(4)] == [5]
    assert recent.after(5) == []
    assert recent.last_number == 5
    assert recent.after(4)[0].ended == 4.0
    assert RequestHistory().instance != RequestHistory().instance


def reached(one: object) -> Iterator[object]:
    """Yield everything that can be reached from an object, but for types."""
    seen, pending = set[int](), [one]
    while pending:
        current = pending.pop()
        if id(current) not in seen and not isinstance(current, type):
            seen.add(id(current))
            yield current
            pending += gc.get_referents(current)


async def test_nothing_of_a_request_is_remembered_but_names_and_numbers(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async def refused(_: object, writer: object) -> None:
        writer.write(http_response("403 Forbidden", b"{}", **{"x-amzn-requestid": "amazon-id-1"}))  # type: ignore[attr-defined]

    await call(proxy.addresses[0], "GET", ORDER, x_request_id="app-id-1")
    await call(proxy.addresses[0], "POST", "/feeds/2021-06-30/feeds", b'{"body": 1}')
    await call(proxy.addresses[0], "GET", "/orders/v0/orders", x_sp_account="somebody")
    fake_upstream.script = refused
    await call(proxy.addresses[0], "GET", ORDER)
    recent = proxy.metrics.history
    assert recent is not None
    assert [(request.status, request.error, request.hint) for request in recent.after()] == [
        (200, "", ""),
        (200, "", ""),
        (400, "UnknownAccount", ""),
        (403, "", "role"),
    ]
    everything = list(reached(list(recent.records)))
    assert {type(one) for one in everything} <= {list, tuple, str, int, float, type(None)}
    texts = " ".join(one for one in everything if isinstance(one, str))
    assert "902-1845936" not in texts
    assert "id-1" not in texts
    assert "somebody" not in texts


def test_what_is_remembered_takes_little_memory() -> None:
    metrics = Metrics()
    recent = metrics.history
    assert recent is not None
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for second in range(2 * MAX_REQUESTS):
            context = RequestContext("GET", float(second))
            series = metrics.series_of(*LABELS)
            waited, token_wait, upstream, duration = (second + share for share in (0.1, 0.2, 0.3, 0.4))
            recent.append(
                (
                    recent.number(),
                    series.labels,
                    "",
                    context.started,
                    duration,
                    waited,
                    token_wait,
                    upstream,
                    1,
                    "",
                    "",
                )
            )
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(recent.records) == MAX_REQUESTS
    assert taken < 200_000


async def test_nothing_is_remembered_where_nobody_could_ask(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(admin=None)
    assert (await call(proxy.addresses[0], "GET", "/orders/v0/orders")).status == 200
    assert proxy.metrics.history is None


def test_samples_say_how_the_last_seconds_went() -> None:
    recent, clock = RequestHistory(), FakeClock()
    note(recent, clock())
    history = Sampler(recent, clock)  # what was before it does not count
    for number in range(20):
        note(recent, clock(), duration=0.01 * (number + 1), status=429 if number < 2 else 503 if number == 2 else 200)
    clock.advance(2)
    history.take()
    clock.advance(2)
    history.take()
    busy, idle = history.samples
    assert (busy.requests, busy.seconds, busy.throttled) == (20, 2.0, 2)
    assert busy.median is not None
    assert busy.p95 is not None
    assert (round(busy.median, 2), round(busy.p95, 2)) == (0.11, 0.2)
    assert (idle.requests, idle.median, idle.throttled) == (0, None, 0)


def test_more_requests_than_are_remembered_are_counted_all_the_same() -> None:
    recent, clock = RequestHistory(most=10), FakeClock()
    history = Sampler(recent, clock)
    for number in range(1000):
        note(recent, clock(), status=429 if number % 2 else 200)
    clock.advance(2)
    history.take()
    assert (history.samples[0].requests, history.samples[0].throttled) == (1000, 500)


def test_samples_are_bounded() -> None:
    clock = FakeClock()
    history = Sampler(RequestHistory(), clock)
    for _ in range(MAX_SAMPLES + 10):
        clock.advance(2)
        history.take()
    assert len(history.samples) == MAX_SAMPLES
