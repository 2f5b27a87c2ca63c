"""Replicas share tokens through Redis: one exchange for all, sealed, and never one that Amazon refused."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
from prometheus_client import generate_latest
from redis.asyncio import Redis

from proxy.config import ConfigError, Secret, StoreAddress, load_config
from proxy.config.store_address import parse_store
from proxy.observability.metrics import Metrics
from proxy.request.token_selection import TokenKey
from proxy.server.runtime import RunningProxy
from proxy.store import StoredToken
from proxy.store import encryption as encryption_module
from proxy.store import redis_client as redis_client_module
from proxy.store.encryption import DecryptionFailed, TokenCipher
from proxy.store.redis_client import RedisClient
from proxy.store.redis_tokens import RedisTokenStore
from tests.bench.processes import free_port
from tests.conftest import StartProxy, needs
from tests.support.certificates import Authority
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response
from tests.support.raw_client import call
from tests.support.redis_server import PROGRAM, RedisServer, documented_permissions, redis_server

KEY, OTHER_KEY = "distinctive-store-key-0123456789abcdef", "distinctive-other-key-0123456789abcdef"
ACME = TokenKey("lwa", "main", "acme", "production", "eu")
NOTIFICATIONS = "/notifications/v1/destinations"
ADDRESS = "/orders/v0/orders/902-1845936-5435065/address"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    needs(PROGRAM is not None, "redis-server")
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
async def client(redis: RedisServer) -> AsyncIterator[Redis]:
    opened = Redis(port=redis.port)
    yield opened
    await opened.aclose()


class StartReplicas(Protocol):
    def __call__(self, count: int) -> Awaitable[list[RunningProxy]]: ...


@pytest.fixture
def replicas(start_proxy: StartProxy, redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> StartReplicas:
    # However busy the machine is: nothing here is about a Redis that is slow.
    monkeypatch.setattr(redis_client_module, "RedisClient", partial(RedisClient, timeout=5.0))

    async def start(count: int) -> list[RunningProxy]:
        return [await start_proxy(store=redis.url, store_key=KEY) for _ in range(count)]

    return start


async def orders(proxy: RunningProxy, target: str = "/orders/v0/orders") -> int:
    return (await call(proxy.addresses[0], "GET", target)).status


def sample(metrics: Metrics, name: str) -> float:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"spapi_proxy_{name}"))


@asynccontextmanager
async def opened_store(
    redis: RedisServer, *keys: str, lock_wait: float = 10.0, lock_life: float = 3.0
) -> AsyncIterator[tuple[RedisTokenStore, Metrics]]:
    metrics = Metrics()
    link = RedisClient(parse_store(redis.url), metrics)
    cipher = TokenCipher(tuple(Secret(key) for key in keys or (KEY,)))
    store = RedisTokenStore(link, cipher, metrics, timeout=lock_wait, lock_life=lock_life)
    yield store, metrics
    await store.close()


def anything(_: StoredToken) -> bool:
    return True


def a_token(text: str = "Atza|1") -> StoredToken:
    return StoredToken(Secret(text), 4e9)


# One exchange.


async def test_replicas_make_one_exchange_for_one_credential(
    replicas: StartReplicas, token_host: TokenHost, fake_upstream: FakeUpstream
) -> None:
    proxies = await replicas(4)
    assert await asyncio.gather(*(orders(proxy) for proxy in proxies for _ in range(5))) == [200] * 20
    assert len(token_host.received) == 1
    assert {received.get("x-amz-access-token") for received in fake_upstream.received} == {"Atza|1"}


async def test_grantless_and_restricted_tokens_are_shared_too(
    replicas: StartReplicas, token_host: TokenHost, fake_upstream: FakeUpstream
) -> None:
    for target in (NOTIFICATIONS, ADDRESS):
        for proxy in await replicas(2):
            assert await orders(proxy, target) == 200
    assert len(token_host.received) == 2  # grantless, and the ordinary one that the restricted one is asked for with
    assert len(fake_upstream.minted) == 1


async def test_a_replica_that_starts_later_needs_no_exchange(replicas: StartReplicas, token_host: TokenHost) -> None:
    (first,) = await replicas(1)
    assert await orders(first) == 200
    (second,) = await replicas(1)
    assert await orders(second) == 200
    assert len(token_host.received) == 1


async def test_a_token_cached_asks_redis_nothing(replicas: StartReplicas, client: Redis) -> None:
    (proxy,) = await replicas(1)
    await proxy.tokens.get(ACME)
    before = (await client.info("stats"))["total_commands_processed"]
    for _ in range(50):
        assert await proxy.tokens.get(ACME)
    after = (await client.info("stats"))["total_commands_processed"]
    assert after - before == 1  # the question itself


async def test_a_refused_token_is_replaced_once_for_all_and_given_to_nobody(
    replicas: StartReplicas, token_host: TokenHost, fake_upstream: FakeUpstream
) -> None:
    async def refuse_the_first(request: Received, writer: asyncio.StreamWriter) -> None:
        if request.get("x-amz-access-token") == "Atza|1":
            error = {"code": "Unauthorized", "message": "Access to requested resource is denied."}
            details = "The access token you provided has expired."
            writer.write(
                http_response("403 Forbidden", json.dumps({"errors": [{**error, "details": details}]}).encode())
            )
        else:
            writer.write(http_response("200 OK", b"{}"))

    first, second = await replicas(2)
    await asyncio.gather(first.tokens.get(ACME), second.tokens.get(ACME))
    fake_upstream.script = refuse_the_first
    assert [await orders(first), await orders(second)] == [200, 200]
    (third,) = await replicas(1)
    assert await orders(third) == 200
    assert len(token_host.received) == 2
    assert [received.get("x-amz-access-token") for received in fake_upstream.received].count("Atza|1") == 2


async def test_a_refused_token_is_gone_before_its_successor_is_there(redis: RedisServer, client: Redis) -> None:
    async with opened_store(redis) as (store, _):
        await store.put("k", a_token(), 3600)
        async with store.get_or_lock("k", lambda stored: stored.value != Secret("Atza|1"), Secret("Atza|1")) as stored:
            assert stored is None
            assert await client.keys("sp-api-proxy:token:*") == []


async def test_a_token_lives_in_redis_no_longer_than_with_amazon(replicas: StartReplicas, client: Redis) -> None:
    (proxy,) = await replicas(1)
    await proxy.tokens.get(ACME)
    (name,) = await client.keys("sp-api-proxy:token:*")
    assert 3590_000 < await client.pttl(name) <= 3600_000


async def test_its_life_is_counted_by_redis_where_a_clock_is_wrong(redis: RedisServer) -> None:
    async with opened_store(redis) as (store, _):
        store._wall = lambda: 1000.0
        await store.put("k", StoredToken(Secret("Atza|1"), 1e12), 60)
        async with store.get_or_lock("k", anything) as stored:
            assert stored is not None
            assert 1059 < stored.expires_at <= 1060


# The lock.


async def test_those_who_wait_look_a_few_times_and_get_what_the_first_one_fetched(
    redis: RedisServer, client: Redis
) -> None:
    async def wait() -> Secret | None:
        async with opened_store(redis) as (other, _), other.get_or_lock("k", anything) as stored:
            return stored.value if stored is not None else None

    async with opened_store(redis) as (store, _):
        async with store.get_or_lock("k", anything) as stored:
            assert stored is None
            waiting = asyncio.create_task(wait())
            async with asyncio.timeout(5):
                while await looks(client) < 5:  # noqa: ASYNC110 - it looks by its own clock
                    await asyncio.sleep(0.01)
            assert not waiting.done()
            await store.put("k", a_token(), 3600)
        assert await waiting == Secret("Atza|1")
    assert await looks(client) < 15


async def looks(client: Redis) -> int:
    stats = await client.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


async def test_whoever_dies_with_the_lock_delays_nobody_longer_than_it_lives(redis: RedisServer) -> None:
    loop = asyncio.get_running_loop()
    async with opened_store(redis, lock_life=0.5) as (store, _), opened_store(redis) as (dead, _):
        dead._lock_lifetime = 0.5
        assert (await dead._found_or_locked("k", "dead", anything, None))[1]  # nobody keeps it alive
        began = loop.time()
        async with store.get_or_lock("k", anything) as stored:
            assert stored is None
        assert 0.3 < loop.time() - began < 1.2


async def test_a_lock_is_kept_alive_while_its_exchange_takes_longer(redis: RedisServer, client: Redis) -> None:
    async with opened_store(redis, lock_life=0.3) as (store, _), store.get_or_lock("k", anything):
        (name,) = await client.keys("sp-api-proxy:lock:*")
        owner = await client.get(name)
        await asyncio.sleep(1.0)  # three of its lives, by Redis' clock, which nobody can move
        assert await client.get(name) == owner
    assert await client.keys("sp-api-proxy:lock:*") == []


async def test_nobody_lets_go_of_a_lock_that_is_anothers_by_now(redis: RedisServer, client: Redis) -> None:
    async with opened_store(redis) as (store, _):
        async with store.get_or_lock("k", anything):
            (name,) = await client.keys("sp-api-proxy:lock:*")
            await client.set(name, b"another")
        assert await client.get(name) == b"another"


async def test_a_wait_ends_when_an_exchange_of_ones_own_would_have(redis: RedisServer) -> None:
    async with (
        opened_store(redis) as (store, _),
        opened_store(redis, lock_wait=0.2) as (other, _),
        store.get_or_lock("k", anything),
        other.get_or_lock("k", anything) as stored,
    ):
        assert stored is None


async def test_an_exchange_that_fails_lets_the_next_one_try(redis: RedisServer) -> None:
    async with opened_store(redis) as (store, _):
        with pytest.raises(OSError, match="nobody there"):
            async with store.get_or_lock("k", anything):
                raise OSError("nobody there")
        async with asyncio.timeout(1), store.get_or_lock("k", anything) as stored:
            assert stored is None


# The seal.


async def test_neither_names_nor_tokens_can_be_read_in_redis(replicas: StartReplicas, client: Redis) -> None:
    (proxy,) = await replicas(1)
    for target in ("/orders/v0/orders", NOTIFICATIONS, ADDRESS):
        assert await orders(proxy, target) == 200
    names = list(map(bytes, await client.keys("*")))  # type: ignore[arg-type]  # it decodes nothing
    kinds = {name.split(b":")[1] for name in names}
    assert kinds <= {b"token", b"plan", b"probe", b"lock"}
    assert {b"token", b"plan"} <= kinds
    kept = b"".join(names) + repr([await client.get(name) for name in names]).encode()
    for secret in (b"acme", b"main", b"client", b"orders", b"Atz", b"notifications", KEY.encode()):
        assert secret not in kept


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"Atza|in the clear",
        lambda value: value[:-1],
        lambda value: value + b"\0",
        lambda value: value[:20] + bytes([value[20] ^ 1]) + value[21:],
        lambda value: b"\x02" + value[1:],
        lambda value: value[:1] + b"\0\0\0\0" + value[5:],
        lambda value: value + b"\0" * encryption_module.MAX_BYTES,
        lambda _: b"\x80\x04cposix\nsystem\n(X\x04\0\0\0trueR.",
    ],
)
async def test_a_value_that_was_spoilt_is_ignored_counted_and_written_anew(
    redis: RedisServer, client: Redis, spoil: object
) -> None:
    assert callable(spoil)
    async with opened_store(redis) as (store, metrics):
        await store.put("k", a_token(), 3600)
        (name,) = await client.keys("*")
        await client.set(name, spoil(await client.get(name)))
        async with store.get_or_lock("k", anything) as stored:
            assert stored is None
            await store.put("k", a_token("Atza|2"), 3600)
        assert sample(metrics, "store_values_ignored_total") == 1
        async with store.get_or_lock("k", anything) as stored:
            assert stored is not None
            assert stored.value == Secret("Atza|2")


async def test_a_token_of_another_account_is_ignored(redis: RedisServer, client: Redis) -> None:
    async with opened_store(redis) as (store, metrics):
        await store.put("one", a_token(), 3600)
        (name,) = await client.keys("*")
        await client.rename(name, store._cipher.name("token", "another"))
        async with store.get_or_lock("another", anything) as stored:
            assert stored is None
        assert sample(metrics, "store_values_ignored_total") == 1


async def test_names_of_another_type_are_overcome(redis: RedisServer, client: Redis) -> None:
    async with opened_store(redis) as (store, metrics):
        for purpose in ("token", "lock"):
            await client.lpush(store._cipher.name(purpose, "k"), b"x")
        async with asyncio.timeout(1), store.get_or_lock("k", anything) as stored:
            assert stored is None
            await store.put("k", a_token(), 3600)
        async with store.get_or_lock("k", anything) as stored:
            assert stored is not None
        assert sample(metrics, "store_values_ignored_total") == 1
        assert sample(metrics, "store_up") == 1


async def test_a_new_key_in_front_of_the_old_one_decrypts_what_the_old_one_encrypted(redis: RedisServer) -> None:
    async with opened_store(redis, OTHER_KEY) as (old, _), opened_store(redis, KEY, OTHER_KEY) as (new, _):
        await old.put("k", a_token(), 3600)
        async with new.get_or_lock("k", anything) as stored:
            assert stored is not None
        await new.put("k", a_token("Atza|2"), 3600)
        async with old.get_or_lock("k", anything) as stored:
            assert stored is None  # it is ignored, and fetched again


def test_a_cipher_tells_purposes_keys_and_places_apart() -> None:
    one, other = TokenCipher((Secret(KEY),)), TokenCipher((Secret(OTHER_KEY),))
    sealed = one.encrypt("k", a_token())
    assert one.decrypt("k", sealed) == a_token()
    assert one.encrypt("k", a_token()) != sealed
    assert len({one.name("token", "k"), one.name("lock", "k"), one.name("token", "l"), other.name("token", "k")}) == 4
    for cipher, key in ((one, "l"), (other, "k")):
        with pytest.raises(DecryptionFailed):
            cipher.decrypt(key, sealed)


# How it is reached.


async def test_a_unix_socket_a_database_and_a_user_with_few_rights_are_enough(
    tmp_path: Path, start_proxy: StartProxy
) -> None:
    needs(PROGRAM is not None, "redis-server")
    user = ("--user", "proxy", "on", ">p@ss/word", *documented_permissions())
    with redis_server(tmp_path, *user, "--user", "default", "off") as server:
        for url in (
            f"unix://proxy:p%40ss%2Fword@{server.socket}?db=3",
            f"redis://proxy:p%40ss%2Fword@127.0.0.1:{server.port}/4",
        ):
            one, other = [await start_proxy(store=url, store_key=KEY) for _ in range(2)]
            token = await one.tokens.get(ACME)
            same = await other.tokens.get(ACME)
            assert same.value == token.value
            assert (await other.tokens.get(ACME, rejected=same)).value != token.value
            assert await orders(one) == 200
            assert [sample(proxy.metrics, "store_failures_total") for proxy in (one, other)] == [0, 0]


async def test_tls_is_checked_against_the_ca_that_is_named(tmp_path: Path) -> None:
    needs(PROGRAM is not None, "redis-server")
    needs(shutil.which("openssl") is not None, "openssl")
    authority = Authority.made(tmp_path / "authority")
    certificate, key = authority.issue("redis", alternative="DNS:localhost")
    port = free_port()
    tls = ("--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no")
    with redis_server(tmp_path, *tls, "--tls-ca-cert-file", authority.certificate):
        for host, query, is_good in (
            ("localhost", f"?ssl_ca_certs={authority.certificate}", True),
            ("127.0.0.1", f"?ssl_ca_certs={authority.certificate}", False),  # another name than the certificate's
            ("localhost", "", False),
        ):
            link = RedisClient(parse_store(f"rediss://{host}:{port}/0{query}"), Metrics(), timeout=5)
            await link.start()
            assert link.is_up is is_good
            await link.close()


# The setting.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory", StoreAddress()),
        ("redis://h", StoreAddress("redis", "h", 6379)),
        ("redis://[::1]:7/2", StoreAddress("redis", "::1", 7, db=2)),
        ("rediss://h:1/0?ssl_ca_certs=/ca.pem", StoreAddress("rediss", "h", 1, ca_certs="/ca.pem")),
        ("redis://:p%40@h", StoreAddress("redis", "h", 6379, password=Secret("p@"))),
        ("unix:///run/r.sock?db=4", StoreAddress("unix", path="/run/r.sock", db=4)),
    ],
)
def test_addresses_are_those_that_redis_users_know(text: str, expected: StoreAddress) -> None:
    assert parse_store(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "redis", "redis:", "redis://", "redis://h:0", "redis://h:x", "redis://h/x", "redis://h/99999"),
        *("redis:///1", "redis://h?db=1", "redis://h?ssl_ca_certs=x", "rediss://h?ssl_cert_reqs=none", "redis://h/0#f"),
        *("unix://h/s", "unix:/s", "unix://", "http://h", "memory://", "redis+sentinel://h", "redis://h\nx"),
        "redis://a b",
    ],
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|needs|cannot be|options"):
        parse_store(text)


def test_an_address_is_shown_without_its_password() -> None:
    address = parse_store("rediss://user:distinctive-word@h:1/2")
    assert str(address) == "rediss://user:***@h:1/2"
    assert "distinctive" not in repr(address)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    account = "{applications: {main: {client_id: c, client_secret: s}}, accounts: {a: {refresh_tokens: {eu: t}}}, "
    path.write_text(account + text + "}")
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("store: 'redis://h'", "store_key: is missing"),
        ("store: 'redis://h', store_key: []", "store_key: is missing"),
        ("store: 'redis://h', store_key: short", r"store_key\[0\]: must be at least 32"),
        (f"store: 'sentinel://h', store_key: {KEY}", "cannot be Sentinel or Cluster"),
    ],
)
def test_what_is_missing_is_found_at_start(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(written(tmp_path, text), {})


def test_keys_come_from_files_and_variables_too(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    (tmp_path / "key").chmod(0o600)
    path = written(tmp_path, "store: '${STORE}', store_key: [{file: key}, '${OLD}']")
    config = load_config(path, {"STORE": "redis://:pw@127.0.0.1", "OLD": OTHER_KEY}).config
    assert [key.reveal() for key in config.store_key] == [KEY, OTHER_KEY]
    environment = {"SP_API_PROXY_STORE": "redis://127.0.0.1", "SP_API_PROXY_STORE_KEY_FILE": str(tmp_path / "key")}
    assert load_config(written(tmp_path, "warm_up: false"), environment).config.store_key == (Secret(KEY),)


@pytest.mark.parametrize(
    ("store", "is_warned"),
    [
        ("redis://redis.test", True),
        ("redis://127.0.0.1", False),
        ("rediss://redis.test", False),
        ("unix:///r.sock", False),
    ],
)
def test_a_way_that_others_can_listen_on_is_warned_of(tmp_path: Path, store: str, *, is_warned: bool) -> None:
    loaded = load_config(written(tmp_path, f"store: '{store}', store_key: {KEY}"), {})
    assert [problem.key for problem in loaded.warnings] == (["store"] if is_warned else [])
