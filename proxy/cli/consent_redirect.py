"""The redirect after a consent: pasted by the user, or received on a port of this machine."""

import asyncio
import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator

from aiohttp import web

from proxy.amazon.consent import Consent, NotAuthorised, WrongState, parse_redirect
from proxy.config import is_loopback

MAX_PASTES = 3  # pasted addresses, after which the user has to start again
# A wrong request does not end the wait, or any page in the browser could end it; the number still has to be bounded.
MAX_VISITS = 100  # requests that are served, after which the listener stops
# A refresh token has at most 2048 bytes (LWA "Refresh Tokens"); the rest is room for addresses.
_MAX_LINE = 16 * 1024  # bytes


def read_pasted_redirect(state: str, ask: Callable[[str], str], *, again: bool) -> Consent:
    """Return the consent in the address that the user pastes; `ask` shows a text and returns a line.

    With `again`, an address that does not belong to this request is asked for again. Raises NotAuthorised, and what
    `ask` raises.
    """
    for left in range(MAX_PASTES if again else 1, 0, -1):
        address = ask("The address that it led to: ")
        if not address:
            raise NotAuthorised("nothing was pasted")
        try:
            return parse_redirect(address, state)
        except WrongState as exc:
            if left == 1:
                raise
            sys.stderr.write(f"That is not it: {exc}.\n")
    raise AssertionError


def read_line(prompt: str, timeout: float) -> str:
    """Return a line of standard input, which is not shown on a terminal; raise TimeoutError after `timeout` seconds.

    On Windows there is no timeout.
    """
    with _without_echo():
        sys.stderr.write(prompt)
        sys.stderr.flush()
        try:
            line = _line(sys.stdin.fileno(), time.monotonic() + timeout)
        finally:
            if sys.stdin.isatty():
                sys.stderr.write("\n")
    return line.decode("utf-8", "replace").strip()


def _line(descriptor: int, end: float) -> bytes:
    # os.read and not sys.stdin.readline: select does not see what a buffered stream has already read.
    read = b""
    while b"\n" not in read and len(read) <= _MAX_LINE:
        if os.name == "posix" and not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        data = os.read(descriptor, 4096)
        if not data:
            break
        read += data
    return read.partition(b"\n")[0]


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """Turn off the terminal's echo: what is shown stays in its scrollback."""
    if not sys.stdin.isatty() or os.name != "posix":
        yield
        return
    import termios  # noqa: PLC0415 - there is none on Windows

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    # TCSADRAIN: the prompt is written out first, and input that was typed ahead is kept.
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


async def wait_for_redirect(state: str, port: int, say: Callable[[int], None]) -> Consent:
    """Listen on 127.0.0.1 for the browser and return the consent in its request; `say` gets the port.

    Only a redirect that belongs to this request for consent is accepted. Raises NotAuthorised, and OSError if the port
    cannot be listened on.
    """
    come: asyncio.Future[Consent] = asyncio.get_running_loop().create_future()
    visits = 0

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal visits
        visits += 1
        # done(): a second set_exception would raise InvalidStateError.
        if visits > MAX_VISITS and not come.done():
            come.set_exception(NotAuthorised(f"{MAX_VISITS} requests came, and none was an answer to this one"))
        return _received(request, state, come)

    runner = web.ServerRunner(web.Server(handle, access_log=None, keepalive_timeout=1.0), shutdown_timeout=1.0)
    await runner.setup()
    try:
        # The address and not the name localhost, which may resolve to another interface (RFC 8252 section 8.3).
        await web.TCPSite(runner, "127.0.0.1", port).start()
        say(runner.addresses[0][1])
        return await come
    finally:
        await runner.cleanup()


def _received(request: web.BaseRequest, state: str, come: "asyncio.Future[Consent]") -> web.Response:
    """Serve one request of the browser and keep the consent in it."""
    # First: a page whose name was rebound to 127.0.0.1 must not learn whether a consent came.
    if not is_loopback(request.url.host or ""):
        return _page(421, "This is not the host you are looking for.")  # DNS rebinding
    if request.method != "GET":
        return _page(405, "Only GET is answered here.")
    if come.done():
        return _page(410, "Amazon's answer has come already. You can close this page.")
    try:
        consent = parse_redirect(request.raw_path, state)
    except WrongState:
        return _page(403, "This is no answer to the request for consent that is waited for.")
    except NotAuthorised as exc:
        come.set_exception(exc)
        return _page(400, "Amazon's answer is no consent. The terminal says more; you can close this page.")
    come.set_result(consent)
    return _page(200, "Amazon's answer has come. The terminal says more; you can close this page.")


def _page(status: int, text: str) -> web.Response:
    """Return a page that has nothing of the request, loads nothing, and sends no Referer."""
    headers = {
        "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
    }
    body = f'<!doctype html><html lang="en"><title>sp-api-proxy</title><p>{text}</p></html>\n'
    return web.Response(status=status, text=body, content_type="text/html", headers=headers)
