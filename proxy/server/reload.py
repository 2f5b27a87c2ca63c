"""Reload of the configuration, on SIGHUP or when a file has changed.

A whole new Config is read and checked beside the one in force, then applied at once; an invalid one changes nothing.
Files are polled by name every second: Kubernetes replaces a symbolic link on the way to a mounted file, and network
file systems such as NFS send no events (inotify(7)).
"""

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Literal, TypeVar

from proxy.config import Config, ConfigError, Loaded
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.server.admin.app import ReloadStatus
from proxy.server.handover import ReloadOutcome
from proxy.server.hardening import GcPaused
from proxy.server.sockets import CannotListen

POLL_INTERVAL = 1.0  # seconds
READ_TIMEOUT = 30.0  # seconds; a network file system can hang, and so can a pipe that nobody writes to
MAX_PROBLEMS = 100  # in a log line and in /status

Result = Literal["ok", "unchanged", "failed"]
FileSignature = tuple[int, int, int, int, int] | None
FileSignatures = tuple[FileSignature, ...]
_T = TypeVar("_T")


class ConfigWatcher:
    """Reads and applies new configurations.

    `load` reads and checks one; it may block, and raise ConfigError. `apply_config` puts it in force, or raises
    CannotListen or ConfigError. `on_result` is called with None when a reload begins, and with its result.
    `signatures` are those of the files when `loaded` was read from them.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        load: Callable[[], Loaded],
        apply_config: Callable[[Config], Awaitable[ReloadOutcome]],
        status: ReloadStatus,
        metrics: Metrics,
        on_result: Callable[[Result | None], None] = lambda _: None,
        wall: Callable[[], float] = time.time,
        poll_interval: float = POLL_INTERVAL,
        signatures: FileSignatures | None = None,
    ) -> None:
        self._load = load
        self._apply_config = apply_config
        self._status = status
        self._metrics = metrics
        self._on_result = on_result
        self._wall = wall
        self._poll_interval = poll_interval
        self._requested = asyncio.Event()
        self._gc_paused = GcPaused()
        self._files = loaded.files
        self._warned = _texts(loaded)
        self._signatures = signatures or file_signatures(self._files)

    def request_reload(self) -> None:
        """Have the configuration reloaded, whether its files have changed or not."""
        self._requested.set()

    async def watch(self) -> None:
        """Reload on request and when files change, for as long as the proxy runs."""
        changing = self._signatures
        while True:
            is_requested = await self._wait_for_request()
            try:
                found = await run_in_thread(lambda: file_signatures(self._files))
            except TimeoutError:
                LOGGER.error("the configuration's files cannot be checked: their file system does not respond")
                continue
            # A file may be half written: it is read once two polls in a row have found the same.
            if is_requested or (found != self._signatures and found == changing):
                self._signatures = found
                await self.reload("SIGHUP" if is_requested else "a file has changed")
                changing = self._signatures
            else:
                changing = found

    async def _wait_for_request(self) -> bool:
        try:
            async with asyncio.timeout(self._poll_interval):
                await self._requested.wait()
        except TimeoutError:
            return False
        self._requested.clear()
        return True

    async def reload(self, reason: str) -> Result:
        """Read the configuration and apply it if it is valid; log, count and report the result."""
        with self._gc_paused:  # around all of it: an exception holds what was read, by its frames
            return await self._reload(reason)

    async def _reload(self, reason: str) -> Result:
        self._on_result(None)
        problems: tuple[str, ...] = ()
        files: Iterable[Path] = ()
        try:
            loaded = await run_in_thread(self._load)
            files = loaded.files
            outcome = await self._apply(loaded)
        except ConfigError as exc:
            files = exc.files or files
            problems = tuple(str(problem) for problem in exc.problems)
        except CannotListen as exc:
            problems = (str(exc),)
        except TimeoutError:
            problems = (f"its files could not be read within {READ_TIMEOUT:g} s",)
        except Exception as exc:  # noqa: BLE001 - logged; the next change is read all the same
            LOGGER.error("internal error", exc_info=exc)
            problems = ("the proxy failed to apply it; see its log",)
        else:
            return self.on_applied(loaded, outcome, reason)
        self._watch_files(files or self._files)  # the fix may come in one of them, or one may be missing yet
        return self.on_rejected(problems, reason)

    async def _apply(self, loaded: Loaded) -> ReloadOutcome:
        """Apply a configuration; raise its problems with the file and line of each."""
        try:
            return await self._apply_config(loaded.config)
        except ConfigError as exc:
            raise ConfigError(loaded.with_locations(exc.problems), exc.files or loaded.files) from exc

    def on_applied(self, loaded: Loaded, outcome: ReloadOutcome, reason: str) -> Result:
        self._watch_files(loaded.files)
        has_changed, needs_restart = outcome
        if has_changed:
            self._status.good_since = self._wall()
            LOGGER.info(
                "the new configuration is in force",
                extra=extra(because=reason, accounts=len(loaded.config.accounts)),
            )
        elif needs_restart:
            LOGGER.info("the settings that a reload can change are unchanged", extra=extra(because=reason))
        else:
            LOGGER.info("the configuration is unchanged", extra=extra(because=reason))
        if needs_restart and needs_restart != self._status.needs_restart:
            LOGGER.warning(
                "settings that take effect only after a restart have changed", extra=extra(keys=list(needs_restart))
            )
        warned, self._warned = self._warned, _texts(loaded)
        for text in self._warned:
            if text not in warned:
                LOGGER.warning("configuration warning", extra=extra(problem=text))
        self._status.needs_restart = needs_restart
        self._metrics.last_reload_success.set(self._wall())
        return self.record("ok" if has_changed else "unchanged", ())

    def on_rejected(self, problems: tuple[str, ...], reason: str) -> Result:
        LOGGER.error(
            "the new configuration was rejected; the previous one stays in force",
            extra=extra(because=reason, problems=list(problems[:MAX_PROBLEMS])),
        )
        self._status.needs_restart = ()  # those of the rejected configuration say nothing of the one in force
        return self.record("failed", problems[:MAX_PROBLEMS])

    def record(self, result: Result, problems: tuple[str, ...]) -> Result:
        self._status.checked_at, self._status.result = self._wall(), result
        self._status.problems = problems
        self._metrics.reloads.labels(result).inc()
        self._metrics.last_reload_successful.set(result != "failed")
        self._on_result(result)
        return result

    def _watch_files(self, files: Iterable[Path]) -> None:
        """Watch these files from now on; one that was watched keeps its signature from before it was read."""
        known = dict(zip(self._files, self._signatures, strict=True))
        self._files = tuple(dict.fromkeys(files))
        self._signatures = tuple(known[file] if file in known else _signature_of(file) for file in self._files)


def _texts(loaded: Loaded) -> tuple[str, ...]:
    return tuple(str(problem) for problem in loaded.warnings)


def file_signatures(files: Iterable[Path]) -> FileSignatures:
    """Return a value that changes whenever one of these files, or the target of a link to it, does."""
    return tuple(map(_signature_of, files))


def _signature_of(file: Path) -> FileSignature:
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None  # missing, perhaps in the middle of being replaced
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


async def run_in_thread(call: Callable[[], _T]) -> _T:
    """Return what `call` returns, run in a thread that neither requests nor the end of the process wait for.

    asyncio.to_thread will not do: the interpreter joins its threads at exit. Raises TimeoutError after READ_TIMEOUT.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    # In a list that is emptied, not in a variable: an exception refers to this frame by its traceback, and a frame that
    # refers back to it would keep all that was read until a garbage collection.
    outcome: list[tuple[_T, None] | tuple[None, Exception]] = []

    def wake() -> None:
        if not done.done():  # it is cancelled after the timeout
            done.set_result(None)

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as exc:  # noqa: BLE001 - raised in the caller
            outcome.append((None, exc))
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake)

    # Parsing is pure Python. The thread then offers the GIL to the event loop ten times as often as by default.
    default = sys.getswitchinterval()
    sys.setswitchinterval(default / 10)
    try:
        threading.Thread(target=run, name="reads the configuration", daemon=True).start()
        async with asyncio.timeout(READ_TIMEOUT):
            await done
    finally:
        sys.setswitchinterval(default)
    result, error = outcome.pop()
    if error is None:
        return result  # type: ignore[return-value]  # without an error it is what `call` returned
    try:
        raise error
    finally:
        del error
