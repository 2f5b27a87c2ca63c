"""Which sockets are listened on: their rights, their TLS, and how many descriptors there are for all of it?"""

import asyncio
import errno
import os
import shutil
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

from proxy.config import Address, Bounds, Config, Listener, Problem, Tls
from proxy.observability.logging import LOGGER, extra
from proxy.server.http_protocol import USES_LLHTTP, HttpServer

BACKLOG = 1024
RESERVED = 32  # descriptors for what is neither a client nor Amazon: log, event loop, listeners, token exchanges
CERTIFICATE_CHECK_INTERVAL = 5.0  # seconds after which the files of a certificate are looked at again


class CannotListen(Exception):
    """An address cannot be listened on; the text says which setting to change."""


# TLS.


class ServerTls:
    """The TLS of one listener; what its files hold now counts for every new connection.

    Raises OSError or ssl.SSLError, which is one, where they cannot be used at the start. Later, what was read last
    stays.
    """

    def __init__(self, settings: Tls) -> None:
        self._settings = settings
        self._stamp = self._current_stamp()
        self._current = self._read()
        # This context only ever hands over to the current one: a context cannot forget a CA that it was given.
        self.context = self._read()
        self.context.sni_callback = self._apply

    def _apply(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:  # noqa: ARG002
        connection.context = self._current

    def activate(self, settings: Tls) -> None:
        """Go by other files from now on. Whether there is a `client_ca` must stay as it is."""
        self._settings = settings
        self.reload_if_changed()

    def reload_if_changed(self) -> None:
        """Take up changed files; keep what there is, and say so, where they cannot be used."""
        try:
            stamp = self._current_stamp()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._current = self._read()
        except OSError as exc:
            LOGGER.error("a listener's changed certificate cannot be used", extra=extra(**self._key_of(exc)))
        else:
            LOGGER.info("a listener's certificate was read anew", extra=extra(certificate=self._settings.certificate))

    def _key_of(self, exc: OSError) -> dict[str, str]:
        return {"certificate": self._settings.certificate, "because": describe_error(exc)}

    def _current_stamp(self) -> tuple[tuple[int, int], ...]:
        names = (self._settings.certificate, self._settings.key, self._settings.client_ca)
        # By what the name leads to: container platforms change a link.
        seen = (Path(name).stat() for name in names if name is not None)
        return tuple((status.st_ino, status.st_mtime_ns) for status in seen)

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        # No password is asked for: an encrypted key would wait for one on the terminal.
        context.load_cert_chain(self._settings.certificate, self._settings.key, password="")
        if self._settings.client_ca is not None:
            context.load_verify_locations(self._settings.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def describe_error(exc: OSError) -> str:
    """Return what is wrong with a file, an address or a certificate, in a few words."""
    if isinstance(exc, ssl.SSLError):
        return (exc.reason or "not a certificate with its key").lower().replace("_", " ")
    return os.strerror(exc.errno) if exc.errno and exc.errno > 0 else "the name is not known"


def validate(config: Config) -> Iterator[Problem]:
    """Yield a problem for every listener's certificate that cannot be used, and for every file of it."""
    for index, listener in enumerate(config.listen):
        if listener.tls is not None:
            unreadable = list(_unreadable(f"listen[{index}].tls", listener.tls))
            yield from unreadable
            try:
                ServerTls(listener.tls)
            except OSError as exc:
                if not unreadable:
                    yield Problem(f"listen[{index}].tls", f"cannot be used: {describe_error(exc)}")


def _unreadable(setting: str, tls: Tls) -> Iterator[Problem]:
    for key in ("certificate", "key", "client_ca"):
        name = getattr(tls, key)
        try:
            if name is not None:
                Path(name).open("rb").close()
        except OSError as exc:
            yield Problem(f"{setting}.{key}", f"file {name}: {describe_error(exc)}")


# Listening.


async def listen(
    server: HttpServer,
    address: Address,
    setting: str,
    *,
    listener: Listener | None = None,
    tls: ServerTls | None = None,
) -> tuple[asyncio.AbstractServer, str]:
    """Listen on `address`; return what listens, and the address as it turned out (port 0 becomes a real one).

    Raises CannotListen.
    """
    if not USES_LLHTTP:
        raise CannotListen(
            "aiohttp came without its C parser, and the other one takes requests that this one refuses: install a "
            "wheel of aiohttp for this system, and do not set AIOHTTP_NO_EXTENSIONS"
        )
    loop = asyncio.get_running_loop()
    # A handshake is part of a request's head: it has as long.
    handshake = None if tls is None else server.header_timeout
    try:
        if address.path:
            sock = _unix_socket(address.path, listener)
            listening = await loop.create_unix_server(
                server,
                sock=sock,
                backlog=BACKLOG,
                ssl=tls.context if tls else None,
                ssl_handshake_timeout=handshake,
            )
            return listening, str(address)
        listening = await loop.create_server(
            server,
            address.host,
            address.port,
            backlog=BACKLOG,
            ssl=tls.context if tls else None,
            ssl_handshake_timeout=handshake,
        )
    except (OSError, LookupError) as exc:
        reason = describe_error(exc) if isinstance(exc, OSError) else f"there is no such user or group: {exc.args[0]}"
        is_taken = isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE
        raise CannotListen(f"cannot listen on {address}: {reason}; {suggest_fix(setting, is_taken=is_taken)}") from exc
    return listening, str(Address(address.host, listening.sockets[0].getsockname()[1]))


def suggest_fix(setting: str, *, is_taken: bool) -> str:
    """Return what to do where an address cannot be had; the first listener and the admin address have flags."""
    flag = {"listen[0]": "--listen", "admin": "--admin"}.get(setting)
    change = f"change {setting} in the configuration" + (f", or give another address with {flag}" if flag else "")
    return f"end what uses it, or {change}" if is_taken else change


def _unix_socket(path: str, listener: Listener | None) -> socket.socket:
    """Return a socket bound to `path` with the rights asked for: at no moment may others connect than those."""
    _clear_stale_socket(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
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
    sock.setblocking(False)  # noqa: FBT003 - that is how it is called
    return sock


def _number(name: str) -> str | int:
    return int(name) if name.isascii() and name.isdigit() else name


def _clear_stale_socket(path: str) -> None:
    """Remove a socket file that nobody listens on any more; raise OSError where somebody does, or it is no socket."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(17, "exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            Path(path).unlink(missing_ok=True)
            return
    raise OSError(98, "Address already in use")


# Descriptors.


def descriptors() -> int | None:
    """Return how many files this process may have open at once; None where nothing says so."""
    try:
        import resource  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def split_fd_limit(bounds: Bounds, upstream: int, available: int | None) -> tuple[int, int]:
    """Return how many connections there may be from clients and to Amazon, so that all find a descriptor.

    Those to Amazon get what they may have, a third of what there is at most.
    """
    if available is None:
        return bounds.connections, upstream
    limiter = max(4, available - RESERVED)
    upstream = min(upstream, max(2, limiter // 3))
    return min(bounds.connections, max(2, limiter - upstream)), upstream
