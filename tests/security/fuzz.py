"""Fuzzing of the proxy's request handling: `python -m tests.security.fuzz --seconds 600`.

A real proxy process, an upstream that records every byte, a token host, and clients that send what `grammar.py`
generates. It is checked continuously that

- every request that reaches the upstream is canonical, and is one of the requests that `strict.py` finds in what was
  sent: the same method, target, body and fields, for the account that was named, and each at most once. A request that
  was hidden in a body, sent twice, or truncated and completed matches none of them;
- responses come in the order of their requests, each for its own, and every connection gets a response or is closed in
  time;
- no response, log line or metrics page contains a secret or a token, and no error of the proxy quotes a request;
- the proxy stays up, serves valid requests in time, logs no traceback, and ends with the descriptors and the memory
  that it started with.

The exit code is 1 if any check failed. Linux only: descriptors and memory are read from `/proc`.
"""

import argparse
import asyncio
import json
import re
import secrets
import socket
import struct
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.bench.processes import end_on_signals, memory_kib
from tests.security import strict
from tests.security.grammar import MARKS, Case, Sender, case
from tests.security.strict import Message
from tests.support.fake_upstream import Received, TokenHost, http_response
from tests.support.proxy_process import ProxyProcess, serving
from tests.support.raw_client import Client, call

END_TIMEOUT = 15.0  # seconds until the proxy must respond or close; its timeouts are 2 s and 5 s
SLOW_DELAY = 0.02  # seconds
SHORT_WAIT = 0.02  # seconds to wait for a response to malformed data
VALID_TIMEOUT = 5.0  # seconds until a valid request must get its response
SETTLE_TIMEOUT = 30.0  # seconds
MAX_GROWTH = 30.0  # MiB
HISTORY_SIZE = 300  # requests of a client that may still arrive upstream
MAX_PRINTED = 200  # violations

MINT = b"/tokens/2021-03-01/restrictedDataToken"
METHODS = {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE"}
PROXY_FIELDS = {b"host", b"x-amz-access-token", b"x-amz-date", b"user-agent", b"content-length", b"transfer-encoding"}
STRIPPED_FIELDS = re.compile(
    rb"authorization|baggage|connection|cookie|expect|forwarded|keep-alive|proxy-(?:authenticate|authorization|connection)|te|trailer|upgrade|via|x-amz-security"
    rb"-token|x-amz-signature|x-amz-content-sha256|x-forwarded-.*|x-real-ip|x-request-id|x-sp-.*"
)
CANONICAL_LINE = re.compile(rb"[A-Z]+ /[\x21-\x7e]* HTTP/1\.1\r\n")
ODD_IN_TARGET = re.compile(rb"[#\\]")
MARK = re.compile(MARKS)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close sends RST


@dataclass(frozen=True, slots=True)
class Grant:
    """Owner of an issued token; without account and region it is the application's own."""

    application: str
    account: bytes | None
    region: str | None


@dataclass(slots=True)
class Sent:
    """One request that a client sent, as the strict parser reads it, and its destination."""

    message: Message
    target: bytes
    account: bytes | None
    region: str | None


@dataclass(slots=True)
class Worker:
    """A sequence of clients of accounts that no other worker uses, so that each arriving request has one origin."""

    accounts: tuple[bytes, bytes]
    sent: deque[Sent] = field(default_factory=lambda: deque(maxlen=HISTORY_SIZE))
    cases: deque[Case] = field(default_factory=lambda: deque(maxlen=3))


@dataclass(frozen=True, slots=True)
class Violation:
    """A violated rule, with the bytes that violated it."""

    rule: str
    what: str
    cases: tuple[Case, ...]
    seen: bytes

    def __str__(self) -> str:
        lines = [f"VIOLATION ({self.rule}): {self.what}", f"  seen: {self.seen!r}"]
        for one in self.cases:
            listener = "fixed" if one.sender.fixed else "open"
            lines.append(f"  case {one.number}, {listener} listener, then {one.ending}: {one.pieces!r}")
        return "\n".join(lines)


@dataclass
class Findings:
    """Results of a run so far."""

    violations: list[Violation] = field(default_factory=list)
    responses: Counter[str] = field(default_factory=Counter)
    cases: int = 0
    arrived: int = 0
    cut_off: int = 0
    exchanges: int = 0
    good: int = 0
    slowest_valid: float = 0.0

    def violate(self, rule: str, what: str, cases: tuple[Case, ...] = (), seen: bytes = b"") -> None:
        """Record a violation and print it."""
        marks = set(MARK.findall(seen))
        matching = tuple(one for one in cases if marks & set(MARK.findall(one.data))) or cases[-1:]
        violation = Violation(rule, what, matching, seen)
        self.violations.append(violation)
        if len(self.violations) <= MAX_PRINTED:
            sys.stderr.write(f"{violation}\n")


class Oracle:
    """Test oracle: what was sent and issued, and so what may arrive at either side of the proxy."""

    def __init__(self, connections: int) -> None:
        self.findings = Findings()
        self.secret = f"NEVERSHOWN{secrets.token_hex(8)}"
        # Names so different that no mutation turns one into another.
        names = [sha256(b"%d" % number).hexdigest().encode() for number in range(connections)]
        self.workers = [Worker((b"a" + name[:9], b"b" + name[9:18])) for name in names]
        self.good = Worker((b"good", b"good-too"))
        self.issued: dict[bytes, Grant] = {}
        self.hosts: dict[str, bytes] = {}
        self.token_host = _TokenHost(self)

    @property
    def all_workers(self) -> list[Worker]:
        return [*self.workers, self.good]

    def settings(self) -> dict[str, Any]:
        """Return the proxy's configuration: for each worker a listener fixed to its first account, and an open one."""
        names = [tuple(name.decode() for name in worker.accounts) for worker in self.all_workers]
        accounts = {}
        for number, (first, second) in enumerate(names):
            application = f"app-{number}"
            accounts[first] = self._account(application, first, ("eu",))
            accounts[second] = self._account(application, second, ("na", "fe"))
        listeners: list[dict[str, str]] = []
        for first, _ in names:
            listeners += [{"address": "127.0.0.1:0", "account": first, "region": "eu"}, {"address": "127.0.0.1:0"}]
        return {
            "listen": listeners,
            "admin": "127.0.0.1:0",
            "applications": {
                f"app-{n}": {"client_id": f"app-{n}", "client_secret": f"{self.secret}-client-{n}"}
                for n in range(len(names))
            },
            "accounts": accounts,
            "endpoints": {
                **{region: f"http://{host.decode()}" for region, host in self.hosts.items()},
                "lwa": self.token_host.url,
            },
            "limits": {"pace": False},
            "retry": {"attempts": 1},
            "timeouts": {"header": "2s", "body_idle": "2s", "keep_alive": "2s"},
            "pool": {"idle": "1s"},
            "log": {"level": "debug"},
        }

    def _account(self, application: str, name: str, regions: tuple[str, ...]) -> dict[str, Any]:
        tokens = {region: f"Atzr|{self.secret}-refresh-{name}-{region}" for region in regions}
        return {"application": application, "refresh_tokens": tokens}

    def issue(self, kind: str, grant: Grant) -> str:
        """Return a new token and record its owner."""
        self.findings.exchanges += 1
        token = f"Atza|{self.secret}-{kind}-{len(self.issued)}"
        self.issued[token.encode()] = grant
        return token

    def worker_of(self, grant: Grant) -> Worker:
        return self.all_workers[int(grant.application.removeprefix("app-"))]

    # Requests that arrive upstream.

    def arrived(self, region: str, message: Message) -> bytes:
        """Check a request that arrived, complete or truncated, and return the response to it."""
        findings = self.findings
        findings.arrived += message.complete
        findings.cut_off += not message.complete
        tokens = message.all(b"x-amz-access-token")
        grant = self.issued.get(tokens[0]) if len(tokens) == 1 else None
        worker = self.worker_of(grant) if grant is not None else None
        cases = tuple(one for each in self.workers for one in each.cases)
        for odd in not_canonical(message, self.hosts[region]):
            findings.violate("canonical", odd, cases, message.raw)
        if grant is None or worker is None:
            findings.violate("token", "no token that was issued", cases, message.raw)
        elif grant.region not in {region, None}:
            findings.violate("token", f"a token of another region than {region}", cases, message.raw)
        elif message.target == MINT:
            token = self.issue("restricted", grant)
            body = json.dumps({"restrictedDataToken": token, "expiresIn": 60})
            return http_response("200 OK", body.encode(), content_type="application/json")
        elif (fault := not_sent(message, grant, region, worker)) is not None:
            findings.violate("as sent", fault, cases, message.raw)
        return echo(message)

    def begin(self, one: Case, worker: Worker) -> list[Sent]:
        """Record what a case is about to send, and return it as the strict parser reads it."""
        worker.cases.append(one)
        sent = [sent_as(message, one.sender) for message in strict.requests(one.data)]
        worker.sent.extend(sent)
        return sent

    def check_hidden(self, rule: str, data: bytes, cases: tuple[Case, ...] = ()) -> None:
        """Check that no secret and no issued token is visible."""
        if self.secret.encode() in data:
            self.findings.violate(rule, "a secret is visible", cases, data[:5000])


def sent_as(message: Message, sender: Sender) -> Sent:
    """Return the destination of a request: its target without authority and prefix, its account and its region."""
    target = message.target
    if not target.startswith(b"/"):
        target = re.sub(rb"(?i)\Ahttps?://[^/?#]*", b"", target)
        target = target if target.startswith(b"/") else b"/" + target
    fields = {name.lower(): value for name, value in message.fields}
    account, region = fields.get(b"x-sp-account"), fields.get(b"x-sp-region", b"").lower()
    if target.startswith(b"/@"):
        account, _, target = target[2:].partition(b"/")
        first, slash, behind = target.partition(b"/")
        if slash and first.lower() in {b"na", b"eu", b"fe"}:
            region, target = first.lower(), behind
        target = b"/" + target
    if sender.fixed:
        account, region = sender.account, b"eu"
    return Sent(message, target, account, region.decode("latin-1") or None)


def not_canonical(message: Message, host: bytes) -> Iterator[str]:
    """Yield what is ambiguous, or must not be there, in a request that arrived upstream."""
    path = message.target.partition(b"?")[0]
    plain = re.sub(rb"(?i)%5c|%2f|\\", b"/", re.sub(rb"(?i)%2e", b".", path))
    names = [name.lower().replace(b"_", b"-") for name, _ in message.fields]
    lengths, codings = message.all(b"content-length"), message.all(b"transfer-encoding")
    if CANONICAL_LINE.match(message.raw) is None or ODD_IN_TARGET.search(message.target):
        yield "the request line is not canonical"
    if message.method not in METHODS:
        yield "the method is none that is forwarded"
    if path.startswith(b"//"):
        yield "the path begins with //"
    if {segment.partition(b";")[0] for segment in plain.split(b"/")} & {b".", b".."}:
        yield "the path has a dot segment"
    if message.all(b"host") != [host]:
        yield "the host is not the upstream's own"
    if len(message.all(b"x-amz-access-token")) != 1:
        yield "there is not exactly one token"
    if len(lengths) + len(codings) > 1 or not all(re.fullmatch(rb"\d+", one) for one in lengths):
        yield "the length is not clear"
    if codings and (
        codings != [b"chunked"] or not all(re.fullmatch(rb"[0-9a-f]+\r\n", x) for x in message.chunk_lines)
    ):
        yield "the chunks are not plain ones"
    if message.target != MINT and any(STRIPPED_FIELDS.fullmatch(name) for name in names):
        yield "a field is there that is not for Amazon"


def not_sent(message: Message, grant: Grant, region: str, worker: Worker) -> str | None:
    """Remove a request that arrived from those that were sent; return why it matches none, None if it does."""
    found = [one for one in worker.sent if (one.message.method, one.target) == (message.method, message.target)]
    if not found:
        return "no such request was sent"
    found = [one for one in found if one.message.clear and _is_body_of(one.message, message)]
    if not found:
        return "its body, or the end of its body, is not what was sent"
    found = [one for one in found if grant.account is None or one.account == grant.account]
    if not found:
        return "it carries the token of another account"
    found = [one for one in found if one.region in {None, region}]
    if not found:
        return f"it goes to the wrong region, {region}"
    added = Counter((name.lower(), value) for name, value in message.fields if name.lower() not in PROXY_FIELDS)
    found = [one for one in found if not added - Counter((name.lower(), value) for name, value in one.message.fields)]
    if not found:
        return "it has fields that were not sent"
    worker.sent.remove(found[0])
    return None


def _is_body_of(sent: Message, arrived: Message) -> bool:
    if arrived.complete:
        return sent.complete and sent.body == arrived.body
    return sent.body.startswith(arrived.body)


def echo(message: Message) -> bytes:
    """Return a response that names its request."""
    what = message.method + b" " + message.target
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nx-echo: " + what + b"\r\n"
    if message.method == b"HEAD":
        return head + b"Content-Length: 5\r\n\r\n"
    if b"/chunky/" in message.target:
        return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(what), what)
    return head + b"Content-Length: %d\r\n\r\n" % len(what) + what


class _TokenHost(TokenHost):
    """Issues tokens that are recognised wherever they appear."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        self.oracle = oracle

    async def respond(self, request: Received, writer: asyncio.StreamWriter) -> None:
        form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        grant = Grant(form["client_id"], None, None)
        if form["grant_type"] == "refresh_token":
            account, region = form["refresh_token"].partition("-refresh-")[2].rsplit("-", 1)
            grant = Grant(form["client_id"], account.encode(), region)
        response = {"access_token": self.oracle.issue("ordinary", grant), "token_type": "bearer", "expires_in": 3600}
        self.received.clear()
        writer.write(http_response("200 OK", json.dumps(response).encode(), content_type="application/json"))
        await writer.drain()


class _Upstream(asyncio.Protocol):
    """One connection from the proxy to one region."""

    def __init__(self, oracle: Oracle, region: str) -> None:
        self.oracle = oracle
        self.region = region
        self.buffer = b""
        self.responded_early = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (message := strict.request(self.buffer)) is not None:
            if not message.complete:
                if b"/early/" in message.target and not self.responded_early:
                    self.responded_early = True
                    self.transport.write(echo(message))
                return
            self.buffer = self.buffer[len(message.raw) :]
            response = self.oracle.arrived(self.region, message)
            if self.responded_early:
                self.responded_early = False
            elif b"/slow/" in message.target:
                asyncio.get_running_loop().call_later(SLOW_DELAY, self.transport.write, response)
            else:
                self.transport.write(response)
        if b"\r\n\r\n" in self.buffer:
            self._is_malformed()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as the base
        message = strict.request(self.buffer)
        if message is not None:
            rest = self.buffer[len(message.raw) :]
            self.oracle.arrived(self.region, message)
            if re.fullmatch(rb"[0-9a-f]*\r?\n?", rest) is None:
                self._is_malformed()
        elif self.buffer:
            self._is_malformed()

    def _is_malformed(self) -> None:
        cases = tuple(one for worker in self.oracle.workers for one in worker.cases)
        self.oracle.findings.violate("canonical", "what arrives is not HTTP/1.1", cases, self.buffer)
        self.buffer = b""
        self.transport.abort()


# Clients.


async def play_case(oracle: Oracle, one: Case, worker: Worker) -> None:
    """Send one case, read the responses and check them."""
    sent = oracle.begin(one, worker)
    oracle.findings.cases += 1
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.sender.port, limit=2**20)
    except OSError as exc:
        oracle.findings.violate("up", f"no connection: {exc}", (one,))
        return
    try:
        with suppress(OSError):
            await _send(one, writer)
        if one.ending == "reset":
            return
        data, at_end = await _read(one, sent, reader)
        check_responses(oracle, one, sent, data, at_end=at_end)
    except TimeoutError:
        oracle.findings.violate("in time", f"no response and not closed within {END_TIMEOUT:g} s", (one,))
    finally:
        _close(writer, resets=one.resets or one.ending == "reset")


async def _send(one: Case, writer: asyncio.StreamWriter) -> None:
    for chunk, pause in zip(one.pieces, one.pauses, strict=True):
        writer.write(chunk)
        await writer.drain()
        if pause:
            await asyncio.sleep(pause)
    if one.ending == "fin":
        writer.write_eof()


async def _read(one: Case, sent: list[Sent], reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """Return what was received, and whether the connection ended: all responses, or everything up to its end."""
    whole = [item for item in sent if item.message.complete]
    methods = [item.message.method for item in sent]
    has_more = sum(len(item.message.raw) for item in whole) < len(one.data)
    data, end = b"", time.monotonic() + END_TIMEOUT
    while True:
        enough = one.ending == "read" and len(strict.responses(data, methods, at_end=False)[0]) >= len(whole)
        if enough and not has_more:
            return data, False
        try:
            async with asyncio.timeout(SHORT_WAIT if enough else end - time.monotonic()):
                chunk = await reader.read(65536)
        except TimeoutError:
            if enough:
                return data, False
            raise
        except ConnectionError:
            return data, True
        if not chunk:
            return data, True
        data += chunk


def _close(writer: asyncio.StreamWriter, *, resets: bool) -> None:
    sock = writer.get_extra_info("socket")
    if resets and sock is not None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
    writer.close()


def check_responses(oracle: Oracle, one: Case, sent: list[Sent], data: bytes, *, at_end: bool) -> None:
    """Check that responses are well-formed, contain no secret, and are in the order of their requests."""
    findings = oracle.findings
    oracle.check_hidden("hidden", data, (one,))
    found, rest = strict.responses(data, [item.message.method for item in sent], at_end=at_end)
    if rest and not rest.startswith(b"HTTP/1."[: len(rest)]):
        findings.violate("responses", "the output is not HTTP/1.1", (one,), data)
    if len(found) > len(sent) + 1:
        findings.violate("responses", f"{len(found)} responses to {len(sent)} requests", (one,), data)
    for number, got in enumerate(found):
        error = b"".join(got.all(b"x-sp-proxy-error")).decode()
        findings.responses[f"{got.status} {error}".strip()] += 1
        if error == "InternalError":
            findings.violate("up", "an internal error", (one,), got.raw)
        if error and MARK.search(got.raw):
            findings.violate("hidden", "an error quotes the request", (one,), got.raw)
        if error:
            continue
        due = sent[number].message.method + b" " + sent[number].target if number < len(sent) else None
        if got.all(b"x-echo") != [due]:
            findings.violate("responses", f"response {number + 1} is not for request {number + 1}", (one,), data)
            break
    if not found:
        findings.responses["closed without a response" if at_end else "no response expected"] += 1


# Running.


@asynccontextmanager
async def upstreams(oracle: Oracle) -> AsyncIterator[None]:
    """Run the servers of three regions and the token host."""
    loop = asyncio.get_running_loop()
    servers = []
    for region in ("na", "eu", "fe"):
        server = await loop.create_server(lambda region=region: _Upstream(oracle, region), "127.0.0.1", 0)  # type: ignore[misc]
        oracle.hosts[region] = b"127.0.0.1:%d" % server.sockets[0].getsockname()[1]
        servers.append(server)
    async with oracle.token_host:
        yield
    for server in servers:
        server.close()


@dataclass(frozen=True, slots=True)
class State:
    """Resources of the proxy: descriptors, requests in flight, resident MiB."""

    descriptors: int
    in_flight: int
    memory: float

    def __str__(self) -> str:
        return f"{self.descriptors} descriptors, {self.in_flight} in flight, {self.memory:.1f} MiB"


async def state_of(oracle: Oracle, proxy: ProxyProcess) -> State:
    """Return the current resources of the proxy; check its metrics page for secrets."""
    assert proxy.admin is not None
    page = await call(proxy.admin, "GET", "/metrics", connection="close")
    oracle.check_hidden("hidden", page.body)
    if MARK.search(page.body):
        oracle.findings.violate("hidden", "the metrics page quotes a request", (), page.body)
    in_flight = re.search(rb"^spapi_proxy_requests_in_flight (\S+)$", page.body, re.MULTILINE)
    assert in_flight is not None
    pid = proxy.process.pid
    return State(descriptors_of(pid), int(float(in_flight[1])), memory_kib(pid, "VmRSS") / 1024)


def descriptors_of(pid: int) -> int:
    """Return the number of open descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def settled(oracle: Oracle, proxy: ProxyProcess, max_descriptors: int = 0) -> State:
    """Return the state when nothing is in flight and descriptors have reached `max_descriptors` or stopped falling."""
    end, unchanged, least = time.monotonic() + SETTLE_TIMEOUT, 0, 10**6
    while True:
        state = await state_of(oracle, proxy)
        unchanged = unchanged + 1 if state.descriptors >= least else 0
        least = min(least, state.descriptors)
        is_done = state.descriptors <= max_descriptors if max_descriptors else unchanged >= 15
        if (state.in_flight == 0 and is_done) or time.monotonic() > end:
            return state
        await asyncio.sleep(0.1)


def check_log(oracle: Oracle, proxy: ProxyProcess) -> None:
    """Check the log lines since the last check, and drop them."""
    lines, proxy.log[:] = proxy.log[:], []
    for line in lines:
        oracle.check_hidden("hidden", line.encode())
        if "internal error" in line or "Traceback" in line or not line.startswith("{"):
            oracle.findings.violate("up", f"the log says: {line}")
        elif MARK.search(line.encode()):
            entry = {**json.loads(line), "request_id": ""}  # the client chooses this one
            if MARK.search(json.dumps(entry).encode()):
                oracle.findings.violate("hidden", f"the log quotes a request: {line}")


async def valid_request(oracle: Oracle, port: int) -> None:
    """Send a valid request and record the duration until its response."""
    findings, began = oracle.findings, time.monotonic()
    target = f"/good/{findings.good}"
    data = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    oracle.begin(Case(-1, Sender(*oracle.good.accounts, port, fixed=True), [data], [0.0], "read", False), oracle.good)
    try:
        async with asyncio.timeout(VALID_TIMEOUT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                got = await Client(reader, writer).read_response()
            finally:
                writer.close()
        if (got.status, got.body.decode()) != (200, f"GET {target}"):
            findings.violate("up", f"a valid request got {got.status}", (), got.body)
    except (TimeoutError, OSError, asyncio.IncompleteReadError) as exc:
        findings.violate("up", f"a valid request got no response within {VALID_TIMEOUT:g} s: {exc!r}")
    findings.good += 1
    findings.slowest_valid = max(findings.slowest_valid, time.monotonic() - began)


async def watch(oracle: Oracle, proxy: ProxyProcess, port: int) -> None:
    """Send a valid request and check the log every second; print progress every ten seconds."""
    begin = time.monotonic()
    for tick in range(1, 10**9):
        await valid_request(oracle, port)
        check_log(oracle, proxy)
        if tick % 10 == 0:
            findings, seconds = oracle.findings, time.monotonic() - begin
            sys.stdout.write(
                f"{seconds:5.0f} s: {findings.cases} cases ({findings.cases / seconds:.0f}/s), "
                f"{findings.arrived} arrived and {findings.cut_off} cut off upstream, "
                f"{len(findings.violations)} violations; {await state_of(oracle, proxy)}\n"
            )
            sys.stdout.flush()
        await asyncio.sleep(max(0.0, begin + tick - time.monotonic()))


@dataclass(frozen=True, slots=True)
class Until:
    """End of a run: a moment of the monotonic clock, or a number of cases; `only` selects one case."""

    moment: float = float("inf")
    cases: int | None = None
    only: int | None = None

    def is_over(self, index: int) -> bool:
        return time.monotonic() > self.moment or (self.cases is not None and index >= self.cases)


async def work(oracle: Oracle, seed: int, number: int, ports: list[int], until: Until) -> None:
    """Play every case of this worker, one after another."""
    worker, step = oracle.workers[number], len(oracle.workers)
    for index in range(number, 10**9, step):
        if until.is_over(index):
            return
        if until.only is None or index == until.only:
            await play_case(oracle, made(seed, index, worker, ports[2 * number : 2 * number + 2]), worker)


def made(seed: int, index: int, worker: Worker, ports: list[int]) -> Case:
    """Return a case as its worker sends it: every second one to the open listener."""
    fixed = index // 2 % 2 == 0
    return case(seed, index, Sender(*worker.accounts, ports[0 if fixed else 1], fixed))


async def fuzz(
    seed: int, connections: int, *, seconds: float = float("inf"), cases: int | None = None, only: int | None = None
) -> Findings:
    """Run against a new proxy for `seconds` or `cases`, and return the findings."""
    oracle = Oracle(connections)
    with tempfile.TemporaryDirectory() as folder:
        async with upstreams(oracle), serving(oracle.settings(), Path(folder)) as proxy:
            ports = [int(address.rpartition(":")[2]) for address in proxy.addresses]
            for _ in range(20):
                await valid_request(oracle, ports[-2])
            before = await settled(oracle, proxy)
            sys.stdout.write(f"seed {seed}, starts with {before}\n")
            until = Until(time.monotonic() + seconds, cases, only)
            watching = asyncio.create_task(watch(oracle, proxy, ports[-2]))
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(connections):
                        group.create_task(work(oracle, seed, number, ports, until))
            finally:
                watching.cancel()
                await asyncio.wait([watching])
            after = await settled(oracle, proxy, before.descriptors)
            await check_end(oracle, proxy, before, after)
            sys.stdout.write(f"ends with {after}\n")
    return oracle.findings


async def check_end(oracle: Oracle, proxy: ProxyProcess, before: State, after: State) -> None:
    """Check that the proxy released its resources and exits with code 0."""
    findings = oracle.findings
    if after.in_flight or after.descriptors > before.descriptors or after.memory > before.memory + MAX_GROWTH:
        findings.violate("end", f"started with {before}, ended with {after}")
    code = await proxy.stop()
    if code != 0:
        findings.violate("end", f"the exit code is {code}")
    check_log(oracle, proxy)


def report(findings: Findings) -> str:
    """Return the counts and the violations as text."""
    kinds = Counter(f"{violation.rule}: {violation.what[:80]}" for violation in findings.violations)
    rows = [
        f"{findings.cases} cases: {findings.arrived} requests arrived upstream, {findings.cut_off} cut off",
        f"{findings.exchanges} tokens; {findings.good} good requests, the slowest {findings.slowest_valid:.3f} s",
        *(f"{count:8}  {what}" for what, count in findings.responses.most_common()),
        f"{len(findings.violations)} violations",
        *(f"{count:8}  {what}" for what, count in kinds.most_common()),
    ]
    return "\n".join(rows)


def main() -> int:
    """Run and print the findings; return 1 if a rule was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.security.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="duration (default 600)")
    parser.add_argument("--seed", type=int, default=1, help="seed of every case (default 1)")
    parser.add_argument("--connections", type=int, default=8, help="concurrent connections (default 8)")
    parser.add_argument(
        "--case", type=int, metavar="N", help="play this one alone; seed and connections as it was found"
    )
    options = parser.parse_args()
    end_on_signals()
    cases = None if options.case is None else options.case + 1
    run = fuzz(options.seed, options.connections, seconds=options.seconds, cases=cases, only=options.case)
    try:
        findings = asyncio.run(run)
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(f"{report(findings)}\n")
    return 1 if findings.violations else 0


if __name__ == "__main__":
    sys.exit(main())
