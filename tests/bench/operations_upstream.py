"""Upstream of memory_growth.py: responses for every operation, and responses with many headers.

Every response has a body of the same size, so that only the measured property differs. `?head=N` requests N bytes of
additional headers; a request for a Restricted Data Token gets one.
"""

import argparse
import asyncio
import json
from functools import cache
from pathlib import Path

import uvloop

from tests.bench.processes import HOST
from tests.bench.upstream import RESPONSE_SIZE, FixedResponse, api_body, ok_response, tls

MINT = b"POST /tokens/2021-03-01/restrictedDataToken"
FIELD = 500  # bytes of each further header, its name and line end included

_SIZE_QUERY = b"?head="


class ResponseByTarget(FixedResponse):
    """Sends the response that the request line asks for."""

    def __init__(self) -> None:
        super().__init__(response_with(0))

    def data_received(self, data: bytes) -> None:
        """Respond to each complete request; the proxy does not pipeline, so the buffer begins with a request line."""
        line = (self._buffer or data).split(b"\r\n", 1)[0]
        self._response = minted() if line.startswith(MINT) else response_with(_requested_size(line))
        super().data_received(data)


def _requested_size(line: bytes) -> int:
    """Return the bytes of headers that a request line asks for."""
    _, found, rest = line.partition(_SIZE_QUERY)
    return int(rest.split(b" ", 1)[0]) if found else 0


@cache
def response_with(size: int) -> bytes:
    """Return the small response with `size` bytes of additional headers."""
    head, _, body = ok_response(api_body()).partition(b"\r\n\r\n")
    return head + b"\r\n" + filler(size) + b"\r\n" + body


@cache
def minted() -> bytes:
    """Return the response to a request for a Restricted Data Token."""
    response = {"restrictedDataToken": "Atz.sprdt|benchmark", "expiresIn": 3600, "filler": ""}
    response["filler"] = "x" * (RESPONSE_SIZE - len(json.dumps(response)))
    return ok_response(json.dumps(response).encode())


def filler(size: int, field: int = FIELD) -> bytes:
    """Return headers of `size` bytes in total, `field` bytes each except for the last."""
    lines = []
    for number, at in enumerate(range(0, size, field)):
        name = b"X-Bench-%03d: " % number
        lines.append(name + b"v" * max(1, min(field, size - at) - len(name) - 2) + b"\r\n")
    return b"".join(lines)


async def _serve(port: int, certificate: Path, key: Path) -> None:
    await asyncio.get_running_loop().create_server(ResponseByTarget, HOST, port, ssl=tls(certificate, key))
    await asyncio.Event().wait()


def main() -> None:
    """Serve on the port given on the command line."""
    parser = argparse.ArgumentParser(description="The benchmark's stand-in for Amazon, with every operation.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options.port, options.certificate, options.key))


if __name__ == "__main__":
    main()
