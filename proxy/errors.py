"""Which errors can the proxy answer with, whose fault is each, and what does the client see?

Every error of the proxy's own is a subclass of `ProxyError`; nothing else turns into an answer. The body is Amazon's
envelope, so that client libraries show its message, and `x-sp-proxy-error` marks it as ours, so that nobody takes it
for Amazon's. Messages say what to do next and never hold a secret, a token or a query string.
"""

import json
import math
from typing import ClassVar, Literal

Fault = Literal["client", "proxy", "amazon"]


class ProxyError(Exception):
    """The root of the tree: an error that has an answer.

    `message` says what is wrong, `hint` what to do about it; `retry_after` is in seconds where waiting helps; `reason`
    is a word for what is behind it, where there is one.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "ProxyError"
    fault: ClassVar[Fault] = "proxy"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, hint: str = "", *, retry_after: float | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.retry_after = retry_after
        self.reason = reason

    def body(self) -> bytes:
        """Return Amazon's error envelope as JSON (DOC "Parse SP-API Responses")."""
        error = {"code": self.code, "message": self.message, "details": self.hint}
        return json.dumps({"errors": [error]}, ensure_ascii=False).encode()

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the answer: its type, our mark, and when to come back."""
        headers = {"Content-Type": "application/json; charset=utf-8", "x-sp-proxy-error": self.code}
        if self.retry_after is not None:
            # Whole seconds (RFC 9110 section 10.2.3), rounded up: coming back early would only fail again.
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return headers


# What the client sent.


class ClientError(ProxyError):
    """The request itself cannot be served; sending it again unchanged will not help."""

    status, code, fault = 400, "BadRequest", "client"


class MalformedRequest(ClientError):
    """The bytes are not a well-formed HTTP/1.0 or 1.1 request."""

    code = "MalformedRequest"


class BadTarget(ClientError):
    """The request target is not a path that can be sent to Amazon as it stands."""

    code = "BadTarget"


class MethodRefused(ClientError):
    """Only GET, HEAD, POST, PUT, PATCH and DELETE are forwarded."""

    status, code = 405, "MethodNotAllowed"

    def headers(self) -> dict[str, str]:
        """Name the methods that are allowed (RFC 9110 section 15.5.6)."""
        return {**super().headers(), "Allow": "GET, HEAD, POST, PUT, PATCH, DELETE"}


class HeaderTooLarge(ClientError):
    """The header block, or one field of it, is larger than the proxy takes."""

    status, code = 431, "HeaderTooLarge"


class RequestHeaderTimeout(ClientError):
    """The client did not finish its header block in `timeouts.header`."""

    status, code = 408, "HeaderTimeout"


class BodyTimeout(ClientError):
    """The client stopped sending its body for `timeouts.body_idle`."""

    status, code = 408, "BodyTimeout"


class VersionRefused(ClientError):
    """Only HTTP/1.0 and HTTP/1.1 are spoken here."""

    status, code = 505, "HTTPVersionNotSupported"


class HostRefused(ClientError):
    """The `Host` is neither this listener's, nor allowed, nor Amazon's (DNS rebinding)."""

    status, code = 421, "HostRefused"


class BrowserRefused(ClientError):
    """The request comes from a web page; the proxy serves programs only."""

    status, code = 403, "BrowserRefused"


class HeaderRequired(ClientError):
    """The listener takes only requests that name their account in a header."""

    status, code = 403, "HeaderRequired"


class CallerRefused(ClientError):
    """The listener takes only requests of known callers, and this one is none."""

    status, code = 403, "CallerRefused"


class NotAllowed(ClientError):
    """A policy, of the listener or of the caller, does not allow this call."""

    status, code = 403, "NotAllowed"


class DocumentRefused(ClientError):
    """The address of a document is none that this proxy gave this caller, for this account, method and listener."""

    status, code = 403, "DocumentRefused"


class DocumentExpired(ClientError):
    """The address of a document is older than Amazon's URL behind it lasts."""

    status, code = 403, "DocumentExpired"


class UnknownAccount(ClientError):
    """The account is not in the configuration."""

    code = "UnknownAccount"


class UnknownRegion(ClientError):
    """The region is none of na, eu and fe, in a header or behind the account in the path."""

    code = "UnknownRegion"


class UnknownMarketplace(ClientError):
    """The marketplace id alone should decide the region, and it is not known."""

    code = "UnknownMarketplace"


class AccountRequired(ClientError):
    """Several accounts are configured, none is the default, and the request names none."""

    code = "AccountRequired"


class RegionRequired(ClientError):
    """The account has several regions and nothing in the request says which."""

    code = "RegionRequired"


class RegionNotConfigured(ClientError):
    """The account has no refresh token for the region."""

    code = "RegionNotConfigured"


class ConflictingSources(ClientError):
    """Two sources name different accounts or regions; the proxy does not guess."""

    code = "ConflictingSources"


class BadOption(ClientError):
    """An `x-sp-…` header holds a value that means nothing, or its name is misspelt."""

    code = "BadOption"


class TokenRequestRefused(ClientError):
    """A request for an access token that the proxy cannot answer with its placeholder.

    `error` is what OAuth calls it (RFC 6749 section 5.2).
    """

    code = "TokenRequestRefused"

    def __init__(self, message: str, hint: str = "", *, error: str = "invalid_request") -> None:
        super().__init__(message, hint)
        self.error = error

    def body(self) -> bytes:
        """Return the error as Login with Amazon writes it: who asks there reads nothing else."""
        description = f"{self.message}. {self.hint}" if self.hint else self.message
        return json.dumps({"error": self.error, "error_description": description}).encode()


class RestrictedDataTokenInvalid(ClientError):
    """A request for a Restricted Data Token is malformed (with `local_rdt: true`), or such a token is not whole."""

    code = "InvalidInput"  # as Amazon says it


# What the proxy cannot do, for now or for good.


class UsagePlanExhausted(ProxyError):
    """Amazon's usage plan has no place for this call within the time it may wait."""

    status, code, fault, retryable = 429, "UsagePlanExhausted", "client", True


class CallerBusy(ProxyError):
    """The caller has `bounds.requests` requests in flight already."""

    status, code, fault, retryable = 429, "CallerBusy", "client", True


class AccountBusy(ProxyError):
    """The account has `bounds.account_requests` requests at Amazon already, and none ended in time."""

    status, code, fault, retryable = 503, "AccountBusy", "client", True


class TooManyConnections(ProxyError):
    """All of `bounds.connections` are in use, and none of them is idle."""

    status, code, fault, retryable = 503, "TooManyConnections", "client", True


class DocumentsBusy(ProxyError):
    """Half of the connections to Amazon carry documents already; the other half is for calls."""

    status, code, fault, retryable = 503, "DocumentsBusy", "client", True


class CallTimeout(ProxyError):
    """The time that the app gave the call (`x-sp-timeout`) is over."""

    status, code, fault = 504, "CallTimeout", "client"


class ShuttingDown(ProxyError):
    """The proxy was told to end, and this request took longer than it had left (`timeouts.shutdown`)."""

    status, code = 503, "ShuttingDown"


class InternalError(ProxyError):
    """A fault of the proxy; its log says more."""

    code = "InternalError"


# What Login with Amazon or Amazon did.


class TokenUnavailable(ProxyError):
    """Login with Amazon could not be reached, or answered nonsense; a later try may succeed."""

    status, code, fault, retryable = 503, "TokenUnavailable", "amazon", True


class TokenRefused(ProxyError):
    """Login with Amazon refuses the credentials of this account; a person has to act."""

    status, code, fault = 502, "TokenRefused", "proxy"


class RestrictedDataRefused(ProxyError):
    """Amazon gives no Restricted Data Token for this call."""

    status, code, fault = 403, "RestrictedDataRefused", "proxy"


class RegionDown(ProxyError):
    """A whole region of Amazon's has been failing; calls are not sent, but for single ones that look for its return."""

    status, code, fault, retryable = 503, "RegionDown", "amazon", True


class UpstreamUnreachable(ProxyError):
    """No connection to Amazon: name not found, refused, or its TLS certificate not trusted."""

    status, code, fault, retryable = 502, "UpstreamUnreachable", "amazon", True


class UpstreamBroken(ProxyError):
    """Amazon closed the connection without an answer, or answered something that is not HTTP."""

    status, code, fault = 502, "UpstreamBroken", "amazon"


class BadGzip(ProxyError):
    """A document that was to be unpacked (`?decompress=1`) is damaged, or not all of it came."""

    status, code, fault = 502, "BadGzip", "amazon"


class GzipBomb(ProxyError):
    """A document that was to be unpacked (`?decompress=1`) unpacks to far more than any report does."""

    status, code, fault = 502, "GzipBomb", "amazon"


class ConnectTimeout(ProxyError):
    """No connection to Amazon within `timeouts.connect`."""

    status, code, fault, retryable = 504, "ConnectTimeout", "amazon", True


class UpstreamTimeout(ProxyError):
    """Amazon was silent for `timeouts.upstream_idle`."""

    status, code, fault = 504, "UpstreamTimeout", "amazon"


class TotalTimeout(ProxyError):
    """The whole exchange took longer than `timeouts.total`."""

    status, code, fault = 504, "TotalTimeout", "amazon"


def all_errors() -> list[type[ProxyError]]:
    """Return every error that can be answered, in the order of this file (for docs/reference/errors.md)."""
    found: list[type[ProxyError]] = []
    pending = [ProxyError]
    while pending:
        parent = pending.pop(0)
        children = parent.__subclasses__()
        found += [child for child in children if not child.__subclasses__()]
        pending += children
    return found
