"""What happened to one request so far: for the `x-sp-proxy` header, the log line and the metrics."""

from functools import lru_cache

from proxy.errors import Fault, ProxyError
from proxy.request.identify import Target


class Exchange:
    """The record of one request; durations in seconds, `started` on the monotonic clock.

    What is not noted stays as the class has it, so that a new record costs next to nothing.
    """

    caller: str = ""  # who sent it; nothing for nobody in particular
    target: Target | None = None
    own: str = ""  # the name of what the proxy answered itself, in Amazon's place
    token: str = "none"  # noqa: S105 - a kind of token
    elements: tuple[str, ...] = ()  # the personal data that the token covers
    token_age: float = 0.0  # seconds since it was asked for
    dropped: tuple[str, ...] = ()  # data elements that were asked for and are not to be had
    retry_after: float | None = None  # seconds, where Amazon's 429 does not say when to come back
    hint: str = ""  # why Amazon probably refused the call
    attempts: int = 0
    waited: float = 0.0
    token_wait: float = 0.0
    upstream_duration: float | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    status: int = 0
    error: str = ""
    fault: Fault | None = None
    amazon_request_id: str | None = None  # Amazon's and the app's own, as they came: they may be anything
    request_id: str | None = None
    begun: bool = False  # the head of the answer is on its way to the app
    broken: bool = False  # the answer was cut off
    upload_error: ProxyError | None = None  # the app's body was not well-formed

    def __init__(self, method: str, started: float) -> None:
        self.method = method
        self.started = started

    def note_token(self, kind: str, data_elements: tuple[str, ...]) -> None:
        """Note which token goes with the request, and what of the data asked for it does not cover."""
        self.token = kind
        self.elements = data_elements
        asked = self.target.credential.data_elements if self.target else ()
        self.dropped = () if asked == data_elements else tuple(name for name in asked if name not in data_elements)

    @property
    def account(self) -> str:
        """The account's name, `-` where none was found."""
        return self.target.account if self.target else "-"

    @property
    def region(self) -> str:
        """The region, `-` where none was found."""
        return self.target.region if self.target else "-"

    @property
    def operation(self) -> str:
        """The operation's name, `unknown` where the table has none."""
        return self.where()[2]

    def where(self) -> tuple[str, str, str]:
        """Return account, region and operation: all three at once."""
        target = self.target
        if target is None:
            return "-", "-", self.own or "unknown"
        return target.account, target.region, target.operation_name

    def summary(self) -> str:
        """Return what the proxy decided and did, as it stands in `x-sp-proxy`."""
        text = _beginning_of_summary(*self.where(), self.token, self.attempts)
        text += f"{self.waited:.3f}" if self.waited else "0.000"
        if self.dropped:
            text += f"; dropped={','.join(self.dropped)}"
        if self.hint:
            text += f"; token_age={self.token_age:.0f}; hint={self.hint}"
        return text


@lru_cache(maxsize=4096)
def _beginning_of_summary(account: str, region: str, operation: str, token: str, attempts: int) -> str:
    return f"account={account}; region={region}; operation={operation}; token={token}; attempts={attempts}; wait="
