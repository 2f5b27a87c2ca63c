"""Is the proxy alive, is it ready, and what did it see? The admin listener's and the health listener's answers."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, Literal

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client.exposition import choose_encoder

from proxy import __version__
from proxy.config import LOOPBACK_NAMES, Address, Config
from proxy.metrics import Metrics
from proxy.request.guard import VERSION_REFUSED, host_in, is_of_web_page

State = Literal["starting", "ready", "stopping"]

_FIRST_PAGE = """sp-api-proxy: this is the admin address; apps use the other one.

/livez    200 while the process runs
/readyz   200 while it serves requests (add ?verbose for the reason)
/status   JSON: state, version, how the last reload went
/metrics  Prometheus
"""


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
class Reloading:
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
            "good_since": _moment(self.good_since),
            "last_reload": None if self.looked_at is None else {"at": _moment(self.looked_at), "result": self.result},
            "problems": list(self.problems),
            "needs_restart": list(self.needs_restart),
        }


def _moment(epoch: float) -> str:
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Admin:
    """What the admin address is about; `quit` is set when it was told to end the proxy."""

    readiness: Readiness
    reloading: Reloading
    current: Callable[[], Config]
    quit: asyncio.Event


def health_app(readiness: Readiness, metrics: Metrics, current: Callable[[], Config]) -> web.Application:
    """Return health and metrics alone: an application that may be opened to probes and Prometheus.

    These call it by an address or a short name, which no web page can take for its own (DNS rebinding needs a domain).
    """

    def is_ours(host: str) -> bool:
        return host in current().allowed_hosts or _is_address(host) or (host != "" and "." not in host)

    app = web.Application(middlewares=[_guard(is_ours), _plain_answers])
    _add_health(app, readiness, metrics)
    return app


def admin_app(about: Admin, metrics: Metrics, address: Address) -> web.Application:
    """Return everything for this machine's eyes; answers only to loopback names, as the proxied port does."""
    hosts = {*LOOPBACK_NAMES, address.host.lower()} - {"", "0.0.0.0", "::"}  # noqa: S104 - compared, not bound

    def is_ours(host: str) -> bool:
        return host in hosts or host in current().allowed_hosts

    current = about.current
    app = web.Application(middlewares=[_guard(is_ours), _plain_answers])
    _add_health(app, about.readiness, metrics)

    async def first_page(_: web.Request) -> web.Response:
        return web.Response(text=_FIRST_PAGE)

    async def status(_: web.Request) -> web.Response:
        return web.json_response(
            {
                "version": __version__,
                "state": about.readiness.state,
                "waiting_for": about.readiness.waiting_for,
                "accounts": len(current().accounts),
                "requests_in_flight": metrics.in_flight,
                "configuration": about.reloading.as_json(),
            }
        )

    async def end(_: web.Request) -> web.Response:
        if not current().quit:
            return web.Response(status=404, text=_NO_QUIT)
        about.quit.set()
        return web.Response(text="shutting down\n")

    app.router.add_get("/", first_page)
    app.router.add_get("/status", status)
    app.router.add_post("/quitquitquit", end)
    return app


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
        if is_of_web_page(request.headers):
            return web.Response(status=403, text="not for web pages\n")
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
async def _plain_answers(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        answer = await handler(request)
    except web.HTTPException as exc:
        answer = web.Response(status=exc.status, text=f"{exc.reason}\n")
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers["Cache-Control"] = "no-store"
    return answer


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
        async with metrics.exporting:
            body = await asyncio.to_thread(encode, metrics.registry)
        return web.Response(body=body, headers={"Content-Type": content_type})

    for path in ("/livez", "/healthz", "/liveness"):
        app.router.add_get(path, live)
    for path in ("/readyz", "/readiness"):
        app.router.add_get(path, ready)
    for path in ("/startupz", "/startup"):
        app.router.add_get(path, started)
    app.router.add_get("/metrics", scrape)
