"""Whether a refused token is worth replacing: once, ever more rarely where that does not help, hardly in a storm."""

import pytest

from proxy.request.tokens import refresh_backoff as backoff_module
from proxy.request.tokens.refresh_backoff import FIRST_PAUSE, MAX_PAUSE, STORM, STORM_PAUSE, RefreshBackoff
from tests.support.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def backoff(clock: FakeClock) -> RefreshBackoff:
    return RefreshBackoff(clock)


def refuse(backoff: RefreshBackoff, *credentials: str) -> None:
    for token_key in credentials:
        backoff.record_result(token_key, object(), accepted=False)


def test_a_credential_without_a_history_may_be_replaced(backoff: RefreshBackoff) -> None:
    assert backoff.allows("acme")
    assert not backoff.was_rejected("acme", object())


def test_the_pause_doubles_with_each_successor_that_is_refused(backoff: RefreshBackoff, clock: FakeClock) -> None:
    pauses = []
    for _ in range(8):
        refuse(backoff, "acme")
        backoff.record_result("other", object(), accepted=True)  # no storm: others work
        begin = clock()
        while not backoff.allows("acme"):
            clock.advance(1)
        pauses.append(clock() - begin)
    assert pauses == [min(FIRST_PAUSE * 2**count, MAX_PAUSE) for count in range(8)]


def test_many_refused_with_one_successor_counts_once(backoff: RefreshBackoff, clock: FakeClock) -> None:
    token = object()
    for _ in range(100):
        backoff.record_result("acme", token, accepted=False)
    assert backoff.was_rejected("acme", token)
    clock.advance(FIRST_PAUSE)
    assert backoff.allows("acme")
    assert backoff.allows("other"), "one token is no storm"


def test_in_a_storm_single_probes_look_for_its_end(backoff: RefreshBackoff, clock: FakeClock) -> None:
    refuse(backoff, *(f"a{number}" for number in range(STORM)))
    assert not backoff.allows("fresh")
    clock.advance(STORM_PAUSE)
    assert [backoff.allows(f"b{number}") for number in range(10)] == [True] + [False] * 9
    backoff.record_result("b0", object(), accepted=False)
    clock.advance(STORM_PAUSE)
    assert not backoff.allows("fresh"), "the probes become rarer"
    clock.advance(STORM_PAUSE * 2)
    assert backoff.allows("fresh")
    backoff.record_result("fresh", object(), accepted=True)
    assert [backoff.allows(f"c{number}") for number in range(10)] == [True] * 10


def test_what_is_remembered_is_bounded(backoff: RefreshBackoff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module, "MAX_TRACKED", 10)
    refuse(backoff, *(f"a{number}" for number in range(100)))
    assert len(backoff._rejections) == 10
