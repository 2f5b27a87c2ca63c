"""State notifications to systemd: ready, reloading, stopping (sd_notify(3)).

The protocol is one datagram per message, which is less code than a dependency.
"""

import contextlib
import socket
import time
from collections.abc import Callable


class Service:
    """Sends to the socket that NOTIFY_SOCKET names; without one, or if it cannot be reached, it does nothing."""

    def __init__(self, address: str, now: Callable[[], int] = time.monotonic_ns) -> None:
        # A leading @ stands for the null byte of an abstract socket address (unix(7)).
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._now = now

    def notify_ready(self, status: str = "") -> None:
        """Report that requests are served, after the start or a reload; `status` is shown by `systemctl status`."""
        self._send("READY=1", f"STATUS={status or 'serving'}")

    def notify_reloading(self) -> None:
        """Report that a reload has begun; with `Type=notify-reload`, systemd waits for `notify_ready` after it."""
        # systemd requires the time with RELOADING=1, to match it with the request (sd_notify(3)).
        self._send("RELOADING=1", f"MONOTONIC_USEC={self._now() // 1000}")

    def notify_stopping(self) -> None:
        """Report that the shutdown has begun."""
        self._send("STOPPING=1", "STATUS=finishing the requests in flight")

    def _send(self, *lines: str) -> None:
        if not self._address or not hasattr(socket, "AF_UNIX"):
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # noqa: FBT003 - its only parameter, positional
            sock.sendto("\n".join(lines).encode(), self._address)
