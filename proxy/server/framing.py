"""Checks of a request's framing that aiohttp's parser leaves out; plain functions of bytes.

What they are for: a proxy and a client, or a proxy before this one, that disagree on where a request ends can be made
to take a part of one caller's request for another caller's (request smuggling, RFC 9112 section 11.2).
"""

import re

from aiohttp.http import RawRequestMessage

MAX_LINE = 16 * 1024  # bytes

# The request line of a request behind another one, with a space too many.
_SPACED_LINE = re.compile(rb"\r\n\r\n[A-Z]+ (?: [^\r\n]*|[^ \r\n]+ +) HTTP/[0-9.]+\r\n")

_PLAIN_END = re.compile(rb"\r\n0+\r\n\r\n\Z")  # of a chunked body, without a trailer section
_PLAIN_END_ALONE = re.compile(rb"0+\r\n\r\n")


def is_valid_request_line(buffer: bytes) -> bool:
    """Return whether the request that begins with `buffer` has single spaces in its request line.

    So RFC 9112 section 3 has it. llhttp, as aiohttp 3.14 uses it, passes over more spaces, and so other readers of the
    same bytes may find another target in them. A line that is not complete yet is valid up to 2 * MAX_LINE bytes.
    """
    # Empty lines before a request are ignored (RFC 9112 section 2.2).
    line, end, rest = buffer.lstrip(b"\r\n").partition(b"\r\n")
    if not end:
        return len(buffer) <= 2 * MAX_LINE  # past MAX_LINE the parser reports it, as a line that is too long
    return line.count(b" ") == 2 and not _SPACED_LINE.search(rest)


def ends_connection(message: RawRequestMessage) -> bool:
    """Return whether nothing may be read on a connection behind this request, unless `may_reuse_after` it.

    Measured with aiohttp 3.14.5: bytes behind a request with `Upgrade` vanish without a message (compare aiohttp
    #12734), those behind CONNECT, its body included, may be read as requests later, and the fields of a trailer section
    become header fields of the next request on the connection, which RFC 9112 section 7.1.2 forbids.
    """
    return message.upgrade or message.chunked or message.method == "CONNECT"


def may_reuse_after(message: RawRequestMessage) -> bool:
    """Return whether the connection can be reused after a request that `ends_connection`, given a plain end."""
    return message.chunked and not message.upgrade and message.method != "CONNECT"


def is_plain_end(data: bytes, last_two_bytes: bytes) -> bool:
    """Return whether a chunked body that ends in `data` had no trailer section.

    `last_two_bytes` came before `data`. They decide where `data` is the last chunk alone: `0\\r\\n\\r\\n` is also how a
    trailer field ends whose beginning (`x: 1`) came before it.
    """
    if _PLAIN_END.search(data):
        return True
    return last_two_bytes == b"\r\n" and _PLAIN_END_ALONE.fullmatch(data) is not None
