"""TLS of listeners: certificates, client authorities, and their reload."""

import ssl
from collections.abc import Iterator
from pathlib import Path

from proxy.config import Config, Problem, Tls
from proxy.observability.logging import LOGGER, extra
from proxy.server.sockets import describe_error

CERTIFICATE_CHECK_INTERVAL = 5.0  # seconds between two checks of a certificate's files


class ServerTls:
    """TLS of one listener; each new connection uses the certificate that its files hold now.

    Raises OSError (ssl.SSLError is one) if they cannot be used at the start. Later, the last usable one stays in force.
    """

    def __init__(self, settings: Tls) -> None:
        self._settings = settings
        self._signature = self._current_signature()
        self._current = self._read()
        # The loop keeps this context for as long as it listens. It is never changed, because a context cannot forget a
        # CA that was loaded into it; the callback switches each connection to the current one. OpenSSL calls it for
        # clients without SNI as well.
        self.context = self._read()
        self.context.sni_callback = self._apply

    def _apply(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:  # noqa: ARG002
        connection.context = self._current

    def activate(self, settings: Tls) -> None:
        """Use other files from now on. Whether there is a `client_ca` must not change (`restart_only_changes`)."""
        self._settings = settings
        self.reload_if_changed()

    def reload_if_changed(self) -> None:
        """Read changed files; if they cannot be used, log that and keep what is in force."""
        try:
            signature = self._current_signature()
            if signature == self._signature:
                return
            self._signature = signature
            self._current = self._read()
        except OSError as exc:
            LOGGER.error("a listener's new certificate cannot be used", extra=extra(**self._log_fields(exc)))
        else:
            LOGGER.info("a listener's certificate was reloaded", extra=extra(certificate=self._settings.certificate))

    def _log_fields(self, exc: OSError) -> dict[str, str]:
        return {"certificate": self._settings.certificate, "because": describe_error(exc)}

    def _current_signature(self) -> tuple[tuple[int, int], ...]:
        names = (self._settings.certificate, self._settings.key, self._settings.client_ca)
        # `stat`, not `lstat`: Kubernetes updates a mounted secret by replacing a symbolic link.
        found = (Path(name).stat() for name in names if name is not None)
        return tuple((status.st_ino, status.st_mtime_ns) for status in found)

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        # Without `password`, OpenSSL asks for the one of an encrypted key on the terminal, and the start hangs.
        context.load_cert_chain(self._settings.certificate, self._settings.key, password="")
        if self._settings.client_ca is not None:
            context.load_verify_locations(self._settings.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def validate(config: Config) -> Iterator[Problem]:
    """Yield a problem for each listener's certificate that cannot be used, and for each file that cannot be read."""
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
