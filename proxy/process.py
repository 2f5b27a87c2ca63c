"""How does the process keep its secrets: no core dumps, nobody looking inside, none left in its environment?"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator, MutableMapping
from types import TracebackType

from proxy import logs
from proxy.config import Config

_PR_SET_DUMPABLE = 4  # prctl(2)
_LONG = 16  # characters of a text that stands in another one by no accident


def harden() -> None:
    """Keep memory out of core dumps and debuggers, texts out of tracebacks; open as many files as are allowed.

    What a system does not have is left out.
    """
    sys.excepthook = _without_its_text
    with contextlib.suppress(ImportError):  # there is no such module on Windows
        import resource  # noqa: PLC0415

        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if sys.platform == "linux":
        # Also makes /proc/PID/environ and /proc/PID/mem the administrator's alone.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def forget_secrets(environ: MutableMapping[str, str], config: Config) -> None:
    """Take the variables that hold a secret out of the environment: whatever is started later gets none of them."""
    secrets = set(_secrets_in(config))
    for name, value in list(environ.items()):
        if any(secret == value.strip() or (len(secret) >= _LONG and secret in value) for secret in secrets):
            del environ[name]


def _secrets_in(config: Config) -> Iterator[str]:
    for application in config.applications.values():
        yield application.client_secret.reveal()
    for account in config.accounts.values():
        for token in account.refresh_tokens.values():
            yield token.reveal()
    for caller in config.callers.values():
        if caller.key is not None:
            yield caller.key.reveal()


def _without_its_text(_: type[BaseException], exc: BaseException, __: TracebackType | None) -> None:
    """Name an exception that ends the process by type and place: its text may hold what a peer sent."""
    sys.stderr.write(f"sp-api-proxy: ended by {logs.trace_of(exc)}\n")
