"""The arithmetic of usage plans: never more than rate x t + burst, fair turns, and rates learnt from 429s."""

from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.request.ratelimit.token_bucket import (
    BACKGROUND_PENALTY,
    LOWER,
    PROBE_AFTER,
    RAISE,
    RAISE_AFTER,
    Bucket,
    FairQueue,
    RateEstimator,
)

RATES = st.floats(1e-3, 1e3)
BURSTS = st.integers(1, 100).map(float)
STEPS = st.lists(st.floats(0, 100), min_size=1, max_size=80)


def test_a_full_bucket_lets_its_burst_go_at_once_and_then_one_at_a_time() -> None:
    bucket = Bucket.full(rate=0.5, burst=3, now=0)
    for _ in range(3):
        assert bucket.wait(0) == 0
        bucket.consume()
    assert [bucket.wait(0, ahead) for ahead in range(3)] == pytest.approx([2.05, 4.05, 6.05])
    assert bucket.wait(2) == 0


def test_a_bucket_fills_up_to_its_burst_and_no_further() -> None:
    bucket = Bucket.full(rate=1, burst=2, now=0)
    bucket.consume()
    assert bucket.wait(1000) == 0
    assert bucket.tokens == 2


def test_the_margin_is_paid_once_and_not_for_each_call() -> None:
    bucket = Bucket.full(rate=5, burst=10, now=0)
    bucket.tokens, now, moments = 0.0, 0.0, []
    for _ in range(50):
        now += bucket.wait(now)
        bucket.consume()
        moments.append(now)
    assert moments[-1] - moments[0] == pytest.approx(49 / 5)


@pytest.mark.parametrize(
    ("rate", "burst", "margin"), [(0.0167, 20, 0.05), (5, 10, 0.05), (500, 50, 0.049), (1, 1, 0.02), (5, 1, 0.004)]
)
def test_the_margin_is_small_and_smaller_where_it_is_paid_for_each_call(
    rate: float, burst: float, margin: float
) -> None:
    assert Bucket.full(rate, burst, 0).margin == pytest.approx(margin)


def test_a_place_that_is_given_back_is_there_for_the_next_and_no_more() -> None:
    bucket = Bucket.full(rate=1, burst=1, now=0)
    bucket.consume()
    bucket.refund()
    bucket.refund()
    assert bucket.tokens == 1


def test_an_empty_bucket_makes_the_next_wait_and_forgives_no_debt() -> None:
    bucket = Bucket.full(rate=2, burst=10, now=0)
    bucket.empty(0)
    assert bucket.wait(0) == pytest.approx(0.5 + bucket.margin)
    bucket.tokens = -1
    bucket.empty(0)
    assert bucket.tokens == -1


@given(rate=RATES, burst=BURSTS, steps=STEPS)
@example(rate=0.0056, burst=20.0, steps=[0.0] * 30)
def test_no_window_ever_sees_more_than_rate_times_its_length_plus_the_burst(
    rate: float, burst: float, steps: list[float]
) -> None:
    bucket, starts, now = Bucket.full(rate, burst, 0), [], 0.0
    for moment in accumulate(steps):
        now = max(now, moment)
        now += bucket.wait(now)
        bucket.consume()
        starts.append(now)
    for first, begin in enumerate(starts):
        for last in range(first, len(starts)):
            length = starts[last] - begin
            assert last - first + 1 <= rate * length + burst + 1e-6 * (1 + rate * length)


@given(
    rate=RATES,
    burst=BURSTS,
    actions=st.lists(st.tuples(st.sampled_from(["take", "give_back", "empty"]), st.floats(-1000, 1000)), max_size=60),
)
def test_a_clock_that_jumps_back_adds_nothing_and_never_more_than_the_burst_is_there(
    rate: float, burst: float, actions: list[tuple[str, float]]
) -> None:
    bucket, latest = Bucket.full(rate, burst, 0), 0.0
    for action, now in actions:
        if action == "give_back":
            bucket.refund()
        elif action == "empty":
            bucket.empty(now)
            assert bucket.tokens <= 0
        elif bucket.wait(now) == 0:
            bucket.consume()
        latest = latest if action == "give_back" else max(latest, now)
        assert bucket.tokens <= burst
        assert bucket.updated == latest


# Who is next.


def order_of(queue: FairQueue[str]) -> list[str]:
    went = []
    while len(queue):
        name = queue.first()[2]
        queue.pop(name.split()[0])
        went.append(name)
    return went


def add(queue: FairQueue[str], caller: str, name: str, *, background: bool = False) -> tuple[float, int, str]:
    return queue.add(caller, queue.next_virtual_time(caller, background=background), f"{caller} {name}")


@given(st.lists(st.sampled_from("abcd"), max_size=60))
def test_each_caller_is_first_come_first_served_and_callers_take_turns(callers: list[str]) -> None:
    queue: FairQueue[str] = FairQueue()
    for number, caller in enumerate(callers):
        its_round = queue.next_virtual_time(caller)
        ahead = queue.position(its_round)
        queue.add(caller, its_round, f"{caller} {number}")
        assert queue._order[ahead][2] == f"{caller} {number}", "it is known how many go before"
    went = order_of(queue)
    assert sorted(went) == sorted(f"{caller} {number}" for number, caller in enumerate(callers))
    for caller in "abcd":
        numbers = [int(name.split()[1]) for name in went if name[0] == caller]
        assert numbers == sorted(numbers)
    for index in range(len(went)):
        served = {caller: sum(name[0] == caller for name in went[:index]) for caller in callers}
        rest = {caller: sum(name[0] == caller for name in went[index:]) for caller in callers}
        still = [served[caller] for caller in served if rest[caller]]
        assert not still or max(served.values()) - min(still) <= 1, "nobody is two ahead of one who still waits"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40), st.lists(st.integers(0, 100), max_size=40)
)
def test_who_leaves_is_gone_and_the_others_stay(calls: list[tuple[str, bool]], leavers: list[int]) -> None:
    queue: FairQueue[str] = FairQueue()
    entries = [(caller, add(queue, caller, str(number))) for number, (caller, _) in enumerate(calls)]
    for leaver in leavers:
        if entries:
            caller, entry = entries.pop(leaver % len(entries))
            queue.remove(caller, entry)
    assert sorted(order_of(queue)) == sorted(entry[2] for _, entry in entries)
    assert not queue._last, "nothing is remembered of callers who do not wait"


def test_a_background_call_lets_some_rounds_pass_and_then_goes() -> None:
    queue: FairQueue[str] = FairQueue()
    add(queue, "late", "0", background=True)
    served = []
    for number in range(BACKGROUND_PENALTY * 2):
        add(queue, "busy", str(number))
        name = queue.first()[2]
        queue.pop(name.split()[0])
        served.append(name)
    assert served.index("late 0") == pytest.approx(BACKGROUND_PENALTY, abs=1)


# What the rate is thought to be.


def test_an_announced_rate_is_believed_and_429s_do_not_change_it() -> None:
    estimate = RateEstimator(rate=5, known=5, min_rate=0.05)
    estimate.announce(2)
    estimate.on_429(0)
    for _ in range(1000):
        estimate.on_success()
    assert (estimate.rate, estimate.known) == (2, 2)
    estimate.announce(0.0001)
    assert estimate.rate == 0.05, "within reason"


def test_a_429_lowers_a_guess_once_for_all_that_come_together() -> None:
    estimate = RateEstimator(rate=5, known=5, min_rate=0.05)
    for _ in range(10):
        estimate.on_429(100)
    assert estimate.rate == 5 * LOWER
    estimate.on_429(101)
    assert estimate.rate == pytest.approx(5 * LOWER * LOWER)


def test_no_number_of_429s_stops_a_plan() -> None:
    estimate = RateEstimator(rate=5, known=5, min_rate=0.05)
    for number in range(1000):
        estimate.on_429(number * 1000)
    assert estimate.rate == 0.05


def test_a_lowered_rate_comes_back_to_what_is_known() -> None:
    estimate = RateEstimator(rate=5, known=5, min_rate=0.05)
    estimate.on_429(0)
    rates = []
    for _ in range(RAISE_AFTER * 4):
        estimate.on_success()
        rates.append(estimate.rate)
    assert max(rates) == 5
    assert rates == sorted(rates)


def test_more_than_is_known_is_tried_rarely_and_taken_back_where_it_brings_a_429() -> None:
    estimate = RateEstimator(rate=5, known=5, min_rate=0.05)
    for _ in range(PROBE_AFTER):
        assert estimate.rate == 5
        estimate.on_success()
    assert estimate.rate == 5 * RAISE
    estimate.on_429(0)
    assert estimate.rate == 5
    for _ in range(PROBE_AFTER * 2):
        assert estimate.rate == 5
        estimate.on_success()
    assert estimate.rate == 5 * RAISE


def test_where_there_is_more_it_is_found() -> None:
    estimate, now = RateEstimator(rate=5, known=5, min_rate=0.05), 0.0
    for _ in range(2000):
        now += 1
        if estimate.rate > 10:
            estimate.on_429(now)
        else:
            estimate.on_success()
    assert estimate.rate == pytest.approx(10, rel=0.1)


def test_where_there_is_less_that_is_found_too() -> None:
    estimate, now, throttled = RateEstimator(rate=5, known=5, min_rate=0.05), 0.0, 0
    for _ in range(2000):
        now += 1
        if estimate.rate > 2.5:
            estimate.on_429(now)
            throttled += 1
        else:
            estimate.on_success()
    assert estimate.rate == pytest.approx(2.5, rel=0.15)
    assert throttled < 20
