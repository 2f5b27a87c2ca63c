"""Running the proxy until a signal: event loop, logs, signals, reload, systemd."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from proxy.cli.common import FAILED, OK, print_err
from proxy.config import ConfigError, Loaded, Problem
from proxy.config.model import Log
from proxy.observability import logging
from proxy.server import hardening, sockets, systemd
from proxy.server.reload import ConfigWatcher, Result, file_signatures
from proxy.server.runtime import RunningProxy, start_proxy
from proxy.server.sockets import CannotListen

FORCED_EXIT_DELAY = 1.0  # seconds between a second signal and a forced exit

T = TypeVar("T")


@contextmanager
def logging_to(log: Log, audit: str | None) -> Iterator[None]:
    """Set up the logs, each written by a thread, and flush them at the end."""
    logging.set_up(log.level, log.format)
    behind = logging.start_background()
    try:
        if audit is not None:
            behind.append(_audit(audit))
        yield
    finally:
        for writer in behind:
            writer.flush()


def _audit(where: str) -> logging.BackgroundHandler:
    try:
        return logging.set_up_audit(where)
    except OSError as exc:
        raise ConfigError([Problem("audit", f"{where}: {sockets.describe_error(exc)}")]) from exc


def run(main_task: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, on uvloop if it is installed, and return its result."""
    try:
        import uvloop  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        return asyncio.run(main_task)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main_task)


async def serve_until_signal(
    loaded: Loaded,
    load: Callable[[], Loaded],
    after_start: Callable[[RunningProxy], None] | None = None,
    *,
    is_demo: bool = False,
) -> int:
    """Serve until SIGTERM, SIGINT or /quitquitquit; a second signal ends it at once. SIGHUP reloads with `load`."""
    seen = file_signatures(loaded.files)
    hardening.freeze_gc()
    signals, service = SignalWaiter(), systemd.Service(os.environ.pop("NOTIFY_SOCKET", ""))
    try:
        async with start_proxy(loaded.config) as proxy:
            reloads = ConfigWatcher(
                loaded,
                load=load,
                apply_config=proxy.apply_config,
                status=proxy.reload_status,
                metrics=proxy.metrics,
                on_result=partial(_note_reload, service, proxy.has_started),
                signatures=seen,
            )
            del loaded  # as in serve.py
            signals.on_hangup, signals.proxy = reloads.request_reload, proxy
            logging.LOGGER.info(
                "serving",
                extra=logging.extra(listen=list(proxy.addresses), admin=proxy.admin, health=proxy.health),
            )
            proxy.has_started.add_done_callback(partial(_note_start, service))
            if after_start:
                after_start(proxy)
            watching = asyncio.create_task(reloads.watch(), name="reload")
            because = await signals.wait(proxy.quit)
            signals.on_hangup = _on_sighup_while_ending
            watching.cancel()
            service.notify_stopping()
            logging.LOGGER.info("shutting down", extra=logging.extra(because=because))
    except CannotListen as exc:
        print_err(f"sp-api-proxy: {exc}")
        if is_demo:  # as `make run` starts it
            print_err('With make: make run ARGS="--listen 127.0.0.1:8081 --admin 127.0.0.1:9091"')
        return FAILED
    logging.LOGGER.info("ended", extra=logging.extra(cut_off=proxy.shutdown.aborted))
    return 128 + signals.number if proxy.shutdown.aborted or proxy.shutdown.immediate.is_set() else OK


def _note_start(service: systemd.Service, start: "asyncio.Task[None]") -> None:
    if not start.cancelled():
        service.notify_ready()


def _note_reload(service: systemd.Service, start: "asyncio.Task[None]", result: Result | None) -> None:
    if not start.done():
        return  # READY is sent when `warm_up` has its last token
    if result is None:
        service.notify_reloading()
    else:
        service.notify_ready("the last configuration was rejected; its errors are in the log" * (result == "failed"))


def _on_sighup_while_ending() -> None:
    logging.LOGGER.warning("SIGHUP ignored: the process is shutting down")


class SignalWaiter:
    """Waits for the first signal. The second one ends the process without draining, the third at once."""

    def __init__(self) -> None:
        self._first_signal = asyncio.Event()
        self.number: int = signal.SIGTERM
        self.on_hangup: Callable[[], None] = lambda: None
        self.proxy: RunningProxy | None = None
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self.on_signal, number)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda received, _: loop.call_soon_threadsafe(self.on_signal, received))
        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, self.on_sighup)

    def on_sighup(self) -> None:
        self.on_hangup()  # it is replaced during shutdown

    async def wait(self, quit_: asyncio.Event) -> str:
        """Wait for a signal or for `quit_`; return which of them came."""
        waits = [asyncio.create_task(event.wait()) for event in (self._first_signal, quit_)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not self._first_signal.is_set():
            self._first_signal.set()  # a signal from now on counts as the second one
            return "/quitquitquit"
        return signal.Signals(self.number).name

    def on_signal(self, number: int) -> None:
        if not self._first_signal.is_set():
            self.number = number
            self._first_signal.set()
        elif self.proxy is None or self.proxy.shutdown.immediate.is_set():
            exit_now(128 + number, self.proxy)
        else:
            self.number = number
            logging.LOGGER.warning("second signal: requests in flight are aborted")
            self.proxy.shutdown.immediate.set()
            self._loop.call_later(FORCED_EXIT_DELAY, exit_now, 128 + number, self.proxy)


def exit_now(code: int, proxy: RunningProxy | None) -> None:
    """End the process at once, after flushing the log."""
    logging.LOGGER.warning("ended", extra=logging.extra(cut_off=proxy.shutdown.aborted if proxy is not None else 0))
    logging.flush()
    os._exit(code)
