"""What does the log look like: one line an event, text for a person, JSON for a machine?

Nothing that a caller or Amazon wrote goes into a line unchecked, no query string, no body, no token, at any level.
"""

import json
import logging
import logging.handlers
import os
import queue
import sys
import threading
import time
from collections import Counter
from typing import Any, Literal, TextIO

FIELDS = "fields"

LOGGER = logging.getLogger("sp-api-proxy")
AUDIT = logging.getLogger("sp-api-proxy.audit")
AUDIT.propagate = False  # a stream of its own
AUDIT.setLevel(logging.CRITICAL)  # until it is set up

dropped_lines: Counter[str] = Counter()  # lines that were not written, by log

_MAX_QUEUED = 10_000  # lines
_FLUSH_TIMEOUT = 2.0  # seconds for what still waits when the process ends


def extra(**values: Any) -> dict[str, dict[str, Any]]:
    """Return the `extra` argument that puts `values` into a line."""
    return {FIELDS: values}


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, message, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; an exception is named by its type alone, its text may quote what a peer sent."""
        line: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = format_location(record.exc_info[1])
        return json.dumps(line, default=str)  # ASCII: every stream can hold it


class AuditLines(logging.Formatter):
    """One JSON object a line: time (UTC) and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return json.dumps({"time": _time_of(record), **getattr(record, FIELDS, {})}, default=str)


class TextLines(logging.Formatter):
    """One line for a person: `12:00:00 INFO request code=200 account=acme`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, the fields as `key=value` behind the message."""
        parts = [self.formatTime(record, "%H:%M:%S"), record.levelname, record.getMessage()]
        parts += [f"{key}={value}" for key, value in getattr(record, FIELDS, {}).items() if value not in ("", None)]
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(f"exception={format_location(record.exc_info[1])}")
        return _one_line(" ".join(parts))


def _time_of(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _one_line(text: str) -> str:
    """Return the text with line breaks and other control characters written out: a line cannot be forged."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def format_location(exc: BaseException) -> str:
    """Return the exception's type and where it arose, without its text: texts quote what was sent."""
    places: list[str] = []
    trace = exc.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(exc).__module__}.{type(exc).__qualname__} at {' > '.join(places[-6:])}"


def set_up(level: str, style: Literal["auto", "text", "json"], stream: TextIO | None = None) -> None:
    """Send every log line to `stream` (standard error), in the chosen style."""
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    as_text = style == "text" or (style == "auto" and target.isatty())
    handler.setFormatter(TextLines() if as_text else JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # other libraries may quote headers below that
    LOGGER.setLevel(level.upper())
    # A closed or full log must not become a traceback per line, nor stop the service.
    logging.raiseExceptions = False
    # aiohttp logs whole exceptions with the request they belong to; what matters of them is in our own lines.
    for name in ("aiohttp.server", "aiohttp.client", "aiohttp.web", "aiohttp.internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class BackgroundHandler(logging.Handler):
    """Hands lines to a thread that writes them: a full disk, or a reader that stopped, delays no request.

    What waits is bounded; what does not fit, or cannot be written, is counted in LOST under `name`.
    """

    def __init__(self, target: logging.Handler, name: str, most: int = _MAX_QUEUED) -> None:
        super().__init__()
        self.set_name(name)
        self._label = name
        self._target = target
        target.handleError = self._drop  # type: ignore[method-assign, assignment]  # instead of a traceback a line
        self._lines: queue.Queue[logging.LogRecord | None] = queue.Queue(most)
        self._thread = threading.Thread(target=self._write, name=f"log {name}", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line, without waiting."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self._drop(record)

    def flush(self) -> None:
        """Write what waits, within a short time."""
        try:
            self._lines.put(None, timeout=_FLUSH_TIMEOUT)
        except queue.Full:
            return
        self._thread.join(_FLUSH_TIMEOUT)

    def _write(self) -> None:
        while (record := self._lines.get()) is not None:
            self._target.handle(record)

    def _drop(self, _: logging.LogRecord) -> None:
        dropped_lines[self._label] += 1


class _PrivateFile(logging.handlers.WatchedFileHandler):
    """A file that its owner alone can read, opened anew when it was moved away."""

    def _open(self) -> Any:
        return open(
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            errors=self.errors,
            opener=lambda path, flags: os.open(path, flags, 0o600),
        )


def start_background() -> list[BackgroundHandler]:
    """Let a thread write what `set_up` chose; return what has to be finished in the end."""
    root = logging.getLogger()
    root.handlers[:] = behind = [BackgroundHandler(handler, "log") for handler in root.handlers]
    return behind


def flush() -> None:
    """Write what waits: the process is about to end where it stands."""
    for handler in (*logging.getLogger().handlers, *AUDIT.handlers):
        if isinstance(handler, BackgroundHandler):
            handler.flush()


def set_up_audit(where: str) -> BackgroundHandler:
    """Send the audit log to `stdout`, `stderr` or a file; return what has to be finished in the end. Raises OSError."""
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    target = logging.StreamHandler(streams[where]) if where in streams else _PrivateFile(where, encoding="utf-8")
    target.setFormatter(AuditLines())
    behind = BackgroundHandler(target, "audit")
    AUDIT.handlers[:] = [behind]
    AUDIT.setLevel(logging.INFO)
    return behind
