"""What does systemd hear of the service: ready, reloading, stopping (sd_notify(3))?

The protocol is one datagram a message, which is less code than a dependency for it.
"""

import contextlib
import socket
import time
from collections.abc import Callable


class Service:
    """Tells the socket named by NOTIFY_SOCKET; without one, or with one that nobody reads, nothing happens."""

    def __init__(self, address: str, now: Callable[[], int] = time.monotonic_ns) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._now = now

    def notify_ready(self, status: str = "") -> None:
        """Say that requests are served, after the start or a reload; `status` is what `systemctl status` shows."""
        self._send("READY=1", f"STATUS={status or 'serving'}")

    def notify_reloading(self) -> None:
        """Say that a reload has begun; `Type=notify-reload` waits for `is_ready` after it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={self._now() // 1000}")

    def notify_stopping(self) -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1", "STATUS=finishing the requests in flight")

    def _send(self, *lines: str) -> None:
        if not self._address or not hasattr(socket, "AF_UNIX"):
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # noqa: FBT003 - that is how it is called
            sock.sendto("\n".join(lines).encode(), self._address)
