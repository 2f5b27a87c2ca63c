"""The simulator's state: clients, sellers, issued tokens, received requests and injected faults."""

import re
import secrets
import string
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

REGIONS = ("na", "eu", "fe")
SCOPES = ("sellingpartnerapi::notifications", "sellingpartnerapi::client_credential:rotation")

DEMO_CLIENT = "amzn1.application-oa2-client.simulator"
DEMO_APPLICATION = "amzn1.sp.solution.simulator"
DEMO_SECRET = "amzn1.oa2-cs.v1.simulator"  # noqa: S105 - made up, and printed by --help

MAX_RECORDED = 10_000
MAX_TOKENS = 100_000
_ALPHABET = string.ascii_letters + string.digits + "-_"


@dataclass(frozen=True, slots=True)
class Seller:
    """One selling partner's authorisation: for one region, given to one client."""

    name: str
    region: str
    refresh_token: str = field(repr=False)
    client_id: str = DEMO_CLIENT


@dataclass(frozen=True, slots=True)
class WebApplication:
    """An application as a selling partner authorises it: whose client it is, and where the consent may lead."""

    client_id: str = DEMO_CLIENT
    redirect_uris: tuple[str, ...] = ("https://app.example/redirect",)
    is_draft: bool = True


@dataclass(frozen=True, slots=True)
class Code:
    """An authorization code that was given: to whom, for which region; `expires_at` on the simulator's clock."""

    client_id: str
    region: str
    redirect_uri: str
    expires_at: float


def demo_sellers() -> tuple[Seller, ...]:
    """Return one made-up seller with an authorisation in each region."""
    return tuple(Seller("demo", region, f"Atzr|demo-{region}") for region in REGIONS)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a simulator starts; `ports` are those of lwa (and control), na, eu and fe, 0 for any free one."""

    host: str = "127.0.0.1"
    ports: tuple[int, int, int, int] = (0, 0, 0, 0)
    clients: dict[str, str] = field(default_factory=lambda: {DEMO_CLIENT: DEMO_SECRET}, repr=False)
    sellers: Sequence[Seller] = field(default_factory=demo_sellers)
    token_lifetime: float = 3600.0
    models: Path | None = None
    enforce_plans: bool = False
    default_plan: tuple[float, float] = (5.0, 10.0)
    tls: tuple[Path, Path] | None = None


@dataclass(frozen=True, slots=True)
class Resource:
    """What an RDT is good for: a method, a path that may hold placeholders, and personal data."""

    method: str
    path: str
    data_elements: tuple[str, ...]


@dataclass(slots=True)
class Issued:
    """A token that was given: `kind` is lwa, grantless or rdt; `expires_at` on the simulator's clock."""

    kind: str
    client_id: str
    expires_at: float
    seller: str = ""
    region: str = ""
    scopes: tuple[str, ...] = ()
    resources: tuple[Resource, ...] = ()
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request as it came in, and the answer it got."""

    service: str
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    body_size: int
    body_sha256: str
    seller: str
    token_kind: str
    operation: str
    status: int

    def header(self, name: str) -> str | None:
        """Return the first value of a header, None where it is absent."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass(slots=True)
class Fault:
    """A fault to make: in which service, for which paths, of which kind, how many times (None: until it is removed).

    Kinds: `latency` (seconds), `status` (status, body), `answer` (status, headers, body), `reset`, `close`, `hang`
    (seconds), `truncate` (half of an answer), `size` (an answer of that many bytes).
    """

    kind: str
    service: str = "*"
    path: str = "*"
    method: str = "*"
    times: int | None = None
    seconds: float = 0.0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    size: int = 0
    chunked: bool = False

    def fits(self, service: str, method: str, path: str) -> bool:
        """Return whether the fault is for this request."""
        patterns = ((service, self.service), (method, self.method), (path, self.path))
        return self.times != 0 and all(fnmatchcase(value, pattern) for value, pattern in patterns)


@dataclass(slots=True)
class State:
    """Everything that changes while a simulator runs."""

    settings: Settings
    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    lifetime: float = 3600.0
    clients: dict[str, set[str]] = field(default_factory=dict)
    sellers: dict[str, Seller] = field(default_factory=dict)
    revoked_sellers: set[str] = field(default_factory=set)
    tokens: dict[str, Issued] = field(default_factory=dict)
    journal: deque[Recorded] = field(default_factory=lambda: deque(maxlen=MAX_RECORDED))
    faults: list[Fault] = field(default_factory=list)
    applications: dict[str, WebApplication] = field(default_factory=lambda: {DEMO_APPLICATION: WebApplication()})
    codes: dict[str, Code] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    elements: set[str] = field(default_factory=lambda: {"buyerInfo", "shippingAddress"})

    @classmethod
    def of(cls, settings: Settings, now: Callable[[], float], wall: Callable[[], float]) -> "State":
        """Return the state in which a simulator starts."""
        state = cls(settings, now, wall, settings.token_lifetime)
        state.clients = {client: {secret} for client, secret in settings.clients.items()}
        state.sellers = {seller.refresh_token: seller for seller in settings.sellers}
        return state

    def count(self, name: str) -> None:
        """Count one event; shown by the control endpoint."""
        self.counts[name] = self.counts.get(name, 0) + 1

    def issue(self, prefix: str, issued: Issued) -> str:
        """Give a token: a random text that begins with `prefix` and is as long as Amazon's."""
        if len(self.tokens) >= MAX_TOKENS:
            self.tokens = {text: token for text, token in self.tokens.items() if token.expires_at > self.now()}
        text = prefix + "".join(secrets.choice(_ALPHABET) for _ in range(360))
        self.tokens[text] = issued
        return text

    def fault(self, service: str, method: str, path: str) -> Fault | None:
        """Return the first fault that is for this request, and use it up by one."""
        for fault in self.faults:
            if fault.fits(service, method, path):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


def template_pattern(template: str) -> re.Pattern[str]:
    """Return the pattern of the raw paths that a template such as `/orders/v0/orders/{orderId}` stands for."""
    parts = re.split(r"\{[^}]+\}", template)
    return re.compile("[^/]+".join(map(re.escape, parts)))


def errors_body(code: str, message: str, details: str = "") -> dict[str, Any]:
    """Return Amazon's error envelope."""
    return {"errors": [{"code": code, "message": message, "details": details}]}
