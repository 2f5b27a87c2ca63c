"""Raw HTTP client that sends the exact bytes given and records the response without interpretation."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class RawResponse:
    """One response as received; `complete`: its framing says that all of it was received."""

    status: int
    reason: str
    fields: list[tuple[str, str]]
    body: bytes
    complete: bool

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None

    @property
    def error(self) -> str | None:
        """The code of the proxy's own error; None if the response is Amazon's."""
        return self.get("x-sp-proxy-error")

    @property
    def decided(self) -> dict[str, str]:
        """The pairs in the header `x-sp-proxy`."""
        pairs = (part.partition("=") for part in (self.get("x-sp-proxy") or "").split("; "))
        return {name: value for name, _, value in pairs}


class Client:
    """One connection to a proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def request(self, method: str, target: str, body: bytes | None = None, /, **fields: str) -> RawResponse:
        """Return the bytes of a request with `Host: localhost`, the fields, and the body with its length."""
        await self.send(request(method, target, body, **fields))
        return await self.read_response(method)

    async def read_response(self, method: str = "GET") -> RawResponse:
        """Read one response; interim responses (1xx) are skipped."""
        while True:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, *texts = head.split("\r\n")[:-2]
            _, status, reason = line.split(" ", 2)
            if not 100 <= int(status) < 200 or status == "101":
                break
        fields = [(name, value.strip()) for name, _, value in (text.partition(":") for text in texts)]
        response = RawResponse(int(status), reason, fields, b"", complete=True)
        if method != "HEAD" and int(status) not in {204, 304}:
            await self._read_body(response)
        return response

    async def _read_body(self, response: RawResponse) -> None:
        try:
            if response.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readline() or b"x", 16):
                    response.body += await self.reader.readexactly(size)
                    await self.reader.readexactly(2)
                await self.reader.readexactly(2)
            elif response.get("content-length") is not None:
                response.body = await self.reader.readexactly(int(response.get("content-length") or 0))
            else:
                response.body = await self.reader.read()
        except asyncio.IncompleteReadError as exc:
            response.body += exc.partial
            response.complete = False
        except (ValueError, ConnectionError):
            response.complete = False

    async def at_end(self) -> bool:
        """Wait for data or the end of the connection; return whether the proxy closed it."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


def request(method: str, target: str, body: bytes | None = None, /, **fields: str) -> bytes:
    """Return the bytes of a request with `Host: localhost`, the fields, and the body with its length."""
    given = {"host": "localhost", **{name.replace("_", "-"): value for name, value in fields.items()}}
    if body is not None and "transfer-encoding" not in given:
        given["content-length"] = str(len(body))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (body or b"")


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Client]:
    """Connect to `host:port` or `unix:/path`."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"), limit=1024 * 1024)
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), limit=1024 * 1024)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def call(address: str, method: str, target: str, body: bytes | None = None, /, **fields: str) -> RawResponse:
    """Send one request on a connection of its own."""
    async with connect(address) as client:
        return await client.request(method, target, body, **fields)
