"""May this request come in at all? Checked before anything is looked up, so that a refusal costs Amazon nothing.

Whoever reaches the port acts as the seller, and a port on localhost can be reached by every web page in a browser on
this machine: hence the checks of `Host` (DNS rebinding) and of the signs that browsers give.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from aiohttp import web
from aiohttp.http import HttpVersion11
from multidict import CIMultiDictProxy

from proxy.amazon.marketplaces import HOST_REGION
from proxy.amazon.placeholder_tokens import LWA_HOST, LWA_PATH
from proxy.config import LOOPBACK_NAMES, Config, Environment, Listener, Region
from proxy.errors import (
    BadTarget,
    BrowserRefused,
    HeaderTooLarge,
    HostRefused,
    MalformedRequest,
    MethodRefused,
    VersionRefused,
)
from proxy.request.header_cache import HeaderBlock
from proxy.request.misspelt import reject_unknown_headers

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
VERSION_REFUSED = web.RequestKey("version_refused", bool)  # the listener's mark on a request of another HTTP version

# Space, control, quote-like and non-ASCII characters never stand raw in a request target (RFC 3986 section 2);
# a backslash or a '#' is read as '/' or as the end of the path by some, and not by others.
# What a target may consist of: visible ASCII, but for `#` and the backslash.
_TARGET_BYTES = bytes(code for code in range(0x21, 0x7F) if chr(code) not in "#\\")
# What a browser asks with before it sends what is not simple, or what goes to a more private network than its page's.
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
_SLASH = r"(?:/|%2[fF]|%5[cC])"  # an encoded slash or backslash too: some decode before they resolve the dots
_DOT_SEGMENT = re.compile(rf"{_SLASH}{_DOT}{{1,2}}(?:;[^/]*)?(?={_SLASH}|$)")
_ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_PREFIX = re.compile(r"/@[^/]+(?:/(?:na|eu|fe))?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/\\\s]+)(?::(\d{1,5}))?", re.ASCII)


@dataclass(slots=True)
class ValidatedTarget:
    """What may come in: the origin-form target, and the region that Amazon's own host name chose, if one was used.

    `names` are those of the header fields, in lower case.
    """

    target: str
    host: str
    amazon: tuple[Environment, Region] | None
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """The names under which one listener answers; made once for each listener."""

    hosts: frozenset[str]

    @classmethod
    def from_config(cls, listener: Listener, config: Config) -> "AllowedHosts":
        """Collect loopback names, the listener's own address and `allowed_hosts`."""
        # 0.0.0.0 and :: are wildcards, not names: browsers reach them without any of their signs.
        own = {listener.address.host.lower()} - {"", "0.0.0.0", "::"}  # noqa: S104 - compared, not bound
        return cls(frozenset({*LOOPBACK_NAMES, *own, *config.allowed_hosts}))


def validate(method: str, target: str, headers: CIMultiDictProxy[str], allowed_hosts: AllowedHosts) -> ValidatedTarget:
    """Return what may come in; raise the error that says why not.

    `target` is the request target as it came over the wire (RFC 9112 section 3.2).
    """
    return validate_with(HeaderBlock(headers), method, target, allowed_hosts)


def validate_with(head: HeaderBlock, method: str, target: str, allowed_hosts: AllowedHosts) -> ValidatedTarget:
    """Do what `admit` does; fields that came in before are not looked at again."""
    host = head.host
    if host is None and not _BROWSER_HEADERS.isdisjoint(head.names):
        _reject_browsers(head.headers)
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
        head.host = host
    if authority is not None:
        host = _allowed(authority, allowed_hosts)  # it decides over Host (RFC 9112 section 3.2.2)
    if host == LWA_HOST and host not in allowed_hosts.hosts and not is_token_request(method, target):
        raise _foreign()  # it is good for one path alone
    _check_path(target)
    return ValidatedTarget(target, host, HOST_REGION.get(host), head.names)


def check_message(request: web.BaseRequest, head: HeaderBlock, most: int) -> None:
    """Raise VersionRefused for anything but HTTP/1.0 and 1.1, HeaderTooLarge for a head of over `most` bytes."""
    if VERSION_REFUSED in request:
        raise VersionRefused("only HTTP/1.0 and HTTP/1.1 are spoken here", "Send HTTP/1.1.")
    if request.version != HttpVersion11 and "transfer-encoding" in head.names:
        # A hop before us that speaks 1.0 does not know chunks (RFC 9112 section 6.1).
        raise MalformedRequest("HTTP/1.0 has no Transfer-Encoding", "Send a Content-Length, or HTTP/1.1.")
    if len(request.raw_path) + head.size > most:
        raise HeaderTooLarge(
            f"the header block is larger than {most} bytes",
            "Send fewer or shorter headers, or raise bounds.header_size.",
        )


def _display(text: str) -> str:
    """Return a short, printable form of what a caller sent."""
    return "".join(c for c in text if c.isascii() and c.isprintable())[:20] or "that"


def is_cross_site(headers: CIMultiDictProxy[str]) -> bool:
    """Return whether the headers show that a foreign web page caused the request."""
    if "Origin" in headers:
        return True
    if "Sec-Fetch-Site" not in headers:
        return False
    return any(value not in {"none", "same-origin"} for value in headers.getall("Sec-Fetch-Site"))


def _reject_browsers(headers: CIMultiDictProxy[str]) -> None:
    """Refuse what a web page causes, GET included: it would spend quota and touch the seller's data."""
    # The proxy serves no page, so a browser that speaks of the same origin speaks of what was on this port before, or
    # looks for the icon of an answer that it got.
    is_same_origin = "Sec-Fetch-Dest" in headers and "same-origin" in headers.getall("Sec-Fetch-Site", ())
    if is_same_origin or is_cross_site(headers):
        raise BrowserRefused(
            "the request comes from a web page", "The proxy serves programs; call it from your server, not a browser."
        )
    if not _PREFLIGHT.isdisjoint(map(str.lower, headers)):
        raise BrowserRefused("the request is a browser's preflight", "The proxy serves programs, not web pages.")


def _reject_ambiguous_framing(headers: CIMultiDictProxy[str]) -> None:
    """Refuse framing that two readers could read differently (RFC 9112 section 6.1)."""
    codings = headers.getall("Transfer-Encoding")
    # `lower` makes an ASCII letter of some that are none.
    if len(codings) > 1 or not codings[0].isascii() or codings[0].strip(" \t").lower() != "chunked":
        raise MalformedRequest("Transfer-Encoding must be chunked, once", "Send a Content-Length, or chunked alone.")
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
    """Return the host that the one Host field names."""
    given = headers.getall("Host", ())
    if len(given) != 1:
        raise MalformedRequest(f"there are {len(given)} Host headers", "Send one Host header.")
    return _allowed(given[0], allowed_hosts)


@lru_cache(maxsize=256)  # apps call the proxy by the same few names
def host_in(authority: str) -> str | None:
    """Return the host of `host` or `host:port` in lower case, without brackets; None for anything else."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or int(match[2] or 0) > 65535:
        return None
    return match[1].lower().strip("[]")


def _allowed(authority: str, allowed_hosts: AllowedHosts) -> str:
    host = host_in(authority)
    if host is not None and (host in allowed_hosts.hosts or host in HOST_REGION or host == LWA_HOST):
        return host
    raise _foreign()


def _foreign() -> HostRefused:
    return HostRefused(
        "the Host is not one that this proxy answers to",
        "Call it as 127.0.0.1 or localhost, or list the name under allowed_hosts.",
    )


def is_token_request(method: str, target: str) -> bool:
    """Return whether a request is one for an access token, which the proxy answers itself, whoever sends it."""
    if method != "POST" or LWA_PATH not in target:
        return False
    path = target.partition("?")[0]
    before = path.removesuffix(LWA_PATH)
    # /@ACCOUNT or /@ACCOUNT/REGION may stand before it, as before any other path.
    return path != before and (not before or _PREFIX.fullmatch(before) is not None)


def _check_path(target: str) -> None:
    """Refuse what Amazon might read as another path than the one the token was chosen for."""
    # Leaving out what fits is many times faster than a regular expression that looks for what does not.
    if not target.isascii() or target.encode().translate(None, _TARGET_BYTES):
        raise BadTarget(
            "the request target holds a space, control character, backslash, '#' or non-ASCII byte",
            "Percent-encode it.",
        )
    if target.startswith("//"):
        raise BadTarget("the request target begins with //", "Begin the path with a single slash.")
    if "." in target or "%2" in target:
        _reject_dot_segments(target.partition("?")[0])


def _reject_dot_segments(path: str) -> None:
    if _DOT_SEGMENT.search(path):
        raise BadTarget("the path holds a dot segment", "Write the path without . and .. segments.")
