"""The diagnosis: state, cause and remedy, with one case for each thing that can be wrong."""

from collections.abc import Sequence
from typing import Any

import pytest

from proxy.errors import BrowserRefused, RegionRequired
from proxy.observability.request_history import RequestRecord
from proxy.server.admin.diagnosis import Diagnosis, diagnose, failure_of, responsible_for
from proxy.server.admin.snapshot import Snapshot, TokenRow

NOW = 10_000.0
GOOD = TokenRow("acme", "main", "production", "eu", "good", expires_in=3000.0, age=600.0)
REFUSED = TokenRow(
    *("acme", "main", "production", "eu", "failed"), error="TokenRefused", reason="invalid_grant", remedy="Replace it."
)
UNREACHABLE = REFUSED._replace(error="TokenUnavailable", reason="connection", remedy="")
CONFIGURATION: dict[str, Any] = {"good_since": "", "last_reload": None, "problems": [], "needs_restart": []}


def request(
    status: int = 200, error: str = "", hint: str = "", ago: float = 1.0, region: str = "eu", number: int = 1
) -> RequestRecord:
    labels = ("acme", region, "orders.v0.getOrders", "GET", str(status), "lwa", "proxy" if error else "amazon")
    return RequestRecord(number, labels, "", NOW - ago, 0.0, 0.0, 0.0, None, 1, error, hint)


def seen(requests: Sequence[RequestRecord] = (), tokens: Sequence[TokenRow] = (GOOD,), **changed: Any) -> Snapshot:
    given: dict[str, Any] = {
        "version": "0",
        "state": "ready",
        "waiting_for": "",
        "accounts": 1,
        "in_flight": 0,
        "configuration": CONFIGURATION,
        "plans": (),
        "errors": (),
        "samples": (),
        "store_is_up": None,
        "store_failures": {},
        "regions_down": (),
        "secret_lifetimes": {},
        "now": NOW,
        "wall": 1_800_000_000.0,
    }
    return Snapshot(requests=requests, tokens=tokens, **{**given, **changed})


def test_a_proxy_without_problems_works() -> None:
    diagnosis = diagnose(seen([request()] * 20))
    assert (diagnosis.state, diagnosis.responsible, diagnosis.others) == ("working", None, [])
    assert diagnosis.summary == "Working: 20 recent requests, no problems."
    assert diagnose(seen()).summary.startswith("Working as far as known: no request came")


CASES: list[tuple[str, Snapshot, str, str, str]] = [
    ("no account", seen(accounts=0, tokens=()), "not working", "yours", "No account"),
    ("credentials refused", seen(tokens=[REFUSED]), "not working", "yours", "acme in eu (invalid_grant)"),
    ("credentials of one refused", seen(tokens=[REFUSED, GOOD]), "degraded", "yours", "Login with Amazon refuses"),
    ("token host is unreachable", seen(tokens=[UNREACHABLE]), "not working", "the network's", "cannot be reached"),
    (
        "token host fails",
        seen(tokens=[UNREACHABLE._replace(reason="http_503")]),
        *("not working", "Amazon's", "issues no token (http_503)"),
    ),
    (
        "token host fails, tokens are still valid",
        seen(tokens=[UNREACHABLE._replace(state="failing", expires_in=60.0)]),
        *("degraded", "the network's", "cannot be reached"),
    ),
    (
        "most requests need the refused token",
        seen([request(502, "TokenRefused")] * 9 + [request()], tokens=[REFUSED, GOOD]),
        *("not working", "yours", "Login with Amazon refuses"),
    ),
    (
        "Amazon is unreachable",
        seen([request(502, "UpstreamUnreachable")] * 3),
        *("not working", "the network's", "3 of 3 recent requests: UpstreamUnreachable"),
    ),
    (
        "Amazon fails occasionally",
        seen([request()] * 9 + [request(503)]),
        "degraded",
        "Amazon's",
        "Amazon responded 503",
    ),
    ("Amazon is silent", seen([request(504, "UpstreamTimeout")] * 5), "not working", "Amazon's", "UpstreamTimeout"),
    (
        "a region is down",
        seen([request(503, "RegionDown")] * 9 + [request(503)], regions_down=[("production", "eu")]),
        *("not working", "Amazon's", "region eu cannot be used"),
    ),
    (
        "a region is unreachable, another one works",
        seen(
            [request(502, "UpstreamUnreachable"), *[request(503, "RegionDown")] * 2, *[request(region="na")] * 90],
            regions_down=[("production", "eu")],
        ),
        *("degraded", "the network's", "region eu cannot be used"),
    ),
    ("no role", seen([request(403, hint="role")] * 2), "not working", "yours", "Amazon refused them (role)"),
    (
        "too many calls",
        seen([request()] * 9 + [request(429, "UsagePlanExhausted")]),
        *("degraded", "yours", "UsagePlanExhausted"),
    ),
    ("Amazon throttles", seen([request()] * 9 + [request(429)]), "degraded", "yours", "a usage plan was exhausted"),
    ("the app is wrong", seen([request(400, "UnknownAccount")] * 5), "not working", "yours", "UnknownAccount"),
    (
        "the app is wrong in many ways",
        seen([request(400, "BadOption")] * 5 + [request(400, "BadTarget")] * 4 + [request(403, "BrowserRefused")] * 9),
        *("not working", "yours", "9 of 18 recent requests: BrowserRefused"),
    ),
    ("the proxy fails", seen([request(500, "InternalError")] * 2), "not working", "the proxy's", "InternalError"),
    (
        "a bad configuration",
        seen(configuration={**CONFIGURATION, "problems": ["acounts: unknown"]}),
        *("degraded", "yours", "The newest configuration was rejected"),
    ),
    ("Redis is unavailable", seen(store_is_up=False), "degraded", "yours", "Redis"),
    ("a client secret is too old", seen(secret_lifetimes={"main": -1.0}), "degraded", "yours", "older than 180 days"),
]


@pytest.mark.parametrize(
    ("snapshot", "state", "responsible", "summary"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_problem_is_named_with_its_cause(snapshot: Snapshot, state: str, responsible: str, summary: str) -> None:
    diagnosis = diagnose(snapshot)
    assert (diagnosis.state, diagnosis.responsible) == (state, responsible)
    assert summary in diagnosis.summary
    assert diagnosis.remedy.endswith(".")


@pytest.mark.parametrize(
    "snapshot",
    [
        seen([request(404)] * 9),  # the result of the call
        seen([request(499, "ClientLeft")] * 9),
        seen([request(503, ago=400.0)] * 9),  # long ago
        seen([request(503, ago=200.0)] * 9 + [request()] * 9),  # over: enough requests came since
        seen([request()] * 99 + [request(503)]),
        seen([request(400, "RegionRequired")]),  # a first call
        seen([request()] * 2 + [request(400, "BadOption")] * 5 + [request(403, "BrowserRefused")] * 5),
        seen(secret_lifetimes={"main": 86400.0 * 3}),
        seen(configuration={**CONFIGURATION, "needs_restart": ["admin"]}),
    ],
)
def test_minor_issues_are_notes(snapshot: Snapshot) -> None:
    assert diagnose(snapshot).state == "working"


def test_client_errors_are_notes_with_their_remedies() -> None:
    diagnosis = diagnose(seen([request()] * 9 + [request(400, "RegionRequired"), request(403, "BrowserRefused")]))
    assert (diagnosis.state, diagnosis.responsible) == ("working", None)
    assert diagnosis.summary == "Working: 11 recent requests. 2 notes below."
    assert [other.remedy for other in diagnosis.others] == [RegionRequired.remedy, BrowserRefused.remedy]
    diagnosis = diagnose(seen([request()] * 9 + [request(400, "BadOption"), request(503)]))
    assert (diagnosis.state, diagnosis.responsible, len(diagnosis.others)) == ("degraded", "Amazon's", 1)


def test_the_most_severe_issue_comes_first_and_the_others_follow() -> None:
    diagnosis = diagnose(seen([request()] * 9 + [request(503)], tokens=[REFUSED], store_is_up=False))
    assert (diagnosis.state, diagnosis.responsible) == ("not working", "yours")
    assert [other.responsible for other in diagnosis.others] == ["Amazon's", "yours"]


def test_start_and_shutdown_are_states_of_their_own() -> None:
    assert diagnose(seen(state="starting", waiting_for="the tokens (warm_up)")) == Diagnosis(
        "starting", None, "Starting: waiting for the tokens (warm_up).", "Wait; details are below.", []
    )
    assert diagnose(seen(state="stopping")).state == "stopping"


def test_of_many_accounts_two_are_named() -> None:
    rows = [REFUSED._replace(account=f"a{number}") for number in range(40)]
    assert "of a0 in eu, a1 in eu and 38 more (invalid_grant)" in diagnose(seen(tokens=rows)).summary


def test_every_failure_has_a_cause() -> None:
    assert [
        failure_of(request(*each)) for each in ((200,), (404,), (429,), (500,), (403, "", "role"), (499, "ClientLeft"))
    ] == [*("", "", "429", "500", "role", "")]
    assert [
        responsible_for(name) for name in ("429", "503", "role", "TokenUnavailable", "ConnectTimeout", "InternalError")
    ] == [*("yours", "Amazon's", "yours", "Amazon's", "the network's", "the proxy's")]
