"""Listening sockets: addresses, Unix socket permissions, and the file descriptor limit."""

import asyncio
import errno
import os
import shutil
import socket
import ssl
import stat
from pathlib import Path

from proxy.config import Address, Bounds, Listener
from proxy.request.aiohttp_internals import USES_LLHTTP
from proxy.server.http_server import HttpServer

BACKLOG = 1024
RESERVED = 32  # file descriptors for what is neither a client nor Amazon: log, event loop, listeners, token requests


class CannotListen(Exception):
    """An address cannot be listened on, or a listener does not respond; the text says which setting to change."""


def describe_error(exc: OSError) -> str:
    """Return what is wrong with a file, an address or a certificate, without its name or content."""
    if isinstance(exc, ssl.SSLError):
        return (exc.reason or "not a certificate with its key").lower().replace("_", " ")
    return os.strerror(exc.errno) if exc.errno and exc.errno > 0 else "the name is not known"


# Listening.


async def listen(
    server: HttpServer,
    address: Address,
    setting: str,
    *,
    listener: Listener | None = None,
    context: ssl.SSLContext | None = None,
) -> tuple[asyncio.AbstractServer, str]:
    """Listen on `address`; return the listening server and the actual address (port 0 becomes a real one).

    Raises CannotListen.
    """
    if not USES_LLHTTP:
        raise CannotListen(
            "aiohttp is installed without its C parser, and its Python parser accepts malformed requests: install a "
            "wheel of aiohttp for this system, and do not set AIOHTTP_NO_EXTENSIONS"
        )
    loop = asyncio.get_running_loop()
    # asyncio gives a handshake 60 s by default. A client has one timeout until its request has arrived.
    handshake = None if context is None else server.header_timeout
    try:
        if address.path:
            sock = _unix_socket(address.path, listener)
            listening = await loop.create_unix_server(
                server,
                sock=sock,
                backlog=BACKLOG,
                ssl=context,
                ssl_handshake_timeout=handshake,
            )
            return listening, str(address)
        listening = await loop.create_server(
            server,
            address.host,
            address.port,
            backlog=BACKLOG,
            ssl=context,
            ssl_handshake_timeout=handshake,
        )
    except (OSError, LookupError) as exc:
        reason = describe_error(exc) if isinstance(exc, OSError) else f"there is no such user or group: {exc.args[0]}"
        is_taken = isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE
        raise CannotListen(f"cannot listen on {address}: {reason}; {suggest_fix(setting, is_taken=is_taken)}") from exc
    return listening, str(Address(address.host, listening.sockets[0].getsockname()[1]))


def suggest_fix(setting: str, *, is_taken: bool) -> str:
    """Return the remedy for an address that cannot be listened on; two of them have a flag."""
    flag = {"listen[0]": "--listen", "admin": "--admin"}.get(setting)
    change = f"change {setting} in the configuration" + (f", or give another address with {flag}" if flag else "")
    return f"stop what uses it, or {change}" if is_taken else change


def _unix_socket(path: str, listener: Listener | None) -> socket.socket:
    """Return a socket bound to `path` with the configured owner, group and mode; it is never open to anybody else."""
    _clear_stale_socket(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # bind(2) creates the file; a chmod behind it would leave a moment in between
    try:
        sock.bind(path)
        if listener is not None:
            if listener.owner is not None:
                shutil.chown(path, user=_number(listener.owner))
            if listener.group is not None:
                shutil.chown(path, group=_number(listener.group))
            Path(path).chmod(listener.mode)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    sock.setblocking(False)  # noqa: FBT003 - its only parameter, positional
    return sock


def _number(name: str) -> str | int:
    return int(name) if name.isascii() and name.isdigit() else name


def _clear_stale_socket(path: str) -> None:
    """Remove a socket file that no process listens on; raise OSError if one does, or if it is not a socket."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            Path(path).unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, "Address already in use")


# Descriptors.


def descriptors() -> int | None:
    """Return how many files this process may have open at once; None if there is no limit."""
    try:
        import resource  # noqa: PLC0415 - Windows has no such module
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def split_fd_limit(bounds: Bounds, upstream: int, available: int | None) -> tuple[int, int]:
    """Return the limits of client connections and of upstream connections that fit in `available` file descriptors.

    Upstream connections get what is configured, up to a third of what is available.
    """
    if available is None:
        return bounds.connections, upstream
    usable = max(4, available - RESERVED)
    upstream = min(upstream, max(2, usable // 3))
    return min(bounds.connections, max(2, usable - upstream)), upstream
