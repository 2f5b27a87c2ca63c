"""Whatever happens to Redis, requests go on, the log says so once, and it heals by itself."""

import asyncio
import json
import signal
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from redis.asyncio import Redis

from proxy.observability.metrics import Metrics
from proxy.server.runtime import RunningProxy
from proxy.store import redis_client as link_module
from tests.conftest import StartProxy, needs
from tests.store.test_redis_tokens import ACME, KEY, sample
from tests.support.fake_upstream import TokenHost
from tests.support.raw_client import call
from tests.support.redis_server import PROGRAM, RedisServer, documented_permissions, redis_server

BRIEF = 1.0  # seconds: the patience with Redis, and a slow machine
CONTENT = "/aplus/2020-11-01/contentDocuments"  # 10 calls a second, 10 at once
HEALS = 8.0  # seconds: a few pauses between two probes


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    needs(PROGRAM is not None, "redis-server")
    with redis_server(tmp_path) as server:
        yield server


async def orders(proxy: RunningProxy, path: str = "/orders/v0/orders") -> int:
    return (await call(proxy.addresses[0], "GET", path)).status


async def until(metrics: Metrics, up: float) -> None:
    async with asyncio.timeout(HEALS):
        while sample(metrics, "store_up") != up:  # noqa: ASYNC110 - a probe of the proxy's own, by its own clock
            await asyncio.sleep(0.02)


def said(log: StringIO) -> list[str]:
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line["message"].partition(":")[0] for line in lines if line["message"].startswith("store")]


async def ordered(redis: RedisServer, *order: str) -> None:
    client = Redis(unix_socket_path=str(redis.socket))
    await client.execute_command(*order)  # type: ignore[no-untyped-call]  # not annotated there
    await client.aclose()


async def break_it(redis: RedisServer, fault: str) -> None:
    if fault == "frozen":
        redis.send(signal.SIGSTOP)
    elif fault == "killed":
        redis.stop()
    elif fault == "full":
        await ordered(redis, "CONFIG", "SET", "maxmemory", "1")
    elif fault == "a replica":
        await ordered(redis, "REPLICAOF", "127.0.0.1", "1")


async def fix(redis: RedisServer, fault: str) -> None:
    if fault == "frozen":
        redis.send(signal.SIGCONT)
    elif fault == "killed":
        redis.start()
    elif fault == "full":
        await ordered(redis, "CONFIG", "SET", "maxmemory", "0")
    elif fault == "a replica":
        await ordered(redis, "REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("fault", ["frozen", "killed", "full", "a replica"])
async def test_requests_go_on_at_once_while_redis_fails_and_it_heals_by_itself(
    fault: str, start_proxy: StartProxy, redis: RedisServer, log: StringIO
) -> None:
    proxy = await start_proxy(store=redis.url, store_key=KEY)
    assert await orders(proxy) == 200
    loop = asyncio.get_running_loop()
    await break_it(redis, fault)
    began = loop.time()
    assert await orders(proxy) == 200
    assert loop.time() - began < BRIEF
    assert sample(proxy.metrics, "store_up") == 0
    assert sample(proxy.metrics, "store_failures_total") >= 1
    began = loop.time()
    assert await orders(proxy) == 200
    assert loop.time() - began < link_module.TIMEOUT  # nobody asks any more
    assert said(log) == ["store lost"]
    await fix(redis, fault)
    await until(proxy.metrics, 1)
    assert await orders(proxy) == 200
    assert sample(proxy.metrics, "store_up") == 1
    assert said(log) == ["store lost", "store is back"]


async def test_a_proxy_starts_without_redis_and_takes_it_up_when_it_comes(
    start_proxy: StartProxy, redis: RedisServer, token_host: TokenHost, log: StringIO
) -> None:
    redis.stop()
    one, other = [await start_proxy(store=redis.url, store_key=KEY) for _ in range(2)]
    assert [await orders(one), await orders(other)] == [200, 200]
    assert len(token_host.received) == 2
    assert said(log) == ["store not reached"] * 2
    redis.start()
    await until(one.metrics, 1)
    await until(other.metrics, 1)
    assert said(log)[2:] == ["store is there"] * 2
    assert [
        line["level"] for line in map(json.loads, log.getvalue().splitlines()) if "store is" in line["message"]
    ] == ["info"] * 2


async def test_the_documented_permissions_of_the_redis_user_are_enough(
    start_proxy: StartProxy, redis: RedisServer, token_host: TokenHost, log: StringIO
) -> None:
    await ordered(redis, "ACL", "SETUSER", "proxy", "reset", "on", ">distinctive-word", *documented_permissions())
    url = redis.url.replace("127.0.0.1", "proxy:distinctive-word@127.0.0.1").replace("/0", "/1")
    one, other = [await start_proxy(store=url, store_key=KEY, limits={"max_wait": "5s"}) for _ in range(2)]
    token_host.expires_in = 1  # so that locks and renewals come, too
    for _ in range(30):  # more than the plan's burst: places are reserved
        assert await orders(one, CONTENT) == 200
    assert await orders(other, CONTENT) == 200
    await other.tokens.get(ACME, rejected=await other.tokens.get(ACME))  # taken out of Redis
    client = Redis(unix_socket_path=str(redis.socket))
    assert await client.acl_log() == []
    await client.aclose()
    assert [sample(proxy.metrics, "store_up") for proxy in (one, other)] == [1, 1]
    assert [sample(proxy.metrics, "store_failures_total") for proxy in (one, other)] == [0, 0]
    assert said(log) == []


async def test_a_wrong_password_is_told_apart_and_never_logged(
    start_proxy: StartProxy, redis: RedisServer, log: StringIO
) -> None:
    await ordered(redis, "CONFIG", "SET", "requirepass", "right")
    url = redis.url.replace("127.0.0.1", ":distinctive-word@127.0.0.1")
    proxy = await start_proxy(store=url, store_key=KEY)
    assert await orders(proxy) == 200
    assert 'store_failures_total{reason="refused"} 1' in exported(proxy.metrics)
    assert "distinctive" not in log.getvalue()


def exported(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


@pytest.mark.parametrize(
    "nonsense",
    [
        b"*0\r\n",
        b"*-1\r\n",
        b"$100000000\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b":1\r\n" * 20,
        b"\x00" * 100,
        b"$-7\r\n",
        b"*1000000000\r\n",
    ],
)
async def test_what_does_not_speak_redis_is_left_alone(nonsense: bytes, start_proxy: StartProxy) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            writer.write(nonsense)
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    proxy = await start_proxy(store=f"redis://127.0.0.1:{port}", store_key=KEY)
    assert sample(proxy.metrics, "store_up") == 0
    assert await orders(proxy) == 200
    server.close()


async def test_another_server_behind_the_same_name_is_found_when_the_first_one_becomes_a_replica(
    start_proxy: StartProxy, redis: RedisServer, tmp_path: Path
) -> None:
    now = [redis]

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(str(now[0].socket))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)

    service = await asyncio.start_server(pass_on, "127.0.0.1", 0)
    port = service.sockets[0].getsockname()[1]
    proxy = await start_proxy(store=f"redis://127.0.0.1:{port}", store_key=KEY)
    assert await orders(proxy) == 200
    with redis_server(tmp_path) as another:
        now[0] = another
        await break_it(redis, "a replica")
        assert await orders(proxy) == 200
        assert sample(proxy.metrics, "store_up") == 0
        await until(proxy.metrics, 1)
    service.close()


async def test_an_emptied_redis_costs_nothing_but_what_was_in_it(
    start_proxy: StartProxy, redis: RedisServer, token_host: TokenHost
) -> None:
    proxy = await start_proxy(store=redis.url, store_key=KEY)
    assert await orders(proxy) == 200
    for order in ("FLUSHALL", "SCRIPT FLUSH"):
        await ordered(redis, *order.split())
        assert await orders(proxy) == 200
    assert len(token_host.received) == 1
    assert sample(proxy.metrics, "store_up") == 1
    assert sample(proxy.metrics, "store_failures_total") == 0


async def test_redis_that_goes_while_others_wait_for_an_exchange_leaves_each_to_its_own(
    start_proxy: StartProxy, redis: RedisServer, token_host: TokenHost
) -> None:
    token_host.held = asyncio.Event()
    proxies = [await start_proxy(store=redis.url, store_key=KEY) for _ in range(2)]
    asked = [asyncio.create_task(orders(proxy)) for proxy in proxies]
    await token_host.arrived.wait()
    redis.stop()
    async with asyncio.timeout(HEALS):
        while len(token_host.received) < 2:  # noqa: ASYNC110 - the second one looks for the token by its own clock
            await asyncio.sleep(0.02)
    token_host.held.set()
    assert await asyncio.gather(*asked) == [200, 200]
