"""Traces: one span a request with its waits and calls below it, made by the real SDK and taken by a real collector."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from proxy.config import Config, ConfigError, Tracing, load_config
from proxy.observability.metrics import Metrics
from proxy.request import tracing
from proxy.request.tracing import MAX_PHASES, Phase, TracedContext
from proxy.server.runtime import start_proxy
from tests.conftest import config_from, settings_for
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response
from tests.support.paths import ROOT
from tests.support.proxy_process import command
from tests.support.raw_client import call, connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"
ORDER = "/orders/v0/orders/902-1845936-5435065"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"


class Collector:
    """Takes OTLP over HTTP; `hangs` keeps it from answering, `statuses` are those of its answers (200 after them)."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.hangs = False
        self.statuses: Iterator[int] = iter(())
        self.over = asyncio.Event()

    async def take(self, received: web.BaseRequest) -> web.Response:
        self.bodies.append(await received.read())
        self.headers.append({name.lower(): value for name, value in received.headers.items()})
        assert received.path == "/v1/traces"
        if self.hangs:
            await self.over.wait()
        return web.Response(status=next(self.statuses, 200), content_type="application/x-protobuf")

    @property
    def spans(self) -> list[Span]:
        taken = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [
            span for one in taken for resource in one.resource_spans for scope in resource.scope_spans
            for span in scope.spans
        ]  # fmt: skip

    @property
    def resource(self) -> dict[str, Any]:
        (resource,) = ExportTraceServiceRequest.FromString(self.bodies[0]).resource_spans
        return {one.key: one.value.string_value for one in resource.resource.attributes}


def attributes(span: Span) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in span.attributes}


def server_of(spans: list[Span]) -> Span:
    (found,) = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    return found


def below(spans: list[Span]) -> list[Span]:
    """Return the children of the only server span in the order in which they began; all the others are those."""
    server = server_of(spans)
    others = [span for span in spans if span is not server]
    assert {span.parent_span_id for span in others} <= {server.span_id}
    assert {span.trace_id for span in others} <= {server.trace_id}
    for span in others:
        assert server.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= server.end_time_unix_nano
    return sorted(others, key=lambda span: span.start_time_unix_nano)


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    taker = Collector()
    runner = web.ServerRunner(web.Server(taker.take), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    taker.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield taker
    taker.over.set()
    await runner.cleanup()


@pytest.fixture
def traced(fake_upstream: FakeUpstream, token_host: TokenHost, collector: Collector, tmp_path: Path) -> Any:
    """A proxy that traces; when it has ended, the collector has everything."""

    @asynccontextmanager
    async def start(tracing: dict[str, Any] | None = None, **changed: Any) -> AsyncIterator[str]:
        settings = settings_for(
            fake_upstream, token_host, tracing={"endpoint": collector.url, **(tracing or {})}, **changed
        )
        async with start_proxy(config_from(settings, tmp_path)) as proxy:
            yield proxy.addresses[0]

    return start


async def test_a_request_is_a_span_with_its_waits_and_its_call_below(
    traced: Any, collector: Collector, fake_upstream: FakeUpstream
) -> None:
    async with traced() as app:
        got = await call(app, "GET", f"{ORDER}?MarketplaceIds=A1PA6795UKMFR9", x_sp_max_wait="1s")
    assert got.status == 200
    server = server_of(collector.spans)
    assert server.name == "GET /orders/v0/orders/{orderId}"
    assert server.parent_span_id == b""
    assert attributes(server) == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "http.route": "/orders/v0/orders/{orderId}",
        "spapi.account": "acme",
        "spapi.region": "eu",
        "spapi.operation": "orders.v0.getOrder",
        "spapi.token": "lwa",
        "spapi.attempts": 1,
    }
    token, out = below(collector.spans)
    assert (token.name, token.kind) == ("wait for token", Span.SPAN_KIND_INTERNAL)
    assert (out.name, out.kind) == ("GET", Span.SPAN_KIND_CLIENT)
    host, _, port = fake_upstream.url.removeprefix("http://").partition(":")
    assert attributes(out) == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "server.address": host,
        "server.port": int(port),
        "url.scheme": "http",
    }
    assert {span.status.code for span in collector.spans} == {Status.STATUS_CODE_UNSET}
    assert collector.resource["service.name"] == "sp-api-proxy"
    assert collector.resource["service.version"]


async def test_no_path_query_id_or_token_is_in_a_trace(traced: Any, collector: Collector) -> None:
    async with traced() as app:
        await call(app, "GET", f"{ORDER}?NextToken=of-a-buyer", x_request_id="an-id-of-the-app")
        await call(app, "GET", "/brand/new/path-of-its-own?secret=query")
        await call(app, "OPTIONS", "/pot")
    whole = b"".join(collector.bodies)
    assert len([span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]) == 3
    secret = (b"902-18", b"NextToken", b"of-a-buyer", b"an-id", b"path-of-its-own", b"query", b"Atz", b"client-secret")
    for part in secret:
        assert part not in whole


async def test_each_time_it_is_sent_is_a_span(traced: Any, collector: Collector, fake_upstream: FakeUpstream) -> None:
    responses = iter([http_response("503 Service Unavailable"), http_response("200 OK")])

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(next(responses))

    fake_upstream.script = script
    async with traced() as app:
        assert (await call(app, "GET", SELLERS)).status == 200
    first, second = (span for span in below(collector.spans) if span.kind == Span.SPAN_KIND_CLIENT)
    assert attributes(first)["http.response.status_code"] == 503
    assert attributes(first)["error.type"] == "503"
    assert first.status.code == Status.STATUS_CODE_ERROR
    assert attributes(second)["http.response.status_code"] == 200
    assert attributes(second)["http.request.resend_count"] == 1
    assert attributes(server_of(collector.spans))["spapi.attempts"] == 2


async def test_the_wait_for_a_usage_plan_is_a_span(
    traced: Any, collector: Collector, fake_upstream: FakeUpstream
) -> None:
    responses = iter(
        [http_response("200 OK", x_amzn_ratelimit_limit="20"), http_response("429 Too Many"), http_response("200 OK")]
    )

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(next(responses))

    fake_upstream.script = script
    async with traced({"sample": 0}) as app:
        await call(app, "GET", SELLERS)  # the rate is 20 from now on
        assert (await call(app, "GET", SELLERS, traceparent=SAMPLED)).status == 200
    names = [span.name for span in below(collector.spans)]
    assert names == ["GET", "wait for usage plan", "GET"]
    wait = below(collector.spans)[1]
    assert 1e7 < wait.end_time_unix_nano - wait.start_time_unix_nano < 5e9


async def test_a_call_without_a_response_is_an_error(
    traced: Any, collector: Collector, fake_upstream: FakeUpstream
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.close()

    fake_upstream.script = script
    async with traced() as app:
        assert (await call(app, "POST", "/feeds/2021-06-30/feeds", b"{}")).status == 502
    server = server_of(collector.spans)
    assert server.status.code == Status.STATUS_CODE_ERROR
    assert attributes(server)["error.type"] == "UpstreamBroken"
    assert attributes(server)["spapi.fault"] == "amazon"
    out = below(collector.spans)[-1]
    assert out.status.code == Status.STATUS_CODE_ERROR
    assert attributes(out)["error.type"] == "UpstreamBroken"


async def test_a_response_that_is_cut_off_is_an_error_of_the_request_alone(
    traced: Any, collector: Collector, fake_upstream: FakeUpstream
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.close()

    fake_upstream.script = script
    async with traced() as app:
        assert not (await call(app, "GET", SELLERS)).complete
    server = server_of(collector.spans)
    assert server.status.code == Status.STATUS_CODE_ERROR
    assert attributes(server)["error.type"] == "cut off"
    assert below(collector.spans)[-1].status.code == Status.STATUS_CODE_UNSET


async def test_a_refused_request_is_a_span_without_any_below(traced: Any, collector: Collector) -> None:
    async with traced() as app:
        assert (await call(app, "GET", SELLERS, x_sp_account="nobody")).status == 400
    server = server_of(collector.spans)
    assert below(collector.spans) == []
    assert attributes(server)["error.type"] == "UnknownAccount"
    assert server.status.code == Status.STATUS_CODE_UNSET  # the app's own fault


async def test_a_client_that_leaves_is_a_span_too(
    traced: Any, collector: Collector, fake_upstream: FakeUpstream
) -> None:
    there, over = asyncio.Event(), asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        there.set()
        await over.wait()

    fake_upstream.script = script
    async with traced() as app, connect(app) as client:
        client.writer.write(request("GET", SELLERS))
        await there.wait()
        client.writer.close()
    over.set()
    assert attributes(server_of(collector.spans))["http.response.status_code"] == 499


async def test_the_apps_span_is_the_parent_and_amazon_hears_nothing_of_it(
    traced: Any, collector: Collector, fake_upstream: FakeUpstream
) -> None:
    async with traced({"sample": 0}) as app:
        await call(app, "GET", SELLERS, traceparent=SAMPLED, tracestate="vendor=opaque", baggage="user=7")
    server = server_of(collector.spans)
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    assert server.trace_state == "vendor=opaque"
    (received,) = fake_upstream.received
    names = {name.lower() for name, _ in received.fields}
    assert not names & {"traceparent", "tracestate", "baggage", "b3", "x-b3-traceid", "uber-trace-id"}
    assert TRACE not in str(received.fields)
    assert server.span_id.hex() not in str(received.fields)


@pytest.mark.parametrize(
    ("sample", "traceparent", "expected"),
    [
        (1, None, 1),
        (0, None, 0),
        (1, f"00-{TRACE}-{PARENT}-00", 0),
        (0, SAMPLED, 1),
        (1, "00-00000000000000000000000000000000-b7ad6b7169203331-01", 1),
        (0, "garbage", 0),
        (0, f"{SAMPLED}-more", 0),
        (0, "ff" + SAMPLED[2:], 0),
    ],
)
async def test_the_app_decides_what_is_traced_where_it_says_so_and_the_share_where_not(
    traced: Any, collector: Collector, sample: float, traceparent: str | None, expected: int
) -> None:
    async with traced({"sample": sample}) as app:
        await call(app, "GET", SELLERS, **({"traceparent": traceparent} if traceparent else {}))
    assert len([span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]) == expected


async def test_two_parents_are_none(traced: Any, collector: Collector) -> None:
    async with traced() as app, connect(app) as client:
        lines = f"GET {SELLERS} HTTP/1.1\r\nhost: localhost\r\n" + f"traceparent: {SAMPLED}\r\n" * 2 + "\r\n"
        client.writer.write(lines.encode())
        assert (await client.read_response("GET")).status == 200
    assert server_of(collector.spans).trace_id.hex() != TRACE


async def test_headers_for_the_collector_reach_it(traced: Any, collector: Collector) -> None:
    async with traced({"headers": "api-key=distinctive-key, x-team=shop%20floor", "service_name": "mine"}) as app:
        await call(app, "GET", SELLERS)
    assert collector.headers[0]["api-key"] == "distinctive-key"
    assert collector.headers[0]["x-team"] == "shop floor"
    assert collector.resource["service.name"] == "mine"


async def test_a_collector_that_hangs_delays_neither_requests_nor_the_end(
    traced: Any, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_TIMEOUT", 0.3)
    collector.hangs = True
    clock = asyncio.get_running_loop().time
    async with traced() as app:
        for _ in range(3):
            assert (await call(app, "GET", SELLERS)).status == 200
        ending = clock()
    assert clock() - ending < 2.0
    assert len(collector.bodies) == 1


async def test_a_collector_that_is_not_there_fails_no_request(traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "FLUSH_TIMEOUT", 0.3)
    async with traced({"endpoint": "http://127.0.0.1:9"}) as app:
        assert (await call(app, "GET", SELLERS)).status == 200


async def test_spans_that_do_not_arrive_are_counted_and_said_once(collector: Collector, log: StringIO) -> None:
    statuses = [400, 400, 200, 200]
    collector.statuses = iter(statuses)
    metrics = Metrics()
    traces = tracing.open_tracer(Tracing(endpoint=f"{collector.url}/v1/traces"), "1", metrics)
    for _ in statuses:
        context = traces.begin("GET", traces._now())
        traces.end(context, CIMultiDictProxy(CIMultiDict()))
        await asyncio.to_thread(traces._processor.force_flush)
    await traces.close()
    assert metrics.registry.get_sample_value("spapi_proxy_trace_spans_lost_total") == 2
    assert len(collector.bodies) == 4
    said = [line for line in log.getvalue().splitlines() if "collector" in line]
    assert len(said) == 2
    assert ["no spans" in said[0], "again" in said[1]] == [True, True]


# The record.


def test_the_context_records_waits_and_attempts_as_phases() -> None:
    clock = FakeClock()
    context = TracedContext("GET", clock(), clock)
    began = clock()
    clock.advance(2.0)
    context.add_token_wait(2.0)
    clock.advance(3.0)
    context.add_rate_limit_wait(3.0)
    context.begin_attempt()
    clock.advance(1.0)
    context.end_attempt(200, 1.0)
    context.add_token_wait(0.0001)  # a cached token
    assert context.phases == [
        Phase("token", began, began + 2),
        Phase("usage plan", began + 2, began + 5),
        Phase("call", began + 5, began + 6, 200),
    ]
    assert (context.rate_limit_wait, context.token_wait, context.attempts, context.upstream_duration) == (
        3.0,
        2.0001,
        1,
        1.0,
    )


def test_a_context_records_a_bounded_number_of_phases() -> None:
    context = TracedContext("GET", 0.0, FakeClock())
    for _ in range(MAX_PHASES * 2):
        context.begin_attempt()
    context.close(1.0)
    assert len(context.phases) == MAX_PHASES


# Settings.

GOOD = {
    "SP_API_REFRESH_TOKEN_EU": "Atzr|x",
    "LWA_APP_ID": "client",
    "LWA_CLIENT_SECRET": "client-secret",
}
OWN, ALL = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"


def config_of(environ: dict[str, str], path: str | None = None) -> Config:
    return load_config(path, {**GOOD, **environ}).config


@pytest.mark.parametrize(
    ("environ", "endpoint"),
    [
        ({}, None),
        ({ALL: "http://c:4318"}, "http://c:4318/v1/traces"),
        ({ALL: "https://c/base/"}, "https://c/base/v1/traces"),
        ({OWN: "http://c:4318/own"}, "http://c:4318/own"),
        ({OWN: "http://t/own", ALL: "http://c"}, "http://t/own"),
        ({ALL: "http://c:4318", "OTEL_SDK_DISABLED": "true"}, None),
        ({ALL: "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({ALL: "http://c", "SP_API_PROXY_TRACING_ENDPOINT": "http://own"}, "http://own/v1/traces"),
    ],
)
def test_opentelemetrys_own_variables_say_where_traces_go(environ: dict[str, str], endpoint: str | None) -> None:
    assert config_of(environ).tracing.endpoint == endpoint


def test_opentelemetrys_variables_count_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("tracing: {endpoint: 'http://file:4318', sample: 0.5}", encoding="utf-8")
    assert config_of({}, str(path)).tracing.endpoint == "http://file:4318/v1/traces"
    named = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SERVICE_NAME": "shop"}
    named["OTEL_TRACES_SAMPLER"] = "always_on"
    found = config_of(named, str(path)).tracing
    assert (found.endpoint, found.service_name, found.sample) == ("http://c:4318/v1/traces", "shop", 1.0)
    assert config_of({"OTEL_SDK_DISABLED": "true"}, str(path)).tracing.endpoint is None


@pytest.mark.parametrize(
    ("sampler", "argument", "share"),
    [
        ("always_on", None, 1.0),
        ("parentbased_always_off", None, 0.0),
        ("traceidratio", "0.25", 0.25),
        ("parentbased_traceidratio", "0.01", 0.01),
        ("traceidratio", None, 1.0),
    ],
)
def test_opentelemetrys_samplers_are_a_share(sampler: str, argument: str | None, share: float) -> None:
    environ = {"OTEL_TRACES_SAMPLER": sampler, **({"OTEL_TRACES_SAMPLER_ARG": argument} if argument else {})}
    assert config_of(environ).tracing.sample == share


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"OTEL_TRACES_SAMPLER": "jaeger_remote"}, "OTEL_TRACES_SAMPLER"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "7"}, "tracing.sample"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}, "tracing.endpoint"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:pass@c"}, "tracing.endpoint"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "no name"}, "tracing.headers"),
    ],
)
def test_mistakes_in_opentelemetrys_variables_are_found_at_start(environ: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        config_of(environ)
    assert "user:pass" not in str(caught.value)


async def test_check_shows_no_header_of_the_collector() -> None:
    environ = {
        **GOOD,
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=distinctive-key",
    }
    code, printed, complained = await command("check", environment=environ)
    assert code == 0, complained
    assert "http://c/v1/traces" in printed
    assert "distinctive" not in printed + complained


async def test_without_the_extra_the_start_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from proxy.cli.main import main\n"
        "sys.exit(main(['check', '--set', 'tracing.endpoint=http://127.0.0.1:4318']))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        cwd=ROOT,
        env=GOOD,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, complained = await process.communicate()
    assert process.returncode == 2, complained
    assert b"pip install '.[otel]' in " in printed + complained


async def test_nothing_of_tracing_is_loaded_where_it_is_off() -> None:
    program = (
        # aiocache loads redis-py where it is, and that loads OpenTelemetry where it is: neither is the proxy's doing.
        "import sys; sys.modules['redis'] = None\n"
        "import proxy.server.runtime, proxy.cli.main\n"
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry', 'proxy.request.tracing'))]"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=ROOT)
    assert await process.wait() == 0
