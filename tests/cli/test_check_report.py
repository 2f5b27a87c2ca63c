"""How the findings of check --live are shown: the same trouble once, progress that does not flood a log."""

import json
from io import StringIO

import pytest

from proxy.cli.advice import diagnose_connection_error
from proxy.cli.check_report import (
    FILE_INTERVAL,
    TERMINAL_INTERVAL,
    AccountRegion,
    CheckResult,
    Progress,
    Report,
    as_json,
    as_text,
)
from tests.support.clock import FakeClock

PLACES = [AccountRegion(f"shop{number}", "eu") for number in range(8)]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def refused(place: AccountRegion) -> CheckResult:
    said = f"Login with Amazon refuses account {place.account} in eu: invalid_grant"
    return CheckResult("token", "failed", "main", *place, code="invalid_grant", detail=said, advice="Authorise again.")


def report(*findings: CheckResult, done: int = len(PLACES), is_whole: bool = True) -> Report:
    return Report(PLACES, list(findings), done, is_whole)


def test_the_same_trouble_is_told_once() -> None:
    text = as_text(report(*map(refused, PLACES)))
    assert text.count("Authorise again.") == 1
    assert "shop0 eu token, shop1 eu token, shop2 eu token, shop3 eu token, shop4 eu token and 3 more:" in text
    assert "invalid_grant: Login with Amazon refuses them: invalid_grant" in text
    assert text.endswith("0 of 8 accounts and regions work.")
    assert "refuses account shop0 in eu: invalid_grant" in as_text(report(refused(PLACES[0])))


def test_what_was_not_tried_is_no_success() -> None:
    not_tried = CheckResult(
        "call", "not tried", "main", *PLACES[0], code="token_missing", detail="there is no token for it"
    )
    assert not report(not_tried).ok
    assert report(CheckResult("clock", "warning", code="clock")).ok
    assert not report(is_whole=False, done=3).ok
    assert as_text(report(is_whole=False, done=3)).endswith("Interrupted: 3 of 8 were looked at.")


def test_programs_get_the_same_keys_for_every_step() -> None:
    response = json.loads(as_json(report(refused(PLACES[0]), CheckResult("connection", "ok", host="api.amazon.com"))))
    assert (response["works"], response["complete"]) == (False, True)
    keys = ["step", "result", "application", "account", "region", "host", "code", "said", "advice", "countries"]
    assert [list(check) for check in response["checks"]] == [keys, keys]


def test_progress_is_a_line_every_few_seconds_where_nobody_looks() -> None:
    clock, stream, found = FakeClock(), StringIO(), report(done=0)
    progress = Progress(found, stream, clock)
    for found.completed in range(1, 9):
        clock.advance(FILE_INTERVAL / 2)
        progress.update()
    progress.clear()
    assert stream.getvalue().splitlines() == [f"checked {done} of 8, 0 with trouble" for done in (2, 4, 6, 8)]


def test_progress_is_one_line_at_a_terminal_and_gone_in_the_end() -> None:
    clock, stream, found = FakeClock(), Terminal(), report(refused(PLACES[0]), done=1)
    progress = Progress(found, stream, clock)
    progress.update()
    found.completed = 2
    progress.update()
    assert stream.getvalue() == "\rchecked 1 of 8, 1 with trouble"
    for _ in range(2):
        clock.advance(TERMINAL_INTERVAL)
        progress.update()
    progress.clear()
    last = "checked 2 of 8, 1 with trouble"
    assert stream.getvalue() == f"\rchecked 1 of 8, 1 with trouble\r{last}\r{'':<{len(last)}}\r"


def test_quick_looks_say_nothing_in_a_file() -> None:
    stream = StringIO()
    progress = Progress(report(), stream, FakeClock())
    progress.update()
    progress.clear()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (TimeoutError(), "timeout"),
        (ConnectionResetError(), "broken"),
        (OSError(101, "Network is unreachable"), "unreachable"),
    ],
)
@pytest.mark.parametrize("by_proxy", [False, True])
def test_what_keeps_a_connection_from_coming_about_has_advice(exc: OSError, code: str, by_proxy: bool) -> None:
    found, said, advice = diagnose_connection_error(exc, by_proxy=by_proxy)
    assert found == code
    assert said
    assert ("the forward proxy (" in advice) is by_proxy
    assert "pool.proxy or HTTPS_PROXY" in advice
