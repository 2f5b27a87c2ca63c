"""A programming error in the store is loud: logged with its type and place, raised, and not called a sick Redis."""

import asyncio
from io import StringIO

import pytest
from prometheus_client import generate_latest

from proxy.config import Secret
from proxy.config.store_address import parse_store
from proxy.observability.metrics import Metrics
from proxy.store.encryption import TokenCipher
from proxy.store.redis_buckets import BucketUpdate, RedisBuckets
from proxy.store.redis_client import RedisClient, StoreUnavailable

NOBODY_LISTENS = "redis://127.0.0.1:1/0"


async def programming_error() -> None:
    raise TypeError("text of the error")


async def unreachable() -> None:
    raise ConnectionRefusedError


async def test_it_is_raised_and_logged_and_the_store_is_not_lost(log: StringIO) -> None:
    metrics = Metrics()
    link = RedisClient(parse_store(NOBODY_LISTENS), metrics)
    with pytest.raises(TypeError, match="text of the error"):
        await link.execute(programming_error)
    assert link.is_up
    assert b"store_failures_total{" not in generate_latest(metrics.registry)
    assert '"level": "error"' in log.getvalue()
    assert "builtins.TypeError at execute_now:" in log.getvalue()
    assert "programming_error:" in log.getvalue()
    assert "text of the error" not in log.getvalue()
    await link.close()


@pytest.mark.parametrize(
    "failure",
    [ConnectionRefusedError(), TimeoutError(), ValueError("no number"), EOFError(), RecursionError(), OverflowError()],
    ids=lambda failure: type(failure).__name__,
)
async def test_what_the_network_and_the_parser_raise_means_that_it_is_lost(failure: Exception) -> None:
    async def fail() -> None:
        raise failure

    link = RedisClient(parse_store(NOBODY_LISTENS), Metrics())
    with pytest.raises(StoreUnavailable):
        await link.execute(fail)
    assert not link.is_up
    await link.close()


async def test_a_call_under_a_shared_usage_plan_fails_with_it(log: StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    link = RedisClient(parse_store(NOBODY_LISTENS), Metrics())
    plans = RedisBuckets(link, TokenCipher((Secret("distinctive-store-key-0123456789abcdef"),)))
    monkeypatch.setattr(plans, "_responses", lambda _: programming_error())
    step = BucketUpdate("bucket", rate=1.0, is_new_rate=False, burst=1.0, margin=0.0, tokens=1.0, is_empty=False)
    with pytest.raises(TypeError, match="text of the error"):
        await plans.execute("try", [step])
    plans.send("back", [step])
    await plans.close()
    assert link.is_up
    assert log.getvalue().count("builtins.TypeError") >= 1
    await link.close()


async def test_the_probe_logs_it_and_goes_on(log: StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    link = RedisClient(parse_store(NOBODY_LISTENS), Metrics(), pause=0.01)
    probes = [programming_error, programming_error]

    async def probe() -> None:
        if probes:
            await probes.pop()()

    monkeypatch.setattr(link, "_probe", probe)
    with pytest.raises(StoreUnavailable):
        await link.execute(unreachable)
    assert link._probing is not None
    await asyncio.wait_for(link._probing, 10)
    assert link.is_up
    assert log.getvalue().count("builtins.TypeError") == 2
    await link.close()
