"""The request of the proxy's own through each listener: what it finds, what it costs, and that nothing counts it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from proxy.config import Config
from proxy.observability.metrics import Metrics
from proxy.server import http_protocol, listeners, self_check, sockets
from proxy.server.connection_limiter import ConnectionLimiter
from proxy.server.http_server import HttpServer
from proxy.server.runtime import start_proxy as start_from_config
from proxy.server.self_check import SelfCheckFailed, check_listener
from proxy.server.sockets import CannotListen
from tests.conftest import StartProxy, config_from, settings_for
from tests.support.certificates import Authority
from tests.support.fake_upstream import FakeUpstream, TokenHost
from tests.support.raw_client import call

SELLERS = "/sellers/v1/marketplaceParticipations"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A configuration whose far side is never called."""
    settings = {
        "listen": "127.0.0.1:0",
        "applications": {"main": {"client_id": "client", "client_secret": "client-secret"}},
        "accounts": {"acme": {"refresh_tokens": {"eu": "Atzr|acme-eu"}}},
    }
    return config_from(settings, tmp_path)


@pytest.fixture
async def server(config: Config) -> AsyncIterator[HttpServer]:
    """A listener's server that listens on nothing."""
    metrics = Metrics()

    async def never(_: object) -> None:
        raise AssertionError("the check stops before the handler")

    made = HttpServer(never, config, metrics, limiter=ConnectionLimiter(1, metrics), name="listen[0]")
    yield made
    await made.shutdown(1)


async def test_a_listener_that_responds_passes_and_keeps_nothing(server: HttpServer) -> None:
    for _ in range(3):
        await check_listener(server)
    for _ in range(100):
        if not server.connections:
            break
        await asyncio.sleep(0.01)
    assert not server.connections


async def test_it_takes_no_slot_and_evicts_no_client(config: Config) -> None:
    metrics = Metrics()
    limiter = ConnectionLimiter(0, metrics)
    made = HttpServer(lambda _: None, config, metrics, limiter=limiter, name="listen[0]")  # type: ignore[arg-type, return-value]  # it is never called
    await check_listener(made)
    assert "client_connections_closed_total{" not in generate_latest(metrics.registry).decode()


async def test_nothing_counts_or_logs_it(start_proxy: StartProxy, log: StringIO) -> None:
    proxy = await start_proxy()
    exported = generate_latest(proxy.metrics.registry).decode()
    assert "spapi_proxy_requests_total{" not in exported
    assert "spapi_proxy_errors_total{" not in exported
    assert 'client_connections{listener="listen[0]"}' not in exported
    assert proxy.metrics.history is not None
    assert not proxy.metrics.history.after()
    assert "405" not in log.getvalue()


def _task_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(_: object) -> None:
        raise AttributeError("distinctive-name")

    monkeypatch.setattr(http_protocol.ProxyConnection, "start", start)


def _reading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def data_received(_: object, __: bytes) -> None:
        raise AttributeError("distinctive-name")

    monkeypatch.setattr(http_protocol.ProxyConnection, "data_received", data_received)


def _nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol.ProxyConnection, "data_received", lambda *_: None)
    monkeypatch.setattr(self_check, "TIMEOUT", 0.2)
    monkeypatch.setattr(listeners, "check_listener", lambda server: check_listener(server, 0.2))


BREAKS = [_task_fails, _reading_fails, _nothing_happens]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.__name__)
async def test_a_listener_that_does_not_respond_fails_the_start(
    broken: Callable[[pytest.MonkeyPatch], None],
    start_proxy: StartProxy,
    monkeypatch: pytest.MonkeyPatch,
    log: StringIO,
) -> None:
    broken(monkeypatch)
    with pytest.raises(CannotListen, match=r"^listen\[0\] listens on 127\.0\.0\.1:\d+ but does not respond"):
        await asyncio.wait_for(start_proxy(), 20)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    (failed,) = [line for line in lines if line["message"] == "a listener failed its self-check"]
    assert (failed["level"], failed["listener"]) == ("error", "listen[0]")
    assert "distinctive" not in log.getvalue()


async def test_readyz_says_what_is_waited_for_meanwhile(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses, admins = [], list[str]()
    listen = sockets.listen

    async def remember(*given: Any, **named: Any) -> Any:
        opened = await listen(*given, **named)
        admins.append(opened[1])
        return opened

    async def slow(server: HttpServer) -> None:
        if len(admins) > 1:  # the admin listener comes first
            responses.append(await call(admins[0], "GET", "/readyz"))
        await check_listener(server)

    monkeypatch.setattr(listeners, "listen", remember)
    monkeypatch.setattr(listeners, "check_listener", slow)
    async with start_from_config(config_from(settings_for(fake_upstream, token_host), tmp_path)) as proxy:
        assert proxy.admin == admins[0]
        assert (await call(admins[0], "GET", "/readyz")).status == 200
    assert responses[0].status == 503
    assert b"self-check" in responses[0].body


async def test_every_kind_of_listener_passes(start_proxy: StartProxy, tmp_path: Path) -> None:
    authority = Authority.made(tmp_path)
    certificate, key = authority.issue("localhost")
    tls = {"certificate": certificate, "key": key}
    proxy = await start_proxy(
        listen=[
            {"address": "127.0.0.1:0"},
            {"address": f"unix:{tmp_path / 'app.sock'}"},
            {"address": "127.0.0.1:0", "tls": tls},
            {"address": "127.0.0.1:0", "tls": {**tls, "client_ca": authority.certificate}},
        ],
        callers={"app": {"key": "k" * 40}},
    )
    assert len(proxy.addresses) == 4


async def test_a_listener_that_a_reload_opens_is_checked_too(
    start_proxy: StartProxy,
    fake_upstream: FakeUpstream,
    token_host: TokenHost,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = await start_proxy()
    second = tmp_path / "second.sock"
    wanted = settings_for(fake_upstream, token_host, listen=["127.0.0.1:0", f"unix:{second}"])

    async def fails(_: HttpServer) -> None:
        raise SelfCheckFailed("no response within 5 s")

    monkeypatch.setattr(listeners, "check_listener", fails)
    with pytest.raises(CannotListen, match=r"^listen\[1\] listens on .*: no response within 5 s"):
        await proxy.apply_config(config_from(wanted, tmp_path))
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
