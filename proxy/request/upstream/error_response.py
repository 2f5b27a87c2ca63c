"""Responses for the proxy's own errors."""

from aiohttp import web

from proxy.config import Address
from proxy.errors import (
    AccountRequired,
    HeaderTooLarge,
    MalformedRequest,
    ProxyError,
    RegionRequired,
    VersionRefused,
)
from proxy.request.context import RequestContext
from proxy.request.upstream.response import ErrorResponse

# After these errors it is not certain where the next request on the connection begins (RFC 9112 section 6.3).
_CLOSES_CONNECTION = (MalformedRequest, VersionRefused, HeaderTooLarge)


def error_response(request: web.BaseRequest, error: ProxyError, context: RequestContext) -> ErrorResponse:
    """Return the response for an error of the proxy's own, and note the error in the context.

    Raise ConnectionAbortedError where another response has begun: a second one in its body would be taken for a part
    of it.
    """
    context.error, context.fault = error.code, error.fault
    if context.response_started:
        context.truncated = True
        raise ConnectionAbortedError(error.code) from error
    context.status = error.status
    response = ErrorResponse(error, context.summary(), with_body=request.method != "HEAD")
    if isinstance(error, _CLOSES_CONNECTION) or (request.body_exists and not request.content.at_eof()):
        response.force_close()  # what follows on this connection is an unread body or unknown, not a request
    return response


def add_browser_hint(error: ProxyError, method: str, target: str, admin: Address | None) -> None:
    """Extend the hint of an error for a person who opened the port for apps in a browser: `GET /` names no account."""
    if (method, target) == ("GET", "/") and isinstance(error, (AccountRequired, RegionRequired)):
        page = f"; the status page is at http://{admin}/" if admin is not None and admin.port else ""
        error.hint = f"This port is for apps{page}. {error.hint}"
