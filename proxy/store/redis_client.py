"""The client of one Redis server, with failure detection.

A command without a valid reply within TIMEOUT marks the server as down. While it is down no command is sent, so that no
request waits for it; probes with backoff find out when it can be read and written again.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import Connection, ConnectionPool, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeout

from proxy.config import StoreAddress
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.store import redis_internals
from proxy.store.encryption import PREFIX

TIMEOUT = 0.25  # seconds for a command and its reply, including the connection
FIRST_PAUSE, MAX_PAUSE = 0.5, 5.0  # seconds between two probes, doubled each time
# asyncio.timeout cancels by a timer of the event loop, which measures the loop's own delay too.
SLOW_AFTER = 1.3  # times TIMEOUT: a timer that fires so late means that this process was busy
# Bounded: a process that is always busy must not wait for a dead Redis with each request.
MAX_TIMEOUTS = 3  # consecutive late timers that are ignored
CONNECTIONS = 16
FAULT = "programming error in the store"  # the log line, at level error, with the exception's type and place

Reply = TypeVar("Reply")


class StoreUnavailable(Exception):
    """Redis is down."""


class RedisClient:
    """The connections to one Redis server; `is_up` is False while it is down."""

    def __init__(
        self, address: StoreAddress, metrics: Metrics, *, timeout: float = TIMEOUT, pause: float = FIRST_PAUSE
    ) -> None:
        self.client = Redis(connection_pool=_connections(address, timeout))
        self.is_up = True
        self._address = str(address)
        self._metrics = metrics
        self._timeout = timeout
        self._pause = pause
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._probing: asyncio.Task[None] | None = None
        self._down_since = 0.0
        self._timeouts = 0
        self.on_recovery: list[Callable[[], None]] = []
        self._was_up = False
        self.epoch = 0  # counts outages: connections of an earlier epoch are not reused
        metrics.store_up.set(1)

    async def start(self) -> None:
        """Probe the server; the proxy starts even if it is down."""
        with contextlib.suppress(StoreUnavailable):
            await self.execute(self._probe)

    async def execute(self, command: Callable[[], Awaitable[Reply]]) -> Reply:
        """Return the reply to a command; raise StoreUnavailable without one in time, or while the server is down.

        An error about a single value is raised unchanged (`ResponseError`).
        """
        # redis-py 8.1.0's ConnectionPool raises MaxConnectionsError instead of waiting; it would look like an outage.
        async with self._slots:  # the timeout starts only when a slot is free
            return await self.execute_now(command)

    async def execute_now(self, command: Callable[[], Awaitable[Reply]]) -> Reply:
        """Execute a command without waiting for a slot; for a caller with one command at a time."""
        if not self.is_up:
            raise StoreUnavailable
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                reply = await command()
        except redis_internals.FAILURES as exc:
            if _is_of_one_value(exc):
                raise
            reason, took = _reason(exc), time.monotonic() - started
            # `took` well above the timeout means that the timer itself was late: the reply may have been there in time.
            if reason == "timeout" and took > self._timeout * SLOW_AFTER and self._timeouts < MAX_TIMEOUTS:
                self._timeouts += 1  # the event loop was blocked, which is no fault of Redis
                self._metrics.store_failures.labels("late").inc()
            else:
                self.mark_down(reason)
            raise StoreUnavailable from exc
        except Exception:
            LOGGER.exception(FAULT)
            raise
        # Any valid reply ends the series of late timers.
        self._timeouts, self._was_up = 0, True
        return reply

    def mark_down(self, reason: str) -> None:
        """Stop sending commands until a probe succeeds."""
        self._metrics.store_failures.labels(reason).inc()
        if not self.is_up:
            return
        self.is_up, self._down_since = False, time.monotonic()
        # RedisBuckets holds a connection outside the pool, which `disconnect` of the pool does not reach.
        self.epoch += 1
        self._metrics.store_up.set(0)
        LOGGER.warning(
            "store lost: tokens and usage plans are kept by this process alone until it is back"
            if self._was_up
            else "store not reached: tokens and usage plans are kept by this process alone until it is",
            extra=extra(store=self._address, reason=reason),
        )
        # One task, because only the change from up to down starts it (the return above).
        self._probing = asyncio.create_task(self._reconnect(), name="store probe")

    async def _reconnect(self) -> None:
        pause = self._pause
        while True:
            # A connection to a stopped server would look like another outage when it is used next, and one to a server
            # that became a replica would never reach the new primary of the same host name.
            with contextlib.suppress(RedisError, OSError):
                await self.client.connection_pool.disconnect()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter: replicas must not probe at once
            try:
                async with asyncio.timeout(self._timeout):
                    await self._probe()
            except redis_internals.FAILURES:
                pause = min(MAX_PAUSE, pause * 2)
            except Exception:  # noqa: BLE001 - logged; the next probe may succeed
                LOGGER.exception(FAULT)
                pause = min(MAX_PAUSE, pause * 2)
            else:
                break
        self.is_up = True
        self._metrics.store_up.set(1)
        away = round(time.monotonic() - self._down_since, 1)
        message = "store is back" if self._was_up else "store is there"
        self._was_up = True
        LOGGER.info(message, extra=extra(store=self._address, after=away))
        for callback in self.on_recovery:
            callback()

    async def _probe(self) -> None:
        """Write and read a value: a server that is full, or a replica, replies to PING too."""
        # Under our prefix: a Redis user's ACL may allow no other keys.
        name = f"{PREFIX}probe"
        # With an expiry, so that nothing of a probe remains.
        await self.client.set(name, b"1", px=10_000)
        if await self.client.get(name) != b"1":
            raise ValueError("not what was written")

    async def close(self) -> None:
        """Close all connections."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        with contextlib.suppress(RedisError, OSError):
            await self.client.aclose()
            await self.client.connection_pool.disconnect()


def _connections(address: StoreAddress, timeout: float) -> ConnectionPool:
    settings: dict[str, Any] = {
        "db": address.db,
        "username": address.user,
        "password": address.password.reveal() if address.password is not None else None,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        # `Redis` of redis-py 8.1.0 retries 10 times by default.
        "retry": Retry(NoBackoff(), 0),  # a retry would delay requests: this client reconnects by itself
        # redis-py 8 uses RESP3 by default (DEFAULT_RESP_VERSION), which takes a HELLO for each connection; nothing here
        # needs it, and FAILURES lists what the RESP2 parser raises.
        "protocol": 2,
        **redis_internals.NO_CLIENT_INFO,
        "max_connections": CONNECTIONS + 4,  # for execute_now, which takes no slot
    }
    kind: type[Connection | UnixDomainSocketConnection] = Connection
    if address.kind == "unix":
        kind = UnixDomainSocketConnection
        settings["path"] = address.path
    else:
        settings |= {"host": address.host, "port": address.port}
    if address.kind == "rediss":
        kind = SSLConnection
        # Spelt out, although True is the default of redis-py 8.1.0: without it any certificate of that CA would be
        # accepted.
        settings |= {"ssl_ca_certs": address.ca_certs, "ssl_check_hostname": True}
    return ConnectionPool(connection_class=kind, **settings)


# Error replies that concern the whole server; all others concern one value or script.
_REFUSALS: dict[type[Exception], str] = {
    AuthenticationError: "refused",
    AuthorizationError: "refused",
    NoPermissionError: "refused",
    OutOfMemoryError: "full",
    ReadOnlyError: "read_only",
}
# Some errors come without a class of their own: redis-py 8.1.0 has none for MISCONF, and an error within a script may
# not begin with its code.
_REFUSAL_TEXTS = (("OOM", "full"), ("READONLY", "read_only"), ("MISCONF", "full"), ("NOPERM", "refused"))
# LOADING, BUSY (a script runs), MASTERDOWN and NOREPLICAS pass by themselves; the probes find out when.
_REFUSED = ("NOAUTH", "WRONGPASS", "LOADING", "BUSY", "MASTERDOWN", "NOREPLICAS")


def _reason(exc: BaseException) -> str:
    """Return the reason of a failure for log and metric; never the text of the server, which may hold data."""
    for kind, reason in _REFUSALS.items():
        if isinstance(exc, kind):
            return reason
    if isinstance(exc, (TimeoutError, RedisTimeout)):
        return "timeout"
    text = _text(exc)
    return next((reason for mark, reason in _REFUSAL_TEXTS if mark in text), _last_reason(exc, text))


def _last_reason(exc: BaseException, text: str) -> str:
    if isinstance(exc, ResponseError):
        return "refused" if any(mark in text for mark in _REFUSED) else "nonsense"
    return "connection" if isinstance(exc, (RedisError, OSError)) else "nonsense"


def _is_of_one_value(exc: BaseException) -> bool:
    return isinstance(exc, ResponseError) and "WRONGTYPE" in _text(exc)


def _text(exc: BaseException) -> str:
    # Bounded: the text comes from the server.
    return str(exc)[:200]
