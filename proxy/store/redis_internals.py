"""Names of redis-py that its documentation does not promise: all of them, with the reason for each.

tests/store/test_redis_internals.py lists what is expected of each, so that one that is missing fails there by name.
"""

from collections.abc import Sequence
from typing import Any

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

__all__ = ["FAILURES", "NO_CLIENT_INFO", "AbstractConnection", "close", "new_connection", "read_reply", "send"]

# `driver_info=None`: a connection sends no CLIENT SETINFO, which is two commands each time. redis-py before 7.2 does
# not know the parameter, 7.2 to 7.4 accept it and send the two commands all the same, 8.0 leaves them out.
NO_CLIENT_INFO: dict[str, Any] = {"driver_info": None}

# What a question raises because of the server or the network; OSError includes TimeoutError. The others are what the
# RESP2 parser of redis-py raises on bytes that are no RESP2: ValueError for a length that is no number, EOFError
# where the stream ends within a value, RecursionError for arrays within arrays, OverflowError for a length
# beyond an index.
FAILURES = (RedisError, OSError, ValueError, EOFError, RecursionError, OverflowError)


async def new_connection(pool: ConnectionPool) -> AbstractConnection:
    """Return an open connection of the pool's kind that the pool does not hold; raise as FAILURES.

    The pool would take its lock, and ask the socket whether it is still good, for each question.
    """
    connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]  # not annotated there
    await connection.connect()  # type: ignore[no-untyped-call]  # as above
    return connection


async def send(connection: AbstractConnection, commands: Sequence[Sequence[str | int]]) -> None:
    """Send commands in one write. redis-py's pipeline costs as much as everything else that a rate-limited call costs.

    `check_health=False`: no PING before the commands. A lost connection is found by the reply that does not come.
    """
    await connection.send_packed_command(connection.pack_commands(commands), check_health=False)


async def read_reply(connection: AbstractConnection) -> object:
    """Return the next reply, its strings as bytes; raise as FAILURES, ResponseError for an error reply."""
    reply: object = await connection.read_response(disable_decoding=True)
    return reply


async def close(connection: AbstractConnection) -> None:
    """Close at once: `nowait` leaves out the wait for the TLS closure, which a lost server never sends."""
    await connection.disconnect(nowait=True)
