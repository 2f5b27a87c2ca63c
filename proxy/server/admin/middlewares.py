"""Middlewares of the admin and health applications: who may ask, and what every response carries.

Both addresses are reachable from a browser on the same machine, so a web page could try to read the status or to end
the proxy. The checks are the same as on the apps' port (`proxy.request.validation`).
"""

from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from proxy.request.validation import VERSION_REFUSED, host_in, is_cross_site

# The content types of HTML forms: a web page can send them to any address without a CORS preflight
# (Fetch standard, "CORS-safelisted request-header").
_FORM_TYPES = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})


def access_check(is_allowed_host: Callable[[str], bool]) -> Middleware:
    """Return the middleware that rejects other HTTP versions, other hosts, and what a web page may have caused.

    `proxy.cli.admin_client` recognises the rejections by their first words.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if VERSION_REFUSED in request:
            return web.Response(status=505, text="only HTTP/1.0 and HTTP/1.1 are supported\n")
        hosts = request.headers.getall("Host", ())
        host = host_in(hosts[0]) if len(hosts) == 1 else None
        # DNS rebinding: a page of evil.example whose name resolves to 127.0.0.1 is same-origin here, but its Host is
        # evil.example. 421 is Misdirected Request (RFC 9110 section 15.5.20).
        if host is None or not is_allowed_host(host):
            return web.Response(status=421, text="call this address as 127.0.0.1 or localhost\n")
        if is_cross_site(request.headers):
            return web.Response(status=403, text="not for web pages or links on them: enter the address yourself\n")
        # Older browsers send neither Origin nor Sec-Fetch-Site with a form, but always its content type.
        is_form = request.method not in {"GET", "HEAD"} and request.content_type in _FORM_TYPES
        if is_form and "Content-Type" in request.headers:
            return web.Response(status=415, text="not for HTML forms\n")
        return await handler(request)

    return check


@web.middleware
async def plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn aiohttp's error pages into plain text, and forbid caching and MIME sniffing of every response."""
    try:
        response = await handler(request)
    except web.HTTPException as exc:
        response = web.Response(status=exc.status, text=f"{exc.reason}\n")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-store"
    return response
