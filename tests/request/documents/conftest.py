"""A proxy that relays documents, with a fake Amazon and a fake storage behind it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

import pytest

from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.fake_upstream import FakeUpstream, RawServer, Received, TokenHost, http_response
from tests.support.raw_client import call

FEEDS, REPORTS = "/feeds/2021-06-30/documents", "/reports/2021-06-30/documents"
REPORT = f"{REPORTS}/amzn1.spdoc.1"
SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20260101T000000Z&X-Amz-Expires=300&X-Amz-Signature=distinctive-1"
CONTENT = b"sku\tquantity\n" * 100
STORE_KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
async def storage() -> AsyncIterator[RawServer]:
    """Amazon's storage of documents."""
    async with RawServer() as server:
        serve(server, http_response("200 OK", CONTENT, content_type="text/plain", etag='"1"'))
        yield server


def serve(server: RawServer, data: bytes, *, ends: bool = False) -> None:
    """Let a server answer everything by these bytes; and then, where the connection `ends`, nothing more."""

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if ends:
            writer.close()

    server.script = script


def named(fake_upstream: FakeUpstream, url: str, field: str = "url", status: str = "200 OK") -> bytes:
    """Let Amazon name a document by this URL in all its answers; return the body."""
    body = json.dumps({"reportDocumentId": "amzn1.spdoc.1", field: url, "compressionAlgorithm": "GZIP"}).encode()
    serve(fake_upstream, http_response(status, body, content_type="application/json"))
    return body


class Started:
    """A proxy that relays, with what is behind it."""

    def __init__(self, proxy: RunningProxy, fake_upstream: FakeUpstream, storage: RawServer) -> None:
        self.proxy = proxy
        self.address = proxy.addresses[0]
        self.fake_upstream = fake_upstream
        self.storage = storage

    async def document(
        self, target: str = REPORT, query: str = SIGNED, method: str = "GET", address: str = "", **fields: str
    ) -> str:
        """Have Amazon name a document; return the target that stands for it."""
        named(self.fake_upstream, f"{self.storage.url}/bucket/%2Fa~b?{query}", status="200 OK")
        got = await call(address or self.address, method, target, b"{}" if method == "POST" else None, **fields)
        assert got.status == 200, got.body
        url = json.loads(got.body)["url"]
        assert url.startswith("http://localhost/@acme/-/documents/"), url
        return str(url.removeprefix("http://localhost"))

    async def upload(self, **fields: str) -> str:
        return await self.document(FEEDS, method="POST", **fields)

    def count(self, result: str) -> float:
        name = "spapi_proxy_document_urls_total"
        return self.proxy.metrics.registry.get_sample_value(name, {"result": result}) or 0.0


class Start(Protocol):
    """Starts a proxy whose settings are the defaults of these tests, changed by keywords."""

    def __call__(self, **settings: Any) -> Awaitable[Started]: ...


@pytest.fixture
def start(start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, storage: RawServer) -> Start:
    """Starts proxies that relay documents of `storage`."""

    async def started(**settings: Any) -> Started:
        endpoints = {**dict.fromkeys(("na", "eu", "fe"), fake_upstream.url), "lwa": token_host.url}
        endpoints["documents"] = storage.url
        proxy = await start_proxy(**{"documents": "relay", "endpoints": endpoints, **settings})
        return Started(proxy, fake_upstream, storage)

    return started


@pytest.fixture
async def relayed(start: Start) -> Started:
    return await start()


def lower(sent: Received) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in sent.fields]


async def refused(address: str, method: str, target: str, body: bytes | None = None, **fields: str) -> tuple[int, str]:
    got = await call(address, method, target, body, **fields)
    assert got.error is not None
    return got.status, got.error
