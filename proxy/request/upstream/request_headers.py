"""The header fields of a request to Amazon: which of the app's fields are forwarded.

Strip first, add last: hop-by-hop fields, the app's own credentials and the proxy's fields are removed before the
forwarder adds Amazon's credentials.
"""

from functools import lru_cache
from operator import itemgetter

from multidict import CIMultiDict, CIMultiDictProxy

from proxy.errors import MalformedRequest
from proxy.request.header_cache import HeaderBlock
from proxy.request.upstream.pool import field_lines
from proxy.request.upstream.response import HOP_BY_HOP, named_in_connection

# Fields of an app that are not forwarded: its own credentials and those of AWS signatures, fields that the proxy sets
# itself, fields that name hops and traces inside the user's network, and fields by which some servers take the request
# for another method or path than the proxy authorized.
STRIPPED_HEADERS = frozenset(
    {
        "authorization",
        "baggage",
        "client-ip",
        "cookie",
        "expect",
        "forwarded",
        "host",
        "traceparent",
        "tracestate",
        "true-client-ip",
        "user-agent",
        "via",
        "x-amz-access-token",
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-security-token",
        "x-amz-signature",
        "x-client-ip",
        "x-host",
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
        "x-original-host",
        "x-original-uri",
        "x-original-url",
        "x-real-ip",
        "x-request-id",
        "x-rewrite-url",
    }
)
STRIPPED_PREFIXES = ("x-sp-", "x-forwarded-")

# Amazon's front end rejects these on GET and HEAD (DOC "API request validation for 400 errors with HTML response").
BODY_FIELDS = frozenset({"content-length", "content-type", "content-encoding"})
BODILESS = frozenset({"GET", "HEAD"})
_BODY_LENGTH = frozenset({"content-length", "transfer-encoding"})

# `Content_Length` is another field than `Content-Length`, but some servers read `_` as `-` (as CGI does): such a field
# could give the body another length there.
LOOKALIKES = BODY_FIELDS

_VALUE = itemgetter(1)


def check_body(method: str, head: HeaderBlock) -> None:
    """Raise MalformedRequest for a body on GET or HEAD: Amazon rejects it with a page of HTML."""
    if method not in BODILESS or _BODY_LENGTH.isdisjoint(head.names):
        return
    if "Transfer-Encoding" in head.headers or head.headers.get("Content-Length", "0").strip("0"):
        raise MalformedRequest(f"a {method} request has a body", "Send it without a body, or use POST.")


def end_to_end_headers(method: str, headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return the app's fields that are forwarded to Amazon, in order, repeated fields kept apart.

    Hop-by-hop fields are those of RFC 9110 section 7.6.1 and all that `Connection` names. Raises MalformedRequest for a
    value that is not UTF-8.
    """
    is_forwarded = _is_forwarded_bodiless if method in BODILESS else _is_forwarded
    kept = [field for field in headers.items() if is_forwarded(field[0])]
    if "Connection" in headers:
        named = named_in_connection(headers)
        kept = [field for field in kept if field[0].lower().replace("_", "-") not in named]
    if not all(map(str.isascii, map(_VALUE, kept))) and not all(map(_is_utf8, map(_VALUE, kept))):
        raise MalformedRequest("a header's value is not UTF-8", "Send header values in ASCII or UTF-8.")
    return CIMultiDict(kept)


def upstream_header_lines(method: str, head: HeaderBlock) -> bytes:
    """Return the lines of the app's fields that are forwarded, cached in `head`.

    Raises MalformedRequest as `end_to_end_headers` does.
    """
    if method in BODILESS:
        if head.bodiless_lines is None:
            head.bodiless_lines = field_lines(list(end_to_end_headers(method, head.headers).items()))
        return head.bodiless_lines
    if head.lines is None:
        kept = end_to_end_headers(method, head.headers)
        head.has_content_length = "Content-Length" in kept  # `Connection: content-length` removes the app's own
        head.lines = field_lines(list(kept.items()))
    return head.lines


# Apps send the same few names: each is checked once. The caches are bounded, for an app can invent names.


@lru_cache(maxsize=512)
def _is_forwarded_bodiless(name: str) -> bool:
    return _is_end_to_end(name, is_bodiless=True)


@lru_cache(maxsize=512)
def _is_forwarded(name: str) -> bool:
    return _is_end_to_end(name, is_bodiless=False)


def _is_end_to_end(name: str, *, is_bodiless: bool) -> bool:
    """Return whether a field with this name is forwarded to Amazon, as far as its name alone decides."""
    # Some servers read `_` as `-`: x_amz_access_token must not pass as another spelling.
    lower = name.lower().replace("_", "-")
    if ("_" in name and lower in LOOKALIKES) or (is_bodiless and lower in BODY_FIELDS):
        return False
    return lower not in HOP_BY_HOP and lower not in STRIPPED_HEADERS and not lower.startswith(STRIPPED_PREFIXES)


def _is_utf8(value: str) -> bool:
    # aiohttp decodes values with `surrogateescape`: a byte that is not UTF-8 is a lone surrogate here.
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
