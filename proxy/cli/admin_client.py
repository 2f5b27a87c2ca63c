"""A client for the admin and health addresses of a running proxy. Standard library alone: `healthcheck` uses it."""

import http.client
import socket
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

TIMEOUT = 3.0  # seconds for one response
POLL_INTERVAL = 0.1  # seconds between two requests
MAX_TEXT = 500  # bytes of a response that are shown


class AdminAddress(NamedTuple):
    """Where a proxy is asked: host and port, or the path of a Unix socket."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class AdminResponse(NamedTuple):
    """Whether the status was 200, and the text of the response, or why there was none."""

    ok: bool
    text: str


class _Connection(http.client.HTTPConnection):
    """A connection to an address, which may be a Unix socket."""

    def __init__(self, address: AdminAddress, timeout: float) -> None:
        super().__init__("localhost", address.port, timeout=timeout)
        self._address = address

    def connect(self) -> None:
        """Connect."""
        if self._address.path:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._address.path)
        else:
            self.sock = socket.create_connection((connect_host(self._address.host), self._address.port), self.timeout)


def connect_host(host: str) -> str:
    """Return the host to connect to where `host` is listened on: all interfaces are no address to call."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing listens here


def address_in(url: str) -> AdminAddress:
    """Return the address of `http://host:port`; raise ValueError for anything else."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname or parts.path not in {"", "/"} or parts.query or parts.username:
        raise ValueError("not the address of a proxy")
    return AdminAddress(parts.hostname, parts.port or 80)


def request(
    address: AdminAddress, method: str, path: str, timeout: float = TIMEOUT, max_bytes: int = MAX_TEXT
) -> AdminResponse:
    """Send one request and read `max_bytes` bytes of the response."""
    connection = _Connection(address, timeout)
    host = "localhost" if address.path else connect_host(address.host)
    try:
        connection.request(method, path, headers={"Host": f"[{host}]" if ":" in host else host})
        response = connection.getresponse()
        text = response.read(max_bytes).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as exc:
        reason = _reason(exc)
        return AdminResponse(ok=False, text=f"no response from {address}: {reason}. Is the proxy running? {_ELSEWHERE}")
    finally:
        connection.close()
    is_for_apps = any(name.lower() in _MARKS for name, _ in response.getheaders())
    if response.status == 200 and not is_for_apps:
        return AdminResponse(ok=True, text=text)
    return AdminResponse(
        ok=False, text=f"{response.status}: {text}{_remedy(response.status, text, address, is_for_apps=is_for_apps)}"
    )


def _remedy(status: int, text: str, address: AdminAddress, *, is_for_apps: bool) -> str:
    """Return what to do about a response that another address should have given."""
    if is_for_apps:
        return f". {address} is where apps send their requests. {_ELSEWHERE}"
    if status == 404 and text == "Not Found":
        return ". The health address only says how it is: ask at the admin address, with --url or --config"
    if text.startswith(_OWN_HEADERS):
        return ""
    return f". {address} is perhaps no proxy's. {_ELSEWHERE}"


# Headers of responses on the apps' port, Amazon's or the proxy's own.
_MARKS = {"x-sp-proxy", "x-sp-proxy-error"}
# How the texts of the admin and health addresses begin when the status is not 200.
_OWN_HEADERS = ("not ready", "starting", "switched off", "call this address", "not for")
_ELSEWHERE = "Name its admin or health address with --url, or the file that says it with --config"


def _reason(exc: Exception) -> str:
    if isinstance(exc, TimeoutError):
        return "it did not come in time"
    return (isinstance(exc, OSError) and exc.strerror) or "it is no HTTP"


def wait_until_ready(
    address: AdminAddress,
    timeout: float,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> AdminResponse:
    """Ask until the proxy is ready or `timeout` seconds are over; return the last response."""
    end = now() + timeout
    while True:
        response = request(address, "GET", "/readyz", max(POLL_INTERVAL, min(TIMEOUT, end - now())))
        if response.ok or now() + POLL_INTERVAL >= end:
            return response
        sleep(POLL_INTERVAL)
