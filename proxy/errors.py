"""The proxy's own errors: status, code, fault, whether to retry, and the remedy of each, in one place.

Every error that the proxy sends is a subclass of `ProxyError`. The body is Amazon's error envelope, so that client
libraries show the message; the header `x-sp-proxy-error` distinguishes it from an error of Amazon's. A message never
holds a secret, a token or a query string.

The first line of a class's docstring and its `remedy` are texts for users: the reference of errors and the status page
show them. `code`, `status`, `fault` and `retryable` are a contract with clients.
"""

import json
import math
from typing import ClassVar, Literal

Fault = Literal["client", "proxy", "amazon"]


class ProxyError(Exception):
    """An error that the proxy sends as a response; the root of the tree.

    `message` says what is wrong and `hint` what to do in this instance; `remedy` is the advice for every error of the
    class. `retry_after` is in seconds, None where waiting does not help. `reason` is a short word for the cause, such
    as an OAuth error code, or empty.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "ProxyError"
    fault: ClassVar[Fault] = "proxy"
    retryable: ClassVar[bool] = False
    remedy: ClassVar[str] = ""

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
        """Return the headers of the response: content type, `x-sp-proxy-error`, and `Retry-After` if known."""
        headers = {"Content-Type": "application/json; charset=utf-8", "x-sp-proxy-error": self.code}
        if self.retry_after is not None:
            # RFC 9110 section 10.2.3 allows whole seconds only. Rounded up: a retry that is too early fails again.
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return headers


# Faults of the request.


class ClientError(ProxyError):
    """The request itself is at fault; sending it again unchanged fails again."""

    status, code, fault = 400, "BadRequest", "client"


class MalformedRequest(ClientError):
    """The bytes are not a well-formed HTTP/1.0 or HTTP/1.1 request."""

    code = "MalformedRequest"
    remedy = "Check the client that sent it: framing, exactly one `Host`, no body on GET."


class BadTarget(ClientError):
    """The request target is not a path that can be forwarded to Amazon unchanged."""

    code = "BadTarget"
    remedy = "Percent-encode the path; remove `.` and `..` segments and a leading `//`."


class MethodRefused(ClientError):
    """Only GET, HEAD, POST, PUT, PATCH and DELETE are forwarded."""

    status, code = 405, "MethodNotAllowed"
    remedy = "Use one of these methods."

    def headers(self) -> dict[str, str]:
        """Add the allowed methods, which a 405 must name (RFC 9110 section 15.5.6)."""
        return {**super().headers(), "Allow": "GET, HEAD, POST, PUT, PATCH, DELETE"}


class HeaderTooLarge(ClientError):
    """The header block, or one field in it, is larger than the proxy accepts."""

    status, code = 431, "HeaderTooLarge"
    remedy = "Send fewer or shorter headers."


class RequestHeaderTimeout(ClientError):
    """The client did not complete its header block within `timeouts.header`."""

    status, code = 408, "HeaderTimeout"
    remedy = "Send the header block at once, or raise `timeouts.header`."


class BodyTimeout(ClientError):
    """The client sent no part of its body for `timeouts.body_idle`."""

    status, code = 408, "BodyTimeout"
    remedy = "Send the body without long pauses, or raise `timeouts.body_idle`."


class VersionRefused(ClientError):
    """Only HTTP/1.0 and HTTP/1.1 are supported."""

    status, code = 505, "HTTPVersionNotSupported"
    remedy = "Send HTTP/1.1."


class HostRefused(ClientError):
    """The `Host` is not this listener's, not in `allowed_hosts` and not Amazon's (protection against DNS rebinding)."""

    status, code = 421, "HostRefused"
    remedy = "Call the proxy as 127.0.0.1 or localhost, or add the name to `allowed_hosts`."


class BrowserRefused(ClientError):
    """The request comes from a web page; the proxy serves programs only."""

    status, code = 403, "BrowserRefused"
    remedy = "Call the proxy from a program, not from a web page."


class HeaderRequired(ClientError):
    """The listener accepts only requests that name their account in a header."""

    status, code = 403, "HeaderRequired"
    remedy = "Send `x-sp-account`."


class CallerRefused(ClientError):
    """The listener accepts only known callers, and this request is from none of them."""

    status, code = 403, "CallerRefused"
    remedy = "Send your key as `x-sp-key`; the setting `callers` lists the known callers."


class NotAllowed(ClientError):
    """A policy of the listener or of the caller does not allow this call."""

    status, code = 403, "NotAllowed"
    remedy = "`message` names the setting that forbids the call: change the setting or make another call."


class DocumentRefused(ClientError):
    """The document address is not one that this proxy gave to this caller for this account, method and listener."""

    status, code = 403, "DocumentRefused"
    remedy = (
        "`message` says what does not match. Use the address complete and unchanged, as the caller that received it, "
        "with the method it is for. After a restart without `store_key`, request it from Amazon again."
    )


class DocumentExpired(ClientError):
    """The document address is older than the lifetime of Amazon's URL behind it."""

    status, code = 403, "DocumentExpired"
    remedy = "Repeat the call that returned the address, and start the download sooner."


class UnknownAccount(ClientError):
    """The account is not in the configuration."""

    code = "UnknownAccount"
    remedy = "Check its spelling; `check` lists the accounts."


class UnknownRegion(ClientError):
    """The region in a header, or after the account in the path, is not na, eu or fe."""

    code = "UnknownRegion"
    remedy = "Send `na`, `eu` or `fe`."


class UnknownMarketplace(ClientError):
    """The region depends on the marketplace id alone, and the id is unknown."""

    code = "UnknownMarketplace"
    remedy = "Check the id. For a new marketplace, send `x-sp-region` or add it to `marketplaces`."


class AccountRequired(ClientError):
    """Several accounts are configured, none is the default, and the request names none."""

    code = "AccountRequired"
    remedy = "Send `x-sp-account`, start the path with `/@ACCOUNT/`, or set `default_account`."


class RegionRequired(ClientError):
    """The account has several regions and the request does not say which."""

    code = "RegionRequired"
    remedy = "Send `x-sp-region`, start the path with `/@ACCOUNT/REGION/`, or name a marketplace."


class RegionNotConfigured(ClientError):
    """The account has no refresh token for the region."""

    code = "RegionNotConfigured"
    remedy = "Add the refresh token for this region, or use another region."


class ConflictingSources(ClientError):
    """Two sources name different accounts or regions; the proxy does not guess."""

    code = "ConflictingSources"
    remedy = "Name the account and the region once, or the same in every place."


class BadOption(ClientError):
    """An `x-sp-…` header has an invalid value, or its name is misspelt."""

    code = "BadOption"
    remedy = "Use a header name and a value from the table of headers."


class TokenRequestRefused(ClientError):
    """The proxy's token endpoint cannot serve this request for an access token.

    `error` is the OAuth error code (RFC 6749 section 5.2).
    """

    code = "TokenRequestRefused"
    remedy = "Send `grant_type`; exchange authorization codes with Login with Amazon directly."

    def __init__(self, message: str, hint: str = "", *, error: str = "invalid_request") -> None:
        super().__init__(message, hint)
        self.error = error

    def body(self) -> bytes:
        """Return the error in OAuth's format: clients of a token endpoint do not read Amazon's envelope."""
        description = f"{self.message}. {self.hint}" if self.hint else self.message
        return json.dumps({"error": self.error, "error_description": description}).encode()


class RestrictedDataTokenInvalid(ClientError):
    """A request for a Restricted Data Token is malformed (with `local_rdt: true`), or such a token is damaged."""

    code = "InvalidInput"  # the code that Amazon uses for the same fault
    remedy = "Follow Amazon's Tokens API; `message` says what is wrong. If a token is damaged, request a new one."


# Limits and faults of the proxy.


class UsagePlanExhausted(ProxyError):
    """Amazon's usage plan has no capacity for this call within the time it may wait."""

    status, code, fault, retryable = 429, "UsagePlanExhausted", "client", True
    remedy = "Retry after `Retry-After`, or let the call wait longer: `x-sp-max-wait`, `limits.max_wait`."


class CallerBusy(ProxyError):
    """The caller already has `bounds.requests` requests in flight."""

    status, code, fault, retryable = 429, "CallerBusy", "client", True
    remedy = "Send fewer requests at the same time, or raise `bounds.requests`."


class AccountBusy(ProxyError):
    """The account already has `bounds.account_requests` requests at Amazon, and none ended in time."""

    status, code, fault, retryable = 503, "AccountBusy", "client", True
    remedy = "Send fewer requests at the same time, or raise `bounds.account_requests`."


class TooManyConnections(ProxyError):
    """All of `bounds.connections` are in use, and none of them is idle."""

    status, code, fault, retryable = 503, "TooManyConnections", "client", True
    remedy = "Reuse connections, or raise `bounds.connections` and the limit of open files."


class DocumentsBusy(ProxyError):
    """Half of the connections to Amazon already carry documents; the other half is reserved for calls."""

    status, code, fault, retryable = 503, "DocumentsBusy", "client", True
    remedy = "Retry after `Retry-After`. Fetch fewer at the same time, or raise `pool.max_connections`."


class CallTimeout(ProxyError):
    """The time that the app gave the call (`x-sp-timeout`) has passed."""

    status, code, fault = 504, "CallTimeout", "client"
    remedy = "Give the call more time, or request less. A write may have been done."


class ShuttingDown(ProxyError):
    """The proxy is shutting down, and this request did not end within `timeouts.shutdown`."""

    status, code = 503, "ShuttingDown"
    remedy = "Retry with the next proxy. Before you retry a write, check whether it was done."


class InternalError(ProxyError):
    """An internal error of the proxy; its log says more."""

    code = "InternalError"
    remedy = "Report it; the proxy's log has the type of the error and where it happened."


# Failures of Login with Amazon and of Amazon.


class TokenUnavailable(ProxyError):
    """Login with Amazon could not be reached or sent an invalid response; a later attempt may succeed."""

    status, code, fault, retryable = 503, "TokenUnavailable", "amazon", True
    remedy = "Retry after `Retry-After`. Nothing was sent to the API."


class TokenRefused(ProxyError):
    """Login with Amazon refuses the credentials of this account; a person has to act."""

    status, code, fault = 502, "TokenRefused", "proxy"
    remedy = (
        "`details` names the credential to replace, by its key and its file or variable, or whom to contact. The proxy "
        "loads a changed file without a restart."
    )


class RestrictedDataRefused(ProxyError):
    """Amazon issues no Restricted Data Token for this call."""

    status, code, fault = 403, "RestrictedDataRefused", "proxy"
    remedy = (
        "Check the application's restricted roles; `x-sp-data-elements: none` requests the data without personal data."
    )


class RegionDown(ProxyError):
    """Calls to one of Amazon's regions keep failing; the proxy sends it only single probes until one succeeds."""

    status, code, fault, retryable = 503, "RegionDown", "amazon", True
    remedy = "Retry after `Retry-After`; Amazon's health page may say more."


class UpstreamUnreachable(ProxyError):
    """No connection to Amazon: name not found, connection refused, or TLS certificate not trusted."""

    status, code, fault, retryable = 502, "UpstreamUnreachable", "amazon", True
    remedy = "Check this machine's network, DNS and firewall, `pool.proxy`, `endpoints` and `pool.ca_file`."


class UpstreamBroken(ProxyError):
    """Amazon closed the connection without a response, or sent something that is not HTTP."""

    status, code, fault = 502, "UpstreamBroken", "amazon"
    remedy = "Retry a read. Before you retry a write, check whether it was done."


class BadGzip(ProxyError):
    """A document that was to be decompressed (`?decompress=1`) is damaged or incomplete."""

    status, code, fault = 502, "BadGzip", "amazon"
    remedy = "Fetch it without `?decompress=1` and inspect it; request the document from Amazon again."


class GzipBomb(ProxyError):
    """A document that was to be decompressed (`?decompress=1`) grows far larger than any report."""

    status, code, fault = 502, "GzipBomb", "amazon"
    remedy = "Fetch it without `?decompress=1`, and decompress it where a very large result does no harm."


class ConnectTimeout(ProxyError):
    """No connection to Amazon within `timeouts.connect`."""

    status, code, fault, retryable = 504, "ConnectTimeout", "amazon", True
    remedy = (
        "Retry. If it continues, check this machine's network, DNS and firewall, and whether all of "
        "`pool.max_connections` are in use."
    )


class UpstreamTimeout(ProxyError):
    """Amazon sent nothing for `timeouts.upstream_idle`."""

    status, code, fault = 504, "UpstreamTimeout", "amazon"
    remedy = "Retry a read. Before you retry a write, check whether it was done."


class TotalTimeout(ProxyError):
    """The whole call took longer than `timeouts.total`."""

    status, code, fault = 504, "TotalTimeout", "amazon"
    remedy = "Raise `timeouts.total` for very large bodies. Check whether a write was done."


def all_errors() -> list[type[ProxyError]]:
    """Return every error class that can be sent: the leaves of the tree, breadth first, in the order of this file."""
    found: list[type[ProxyError]] = []
    pending = [ProxyError]
    while pending:
        parent = pending.pop(0)
        children = parent.__subclasses__()
        found += [child for child in children if not child.__subclasses__()]
        pending += children
    return found
