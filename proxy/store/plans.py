"""How do all replicas keep to one usage plan? Each call is one step of a script in Redis, by Redis' own clock.

A bucket is what `request/buckets.py` describes. A call that has to wait takes its place at once, and is told when its
moment comes: the bucket's last moment is then in the future. What processes ask at the same time goes in one pipeline.
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
from proxy.store.link import Link, Lost
from proxy.store.seal import Seal

MOST_AT_ONCE = 256  # steps of one pipeline

# try: take a place in all of the buckets where each has one now. reserve: take the next place. back: return one.
# look: take none. For each bucket: the sender's rate, whether that is news, burst, margin in seconds, what the sender
# thinks it holds (where Redis knows nothing), and whether Amazon has just said that it is empty.
# The answer: seconds until the place, or -1 where there is none yet, then of each bucket what it holds, seconds from
# now of its last moment, its rate, and how many places were taken so far.
_STEP = """
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
local answer = {string.format('%.6f', wait)}
for _, b in ipairs(buckets) do
  answer[#answer + 1] = string.format('%.9f %.6f %.9g %d', b[2], b[3] - now, b[4], b[7])
end
return table.concat(answer, ' ')
"""

Mode = Literal["try", "reserve", "back", "look"]


class Step(NamedTuple):
    """One bucket, as who asks knows it."""

    name: str
    rate: float  # calls per second
    is_news: bool  # the rate was learnt since the last answer
    burst: float
    margin: float  # seconds
    tokens: float
    is_empty: bool  # Amazon has just said so


class Held(NamedTuple):
    """What a bucket holds, at a moment `ahead` seconds from now, its rate, and how many places all took so far."""

    tokens: float
    ahead: float
    rate: float
    taken: float


class Place(NamedTuple):
    """The answer: seconds until the call's place, None where it has none yet."""

    wait: float | None
    buckets: tuple[Held, ...]


@dataclass(slots=True, eq=False)
class _Question:
    mode: Mode
    steps: Sequence[Step]
    keys: Sequence[str]
    args: Sequence[str]
    answer: asyncio.Future[Place]


class SharedPlans:
    """The usage plans that lie in Redis."""

    def __init__(self, link: Link, seal: Seal) -> None:
        self.link = link
        self._seal = seal
        self._script = link.client.register_script(_STEP)
        self._waiting: list[_Question] = []
        self._asking: asyncio.Task[None] | None = None
        self._is_closed = False
        self._connection: redis_internals.AbstractConnection | None = None
        self._is_fresh = True
        self._of_loss = 0

    def name(self, key: tuple[str, ...]) -> str:
        """Return the name under which Redis keeps the bucket of a plan."""
        return self._seal.name("plan", "\x1f".join(key))

    def ask(self, mode: Mode, steps: Sequence[Step]) -> "asyncio.Future[Place]":
        """Return what will be the answer; its exception is Lost. All that is asked in one go is one round trip."""
        answer: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        if not self.link.is_up or self._is_closed:
            answer.set_exception(Lost())
            return answer
        args: list[str] = [mode]
        for step in steps:
            args += (
                repr(step.rate),
                "1" if step.is_news else "0",
                repr(step.burst),
                repr(step.margin),
                repr(step.tokens),
                "1" if step.is_empty else "0",
            )
        self._waiting.append(_Question(mode, steps, [step.name for step in steps], args, answer))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_all(), name="shared plans")
        return answer

    def tell(self, mode: Mode, steps: Sequence[Step]) -> None:
        """Ask without waiting for the answer: what is lost with it is a place or a hint."""
        self.ask(mode, steps).add_done_callback(_forget)

    async def _ask_all(self) -> None:
        questions: list[_Question] = []
        try:
            while self._waiting:
                questions, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
                await self._ask_these(questions)
        finally:
            self._asking = None
            for question in (*questions, *self._waiting):
                if not question.answer.done():
                    question.answer.set_exception(Lost())

    async def _ask_these(self, questions: Sequence[_Question]) -> None:
        """Answer all of the questions whose asker is still there; where Redis does not, with Lost."""
        try:
            answers = await self.link.ask_at_once(lambda: self._answers(questions))
            places = [_place(answer, len(of.keys)) for of, answer in zip(questions, answers, strict=True)]
        except (Lost, RedisError):
            places = []
        except ValueError:
            self.link.lost("nonsense")
            places = []
        except Exception as exc:  # noqa: BLE001 - a fault of this program, which Link has logged: the calls fail with it
            for question in questions:
                if not question.answer.done():
                    question.answer.set_exception(exc)
            return
        for index, question in enumerate(questions):
            if question.answer.cancelled():  # whoever asked has left
                if places and places[index].wait is not None and question.mode in {"try", "reserve"}:
                    self.tell("back", question.steps)
            elif places:
                question.answer.set_result(places[index])
            else:
                question.answer.set_exception(Lost())

    async def _answers(self, questions: Sequence[_Question]) -> list[object]:
        """Ask all at once, over a connection that is kept for it; raise what redis-py raises, and ResponseError."""
        try:
            return await self._answers_over(await self._connected(), questions)
        except NoScriptError:  # a new server, or one that was told to forget; none of the steps was taken
            await self.link.client.script_load(_STEP)
            return await self._answers_over(await self._connected(), questions)
        except RedisConnectionError:
            if self._is_fresh:
                raise
            # Closed while it was idle, probably. Should the steps have been taken, some places are not used.
            return await self._answers_over(await self._connected(), questions)

    async def _connected(self) -> redis_internals.AbstractConnection:
        connection = self._connection
        self._is_fresh = connection is None or self._of_loss != self.link.losses
        if connection is None or self._is_fresh:
            await self._disconnect()
            made = await redis_internals.new_connection(self.link.client.connection_pool)
            connection, self._of_loss = made, self.link.losses
            self._connection = connection
        return connection

    async def _answers_over(
        self, connection: redis_internals.AbstractConnection, questions: Sequence[_Question]
    ) -> list[object]:
        commands: list[list[str | int]] = [
            ["EVALSHA", self._script.sha, len(of.keys), *of.keys, *of.args] for of in questions
        ]
        refusal: ResponseError | None = None
        answers: list[object] = []
        try:
            await redis_internals.send(connection, commands)
            for _ in questions:
                try:
                    answers.append(await redis_internals.read_reply(connection))
                except ResponseError as exc:
                    refusal = exc
        except BaseException:
            await self._disconnect()  # what is still to come would be taken for the next answer
            raise
        if refusal is not None:
            raise refusal
        return answers

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(RedisError, OSError):
                await redis_internals.close(connection)

    async def close(self) -> None:
        """Ask nothing more."""
        self._is_closed = True
        if self._asking is not None:
            self._asking.cancel()
            with suppress(asyncio.CancelledError):
                await self._asking
        await self._disconnect()


def _place(answer: object, count: int) -> Place:
    """Return what an answer says; raise ValueError for one that is none."""
    numbers = [float(text) for text in answer.split()] if isinstance(answer, bytes) else []
    if len(numbers) != 1 + 4 * count or not all(map(math.isfinite, numbers)):
        raise ValueError("not the numbers that the script answers")
    held = tuple(Held(*numbers[at : at + 4]) for at in range(1, len(numbers), 4))
    return Place(numbers[0] if numbers[0] >= 0 else None, held)


def _forget(answer: "asyncio.Future[Place]") -> None:
    if not answer.cancelled():
        answer.exception()
