"""How connections to Amazon come about: by a forward proxy, with TLS sessions taken up again, to known addresses."""

import asyncio
import ssl
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from proxy.config import load_config
from proxy.request.upstream.connector import DnsCache, Origin, is_loopback
from tests.conftest import StartProxy, config_from, settings_for
from tests.support.certificates import Authority
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response
from tests.support.raw_client import call

SELLERS = "/sellers/v1/marketplaceParticipations"
NAME = "amazon.test"  # no resolver knows it: who reaches it was led there


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("authority"))


@asynccontextmanager
async def over_tls(fake_upstream: FakeUpstream, authority: Authority, name: str) -> AsyncIterator[int]:
    """Serve the far side on another port, as `name`, over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(name, alternative=f"DNS:{name}"))
    server = await asyncio.start_server(fake_upstream._connected, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()


class ForwardProxy:
    """Takes CONNECT, and leads every host to one port of this machine."""

    def __init__(self, leads_to: int, says: bytes = b"HTTP/1.1 200 Connected\r\n\r\n") -> None:
        self.leads_to = leads_to
        self.says = says
        self.heads: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(self.says)
        if b" 200 " not in self.says:
            writer.close()
            return
        there, away = await asyncio.open_connection("127.0.0.1", self.leads_to)
        self.writers.append(away)
        self.tasks |= {asyncio.create_task(pass_on(reader, away)), asyncio.create_task(pass_on(there, writer))}


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


async def test_a_forward_proxy_leads_to_amazon_and_sees_nothing_of_it(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, authority: Authority
) -> None:
    async with over_tls(fake_upstream, authority, NAME) as port, ForwardProxy(port) as forward:
        proxy = await start_proxy(
            endpoints={"eu": f"https://{NAME}", "lwa": token_host.url},
            pool={"ca_file": authority.certificate, "proxy": f"http://user:p%40ss@{forward.address}/"},
        )
        got = await call(proxy.addresses[0], "GET", SELLERS)
    assert got.status == 200
    assert fake_upstream.received[0].get("host") == NAME
    (head,) = forward.heads
    lines = head.split("\r\n")
    assert lines[:2] == [f"CONNECT {NAME}:443 HTTP/1.1", f"Host: {NAME}:443"]
    assert b64decode(lines[2].removeprefix("Proxy-Authorization: Basic ")) == b"user:p@ss"
    assert "x-amz-access-token" not in head


@pytest.mark.parametrize(
    "says",
    [
        b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nmore",
        b"HTTP/1.1 200 " + b"x" * 20_000,
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"",
    ],
)
async def test_a_forward_proxy_that_does_not_connect_is_an_error_that_says_so(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, authority: Authority, says: bytes
) -> None:
    async with over_tls(fake_upstream, authority, NAME) as port, ForwardProxy(port, says) as forward:
        proxy = await start_proxy(
            endpoints={"eu": f"https://{NAME}", "lwa": token_host.url},
            pool={"ca_file": authority.certificate, "proxy": f"http://{forward.address}"},
            timeouts={"connect": "1s"},
            retry={"attempts": 1},
        )
        got = await call(proxy.addresses[0], "GET", SELLERS)
    assert got.error in {"UpstreamUnreachable", "ConnectTimeout"}
    assert fake_upstream.received == []


@pytest.mark.parametrize("exception", [NAME, ".test", "test", "*.test", "*"])
async def test_a_host_that_is_excepted_is_reached_directly(
    start_proxy: StartProxy, token_host: TokenHost, authority: Authority, exception: str
) -> None:
    async with ForwardProxy(1) as forward:
        proxy = await start_proxy(
            endpoints={"eu": f"https://{NAME}", "lwa": token_host.url},
            pool={
                "ca_file": authority.certificate,
                "proxy": f"http://{forward.address}",
                "no_proxy": [exception],
            },
            retry={"attempts": 1},
        )
        got = await call(proxy.addresses[0], "GET", SELLERS)
    assert got.error == "UpstreamUnreachable", "nobody knows the name"
    assert forward.heads == []


async def test_hosts_of_this_machine_are_reached_directly(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    async with ForwardProxy(1) as forward:
        proxy = await start_proxy(pool={"proxy": f"http://{forward.address}"})
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
    assert (len(fake_upstream.received), forward.heads) == (1, [])


async def test_a_session_is_taken_up_again_by_the_next_connection(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, authority: Authority
) -> None:
    resumed: list[bool] = []

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        resumed.append(writer.get_extra_info("ssl_object").session_reused)
        writer.write(http_response("200 OK", b"{}"))
        await writer.drain()
        if len(resumed) == 2:
            writer.close()

    fake_upstream.script = script
    async with over_tls(fake_upstream, authority, "localhost") as port:
        proxy = await start_proxy(
            endpoints={"eu": f"https://localhost:{port}", "lwa": token_host.url},
            pool={"ca_file": authority.certificate},
        )
        for _ in range(3):
            assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
    assert resumed == [False, False, True]


async def test_addresses_known_before_serve_on_where_no_resolver_responds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    found = [(2, 1, 6, "", ("127.0.0.1", 443))]
    responses: list[Any] = [found, OSError("no name server"), OSError("no name server")]
    asked: list[str] = []

    async def getaddrinfo(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        await asyncio.sleep(0)
        if isinstance(said := responses.pop(0), OSError):
            raise said
        return said

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    addresses = DnsCache()
    assert await asyncio.gather(*(addresses.resolve(NAME, 443) for _ in range(3))) == [found] * 3
    assert asked == [NAME], "one look-up for everybody"
    addresses.invalidate(NAME, 443)
    assert await addresses.resolve(NAME, 443) == found
    assert len(asked) == 2
    with pytest.raises(OSError, match="no name server"):
        await addresses.resolve("other.test", 443)


@pytest.mark.parametrize(
    ("url", "origin", "authority"),
    [
        ("https://amazon.test", Origin(True, "amazon.test", 443), "amazon.test"),
        ("https://amazon.test:444/", Origin(True, "amazon.test", 444), "amazon.test:444"),
        ("http://127.0.0.1:80", Origin(False, "127.0.0.1", 80), "127.0.0.1"),
        ("http://[::1]:8080", Origin(False, "::1", 8080), "[::1]:8080"),
    ],
)
def test_an_origin_is_scheme_host_and_port(url: str, origin: Origin, authority: str) -> None:
    assert Origin.of(url) == origin
    assert origin.authority == authority


@pytest.mark.parametrize(("host", "expected"), [("localhost", True), ("127.8.8.8", True), ("::1", True), (NAME, False)])
def test_which_hosts_are_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
def test_the_machines_forward_proxy_is_taken_where_none_is_set(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, variable: str
) -> None:
    settings = settings_for(fake_upstream, token_host)
    path = tmp_path / "config.yaml"
    config_from(settings, tmp_path)
    environ = {variable: "http://proxy.test:3128", "NO_PROXY": "a.test, .b.test"}
    pool = load_config(str(path), environ).config.pool
    assert pool.proxy is not None
    assert pool.proxy.reveal() == "http://proxy.test:3128"
    assert pool.no_proxy == ("a.test", ".b.test")
    settings["pool"] = {"proxy": "http://other.test:1"}
    config_from(settings, tmp_path)
    own = load_config(str(path), environ).config.pool
    assert own.proxy is not None
    assert (own.proxy.reveal(), own.no_proxy) == ("http://other.test:1", ())
