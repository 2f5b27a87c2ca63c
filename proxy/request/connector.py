"""What is believed of what arrives on a connection to Amazon: answers that were asked for, read strictly.

aiohttp keeps what arrives on an idle connection and takes it for the answer to the next request, which may be another
seller's. And it reads answers leniently, bare line feeds and folded lines among them. The hooks it leaves for changing
both are not public; they are used here and nowhere else.
"""

import sys
from contextvars import ContextVar
from functools import partial
from typing import Any

import aiohttp
from aiohttp import http_parser
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection

# Where the parser in use looks whether it is being debugged: the C module, or the Python one where there is no other.
_parsers: Any = sys.modules[http_parser.HttpResponseParser.__module__]


class _Watched(ResponseHandler):
    """One connection; `idle` while no request uses it."""

    idle = False

    def set_response_params(self, **params: Any) -> None:
        """Make the parser of the next answer, a strict one: aiohttp does that only while it is being debugged."""
        before = _parsers.DEBUG
        _parsers.DEBUG = True
        try:
            super().set_response_params(**params)
        finally:
            _parsers.DEBUG = before

    def data_received(self, data: bytes) -> None:
        if self.idle:
            if data:  # aiohttp calls itself with nothing, to go on with what it has
                self.abort()
            return
        super().data_received(data)
        if self.exception() is not None and self._payload is not None and not self._payload.is_eof():
            # The parser gave up within a body, and tells nobody who waits for more of it.
            self._payload.set_exception(aiohttp.ClientPayloadError("the body is not well-formed"))


# Whether the connection of the latest request of this task had served another one before.
REUSED: ContextVar[bool] = ContextVar("reused", default=False)


class Connector(aiohttp.TCPConnector):
    """A pool that gives up an idle connection at the first byte that arrives on it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory = partial(_Watched, loop=self._loop)  # type: ignore[assignment]  # it only ever calls it

    async def _get(self, key: ConnectionKey, traces: list[Any]) -> Connection | None:
        connection = await super()._get(key, traces)
        if connection is not None and isinstance(connection.protocol, _Watched):
            connection.protocol.idle = False
        REUSED.set(connection is not None)
        return connection

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        if isinstance(protocol, _Watched):  # always: they come from the factory above
            protocol.idle = True
        super()._release(key, protocol, should_close=should_close)
