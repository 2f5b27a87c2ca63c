"""Connections on both sides: none carries what belongs to another request, none is kept for ever or cut too early."""

import asyncio
import json
import select
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from proxy.server.runtime import RunningProxy, start_proxy
from tests.conftest import StartProxy, config_from, settings_for
from tests.support.fake_upstream import FakeUpstream, Received, Script, TokenHost, http_response
from tests.support.raw_client import call, connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"
FEEDS = "/feeds/2021-06-30/feeds"
ADDRESS = "/orders/v0/orders/902-1845936-5435065/address"

TWO_ACCOUNTS = {
    "one": {"refresh_tokens": {"eu": "Atzr|one"}},
    "two": {"refresh_tokens": {"eu": "Atzr|two"}},
}

NO_FURTHER_WAIT = struct.pack("ii", 1, 0)


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection by a reset, as a crash or a firewall does."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_FURTHER_WAIT)
    writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> tuple[bytes, str]:
    """Read to the end; return what came and whether it ended by `eof` or `reset`."""
    data = b""
    try:
        while chunk := await reader.read(65536):
            data += chunk
    except ConnectionError:
        return data, "reset"
    return data, "eof"


# Nothing of one request reaches another.


@pytest.mark.parametrize(
    "surplus",
    [
        http_response("200 OK", b"first's"),
        http_response("200 OK", b"first's")[:20],
        b"X",
        b"\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
    ids=["whole answer", "half an answer", "one byte", "a line's end", "interim answer"],
)
async def test_what_arrives_on_an_idle_connection_belongs_to_nobody(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, surplus: bytes
) -> None:
    gone = asyncio.Event()

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        token = received.get("x-amz-access-token") or ""
        writer.write(http_response("200 OK", f"for token {token.rpartition('|')[2]}".encode()))
        await writer.drain()
        if len(fake_upstream.received) == 1:
            await answered.wait()
            writer.write(surplus)
            assert received.reader is not None
            assert await received.reader.read() == b"", "the connection is given up at once"
            gone.set()

    answered = asyncio.Event()
    fake_upstream.script = script
    proxy = await start_proxy(accounts=TWO_ACCOUNTS)
    first = await call(proxy.addresses[0], "POST", FEEDS, b"{}", x_sp_account="one")
    answered.set()
    await asyncio.wait_for(gone.wait(), 10)
    second = await call(proxy.addresses[0], "POST", FEEDS, b"{}", x_sp_account="two")
    assert (first.body, second.body) == (b"for token 1", b"for token 2")


async def test_a_token_that_arrives_unasked_is_nobodys(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    async def respond(received: Received, writer: asyncio.StreamWriter) -> None:
        who = "one" if b"one" in received.body else "two"
        grant = http_response("200 OK", json.dumps({"access_token": f"Atza|{who}", "expires_in": 3600}).encode())
        writer.write(grant)
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(grant)

    token_host.respond = respond  # type: ignore[assignment, method-assign]
    proxy = await start_proxy(accounts=TWO_ACCOUNTS)
    for who in ("one", "two"):
        await call(proxy.addresses[0], "GET", SELLERS, x_sp_account=who)
    assert [received.get("x-amz-access-token") for received in fake_upstream.received] == ["Atza|one", "Atza|two"]
    assert token_host.connections == 2


async def test_a_connection_that_is_still_clean_is_used_again(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    for _ in range(3):
        await call(proxy.addresses[0], "GET", SELLERS)
    assert fake_upstream.connections == 1


async def test_an_idle_connection_that_died_costs_no_token(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    fake_upstream.respond = once_a_connection(fake_upstream)  # type: ignore[assignment, method-assign]
    token_host.respond = once_a_connection(token_host)  # type: ignore[assignment, method-assign]
    proxy = await start_proxy(accounts=TWO_ACCOUNTS)
    assert (await call(proxy.addresses[0], "POST", FEEDS, b"{}", x_sp_account="one")).status == 200
    restricted = await call(proxy.addresses[0], "GET", ADDRESS, x_sp_account="one")
    assert (restricted.status, restricted.error) == (200, None)
    other = await call(proxy.addresses[0], "GET", SELLERS, x_sp_account="two")
    assert (other.status, other.error) == (200, None)


def once_a_connection(server: FakeUpstream | TokenHost) -> Script:
    """Return what answers the first request of each connection, and closes it under the second."""
    seen: set[int] = set()
    respond = server.respond

    async def respond_once(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.connection in seen:
            writer.close()
        else:
            seen.add(received.connection)
            await respond(received, writer)

    return respond_once


# Half an answer never looks whole.


@pytest.mark.parametrize("end", [reset, lambda writer: writer.close()], ids=["reset", "eof"])
async def test_a_cut_off_response_looks_cut_off_to_http_1_0_too(
    proxy: RunningProxy, fake_upstream: FakeUpstream, end: Callable[[asyncio.StreamWriter], None]
) -> None:
    passed_on = asyncio.Event()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await writer.drain()
        await passed_on.wait()
        end(writer)

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        await client.send(f"GET {SELLERS} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        await client.reader.readuntil(b"half")
        passed_on.set()
        assert await ended(client.reader) == (b"", "reset")


async def test_a_stalled_response_looks_cut_off_to_http_1_0_too(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    never = asyncio.Event()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await never.wait()

    fake_upstream.script = script
    proxy = await start_proxy(timeouts={"upstream_idle": "100ms"})
    async with connect(proxy.addresses[0]) as client:
        await client.send(f"GET {SELLERS} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        assert (await ended(client.reader))[1] == "reset"


async def test_a_response_that_ends_with_its_connection_is_cut_off_by_a_reset(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    passed_on = asyncio.Event()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf")
        await writer.drain()
        await passed_on.wait()
        reset(writer)

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS))
        await client.reader.readuntil(b"half")
        passed_on.set()
        rest, _ = await ended(client.reader)
    assert b"0\r\n\r\n" not in rest, "the last chunk says that the answer is whole"
    assert proxy.metrics.registry.get_sample_value("spapi_proxy_answers_cut_off_total") == 1


@pytest.mark.parametrize("status", ["099 Odd", "042 Odd"])
async def test_a_status_that_is_none_is_an_error(proxy: RunningProxy, fake_upstream: FakeUpstream, status: str) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response(status, b"odd"))

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "POST", FEEDS, b"{}")
    assert (got.status, got.error) == (502, "UpstreamBroken")


# The app's side.


@pytest.fixture
async def stoppable(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> AsyncIterator[tuple[RunningProxy, AsyncExitStack]]:
    """A proxy, and what stops it."""
    async with AsyncExitStack() as stack:
        settings = settings_for(fake_upstream, token_host, timeouts={"shutdown": "10s"})
        yield await stack.enter_async_context(start_proxy(config_from(settings, tmp_path))), stack


async def test_what_is_being_sent_up_when_the_proxy_is_told_to_stop_arrives_whole(
    stoppable: tuple[RunningProxy, AsyncExitStack], fake_upstream: FakeUpstream
) -> None:
    proxy, stack = stoppable
    arrived: list[bytes] = []

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        assert received.reader is not None
        if received.method == "POST":
            arrived.append(await received.reader.readexactly(8))
        writer.write(http_response("200 OK", b"taken"))

    fake_upstream.script, fake_upstream.reads_bodies = script, False
    async with connect(proxy.addresses[0]) as client, connect(proxy.addresses[0]) as idle:
        await idle.request("GET", SELLERS)
        fake_upstream.arrived.clear()
        await client.send(request("POST", FEEDS, content_length="8") + b"half")
        await asyncio.wait_for(fake_upstream.arrived.wait(), 10)
        stopping = asyncio.create_task(stack.aclose())
        assert await asyncio.wait_for(idle.at_end(), 10), "idle connections end at once"
        await client.send(b"rest")
        got = await asyncio.wait_for(client.read_response(), 10)
        assert (arrived, got.body, got.get("connection")) == ([b"halfrest"], b"taken", "close")
        assert await asyncio.wait_for(client.at_end(), 10)
        await stopping
    assert proxy.shutdown.aborted == 0


async def refuses(address: str) -> None:
    """Wait until nobody listens at `address` any more."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except ConnectionError:
                return
            writer.close()


async def test_what_is_cut_off_in_the_end_looks_cut_off_and_is_counted_as_the_proxys_doing(
    stoppable: tuple[RunningProxy, AsyncExitStack], fake_upstream: FakeUpstream
) -> None:
    proxy, stack = stoppable
    never = asyncio.Event()

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.method == "GET":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await never.wait()

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as begun, connect(proxy.addresses[0]) as waiting:
        await begun.send(request("GET", SELLERS))
        await begun.reader.readuntil(b"half")
        fake_upstream.arrived.clear()
        await waiting.send(request("POST", FEEDS, b"{}"))
        await asyncio.wait_for(fake_upstream.arrived.wait(), 10)
        proxy.shutdown.immediate.set()
        await asyncio.wait_for(stack.aclose(), 10)
        assert await begun.at_end()
        got = await waiting.read_response()
        assert (got.status, got.error, got.get("connection")) == (503, "ShuttingDown", "close")
    count = proxy.metrics.registry.get_sample_value
    assert count("spapi_proxy_errors_total", {"code": "ShuttingDown", "fault": "proxy"}) == 2
    assert count("spapi_proxy_answers_cut_off_total") == 1
    assert proxy.shutdown.aborted == 2


async def test_a_response_under_way_when_the_proxy_is_told_to_stop_ends_its_connection(
    stoppable: tuple[RunningProxy, AsyncExitStack], fake_upstream: FakeUpstream
) -> None:
    proxy, stack = stoppable
    go_on = asyncio.Event()

    later = asyncio.Event()

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        await writer.drain()
        await (later if received.target == "/later" else go_on).wait()
        writer.write(b"rest")

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client, connect(proxy.addresses[0]) as other:
        await client.send(request("GET", SELLERS))
        await client.reader.readuntil(b"half")
        await other.send(request("GET", "/later"))
        await other.reader.readuntil(b"half")
        stopping = asyncio.create_task(stack.aclose())
        await refuses(proxy.addresses[0])
        go_on.set()
        assert await asyncio.wait_for(ended(client.reader), 10) == (b"rest", "eof"), "though the other one goes on"
        later.set()
        await stopping
    assert proxy.shutdown.aborted == 0


async def test_clients_that_read_nothing_are_given_up_whatever_is_left_unread(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, tmp_path: Path
) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("200 OK", b"x" * int(received.target.rpartition("/")[2])))
        await writer.drain()

    fake_upstream.script = script
    # A Unix socket takes about 200 KiB: of some of these answers, all but a little fits in.
    sizes = range(64_000, 512_000, 8_000)
    proxy = await start_proxy(
        listen=f"unix:{tmp_path}/proxy.sock", timeouts={"body_idle": "300ms", "keep_alive": "300ms"}
    )
    loop = asyncio.get_running_loop()
    with ExitStack() as clients:
        waiting = []
        for size in sizes:
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            await loop.sock_connect(client, proxy.addresses[0].removeprefix("unix:"))
            await loop.sock_sendall(client, request("GET", f"/brand/new/{size}"))
            waiting.append(client)
        async with asyncio.timeout(20):
            for client in waiting:
                while not is_hung_up(client):  # noqa: ASYNC110 - the kernel tells nobody
                    await asyncio.sleep(0.01)


def is_hung_up(client: socket.socket) -> bool:
    """Return whether the other side has closed the connection, though nothing of what it sent was read."""
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))


async def test_continue_is_not_said_to_http_1_0(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, b"{}", expect="100-continue").replace(b" HTTP/1.1", b" HTTP/1.0", 1))
        first = await client.reader.readline()
    assert b" 200 " in first
    assert fake_upstream.received[0].body == b"{}"


async def test_a_chunk_that_is_none_ends_its_upload_at_once(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    fake_upstream.reads_bodies = False
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, transfer_encoding="chunked") + b"4\r\nhalf\r\n")
        await fake_upstream.arrived.wait()
        await client.send(b"ZZ\r\n")
        got = await asyncio.wait_for(client.read_response(), 10)
        assert (got.status, got.error) == (400, "MalformedRequest")
        assert await client.at_end()
