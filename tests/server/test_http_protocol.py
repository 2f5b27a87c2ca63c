"""How the proxied port speaks HTTP: broken requests, slow heads, limits, versions, sockets."""

import asyncio
import json
import socket
from pathlib import Path

import pytest

from proxy.server.runtime import RunningProxy
from proxy.server.sockets import CannotListen
from tests.conftest import StartProxy
from tests.support.fake_upstream import FakeUpstream, Received, http_response
from tests.support.raw_client import RawResponse, call, connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"


async def raw(address: str, data: bytes) -> RawResponse:
    """Send `data` and return the answer; the connection must then be closed by the proxy."""
    async with connect(address) as client:
        await client.send(data)
        got = await client.read_response()
        assert await client.at_end(), "a connection whose framing is in doubt must not go on"
    return got


@pytest.mark.parametrize(
    "data",
    [
        b"HELLO\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header: 1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n: empty\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nx: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nx: a\x00b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    ],
)
async def test_a_broken_request_gets_a_clear_response_and_goes_nowhere(
    proxy: RunningProxy, fake_upstream: FakeUpstream, data: bytes
) -> None:
    async with connect(proxy.addresses[0]) as client:
        await client.send(data)
        got = await client.read_response()
    assert (got.status, got.error) == (400, "MalformedRequest")
    error = json.loads(got.body)["errors"][0]
    assert error["code"] == "MalformedRequest"
    assert error["details"]
    assert got.get("x-sp-proxy") == "account=-; region=-; operation=unknown; token=none; attempts=0; wait=0.000"
    assert not fake_upstream.received


async def test_a_broken_request_is_answered_in_the_version_that_is_spoken_here(proxy: RunningProxy) -> None:
    async with connect(proxy.addresses[0]) as client:
        await client.send(b"GET / HTTP/1.1\r\nbad header: 1\r\n\r\n")
        assert (await client.reader.readline()).startswith(b"HTTP/1.1 400 ")


async def test_a_broken_request_is_not_quoted(proxy: RunningProxy) -> None:
    got = await raw(proxy.addresses[0], b"GET / HTTP/1.1\r\nx y: Atza|distinctive\r\n\r\n")
    assert b"distinctive" not in got.body
    assert got.get("server") is None


async def test_what_follows_a_refused_body_is_not_read_as_a_request(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    hidden = request("GET", SELLERS)
    await raw(proxy.addresses[0], request("OPTIONS", SELLERS, hidden))
    assert not fake_upstream.received


@pytest.mark.parametrize("version", ["HTTP/2.0", "HTTP/0.9", "HTTP/1.10", "HTTP/3.0"])
async def test_other_versions_are_refused_in_one_that_the_client_can_read(
    proxy: RunningProxy, fake_upstream: FakeUpstream, version: str
) -> None:
    async with connect(proxy.addresses[0]) as client:
        await client.send(f"GET {SELLERS} {version}\r\nHost: localhost\r\n\r\n".encode())
        line = await client.reader.readline()
    assert line.startswith((b"HTTP/1.1 505", b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert not fake_upstream.received


async def test_http_1_0_is_served_and_closed(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")

    fake_upstream.script = script
    got = await raw(proxy.addresses[0], f"GET {SELLERS} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    assert (got.status, got.body, got.get("transfer-encoding")) == (200, b"hello", None)


async def test_an_upgrade_is_not_made(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    fields = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2_settings": "AAMAAABkAAQAAP__"}
    got = await call(proxy.addresses[0], "GET", SELLERS, **fields)
    assert got.status == 200
    assert fake_upstream.received[0].get("upgrade") is None


async def test_header_blocks_of_32_kib_pass(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    got = await call(proxy.addresses[0], "GET", SELLERS, x_large="a" * 32_000)
    assert got.status == 200
    assert fake_upstream.received[0].get("x-large") == "a" * 32_000


@pytest.mark.parametrize(
    "fields",
    [
        b"".join(b"x-%d: %s\r\n" % (number, b"a" * 1000) for number in range(70)),
        b"x: " + b"a" * 70_000 + b"\r\n",
        b"".join(b"x-%d: 1\r\n" % number for number in range(1000)),
    ],
    ids=["many fields", "one large field", "very many small fields"],
)
async def test_a_header_block_over_64_kib_is_refused(
    proxy: RunningProxy, fake_upstream: FakeUpstream, fields: bytes
) -> None:
    got = await call_raw(proxy.addresses[0], b"GET / HTTP/1.1\r\nHost: localhost\r\n" + fields + b"\r\n")
    assert (got.status, got.error) == (431, "HeaderTooLarge")
    assert not fake_upstream.received


async def call_raw(address: str, data: bytes) -> RawResponse:
    async with connect(address) as client:
        await client.send(data)
        return await client.read_response()


async def test_an_endless_head_is_cut_off_early(proxy: RunningProxy) -> None:
    async with connect(proxy.addresses[0]) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        try:
            while sent < 30 * 1024 * 1024:
                await client.send(b"x-%06d: %s\r\n" % (sent, b"a" * 1000))
                sent += 1010
        except ConnectionError:
            pass
    assert sent < 16 * 1024 * 1024, "what is beyond a few socket buffers was not taken"


async def test_a_head_over_64_kib_is_refused_before_it_ends(proxy: RunningProxy) -> None:
    async with connect(proxy.addresses[0]) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        for number in range(3):
            await client.send(b"x-%d: %s\r\n" % (number, b"a" * 30_000))
        assert (await client.read_response()).error == "HeaderTooLarge"


async def test_a_head_that_drips_runs_out_of_time(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(timeouts={"header": "200ms"})
    async with connect(proxy.addresses[0]) as client:
        await client.send(b"GET / HT")
        got = await client.read_response()
        assert (got.status, got.error) == (408, "HeaderTimeout")
        assert await client.at_end()


async def test_a_slow_second_head_runs_out_of_time_too(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(timeouts={"header": "300ms"})
    async with connect(proxy.addresses[0]) as client:
        assert (await client.request("GET", SELLERS)).status == 200
        await client.send(b"GET / HT")
        assert (await client.read_response()).error == "HeaderTimeout"


async def test_a_long_response_is_no_slow_head(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    release = asyncio.Event()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(http_response("200 OK", b"{}"))

    fake_upstream.script = script
    proxy = await start_proxy(timeouts={"header": "50ms"})
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS))
        await fake_upstream.arrived.wait()
        asyncio.get_running_loop().call_later(0.2, release.set)
        assert (await client.read_response()).status == 200


async def test_an_idle_connection_is_closed(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(timeouts={"keep_alive": "100ms"})
    async with connect(proxy.addresses[0]) as client:
        await client.request("GET", SELLERS)
        assert await asyncio.wait_for(client.at_end(), 20)


async def test_a_silent_connection_is_closed(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(timeouts={"keep_alive": "100ms"})
    async with connect(proxy.addresses[0]) as client:
        assert await asyncio.wait_for(client.at_end(), 20)


async def test_requests_on_one_connection_are_answered_in_order(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("200 OK", received.target.encode()))

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        await client.send(b"".join(request("GET", f"/pipelined/{number}") for number in range(5)))
        bodies = [(await client.read_response()).body for _ in range(5)]
    assert bodies == [f"/pipelined/{number}".encode() for number in range(5)]


# Where it listens.


async def test_a_port_of_zero_becomes_a_real_one(proxy: RunningProxy) -> None:
    assert not proxy.addresses[0].endswith(":0")
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200


async def test_a_unix_socket_is_for_its_owner_alone(start_proxy: StartProxy, tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    proxy = await start_proxy(listen=f"unix:{path}")
    assert path.stat().st_mode & 0o777 == 0o600
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200


async def test_a_stale_socket_is_replaced(start_proxy: StartProxy, tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    proxy = await start_proxy(listen=f"unix:{path}")
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200


async def test_a_socket_in_use_and_a_file_are_left_alone(start_proxy: StartProxy, tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    first = await start_proxy(listen=f"unix:{path}")
    with pytest.raises(CannotListen, match=r"change listen\[0\]"):
        await start_proxy(listen=f"unix:{path}")
    assert (await call(first.addresses[0], "GET", SELLERS)).status == 200
    file = tmp_path / "precious"
    file.write_text("kept", encoding="utf-8")
    with pytest.raises(CannotListen):
        await start_proxy(listen=f"unix:{file}")
    assert file.read_text(encoding="utf-8") == "kept"


async def test_a_port_in_use_names_the_setting(start_proxy: StartProxy, proxy: RunningProxy) -> None:
    with pytest.raises(CannotListen, match=r"Address already in use; stop what uses it, or change listen\[0\]"):
        await start_proxy(listen=proxy.addresses[0])
    with pytest.raises(CannotListen, match="change admin"):
        await start_proxy(admin=proxy.admin)


async def test_several_listeners_serve_side_by_side(start_proxy: StartProxy) -> None:
    accounts = {
        "acme": {"refresh_tokens": {"eu": "Atzr|acme"}},
        "zeta": {"refresh_tokens": {"na": "Atzr|zeta"}},
    }
    listeners = [{"address": "127.0.0.1:0", "account": name} for name in accounts]
    proxy = await start_proxy(accounts=accounts, listen=listeners)
    seen = [(await call(address, "GET", SELLERS)).decided["account"] for address in proxy.addresses]
    assert seen == ["acme", "zeta"]
