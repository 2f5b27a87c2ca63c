"""The request history: bounded, names and numbers only; and the samples of the last minutes."""

import gc
import tracemalloc
from collections.abc import Iterator

from proxy.observability.metrics import Metrics
from proxy.observability.request_history import MAX_REQUESTS, MAX_SAMPLES, RequestHistory, RequestRecord, Sampler
from proxy.request.context import RequestContext
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, http_response
from tests.support.raw_client import call

ORDER = "/orders/v0/orders/902-1845936-5435065?secret-query=1"
LABELS = ("acme", "eu", "orders.v0.getOrders", "GET", "200", "lwa", "amazon")


def add(history: RequestHistory, ended: float, duration: float = 0.1, status: int = 200) -> None:
    labels = (*LABELS[:4], str(status), *LABELS[5:])
    history.add(labels, RequestContext("GET", ended - duration), duration)


def test_every_field_of_a_record_comes_from_the_field_of_its_name() -> None:
    history, context = RequestHistory(), RequestContext("GET", 1.0)
    context.caller, context.error, context.hint, context.attempts = "reports", "UpstreamTimeout", "role", 7
    context.rate_limit_wait, context.token_wait, context.upstream_duration = 3.0, 4.0, 5.0
    history.add(LABELS, context, 2.0)
    assert history.after() == [
        RequestRecord(
            number=1,
            labels=LABELS,
            caller="reports",
            started=1.0,
            duration=2.0,
            rate_limit_wait=3.0,
            token_wait=4.0,
            upstream_duration=5.0,
            attempts=7,
            error="UpstreamTimeout",
            hint="role",
        )
    ]
    (record,) = history.after()
    named = (record.account, record.region, record.operation, record.method, str(record.status))
    assert (*named, record.token, record.source) == LABELS
    assert record.ended == 3.0


def test_the_newest_records_are_kept_and_found_by_number() -> None:
    history = RequestHistory(max_requests=3)
    assert (history.after(), history.last_number) == ([], 0)
    for second in range(5):
        add(history, float(second))
    assert [record.number for record in history.after()] == [3, 4, 5]
    assert [record.number for record in history.after(4)] == [5]
    assert history.after(5) == []
    assert history.last_number == 5
    assert history.after(4)[0].ended == 4.0
    assert RequestHistory().instance != RequestHistory().instance


def reachable(root: object) -> Iterator[object]:
    """Yield everything that can be reached from an object, except types."""
    seen, pending = set[int](), [root]
    while pending:
        current = pending.pop()
        if id(current) not in seen and not isinstance(current, type):
            seen.add(id(current))
            yield current
            pending += gc.get_referents(current)


async def test_a_record_holds_names_and_numbers_only(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def refused(_: object, writer: object) -> None:
        writer.write(http_response("403 Forbidden", b"{}", **{"x-amzn-requestid": "amazon-id-1"}))  # type: ignore[attr-defined]

    await call(proxy.addresses[0], "GET", ORDER, x_request_id="app-id-1")
    await call(proxy.addresses[0], "POST", "/feeds/2021-06-30/feeds", b'{"body": 1}')
    await call(proxy.addresses[0], "GET", "/orders/v0/orders", x_sp_account="somebody")
    fake_upstream.script = refused
    await call(proxy.addresses[0], "GET", ORDER)
    history = proxy.history
    assert history is not None
    assert [(record.status, record.error, record.hint) for record in history.after()] == [
        (200, "", ""),
        (200, "", ""),
        (400, "UnknownAccount", ""),
        (403, "", "role"),
    ]
    everything = list(reachable(list(history.records)))
    assert {type(one) for one in everything} <= {list, tuple, str, int, float, type(None)}
    texts = " ".join(one for one in everything if isinstance(one, str))
    assert "902-1845936" not in texts
    assert "id-1" not in texts
    assert "somebody" not in texts


def test_the_history_takes_little_memory() -> None:
    metrics, history = Metrics(), RequestHistory()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for second in range(2 * MAX_REQUESTS):
            context = RequestContext("GET", float(second))
            series = metrics.series_of(*LABELS)
            # Numbers of their own, as in use: equal ones could share an object.
            context.rate_limit_wait, context.token_wait = second + 0.1, second + 0.2
            context.upstream_duration = second + 0.3
            history.add(series.labels, context, second + 0.4)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(history.records) == MAX_REQUESTS
    assert taken < 200_000


async def test_without_an_admin_address_there_is_no_history(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(admin=None)
    assert (await call(proxy.addresses[0], "GET", "/orders/v0/orders")).status == 200
    assert proxy.history is None


def test_samples_summarise_the_last_seconds() -> None:
    history, clock = RequestHistory(), FakeClock()
    add(history, clock())
    sampler = Sampler(history, clock)  # earlier requests do not count
    for number in range(20):
        add(history, clock(), duration=0.01 * (number + 1), status=429 if number < 2 else 503 if number == 2 else 200)
    clock.advance(2)
    sampler.take()
    clock.advance(2)
    sampler.take()
    busy, idle = sampler.samples
    assert (busy.requests, busy.seconds, busy.throttled) == (20, 2.0, 2)
    assert busy.median is not None
    assert busy.p95 is not None
    assert (round(busy.median, 2), round(busy.p95, 2)) == (0.11, 0.2)
    assert (idle.requests, idle.median, idle.throttled) == (0, None, 0)


def test_a_sample_counts_more_requests_than_the_history_holds() -> None:
    history, clock = RequestHistory(max_requests=10), FakeClock()
    sampler = Sampler(history, clock)
    for number in range(1000):
        add(history, clock(), status=429 if number % 2 else 200)
    clock.advance(2)
    sampler.take()
    assert (sampler.samples[0].requests, sampler.samples[0].throttled) == (1000, 500)


def test_samples_are_bounded() -> None:
    clock = FakeClock()
    sampler = Sampler(RequestHistory(), clock)
    for _ in range(MAX_SAMPLES + 10):
        clock.advance(2)
        sampler.take()
    assert len(sampler.samples) == MAX_SAMPLES
