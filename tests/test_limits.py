"""The usage plans: never faster than Amazon allows, first come first served, and corrected by what Amazon says."""

import asyncio
import math
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.amazon.operations import load_table
from proxy.config import Config
from proxy.errors import BadOption, UsagePlanExhausted
from proxy.metrics import Metrics
from proxy.request.guard import Doorway, admit
from proxy.request.identify import Target, identify
from proxy.request.limits import Bucket, Limits, parse_max_wait, parse_rate
from tests.clock import FakeClock
from tests.conftest import config_from

TABLE = load_table()
ORDERS = "/orders/v0/orders"
FEEDS = "/feeds/2021-06-30/feeds"

RATES = st.floats(1e-3, 1e3)
BURSTS = st.integers(1, 100).map(float)
STEPS = st.lists(st.floats(0, 100), min_size=1, max_size=80)


# The arithmetic.


def test_a_full_bucket_lets_its_burst_go_at_once_and_then_one_at_a_time() -> None:
    bucket = Bucket.full(rate=0.5, burst=3, now=0)
    assert [bucket.take(0) for _ in range(6)] == [0, 0, 0, 2, 4, 6]


def test_a_bucket_fills_up_to_its_burst_and_no_further() -> None:
    bucket = Bucket.full(rate=1, burst=2, now=0)
    assert [bucket.take(1000), bucket.take(1000), bucket.take(1000)] == [0, 0, 1]


def test_a_place_that_is_given_back_is_there_for_the_next() -> None:
    bucket = Bucket.full(rate=1, burst=1, now=0)
    assert [bucket.take(0), bucket.take(0)] == [0, 1]
    bucket.give_back()
    assert bucket.take(0) == 1
    bucket = Bucket.full(rate=1, burst=1, now=0)
    bucket.give_back()
    assert [bucket.take(0), bucket.take(0)] == [0, 1]


def test_an_empty_bucket_makes_the_next_wait_and_forgives_no_debt() -> None:
    bucket = Bucket.full(rate=2, burst=10, now=0)
    bucket.empty(0)
    assert bucket.take(0) == 0.5
    assert bucket.take(0) == 1.0
    bucket.empty(0)
    assert bucket.take(0) == 1.5


def assert_within_plan(starts: list[float], rate: float, burst: float) -> None:
    """No window may hold more calls than its length gives places, and the burst."""
    starts = sorted(starts)
    for first, begin in enumerate(starts):
        for last in range(first, len(starts)):
            length = starts[last] - begin
            assert last - first + 1 <= rate * length + burst + 1e-6 * (1 + rate * length)


@given(rate=RATES, burst=BURSTS, steps=STEPS)
@example(rate=0.0056, burst=20.0, steps=[0.0] * 30)
def test_no_window_ever_sees_more_than_rate_times_its_length_plus_the_burst(
    rate: float, burst: float, steps: list[float]
) -> None:
    bucket = Bucket.full(rate, burst, 0)
    assert_within_plan([now + bucket.take(now) for now in accumulate(steps)], rate, burst)


@given(rate=RATES, burst=BURSTS, steps=STEPS, refused=st.data())
def test_calls_that_are_refused_at_once_leave_the_plan_as_it_was(
    rate: float, burst: float, steps: list[float], refused: st.DataObject
) -> None:
    bucket = Bucket.full(rate, burst, 0)
    starts = []
    for now in accumulate(steps):
        wait = bucket.take(now)
        if wait > 0 and refused.draw(st.booleans()):
            bucket.give_back()
        else:
            starts.append(now + wait)
    assert_within_plan(starts, rate, burst)


@given(
    rate=st.floats(0.01, 10),
    burst=st.integers(1, 5).map(float),
    actions=st.lists(st.tuples(st.floats(0, 10), st.none() | st.integers(0, 9)), max_size=40),
)
@example(rate=0.5, burst=1.0, actions=[(0, None), (0, None), (0, None), (0, 0), (0, None)])
def test_no_window_sees_more_when_callers_leave_while_they_wait(
    rate: float, burst: float, actions: list[tuple[float, int | None]]
) -> None:
    bucket = Bucket.full(rate, burst, 0)
    now = 0.0
    starts: list[float] = []
    for step, leaver in actions:
        now += step
        waiting = [start for start in starts if start > now]
        if leaver is None:
            starts.append(now + bucket.take(now))
        elif leaver < len(waiting):
            # Everybody behind moves up, so that it is the last place that becomes free.
            starts.remove(waiting[-1])
            bucket.give_back()
    assert_within_plan(starts, rate, burst)


@given(rate=RATES, burst=BURSTS, steps=STEPS)
def test_who_comes_first_goes_first(rate: float, burst: float, steps: list[float]) -> None:
    bucket = Bucket.full(rate, burst, 0)
    starts = [now + bucket.take(now) for now in accumulate(steps)]
    assert all(earlier <= later + 1e-6 * (1 + later) for earlier, later in pairwise(starts))


@given(rate=RATES, burst=BURSTS, steps=STEPS, taken=st.integers(1, 20))
def test_taking_and_giving_back_changes_nothing_for_the_next(
    rate: float, burst: float, steps: list[float], taken: int
) -> None:
    bucket, other = Bucket.full(rate, burst, 0), Bucket.full(rate, burst, 0)
    for now in accumulate(steps):
        assert bucket.take(now) == pytest.approx(other.take(now), rel=1e-6, abs=1e-6 / rate)
        for _ in range(taken):
            other.take(now)
        for _ in range(taken):
            other.give_back()


@given(
    rate=RATES,
    burst=BURSTS,
    actions=st.lists(st.tuples(st.sampled_from(["take", "give_back", "empty"]), st.floats(-1000, 1000)), max_size=60),
)
def test_a_clock_that_jumps_back_adds_nothing_and_never_more_than_the_burst_is_there(
    rate: float, burst: float, actions: list[tuple[str, float]]
) -> None:
    bucket = Bucket.full(rate, burst, 0)
    latest = 0.0
    taken = given_back = 0
    for action, now in actions:
        if action != "give_back":
            latest = max(latest, now)
        if action == "take":
            taken += 1
            assert bucket.take(now) >= 0
        elif action == "give_back":
            given_back += 1
            bucket.give_back()
        else:
            bucket.empty(now)
            assert bucket.tokens <= 0
        assert bucket.tokens <= burst
        assert bucket.updated == latest
    assert bucket.tokens <= burst + rate * latest - taken + given_back + 1e-6 * (1 + rate * latest)


def test_a_clock_that_goes_back_takes_nothing_away_either() -> None:
    bucket = Bucket.full(rate=1, burst=5, now=1000)
    assert [bucket.take(0) for _ in range(5)] == [0] * 5
    assert bucket.take(0) == 1
    assert bucket.take(1000) == 2


# What headers say.


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("0.0167", 0.0167),
        ("5", 5.0),
        ("5.0", 5.0),
        (".5", 0.5),
        ("1e-3", 0.001),
        (" 2.0 ", 2.0),
        ("10000", 10000.0),
        ("0.00001", 0.00001),
        ("", None),
        ("n", None),
        ("n/a", None),
        ("0", None),
        ("0.0", None),
        ("-1", None),
        ("-0.5", None),
        ("NaN", None),
        ("nan", None),
        ("inf", None),
        ("-inf", None),
        ("1e309", None),
        ("1e9", None),
        ("1e-9", None),
        ("10001", None),
        ("1,5", None),
        ("1.2.3", None),
        ("0x10", None),
        ("5 per second", None),
        ("5.0, 5.0", None),
        ("9" * 10_000, None),
        ("1." + "0" * 10_000, None),
        ("\x00", None),
        ("٣", None),
        ("1_0", None),
    ],
)
def test_a_rate_is_a_number_that_a_usage_plan_can_have(text: str, rate: float | None) -> None:
    assert parse_rate(text) == rate


@given(st.text() | st.floats().map(str))
def test_no_rate_whatever_is_outside_what_a_plan_can_have(text: str) -> None:
    rate = parse_rate(text)
    assert rate is None or 1e-5 <= rate <= 1e4


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 10.0),
        ("0", 0.0),
        ("0s", 0.0),
        ("500ms", 0.5),
        ("2m", 120.0),
        ("30", 30.0),
        ("1.5s", 1.5),
        (" 3s ", 3.0),
        ("1h", 3600.0),
        ("2h", 3600.0),
        ("1d", 3600.0),
    ],
)
def test_a_caller_says_how_long_a_call_may_wait_and_an_hour_is_the_longest(text: str | None, seconds: float) -> None:
    assert parse_max_wait(text, 10.0) == seconds


@pytest.mark.parametrize(
    "text", ["", "-1s", "soon", "NaN", "inf", "1e3", "1 s", "10s, 10s", "9" * 5000, "400d", "٣s", "\x00"]
)
def test_a_wait_that_means_nothing_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(BadOption) as caught:
        parse_max_wait(text, 10.0)
    assert "x-sp-max-wait" in caught.value.message
    assert "500ms" in caught.value.hint
    assert not text or text not in caught.value.message


# Plans kept apart, learnt and waited for.


def config(folder: Path, **changed: Any) -> Config:
    settings = {
        "applications": {"main": {"client_id": "c", "client_secret": "s"}},
        "accounts": {
            "acme": {"refresh_tokens": {"na": "a", "eu": "b"}},
            "zeta": {"refresh_tokens": {"eu": "z"}},
            "test": {"refresh_tokens": {"eu": "t"}, "environment": "sandbox"},
        },
        **changed,
    }
    return config_from(settings, folder)


def target(
    config: Config, path: str = ORDERS, account: str = "acme", region: str = "eu", method: str = "GET"
) -> Target:
    headers = CIMultiDictProxy(CIMultiDict({"Host": "localhost", "x-sp-account": account, "x-sp-region": region}))
    admitted = admit(method, path, headers, Doorway.of(config.listen[0], config))
    return identify(method, admitted, headers, config.listen[0], config, TABLE)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def limits(clock: FakeClock) -> Limits:
    return Limits(Metrics(), pace=True, now=clock)


async def drain(limits: Limits, target: Target) -> int:
    """Take every place that is there without waiting; return how many there were."""
    for taken in range(1000):
        try:
            await limits.admit(target, 0)
        except UsagePlanExhausted:
            return taken
    raise AssertionError("the plan has no end")


async def test_a_call_over_the_plan_is_refused_at_once_with_the_time_to_come_back(
    tmp_path: Path, limits: Limits, clock: FakeClock
) -> None:
    orders = target(config(tmp_path))
    assert orders.operation is not None
    assert orders.operation.rate is not None
    assert await drain(limits, orders) == orders.operation.burst == 20
    with pytest.raises(UsagePlanExhausted) as caught:
        await limits.admit(orders, 10)
    error = caught.value
    assert (error.status, error.headers()["Retry-After"]) == (429, str(math.ceil(1 / orders.operation.rate)))
    assert "this call may wait 10 s" in error.message
    assert "x-sp-max-wait: " in error.hint
    clock.advance(1.01 / orders.operation.rate)
    assert await limits.admit(orders, 0) == 0


async def test_plans_are_apart_by_account_region_operation_and_environment(tmp_path: Path, limits: Limits) -> None:
    settings = config(tmp_path)
    acme = target(settings)
    await drain(limits, acme)
    for other in (
        target(settings, account="zeta"),
        target(settings, region="na"),
        target(settings, path=f"{ORDERS}/902-1"),
        target(settings, path=FEEDS, method="POST"),
        target(settings, path=FEEDS),
        target(settings, account="test"),
    ):
        assert await limits.admit(other, 0) == 0
    for same in (target(settings, path=f"{ORDERS}?MarketplaceIds=A1PA6795UKMFR9"), acme):
        with pytest.raises(UsagePlanExhausted):
            await limits.admit(same, 0)


async def test_the_sandbox_has_one_plan_for_everything(tmp_path: Path, limits: Limits) -> None:
    settings = config(tmp_path)
    assert await drain(limits, target(settings, account="test")) == 15
    for path in (FEEDS, "/unknown/v1/path"):
        with pytest.raises(UsagePlanExhausted):
            await limits.admit(target(settings, path=path, account="test"), 0)


async def test_an_unknown_operation_has_no_plan_and_never_waits(tmp_path: Path, limits: Limits) -> None:
    unknown = target(config(tmp_path), path="/unknown/v1/path")
    assert [await limits.admit(unknown, 0) for _ in range(100)] == [0.0] * 100
    limits.learn(unknown, 429, "0.5")
    assert await limits.admit(unknown, 0) == 0


async def test_without_pace_nothing_waits_and_rates_are_learnt_all_the_same(tmp_path: Path, clock: FakeClock) -> None:
    metrics = Metrics()
    limits = Limits(metrics, pace=False, now=clock)
    orders = target(config(tmp_path))
    assert [await limits.admit(orders, 0) for _ in range(100)] == [0.0] * 100
    limits.learn(orders, 200, "0.25")
    where = {"account": "acme", "region": "eu", "operation": orders.operation_name}
    assert metrics.registry.get_sample_value("spapi_proxy_usage_plan_rate", where) == 0.25


async def test_a_call_waits_for_its_place_and_says_how_long(tmp_path: Path, limits: Limits) -> None:
    orders = target(config(tmp_path))
    limits.learn(orders, 200, "10000")
    await drain(limits, orders)
    assert 0.0001 <= await limits.admit(orders, 10) < 0.5


async def test_a_caller_who_leaves_gives_its_place_back(tmp_path: Path, limits: Limits, clock: FakeClock) -> None:
    orders = target(config(tmp_path))
    await drain(limits, orders)
    waiting = asyncio.create_task(limits.admit(orders, 3600))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert orders.operation is not None
    assert orders.operation.rate is not None
    clock.advance(1.01 / orders.operation.rate)
    assert await limits.admit(orders, 0) == 0


async def test_who_leaves_lets_those_behind_move_up_and_nobody_shares_a_place(tmp_path: Path, limits: Limits) -> None:
    call = target(config(tmp_path))
    limits.learn(call, 200, "20")  # a place every 50 ms
    await drain(limits, call)
    waits: dict[str, float] = {}

    async def wait(name: str) -> None:
        waits[name] = await limits.admit(call, 10)

    first, *_ = tasks = [asyncio.create_task(wait(name)) for name in ("first", "second", "third")]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(wait("last")))
    await asyncio.gather(*tasks, return_exceptions=True)
    assert list(waits) == ["second", "third", "last"]
    assert waits["second"] == pytest.approx(0.05, abs=0.04)
    assert waits["third"] - waits["second"] == pytest.approx(0.05, abs=0.03)
    assert waits["last"] - waits["third"] == pytest.approx(0.05, abs=0.03)


async def test_a_refused_call_takes_no_place(tmp_path: Path, limits: Limits) -> None:
    orders = target(config(tmp_path))
    await drain(limits, orders)
    retries = set()
    for _ in range(50):
        with pytest.raises(UsagePlanExhausted) as caught:
            await limits.admit(orders, 1)
        retries.add(caught.value.headers()["Retry-After"])
    assert len(retries) == 1


async def test_a_429_empties_the_bucket_and_is_counted(tmp_path: Path, clock: FakeClock) -> None:
    metrics = Metrics()
    limits = Limits(metrics, pace=True, now=clock)
    orders = target(config(tmp_path))
    limits.learn(orders, 429, None)
    with pytest.raises(UsagePlanExhausted):
        await limits.admit(orders, 0)
    where = {"account": "acme", "region": "eu", "operation": orders.operation_name}
    assert metrics.registry.get_sample_value("spapi_proxy_upstream_throttled_total", where) == 1
    assert metrics.registry.get_sample_value("spapi_proxy_limit_refused_total", where) == 1


@pytest.mark.parametrize("header", [None, "", "n", "NaN", "-1", "0", "1e309", "9" * 10_000])
async def test_an_answer_without_a_usable_rate_changes_nothing(
    tmp_path: Path, limits: Limits, clock: FakeClock, header: str | None
) -> None:
    orders = target(config(tmp_path))
    limits.learn(orders, 200, header)
    assert await drain(limits, orders) == 20
    assert orders.operation is not None
    assert orders.operation.rate is not None
    clock.advance(1.01 / orders.operation.rate)
    assert await drain(limits, orders) == 1


async def test_the_rate_that_amazon_names_counts_from_then_on(tmp_path: Path, limits: Limits, clock: FakeClock) -> None:
    settings = config(tmp_path)
    orders = target(settings)
    await drain(limits, orders)
    limits.learn(orders, 200, "2.0")
    clock.advance(1)
    assert await drain(limits, orders) == 2
    other = target(settings, account="zeta")
    await drain(limits, other)
    clock.advance(1)
    assert await drain(limits, other) == 0


async def test_one_tiny_rate_does_not_stop_an_operation_for_a_day(
    tmp_path: Path, limits: Limits, clock: FakeClock
) -> None:
    orders = target(config(tmp_path))
    await drain(limits, orders)
    limits.learn(orders, 200, "0.00001")
    assert orders.operation is not None
    assert orders.operation.rate is not None
    clock.advance(100.1 / orders.operation.rate)
    assert await drain(limits, orders) == 1


async def test_a_rate_named_in_the_sandbox_leaves_its_plan_alone(
    tmp_path: Path, limits: Limits, clock: FakeClock
) -> None:
    sandbox = target(config(tmp_path), account="test")
    await drain(limits, sandbox)
    limits.learn(sandbox, 200, "0.001")
    clock.advance(1)
    assert await drain(limits, sandbox) == 5
