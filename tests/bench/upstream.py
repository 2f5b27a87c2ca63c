"""Stand-in for Amazon in the benchmarks: three servers in one process, on the loopback address.

An API over TLS 1.3 that sends one small response to every request, at as little CPU as Python allows: a protocol that
finds the end of a head and writes prebuilt bytes. It is Python and not nginx so that the benchmark is the same on every
machine. A token host over plain HTTP works likewise with another response. The third, over TLS, receives and sends
large bodies at constant memory.
"""

import argparse
import asyncio
import gc
import hashlib
import json
import ssl
from pathlib import Path
from typing import cast

import uvloop
from aiohttp import web

from tests.bench.payload import MIB, blocks
from tests.bench.processes import HOST

RESPONSE_SIZE = 2048  # bytes of body
RATE = 100_000  # announced requests per second: the highest rate that the proxy accepts, so that no request waits
TOKEN = b"atza|benchmark"  # in lower case, as it is compared

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"
_REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"


def api_body() -> bytes:
    """Return the body of the small response: JSON of RESPONSE_SIZE bytes."""
    body = {"payload": {"Orders": [], "filler": ""}}
    body["payload"]["filler"] = "x" * (RESPONSE_SIZE - len(json.dumps(body)))
    return json.dumps(body).encode()


def token_body() -> bytes:
    """Return the body of Login with Amazon's token response."""
    return json.dumps({"access_token": "Atza|benchmark", "token_type": "bearer", "expires_in": 3600}).encode()


def ok_response(body: bytes) -> bytes:
    """Return a complete 200 response with `body` and the header fields that Amazon's responses have."""
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nx-amzn-RequestId: 00000000-0000-4000-8000-000000000000\r\n"
        f"x-amzn-RateLimit-Limit: {RATE}\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n"
    )
    return head.encode() + body


class FixedResponse(asyncio.Protocol):
    """Sends the same response to every request of a connection, once the request is complete.

    With a `token` (in lower case), requests that do not carry it get a 403.
    """

    def __init__(self, response: bytes, token: bytes = b"") -> None:
        self._response = response
        self._token = b"\r\nx-amz-access-token: " + token + b"\r\n" if token else b""
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass of it

    def data_received(self, data: bytes) -> None:
        """Respond to each complete request."""
        self._buffer += data
        while (end := self._request_end()) is not None:
            has_token = self._token in self._buffer[:end].lower()
            self._buffer = self._buffer[end:]
            self._transport.write(self._response if has_token else _REFUSED)

    def _request_end(self) -> int | None:
        """Return the number of bytes of the first request; None if it is incomplete."""
        head = self._buffer.find(_HEAD_END)
        if head < 0:
            return None
        end = head + len(_HEAD_END)
        fields = self._buffer[:head].lower()
        found = fields.find(_LENGTH)
        if found >= 0:
            end += int(fields[found + len(_LENGTH) :].split(b"\r\n", 1)[0])
        return end if len(self._buffer) >= end else None


async def large(request: web.BaseRequest) -> web.StreamResponse:
    """Send `?mib=N` MiB, framed as `&framing=` says (length, chunked); hash uploads at `?rate=N` bytes per second."""
    if request.method != "GET":
        return await _receive_upload(request)
    mib = int(request.query["mib"])
    response = web.StreamResponse()
    if request.query["framing"] == "length":
        response.content_length = mib * MIB
    else:
        response.enable_chunked_encoding()
    await response.prepare(request)
    for block in blocks(mib):
        await response.write(block)
    await response.write_eof()
    return response


async def _receive_upload(request: web.BaseRequest) -> web.Response:
    digest, size, rate = hashlib.sha256(), 0, int(request.query["rate"])
    async for chunk in request.content.iter_any():
        digest.update(chunk)
        size += len(chunk)
        if rate:
            await asyncio.sleep(len(chunk) / rate)
    framing = "chunked" if "Transfer-Encoding" in request.headers else "length"
    return web.json_response({"bytes": size, "sha256": digest.hexdigest(), "framing": framing})


def tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a server context for TLS 1.3 only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    return context


async def serve(api_port: int, token_port: int, large_port: int, context: ssl.SSLContext) -> None:
    """Serve until cancelled. The API's port is opened last, so that all ports are open when it is."""
    loop = asyncio.get_running_loop()
    token, api = ok_response(token_body()), ok_response(api_body())
    await loop.create_server(lambda: FixedResponse(token), HOST, token_port)
    await loop.create_server(web.Server(large, access_log=None), HOST, large_port, ssl=context)
    await loop.create_server(lambda: FixedResponse(api, TOKEN), HOST, api_port, ssl=context)
    await asyncio.Event().wait()


def main() -> None:
    """Serve on the ports given on the command line."""
    parser = argparse.ArgumentParser(description="The benchmark's stand-in for Amazon.")
    for name in ("api-port", "token-port", "large-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    options = parser.parse_args()
    gc.freeze()
    gc.disable()  # no reference cycles here, and a collection pause would be measured as latency of the proxy
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        context = tls(options.certificate, options.key)
        runner.run(serve(options.api_port, options.token_port, options.large_port, context))


if __name__ == "__main__":
    main()
