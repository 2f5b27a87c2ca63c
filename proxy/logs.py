"""What does the log look like: one line an event, text for a person, JSON for a machine?

Nothing that a caller or Amazon wrote goes into a line unchecked, no query string, no body, no token, at any level.
"""

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

FIELDS = "fields"

LOGGER = logging.getLogger("sp-api-proxy")


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """Return the `extra` argument that puts `values` into a line."""
    return {FIELDS: values}


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, message, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; an exception is named by its type alone, its text may quote what a peer sent."""
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = _trace(record.exc_info[1])
        return json.dumps(line, default=str)  # ASCII: every stream can hold it


class TextLines(logging.Formatter):
    """One line for a person: `12:00:00 INFO request code=200 account=acme`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, the fields as `key=value` behind the message."""
        parts = [self.formatTime(record, "%H:%M:%S"), record.levelname, record.getMessage()]
        parts += [f"{key}={value}" for key, value in getattr(record, FIELDS, {}).items() if value not in ("", None)]
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(f"exception={_trace(record.exc_info[1])}")
        return _one_line(" ".join(parts))


def _one_line(text: str) -> str:
    """Return the text with line breaks and other control characters written out: a line cannot be forged."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _trace(exc: BaseException) -> str:
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
    for name in ("aiohttp.server", "aiohttp.client", "aiohttp.web", "aiohttp.internal", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
