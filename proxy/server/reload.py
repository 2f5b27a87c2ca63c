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
from proxy.observability.logging import LOGGER, fields
from proxy.observability.metrics import Metrics
from proxy.server.admin.app import Reloading
from proxy.server.hardening import Settling
from proxy.server.runtime import HandedOver
from proxy.server.sockets import CannotListen

LOOK_EVERY = 1.0  # seconds
LONGEST_READ = 30.0  # seconds for files that hang: those of a network, or of a pipe that nobody writes to
MOST_PROBLEMS = 100  # that a log line and /status name

Result = Literal["ok", "unchanged", "failed"]
_Stamp = tuple[int, int, int, int, int] | None
Stamps = tuple[_Stamp, ...]
_T = TypeVar("_T")


class Reloads:
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
        hand_over: Callable[[Config], Awaitable[HandedOver]],
        reloading: Reloading,
        metrics: Metrics,
        note: Callable[[Result | None], None] = lambda _: None,
        wall: Callable[[], float] = time.time,
        look_every: float = LOOK_EVERY,
        seen: Stamps | None = None,
    ) -> None:
        self._load = load
        self._hand_over = hand_over
        self._reloading = reloading
        self._metrics = metrics
        self._note = note
        self._wall = wall
        self._look_every = look_every
        self._asked = asyncio.Event()
        self._settling = Settling()
        self._files = loaded.files
        self._warned = _texts(loaded)
        self._seen = seen or stamps(self._files)

    def ask(self) -> None:
        """Have the configuration read anew, whether its files have changed or not."""
        self._asked.set()

    async def watch(self) -> None:
        """Take up what is asked for, and what has changed, for as long as the proxy runs."""
        changing = self._seen
        while True:
            is_asked = await self._is_asked_in_time()
            try:
                seen = await _aside(lambda: stamps(self._files))
            except TimeoutError:
                LOGGER.error("the configuration's files cannot be looked at: their file system hangs")
                continue
            # What is still being written is left alone until it was the same twice.
            if is_asked or (seen != self._seen and seen == changing):
                self._seen = seen
                await self.reload("SIGHUP" if is_asked else "a file has changed")
                changing = self._seen
            else:
                changing = seen

    async def _is_asked_in_time(self) -> bool:
        try:
            async with asyncio.timeout(self._look_every):
                await self._asked.wait()
        except TimeoutError:
            return False
        self._asked.clear()
        return True

    async def reload(self, because: str) -> Result:
        """Read the configuration and take it up if it is good; log, count and note how that went."""
        with self._settling:  # around all of it: an exception, while it is looked at, holds what was read
            return await self._reload(because)

    async def _reload(self, because: str) -> Result:
        self._note(None)
        problems: tuple[str, ...] = ()
        files: Iterable[Path] = ()
        try:
            loaded = await _aside(self._load)
            files = loaded.files
            handed_over = await self._handed_over(loaded)
        except ConfigError as exc:
            files = exc.files or files
            problems = tuple(str(problem) for problem in exc.problems)
        except CannotListen as exc:
            problems = (str(exc),)
        except TimeoutError:
            problems = (f"its files could not be read within {LONGEST_READ:g} s",)
        except Exception as exc:  # noqa: BLE001 - logged; the next change is looked at all the same
            LOGGER.error("internal error", exc_info=exc)
            problems = ("the proxy failed to take it up; its log says where",)
        else:
            return self._taken(loaded, handed_over, because)
        self._look_at(files or self._files)  # what is wrong may be mended in one of them, or one is still to come
        return self._refused(problems, because)

    async def _handed_over(self, loaded: Loaded) -> HandedOver:
        """Hand a configuration over; what is wrong with it is told with its place."""
        try:
            return await self._hand_over(loaded.config)
        except ConfigError as exc:
            raise ConfigError(loaded.placed(exc.problems), exc.files or loaded.files) from exc

    def _taken(self, loaded: Loaded, handed_over: HandedOver, because: str) -> Result:
        self._look_at(loaded.files)
        has_changed, needs_restart = handed_over
        if has_changed:
            self._reloading.good_since = self._wall()
            LOGGER.info(
                "the new configuration is in force",
                extra=fields(because=because, accounts=len(loaded.config.accounts)),
            )
        elif needs_restart:
            LOGGER.info("what can change while the proxy runs is as it was", extra=fields(because=because))
        else:
            LOGGER.info("the configuration is as it was", extra=fields(because=because))
        if needs_restart and needs_restart != self._reloading.needs_restart:
            LOGGER.warning(
                "settings that count only after a restart have changed", extra=fields(keys=list(needs_restart))
            )
        warned, self._warned = self._warned, _texts(loaded)
        for text in self._warned:
            if text not in warned:
                LOGGER.warning("a setting should be mended", extra=fields(problem=text))
        self._reloading.needs_restart = needs_restart
        self._metrics.last_reload_success.set(self._wall())
        return self._done("ok" if has_changed else "unchanged", ())

    def _refused(self, problems: tuple[str, ...], because: str) -> Result:
        LOGGER.error(
            "the new configuration is refused, and the one before it serves on",
            extra=fields(because=because, problems=list(problems[:MOST_PROBLEMS])),
        )
        self._reloading.needs_restart = ()  # of a configuration that nobody knows any more
        return self._done("failed", problems[:MOST_PROBLEMS])

    def _done(self, result: Result, problems: tuple[str, ...]) -> Result:
        self._reloading.looked_at, self._reloading.result = self._wall(), result
        self._reloading.problems = problems
        self._metrics.reloads.labels(result).inc()
        self._metrics.last_reload_successful.set(result != "failed")
        self._note(result)
        return result

    def _look_at(self, files: Iterable[Path]) -> None:
        """Watch these from now on; what is known of one stands as it was before it was read."""
        known = dict(zip(self._files, self._seen, strict=True))
        self._files = tuple(dict.fromkeys(files))
        self._seen = tuple(known[file] if file in known else _stamp(file) for file in self._files)


def _texts(loaded: Loaded) -> tuple[str, ...]:
    return tuple(str(problem) for problem in loaded.warnings)


def stamps(files: Iterable[Path]) -> Stamps:
    """Return what changes whenever one of these files does, or what its name leads to."""
    return tuple(map(_stamp, files))


def _stamp(file: Path) -> _Stamp:
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None  # in the middle of being replaced, or gone
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


async def _aside(call: Callable[[], _T]) -> _T:
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
        async with asyncio.timeout(LONGEST_READ):
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
