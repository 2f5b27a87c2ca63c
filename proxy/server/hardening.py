"""Protection of secrets in the process: core dumps, debuggers, its environment; and the garbage collector's pauses."""

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
FULL_COLLECTION_EVERY = 50  # reloads
_MIN_CONTAINED = 16  # characters of a secret that cannot be a part of another value by accident


def harden() -> None:
    """Disable core dumps and debuggers, keep exception texts off standard error, raise the file descriptor limit.

    What the system does not have is skipped.
    """
    sys.excepthook = _report_uncaught
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource  # noqa: PLC0415

        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if sys.platform == "linux":
        # /proc/PID/environ and /proc/PID/mem then belong to root (proc(5)), and only root can attach a debugger.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def freeze_gc() -> None:
    """Freeze objects created at start-up, modules above all, so that the garbage collector does not scan them.

    A full collection of them takes about a tenth of a second, in which no request is served.
    """
    gc.collect()
    gc.freeze()


class GcPaused:
    """Context manager: no garbage collection while many long-lived objects are created, such as a configuration.

    The collector would scan all objects of the process several times while every request waits. What was created is
    frozen afterwards, as by `freeze_gc`, and freed by reference counting. Every FULL_COLLECTION_EVERY-th time there is
    a full collection, so that frozen reference cycles do not add up.
    """

    def __init__(self) -> None:
        self._times = 0

    def __enter__(self) -> None:
        """Disable the collector."""
        gc.disable()

    def __exit__(self, *_: object) -> None:
        """Enable the collector, and freeze what exists now."""
        gc.enable()
        self._times += 1
        if self._times % FULL_COLLECTION_EVERY == 0:
            gc.unfreeze()
            gc.collect()
        else:
            gc.collect(1)
        gc.freeze()


def scrub_environment(environ: MutableMapping[str, str], config: Config) -> list[str]:
    """Remove the variables that hold a secret from the environment and return their names.

    Child processes then inherit none of them.
    """
    secrets = set(_secrets_in(config))
    found = [
        name
        for name, value in environ.items()
        if any(secret == value.strip() or (len(secret) >= _MIN_CONTAINED and secret in value) for secret in secrets)
    ]
    for name in found:
        del environ[name]
    return found


def overwrite_environ(names: Iterable[str]) -> None:
    """Overwrite these variables in the memory that the process was started with.

    `/proc/PID/environ` shows that memory as long as the process runs, whatever Python does with its copy (proc(5)).
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Fields 50 and 51 (proc(5)); the second, a name in brackets, may contain spaces.
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
    """Report an exception that ends the process by type and place: its text may quote what a client sent."""
    sys.stderr.write(f"sp-api-proxy: ended by {logging.format_location(exc)}\n")
