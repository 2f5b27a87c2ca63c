"""Is Redis there, and what happens while it is not?

A question that is not answered within PATIENCE, or answered with nonsense, means that it is lost. Nobody asks it
anything then, so that no request waits for it; one probe after another finds out when it can be read and written again.
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

TIMEOUT = 0.25  # seconds for a question and its answer, the connection included
FIRST_PAUSE, MAX_PAUSE = 0.5, 5.0  # seconds between two probes, doubled each time
SLOW_AFTER = 1.3  # times PATIENCE: a timer that comes so late says that this process was busy
MAX_TIMEOUTS = 3  # of those in a row
CONNECTIONS = 16
FAULT = "programming error in the store"  # the log line, at level error, with the exception's type and place

Answer = TypeVar("Answer")


class StoreUnavailable(Exception):
    """Redis cannot be used now."""


class RedisClient:
    """The way to one Redis server; `is_up` says whether it may be asked at all."""

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
        self.epoch = 0  # how often it was lost: connections from before are of no use
        metrics.store_up.set(1)

    async def start(self) -> None:
        """Find out whether Redis is there; the proxy serves without it, too."""
        with contextlib.suppress(StoreUnavailable):
            await self.execute(self._probe)

    async def execute(self, question: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return the answer to a question; raise Lost where there is none in time, or where nobody is to ask.

        What is wrong with one value alone is raised as it comes (`ResponseError`).
        """
        async with self._slots:  # who waits here is in no hurry yet
            return await self.execute_now(question)

    async def execute_now(self, question: Callable[[], Awaitable[Answer]]) -> Answer:
        """Do as `ask`, ahead of everybody: for one question at a time."""
        if not self.is_up:
            raise StoreUnavailable
        asked = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                response = await question()
        except redis_internals.FAILURES as exc:
            if _is_of_one_value(exc):
                raise
            reason, took = _reason(exc), time.monotonic() - asked
            if reason == "timeout" and took > self._timeout * SLOW_AFTER and self._timeouts < MAX_TIMEOUTS:
                self._timeouts += 1  # this process was too late to see the answer, which says nothing of Redis
                self._metrics.store_failures.labels("late").inc()
            else:
                self.mark_down(reason)
            raise StoreUnavailable from exc
        except Exception:
            LOGGER.exception(FAULT)
            raise
        self._timeouts, self._was_up = 0, True
        return response

    def mark_down(self, reason: str) -> None:
        """Ask no more until a probe has worked."""
        self._metrics.store_failures.labels(reason).inc()
        if not self.is_up:
            return
        self.is_up, self._down_since = False, time.monotonic()
        self.epoch += 1
        self._metrics.store_up.set(0)
        LOGGER.warning(
            "store lost: tokens and usage plans are kept by this process alone until it is back"
            if self._was_up
            else "store not reached: tokens and usage plans are kept by this process alone until it is",
            extra=extra(store=self._address, reason=reason),
        )
        self._probing = asyncio.create_task(self._reconnect(), name="store probe")

    async def _reconnect(self) -> None:
        pause = self._pause
        while True:
            # What is connected to a server that has gone would look like another loss when it is used next, and what is
            # connected to one that has become a replica would never see the new primary behind the same name.
            with contextlib.suppress(RedisError, OSError):
                await self.client.connection_pool.disconnect()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter: replicas do not come together
            try:
                async with asyncio.timeout(self._timeout):
                    await self._probe()
            except redis_internals.FAILURES:
                pause = min(MAX_PAUSE, pause * 2)
            except Exception:  # noqa: BLE001 - it is logged, and another probe may work
                LOGGER.exception(FAULT)
                pause = min(MAX_PAUSE, pause * 2)
            else:
                break
        self.is_up = True
        self._metrics.store_up.set(1)
        away = round(time.monotonic() - self._down_since, 1)
        said = "store is back" if self._was_up else "store is there"
        self._was_up = True
        LOGGER.info(said, extra=extra(store=self._address, after=away))
        for look in self.on_recovery:
            look()

    async def _probe(self) -> None:
        """Write and read: a server that is full, or a replica, answers PING too."""
        name = f"{PREFIX}probe"
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
        "retry": Retry(NoBackoff(), 0),  # the process has something better to do than to wait for it
        "protocol": 2,
        **redis_internals.NO_CLIENT_INFO,
        "max_connections": CONNECTIONS + 4,  # for the questions that do not queue
    }
    kind: type[Connection | UnixDomainSocketConnection] = Connection
    if address.kind == "unix":
        kind = UnixDomainSocketConnection
        settings["path"] = address.path
    else:
        settings |= {"host": address.host, "port": address.port}
    if address.kind == "rediss":
        kind = SSLConnection
        settings |= {"ssl_ca_certs": address.ca_certs, "ssl_check_hostname": True}
    return ConnectionPool(connection_class=kind, **settings)


# What says that the server as a whole is of no use, among what it answers; anything else is about one value or script.
_REFUSALS: dict[type[Exception], str] = {
    AuthenticationError: "refused",
    AuthorizationError: "refused",
    NoPermissionError: "refused",
    OutOfMemoryError: "full",
    ReadOnlyError: "read_only",
}
_REFUSAL_TEXTS = (("OOM", "full"), ("READONLY", "read_only"), ("MISCONF", "full"), ("NOPERM", "refused"))
_REFUSED = ("NOAUTH", "WRONGPASS", "LOADING", "BUSY", "MASTERDOWN", "NOREPLICAS")


def _reason(exc: BaseException) -> str:
    """Return why Redis was given up, for log and metric; never what the server said."""
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
    return str(exc)[:200]
