"""Is the proxy alive, is it ready, and what did it see? The admin listener's and the health listener's answers."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from typing import Any, Literal

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client.exposition import choose_encoder

from proxy import __version__
from proxy.config import LOOPBACK_NAMES, Address, Config
from proxy.observability.metrics import Metrics
from proxy.observability.request_history import MAX_REQUESTS, SAMPLE_INTERVAL, RequestHistory, RequestRecord, Sampler
from proxy.request.tokens.provider import TokenProvider
from proxy.request.validation import VERSION_REFUSED, host_in, is_cross_site
from proxy.server.admin import snapshot, status_page
from proxy.server.admin.diagnosis import diagnose
from proxy.server.admin.snapshot import Snapshot, iso_timestamp

State = Literal["starting", "ready", "stopping"]

MAX_CPU_SHARE = 0.02  # of one processor, that those who watch may take up
CACHE_BELOW = 0.02  # seconds of a processor: a look that takes no longer is made for everybody who asks


_NO_QUIT = "switched off: the setting quit is false; set quit: true, which needs no restart, and ask again\n"


@dataclass(slots=True)
class Readiness:
    """Whether the proxy serves; `waiting_for` says what keeps it from being ready."""

    state: State = "starting"
    waiting_for: str = "the listeners"
    details: dict[str, str] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.state == "ready"


@dataclass(slots=True)
class ReloadStatus:
    """How the configuration in force came to be; moments in seconds of the Unix epoch.

    `problems` are those of the newest configuration, where it was refused: keys and places, never a value.
    `needs_restart` are the keys in which it differs from what is in force.
    """

    good_since: float = field(default_factory=time.time)
    looked_at: float | None = None
    result: Literal["", "ok", "unchanged", "failed"] = ""
    problems: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what `/status` says of it."""
        return {
            "good_since": iso_timestamp(self.good_since),
            "last_reload": None
            if self.looked_at is None
            else {"at": iso_timestamp(self.looked_at), "result": self.result},
            "problems": list(self.problems),
            "needs_restart": list(self.needs_restart),
        }


@dataclass(frozen=True, slots=True)
class AdminContext:
    """What the admin address is about; `quit` is set when it was told to end the proxy."""

    readiness: Readiness
    reloading: ReloadStatus
    current: Callable[[], Config]
    quit: asyncio.Event
    tokens: TokenProvider
    recent: RequestHistory
    history: Sampler


def health_app(readiness: Readiness, metrics: Metrics, current: Callable[[], Config]) -> web.Application:
    """Return health and metrics alone: an application that may be opened to probes and Prometheus.

    These call it by an address or a short name, which no web page can take for its own (DNS rebinding needs a domain).
    """

    def is_ours(host: str) -> bool:
        return host in current().allowed_hosts or _is_address(host) or (host != "" and "." not in host)

    app = web.Application(middlewares=[_guard(is_ours), plain_errors])
    _add_health(app, readiness, metrics)
    return app


def admin_app(about: AdminContext, metrics: Metrics, address: Address) -> web.Application:
    """Return everything for this machine's eyes; answers only to loopback names, as the proxied port does."""
    hosts = {*LOOPBACK_NAMES, address.host.lower()} - {"", "0.0.0.0", "::"}  # noqa: S104 - compared, not bound

    def is_ours(host: str) -> bool:
        return host in hosts or host in current().allowed_hosts

    current = about.current
    app = web.Application(middlewares=[_guard(is_ours), plain_errors])
    _add_health(app, about.readiness, metrics)

    async def end(_: web.Request) -> web.Response:
        if not current().quit:
            return web.Response(status=404, text=_NO_QUIT)
        about.quit.set()
        return web.Response(text="shutting down\n")

    _add_page(app, about, metrics)
    app.router.add_post("/quitquitquit", end)
    return app


@dataclass(frozen=True, slots=True)
class TimedSnapshot:
    """What was to be seen at a moment of the monotonic clock, and the seconds of a processor that it took to find."""

    seen: Snapshot
    at: float
    took: float


def _add_page(app: web.Application, about: AdminContext, metrics: Metrics) -> None:
    """Add the status page, and the same for programs."""
    turns = asyncio.Lock()
    last: list[TimedSnapshot] = []

    async def look() -> TimedSnapshot:
        """Look, or return what somebody else has just seen: many who watch are not many looks."""
        async with turns:
            now = time.monotonic()
            if not last or last[0].took < CACHE_BELOW or now - last[0].at > last[0].took / MAX_CPU_SHARE:
                gather = partial(
                    _take_snapshot, about, metrics, about.current(), about.recent.after(), now, time.time()
                )
                last[:] = [await asyncio.to_thread(gather)]
            return last[0]

    async def first_page(request: web.Request) -> web.Response:
        found, account = await look(), request.query.get("account")
        every = max(SAMPLE_INTERVAL, found.took / MAX_CPU_SHARE)
        body = await asyncio.to_thread(_page_of, found.seen, account, every)
        return web.Response(body=body, content_type="text/html", charset="utf-8", headers=status_page.HEADERS)

    async def file(request: web.Request) -> web.Response:
        name = request.path.removeprefix("/")
        return web.Response(body=status_page.file_of(name), content_type=status_page.FILES[name], charset="utf-8")

    async def icon(_: web.Request) -> web.Response:
        return web.Response(status=204)  # there is none, and that is no fault

    async def status(request: web.Request) -> web.Response:
        snapshot, account = (await look()).seen, request.query.get("account")
        body = await asyncio.to_thread(_status_of, snapshot, account)
        return web.Response(text=body, content_type="application/json")

    async def requests(request: web.Request) -> web.Response:
        try:
            limit = _number(request.query.get("limit", str(MAX_REQUESTS)))
            instance, _, text = request.query.get("after", "").partition(":")
            given = min(_number(text or "0"), about.recent.last_number)
        except ValueError:
            return web.Response(status=400, text="after is the cursor of an earlier answer, limit a number\n")
        number = given if instance == about.recent.instance else None
        found = about.recent.after(number or 0)
        body = await asyncio.to_thread(_requests_of, about.recent, found, number, limit)
        return web.Response(text=body, content_type="application/json")

    app.router.add_get("/", first_page)
    for name in status_page.FILES:
        app.router.add_get(f"/{name}", file)
    app.router.add_get("/favicon.ico", icon)
    app.router.add_get("/status", status)
    app.router.add_get("/requests", requests)


def _take_snapshot(
    about: AdminContext, metrics: Metrics, config: Config, recent: list[RequestRecord], now: float, wall: float
) -> TimedSnapshot:
    """Look at everything. Many accounts take a while: this is on a thread, so that the requests of the apps go on."""
    began = time.thread_time()
    lately = [request for request in recent if now - request.ended <= snapshot.RECENT_WINDOW]
    seen = Snapshot(
        version=__version__,
        state=about.readiness.state,
        waiting_for=about.readiness.waiting_for,
        accounts=len(config.accounts),
        in_flight=metrics.in_flight,
        configuration=about.reloading.as_json(),
        tokens=snapshot.token_rows(config, about.tokens),
        plans=snapshot.plan_rows(metrics, lately),
        errors=snapshot.error_rows(metrics, lately),
        requests=recent,
        samples=list(about.history.samples.copy()),
        store_is_up=snapshot.store_is_up(metrics) if config.store.is_shared else None,
        store_failures=snapshot.store_failures(metrics),
        regions_down=snapshot.regions_down(metrics),
        secrets_left=snapshot.secrets_left(metrics, wall),
        now=now,
        wall=wall,
    )
    return TimedSnapshot(seen, now, time.thread_time() - began)


def _page_of(snapshot: Snapshot, account: str | None, every: float) -> bytes:
    shown = snapshot if account is None else snapshot.for_account(account)
    return status_page.render(shown, diagnose(snapshot), every=every, account=account).encode()


def _status_of(snapshot: Snapshot, account: str | None) -> str:
    shown = snapshot if account is None else snapshot.for_account(account)
    return json.dumps({**shown.as_json(), "verdict": diagnose(snapshot).as_json()})


def _requests_of(recent: RequestHistory, found: list[RequestRecord], number: int | None, limit: int) -> str:
    """Return the requests found after a number (None: of another start); `missed` are remembered no more."""
    now, wall = time.monotonic(), time.time()
    cursor = found[-1].number if found else number or 0
    said = {
        "instance": recent.instance,
        "cursor": f"{recent.instance}:{cursor}",
        "missed": found[0].number - number - 1 if number is not None and found else 0,
        "requests": [
            snapshot.request_as_json(request, iso_timestamp(wall - (now - request.ended)))
            for request in found[max(0, len(found) - limit) :]
        ],
    }
    return json.dumps(said)


def _number(text: str) -> int:
    """Return a whole number of a few digits; raise ValueError for anything else."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise ValueError("not a number")
    return int(text)


# What a form of any web page can send without asking first (Fetch standard, "CORS-safelisted request-header").
_FORM_TYPES = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})


def _guard(is_ours: Callable[[str], bool]) -> Middleware:
    """Return the check that a request is for us and was not caused by a web page, before anything else is done."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if VERSION_REFUSED in request:
            return web.Response(status=505, text="HTTP/1.0 and 1.1 are spoken here\n")
        given = request.headers.getall("Host", ())
        host = host_in(given[0]) if len(given) == 1 else None
        if host is None or not is_ours(host):
            return web.Response(status=421, text="call this address as 127.0.0.1 or localhost\n")
        if is_cross_site(request.headers):
            return web.Response(
                status=403, text="not for web pages, nor links on them: type this address in yourself\n"
            )
        is_form = request.method not in {"GET", "HEAD"} and request.content_type in _FORM_TYPES
        if is_form and "Content-Type" in request.headers:
            return web.Response(status=415, text="not for forms\n")
        return await handler(request)

    return check


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


@web.middleware
async def plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except web.HTTPException as exc:
        response = web.Response(status=exc.status, text=f"{exc.reason}\n")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-store"
    return response


def _add_health(app: web.Application, readiness: Readiness, metrics: Metrics) -> None:
    async def live(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(request: web.Request) -> web.Response:
        text = "ok\n" if readiness.is_ready else f"not ready: {readiness.waiting_for}\n"
        if "verbose" in request.query:
            text += "".join(f"{name}: {value}\n" for name, value in readiness.details.items())
        return web.Response(status=200 if readiness.is_ready else 503, text=text)

    async def started(_: web.Request) -> web.Response:
        has_started = readiness.state != "starting"
        return web.Response(status=200 if has_started else 503, text="ok\n" if has_started else "starting\n")

    async def scrape(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        # Many accounts are many series: the requests of the apps must not wait until all are written down.
        async with metrics.scrape_lock:
            body = await asyncio.to_thread(encode, metrics.registry)
        return web.Response(body=body, headers={"Content-Type": content_type})

    for path in ("/livez", "/healthz", "/liveness"):
        app.router.add_get(path, live)
    for path in ("/readyz", "/readiness"):
        app.router.add_get(path, ready)
    for path in ("/startupz", "/startup"):
        app.router.add_get(path, started)
    app.router.add_get("/metrics", scrape)
