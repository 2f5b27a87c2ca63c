"""Contract with redis-py: each name that its documentation does not promise, and what is expected of it."""

import asyncio
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import redis
from redis.asyncio import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from proxy.store import redis_internals

STORE = Path(redis_internals.__file__).parent
KINDS = (Connection, SSLConnection, UnixDomainSocketConnection)

# Name, the parameters that are given to it, whether it is awaited.
EXPECTED: tuple[tuple[Callable[..., Any], set[str], bool], ...] = (
    (ConnectionPool.make_connection, set(), False),
    (AbstractConnection.connect, set(), True),
    (AbstractConnection.disconnect, {"nowait"}, True),
    (AbstractConnection.pack_commands, {"commands"}, False),
    (AbstractConnection.send_packed_command, {"command", "check_health"}, True),
    (AbstractConnection.read_response, {"disable_decoding"}, True),
    (
        AbstractConnection.__init__,
        {"driver_info", "socket_timeout", "socket_connect_timeout", "retry", "protocol"},
        False,
    ),
)


@pytest.mark.parametrize(("name", "parameters", "is_awaited"), EXPECTED, ids=lambda v: getattr(v, "__qualname__", ""))
def test_each_name_takes_what_is_given_to_it(
    name: Callable[..., Any], parameters: set[str], *, is_awaited: bool
) -> None:
    known = inspect.signature(name).parameters
    assert parameters <= set(known), (
        f"redis-py {redis.__version__}: {name.__qualname__} has no {parameters - set(known)}"
    )
    assert inspect.iscoroutinefunction(name) == is_awaited, f"redis-py {redis.__version__}: {name.__qualname__}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_connection_keeps_these_names(kind: type[AbstractConnection]) -> None:
    assert issubclass(kind, AbstractConnection)
    for name in ("connect", "disconnect", "pack_commands", "send_packed_command", "read_response"):
        assert getattr(kind, name) is getattr(AbstractConnection, name), name


async def test_a_connection_without_client_info_has_none_to_send() -> None:
    pool = ConnectionPool(**redis_internals.NO_CLIENT_INFO)
    made = pool.make_connection()  # type: ignore[no-untyped-call]  # not annotated there
    if int(redis.__version__.partition(".")[0]) >= 8:  # 7.2 to 7.4 accept it, and send their own all the same
        assert made.driver_info is None


def test_commands_are_packed_as_resp2() -> None:
    packed = Connection(protocol=2).pack_commands([["EVALSHA", "ab", 1, "k"], ["PING"]])
    assert b"".join(packed) == b"*4\r\n$7\r\nEVALSHA\r\n$2\r\nab\r\n$1\r\n1\r\n$1\r\nk\r\n*1\r\n$4\r\nPING\r\n"


@pytest.mark.parametrize(
    "name", ["ConnectionError", "TimeoutError", "ResponseError", "InvalidResponse", "NoScriptError"]
)
def test_its_errors_have_one_base_class(name: str) -> None:
    assert issubclass(getattr(redis.exceptions, name), RedisError)


async def test_what_is_no_resp2_raises_what_is_expected() -> None:
    async def parsed(data: bytes) -> BaseException | None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        connection = Connection(protocol=2, retry=Retry(NoBackoff(), 0))
        connection._reader, connection._writer = reader, Mock()
        connection._parser.on_connect(connection)  # type: ignore[no-untyped-call]  # not annotated there
        try:
            await redis_internals.read_reply(connection)
        except Exception as exc:  # noqa: BLE001 - its type is what the test is about
            return exc
        finally:
            connection._reader = connection._writer = None
        return None

    for data in (
        b"HTTP/1.1 400\r\n",
        b"$x\r\n",
        b"*x\r\n",
        b"$9\r\nshort",
        b"*1\r\n" * 5000 + b":1\r\n",
        b"",
    ):
        raised = await parsed(data)
        assert isinstance(raised, redis_internals.FAILURES), (data[:10], raised)


def test_no_other_file_uses_them() -> None:
    names = re.compile(
        r"\b(AbstractConnection|make_connection|pack_commands?|send_packed_command|read_response|driver_info)\b"
    )
    used = {
        path.name
        for path in STORE.parent.rglob("*.py")
        for found in names.finditer(path.read_text("utf-8"))
        if not path.read_text("utf-8")[: found.start()].endswith("redis_internals.")
    }
    assert used == {"redis_internals.py"}
