"""Token buckets in Redis, shared by all replicas: each request is one step of a Lua script, by the clock of Redis.

`request/ratelimit/token_bucket.py` describes the bucket. A request that has to wait reserves a token at once and gets
its wait; the bucket's timestamp is then in the future. Concurrent steps of one process are sent in one pipeline.
"""

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError

from proxy.store import redis_internals
from proxy.store.encryption import TokenCipher
from proxy.store.redis_client import RedisClient, StoreUnavailable

# Bounded, because the whole pipeline has to be answered within the client's timeout.
MAX_BATCH = 256  # steps of one pipeline

# Modes. try: take a token of every bucket if each has one now. reserve: reserve the next token. back: return one.
# look: only read. Arguments of each bucket: the sender's rate, whether that is new, burst, margin in seconds, the
# tokens to start with (where Redis has no value), and whether Amazon has just reported it empty.
# The reply: seconds until the token, or -1 if `try` found none; then of each bucket its tokens, its timestamp in
# seconds from now, its rate, and the number of tokens taken so far.
# The clock is that of Redis (TIME), so that replicas with different clocks share one bucket. Writing after TIME needs
# the replication of effects, which is the default since Redis 5. Numbers are returned as text: Redis cuts a Lua number
# to an integer in a reply, and Lua 5.1 prints 14 digits (`%.14g`), which leaves a Unix time only four decimals. A value
# is checked before it is used, because others may write to this Redis: `t == t` is false for NaN, and a moment beyond
# 1000 calls from now or fewer than -1 tokens are taken for damage. The count is reduced so that `%d` and a double hold
# it exactly. A bucket lives until it is full again and a minute longer: without a value, the script starts from the
# sender's tokens.
_SCRIPT_FOR_STEP = """
local now = redis.call('TIME')
now = tonumber(now[1]) + tonumber(now[2]) / 1000000
local mode, buckets, wait = ARGV[1], {}, 0
for i, key in ipairs(KEYS) do
  local at = (i - 1) * 6 + 1
  local rate, news, burst = tonumber(ARGV[at + 1]), ARGV[at + 2], tonumber(ARGV[at + 3])
  local margin, holds, empty = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5]), ARGV[at + 6]
  local tokens, moment, taken = holds, now, 0
  local value = redis.pcall('GET', key)
  if type(value) == 'string' and #value < 200 then
    local t, m, r, c = string.match(value, '^(%S+) (%S+) (%S+) (%d+)$')
    t, m, r, c = tonumber(t), tonumber(m), tonumber(r), tonumber(c)
    local is_sane = t and m and r and c and t == t and m == m and r > 0.000001 and r <= 100000
    if is_sane and t >= -1 and m <= now + 1000 / r then
      tokens, moment, taken = math.min(t, burst), m, c % 1000000000
      if news == '0' then rate = r end
    end
  end
  if moment < now then
    tokens, moment = math.min(burst, tokens + (now - moment) * rate), now
  end
  if empty == '1' then tokens = math.min(tokens, 0) end
  buckets[i] = {key, tokens, moment, rate, burst, margin, taken}
  if tokens < 0.999999999 or moment > now then wait = -1 end
end
for _, b in ipairs(buckets) do
  if mode == 'try' and wait == 0 then
    b[2], b[7] = b[2] - 1, b[7] + 1
  elseif mode == 'reserve' then
    local missing = 1 - b[2]
    if missing > 0.000000001 then
      local pause = missing / b[4] + b[6]
      b[2], b[3] = math.min(b[5], b[2] + pause * b[4]), b[3] + pause
    end
    b[2], b[7], wait = b[2] - 1, b[7] + 1, b[3] - now
  elseif mode == 'back' then
    b[2] = math.min(b[5], b[2] + 1)
  end
  local life = b[3] - now + (b[5] - b[2]) / b[4] + 60
  redis.call('SET', b[1], string.format('%.9f %.6f %.9g %d', b[2], b[3], b[4], b[7]), 'PX', math.ceil(life * 1000))
end
local reply = {string.format('%.6f', wait)}
for _, b in ipairs(buckets) do
  reply[#reply + 1] = string.format('%.9f %.6f %.9g %d', b[2], b[3] - now, b[4], b[7])
end
return table.concat(reply, ' ')
"""

Mode = Literal["try", "reserve", "back", "look"]


class BucketUpdate(NamedTuple):
    """The sender's knowledge of one bucket."""

    name: str
    rate: float  # calls per second
    is_new_rate: bool  # the rate was learnt since the last reply
    burst: float
    margin: float  # seconds
    tokens: float
    is_empty: bool  # Amazon has just reported it


class BucketState(NamedTuple):
    """A bucket's tokens, `reserved_ahead` seconds from now, its rate, and the tokens that all replicas took so far."""

    tokens: float
    reserved_ahead: float
    rate: float
    taken: float


class Reservation(NamedTuple):
    """The reply: seconds until the token, None where there is none."""

    wait: float | None
    buckets: tuple[BucketState, ...]


@dataclass(slots=True, eq=False)
class _Request:
    mode: Mode
    updates: Sequence[BucketUpdate]
    keys: Sequence[str]
    args: Sequence[str]
    response: asyncio.Future[Reservation]


class RedisBuckets:
    """The token buckets in Redis."""

    def __init__(self, redis: RedisClient, cipher: TokenCipher) -> None:
        self.redis = redis
        self._cipher = cipher
        self._script = redis.client.register_script(_SCRIPT_FOR_STEP)
        self._waiting: list[_Request] = []
        self._running: asyncio.Task[None] | None = None
        self._is_closed = False
        self._connection: redis_internals.AbstractConnection | None = None
        self._is_fresh = True
        self._epoch = 0

    def name(self, key: tuple[str, ...]) -> str:
        """Return the name under which Redis keeps the bucket of a plan."""
        return self._cipher.name("plan", "\x1f".join(key))

    def execute(self, mode: Mode, steps: Sequence[BucketUpdate]) -> "asyncio.Future[Reservation]":
        """Return a future reply; its exception is StoreUnavailable. Concurrent steps share one round trip."""
        response: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        if not self.redis.is_up or self._is_closed:
            response.set_exception(StoreUnavailable())
            return response
        args: list[str] = [mode]
        for step in steps:
            args += (
                # repr: the shortest text that gives the same float again (Python 3.1, bpo-1580).
                repr(step.rate),
                "1" if step.is_new_rate else "0",
                repr(step.burst),
                repr(step.margin),
                repr(step.tokens),
                "1" if step.is_empty else "0",
            )
        self._waiting.append(_Request(mode, steps, [step.name for step in steps], args, response))
        # Steps that arrive before the task runs, or during a round trip, go into one pipeline.
        if self._running is None:
            self._running = asyncio.create_task(self._execute_all(), name="shared plans")
        return response

    def send(self, mode: Mode, steps: Sequence[BucketUpdate]) -> None:
        """Send a step without waiting for the reply; a lost one costs a token or a hint."""
        # Without the callback, asyncio would log "Future exception was never retrieved" for each during an outage.
        self.execute(mode, steps).add_done_callback(_forget)

    async def _execute_all(self) -> None:
        requests: list[_Request] = []
        try:
            while self._waiting:
                requests, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                await self._execute_batch(requests)
        finally:
            self._running = None
            # Also when cancelled: a future without a result would keep its call waiting for ever.
            for request in (*requests, *self._waiting):
                if not request.response.done():
                    request.response.set_exception(StoreUnavailable())

    async def _execute_batch(self, requests: Sequence[_Request]) -> None:
        """Execute the steps and resolve their futures; StoreUnavailable where Redis does not reply."""
        try:
            responses = await self.redis.execute_now(lambda: self._responses(requests))
            reservations = [
                _parse_reply(response, len(of.keys)) for of, response in zip(requests, responses, strict=True)
            ]
        except (StoreUnavailable, RedisError):
            reservations = []
        # Bytes that are no reply of the script: another service may be at this address, so nothing more is sent to it.
        except ValueError:
            self.redis.mark_down("nonsense")
            reservations = []
        except Exception as exc:  # noqa: BLE001 - a fault of this program, which RedisClient has logged: the calls fail with it
            for request in requests:
                if not request.response.done():
                    request.response.set_exception(exc)
            return
        for index, request in enumerate(requests):
            if request.response.cancelled():  # the caller has left
                # Its token was taken in Redis all the same.
                if reservations and reservations[index].wait is not None and request.mode in {"try", "reserve"}:
                    self.send("back", request.updates)
            elif reservations:
                request.response.set_result(reservations[index])
            else:
                request.response.set_exception(StoreUnavailable())

    async def _responses(self, requests: Sequence[_Request]) -> list[object]:
        """Send all steps over a dedicated connection; raise what redis-py raises, and ResponseError."""
        try:
            return await self._responses_over(await self._connected(), requests)
        except NoScriptError:  # a new server, or SCRIPT FLUSH; no step was executed
            # redis-py's Script.__call__ does this too, but not within a pipeline over a dedicated connection.
            await self.redis.client.script_load(_SCRIPT_FOR_STEP)
            return await self._responses_over(await self._connected(), requests)
        except RedisConnectionError:
            # A new connection was not idle: the server is down, and a second try would only double the wait.
            if self._is_fresh:
                raise
            # Probably closed while idle. If the steps were executed after all, some tokens stay unused.
            return await self._responses_over(await self._connected(), requests)

    async def _connected(self) -> redis_internals.AbstractConnection:
        connection = self._connection
        # After an outage the old connection may lead to a former primary.
        self._is_fresh = connection is None or self._epoch != self.redis.epoch
        if connection is None or self._is_fresh:
            await self._disconnect()
            made = await redis_internals.new_connection(self.redis.client.connection_pool)
            connection, self._epoch = made, self.redis.epoch
            self._connection = connection
        return connection

    async def _responses_over(
        self, connection: redis_internals.AbstractConnection, requests: Sequence[_Request]
    ) -> list[object]:
        commands: list[list[str | int]] = [
            ["EVALSHA", self._script.sha, len(of.keys), *of.keys, *of.args] for of in requests
        ]
        refusal: ResponseError | None = None
        responses: list[object] = []
        try:
            await redis_internals.send(connection, commands)
            for _ in requests:
                try:
                    responses.append(await redis_internals.read_reply(connection))
                # Read on: the other replies of the pipeline must be taken from the connection before it is used again.
                except ResponseError as exc:
                    refusal = exc
        except BaseException:
            await self._disconnect()  # pending replies would be read as those of the next batch
            raise
        if refusal is not None:
            raise refusal
        return responses

    async def _disconnect(self) -> None:
        # Cleared before the await, so that a concurrent step cannot take the connection that is being closed.
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(RedisError, OSError):
                await redis_internals.close(connection)

    async def close(self) -> None:
        """Cancel pending steps and close the connection."""
        self._is_closed = True
        if self._running is not None:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running
        await self._disconnect()


def _parse_reply(response: object, count: int) -> Reservation:
    """Parse a reply; raise ValueError for a malformed one."""
    numbers = [float(text) for text in response.split()] if isinstance(response, bytes) else []
    # `float` accepts inf and nan; a wait of either would break the timer.
    if len(numbers) != 1 + 4 * count or not all(map(math.isfinite, numbers)):
        raise ValueError("not the numbers that the script returns")
    held = tuple(BucketState(*numbers[at : at + 4]) for at in range(1, len(numbers), 4))
    return Reservation(numbers[0] if numbers[0] >= 0 else None, held)


def _forget(response: "asyncio.Future[Reservation]") -> None:
    # Future.exception raises CancelledError on a cancelled future. Reading it marks the exception as retrieved.
    if not response.cancelled():
        response.exception()
