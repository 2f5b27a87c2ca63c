"""Fake upstream servers that record the exact bytes they receive and send the exact bytes of a script.

They share no code with the proxy and use no HTTP library, because a library would hide what the tests check.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Self

Script = Callable[["Received", asyncio.StreamWriter], Coroutine[None, None, None]]


@dataclass(slots=True)
class Received:
    """One request as received: its line, its fields in order, and its body after it was read."""

    line: str
    fields: list[tuple[str, str]]
    body: bytes = b""
    reader: asyncio.StreamReader | None = None
    connection: int = 0

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def target(self) -> str:
        return self.line.split(" ")[1]

    def all(self, name: str) -> list[str]:
        """Return every value of a field."""
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        """Return the value of a field that occurs at most once; None if it is absent."""
        values = self.all(name)
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None


def http_response(status: str, body: bytes = b"", **fields: str) -> bytes:
    """Return an HTTP/1.1 response with a Content-Length; `content_type=` becomes `content-type:`."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


@dataclass
class RawServer:
    """A server on a free port of 127.0.0.1 that responds to each request by its script."""

    script: Script | None = None
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    reads_bodies: bool = True
    open_connections: set[asyncio.StreamWriter] = field(default_factory=set)
    last_closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Self:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=256 * 1024)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.arrived = asyncio.Event()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        number = self.connections
        self.open_connections.add(writer)
        try:
            while await self._one_request(reader, writer, number):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections.discard(writer)
            self._tasks.discard(task)
            writer.close()
            self.last_closed.set()

    async def _one_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        line, *fields = head.decode("latin-1").split("\r\n")[:-2]
        pairs = [(name, value.strip()) for name, _, value in (text.partition(":") for text in fields)]
        request = Received(line, pairs, reader=reader, connection=number)
        self.received.append(request)
        if self.reads_bodies:
            request.body = await read_body(request, reader)
        self.arrived.set()
        await self.respond(request, writer)
        return not writer.is_closing()

    async def respond(self, request: Received, writer: asyncio.StreamWriter) -> None:
        if self.script is not None:
            await self.script(request, writer)
        else:
            writer.write(http_response("200 OK", b'{"payload":[]}', content_type="application/json"))
            await writer.drain()


async def read_body(request: Received, reader: asyncio.StreamReader) -> bytes:
    """Return a request's complete body, framed by its length or its chunks."""
    if request.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return body
    return await reader.readexactly(int(request.get("content-length") or 0))


@dataclass
class FakeUpstream(RawServer):
    """Amazon's API. Mints Restricted Data Tokens itself; the script responds to everything else."""

    rdt_response: bytes | None = None
    minted: list[Received] = field(default_factory=list)

    async def respond(self, request: Received, writer: asyncio.StreamWriter) -> None:
        if request.target != "/tokens/2021-03-01/restrictedDataToken":
            await super().respond(request, writer)
            return
        self.received.remove(request)
        self.minted.append(request)
        body = json.dumps({"restrictedDataToken": f"Atz.sprdt|{len(self.minted)}", "expiresIn": 3600}).encode()
        writer.write(self.rdt_response or http_response("200 OK", body, content_type="application/json"))
        await writer.drain()


@dataclass
class TokenHost(RawServer):
    """Login with Amazon. Each exchange issues a new token; `responses` replaces the next responses."""

    responses: list[bytes] = field(default_factory=list)
    expires_in: object = 3600
    held: asyncio.Event | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/auth/o2/token"

    async def respond(self, request: Received, writer: asyncio.StreamWriter) -> None:  # noqa: ARG002 - as the base
        if self.held is not None:
            await self.held.wait()
        grant = {
            "access_token": f"Atza|{len(self.received)}",
            "token_type": "bearer",
            "expires_in": self.expires_in,
        }
        scripted = self.responses.pop(0) if self.responses else None
        writer.write(scripted or http_response("200 OK", json.dumps(grant).encode(), content_type="application/json"))
        await writer.drain()
