"""The applications behind the admin address (status page, health, metrics) and the health address (the last two)."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from typing import Any, Literal

from aiohttp import web
from prometheus_client.exposition import choose_encoder

from proxy import __version__
from proxy.config import LOOPBACK_NAMES, Address, Config
from proxy.observability.metrics import Metrics
from proxy.observability.request_history import MAX_REQUESTS, SAMPLE_INTERVAL, RequestHistory, RequestRecord, Sampler
from proxy.request.tokens.provider import TokenProvider
from proxy.server.admin import snapshot as snapshots
from proxy.server.admin import status_page
from proxy.server.admin.diagnosis import diagnose
from proxy.server.admin.middlewares import access_check, plain_errors
from proxy.server.admin.snapshot import Snapshot, iso_timestamp

State = Literal["starting", "ready", "stopping"]

# The cost of a snapshot grows with the number of accounts. The apps' requests share the processor and the GIL with it,
# so that all viewers together may use no more than this.
MAX_CPU_SHARE = 0.02  # of one processor
CACHE_BELOW = 0.02  # seconds of CPU time: a cheaper snapshot is taken for each request, a dearer one is reused

# `proxy.cli.admin_client` recognises the first words.
_QUIT_DISABLED = "switched off: the setting quit is false; set quit: true, which needs no restart, and try again\n"


@dataclass(slots=True)
class Readiness:
    """Whether the proxy serves; `waiting_for` says what it waits for before it is ready."""

    state: State = "starting"
    waiting_for: str = "the listeners"
    details: dict[str, str] = field(default_factory=dict)  # shown by `/readyz?verbose`

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent to this proxy."""
        return self.state == "ready"


@dataclass(slots=True)
class ReloadStatus:
    """The result of the last reload; times are Unix times in seconds.

    `good_since` is when the configuration in force was loaded. `problems` are those of the newest configuration if it
    was rejected: keys and their locations, never a value. `needs_restart` are the keys whose newest values take effect
    only after a restart.
    """

    good_since: float = field(default_factory=time.time)
    checked_at: float | None = None
    result: Literal["", "ok", "unchanged", "failed"] = ""
    problems: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the key `configuration` of `/status`."""
        return {
            "good_since": iso_timestamp(self.good_since),
            "last_reload": None
            if self.checked_at is None
            else {"at": iso_timestamp(self.checked_at), "result": self.result},
            "problems": list(self.problems),
            "needs_restart": list(self.needs_restart),
        }


@dataclass(frozen=True, slots=True)
class AdminContext:
    """What the admin application shows and controls; setting `quit` shuts the proxy down."""

    readiness: Readiness
    reload_status: ReloadStatus
    current: Callable[[], Config]
    quit: asyncio.Event
    tokens: TokenProvider
    history: RequestHistory
    sampler: Sampler


def health_app(readiness: Readiness, metrics: Metrics, current: Callable[[], Config]) -> web.Application:
    """Return the application with health and metrics only, whose address may be opened to probes and Prometheus.

    They call it by an IP address or a short name. A web page cannot have such a name as its own, because DNS rebinding
    needs a registered domain.
    """

    def is_allowed_host(host: str) -> bool:
        return host in current().allowed_hosts or _is_ip_address(host) or (host != "" and "." not in host)

    app = web.Application(middlewares=[access_check(is_allowed_host), plain_errors])
    _add_health(app, readiness, metrics)
    return app


def admin_app(context: AdminContext, metrics: Metrics, address: Address) -> web.Application:
    """Return the application with everything; it accepts loopback names only, as the apps' port does."""
    hosts = {*LOOPBACK_NAMES, address.host.lower()} - {"", "0.0.0.0", "::"}  # noqa: S104 - compared, not bound
    current = context.current

    def is_allowed_host(host: str) -> bool:
        return host in hosts or host in current().allowed_hosts

    async def quit_proxy(_: web.Request) -> web.Response:
        if not current().quit:
            return web.Response(status=404, text=_QUIT_DISABLED)
        context.quit.set()
        return web.Response(text="shutting down\n")

    app = web.Application(middlewares=[access_check(is_allowed_host), plain_errors])
    _add_health(app, context.readiness, metrics)
    _add_status(app, context, metrics)
    app.router.add_post("/quitquitquit", quit_proxy)  # the path that Envoy, Istio and the Cloud SQL proxy use
    return app


def _is_ip_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


# Health and metrics.


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
        return web.Response(body=await metrics.export(encode), headers={"Content-Type": content_type})

    for path in ("/livez", "/healthz", "/liveness"):
        app.router.add_get(path, live)
    for path in ("/readyz", "/readiness"):
        app.router.add_get(path, ready)
    for path in ("/startupz", "/startup"):
        app.router.add_get(path, started)
    app.router.add_get("/metrics", scrape)


# The status page, and the same as JSON.


@dataclass(frozen=True, slots=True)
class TimedSnapshot:
    """A snapshot, its moment on the monotonic clock, and the seconds of CPU time that it took."""

    snapshot: Snapshot
    taken_at: float
    cpu_time: float


def _add_status(app: web.Application, context: AdminContext, metrics: Metrics) -> None:
    lock = asyncio.Lock()
    cached: list[TimedSnapshot] = []

    async def current_snapshot() -> TimedSnapshot:
        """Return a new snapshot, or the last one if it was expensive and is recent: see MAX_CPU_SHARE."""
        async with lock:  # concurrent requests wait for the same snapshot
            now = time.monotonic()
            if (
                not cached
                or cached[0].cpu_time < CACHE_BELOW
                or now - cached[0].taken_at > cached[0].cpu_time / MAX_CPU_SHARE
            ):
                # The configuration and the history are read here, on the event loop that changes them.
                take = partial(
                    _take_snapshot, context, metrics, context.current(), context.history.after(), now, time.time()
                )
                cached[:] = [await asyncio.to_thread(take)]
            return cached[0]

    async def page(request: web.Request) -> web.Response:
        taken, account = await current_snapshot(), request.query.get("account")
        refresh_interval = max(SAMPLE_INTERVAL, taken.cpu_time / MAX_CPU_SHARE)
        body = await asyncio.to_thread(_render_page, taken.snapshot, account, refresh_interval)
        return web.Response(body=body, content_type="text/html", charset="utf-8", headers=status_page.HEADERS)

    async def file(request: web.Request) -> web.Response:
        name = request.path.removeprefix("/")
        return web.Response(body=status_page.read_file(name), content_type=status_page.FILES[name], charset="utf-8")

    async def icon(_: web.Request) -> web.Response:
        # Every browser asks for it. A 404 would be an error in its console.
        return web.Response(status=204)

    async def status(request: web.Request) -> web.Response:
        taken, account = await current_snapshot(), request.query.get("account")
        body = await asyncio.to_thread(_render_status, taken.snapshot, account)
        return web.Response(text=body, content_type="application/json")

    async def requests(request: web.Request) -> web.Response:
        history = context.history
        try:
            limit = _parse_number(request.query.get("limit", str(MAX_REQUESTS)))
            instance, _, text = request.query.get("after", "").partition(":")
            number = min(_parse_number(text or "0"), history.last_number)
        except ValueError:
            text = "after must be the cursor of an earlier response, limit a number\n"
            return web.Response(status=400, text=text)
        after = number if instance == history.instance else None
        found = history.after(after or 0)
        body = await asyncio.to_thread(_render_requests, history, found, after, limit)
        return web.Response(text=body, content_type="application/json")

    app.router.add_get("/", page)
    for name in status_page.FILES:
        app.router.add_get(f"/{name}", file)
    app.router.add_get("/favicon.ico", icon)
    app.router.add_get("/status", status)
    app.router.add_get("/requests", requests)


def _take_snapshot(
    context: AdminContext, metrics: Metrics, config: Config, requests: list[RequestRecord], now: float, wall: float
) -> TimedSnapshot:
    """Take a snapshot; runs on a thread, because with many accounts it takes long enough to delay requests."""
    start = time.thread_time()
    recent = [request for request in requests if now - request.ended <= snapshots.RECENT_WINDOW]
    snapshot = Snapshot(
        version=__version__,
        state=context.readiness.state,
        waiting_for=context.readiness.waiting_for,
        accounts=len(config.accounts),
        in_flight=metrics.in_flight,
        configuration=context.reload_status.as_json(),
        tokens=snapshots.token_rows(config, context.tokens),
        plans=snapshots.plan_rows(metrics, recent),
        errors=snapshots.error_rows(metrics, recent),
        requests=requests,
        samples=list(context.sampler.samples.copy()),
        store_is_up=snapshots.store_is_up(metrics) if config.store.is_shared else None,
        store_failures=snapshots.store_failures(metrics),
        regions_down=snapshots.regions_down(metrics),
        secret_lifetimes=snapshots.secret_lifetimes(metrics, wall),
        now=now,
        wall=wall,
    )
    return TimedSnapshot(snapshot, now, time.thread_time() - start)


def _render_page(snapshot: Snapshot, account: str | None, refresh_interval: float) -> bytes:
    shown = snapshot if account is None else snapshot.for_account(account)
    text = status_page.render(shown, diagnose(snapshot), refresh_interval=refresh_interval, account=account)
    return text.encode()


def _render_status(snapshot: Snapshot, account: str | None) -> str:
    shown = snapshot if account is None else snapshot.for_account(account)
    return json.dumps({**shown.as_json(), "verdict": diagnose(snapshot).as_json()})


def _render_requests(history: RequestHistory, found: list[RequestRecord], after: int | None, limit: int) -> str:
    """Return `/requests`: those found after a number, which is None for a cursor of an earlier process.

    `missed` counts the requests after the cursor that the history no longer holds.
    """
    now, wall = time.monotonic(), time.time()
    last = found[-1].number if found else after or 0
    body = {
        "instance": history.instance,
        "cursor": f"{history.instance}:{last}",
        "missed": found[0].number - after - 1 if after is not None and found else 0,
        "requests": [
            snapshots.request_as_json(request, iso_timestamp(wall - (now - request.ended)))
            for request in found[max(0, len(found) - limit) :]
        ],
    }
    return json.dumps(body)


def _parse_number(text: str) -> int:
    """Return a whole number of at most 15 digits; raise ValueError for anything else.

    `int` alone also accepts signs, spaces, underscores and digits of other scripts.
    """
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise ValueError("not a number")
    return int(text)
