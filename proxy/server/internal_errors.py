"""Exceptions that nobody handles: of tasks that nobody awaits, and of callbacks of the event loop.

asyncio hands both to the loop's exception handler. Its default one logs the exception's text and the repr of a
transport or a future, which may quote what a client or Amazon sent. This one counts and logs type and place alone.
"""

import asyncio
from types import CodeType
from typing import Any

from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics

MAX_SERIES = 64  # combinations of type and place; any further one is counted as `other`
OTHER = ("other", "other")


class InternalErrors:
    """Counts and logs what the event loop reports: each combination of type and place is logged once."""

    def __init__(self, metrics: Metrics) -> None:
        self._counter = metrics.internal_errors
        self._seen: set[tuple[str, str]] = set()

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Report what `loop` reports from now on, until the loop ends: what fails while the proxy stops counts too."""
        loop.set_exception_handler(self._on_error)

    def _on_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        exc = context.get("exception")
        kind = "none" if exc is None else f"{type(exc).__module__}.{type(exc).__qualname__}"
        place = _place_of_task(context) if exc is None else _place_of(exc)
        key = kind, place
        if key not in self._seen and len(self._seen) >= MAX_SERIES:
            key = OTHER
        self._counter.labels(*key).inc()
        if key not in self._seen:
            self._seen.add(key)
            LOGGER.error("internal error: an exception that nothing handles", extra=extra(type=kind, place=place))


def _place_of(exc: BaseException) -> str:
    """Return `module:line` of the innermost frame of the proxy's own, of the innermost frame where there is none."""
    innermost, trace = "", exc.__traceback__
    own = ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        innermost = f"{module}:{trace.tb_lineno}"
        if module.partition(".")[0] == "proxy":
            own = innermost
        trace = trace.tb_next
    return own or innermost or "unknown"


def _place_of_task(context: dict[str, Any]) -> str:
    """Return `module:line` of the coroutine that a report without an exception is about."""
    task = context.get("task") or context.get("future")
    coroutine = task.get_coro() if isinstance(task, asyncio.Task) else None
    code = getattr(coroutine, "cr_code", None)
    if not isinstance(code, CodeType):
        return "unknown"
    return f"{coroutine.__qualname__}:{code.co_firstlineno}"  # type: ignore[union-attr]  # what has code has a name
