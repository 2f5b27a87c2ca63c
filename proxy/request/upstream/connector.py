"""New connections: DNS, Happy Eyeballs, TLS, and a forward proxy.

Addresses are cached for half a minute and tried in turn with a short delay (RFC 8305, by aiohappyeyeballs).
Certificates are verified against the system's trust store or `pool.ca_file`; no setting turns that off.
"""

import asyncio
import os
import re
import socket
import ssl
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import aiohappyeyeballs

from proxy.config import LOOPBACK_NAMES, Config, Problem
from proxy.request.upstream.http1 import ClientConnection

ADDRESS_TTL = 30.0  # seconds
NEXT_ADDRESS = 0.25  # seconds until the next address is tried in parallel (RFC 8305 section 8: 250 ms)
MAX_PROXY_HEAD = 16 * 1024  # bytes of a forward proxy's response

_CONNECTED = re.compile(rb"HTTP/1\.[01] 2\d\d[ \r]")

AddressList = list[aiohappyeyeballs.AddrInfoType]


class Origin(NamedTuple):
    """The scheme, host and port of a connection (RFC 9110 section 4.3.1): requests to one origin share connections."""

    is_tls: bool
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Origin":
        """Return the origin of a validated URL."""
        parts = urlsplit(url)
        is_tls = parts.scheme == "https"
        return cls(is_tls, parts.hostname or "", parts.port or (443 if is_tls else 80))

    @property
    def authority(self) -> str:
        """The value of `Host`: without the port where it is the default (RFC 9110 section 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


class ResumingContext(ssl.SSLContext):
    """Verifies hosts, and resumes the last session with each (RFC 8446 section 2.2): a handshake without certificates.

    asyncio's `create_connection` has no parameter for a session, so it is set in `wrap_bio`, which asyncio and uvloop
    call to make a connection's TLS object (held by tests/project/test_private_names.py).
    """

    sessions: dict[str, ssl.SSLSession]  # by host name, as verified

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002 - the signature that it overrides
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Make the TLS object of one connection, with the host's last session."""
        known = session or self.sessions.get(str(server_hostname))
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, known)

    def remember(self, host: str, tls: ssl.SSLObject | None) -> None:
        """Store the session of a connection.

        Something must have been read on it: in TLS 1.3 tickets arrive after the handshake (RFC 8446 section 4.6.1).
        """
        session = tls.session if tls is not None else None
        if session is not None and session.has_ticket:
            self.sessions[host] = session


def tls_context(config: Config) -> ResumingContext:
    """Return the TLS context for Amazon's hosts: TLS 1.2 and later, the system's certificates or `pool.ca_file`.

    Raises OSError where the file cannot be used. As `ssl.create_default_context`, except that SSLKEYLOGFILE does not
    make it log the session keys.
    """
    context = ResumingContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificates and host names
    context.sessions = {}
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if sys.version_info >= (3, 13):
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    if config.pool.ca_file is not None:
        context.load_verify_locations(cafile=config.pool.ca_file)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def validate(config: Config) -> Iterator[Problem]:
    """Yield a problem where `pool.ca_file` cannot be used."""
    if config.pool.ca_file is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=config.pool.ca_file)
    except OSError as exc:
        reason = "holds no certificate" if isinstance(exc, ssl.SSLError) else os.strerror(exc.errno or 0)
        yield Problem("pool.ca_file", f"cannot be used: {reason}")


class DnsCache:
    """The addresses of hosts: one look-up at a time for each, cached for ADDRESS_TTL.

    Where a later look-up fails, the addresses known before are used again.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[float, AddressList]] = {}
        self._pending: dict[tuple[str, int], asyncio.Task[AddressList]] = {}

    async def resolve(self, host: str, port: int) -> AddressList:
        """Return the addresses of a host; raise OSError where none is known."""
        key = host, port
        until, known = self._known.get(key, (0.0, []))
        if asyncio.get_running_loop().time() < until:
            return known
        task = self._pending.get(key)
        if task is None:
            task = self._pending[key] = asyncio.create_task(self._query(host, port), name="addresses")
            task.add_done_callback(lambda done: self._on_resolved(key, done))
        try:
            return await asyncio.shield(task)
        except OSError:
            if known:
                return known
            raise

    def invalidate(self, host: str, port: int) -> None:
        """Look up again next time; the addresses known are kept in case that fails."""
        _, known = self._known.get((host, port), (0.0, []))
        if known:
            self._known[host, port] = 0.0, known

    async def _query(self, host: str, port: int) -> AddressList:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self._known[host, port] = loop.time() + ADDRESS_TTL, list(found)
        return list(found)

    def _on_resolved(self, key: tuple[str, int], task: "asyncio.Task[AddressList]") -> None:
        self._pending.pop(key, None)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: all waiters may have left


class Connector:
    """Makes connections: direct ones to loopback hosts and `pool.no_proxy`, others by `pool.proxy` where it is set."""

    def __init__(self, config: Config, tls: ResumingContext) -> None:
        self._tls = tls
        self._dns = DnsCache()
        self._proxy = config.pool.proxy
        self._no_proxy = tuple(name.lower().lstrip("*").lstrip(".") for name in config.pool.no_proxy)

    async def connect(self, origin: Origin, make: Callable[[socket.socket], ClientConnection]) -> ClientConnection:
        """Return a new connection to `origin`, ready for a request; raise OSError, which includes `ssl.SSLError`."""
        sock = await self._socket(origin)
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: make(sock),
                sock=sock,
                ssl=self._tls if origin.is_tls else None,
                server_hostname=origin.host if origin.is_tls else None,
            )
        except BaseException:
            sock.close()
            raise
        return connection

    async def _socket(self, origin: Origin) -> socket.socket:
        if self._proxy is None or self._is_direct(origin.host):
            return await self._open_socket(origin.host, origin.port)
        proxy = urlsplit(self._proxy.reveal())
        sock = await self._open_socket(proxy.hostname or "", proxy.port or 3128)
        try:
            await _open_tunnel(sock, origin, proxy.username, proxy.password)
        except BaseException:
            sock.close()
            raise
        return sock

    def _is_direct(self, host: str) -> bool:
        return is_loopback(host) or any(
            not name or host == name or f".{host}".endswith(f".{name}") for name in self._no_proxy
        )

    async def _open_socket(self, host: str, port: int) -> socket.socket:
        addresses = await self._dns.resolve(host, port)
        try:
            return await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS, interleave=1)
        except OSError:
            self._dns.invalidate(host, port)
            raise


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback name or address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK_NAMES


async def _open_tunnel(sock: socket.socket, origin: Origin, user: str | None, password: str | None) -> None:
    """Open a tunnel to `origin` through a forward proxy by CONNECT (RFC 9110 section 9.3.6); raise OSError."""
    loop = asyncio.get_running_loop()
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    lines = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"Host: {host}:{origin.port}"]
    if user is not None:
        credentials = f"{unquote(user)}:{unquote(password or '')}".encode()
        lines.append(f"Proxy-Authorization: Basic {b64encode(credentials).decode()}")
    await loop.sock_sendall(sock, "\r\n".join([*lines, "", ""]).encode())
    head = b""
    while b"\r\n\r\n" not in head:
        data = await loop.sock_recv(sock, 4096)
        head += data
        if not data or len(head) > MAX_PROXY_HEAD:
            raise ConnectionError("the forward proxy sent no valid response")
    # In TLS the client speaks first: bytes after the head would not be from the host.
    if not _CONNECTED.match(head) or not head.endswith(b"\r\n\r\n"):
        raise ConnectionRefusedError("the forward proxy refused the connection")
