"""Documents by way of a real process: for an app that reaches nothing else, and far larger than memory may grow."""

import asyncio
import gzip
import hashlib
import json
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.conftest import needs, settings_for
from tests.support.fake_upstream import FakeUpstream, RawServer, Received, TokenHost, http_response
from tests.support.proxy_process import ProxyProcess, serving, started
from tests.support.raw_client import call, connect, request

PROC = Path("/proc/self/status").exists()
MIB = 1024 * 1024
SIZE = 100 * MIB
MAX_GROWTH = 8 * 1024  # KiB

FEEDS, REPORT = "/feeds/2021-06-30/documents", "/reports/2021-06-30/documents/amzn1.spdoc.1"


async def test_an_app_without_any_other_way_out_uploads_a_feed_and_fetches_a_report() -> None:
    arguments = ("serve", "--demo", "--listen", "127.0.0.1:0", "--admin", "none", "--log-format", "json")
    async with started(*arguments, environment={"SP_API_PROXY_DOCUMENTS": "relay"}) as proxy:
        address, region = proxy.addresses[0], {"x_sp_region": "eu", "host": proxy.addresses[0]}

        def target_of(url: str) -> str:
            assert url.startswith(f"http://{address}/@demo/-/documents/"), "the app can go nowhere else"
            return url.removeprefix(f"http://{address}")

        feed, kind = b"sku\tprice\n" * 10, "text/tab-separated-values; charset=UTF-8"
        got = await call(address, "POST", FEEDS, json.dumps({"contentType": kind}).encode(), **region)
        made = json.loads(got.body)
        upload = target_of(made["url"])
        got = await call(address, "PUT", upload, feed, content_type="text/xml", host=address)
        assert (got.status, b"SignatureDoesNotMatch" in got.body) == (403, True)  # it is passed on what S3 says
        key = {"authorization": "Bearer of-the-apps-own", "cookie": "a=b"}  # S3 would refuse both beside a signature
        got = await call(address, "PUT", upload, feed, content_type=kind, host=address, **key)
        assert got.status == 200, got.body
        got = await call(address, "GET", f"{FEEDS}/{made['feedDocumentId']}", **region)
        got = await call(address, "GET", target_of(json.loads(got.body)["url"]), host=address)
        assert (got.body, got.get("content-type")) == (feed, kind)

        got = await call(address, "GET", REPORT, **region)
        report = json.loads(got.body)
        assert report["compressionAlgorithm"] == "GZIP"
        target = target_of(report["url"])
        packed = await call(address, "GET", target, host=address)
        plain = await call(address, "GET", f"{target}?decompress=1", host=address)
        part = await call(address, "GET", target, host=address, range="bytes=0-9")
        assert plain.body.startswith(b"sku\tquantity\n")
        assert (gzip.decompress(packed.body), packed.body[:10]) == (plain.body, part.body)
        assert part.status == 206
        assert not [line for line in proxy.log if "X-Amz" in line or target in line]


# Large ones.


@pytest.fixture
async def storage() -> AsyncIterator[RawServer]:
    async with RawServer(reads_bodies=False) as server:
        yield server


@pytest.fixture
async def process(
    fake_upstream: FakeUpstream, token_host: TokenHost, storage: RawServer, tmp_path: Path
) -> AsyncIterator[ProxyProcess]:
    needs(PROC, "/proc")
    settings = settings_for(fake_upstream, token_host, documents="relay")
    settings["endpoints"]["documents"] = storage.url

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("200 OK", json.dumps({"url": f"{storage.url}/a?X-Amz-Expires=300"}).encode()))
        await writer.drain()

    fake_upstream.script = script
    async with serving(settings, tmp_path) as running:
        yield running


def max_resident(proxy: ProxyProcess) -> int:
    """Return the most memory that was ever resident, in KiB."""
    status = Path(f"/proc/{proxy.process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


async def address_of(proxy: ProxyProcess, method: str, target: str) -> str:
    got = await call(proxy.addresses[0], method, target, b"{}" if method == "POST" else None)
    return str(json.loads(got.body)["url"].removeprefix("http://localhost"))


def blocks(size: int) -> Iterator[bytes]:
    """Yield text that packs as well as a report does, and is nowhere the same."""
    done = 0
    while done < size:
        block = b"".join(b"sku-%09d\t%d\n" % (done + number, number * 7919 % 1000) for number in range(20_000))
        yield block[: size - done]
        done += len(block)


async def download(proxy: ProxyProcess, target: str) -> tuple[int, str]:
    """Fetch a document of the given target; return its size and hash, having held none of it."""
    size, digest = 0, hashlib.sha256()
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", target))
        head = (await client.reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200")
        left = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        while left or b"transfer-encoding: chunked" in head:
            if b"content-length" not in head:
                left = int(await client.reader.readline(), 16)
                if not left:
                    break
            while left:
                data = await client.reader.read(min(left, 256 * 1024))
                assert data
                digest.update(data)
                size, left = size + len(data), left - len(data)
            if b"content-length" not in head:
                await client.reader.readexactly(2)
    return size, digest.hexdigest()


@pytest.mark.parametrize("unpack", [False, True])
async def test_a_hundred_mebibytes_come_down_at_constant_memory(
    process: ProxyProcess, storage: RawServer, *, unpack: bool
) -> None:
    digest, packer, packed = hashlib.sha256(), zlib.compressobj(1, wbits=31), []
    for block in blocks(SIZE):
        digest.update(block)
        if unpack:
            packed.append(packer.compress(block))
    body = b"".join([*packed, packer.flush()]) if unpack else b""

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(body) if unpack else SIZE))
        for block in [body] if unpack else blocks(SIZE):
            writer.write(block)
            await writer.drain()

    target = await address_of(process, "GET", REPORT) + ("?decompress=1" if unpack else "")
    before = max_resident(process)
    storage.script = script
    assert await download(process, target) == (SIZE, digest.hexdigest())
    grown = max_resident(process) - before
    print(f"grown by {grown} KiB")  # noqa: T201 - a figure, for whoever asks with -s
    assert grown < MAX_GROWTH


async def test_a_hundred_mebibytes_go_up_at_constant_memory(process: ProxyProcess, storage: RawServer) -> None:
    arrived, sent = hashlib.sha256(), hashlib.sha256()

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        assert received.reader is not None
        left = int(received.get("content-length") or 0)
        while left and (data := await received.reader.read(min(left, 256 * 1024))):
            arrived.update(data)
            left -= len(data)
        writer.write(http_response("200 OK"))
        await writer.drain()

    storage.script = script
    target = await address_of(process, "POST", FEEDS)
    before = max_resident(process)
    async with connect(process.addresses[0]) as client:
        await client.send(request("PUT", target, None, content_length=str(SIZE)))
        for block in blocks(SIZE):
            sent.update(block)
            await client.send(block)
        assert (await client.read_response()).status == 200
    assert arrived.hexdigest() == sent.hexdigest()
    grown = max_resident(process) - before
    print(f"grown by {grown} KiB")  # noqa: T201 - a figure, for whoever asks with -s
    assert grown < MAX_GROWTH
