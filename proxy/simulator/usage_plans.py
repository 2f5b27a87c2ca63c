"""Usage plans as token buckets (DOC "Usage Plans and Rate Limits")."""

import re
from dataclasses import dataclass, field

from proxy.simulator.responses import Response, as_json
from proxy.simulator.state import errors_body, template_pattern

# Calls per second and burst of well-known operations (the models' own descriptions).
WELL_KNOWN: tuple[tuple[str, str, float, float], ...] = (
    ("GET", "/orders/v0/orders", 0.0167, 20),
    ("GET", "/orders/v0/orders/{orderId}", 0.5, 30),
    ("GET", "/orders/v0/orders/{orderId}/address", 0.5, 30),
    ("GET", "/orders/v0/orders/{orderId}/orderItems", 0.5, 30),
    ("GET", "/orders/2026-01-01/orders", 0.0056, 20),
    ("POST", "/feeds/2021-06-30/feeds", 0.0083, 15),
    ("POST", "/reports/2021-06-30/reports", 0.0167, 15),
    ("GET", "/reports/2021-06-30/documents/{reportDocumentId}", 0.0167, 15),
    ("GET", "/sellers/v1/marketplaceParticipations", 0.016, 15),
    ("POST", "/tokens/2021-03-01/restrictedDataToken", 1, 10),
)

_TABLE_ROW = re.compile(r"\|\s*(?:Default\s*\|\s*)?(\d*\.?\d+)\s*\|\s*(\d+)\s*\|", re.IGNORECASE)


@dataclass(slots=True)
class Plan:
    """One operation's plan: calls per second, burst, and whether answers announce the rate."""

    pattern: re.Pattern[str]
    method: str
    rate: float
    burst: float
    announce: bool = True


@dataclass(slots=True)
class Plans:
    """The plans in force and how full each caller's bucket is."""

    default: tuple[float, float]
    enforced: bool
    plans: list[Plan] = field(default_factory=list)
    buckets: dict[tuple[str, ...], tuple[float, float]] = field(default_factory=dict)

    def add(self, method: str, template: str, rate: float, burst: float, *, announce: bool = True) -> None:
        """Set the plan of an operation; the newest one for a path counts, and its buckets start full."""
        self.plans.insert(0, Plan(template_pattern(template), method, rate, burst, announce))
        self.buckets.clear()

    def plan(self, method: str, path: str) -> Plan:
        """Return the plan of a request."""
        for plan in self.plans:
            if plan.method == method and plan.pattern.fullmatch(path):
                return plan
        return Plan(re.compile(re.escape(path)), method, *self.default)

    def take(self, caller: tuple[str, ...], plan: Plan, now: float) -> Response | None:
        """Take a place in the caller's bucket; return Amazon's 429 where there is none."""
        key = (*caller, plan.method, plan.pattern.pattern)
        tokens, updated = self.buckets.get(key, (plan.burst, now))
        tokens = min(plan.burst, tokens + (now - updated) * plan.rate)
        if tokens < 1:
            self.buckets[key] = (tokens, now)
            message = "You exceeded your quota for the requested resource."
            return as_json(429, errors_body("QuotaExceeded", message), error_type="TooManyRequestsException")
        self.buckets[key] = (tokens - 1, now)
        return None


def announced(plan: Plan, status: int) -> dict[str, str]:
    """Return the rate header where Amazon sends it: with 20x, 400 and 404, never with 403 and 429."""
    return (
        {"x-amzn-RateLimit-Limit": f"{plan.rate:g}"} if plan.announce and status in {*range(200, 300), 400, 404} else {}
    )


def stated_plan(description: str) -> tuple[float, float] | None:
    """Return rate and burst of the table in a model's description."""
    row = _TABLE_ROW.search(description.replace("\\n", "\n"))
    return (float(row[1]), float(row[2])) if row else None
