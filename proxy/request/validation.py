"""Validation of requests: version, size, method, host, framing, target and the names of `x-sp-…` headers.

It comes before any other step, so that an invalid request costs no token and no call. Everyone who reaches the port
acts as the seller, and every web page in a browser on this machine can reach a port on localhost. Hence the checks of
`Host` (DNS rebinding) and of the headers that only browsers send.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from aiohttp import web
from aiohttp.http import HttpVersion11
from multidict import CIMultiDictProxy

from proxy.amazon.marketplaces import HOST_REGION
from proxy.amazon.placeholder_tokens import LWA_HOST, LWA_PATH
from proxy.config import LOOPBACK_NAMES, Config, Environment, Listener, Region
from proxy.errors import (
    BadOption,
    BadTarget,
    BrowserRefused,
    HeaderTooLarge,
    HostRefused,
    MalformedRequest,
    MethodRefused,
    VersionRefused,
)
from proxy.request.header_cache import HeaderBlock

# Case-sensitive (RFC 9110 section 9.1). Not TRACE: its response would show the token (RFC 9110 section 9.3.8). Not
# OPTIONS: browsers send it as a preflight. Not CONNECT: it would open a tunnel (RFC 9110 section 9.3.6).
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
VERSION_REFUSED = web.RequestKey("version_refused", bool)  # set by the listener on a request of another HTTP version

PREFIX = "x-sp-"
# The proxy's request headers without the prefix; the modules that read them name them in full.
REQUEST_HEADERS = ("account", "region", "data-elements", "key", "max-wait", "priority", "client", "timeout", "retry")
# The proxy's response headers: a client that forwards them in a request means nothing by it.
RESPONSE_HEADERS = frozenset({"x-sp-proxy", "x-sp-proxy-error"})

_KNOWN_HEADERS = RESPONSE_HEADERS | {PREFIX + name for name in REQUEST_HEADERS}
_SIMILAR = 0.65  # difflib's ratio: `acount` is above it, and so is `retries`; `session` and `region` are below
# difflib takes quadratic time in the length of a name, and the names are the client's.
_MAX_CHECKED, _MAX_NAME = 16, 32  # unknown names that are compared in one request, and characters of each

# The bytes that a request target may consist of: visible ASCII except `#` and the backslash. Spaces, control and
# non-ASCII characters must be percent-encoded (RFC 3986 section 2). Some servers read a backslash as `/`, and `#` as
# the end of the path; they would see another path than the one for which the token was chosen.
_TARGET_BYTES = bytes(code for code in range(0x21, 0x7F) if chr(code) not in "#\\")
# Headers of a CORS preflight. Browsers send one before a request that is not simple (Fetch standard), and before one
# to a more private network than that of the page (Private Network Access, Local Network Access).
_PREFLIGHT = frozenset(
    {
        "access-control-request-method",
        "access-control-request-headers",
        "access-control-request-private-network",
        "access-control-request-local-network",
    }
)
_BROWSER_HEADERS = _PREFLIGHT | {"origin", "sec-fetch-site", "sec-fetch-dest"}
_DOT = r"(?:\.|%2[eE])"
_SLASH = r"(?:/|%2[fF]|%5[cC])"  # encoded, too: some servers decode before they resolve dot segments
# With `;`: some servers remove path parameters before they resolve dot segments, and read `..;` as `..`. Encoded dots:
# `%2e` equals `.` (RFC 3986 section 2.3). Envoy CVE-2019-9901 and CVE-2021-29492 were such differences.
_DOT_SEGMENT = re.compile(rf"{_SLASH}{_DOT}{{1,2}}(?:;[^/]*)?(?={_SLASH}|$)")
# Proxies must accept absolute form (RFC 9112 section 3.2.2); only the path is used, so it cannot choose the server
# (Apache CVE-2021-40438).
_ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_PREFIX = re.compile(r"/@[^/]+(?:/(?:na|eu|fe))?", re.IGNORECASE)
# No `@`: userinfo in an authority is to be treated as an error (RFC 9110 section 4.2.4). ASCII, because `\d` would
# match other digits, which `int` accepts too.
_AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/\\\s]+)(?::(\d{1,5}))?", re.ASCII)


@dataclass(slots=True)
class ValidatedTarget:
    """A validated request's target in origin form, and its host.

    `amazon` is the environment and region of Amazon's own host name, if the request names one. `names` are the names
    of the header fields in lower case. `is_token_request`: it asks Login with Amazon for a token.
    """

    target: str
    host: str
    amazon: tuple[Environment, Region] | None
    names: frozenset[str]
    is_token_request: bool = False


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """The host names that one listener accepts; created once per listener."""

    hosts: frozenset[str]

    @classmethod
    def from_config(cls, listener: Listener, config: Config) -> "AllowedHosts":
        """Collect the loopback names, the listener's own address and `allowed_hosts`."""
        # 0.0.0.0 and :: are wildcards, not names. Some browsers let a page reach them and send none of the headers that
        # mark a request as cross-site.
        own = {listener.address.host.lower()} - {"", "0.0.0.0", "::"}  # noqa: S104 - compared, not bound
        return cls(frozenset({*LOOPBACK_NAMES, *own, *config.allowed_hosts}))


def validate(method: str, target: str, headers: CIMultiDictProxy[str], allowed_hosts: AllowedHosts) -> ValidatedTarget:
    """Return the validated target; raise the error that says what is invalid.

    `target` is the request target as it was received (RFC 9112 section 3.2).
    """
    return validate_with(HeaderBlock(headers), method, target, allowed_hosts)


def validate_with(head: HeaderBlock, method: str, target: str, allowed_hosts: AllowedHosts) -> ValidatedTarget:
    """Do what `validate` does, but check header fields only once for each distinct block of them."""
    host = head.host
    # `host` is known once a block with the same fields has passed the checks of fields, which are then skipped.
    if host is None and not _BROWSER_HEADERS.isdisjoint(head.names):
        _reject_browsers(head.headers)
    # After the browsers: a preflight is an OPTIONS, and is refused for what it is.
    if method not in METHODS:
        raise MethodRefused(f"{_display(method)} is not forwarded", "Use GET, HEAD, POST, PUT, PATCH or DELETE.")
    if host is None and "transfer-encoding" in head.names:
        _reject_ambiguous_framing(head.headers)
    authority = None
    if not target.startswith("/"):
        target, authority = _origin_form(target)
    if host is None:
        host = _host(head.headers, allowed_hosts)
        reject_unknown_headers(head.names)
        # Last, when all checks of the fields have passed: the next request with this block skips them.
        head.host = host
    # Not stored in the block: it comes from the target, which differs between requests.
    if authority is not None:
        host = _allowed(authority, allowed_hosts)  # it overrides Host (RFC 9112 section 3.2.2)
    token_request = method == "POST" and is_token_request(method, target)
    if host == LWA_HOST and host not in allowed_hosts.hosts and not token_request:
        raise _host_refused()  # Login with Amazon's host name is accepted for its token path alone
    _check_path(target)
    return ValidatedTarget(target, host, HOST_REGION.get(host), head.names, token_request)


def reject_unknown_headers(names: Iterable[str]) -> None:
    """Raise BadOption for a name that resembles one of the proxy's own headers; `names` are in lower case.

    Unknown `x-sp-…` headers are not forwarded to Amazon. A misspelt one must not be ignored: without its
    `x-sp-acount`, a request would be served for the default account, which may be another seller's.
    """
    # With `_` it is another name, but some servers treat both alike (CGI), so such names are compared, too.
    extension = (name for name in names if name[:2] == "x-" or name[:2] == "x_")
    unknown = (name for name in extension if name not in _KNOWN_HEADERS and name.replace("_", "-").startswith(PREFIX))
    # Bounded: a head may hold thousands of names.
    for name in islice(unknown, _MAX_CHECKED):
        rest = name[len(PREFIX) :].replace("_", "-")
        if len(rest) > _MAX_NAME:
            continue
        similar = difflib.get_close_matches(rest, REQUEST_HEADERS, n=1, cutoff=_SIMILAR)
        if similar:
            raise BadOption(
                f"the header {name} is unknown to the proxy; did you mean {PREFIX}{similar[0]}?",
                f"Send {PREFIX}{similar[0]}, or leave it out: no header that may name another account is ignored.",
            )


def check_message(request: web.BaseRequest, head: HeaderBlock, max_bytes: int) -> None:
    """Raise VersionRefused for anything but HTTP/1.0 and 1.1, HeaderTooLarge for a head of over `max_bytes` bytes."""
    # aiohttp 3.14.5 parses HTTP/2.0 and 0.9 in a request line as versions and repeats them in its status line.
    if VERSION_REFUSED in request:
        raise VersionRefused("only HTTP/1.0 and HTTP/1.1 are supported", "Send HTTP/1.1.")
    if request.version != HttpVersion11 and "transfer-encoding" in head.names:
        # An HTTP/1.0 hop in between does not know the chunked coding and may read another end of the body (RFC 9112
        # section 6.1).
        raise MalformedRequest("HTTP/1.0 has no Transfer-Encoding", "Send a Content-Length, or HTTP/1.1.")
    if len(request.raw_path) + head.size > max_bytes:
        raise HeaderTooLarge(
            f"the header block is larger than {max_bytes} bytes",
            "Send fewer or shorter headers, or raise bounds.header_size.",
        )


def _display(text: str) -> str:
    """Return a short, printable form of a method that a client sent."""
    return "".join(c for c in text if c.isascii() and c.isprintable())[:20] or "that"


def is_cross_site(headers: CIMultiDictProxy[str]) -> bool:
    """Return whether the headers show that a web page of another origin caused the request."""
    # Whatever its value: `null` is that of sandboxed frames and of some redirects (Fetch standard).
    if "Origin" in headers:
        return True
    if "Sec-Fetch-Site" not in headers:
        return False
    # `none` means that the user caused the request, by the address bar for example (W3C Fetch Metadata). Of several
    # values all must be harmless.
    return any(value not in {"none", "same-origin"} for value in headers.getall("Sec-Fetch-Site"))


def _reject_browsers(headers: CIMultiDictProxy[str]) -> None:
    """Raise BrowserRefused for a web page's request, GET included: it would use quota and touch the seller's data."""
    # The proxy serves no page. A browser that claims the same origin means an earlier program on this port, or fetches
    # the icon for a response that it displays.
    is_same_origin = "Sec-Fetch-Dest" in headers and "same-origin" in headers.getall("Sec-Fetch-Site", ())
    if is_same_origin or is_cross_site(headers):
        raise BrowserRefused(
            "the request comes from a web page", "The proxy serves programs; call it from your server, not a browser."
        )
    if not _PREFLIGHT.isdisjoint(map(str.lower, headers)):
        raise BrowserRefused("the request is a browser's preflight", "The proxy serves programs, not web pages.")


def _reject_ambiguous_framing(headers: CIMultiDictProxy[str]) -> None:
    """Raise MalformedRequest for framing that allows request smuggling (RFC 9112 sections 6.1 and 11.2)."""
    codings = headers.getall("Transfer-Encoding")
    # `isascii`, because `lower` maps some other characters to ASCII letters: U+212A, the Kelvin sign, to k.
    # aiohttp 3.14.5 accepts `gzip, chunked` as chunked and forgets the gzip.
    if len(codings) > 1 or not codings[0].isascii() or codings[0].strip(" \t").lower() != "chunked":
        raise MalformedRequest("Transfer-Encoding must be chunked, once", "Send a Content-Length, or chunked alone.")
    # RFC 9112 section 6.1 allows to ignore Content-Length here; refusing it leaves nothing to disagree about (HAProxy
    # CVE-2021-40346).
    if "Content-Length" in headers:
        raise MalformedRequest("both Content-Length and Transfer-Encoding are given", "Send one of them.")


def _origin_form(target: str) -> tuple[str, str]:
    """Return the path with its query, and the authority, of an absolute-form target."""
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise BadTarget(
            "the request target is not a path", "Ask for a path of Amazon's API, such as /orders/v0/orders."
        )
    authority, rest = absolute[1], absolute[2]
    return (rest if rest.startswith("/") else f"/{rest}"), authority


def _host(headers: CIMultiDictProxy[str], allowed_hosts: AllowedHosts) -> str:
    """Return the host of the one Host field; raise MalformedRequest for none or several (RFC 9112 section 3.2)."""
    given = headers.getall("Host", ())
    if len(given) != 1:
        raise MalformedRequest(f"there are {len(given)} Host headers", "Send one Host header.")
    return _allowed(given[0], allowed_hosts)


@lru_cache(maxsize=256)  # apps use the same few names
def host_in(authority: str) -> str | None:
    """Return the host of `host` or `host:port` in lower case, without brackets; None for anything else."""
    match = _AUTHORITY.fullmatch(authority)
    # Refused, not an exception: a malformed Host ended webpack-dev-server's process (CVE-2026-14631).
    if match is None or int(match[2] or 0) > 65535:
        return None
    return match[1].lower().strip("[]")


def _allowed(authority: str, allowed_hosts: AllowedHosts) -> str:
    host = host_in(authority)
    # An exact comparison against a list, which prevents DNS rebinding (Ollama CVE-2024-28224, Vite CVE-2025-24010).
    if host is not None and (host in allowed_hosts.hosts or host in HOST_REGION or host == LWA_HOST):
        return host
    raise _host_refused()


def _host_refused() -> HostRefused:
    return HostRefused(
        "the Host is not a name of this proxy",
        "Call it as 127.0.0.1 or localhost, or list the name under allowed_hosts.",
    )


def is_token_request(method: str, target: str) -> bool:
    """Return whether a request asks Login with Amazon for a token, which the proxy answers itself for every client."""
    # A substring search first: nearly all requests end here.
    if method != "POST" or LWA_PATH not in target:
        return False
    path = target.partition("?")[0]
    before = path.removesuffix(LWA_PATH)
    # /@ACCOUNT or /@ACCOUNT/REGION may precede it, as it may any other path.
    return path != before and (not before or _PREFIX.fullmatch(before) is not None)


def _check_path(target: str) -> None:
    """Raise BadTarget for a path that Amazon might read as another one than that for which the token was chosen."""
    # Deleting the allowed bytes is many times faster than a regular expression that searches for others.
    if not target.isascii() or target.encode().translate(None, _TARGET_BYTES):
        raise BadTarget(
            "the request target holds a space, control character, backslash, '#' or non-ASCII byte",
            "Percent-encode it.",
        )
    # `//host/path` is a network-path reference (RFC 3986 section 4.2): some clients and servers take `host` for a
    # server.
    if target.startswith("//"):
        raise BadTarget("the request target begins with //", "Begin the path with a single slash.")
    # The regular expression is run only where a dot, `%2e` or `%2f` may be; `%2` is common to both encodings. A
    # backslash as `%5c` matters only next to a dot.
    if "." in target or "%2" in target:
        _reject_dot_segments(target.partition("?")[0])


def _reject_dot_segments(path: str) -> None:
    """Raise BadTarget for `.` and `..` segments, encoded ones too (RFC 3986 section 5.2.4)."""
    if _DOT_SEGMENT.search(path):
        raise BadTarget("the path holds a dot segment", "Write the path without . and .. segments.")
