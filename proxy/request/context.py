"""The record of one request, from which the `x-sp-proxy` header, log line, metrics and trace are made."""

from functools import lru_cache

from proxy.errors import Fault, ProxyError
from proxy.request.routing import Route

NO_ROUTE = ("-", "-", "unknown")  # account, region and operation of a request without a route


class RequestContext:
    """What is known of one request so far; durations in seconds, `started` on the monotonic clock.

    The steps note waits and attempts by methods, which TracedContext extends; all else they assign.
    """

    __slots__ = (
        "amazon_request_id",
        "attempts",
        "caller",
        "data_elements",
        "dropped_elements",
        "error",
        "fault",
        "hint",
        "local_operation",
        "method",
        "rate_limit_wait",
        "request_bytes",
        "request_id",
        "response_bytes",
        "response_started",
        "retry_after",
        "route",
        "started",
        "status",
        "token",
        "token_age",
        "token_wait",
        "truncated",
        "upload_error",
        "upstream_duration",
    )

    def __init__(self, method: str, started: float) -> None:
        self.method = method
        self.started = started
        self.caller = ""  # the caller's name, empty for an anonymous one
        self.route: Route | None = None
        # The operation that the proxy served itself, or that it rejected before there was a route.
        self.local_operation = ""
        self.token = "none"  # noqa: S105 - a kind of token
        self.data_elements: tuple[str, ...] = ()  # the personal data that the token covers
        self.token_age = 0.0  # seconds since it was issued
        self.dropped_elements: tuple[str, ...] = ()  # requested data elements that Amazon does not grant
        self.retry_after: float | None = None  # seconds; for a 429 of Amazon's without a Retry-After
        self.hint = ""  # the probable reason of a 401 or 403 of Amazon's
        self.upstream_duration: float | None = None
        self.attempts = 0
        self.rate_limit_wait = self.token_wait = 0.0
        self.request_bytes = self.response_bytes = 0
        self.status = 0
        self.error = ""
        self.fault: Fault | None = None
        # Request ids of Amazon and of the client, as received: not validated.
        self.amazon_request_id: bytes | None = None
        self.request_id: str | None = None
        self.response_started = False  # the head of the response has been sent, at least in part
        self.truncated = False  # the response was cut off
        self.upload_error: ProxyError | None = None  # the client's body was malformed

    def set_token_type(self, kind: str, data_elements: tuple[str, ...]) -> None:
        """Note the token of the request, and the requested data elements that it does not cover."""
        self.token = kind
        self.data_elements = data_elements
        asked = self.route.token_key.data_elements if self.route is not None else ()
        if asked or data_elements:
            self.dropped_elements = tuple(name for name in asked if name not in data_elements)

    def add_rate_limit_wait(self, seconds: float) -> None:
        """Note a wait for a usage plan that ends now."""
        self.rate_limit_wait += seconds

    def add_token_wait(self, seconds: float) -> None:
        """Note a wait for a token that ends now."""
        self.token_wait += seconds

    def begin_attempt(self) -> None:
        """Note that the request is being sent to Amazon."""
        self.attempts += 1

    def end_attempt(self, status: int, duration: float) -> None:
        """Note the head of Amazon's response, received `duration` seconds after the attempt began."""
        self.status = status
        self.upstream_duration = duration

    @property
    def account(self) -> str:
        """The account's name, `-` without a route."""
        return self.route.account if self.route is not None else "-"

    @property
    def region(self) -> str:
        """The region, `-` without a route."""
        return self.route.region if self.route is not None else "-"

    @property
    def operation(self) -> str:
        """The operation's name, `unknown` where the table has none."""
        return self.labels()[2]

    def labels(self) -> tuple[str, str, str]:
        """Return account, region and operation, for metrics."""
        route = self.route
        if route is None:
            return ("-", "-", self.local_operation) if self.local_operation else NO_ROUTE
        return route.account, route.region, route.operation_name

    def summary(self) -> str:
        """Return the value of the response header `x-sp-proxy`: what the proxy decided and did."""
        text = _summary_prefix(*self.labels(), self.token, self.attempts)
        text += f"{self.rate_limit_wait:.3f}" if self.rate_limit_wait else "0.000"
        if self.dropped_elements:
            text += f"; dropped={','.join(self.dropped_elements)}"
        if self.hint:
            text += f"; token_age={self.token_age:.0f}; hint={self.hint}"
        return text


@lru_cache(maxsize=4096)
def _summary_prefix(account: str, region: str, operation: str, token: str, attempts: int) -> str:
    return f"account={account}; region={region}; operation={operation}; token={token}; attempts={attempts}; wait="
