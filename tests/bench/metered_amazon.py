"""A stand-in for Amazon with true token buckets, meters by content, and troubles that a test switches on and off.

It runs inside the test or benchmark that uses it. One port serves Login with Amazon, one port each region. The access
token for the refresh token `Atzr|NAME` is `Atza|NAME|…`, so that every call says whose it is.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from aiohttp import web

HOST = "127.0.0.1"
REGIONS = ("na", "eu", "fe")
THROTTLED = {"errors": [{"code": "QuotaExceeded", "message": "You exceeded your quota for the requested resource."}]}
UNAUTHORIZED = {"errors": [{"code": "Unauthorized", "message": "Access to requested resource is denied."}]}


@dataclass(slots=True)
class Bucket:
    """A token bucket by a monotonic clock."""

    rate: float
    burst: float
    tokens: float = -1.0
    updated: float = 0.0

    def take(self) -> bool:
        now = time.monotonic()
        if self.tokens < 0:
            self.tokens, self.updated = self.burst, now
        self.tokens = min(self.burst, self.tokens + (now - self.updated) * self.rate)
        self.updated = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@dataclass(frozen=True, slots=True)
class Plan:
    """The usage plan of the calls that match, one bucket for each seller and region; `announce`: the rate header."""

    method: str
    path: str  # a regular expression for the whole path
    rate: float
    burst: float
    announce: float | None = None


@dataclass(slots=True)
class Trouble:
    """What goes wrong while it is switched on; each is a test on (seller, region, method, path, body)."""

    throttled: Callable[[str, str, str, str, bytes], bool] = lambda *_: False
    failing: Callable[[str, str, str, str, bytes], int] = lambda *_: 0  # the status, 0 for none
    broken_regions: set[str] = field(default_factory=set)  # every connection is closed at once
    revoked: set[str] = field(default_factory=set)  # refresh tokens of these sellers
    slow_tokens: dict[str, float] = field(default_factory=dict)  # seconds until a token comes
    large: int = 0  # bytes of the body of GET /large


@dataclass(slots=True)
class MeteredAmazon:
    """The servers, their plans and what came in. `served` counts (seller, region, status)."""

    plans: list[Plan]
    trouble: Trouble = field(default_factory=Trouble)
    endpoints: dict[str, str] = field(default_factory=dict)
    served: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    _buckets: dict[tuple[str, str, Plan], Bucket] = field(default_factory=dict)
    _tokens: int = 0

    def take(self, seller: str, region: str, method: str, path: str) -> tuple[bool, Plan | None]:
        """Take a token as a call from anywhere would, the proxy or not; return whether there was one, and its plan."""
        plan = next((one for one in self.plans if one.method == method and re.fullmatch(one.path, path)), None)
        if plan is None:
            return True, None
        bucket = self._buckets.setdefault((seller, region, plan), Bucket(plan.rate, plan.burst))
        return bucket.take(), plan

    async def token(self, request: web.Request) -> web.Response:
        fields = parse_qs(await request.text())
        seller = fields.get("refresh_token", ["Atzr|-"])[0].removeprefix("Atzr|")
        await asyncio.sleep(self.trouble.slow_tokens.get(seller, 0.0))
        if seller in self.trouble.revoked:
            return web.json_response({"error": "invalid_grant", "error_description": "revoked"}, status=400)
        self._tokens += 1
        value = f"Atza|{seller}|{self._tokens}"
        return web.json_response({"access_token": value, "token_type": "bearer", "expires_in": 3600})

    def api(self, region: str) -> Callable[[web.Request], Any]:
        async def respond(request: web.Request) -> web.StreamResponse:
            if region in self.trouble.broken_regions:
                if request.transport is not None:
                    request.transport.abort()
                raise asyncio.CancelledError
            body = await request.read()
            seller = request.headers.get("x-amz-access-token", "Atza|-|0").split("|")[1]
            status, headers, content = self._decide(seller, region, request.method, request.path, body)
            self.served[seller, region, status] += 1
            if request.path == "/large" and status == 200:
                return web.Response(body=bytes(self.trouble.large), headers=headers)
            return web.json_response(content, status=status, headers=headers)

        return respond

    def _decide(
        self, seller: str, region: str, method: str, path: str, body: bytes
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        call = (seller, region, method, path, body)
        if status := self.trouble.failing(*call):
            return status, {}, {"errors": [{"code": "InternalFailure", "message": "it fails"}]}
        if self.trouble.throttled(*call):
            return 429, {}, THROTTLED
        has_token, plan = self.take(seller, region, method, path)
        if not has_token:
            return 429, {}, THROTTLED
        headers = {} if plan is None or plan.announce is None else {"x-amzn-RateLimit-Limit": str(plan.announce)}
        return 200, headers, {"payload": {}}


@asynccontextmanager
async def metered_amazon(plans: list[Plan]) -> AsyncIterator[MeteredAmazon]:
    """Start it; `endpoints` is what the proxy's setting of that name takes."""
    amazon = MeteredAmazon(plans)
    runners: list[web.AppRunner] = []
    try:
        for name in ("lwa", *REGIONS):
            app = web.Application(client_max_size=1 << 30)
            path = "/auth/o2/token" if name == "lwa" else ""
            handler = amazon.token if name == "lwa" else amazon.api(name)
            app.router.add_route("*", path or "/{path:.*}", handler)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            runners.append(runner)
            site = web.TCPSite(runner, HOST, 0)
            await site.start()
            port = runner.addresses[0][1]
            amazon.endpoints[name] = f"http://{HOST}:{port}{path}"
        yield amazon
    finally:
        for runner in runners:
            await runner.cleanup()


def report_type(body: bytes) -> str:
    """Return the report type of a createReport body."""
    try:
        return str(json.loads(body).get("reportType", ""))
    except (ValueError, AttributeError):
        return ""
