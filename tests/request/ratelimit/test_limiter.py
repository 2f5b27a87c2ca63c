"""The usage plans: never faster than Amazon allows, first come first served, and corrected by what Amazon says."""

import asyncio
import math
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.amazon.operations import load_table
from proxy.config import Config
from proxy.errors import UsagePlanExhausted
from proxy.observability.metrics import Metrics
from proxy.request.ratelimit import plan
from proxy.request.ratelimit.limiter import RateLimiter, parse_rate
from proxy.request.request_options import AdmissionRequest
from proxy.request.routing import Route, resolve
from proxy.request.validation import AllowedHosts, validate
from tests.conftest import config_from
from tests.support.clock import FakeClock

TABLE = load_table()
ORDERS = "/orders/v0/orders"
FEEDS = "/feeds/2021-06-30/feeds"

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
        ("100000", 100000.0),
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
        ("100001", None),
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
    assert rate is None or 1e-5 <= rate <= 1e5


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


def target(config: Config, path: str = ORDERS, account: str = "acme", region: str = "eu", method: str = "GET") -> Route:
    headers = CIMultiDictProxy(CIMultiDict({"Host": "localhost", "x-sp-account": account, "x-sp-region": region}))
    validated = validate(method, path, headers, AllowedHosts.from_config(config.listen[0], config))
    return resolve(method, validated, headers, config.listen[0], config, TABLE)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def limits(clock: FakeClock) -> RateLimiter:
    return RateLimiter(Metrics(), pace=True, max_queue=1_000_000, now=clock, call_later=clock.call_later)


async def drain(limits: RateLimiter, target: Route) -> int:
    """Take every place that is there without waiting; return how many there were."""
    for taken in range(1000):
        try:
            await limits.acquire(target, AdmissionRequest(0))
        except UsagePlanExhausted:
            return taken
    raise AssertionError("the plan has no end")


async def test_a_call_over_the_plan_is_refused_at_once_with_a_retry_after(
    tmp_path: Path, limits: RateLimiter, clock: FakeClock
) -> None:
    orders = target(config(tmp_path))
    assert orders.operation is not None
    assert orders.operation.rate is not None
    assert await drain(limits, orders) == orders.operation.burst == 20
    with pytest.raises(UsagePlanExhausted) as caught:
        await limits.acquire(orders, AdmissionRequest(10))
    error = caught.value
    assert (error.status, error.headers()["Retry-After"]) == (429, str(math.ceil(1 / orders.operation.rate)))
    assert "this call may wait 10 s" in error.message
    assert "x-sp-max-wait: " in error.hint
    clock.advance(1.01 / orders.operation.rate)
    assert await limits.acquire(orders, AdmissionRequest(0)) == 0


async def test_plans_are_apart_by_account_region_operation_and_environment(tmp_path: Path, limits: RateLimiter) -> None:
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
        assert await limits.acquire(other, AdmissionRequest(0)) == 0
    for same in (target(settings, path=f"{ORDERS}?MarketplaceIds=A1PA6795UKMFR9"), acme):
        with pytest.raises(UsagePlanExhausted):
            await limits.acquire(same, AdmissionRequest(0))


async def test_the_sandbox_has_one_plan_for_everything(tmp_path: Path, limits: RateLimiter) -> None:
    settings = config(tmp_path)
    assert await drain(limits, target(settings, account="test")) == 15
    for path in (FEEDS, "/unknown/v1/path"):
        with pytest.raises(UsagePlanExhausted):
            await limits.acquire(target(settings, path=path, account="test"), AdmissionRequest(0))


async def test_without_pace_nothing_waits_and_rates_are_learnt_all_the_same(tmp_path: Path, clock: FakeClock) -> None:
    metrics = Metrics()
    limits = RateLimiter(metrics, pace=False, now=clock)
    orders = target(config(tmp_path))
    assert [await limits.acquire(orders, AdmissionRequest(0)) for _ in range(100)] == [0.0] * 100
    limits.observe_response(orders, 200, "0.25")
    where = {"account": "acme", "region": "eu", "operation": orders.operation_name}
    assert metrics.registry.get_sample_value("spapi_proxy_usage_plan_rate", where) == 0.25


async def test_a_caller_who_leaves_gives_its_place_back(tmp_path: Path, limits: RateLimiter, clock: FakeClock) -> None:
    orders = target(config(tmp_path))
    await drain(limits, orders)
    waiting = asyncio.create_task(limits.acquire(orders, AdmissionRequest(3600)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert orders.operation is not None
    assert orders.operation.rate is not None
    clock.advance(1.01 / orders.operation.rate)
    assert await limits.acquire(orders, AdmissionRequest(0)) == 0


async def test_a_refused_call_takes_no_place(tmp_path: Path, limits: RateLimiter) -> None:
    orders = target(config(tmp_path))
    await drain(limits, orders)
    retries = set()
    for _ in range(50):
        with pytest.raises(UsagePlanExhausted) as caught:
            await limits.acquire(orders, AdmissionRequest(1))
        retries.add(caught.value.headers()["Retry-After"])
    assert len(retries) == 1


async def test_a_429_empties_the_bucket_and_is_counted(tmp_path: Path, clock: FakeClock) -> None:
    metrics = Metrics()
    limits = RateLimiter(metrics, pace=True, max_queue=1_000_000, now=clock, call_later=clock.call_later)
    orders = target(config(tmp_path))
    limits.observe_response(orders, 429, None)
    with pytest.raises(UsagePlanExhausted):
        await limits.acquire(orders, AdmissionRequest(0))
    where = {"account": "acme", "region": "eu", "operation": orders.operation_name}
    assert metrics.registry.get_sample_value("spapi_proxy_upstream_throttled_total", where) == 1
    assert metrics.registry.get_sample_value("spapi_proxy_limit_refused_total", where) == 1


@pytest.mark.parametrize("header", [None, "", "n", "NaN", "-1", "0", "1e309", "9" * 10_000])
async def test_a_response_without_a_usable_rate_changes_nothing(
    tmp_path: Path, limits: RateLimiter, clock: FakeClock, header: str | None
) -> None:
    orders = target(config(tmp_path))
    limits.observe_response(orders, 200, header)
    assert await drain(limits, orders) == 20
    assert orders.operation is not None
    assert orders.operation.rate is not None
    clock.advance(1.01 / orders.operation.rate)
    assert await drain(limits, orders) == 1


async def test_the_rate_that_amazon_names_counts_from_then_on(
    tmp_path: Path, limits: RateLimiter, clock: FakeClock
) -> None:
    settings = config(tmp_path)
    orders = target(settings)
    await drain(limits, orders)
    limits.observe_response(orders, 200, "2.0")
    clock.advance(1)
    assert await drain(limits, orders) == 2
    other = target(settings, account="zeta")
    await drain(limits, other)
    clock.advance(1)
    assert await drain(limits, other) == 0


async def test_what_came_before_a_new_rate_came_at_the_old_one(
    tmp_path: Path, limits: RateLimiter, clock: FakeClock
) -> None:
    orders = target(config(tmp_path))
    limits.observe_response(orders, 200, "1")
    await drain(limits, orders)
    clock.advance(2.5)
    limits.observe_response(orders, 200, "100")
    assert await drain(limits, orders) == 2


async def test_one_tiny_rate_does_not_stop_an_operation_for_a_day(
    tmp_path: Path, limits: RateLimiter, clock: FakeClock
) -> None:
    orders = target(config(tmp_path))
    await drain(limits, orders)
    limits.observe_response(orders, 200, "0.00001")
    assert orders.operation is not None
    assert orders.operation.rate is not None
    clock.advance(100.1 / orders.operation.rate)
    assert await drain(limits, orders) == 1


async def test_a_rate_named_in_the_sandbox_leaves_its_plan_alone(
    tmp_path: Path, limits: RateLimiter, clock: FakeClock
) -> None:
    sandbox = target(config(tmp_path), account="test")
    await drain(limits, sandbox)
    limits.observe_response(sandbox, 200, "0.001")
    clock.advance(1)
    assert await drain(limits, sandbox) == 5


# Waiting.


async def settle() -> None:
    """Let everybody go on whose turn has come."""
    for _ in range(10):
        await asyncio.sleep(0)


class Calls:
    """Calls that wait, and the order in which they went."""

    def __init__(self, limits: RateLimiter, target: Route) -> None:
        self.limits = limits
        self.target = target
        self.went: list[str] = []
        self.refused: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def comes(self, name: str, claim: AdmissionRequest) -> None:
        self.tasks[name] = asyncio.create_task(self._wait(name, claim))
        await settle()

    async def leaves(self, name: str) -> None:
        self.tasks.pop(name).cancel()
        await settle()

    async def _wait(self, name: str, claim: AdmissionRequest) -> None:
        try:
            await self.limits.acquire(self.target, claim)
        except UsagePlanExhausted:
            self.refused.append(name)
        else:
            self.went.append(name)

    async def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


@pytest.fixture
async def calls(tmp_path: Path, limits: RateLimiter) -> AsyncIterator[Calls]:
    """Calls of getOrders that wait: its plan allows one a second, and no token is left."""
    orders = target(config(tmp_path))
    limits.observe_response(orders, 200, "1")
    await drain(limits, orders)
    waiting = Calls(limits, orders)
    yield waiting
    await waiting.end()


async def test_who_comes_first_goes_first(calls: Calls, clock: FakeClock) -> None:
    for number in range(5):
        await calls.comes(str(number), AdmissionRequest(10))
    for passed in range(5):
        clock.advance(1.06 if passed == 0 else 1)
        await settle()
        assert calls.went == [str(number) for number in range(passed + 1)]


async def test_who_leaves_lets_those_behind_move_up_and_nobody_shares_a_place(calls: Calls, clock: FakeClock) -> None:
    for name in ("first", "second", "third"):
        await calls.comes(name, AdmissionRequest(10))
    await calls.leaves("first")
    await calls.comes("last", AdmissionRequest(10))
    clock.advance(1.06)
    await settle()
    assert calls.went == ["second"]
    clock.advance(2)
    await settle()
    assert calls.went == ["second", "third", "last"]


async def test_who_leaves_in_the_moment_of_its_turn_costs_nobody_a_place(calls: Calls, clock: FakeClock) -> None:
    for name in ("leaver", "second", "third", "fourth"):
        await calls.comes(name, AdmissionRequest(10))
    calls.tasks["leaver"].cancel()
    clock.advance(1.06)  # its turn comes before it has noticed
    await settle()
    assert calls.went == ["second"]
    clock.advance(2)
    await settle()
    assert calls.went == ["second", "third", "fourth"]
    await calls.comes("fifth", AdmissionRequest(10))
    clock.advance(0.5)
    calls.tasks["fifth"].cancel()
    clock.advance(0.5)
    await settle()
    assert calls.went == ["second", "third", "fourth"]
    assert await calls.limits.acquire(calls.target, AdmissionRequest(0)) == 0, "the place that it did not take is there"
    await calls.comes("sixth", AdmissionRequest(10))
    clock.advance(1.06)
    calls.tasks["sixth"].cancel()  # its turn has come, but it has not gone yet
    await settle()
    assert "sixth" not in calls.went
    assert await calls.limits.acquire(calls.target, AdmissionRequest(0)) == 0, "the place that it gave back is there"


async def test_whose_turn_cannot_come_in_time_is_refused_at_once(calls: Calls) -> None:
    for number in range(12):
        await calls.comes(str(number), AdmissionRequest(10))
    assert calls.refused == ["9", "10", "11"]
    with pytest.raises(UsagePlanExhausted) as caught:
        await calls.limits.acquire(calls.target, AdmissionRequest(0))
    assert caught.value.headers()["Retry-After"] == "10"


async def test_callers_take_turns(calls: Calls, clock: FakeClock) -> None:
    for number in range(5):
        await calls.comes(f"noisy {number}", AdmissionRequest(100, caller="noisy"))
    await calls.comes("quiet 0", AdmissionRequest(100, caller="quiet"))
    await calls.comes("quiet 1", AdmissionRequest(100, caller="quiet"))
    clock.advance(7.1)
    await settle()
    assert calls.went == ["noisy 0", "quiet 0", "noisy 1", "quiet 1", "noisy 2", "noisy 3", "noisy 4"]


async def test_a_noisy_caller_does_not_make_a_quiet_one_wait_too_long(calls: Calls) -> None:
    for number in range(500):
        await calls.comes(f"noisy {number}", AdmissionRequest(1000, caller="noisy"))
    await calls.comes("quiet", AdmissionRequest(3, caller="quiet"))
    assert not calls.refused


async def test_who_is_overtaken_past_its_time_is_refused_then(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GRACE", -1.95)  # two seconds are over in a twentieth
    await calls.comes("overtaken", AdmissionRequest(2, background=True))
    assert not calls.refused
    await calls.tasks["overtaken"]
    assert calls.refused == ["overtaken"]


async def test_background_calls_wait_behind_but_not_for_ever(calls: Calls, clock: FakeClock) -> None:
    await calls.comes("background", AdmissionRequest(1000, background=True))
    for number in range(40):
        await calls.comes(f"normal {number}", AdmissionRequest(1000))
    clock.advance(41.1)
    await settle()
    place = calls.went.index("background")
    assert 10 <= place <= 25


async def test_a_call_that_amazon_throttled_goes_before_everybody(calls: Calls, clock: FakeClock) -> None:
    await calls.comes("first", AdmissionRequest(10))
    await calls.comes("again", AdmissionRequest(10, is_retry=True))
    clock.advance(2.1)
    await settle()
    assert calls.went == ["again", "first"]


async def test_a_hundred_thousand_wait_and_leave(calls: Calls, clock: FakeClock) -> None:
    claims = [AdmissionRequest(1e6, caller=number % 7, background=number % 5 == 0) for number in range(100_000)]
    tasks = [asyncio.create_task(calls.limits.acquire(calls.target, claim)) for claim in claims]
    await settle()
    for task in tasks[::2]:
        task.cancel()
    await settle()
    clock.advance(1000.1)
    await settle()
    assert sum(task.done() and not task.cancelled() for task in tasks) == 1000
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    (plan,) = [plan for plan in calls.limits._plans.values() if plan.labels[2] == calls.target.operation_name]
    assert len(plan.queue) == 0
    assert not plan.queue._last


@given(
    actions=st.lists(
        st.tuples(
            st.sampled_from(["come", "leave", "pass", "throttled"]),
            st.integers(0, 30),
            st.floats(0, 3),
            st.booleans(),
        ),
        max_size=60,
    )
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_no_place_is_lost_or_doubled_whoever_comes_and_leaves(actions: list[tuple[str, int, float, bool]]) -> None:
    async def play() -> None:
        clock = FakeClock()
        limits = RateLimiter(Metrics(), pace=True, now=clock, call_later=clock.call_later)
        with tempfile.TemporaryDirectory() as folder:
            orders = target(config(Path(folder)))
        limits.observe_response(orders, 200, "1")
        went: list[float] = []

        async def call(claim: AdmissionRequest) -> None:
            await limits.acquire(orders, claim)
            went.append(clock())

        tasks: list[asyncio.Task[None]] = []
        throttled = 0
        for action, number, seconds, flag in actions:
            if action == "come":
                claim = AdmissionRequest(1000, caller=number % 3, background=flag)
                tasks += [asyncio.create_task(call(claim)) for _ in range(number)]
            elif action == "leave" and tasks:
                tasks[number % len(tasks)].cancel()
            elif action == "pass":
                clock.advance(seconds)
            elif action == "throttled":
                throttled += 1
                limits.observe_response(orders, 429, None)
            await settle()
        assert_within_plan(went, rate=1.0, burst=20.0)
        waiting = [task for task in tasks if not task.done()]
        clock.advance(len(waiting) + 2.0)
        await settle()
        assert all(task.done() for task in tasks), "everybody who stayed has had a turn"

    asyncio.run(play())


def assert_within_plan(starts: list[float], rate: float, burst: float) -> None:
    """No window may hold more calls than its length gives places, and the burst."""
    for first, begin in enumerate(starts):
        for last in range(first, len(starts)):
            length = starts[last] - begin
            assert last - first + 1 <= rate * length + burst + 1e-6 * (1 + rate * length)


# What 429s teach.


async def test_an_operation_without_a_plan_is_paced_once_a_429_says_that_there_is_one(
    tmp_path: Path, limits: RateLimiter
) -> None:
    settings = config(tmp_path)
    unknown = target(settings, path="/unknown/v1/path/1")
    assert [await limits.acquire(unknown, AdmissionRequest(0)) for _ in range(100)] == [0.0] * 100
    limits.observe_response(unknown, 429, None)
    for same in (unknown, target(settings, path="/unknown/v1/path/2")):
        with pytest.raises(UsagePlanExhausted):
            await limits.acquire(same, AdmissionRequest(0))
    other = target(settings, path="/unknown/v2/path")
    assert [await limits.acquire(other, AdmissionRequest(0)) for _ in range(10)] == [0.0] * 10


async def test_a_known_operation_without_a_plan_is_paced_from_its_first_429_on(
    tmp_path: Path, limits: RateLimiter
) -> None:
    nameless = target(config(tmp_path), path="/awd/2024-05-09/replenishmentOrders")
    assert nameless.operation is not None
    assert nameless.operation.rate is None
    assert [await limits.acquire(nameless, AdmissionRequest(0)) for _ in range(10)] == [0.0] * 10
    limits.observe_response(nameless, 429, None)
    with pytest.raises(UsagePlanExhausted):
        await limits.acquire(nameless, AdmissionRequest(0))


async def test_the_application_has_a_plan_over_all_its_accounts(tmp_path: Path, limits: RateLimiter) -> None:
    settings = config(tmp_path, accounts={f"a{n}": {"refresh_tokens": {"eu": f"t{n}"}} for n in range(40)})
    path = "/catalog/2022-04-01/items/B000000000"  # 2 per second and account, 250 over all
    taken = 0
    for number in range(40):
        taken += await drain(limits, target(settings, path=path, account=f"a{number}"))
    assert taken == 25, "a tenth of a second's worth"


async def test_the_wait_for_both_plans_together_is_bounded(
    tmp_path: Path, limits: RateLimiter, clock: FakeClock
) -> None:
    settings = config(tmp_path, accounts={f"a{n}": {"refresh_tokens": {"eu": f"t{n}"}} for n in range(40)})
    path = "/catalog/2022-04-01/items/B000000000"
    mine = target(settings, path=path, account="a0")
    await drain(limits, mine)
    (for_all,) = [plan for plan in limits._plans.values() if plan.labels[0] == "*"]
    for_all.bucket.tokens = -150.0  # more than half a second of 250 a second
    call = asyncio.create_task(limits.acquire(mine, AdmissionRequest(0.6)))
    await settle()
    clock.advance(0.56)  # its turn in the account's plan
    await settle()
    assert isinstance(call.exception(), UsagePlanExhausted), "it has no time left to wait for the other"


async def test_a_place_of_the_account_is_given_back_where_the_application_has_none(
    tmp_path: Path, limits: RateLimiter, clock: FakeClock
) -> None:
    settings = config(tmp_path, accounts={f"a{n}": {"refresh_tokens": {"eu": f"t{n}"}} for n in range(40)})
    path = "/catalog/2022-04-01/items/B000000000"
    for number in range(39):
        await drain(limits, target(settings, path=path, account=f"a{number}"))
    last = target(settings, path=path, account="a39")
    assert await drain(limits, last) == 0
    clock.advance(0.05)
    assert await drain(limits, last) == 2


async def test_what_is_known_of_plans_is_exported(tmp_path: Path, clock: FakeClock) -> None:
    metrics = Metrics()
    limits = RateLimiter(metrics, pace=True, now=clock, call_later=clock.call_later)
    orders = target(config(tmp_path))
    where = {"account": "acme", "region": "eu", "operation": orders.operation_name}
    await limits.acquire(orders, AdmissionRequest(0))

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"spapi_proxy_{name}", where)

    assert (value("usage_plan_tokens"), value("usage_plan_rate"), value("limit_queue_length")) == (19, 0.0167, 0)
    await drain(limits, orders)
    waiting = asyncio.create_task(limits.acquire(orders, AdmissionRequest(1000)))
    await settle()
    assert (value("usage_plan_tokens"), value("limit_queue_length")) == (0, 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert value("limit_queue_length") == 0


async def test_a_queue_takes_no_more_than_its_bound(tmp_path: Path, clock: FakeClock) -> None:
    metrics = Metrics()
    limits = RateLimiter(metrics, pace=True, max_queue=3, now=clock, call_later=clock.call_later)
    orders = target(config(tmp_path))
    limits.observe_response(orders, 200, "1")
    await drain(limits, orders)
    tasks = [asyncio.create_task(limits.acquire(orders, AdmissionRequest(1000))) for _ in range(3)]
    await settle()
    with pytest.raises(UsagePlanExhausted, match="3 calls already wait for the usage plan of") as caught:
        await limits.acquire(orders, AdmissionRequest(1000))
    assert caught.value.headers()["Retry-After"] == "4"
    clock.advance(1.1)
    await settle()
    tasks.append(asyncio.create_task(limits.acquire(orders, AdmissionRequest(1000))))
    await settle()
    assert sum(task.done() for task in tasks) == 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
