"""Is it working, and whose fault is it if not? One case for each thing that can be wrong."""

from collections.abc import Sequence
from typing import Any

import pytest

from proxy.errors import BrowserRefused, RegionRequired
from proxy.observability.request_history import RequestRecord
from proxy.server.admin.diagnosis import Diagnosis, diagnose, name_of, responsible_for
from proxy.server.admin.snapshot import Snapshot, TokenRow

NOW = 10_000.0
GOOD = TokenRow("acme", "main", "production", "eu", "good", left=3000.0, age=600.0)
REFUSED = TokenRow(
    *("acme", "main", "production", "eu", "failed"), error="TokenRefused", reason="invalid_grant", do="Replace it."
)
UNREACHABLE = REFUSED._replace(error="TokenUnavailable", reason="connection", do="")
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
        "secrets_left": {},
        "now": NOW,
        "wall": 1_800_000_000.0,
    }
    return Snapshot(requests=requests, tokens=tokens, **{**given, **changed})


def test_a_proxy_that_works_says_so() -> None:
    diagnosis = diagnose(seen([request()] * 20))
    assert (diagnosis.state, diagnosis.responsible, diagnosis.others) == ("working", None, [])
    assert diagnosis.summary == "Working: 20 requests lately, all as it should be."
    assert diagnose(seen()).summary.startswith("Working, as far as can be told: no request came")


CASES: list[tuple[str, Snapshot, str, str, str]] = [
    ("no account", seen(accounts=0, tokens=()), "not working", "yours", "No account"),
    ("credentials refused", seen(tokens=[REFUSED]), "not working", "yours", "acme in eu (invalid_grant)"),
    ("credentials of one refused", seen(tokens=[REFUSED, GOOD]), "degraded", "yours", "Login with Amazon refuses"),
    ("token host not reached", seen(tokens=[UNREACHABLE]), "not working", "the network's", "cannot be reached"),
    (
        "token host fails",
        seen(tokens=[UNREACHABLE._replace(reason="http_503")]),
        *("not working", "Amazon's", "gives no token (http_503)"),
    ),
    (
        "token host fails, tokens are good still",
        seen(tokens=[UNREACHABLE._replace(state="failing", left=60.0)]),
        *("degraded", "the network's", "cannot be reached"),
    ),
    (
        "most need the token that is refused",
        seen([request(502, "TokenRefused")] * 9 + [request()], tokens=[REFUSED, GOOD]),
        *("not working", "yours", "Login with Amazon refuses"),
    ),
    (
        "Amazon not reached",
        seen([request(502, "UpstreamUnreachable")] * 3),
        *("not working", "the network's", "3 of 3 requests lately: UpstreamUnreachable"),
    ),
    (
        "Amazon fails now and then",
        seen([request()] * 9 + [request(503)]),
        "degraded",
        "Amazon's",
        "Amazon answered 503",
    ),
    ("Amazon is silent", seen([request(504, "UpstreamTimeout")] * 5), "not working", "Amazon's", "UpstreamTimeout"),
    (
        "a region is down",
        seen([request(503, "RegionDown")] * 9 + [request(503)], regions_down=[("production", "eu")]),
        *("not working", "Amazon's", "region eu cannot be used"),
    ),
    (
        "a region is not reached, another one works",
        seen(
            [request(502, "UpstreamUnreachable"), *[request(503, "RegionDown")] * 2, *[request(region="na")] * 90],
            regions_down=[("production", "eu")],
        ),
        *("degraded", "the network's", "region eu cannot be used"),
    ),
    ("no role", seen([request(403, hint="role")] * 2), "not working", "yours", "Amazon refused them (role)"),
    (
        "too much is asked",
        seen([request()] * 9 + [request(429, "UsagePlanExhausted")]),
        *("degraded", "yours", "UsagePlanExhausted"),
    ),
    ("Amazon throttles", seen([request()] * 9 + [request(429)]), "degraded", "yours", "a usage plan had no room"),
    ("the app is wrong", seen([request(400, "UnknownAccount")] * 5), "not working", "yours", "UnknownAccount"),
    (
        "the app is wrong in many ways",
        seen([request(400, "BadOption")] * 5 + [request(400, "BadTarget")] * 4 + [request(403, "BrowserRefused")] * 9),
        *("not working", "yours", "9 of 18 requests lately: BrowserRefused"),
    ),
    ("the proxy fails", seen([request(500, "InternalError")] * 2), "not working", "the proxy's", "InternalError"),
    (
        "a bad configuration",
        seen(configuration={**CONFIGURATION, "problems": ["acounts: unknown"]}),
        *("degraded", "yours", "The newest configuration was refused"),
    ),
    ("Redis is gone", seen(store_is_up=False), "degraded", "yours", "Redis"),
    ("a client secret is too old", seen(secrets_left={"main": -1.0}), "degraded", "yours", "past its 180 days"),
]


@pytest.mark.parametrize(
    ("given", "state", "whose", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_what_is_wrong_is_said_with_whose_fault_it_is(given: Snapshot, state: str, whose: str, says: str) -> None:
    diagnosis = diagnose(given)
    assert (diagnosis.state, diagnosis.responsible) == (state, whose)
    assert says in diagnosis.summary
    assert diagnosis.remedy.endswith(".")


@pytest.mark.parametrize(
    "given",
    [
        seen([request(404)] * 9),  # an answer to what the app asked
        seen([request(499, "ClientLeft")] * 9),
        seen([request(503, ago=400.0)] * 9),  # long ago
        seen([request(503, ago=200.0)] * 9 + [request()] * 9),  # over: enough came since
        seen([request()] * 99 + [request(503)]),
        seen([request(400, "RegionRequired")]),  # the first call of all
        seen([request()] * 2 + [request(400, "BadOption")] * 5 + [request(403, "BrowserRefused")] * 5),
        seen(secrets_left={"main": 86400.0 * 3}),
        seen(configuration={**CONFIGURATION, "needs_restart": ["admin"]}),
    ],
)
def test_little_things_are_remarks(given: Snapshot) -> None:
    assert diagnose(given).state == "working"


def test_mistakes_of_apps_are_to_be_known_and_each_says_what_to_do() -> None:
    diagnosis = diagnose(seen([request()] * 9 + [request(400, "RegionRequired"), request(403, "BrowserRefused")]))
    assert (diagnosis.state, diagnosis.responsible) == ("working", None)
    assert diagnosis.summary == "Working: 11 requests lately. 2 things to know below."
    assert [other.remedy for other in diagnosis.others] == [RegionRequired.remedy, BrowserRefused.remedy]
    diagnosis = diagnose(seen([request()] * 9 + [request(400, "BadOption"), request(503)]))
    assert (diagnosis.state, diagnosis.responsible, len(diagnosis.others)) == ("degraded", "Amazon's", 1)


def test_the_worst_comes_first_and_the_rest_is_not_lost() -> None:
    diagnosis = diagnose(seen([request()] * 9 + [request(503)], tokens=[REFUSED], store_is_up=False))
    assert (diagnosis.state, diagnosis.responsible) == ("not working", "yours")
    assert [other.responsible for other in diagnosis.others] == ["Amazon's", "yours"]


def test_beginning_and_end_are_states_of_their_own() -> None:
    assert diagnose(seen(state="starting", waiting_for="the tokens (warm_up)")) == Diagnosis(
        "starting", None, "Starting: waiting for the tokens (warm_up).", "Wait; see below.", []
    )
    assert diagnose(seen(state="stopping")).state == "stopping"


def test_many_accounts_are_named_by_two() -> None:
    rows = [REFUSED._replace(account=f"a{number}") for number in range(40)]
    assert "of a0 in eu, a1 in eu and 38 more (invalid_grant)" in diagnose(seen(tokens=rows)).summary


def test_every_error_is_somebodys_fault() -> None:
    assert [
        name_of(request(*each)) for each in ((200,), (404,), (429,), (500,), (403, "", "role"), (499, "ClientLeft"))
    ] == [*("", "", "429", "500", "role", "")]
    assert [
        responsible_for(name) for name in ("429", "503", "role", "TokenUnavailable", "ConnectTimeout", "InternalError")
    ] == [*("yours", "Amazon's", "yours", "Amazon's", "the network's", "the proxy's")]
