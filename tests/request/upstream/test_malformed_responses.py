"""What a broken or hostile far side may answer, and that the next request still gets an answer of its own."""

import asyncio

import pytest

from proxy.server.runtime import RunningProxy
from tests.support.fake_upstream import FakeUpstream, Received, http_response
from tests.support.raw_client import call, connect

PATH = "/brand/new"

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"

# Each is answered to the first request; the connection stays open for the second.
BAD = {
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "length and chunked": CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n", 1),
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
    "length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n\r\nhello",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n0\r\n\r\n",
    "unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello",
    "bytes behind the answer": http_response("200 OK", b"first")
    + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
    "body on 204": b"HTTP/1.1 204 No Content\r\nContent-Length: 6\r\n\r\nforged",
    "body on 304": b"HTTP/1.1 304 Not Modified\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
    "null in a header": b"HTTP/1.1 200 OK\r\nx: a\x00b\r\nContent-Length: 0\r\n\r\n",
    "folded header": b"HTTP/1.1 200 OK\r\nx: a\r\n b: c\r\nContent-Length: 0\r\n\r\n",
    "header of a mebibyte": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 1024 * 1024 + b"\r\nContent-Length: 0\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"x: a\r\n" * 10_000 + b"Content-Length: 0\r\n\r\n",
    "no status": b"HTTP/1.1\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a thousand interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + http_response("200 OK", b"final"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_response_spoils_no_other(proxy: RunningProxy, fake_upstream: FakeUpstream, case: str) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(BAD[case] if len(fake_upstream.received) == 1 else http_response("200 OK", b"own"))
        await writer.drain()

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        first = await client.request("POST", PATH, b"{}")
    assert b"forged" not in first.body
    second = await call(proxy.addresses[0], "POST", PATH, b"{}")
    assert (second.status, second.body, second.complete) == (200, b"own", True)


async def test_what_a_header_of_amazons_holds_cannot_become_another_header(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nx: a\rx-forged: b\r\nContent-Length: 0\r\n\r\n")

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "POST", PATH, b"{}")
    assert got.get("x-forged") is None


async def test_aborted_calls_leave_nothing_behind(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    never = asyncio.Event()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        if fake_upstream.received[-1].target != "/last":
            await never.wait()
        writer.write(http_response("200 OK", b"own"))

    fake_upstream.script = script
    await call(proxy.addresses[0], "GET", "/last")
    before = len(asyncio.all_tasks())
    for number in range(100):
        async with connect(proxy.addresses[0]) as client:
            fake_upstream.arrived.clear()
            await client.send(f"GET /x{number} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            await fake_upstream.arrived.wait()
    assert (await call(proxy.addresses[0], "GET", "/last")).status == 200
    never.set()
    async with asyncio.timeout(20):
        while proxy.metrics.in_flight or len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - they tell nobody
            await asyncio.sleep(0)
