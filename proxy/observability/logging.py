"""The log and the audit log: one line for each event, as text or JSON, written by a thread.

Nothing that a client or Amazon sent goes into a line unchecked; no query string, body or token does, at any level.
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

FIELDS = "fields"  # the attribute of a LogRecord that holds the event's own fields

LOGGER = logging.getLogger("sp-api-proxy")
AUDIT = logging.getLogger("sp-api-proxy.audit")
AUDIT.propagate = False  # audit lines go to their own target only
# Without a level of its own it would take that of LOGGER, and audit lines would be made for nobody.
AUDIT.setLevel(logging.CRITICAL)  # off until `set_up_audit`

dropped_lines: Counter[str] = Counter()  # lines that were not written, by the name of the log

# A bound on memory while the target stalls; lines beyond it are counted as dropped.
MAX_QUEUED_LINES = 10_000
FLUSH_TIMEOUT = 2.0  # seconds to write the queued lines when the process ends


def extra(**values: Any) -> dict[str, dict[str, Any]]:
    """Return the `extra` argument of a logging call that adds `values` to the line as fields."""
    return {FIELDS: values}


class JsonLines(logging.Formatter):
    """One JSON object for each event: time (UTC), level, message, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; of an exception only type and location, because its text may quote what a peer sent."""
        line: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = format_location(record.exc_info[1])
        return json.dumps(line, default=str)  # escaped to ASCII, so that a stream of any encoding can write it


class AuditLines(logging.Formatter):
    """One JSON object for each event: time (UTC) and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        # default=str: a field of an unexpected type must not cost the audit line.
        return json.dumps({"time": _time_of(record), **getattr(record, FIELDS, {})}, default=str)


class TextLines(logging.Formatter):
    """One readable line for each event: `12:00:00 INFO request code=200 account=acme`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line with the fields as `key=value` after the message; empty ones are left out."""
        parts = [self.formatTime(record, "%H:%M:%S"), record.levelname, record.getMessage()]
        parts += [f"{key}={value}" for key, value in getattr(record, FIELDS, {}).items() if value not in ("", None)]
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(f"exception={format_location(record.exc_info[1])}")
        return _one_line(" ".join(parts))


def _time_of(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _one_line(text: str) -> str:
    """Escape line breaks and other control characters, so that no text can forge a line (CWE-117)."""
    # repr of a character is its escape in quotes, such as '\n'; [1:-1] removes the quotes.
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def format_location(exc: BaseException) -> str:
    """Return the type of an exception and the last six frames of its traceback, without its text (see JsonLines)."""
    frames: list[str] = []
    trace = exc.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(exc).__module__}.{type(exc).__qualname__} at {' > '.join(frames[-6:])}"


def set_up(level: str, style: Literal["auto", "text", "json"], stream: TextIO | None = None) -> None:
    """Send every log line to `stream`, by default standard error; `auto` is text on a terminal and JSON elsewhere."""
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    is_text = style == "text" or (style == "auto" and target.isatty())
    # Text has local time without a date, for a person who watches; JSON has UTC, for machines.
    handler.setFormatter(TextLines() if is_text else JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # The root too: libraries log to their own loggers, whose lines propagate to it.
    root.setLevel(logging.WARNING)  # lines of other libraries below WARNING may quote headers
    LOGGER.setLevel(level.upper())
    # Otherwise logging prints a traceback to standard error for each line that a closed or full target rejects.
    logging.raiseExceptions = False
    # aiohttp logs exceptions with their text and the request; the proxy's own lines have what matters of them.
    for name in ("aiohttp.server", "aiohttp.client", "aiohttp.web", "aiohttp.internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class BackgroundHandler(logging.Handler):
    """Queues lines for a thread that writes them to `target`: a full disk or a stalled pipe delays no request.

    The queue is bounded. Lines that do not fit or cannot be written are counted in `dropped_lines` under `name`.

    The standard library's QueueHandler and QueueListener do not do this: `QueueListener.stop` puts its sentinel without
    waiting, which fails on a full queue, and joins its thread without a timeout, so that a stalled target would keep
    the process from ending; and `QueueHandler.prepare` merges the text of an exception into the message.
    """

    def __init__(self, target: logging.Handler, name: str, max_queued: int = MAX_QUEUED_LINES) -> None:
        super().__init__()
        self.set_name(name)
        self._label = name
        self._target = target
        target.handleError = self._drop  # type: ignore[method-assign, assignment]  # called with the line that failed
        # None is the sentinel that ends the thread.
        self._lines: queue.Queue[logging.LogRecord | None] = queue.Queue(max_queued)
        # A daemon: the interpreter does not wait for it at exit, even if the target has stalled.
        self._thread = threading.Thread(target=self._write, name=f"log {name}", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line without waiting, or count it as dropped."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self._drop(record)

    def flush(self) -> None:
        """Write the queued lines and end the thread, within 2 * FLUSH_TIMEOUT; later lines are not written."""
        try:
            # Waits for room, unlike QueueListener.enqueue_sentinel of Python 3.11 (put_nowait), but not for ever.
            self._lines.put(None, timeout=FLUSH_TIMEOUT)
        except queue.Full:
            return
        self._thread.join(FLUSH_TIMEOUT)

    def _write(self) -> None:
        while (record := self._lines.get()) is not None:
            self._target.handle(record)

    def _drop(self, _: logging.LogRecord) -> None:
        dropped_lines[self._label] += 1


class _PrivateFile(logging.handlers.WatchedFileHandler):
    """A file that only its owner can read, opened again after it was moved away (log rotation)."""

    def _open(self) -> Any:
        # The method of FileHandler that opens the file, overridden only for the mode 0600.
        # 0600 applies to a new file only: an existing one keeps its mode (open(2)).
        return open(
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            errors=self.errors,
            opener=lambda path, flags: os.open(path, flags, 0o600),
        )


def start_background() -> list[BackgroundHandler]:
    """Write the log by a thread from now on; return the handlers that must be flushed when the process ends."""
    root = logging.getLogger()
    handlers = [BackgroundHandler(handler, "log") for handler in root.handlers]
    root.handlers[:] = handlers
    return handlers


def flush() -> None:
    """Write the queued lines of both logs, before the process ends without unwinding (`os._exit`)."""
    # os._exit runs no atexit handlers, so that logging.shutdown does not flush.
    for handler in (*logging.getLogger().handlers, *AUDIT.handlers):
        if isinstance(handler, BackgroundHandler):
            handler.flush()


def set_up_audit(where: str) -> BackgroundHandler:
    """Send the audit log to `stdout`, `stderr` or a file; return the handler to flush at the end. Raises OSError."""
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    # Opened here and not by the thread, so that a file that cannot be opened stops the start.
    target = logging.StreamHandler(streams[where]) if where in streams else _PrivateFile(where, encoding="utf-8")
    target.setFormatter(AuditLines())
    handler = BackgroundHandler(target, "audit")
    AUDIT.handlers[:] = [handler]
    AUDIT.setLevel(logging.INFO)
    return handler
