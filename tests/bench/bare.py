"""Bare aiohttp reverse proxy that only forwards: the baseline of the comparison.

It uses the same library, event loop and TLS as the proxy and does none of the proxy's work. It adds one fixed header
and streams bodies in both directions.
"""

import argparse
import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import aiohttp
import uvloop
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from tests.bench.processes import HOST

_HOP_BY_HOP = frozenset({"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})
_SESSION = web.AppKey("session", aiohttp.ClientSession)
_UPSTREAM = web.AppKey("upstream", str)


async def forward(request: web.Request) -> web.StreamResponse:
    """Forward the request and stream the response back."""
    headers = _end_to_end(request.headers.items())
    headers["x-amz-access-token"] = "Atza|benchmark"
    async with request.app[_SESSION].request(
        request.method,
        URL(request.app[_UPSTREAM] + request.raw_path, encoded=True),
        headers=headers,
        data=request.content if request.body_exists else None,
        allow_redirects=False,
    ) as upstream_response:
        response = web.StreamResponse(
            status=upstream_response.status, headers=_end_to_end(upstream_response.headers.items())
        )
        await response.prepare(request)
        async for chunk in upstream_response.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


def _end_to_end(fields: Iterable[tuple[str, str]]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in fields if name.lower() not in _HOP_BY_HOP)


def application(upstream: str, authority: Path) -> web.Application:
    """Return the proxy to `upstream` (a base URL); `authority` is the CA file that verifies its certificate."""

    async def session(app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=1000, ssl=ssl.create_default_context(cafile=authority))
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as opened:
            app[_SESSION] = opened
            yield

    app = web.Application()
    app[_UPSTREAM] = upstream
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


def main() -> None:
    """Serve on the port that the command line names."""
    parser = argparse.ArgumentParser(description="A bare aiohttp reverse proxy, to compare with.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--authority", type=Path, required=True)
    options = parser.parse_args()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    app = application(options.upstream, options.authority)
    web.run_app(app, host=HOST, port=options.port, access_log=None, print=None, loop=loop)


if __name__ == "__main__":
    main()
