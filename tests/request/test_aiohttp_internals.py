"""Contract with aiohttp: each private or undocumented name that the proxy uses, and what is expected of it.

A version that has renamed one fails here at once, by the name. Nothing of the proxy is imported before that is checked.
"""

import ast
import asyncio
import importlib
import inspect
import re
from collections import deque
from collections.abc import Callable
from types import MemberDescriptorType
from typing import Any

import aiohttp
import pytest
from aiohttp import web, web_protocol
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import RawRequestMessage, StreamWriter
from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler

VERSION = f"aiohttp {aiohttp.__version__}"


async def _start(_: web.BaseRequest) -> web.StreamResponse:
    raise AssertionError("no request is sent")


# Slots of a connection: what each holds before the first byte.
SLOTS: dict[str, Callable[[Any], bool]] = {
    "_buffer_paused": lambda value: value is False,
    "_close": lambda value: value is False,
    "_current_request": lambda value: value is None,
    "_force_close": lambda value: value is False,
    "_handler_waiter": lambda value: value is None,
    "_keepalive_handle": lambda value: value is None,
    "_keepalive_timeout": lambda value: value == 7.0,
    "_loop": lambda value: isinstance(value, asyncio.AbstractEventLoop),
    "_manager": lambda value: isinstance(value, web.Server),
    "_message_tail": lambda value: value == b"",
    "_messages": lambda value: value == deque(),
    "_msg_queue_resume_size": lambda value: isinstance(value, int) and value > 0,
    "_next_keepalive_close_time": lambda value: value == 0.0,
    "_parser": lambda value: isinstance(value, HttpRequestParser),
    "_request_count": lambda value: value == 0,
    "_request_handler": lambda value: value is _start,
    "_request_in_progress": lambda value: value is False,
    "_task_handler": lambda value: value is None,
    "_upgraded": lambda value: value is False,
    "_waiter": lambda value: value is None,
}

# Methods and functions, with the parameters that they are called with or overridden with.
SIGNATURES: tuple[tuple[type, str, list[str], bool], ...] = (
    (RequestHandler, "_process_keepalive", ["self"], False),
    (RequestHandler, "_resume_reading_if_drained", ["self"], False),
    (RequestHandler, "connection_lost", ["self", "exc"], False),
    (RequestHandler, "connection_made", ["self", "transport"], False),
    (RequestHandler, "data_received", ["self", "data"], False),
    (RequestHandler, "finish_response", ["self", "request", "resp", "start_time"], True),
    (RequestHandler, "force_close", ["self"], False),
    (RequestHandler, "handle_error", ["self", "request", "status", "exc", "message"], False),
    (RequestHandler, "start", ["self"], True),
    (web.Server, "__call__", ["self"], False),
    (web.Server, "shutdown", ["self", "timeout"], True),
    (web.StreamResponse, "_prepare_headers", ["self"], True),
    (StreamWriter, "__init__", ["self", "protocol", "loop"], False),
    (StreamWriter, "drain", ["self"], True),
)

# What LeanRequest sets in place of `BaseRequest.__init__`; each of them is one that aiohttp's own code reads.
OF_A_REQUEST = {
    "_cache",
    "_loop",
    "_message",
    "_method",
    "_payload",
    "_payload_writer",
    "_protocol",
    "_rel_url",
    "_state",
    "_task",
    "_version",
}
OTHERS = {"_kwargs", "_loop", "_req", "_prepare_headers", "_ErrInfo"}  # each has a test of its own below


async def _connection() -> RequestHandler:
    return web.Server(_start, keepalive_timeout=7.0)()


@pytest.mark.parametrize("name", SLOTS)
async def test_a_connection_has_the_slot_and_what_it_holds(name: str) -> None:
    found = getattr(RequestHandler, name, None)
    assert isinstance(found, MemberDescriptorType), f"{VERSION}: RequestHandler.{name} is no slot but {found!r}"
    value = getattr(await _connection(), name)
    assert SLOTS[name](value), f"{VERSION}: RequestHandler.{name} of a new connection is {value!r}"


@pytest.mark.parametrize(("kind", "name", "parameters", "is_awaited"), SIGNATURES, ids=str)
def test_a_method_has_its_parameters(kind: type, name: str, parameters: list[str], *, is_awaited: bool) -> None:
    method = getattr(kind, name, None)
    assert method is not None, f"{VERSION}: {kind.__name__}.{name} is missing"
    found = list(inspect.signature(method).parameters)
    assert found[: len(parameters)] == parameters, f"{VERSION}: {kind.__name__}.{name} takes {found}"
    assert inspect.iscoroutinefunction(method) == is_awaited, f"{VERSION}: {kind.__name__}.{name}"


@pytest.mark.parametrize(
    "setting",
    [
        *("keepalive_timeout", "max_line_size", "max_field_size", "max_headers", "lingering_time", "auto_decompress"),
        *("access_log", "loop"),
    ],
)
def test_a_connection_takes_the_setting(setting: str) -> None:
    parameters = inspect.signature(RequestHandler.__init__).parameters
    assert setting in parameters, f"{VERSION}: RequestHandler has no setting {setting}"


async def test_a_server_keeps_the_settings_of_its_connections() -> None:
    server = web.Server(_start, keepalive_timeout=7.0)
    assert server._kwargs == {"keepalive_timeout": 7.0}, VERSION
    assert server._loop is asyncio.get_running_loop(), VERSION
    assert server.request_handler is _start, VERSION
    assert server.requests_count == 0, VERSION
    assert server.connections == [], VERSION


def test_a_request_that_cannot_be_parsed_is_queued_as_this() -> None:
    info = web_protocol._ErrInfo(status=400, exc=ValueError(), message="m")
    assert (info.status, type(info.exc), info.message) == (400, ValueError, "m"), VERSION
    assert isinstance(web_protocol.ERROR, RawRequestMessage), VERSION
    assert web_protocol.ERROR.method == "UNKNOWN", VERSION


async def test_the_parser_returns_messages_an_upgrade_and_the_rest() -> None:
    connection = await _connection()
    parser: Any = connection._parser
    messages, upgraded, rest = parser.feed_data(b"GET /a HTTP/1.1\r\nHost: b\r\n\r\n")
    (message, payload), *others = messages
    assert (others, upgraded, rest) == ([], False, b""), VERSION
    assert type(message) is RawRequestMessage, VERSION
    assert (message.method, message.path, message.should_close, message.upgrade, message.chunked) == (
        *("GET", "/a", False, False, False),
    ), VERSION
    assert message.raw_headers == ((b"Host", b"b"),), VERSION
    assert payload is EMPTY_PAYLOAD, VERSION
    assert payload.is_eof(), VERSION
    assert parser.message_consumed() is None, VERSION


@pytest.mark.parametrize("name", sorted(OF_A_REQUEST))
def test_a_request_has_the_attribute(name: str) -> None:
    assert name in web.BaseRequest.ATTRS, f"{VERSION}: BaseRequest.{name} is missing"
    source = "".join(inspect.getsource(kind) for kind in (web.BaseRequest, web.StreamResponse))
    assert re.search(rf"\b(self|request)\.{name}\b", source), f"{VERSION}: nothing reads BaseRequest.{name}"


def test_a_response_knows_its_request_before_its_headers_are_prepared() -> None:
    assert web.StreamResponse._req is None, VERSION
    source = inspect.getsource(web.StreamResponse._start)
    assert source.index("self._req = request") < source.index("await self._prepare_headers()"), VERSION
    assert source.index("await self._prepare_headers()") < source.index("await self._write_headers()"), VERSION


def test_the_parser_in_c_is_named_as_expected() -> None:
    assert HttpRequestParser.__module__ == "aiohttp._http_parser", VERSION


def test_a_protocol_says_whether_writing_is_paused() -> None:
    assert isinstance(BaseProtocol.writing_paused, property), VERSION


def test_names_of_our_own_hide_none_of_aiohttp() -> None:
    ours = importlib.import_module("proxy.request.aiohttp_internals")
    overridden = {
        "ConnectionProtocol": set[str](),
        "ProtocolServer": set[str](),
        "BareResponse": {"_prepare_headers"},
    }
    for name, expected in overridden.items():
        kind = getattr(ours, name)
        names = {key for key in vars(kind) if not key.startswith("__")} - {"_abc_impl"}
        assert {key for key in names if hasattr(kind.__bases__[0], key)} == expected, name


def test_every_private_name_in_the_file_is_listed_here() -> None:
    tree = ast.parse(inspect.getsource(importlib.import_module("proxy.request.aiohttp_internals")))
    own = {
        *("_own_handle", "_writer", "_Connection", "_take_from_queue", "_end_serving", "_expect_next_request"),
        "_http_parser",  # in a string: aiohttp._http_parser
    }
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    private = {name for name in used if re.match(r"_[^_]", name)} - own
    listed = {*SLOTS, *OF_A_REQUEST, *OTHERS, *(name for _, name, _, _ in SIGNATURES if re.match(r"_[^_]", name))}
    assert private == listed
