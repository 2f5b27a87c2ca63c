"""Checks of framing, without a server."""

import pytest
from aiohttp.http import HttpVersion11, RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from proxy.server.framing import MAX_LINE, ends_connection, is_plain_end, is_valid_request_line, may_reuse_after

NEXT = b"GET /a HTTP/1.1\r\nHost: b\r\n\r\n"


def message(method: str = "POST", *, upgrade: bool = False, chunked: bool = False) -> RawRequestMessage:
    headers = CIMultiDictProxy(CIMultiDict[str]())
    return RawRequestMessage(method, "/", HttpVersion11, headers, (), False, None, upgrade, chunked, URL("/"))


@pytest.mark.parametrize(
    ("buffer", "valid"),
    [
        (b"GET / HTTP/1.1\r\n", True),
        (b"\r\n\r\nGET / HTTP/1.1\r\n", True),
        (b"GET  / HTTP/1.1\r\n", False),
        (b"GET /  HTTP/1.1\r\n", False),
        (b"GET /a b HTTP/1.1\r\n", False),
        (b"GET / HTTP/1.1 \r\n", False),
        (b"GET /\r\n", False),
        (b"GET", True),
        (b"", True),
        (b"G" * 2 * MAX_LINE, True),
        (b"G" * (2 * MAX_LINE + 1), False),
        (NEXT + NEXT, True),
        (NEXT + b"GET  /b HTTP/1.1\r\n", False),
        (NEXT + b"GET /b  HTTP/1.1\r\n", False),
    ],
)
def test_a_request_line_has_single_spaces(buffer: bytes, *, valid: bool) -> None:
    assert is_valid_request_line(buffer) == valid


@pytest.mark.parametrize(
    ("request_message", "ends", "may_reuse"),
    [
        (message(), False, False),
        (message(chunked=True), True, True),
        (message(upgrade=True), True, False),
        (message(upgrade=True, chunked=True), True, False),
        (message("CONNECT"), True, False),
        (message("CONNECT", chunked=True), True, False),
    ],
)
def test_which_requests_end_their_connection(
    request_message: RawRequestMessage, *, ends: bool, may_reuse: bool
) -> None:
    assert ends_connection(request_message) == ends
    assert may_reuse_after(request_message) == may_reuse


@pytest.mark.parametrize(
    ("before", "data", "plain"),
    [
        (b"", b"1\r\na\r\n0\r\n\r\n", True),
        (b"", b"1\r\na\r\n000\r\n\r\n", True),
        (b"", b"1\r\na\r\n0\r\nx: 1\r\n\r\n", False),
        (b"\r\n", b"0\r\n\r\n", True),
        (b"1:", b"0\r\n\r\n", False),
        (b": ", b"0\r\n\r\n", False),
        (b"0\r", b"\n\r\n", False),
        (b"\r\n", b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n", False),
        (b"", b"", False),
    ],
)
def test_a_chunked_body_ends_plainly_only_without_a_trailer_section(before: bytes, data: bytes, *, plain: bool) -> None:
    assert is_plain_end(data, before) == plain
