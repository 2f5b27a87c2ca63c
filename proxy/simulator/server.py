"""The simulator's listeners: the token host and three regions.

The control API and the documents are on the token host's port.
"""

import asyncio
import hashlib
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

from aiohttp import web

from proxy.simulator import canned_responses, consent_page, control_api, documents, lwa, rdt, request_checks
from proxy.simulator.responses import Response, as_json, forbidden, invalid_input
from proxy.simulator.state import REGIONS, Fault, Issued, Recorded, Settings, State
from proxy.simulator.swagger_examples import Models, read_models
from proxy.simulator.usage_plans import WELL_KNOWN, Plans, announced

MAX_KEPT = 64 * 1024  # bytes of a body that are kept; of longer ones, only size and hash
# aiohttp's default is 8190 bytes (3.14.5): Amazon publishes no size for Restricted Data Tokens, which are long.
MAX_HEADER = 64 * 1024
_CHUNK = bytes(64 * 1024)


@dataclass(slots=True)
class Incoming:
    """A request, read to its end."""

    service: str
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    size: int
    sha256: str

    @property
    def path(self) -> str:
        """The raw path."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The raw query."""
        return self.target.partition("?")[2]

    @property
    def named(self) -> dict[str, str]:
        """The headers by lower-case name, the first of each."""
        return {name.lower(): value for name, value in reversed(self.headers)}


@dataclass(slots=True)
class Outcome:
    """The response to a request, with its token and operation for the journal."""

    response: Response
    token: Issued | None = None
    operation: str = ""


class Simulator:
    """A running simulator; an asynchronous context manager. `now` and `wall` are clocks in seconds."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings or Settings()
        self.state = State.of(self.settings, now, wall)
        self.models = Models(read_models(self.settings.models)) if self.settings.models else None
        self.plans = self._plans()
        self.documents = documents.Documents()
        self.endpoints: dict[str, str] = {}
        self._stack = AsyncExitStack()

    @property
    def journal(self) -> deque[Recorded]:
        """What came in, the newest last."""
        return self.state.journal

    async def __aenter__(self) -> Self:
        tls = None
        if self.settings.tls:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(*self.settings.tls)
        try:
            # strict: a missing port must not leave a region without a listener.
            for service, port in zip(("lwa", *REGIONS), self.settings.ports, strict=True):
                address = await self._listen(service, port, None if service == "lwa" else tls)
                self.endpoints[service] = address
        # Python does not call __aexit__ if __aenter__ raises, also not for a cancellation (a BaseException).
        except BaseException:
            await self._stack.aclose()
            raise
        self.endpoints["documents"] = self.documents.base = self.endpoints["lwa"]
        self.endpoints["control"] = self.endpoints["lwa"] + control_api.PATH
        self.endpoints["lwa"] += lwa.PATH
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _listen(self, service: str, port: int, tls: ssl.SSLContext | None) -> str:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            return await self._handle(service, request)

        server = web.Server(
            handle,
            access_log=None,
            # aiohttp's server unpacks bodies by default; size and hash must be of the bytes that were sent.
            auto_decompress=False,
            # Not aiohttp's default: without it, the handler of a client that left would sit out a simulated hang.
            handler_cancellation=True,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
        )
        runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, self.settings.host, port, ssl_context=tls).start()
        # The port that the system chose, for port 0.
        name = runner.addresses[0]
        # A certificate is checked against the name in the URL.
        host = "localhost" if tls else self.settings.host
        return f"{'https' if tls else 'http'}://{host}:{name[1]}"

    def _plans(self) -> Plans:
        plans = Plans(self.settings.default_plan, self.settings.enforce_plans)
        for method, template, rate, burst in WELL_KNOWN:
            plans.add(method, template, rate, burst)
        # The newest plan is matched first (Plans.add): templates with fewest parameters come last, so that they win.
        for operation in sorted(
            self.models.operations if self.models else (), key=lambda one: one.template.count("{"), reverse=True
        ):
            if operation.plan:
                plans.add(operation.method, operation.template, *operation.plan)
        return plans

    async def _handle(self, service: str, request: web.BaseRequest) -> web.StreamResponse:
        if service == "lwa" and request.raw_path.startswith(documents.PATH):
            service = "documents"
        incoming = await _read(service, request)
        # Before faults and journal: a test must be able to remove a fault, and its commands are no traffic.
        if service == "lwa" and incoming.path.startswith(control_api.PATH):
            command = (incoming.method, incoming.path, incoming.body)
            return await _send(request, control_api.respond(self.state, self.plans, *command))
        fault = self.state.fault(service, incoming.method, incoming.path)
        # Before the response is made, so that a token may expire and a plan may refill meanwhile.
        if fault is not None and fault.kind in {"latency", "hang"}:
            await asyncio.sleep(fault.seconds)
        outcome = Outcome(_made_up(fault)) if fault and fault.kind in {"status", "answer"} else self._respond(incoming)
        # Before it is sent: also requests whose response breaks off were executed.
        self._record(incoming, outcome)
        if fault is not None and fault.kind in _BREAKS:
            return await _BREAKS[fault.kind](request, fault, outcome.response)
        return await _send(request, outcome.response)

    def _respond(self, incoming: Incoming) -> Outcome:
        if incoming.service == "documents":
            return Outcome(
                self.documents.respond(
                    incoming.method, incoming.target, incoming.named, incoming.body, self.state.wall()
                )
            )
        if incoming.service == "lwa":
            content_type = incoming.named.get("content-type", "")
            return Outcome(lwa.exchange(self.state, incoming.method, incoming.path, content_type, incoming.body))
        if incoming.path.startswith(consent_page.PATH):
            state, service = self.state, incoming.service
            return Outcome(consent_page.page(state, service, incoming.method, incoming.path, incoming.query))
        names = [name.lower() for name, _ in incoming.headers]
        refused = request_checks.well_formed(incoming.method, names)
        if refused is None:
            token = request_checks.token_of(self.state, incoming.service, incoming.headers)
            if isinstance(token, Issued):
                return self._call(incoming, token)
            refused = token
        return Outcome(refused)

    def _call(self, incoming: Incoming, token: Issued) -> Outcome:
        """Respond to a request with a valid token: check headers, permission and plan, then make the response."""
        method, path = incoming.method, incoming.path
        # Only then the plan: a request that is refused takes nothing from it.
        refused = request_checks.headers_in_order(self.state, incoming.named) or request_checks.permitted(
            token, method, path
        )
        if refused is not None:
            return Outcome(refused, token)
        plan = self.plans.plan(method, path)
        caller = (token.client_id, token.seller, incoming.service)
        throttled = self.plans.take(caller, plan, self.state.now()) if self.plans.enforced else None
        if throttled is not None:
            return Outcome(throttled, token)
        outcome = self._content(incoming, token)
        # Not on 403 and 429: Amazon sends the rate with 20x, 400 and 404 only (OLD "Usage Plans").
        outcome.response.headers.update(announced(plan, outcome.response.status))
        return outcome

    def _content(self, incoming: Incoming, token: Issued) -> Outcome:
        method, path = incoming.method, incoming.path
        if (method, path) == ("POST", rdt.PATH) and token.kind == "lwa":
            return Outcome(rdt.create(self.state, token, incoming.body), token, "createRestrictedDataToken")
        if self.models is None:
            return Outcome(self._plain(incoming, token), token)
        operation = self.models.find(method, path)
        if operation is None:
            # Amazon returns 403 and not 404 for an unknown route (docs#467).
            return Outcome(forbidden(), token)
        if not operation.statics:
            return Outcome(self._plain(incoming, token), token, operation.name)
        static = self.models.respond(operation, path, incoming.query, incoming.named, incoming.body)
        if static is None:
            return Outcome(invalid_input("Could not match input arguments"), token, operation.name)
        return Outcome(_as_response(static.status, static.content), token, operation.name)

    def _plain(self, incoming: Incoming, token: Issued) -> Response:
        """Return the response to an operation without a model or without examples in it."""
        method, path = incoming.method, incoming.path
        named = self.documents.call(method, path, incoming.body, self.state.wall())
        status, content = named or canned_responses.respond(token, method, path, incoming.query)
        return _as_response(status, content)

    def _record(self, incoming: Incoming, outcome: Outcome) -> None:
        token, status = outcome.token, outcome.response.status
        self.state.count(f"answers.{incoming.service}.{status}")
        self.state.journal.append(
            Recorded(
                incoming.service,
                incoming.method,
                incoming.target,
                incoming.headers,
                incoming.body,
                incoming.size,
                incoming.sha256,
                token.seller if token else "",
                token.kind if token else "",
                outcome.operation,
                status,
            )
        )


def _as_response(status: int, content: object) -> Response:
    if content is None:
        response = as_json(status, {})
        return Response(
            status, b"", {name: value for name, value in response.headers.items() if name != "Content-Type"}
        )
    return as_json(status, content)


def _made_up(fault: Fault) -> Response:
    return Response(fault.status, fault.body.encode(), dict(fault.headers))


async def _read(service: str, request: web.BaseRequest) -> Incoming:
    """Read a request to its end, at constant memory."""
    digest, size, kept = hashlib.sha256(), 0, b""
    # Read in full even if it is refused, so that the journal has the size and hash of every upload.
    async for chunk in request.content.iter_any():
        digest.update(chunk)
        size += len(chunk)
        if len(kept) < MAX_KEPT:
            kept += chunk
    headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.raw_headers)
    body = kept if size <= MAX_KEPT else b""
    return Incoming(service, request.method, request.raw_path, headers, body, size, digest.hexdigest())


async def _send(request: web.BaseRequest, response: Response) -> web.StreamResponse:
    stream = web.Response(status=response.status, body=response.body, headers=response.headers)
    await stream.prepare(request)
    await stream.write_eof()
    return stream


# Faults that break the connection, and large responses.


async def _reset(request: web.BaseRequest, _: Fault, __: Response) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _close(request: web.BaseRequest, _: Fault, __: Response) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.close()
    return web.Response()


async def _truncate(request: web.BaseRequest, _: Fault, response: Response) -> web.StreamResponse:
    stream = web.StreamResponse(status=response.status, headers=response.headers)
    # One byte more than is sent: the message is incomplete (RFC 9112 section 8).
    stream.content_length = len(response.body) + 1
    await stream.prepare(request)
    await stream.write(response.body)
    if request.transport is not None:
        request.transport.close()
    return stream


async def _large(request: web.BaseRequest, fault: Fault, response: Response) -> web.StreamResponse:
    headers = {**response.headers, "Content-Type": "application/octet-stream"}
    stream = web.StreamResponse(status=200, headers=headers)
    if not fault.chunked:
        stream.content_length = fault.size
    await stream.prepare(request)
    async for chunk in _zeros(fault.size):
        await stream.write(chunk)
    await stream.write_eof()
    return stream


async def _zeros(size: int) -> AsyncIterator[bytes]:
    while size > 0:
        yield _CHUNK[: min(size, len(_CHUNK))]
        size -= len(_CHUNK)


_BREAKS = {"reset": _reset, "close": _close, "truncate": _truncate, "size": _large}
