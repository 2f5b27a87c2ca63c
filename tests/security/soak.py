"""Soak test: half an hour of mixed traffic with faults: `python -m tests.security.soak --minutes 30`.

A real proxy process with two applications and twenty accounts in three regions (and one more for plain requests); an
upstream and a token host with many kinds of faults; and clients that send mixed traffic, disconnect in every phase,
read and send slowly, and send malformed requests.

Every response is checked: it belongs to its request, for the account that was named, and is complete or visibly
truncated. At the end all load stops, and descriptors, memory and requests in flight must return to their start values;
SIGTERM must end the process with exit code 0. The exit code is 1 if any check failed. Linux only: `/proc` is read.
"""

import argparse
import asyncio
import json
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import quantiles
from typing import Any
from urllib.parse import parse_qs
from zlib import crc32

from tests.bench.output import print_lines
from tests.bench.processes import end_on_signals, memory_kib
from tests.security.fuzz import RESET, descriptors_of
from tests.support.fake_upstream import Received, http_response, read_body
from tests.support.proxy_process import ProxyProcess, serving
from tests.support.raw_client import Client, RawResponse, call

REGIONS = ("na", "eu", "fe")
ACCOUNTS = [f"seller-{number}" for number in range(20)]
PLAIN = "plain"  # account without injected faults, for the latency measurement
CLIENTS = 40
RESPONSE_TIMEOUT = 45.0  # seconds; the proxy's `timeouts.total` is 20 s
SETTLE_TIMEOUT = 60.0  # seconds
EXTRA_DESCRIPTORS = 5  # allowed at the end, for pooled connections
MAX_GROWTH = 30.0  # MiB, after the first tenth of the time
MAX_PRINTED = 50  # wrong responses
MINT = "/tokens/2021-03-01/restrictedDataToken"
MARK_HEADER = "x-soak"  # request header that tells the upstream what the client expects
ECHO_HEADER = "x-soak-echo"  # the same, returned by the upstream to the client
CHECKSUM_HEADER = "x-soak-sum"  # checksum of the message's body


@dataclass(frozen=True, slots=True)
class ExpectedCall:
    """One request and its expected response: account, number, response size, and checksum of the request body."""

    account: str
    region: str
    number: int
    size: int
    sum: int

    def __str__(self) -> str:
        return f"{self.account}/{self.region}/{self.number}/{self.size}/{self.sum}"

    @classmethod
    def parse(cls, text: str | None) -> "ExpectedCall | None":
        if text is None:
            return None
        account, region, *numbers = text.split("/")
        return cls(account, region, *map(int, numbers))

    def content(self) -> bytes:
        """Return the body of its response, in which every line names the request."""
        line = f"{self}\n".encode()
        return (line * (self.size // len(line) + 1))[: self.size]


@dataclass
class Soak:
    """State of the run."""

    random: Random
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    number: int = 0
    tokens: int = 0
    stopping: bool = False

    def report(self, what: str) -> None:
        self.wrong.append(what)
        if len(self.wrong) <= MAX_PRINTED:
            sys.stderr.write(f"WRONG: {what}\n")

    def happens_one_in(self, count: float) -> bool:
        return self.random.random() < 1 / count


# Upstream: responses and faults.


def head(call_info: ExpectedCall, status: str, body: bytes, *fields: str) -> bytes:
    """Return the head of a response that names its request and the checksum of its body."""
    lines = [f"HTTP/1.1 {status}", f"{ECHO_HEADER}: {call_info}", f"{CHECKSUM_HEADER}: {crc32(body)}", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def whole(call_info: ExpectedCall, status: str = "200 OK", body: bytes | None = None, *fields: str) -> bytes:
    """Return a complete response with a Content-Length."""
    body = call_info.content() if body is None else body
    return head(call_info, status, body, f"content-length: {len(body)}", "x-amzn-RateLimit-Limit: 200", *fields) + body


def refusal(call_info: ExpectedCall, status: str, code: str, details: str = "") -> bytes:
    """Return an error in Amazon's envelope."""
    error = {"code": code, "message": f"for {call_info}", "details": details}
    return whole(call_info, status, json.dumps({"errors": [error]}).encode(), "content-type: application/json")


Fault = Callable[[ExpectedCall, Received, asyncio.StreamWriter], Awaitable[None]]


async def good(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(call_info))


async def chunked(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    body = call_info.content()
    writer.write(head(call_info, "200 OK", body, "transfer-encoding: chunked"))
    for at in range(0, len(body), 20_000):
        chunk = body[at : at + 20_000]
        writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        await writer.drain()
    writer.write(b"0\r\n\r\n")


async def until_closed(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    body = call_info.content()
    writer.write(head(call_info, "200 OK", body, "connection: close") + body)
    await writer.drain()
    writer.close()


async def slow(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    data = whole(call_info)
    for at in range(0, len(data), len(data) // 4 + 1):
        if at:
            await asyncio.sleep(0.3)
        writer.write(data[at : at + len(data) // 4 + 1])
        await writer.drain()


async def interim(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 3 + whole(call_info))


async def surplus(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    """Send a second response in the same segment; it must never be used."""
    other = ExpectedCall("surplus", call_info.region, call_info.number, 10, 0)
    writer.write(whole(call_info) + (whole(other) if call_info.size <= 3000 else b""))


async def moved(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(call_info, "301 Moved Permanently", None, "location: http://127.0.0.1:1/elsewhere"))


async def throttled(call_info: ExpectedCall, received: Received, writer: asyncio.StreamWriter) -> None:
    status = "429 Too Many Requests" if "/listings/" in received.target else "200 OK"
    writer.write(refusal(call_info, status, "QuotaExceeded"))


async def expired(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(refusal(call_info, "403 Forbidden", "Unauthorized", "The access token you provided has expired."))


async def unauthorized(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(refusal(call_info, "401 Unauthorized", "Unauthorized", "The access token you provided is revoked."))


async def denied(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(refusal(call_info, "403 Forbidden", "Unauthorized"))


async def failing(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(refusal(call_info, "500 Internal Server Error", "InternalFailure"))


async def unavailable(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(refusal(call_info, "503 Service Unavailable", "ServiceUnavailable"))


async def reset(_: ExpectedCall, __: Received, writer: asyncio.StreamWriter) -> None:
    cut(writer)


async def closed(_: ExpectedCall, __: Received, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def silent(_: ExpectedCall, received: Received, writer: asyncio.StreamWriter) -> None:
    assert received.reader is not None
    with suppress(TimeoutError):
        async with asyncio.timeout(RESPONSE_TIMEOUT):
            await received.reader.read()
    writer.close()


async def half_a_head(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(call_info)[:40])
    await writer.drain()
    writer.close()


async def short(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    """Close the connection before all of the announced length was sent."""
    body = call_info.content() + b"and what never comes"
    writer.write(head(call_info, "200 OK", body, f"content-length: {len(body)}") + call_info.content())
    await writer.drain()
    writer.close()


async def short_chunks(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    body = call_info.content()
    writer.write(head(call_info, "200 OK", body, "transfer-encoding: chunked") + b"%x\r\n%s" % (len(body) + 9, body))
    await writer.drain()
    writer.close()


async def reset_within(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    """Reset a response that is framed by the end of the connection."""
    body = call_info.content() + b"and what never comes"
    writer.write(head(call_info, "200 OK", body, "connection: close") + call_info.content())
    await writer.drain()
    await asyncio.sleep(0.05)
    cut(writer)


async def bad_chunks(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(head(call_info, "200 OK", b"", "transfer-encoding: chunked") + b"5\r\nhello world\r\nzz\r\n0\r\n\r\n")


async def garbage(_: ExpectedCall, __: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x16\x03\x01\x00\xff SSH-2.0 <html>\r\n\r\n")


async def endless_head(call_info: ExpectedCall, _: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(head(call_info, "200 OK", b"")[:-2])
    for number in range(2000):
        writer.write(b"x-%d: %s\r\n" % (number, b"a" * 1000))
        await writer.drain()
    writer.close()


async def stalling(call_info: ExpectedCall, received: Received, writer: asyncio.StreamWriter) -> None:
    """Stop sending in the middle of the response."""
    body = call_info.content() + b"and what never comes"
    writer.write(head(call_info, "200 OK", body, f"content-length: {len(body)}") + call_info.content())
    await writer.drain()
    await silent(call_info, received, writer)


ORDINARY: tuple[Fault, ...] = (*[good] * 60, *[chunked] * 15, *[until_closed] * 4, *[slow] * 4, *[interim] * 4)
FAULTS: tuple[Fault, ...] = (
    *(surplus, moved, throttled, throttled, expired, expired, unauthorized, denied, failing, failing),
    *(unavailable, unavailable, reset, closed, silent, half_a_head, short, short_chunks, reset_within, bad_chunks),
    *(garbage, endless_head, stalling),
)


def cut(writer: asyncio.StreamWriter) -> None:
    """Reset a connection."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def fake_upstream(soak: Soak, region: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection from the proxy."""
    try:
        while not writer.is_closing():
            line, *texts = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
            fields = [(name, value.strip()) for name, _, value in (text.partition(":") for text in texts)]
            await serve_request(soak, region, Received(line, fields, reader=reader), writer)
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ValueError):
        pass  # the proxy has disconnected
    finally:
        writer.close()


async def serve_request(soak: Soak, region: str, received: Received, writer: asyncio.StreamWriter) -> None:
    """Respond to one request; check its token and its body."""
    assert received.reader is not None
    token = (received.get("x-amz-access-token") or "").split("|")  # kind, owner, region, number
    call_info = ExpectedCall.parse(received.get(MARK_HEADER))
    if received.target == MINT:
        await read_body(received, received.reader)
        await mint(soak, token, writer)
        return
    if call_info is None:
        if received.target != "/soak":  # one of BROKEN with a valid head
            soak.report(f"a request that no client sent: {received.line}")
        writer.close()
        return
    if token[:3] != token_for(call_info, received.target) or call_info.region != region:
        soak.report(f"{received.line} for {call_info} came to {region} with the token {token}")
    fault = good if call_info.account == PLAIN else soak.random.choice(FAULTS if soak.happens_one_in(5) else ORDINARY)
    is_early = received.method == "POST" and call_info.account != PLAIN and soak.happens_one_in(20)
    soak.faults["early response" if is_early else fault.__name__] += 1
    if is_early:
        writer.write(whole(call_info))
        await writer.drain()
    body = await read_body(received, received.reader)
    if crc32(body) != call_info.sum:
        soak.report(f"{received.line} for {call_info} came with another body, or not all of it")
    if received.method == "HEAD":
        writer.write(head(call_info, "200 OK", b"", "content-length: 5"))
    elif not is_early:
        await fault(call_info, received, writer)


def token_for(call_info: ExpectedCall, target: str) -> list[str]:
    """Return the expected contents of a request's token: kind, owner, region."""
    if "/notifications/" in target:
        return ["Atza", owner_of(call_info.account), "-"]
    is_restricted = target.endswith("/address") or "/documents/" in target
    return ["Atz.sprdt" if is_restricted else "Atza", call_info.account, call_info.region]


async def mint(soak: Soak, token: list[str], writer: asyncio.StreamWriter) -> None:
    """Usually mint a Restricted Data Token."""
    _, account, region, _ = token
    soak.tokens += 1
    granted = {"restrictedDataToken": f"Atz.sprdt|{account}|{region}|{soak.tokens}", "expiresIn": 20}
    await send_token(soak, granted, writer, may_fail=account != PLAIN)


async def token_host(soak: Soak, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Usually serve one token exchange."""
    try:
        line, *texts = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        fields = [(name, value.strip()) for name, _, value in (text.partition(":") for text in texts)]
        body = await read_body(Received(line, fields), reader)
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        account, region = form["client_id"], "-"
        if form["grant_type"] == "refresh_token":
            _, account, region = form["refresh_token"].split("|")
        soak.tokens += 1
        granted = {
            "access_token": f"Atza|{account}|{region}|{soak.tokens}",
            "expires_in": soak.random.choice((8, 30, 90)),
        }
        await send_token(soak, granted, writer, may_fail=account != PLAIN)
        await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ValueError):
        pass  # the proxy has disconnected
    finally:
        writer.close()


async def send_token(soak: Soak, granted: dict[str, Any], writer: asyncio.StreamWriter, *, may_fail: bool) -> None:
    """Send a token response; occasionally a fault instead."""
    good_response = http_response("200 OK", json.dumps(granted).encode(), content_type="application/json")
    kind = soak.random.randrange(100) if may_fail else 99
    soak.faults["token refused or nonsense" if kind < 16 else "token"] += 1
    if kind < 3:
        writer.write(http_response("503 Service Unavailable"))
    elif kind < 5:
        cut(writer)
    elif kind < 7:
        writer.close()
    elif kind < 9:
        writer.write(http_response("200 OK", b"<html>not now</html>"))
    elif kind < 11:
        writer.write(http_response("200 OK", json.dumps({**granted, "expires_in": "soon", "expiresIn": None}).encode()))
    elif kind < 12:
        writer.write(http_response("400 Bad Request", b'{"error":"invalid_grant"}'))
    elif kind < 14:
        await asyncio.sleep(1.0)
        writer.write(good_response)
    elif kind < 15:
        await asyncio.sleep(3.0)  # longer than the proxy's timeout
    elif kind < 16:
        writer.write(good_response[:-5])
        await writer.drain()
        writer.close()
    else:
        writer.write(good_response)


def owner_of(account: str) -> str:
    """Return the client id of an account's application."""
    return "client-plain" if account == PLAIN else f"client-{ACCOUNTS.index(account) % 2}"


# Clients.


class SlowReader(Client):
    """A client that pauses before it reads."""

    pause = 0.0

    async def _read_body(self, response: RawResponse) -> None:
        await asyncio.sleep(self.pause)
        await super()._read_body(response)


@dataclass(slots=True)
class Plan:
    """How one request is made: its bytes, and the behaviour of the client."""

    call_info: ExpectedCall
    method: str
    head: bytes
    body: list[bytes]
    leaves: str = ""  # in which phase: "head", "upload", "waiting", "download"
    pause: float = 0.0  # seconds between two chunks of the body
    reads_after: float = 0.0


def plan(soak: Soak, account: str) -> Plan:
    """Return a request of one account, of any kind."""
    random = soak.random
    soak.number += 1
    region = random.choice(REGIONS)
    method = random.choice(("GET",) * 6 + ("POST",) * 5 + ("PUT", "PATCH", "DELETE", "HEAD"))
    size = random.choice((0, 10, 300, 3000, 3000, 40_000, 40_000, 700_000))
    uploaded = 0 if method in {"GET", "HEAD"} else random.choice((0, 1, 300, 5000, 100_000, 100_000, 2 * 1024**2))
    body = random.randbytes(uploaded)
    call_info = ExpectedCall(account, region, soak.number, size, crc32(body))
    target = {"GET": "/listings/2021-08-01/items/A1/{}", "POST": "/soak/{}", "HEAD": "/soak/{}"}.get(
        method, "/listings/2021-08-01/items/A1/{}"
    ).format(soak.number)
    if method == "GET" and soak.happens_one_in(3):
        target = random.choice(
            (
                f"/orders/v0/orders/{soak.number}/address",
                f"/orders/v0/orders/{soak.number}/address",
                f"/reports/2021-06-30/documents/{soak.number}",
            )
        )
    version = "1.0" if soak.happens_one_in(20) else "1.1"
    lines = ["host: localhost", f"{MARK_HEADER}: {call_info}", f"x-sp-client: c{random.randrange(5)}"]
    if soak.happens_one_in(2):
        target = f"/@{account}/{region}{target}"
    else:
        lines += [f"x-sp-account: {account}", f"x-sp-region: {region}"]
    if soak.happens_one_in(30):
        lines += ["x-sp-timeout: 300ms"]
    chunks = [body[at : at + 30_000] for at in range(0, len(body), 30_000)]
    if method not in {"GET", "HEAD"}:
        if version == "1.1" and soak.happens_one_in(2):
            lines += ["transfer-encoding: chunked"]
            chunks = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks] + [b"0\r\n\r\n"]
        else:
            lines += [f"content-length: {uploaded}"]
    planned = Plan(
        call_info, method, "\r\n".join([f"{method} {target} HTTP/{version}", *lines, "", ""]).encode(), chunks
    )
    if soak.happens_one_in(6):
        planned.leaves = random.choice(("head", "upload", "waiting", "download"))
    if soak.happens_one_in(12):
        planned.pause = random.choice((0.05, 0.2, 0.2, 3.0))  # the last one is intentionally too long
    if soak.happens_one_in(12):
        planned.reads_after = random.choice((0.3, 1.0, 3.0))
    return planned


def grantless(soak: Soak, account: str) -> Plan:
    """Return a request that is sent with the application's own token."""
    soak.number += 1
    call_info = ExpectedCall(account, "eu", soak.number, 100, 0)
    lines = ["host: localhost", f"{MARK_HEADER}: {call_info}", f"x-sp-account: {account}", "x-sp-region: eu"]
    return Plan(
        call_info, "GET", "\r\n".join(["GET /notifications/v1/destinations HTTP/1.1", *lines, "", ""]).encode(), []
    )


async def client(soak: Soak, port: int) -> None:
    """Send requests one after another until the load stops; sometimes reuse the connection."""
    connection: SlowReader | None = None
    while not soak.stopping:
        if connection is None or connection.writer.is_closing():
            connection = await connected(soak, port)
        account = soak.random.choice(ACCOUNTS)
        planned = grantless(soak, account) if soak.happens_one_in(15) else plan(soak, account)
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT):
                outcome, is_kept = await one_request(soak, connection, planned)
        except TimeoutError:
            outcome, is_kept = "no response", False
            soak.report(f"{planned.head!r} got no response and was not closed")
        soak.outcomes[outcome] += 1
        if not is_kept or soak.happens_one_in(3):
            await leave(soak, connection)
            connection = None
        await asyncio.sleep(soak.random.random() * 0.1)
    if connection is not None:
        await leave(soak, connection)


async def connected(soak: Soak, port: int) -> SlowReader:
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
        except OSError as exc:
            soak.report(f"no connection: {exc!r}")
            await asyncio.sleep(1)
        else:
            return SlowReader(reader, writer)


async def leave(soak: Soak, connection: Client) -> None:
    """Close a connection, sometimes with a reset."""
    if soak.happens_one_in(3):
        cut(connection.writer)
    connection.writer.close()
    with suppress(ConnectionError):
        await connection.writer.wait_closed()


async def one_request(soak: Soak, connection: SlowReader, planned: Plan) -> tuple[str, bool]:
    """Make one request; return its outcome, and whether its connection can be reused."""
    connection.pause = planned.reads_after
    with suppress(ConnectionError):  # the response, and a close, may come before all was sent
        await send(soak, connection, planned)
    if planned.leaves == "waiting":
        await asyncio.sleep(soak.random.random() * 0.2)
    elif planned.leaves == "download":
        with suppress(ConnectionError):
            await connection.reader.read(500)
    if planned.leaves:
        return f"left: {planned.leaves}", False
    try:
        got = await connection.read_response(planned.method)
    except (asyncio.IncompleteReadError, ConnectionError):
        return "closed without a response", False
    except ValueError:
        soak.report(f"the response to {planned.head!r} is not HTTP")
        return "no HTTP", False
    if not got.complete:
        return "cut off", False
    check(soak, planned, got)
    is_kept = got.get("connection") != "close" and b" HTTP/1.0\r\n" not in planned.head
    return f"{got.status} {got.error or ''}".strip(), is_kept and not connection.writer.is_closing()


async def send(soak: Soak, connection: SlowReader, planned: Plan) -> None:
    """Send a request, or the part of it that its plan says."""
    if planned.leaves == "head":
        await connection.send(planned.head[: soak.random.randrange(1, len(planned.head))])
        return
    await connection.send(planned.head)
    for number, chunk in enumerate(planned.body):
        if planned.leaves == "upload" and number == len(planned.body) // 2:
            await connection.send(chunk[: len(chunk) // 2])
            return
        await connection.send(chunk)
        if planned.pause and number < 20:
            await asyncio.sleep(planned.pause)


def check(soak: Soak, planned: Plan, got: RawResponse) -> None:
    """Check that a complete response belongs to this request."""
    account = got.decided.get("account")
    if account not in {planned.call_info.account, "-"}:
        soak.report(f"{planned.call_info} was routed to {account}")
    if got.error is not None:
        if got.error == "InternalError" or (b'"errors"' not in got.body and planned.method != "HEAD"):
            soak.report(f"{planned.call_info} got {got.status} {got.body!r}")
        return
    if got.get(ECHO_HEADER) != str(planned.call_info):
        soak.report(f"{planned.call_info} got the response to {got.get(ECHO_HEADER)}")
    elif planned.method != "HEAD" and got.get(CHECKSUM_HEADER) != str(crc32(got.body)):
        soak.report(f"{planned.call_info} got {got.status} with {len(got.body)} bytes of another body")


BROKEN = (
    b"HELLO\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header: 1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"POST /@seller-1/eu/soak HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n",
    b"GET /../ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 70_000,
    b"GET / HT",
    b"",
)


async def hostile_client(soak: Soak, port: int) -> None:
    """Connect, send malformed data or nothing, and wait until the proxy closes, or disconnect before."""
    while not soak.stopping:
        connection = await connected(soak, port)
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(soak.random.choice((0.1, 1.0, 10.0))):
                await connection.send(soak.random.choice(BROKEN))
                await connection.reader.read()
        soak.outcomes["hostile client"] += 1
        await leave(soak, connection)


async def plain_requests(soak: Soak, port: int) -> None:
    """Send twenty plain valid requests per second and record their latency."""
    begin = time.monotonic()
    kept: SlowReader | None = None
    for tick in range(1, 10**9):
        if soak.stopping:
            break
        soak.number += 1
        call_info = ExpectedCall(PLAIN, "eu", soak.number, 2000, 0)
        lines = ["host: localhost", f"{MARK_HEADER}: {call_info}", f"x-sp-account: {PLAIN}"]
        data = "\r\n".join([f"GET /soak/{soak.number} HTTP/1.1", *lines, "", ""]).encode()
        started = time.monotonic()
        connection = kept or await connected(soak, port)
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT):
                outcome, is_kept = await one_request(soak, connection, Plan(call_info, "GET", data, []))
        except TimeoutError:
            outcome, is_kept = "no response", False
        if outcome != "200":
            soak.report(f"a plain request: {outcome}")
        soak.latencies.append(time.monotonic() - started)
        kept = connection if is_kept and tick % 2 else None
        if kept is None:
            await leave(soak, connection)
        await asyncio.sleep(max(0.0, begin + tick / 20 - time.monotonic()))
    if kept is not None:
        await leave(soak, kept)


# Running.


@dataclass(frozen=True, slots=True)
class Sample:
    """Resources of the proxy at one moment, and the latency of plain requests since the last sample, in ms."""

    seconds: float
    descriptors: int
    memory: float
    threads: int
    in_flight: int
    p50: float
    p99: float

    def row(self, name: str) -> str:
        return (
            f"| {name} | {self.descriptors} | {self.memory:.1f} | {self.threads} | {self.in_flight} | {self.p50:.1f} | "
            f"{self.p99:.1f} |"
        )


HEADING = (
    "| | descriptors | RSS MiB | threads | in flight | p50 ms | p99 ms |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


async def sample(soak: Soak, proxy: ProxyProcess, seconds: float) -> Sample:
    """Take a sample from outside the process."""
    assert proxy.admin is not None
    page = (await call(proxy.admin, "GET", "/metrics", connection="close")).body.decode()
    in_flight = re.search(r"^spapi_proxy_requests_in_flight (\S+)$", page, re.MULTILINE)
    assert in_flight is not None
    pid = proxy.process.pid
    took, soak.latencies = sorted(soak.latencies), []
    parts = quantiles(took, n=100) if len(took) > 1 else [0.0] * 99
    return Sample(
        seconds,
        descriptors_of(pid),
        memory_kib(pid, "VmRSS") / 1024,
        threads_of(pid),
        int(float(in_flight[1])),
        parts[49] * 1000,
        parts[98] * 1000,
    )


def threads_of(pid: int) -> int:
    """Return the number of threads of a process."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@asynccontextmanager
async def upstreams(soak: Soak) -> AsyncIterator[dict[str, str]]:
    """Run the servers of three regions and the token host; yield the proxy's `endpoints`."""
    handlers = {region: partial(fake_upstream, soak, region) for region in REGIONS}
    servers = {}
    for name, handler in {**handlers, "lwa": partial(token_host, soak)}.items():
        servers[name] = await asyncio.start_server(handler, "127.0.0.1", 0, limit=2**18)
    ports = {name: server.sockets[0].getsockname()[1] for name, server in servers.items()}
    endpoints = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    endpoints["lwa"] += "/auth/o2/token"
    yield endpoints
    for server in servers.values():
        server.close()


def settings(endpoints: dict[str, str]) -> dict[str, Any]:
    """Return the proxy's configuration."""
    accounts = {
        name: {
            "application": "plain" if name == PLAIN else f"app-{number % 2}",
            "refresh_tokens": {region: f"Atzr|{name}|{region}" for region in (("eu",) if name == PLAIN else REGIONS)},
        }
        for number, name in enumerate((*ACCOUNTS, PLAIN))
    }
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "applications": {
            "app-0": {"client_id": "client-0", "client_secret": "secret-0"},
            "app-1": {"client_id": "client-1", "client_secret": "secret-1"},
            "plain": {"client_id": "client-plain", "client_secret": "secret-plain"},
        },
        "accounts": accounts,
        "endpoints": endpoints,
        "limits": {"max_wait": "2s"},
        "timeouts": {
            **dict.fromkeys(("header", "body_idle", "connect", "upstream_idle", "token"), "2s"),
            "total": "20s",
            "keep_alive": "5s",
            "shutdown": "5s",
        },
        "pool": {"idle": "3s"},
    }


def read_log(soak: Soak, proxy: ProxyProcess) -> None:
    """Check the log lines for internal errors, and drop them."""
    lines, proxy.log[:] = proxy.log[:], []
    for line in lines:
        if "internal error" in line or "Traceback" in line or not line.startswith("{"):
            soak.report(f"the log says: {line}")


async def watch(soak: Soak, proxy: ProxyProcess, begin: float, samples: list[Sample]) -> None:
    """Take and print a sample every ten seconds."""
    for tick in range(1, 10**9):
        await asyncio.sleep(max(0.0, begin + tick * 10 - time.monotonic()))
        read_log(soak, proxy)
        samples.append(await sample(soak, proxy, time.monotonic() - begin))
        print_lines(f"{samples[-1].row(f'{samples[-1].seconds:.0f} s')} {sum(soak.outcomes.values())} requests")


async def wait_until_settled(soak: Soak, proxy: ProxyProcess, max_descriptors: int) -> Sample:
    """Return a sample with nothing in flight and few descriptors; after SETTLED_WITHIN, the last one."""
    end = time.monotonic() + SETTLE_TIMEOUT
    while True:
        now = await sample(soak, proxy, 0.0)
        if (now.in_flight == 0 and now.descriptors <= max_descriptors) or time.monotonic() > end:
            return now
        await asyncio.sleep(0.5)


async def run(minutes: float, seed: int) -> Soak:
    """Run for `minutes` and print the result."""
    soak, samples = Soak(Random(seed)), list[Sample]()
    with tempfile.TemporaryDirectory() as folder:
        async with upstreams(soak) as endpoints, serving(settings(endpoints), Path(folder)) as proxy:
            port = int(proxy.addresses[0].rpartition(":")[2])
            start = await sample(soak, proxy, 0.0)
            print_lines(HEADING, start.row("start"))
            begin = time.monotonic()
            watching = asyncio.create_task(watch(soak, proxy, begin, samples))
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(client(soak, port))
                for _ in range(4):
                    group.create_task(hostile_client(soak, port))
                group.create_task(plain_requests(soak, port))
                await asyncio.sleep(minutes * 60)
                soak.stopping = True
            watching.cancel()
            await asyncio.wait([watching])
            samples.append(await sample(soak, proxy, time.monotonic() - begin))
            end = await wait_until_settled(soak, proxy, start.descriptors + EXTRA_DESCRIPTORS)
            code = await proxy.stop()
            read_log(soak, proxy)
    assess(soak, start, samples, end, code)
    return soak


def assess(soak: Soak, start: Sample, samples: list[Sample], end: Sample, code: int) -> None:
    """Print the results and record what is wrong."""
    tenth = next((one for one in samples if one.seconds >= samples[-1].seconds / 10), start)
    maximum = Sample(0.0, *(max(values) for values in zip(*map(fields_of, (*samples, end)), strict=True)))
    print_lines("", HEADING, start.row("start"), tenth.row("after a tenth"), maximum.row("maximum"), end.row("end"), "")
    for counter in (soak.outcomes, soak.faults):
        print_lines(*(f"{count:8}  {what}" for what, count in counter.most_common()), "")
    if end.in_flight:
        soak.report(f"{end.in_flight} requests are still in flight")
    if end.descriptors > start.descriptors + EXTRA_DESCRIPTORS:
        soak.report(f"{end.descriptors} descriptors are open, {start.descriptors} were")
    if end.memory > tenth.memory + MAX_GROWTH:
        soak.report(f"{end.memory:.1f} MiB are resident; after a tenth of the time it was {tenth.memory:.1f}")
    if code != 0:
        soak.report(f"after SIGTERM the exit code is {code}")
    print_lines(f"{len(soak.wrong)} errors, exit code of the proxy {code}", *soak.wrong[:MAX_PRINTED])


def fields_of(one: Sample) -> tuple[float, ...]:
    return (one.descriptors, one.memory, one.threads, one.in_flight, one.p50, one.p99)


def main() -> int:
    """Run and print the results; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.security.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="duration (default 30)")
    parser.add_argument("--seed", type=int, default=1, help="seed of traffic and faults (default 1)")
    options = parser.parse_args()
    end_on_signals()
    try:
        return 1 if asyncio.run(run(options.minutes, options.seed)).wrong else 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
