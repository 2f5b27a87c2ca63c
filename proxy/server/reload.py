"""When does a changed file, or SIGHUP, become the configuration in force, and who learns that it did not?

A whole new Config is read and checked beside the one that serves, and handed over in one piece; a bad one changes
nothing. Files are looked at by their names every second: container platforms replace a link on the way to them, and
some file systems tell nobody of changes.
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
READ_TIMEOUT = 30.0  # seconds for files that hang: those of a network, or of a pipe that nobody writes to
MAX_PROBLEMS = 100  # that a log line and /status name

Result = Literal["ok", "unchanged", "failed"]
FileSignature = tuple[int, int, int, int, int] | None
FileSignatures = tuple[FileSignature, ...]
_T = TypeVar("_T")


class ConfigWatcher:
    """Takes up new configurations.

    `load` reads and checks one; it may block, and raise ConfigError. `hand_over` makes it the one in force, or raises
    CannotListen or ConfigError. `note` hears when that begins, and how it went. `seen` are the stamps of the files when
    `loaded` was read from them.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        load: Callable[[], Loaded],
        hand_over: Callable[[Config], Awaitable[ReloadOutcome]],
        reloading: ReloadStatus,
        metrics: Metrics,
        note: Callable[[Result | None], None] = lambda _: None,
        wall: Callable[[], float] = time.time,
        look_every: float = POLL_INTERVAL,
        seen: FileSignatures | None = None,
    ) -> None:
        self._load = load
        self._apply_config = hand_over
        self._status = reloading
        self._metrics = metrics
        self._on_result = note
        self._wall = wall
        self._poll_interval = look_every
        self._requested = asyncio.Event()
        self._gc_paused = GcPaused()
        self._files = loaded.files
        self._warned = _texts(loaded)
        self._signatures = seen or file_signatures(self._files)

    def request_reload(self) -> None:
        """Have the configuration read anew, whether its files have changed or not."""
        self._requested.set()

    async def watch(self) -> None:
        """Take up what is asked for, and what has changed, for as long as the proxy runs."""
        changing = self._signatures
        while True:
            is_asked = await self._wait_for_request()
            try:
                seen = await run_in_thread(lambda: file_signatures(self._files))
            except TimeoutError:
                LOGGER.error("the configuration's files cannot be looked at: their file system hangs")
                continue
            # What is still being written is left alone until it was the same twice.
            if is_asked or (seen != self._signatures and seen == changing):
                self._signatures = seen
                await self.reload("SIGHUP" if is_asked else "a file has changed")
                changing = self._signatures
            else:
                changing = seen

    async def _wait_for_request(self) -> bool:
        try:
            async with asyncio.timeout(self._poll_interval):
                await self._requested.wait()
        except TimeoutError:
            return False
        self._requested.clear()
        return True

    async def reload(self, because: str) -> Result:
        """Read the configuration and take it up if it is good; log, count and note how that went."""
        with self._gc_paused:  # around all of it: an exception, while it is looked at, holds what was read
            return await self._reload(because)

    async def _reload(self, because: str) -> Result:
        self._on_result(None)
        problems: tuple[str, ...] = ()
        files: Iterable[Path] = ()
        try:
            loaded = await run_in_thread(self._load)
            files = loaded.files
            handed_over = await self._apply(loaded)
        except ConfigError as exc:
            files = exc.files or files
            problems = tuple(str(problem) for problem in exc.problems)
        except CannotListen as exc:
            problems = (str(exc),)
        except TimeoutError:
            problems = (f"its files could not be read within {READ_TIMEOUT:g} s",)
        except Exception as exc:  # noqa: BLE001 - logged; the next change is looked at all the same
            LOGGER.error("internal error", exc_info=exc)
            problems = ("the proxy failed to take it up; its log says where",)
        else:
            return self.on_applied(loaded, handed_over, because)
        self._watch_files(files or self._files)  # what is wrong may be mended in one of them, or one is still to come
        return self.on_rejected(problems, because)

    async def _apply(self, loaded: Loaded) -> ReloadOutcome:
        """Hand a configuration over; what is wrong with it is told with its place."""
        try:
            return await self._apply_config(loaded.config)
        except ConfigError as exc:
            raise ConfigError(loaded.with_locations(exc.problems), exc.files or loaded.files) from exc

    def on_applied(self, loaded: Loaded, handed_over: ReloadOutcome, because: str) -> Result:
        self._watch_files(loaded.files)
        has_changed, needs_restart = handed_over
        if has_changed:
            self._status.good_since = self._wall()
            LOGGER.info(
                "the new configuration is in force",
                extra=extra(because=because, accounts=len(loaded.config.accounts)),
            )
        elif needs_restart:
            LOGGER.info("what can change while the proxy runs is as it was", extra=extra(because=because))
        else:
            LOGGER.info("the configuration is as it was", extra=extra(because=because))
        if needs_restart and needs_restart != self._status.needs_restart:
            LOGGER.warning(
                "settings that count only after a restart have changed", extra=extra(keys=list(needs_restart))
            )
        warned, self._warned = self._warned, _texts(loaded)
        for text in self._warned:
            if text not in warned:
                LOGGER.warning("a setting should be mended", extra=extra(problem=text))
        self._status.needs_restart = needs_restart
        self._metrics.last_reload_success.set(self._wall())
        return self.record("ok" if has_changed else "unchanged", ())

    def on_rejected(self, problems: tuple[str, ...], because: str) -> Result:
        LOGGER.error(
            "the new configuration is refused, and the one before it serves on",
            extra=extra(because=because, problems=list(problems[:MAX_PROBLEMS])),
        )
        self._status.needs_restart = ()  # of a configuration that nobody knows any more
        return self.record("failed", problems[:MAX_PROBLEMS])

    def record(self, result: Result, problems: tuple[str, ...]) -> Result:
        self._status.looked_at, self._status.result = self._wall(), result
        self._status.problems = problems
        self._metrics.reloads.labels(result).inc()
        self._metrics.last_reload_successful.set(result != "failed")
        self._on_result(result)
        return result

    def _watch_files(self, files: Iterable[Path]) -> None:
        """Watch these from now on; what is known of one stands as it was before it was read."""
        known = dict(zip(self._files, self._signatures, strict=True))
        self._files = tuple(dict.fromkeys(files))
        self._signatures = tuple(known[file] if file in known else _signature_of(file) for file in self._files)


def _texts(loaded: Loaded) -> tuple[str, ...]:
    return tuple(str(problem) for problem in loaded.warnings)


def file_signatures(files: Iterable[Path]) -> FileSignatures:
    """Return what changes whenever one of these files does, or what its name leads to."""
    return tuple(map(_signature_of, files))


def _signature_of(file: Path) -> FileSignature:
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None  # in the middle of being replaced, or gone
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


async def run_in_thread(call: Callable[[], _T]) -> _T:
    """Return what `call` returns, in a thread of its own: neither requests nor the end of the process wait for it.

    Raises TimeoutError after LONGEST_READ.
    """
    loop = asyncio.get_running_loop()
    came: asyncio.Future[None] = loop.create_future()
    # In a list that is emptied, and in no variable that stays: a traceback leads to the frames that it went through,
    # and one that leads back to itself would keep all that was read until the garbage collector comes by.
    outcome: list[tuple[_T, None] | tuple[None, Exception]] = []

    def settle() -> None:
        if not came.done():  # otherwise nobody waits any more
            came.set_result(None)

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as exc:  # noqa: BLE001 - it is raised where it is waited for
            outcome.append((None, exc))
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle)

    # The thread gives way to requests ten times as often as it would.
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 10)
    try:
        threading.Thread(target=run, name="reads the configuration", daemon=True).start()
        async with asyncio.timeout(READ_TIMEOUT):
            await came
    finally:
        sys.setswitchinterval(usual)
    result, error = outcome.pop()
    if error is None:
        return result  # type: ignore[return-value]  # without an error it is what `call` returned
    try:
        raise error
    finally:
        del error
