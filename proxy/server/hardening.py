"""How does the process keep its secrets: no core dumps, nobody looking inside, none left in its environment?"""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from types import TracebackType

from proxy.config import Config
from proxy.observability import logging

_PR_SET_DUMPABLE = 4  # prctl(2)
SETTLED_FOR = 50
_LONG = 16  # characters of a text that stands in another one by no accident


def harden() -> None:
    """Keep memory out of core dumps and debuggers, texts out of tracebacks; open as many files as are allowed.

    What a system does not have is left out.
    """
    sys.excepthook = _report_uncaught
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


def freeze_gc() -> None:
    """Take what is there, modules above all, for what stays: the garbage collector looks at it no more.

    To go through it takes a tenth of a second, in which no request would be served.
    """
    gc.collect()
    gc.freeze()


class GcPaused:
    """Keeps the garbage collector away while much is made that stays, such as a new configuration; use it with `with`.

    The collector would go through all of the process's objects, several times over, with every request waiting. What
    was made is then left to reference counting, as after `settle`. Every SETTLED_FOR-th time all is gone through, so
    that what went in rings, and was taken for what stays, does not add up.
    """

    def __init__(self) -> None:
        self._times = 0

    def __enter__(self) -> None:
        """Collect nothing from now on."""
        gc.disable()

    def __exit__(self, *_: object) -> None:
        """Collect again, but not what is there now."""
        gc.enable()
        self._times += 1
        if self._times % SETTLED_FOR == 0:
            gc.unfreeze()
            gc.collect()
        else:
            gc.collect(1)
        gc.freeze()


def scrub_environment(environ: MutableMapping[str, str], config: Config) -> list[str]:
    """Take the variables that hold a secret out of the environment and return their names.

    Whatever is started later gets none of them.
    """
    secrets = set(_secrets_in(config))
    found = [
        name
        for name, value in environ.items()
        if any(secret == value.strip() or (len(secret) >= _LONG and secret in value) for secret in secrets)
    ]
    for name in found:
        del environ[name]
    return found


def overwrite_environ(names: Iterable[str]) -> None:
    """Write over these variables where the process was given them: `/proc/PID/environ` shows that place for ever."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Fields 50 and 51 (proc(5)); the second, a name in brackets, may hold blanks.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        start, end = int(fields[47]), int(fields[48])
        wanted = {name.encode() for name in names}
        for entry in ctypes.string_at(start, end - start).split(b"\0"):
            name, equals, value = entry.partition(b"=")
            if equals and name in wanted:
                ctypes.memset(start + len(name) + 1, ord("*"), len(value))
            start += len(entry) + 1


def _secrets_in(config: Config) -> Iterator[str]:
    for application in config.applications.values():
        yield application.client_secret.reveal()
    for account in config.accounts.values():
        for token in account.refresh_tokens.values():
            yield token.reveal()
    for caller in config.callers.values():
        if caller.key is not None:
            yield caller.key.reveal()
    for key in config.store_key:
        yield key.reveal()
    if config.store.password is not None:
        yield config.store.password.reveal()
    if config.tracing.headers is not None:
        yield config.tracing.headers.reveal()


def _report_uncaught(_: type[BaseException], exc: BaseException, __: TracebackType | None) -> None:
    """Name an exception that ends the process by type and place: its text may hold what a peer sent."""
    sys.stderr.write(f"sp-api-proxy: ended by {logging.format_location(exc)}\n")
