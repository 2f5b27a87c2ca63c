"""What happened to one request so far: for the `x-sp-proxy` header, the log line and the metrics."""

from functools import lru_cache

from proxy.errors import Fault, ProxyError
from proxy.request.routing import Route

NO_ROUTE = ("-", "-", "unknown")  # account, region and operation of a request for which none was found


class RequestContext:
    """The record of one request; durations in seconds, `started` on the monotonic clock."""

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
        "started",
        "status",
        "target",
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
        self.caller = ""  # who sent it; nothing for nobody in particular
        self.target: Route | None = None
        self.local_operation = (
            ""  # the name of what the proxy answered itself, in Amazon's place, or refused without a target
        )
        self.token = "none"  # noqa: S105 - a kind of token
        self.data_elements: tuple[str, ...] = ()  # the personal data that the token covers
        self.token_age = 0.0  # seconds since it was asked for
        self.dropped_elements: tuple[str, ...] = ()  # data elements that were asked for and are not to be had
        self.retry_after: float | None = None  # seconds, where Amazon's 429 does not say when to come back
        self.hint = ""  # why Amazon probably refused the call
        self.upstream_duration: float | None = None
        self.attempts = 0
        self.rate_limit_wait = self.token_wait = 0.0
        self.request_bytes = self.response_bytes = 0
        self.status = 0
        self.error = ""
        self.fault: Fault | None = None
        # Amazon's and the app's own, as they came: they may be anything.
        self.amazon_request_id: bytes | None = None
        self.request_id: str | None = None
        self.response_started = False  # the head of the answer is on its way to the app
        self.truncated = False  # the answer was cut off
        self.upload_error: ProxyError | None = None  # the app's body was not well-formed

    def set_token_type(self, kind: str, data_elements: tuple[str, ...]) -> None:
        """Note which token goes with the request, and what of the data asked for it does not cover."""
        self.token = kind
        self.data_elements = data_elements
        asked = self.target.token_key.data_elements if self.target is not None else ()
        if asked or data_elements:
            self.dropped_elements = tuple(name for name in asked if name not in data_elements)

    @property
    def account(self) -> str:
        """The account's name, `-` where none was found."""
        return self.target.account if self.target is not None else "-"

    @property
    def region(self) -> str:
        """The region, `-` where none was found."""
        return self.target.region if self.target is not None else "-"

    @property
    def operation(self) -> str:
        """The operation's name, `unknown` where the table has none."""
        return self.labels()[2]

    def labels(self) -> tuple[str, str, str]:
        """Return account, region and operation: all three at once."""
        route = self.target
        if route is None:
            return ("-", "-", self.local_operation) if self.local_operation else NO_ROUTE
        return route.account, route.region, route.operation_name

    def summary(self) -> str:
        """Return what the proxy decided and did, as it stands in `x-sp-proxy`."""
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
