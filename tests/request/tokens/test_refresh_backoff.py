"""Whether a refused token is worth replacing: once, ever more rarely where that does not help, hardly in a storm."""

import pytest

from proxy.request.tokens import refresh_backoff as doubts_module
from proxy.request.tokens.refresh_backoff import FIRST_PAUSE, LONGEST_PAUSE, STORM, STORM_PAUSE, Doubts
from tests.support.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def doubts(clock: FakeClock) -> Doubts:
    return Doubts(clock)


def refuse(doubts: Doubts, *credentials: str) -> None:
    for credential in credentials:
        doubts.judge(credential, object(), accepted=False)


def test_a_credential_without_a_history_may_be_replaced(doubts: Doubts) -> None:
    assert doubts.permits("acme")
    assert not doubts.is_refused("acme", object())


def test_the_pause_doubles_with_each_successor_that_is_refused(doubts: Doubts, clock: FakeClock) -> None:
    pauses = []
    for _ in range(8):
        refuse(doubts, "acme")
        doubts.judge("other", object(), accepted=True)  # no storm: others work
        begin = clock()
        while not doubts.permits("acme"):
            clock.advance(1)
        pauses.append(clock() - begin)
    assert pauses == [min(FIRST_PAUSE * 2**count, LONGEST_PAUSE) for count in range(8)]


def test_a_crowd_refused_with_one_successor_counts_once(doubts: Doubts, clock: FakeClock) -> None:
    token = object()
    for _ in range(100):
        doubts.judge("acme", token, accepted=False)
    assert doubts.is_refused("acme", token)
    clock.advance(FIRST_PAUSE)
    assert doubts.permits("acme")
    assert doubts.permits("other"), "one token is no storm"


def test_in_a_storm_single_probes_look_for_its_end(doubts: Doubts, clock: FakeClock) -> None:
    refuse(doubts, *(f"a{number}" for number in range(STORM)))
    assert not doubts.permits("fresh")
    clock.advance(STORM_PAUSE)
    assert [doubts.permits(f"b{number}") for number in range(10)] == [True] + [False] * 9
    doubts.judge("b0", object(), accepted=False)
    clock.advance(STORM_PAUSE)
    assert not doubts.permits("fresh"), "the probes become rarer"
    clock.advance(STORM_PAUSE * 2)
    assert doubts.permits("fresh")
    doubts.judge("fresh", object(), accepted=True)
    assert [doubts.permits(f"c{number}") for number in range(10)] == [True] * 10


def test_what_is_remembered_is_bounded(doubts: Doubts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts_module, "MOST_KEPT", 10)
    refuse(doubts, *(f"a{number}" for number in range(100)))
    assert len(doubts._doubts) == 10
