"""The log: one line for each event, as JSON or text, and no text of an exception in either."""

import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.observability.logging import LOGGER, BackgroundHandler, dropped_lines, extra, set_up

SECRET = "Atza|leaked"
OTHERS = ("aiohttp.server", "aiohttp.client", "aiohttp.web", "aiohttp.internal", "asyncio", "sp-api-proxy")


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Restore the configuration of logging, which is global to the process."""
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    levels = {name: logging.getLogger(name).level for name in OTHERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def json_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().split("\n") if line]


def fail() -> None:
    raise ValueError(SECRET)


def test_a_json_line_holds_time_level_message_and_the_fields() -> None:
    stream = io.StringIO()
    set_up("info", "json", stream)
    LOGGER.info("request", extra=extra(code=200, account="acme", wait=0.5, path=None))
    LOGGER.warning("reload of %s", "config.yaml")
    first, second = json_lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {"level": "info", "message": "request", "code": 200, "account": "acme", "wait": 0.5, "path": None}
    assert (second["level"], second["message"]) == ("warning", "reload of config.yaml")


def test_a_text_line_leaves_out_empty_fields() -> None:
    stream = io.StringIO()
    set_up("info", "text", stream)
    LOGGER.info("request", extra=extra(code=200, account="acme", operation="", retries=0, region=None))
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO request code=200 account=acme retries=0\n", stream.getvalue())


@pytest.mark.parametrize(
    ("style", "stream", "is_json"),
    [
        ("auto", io.StringIO, True),
        ("auto", Terminal, False),
        ("json", Terminal, True),
        ("text", io.StringIO, False),
    ],
)
def test_auto_is_text_on_a_terminal_and_json_elsewhere(style: Any, stream: type[io.StringIO], is_json: bool) -> None:
    target = stream()
    set_up("info", style, target)
    LOGGER.info("started")
    assert target.getvalue().startswith("{") is is_json


@pytest.mark.parametrize(
    ("level", "written"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_is_the_lowest_that_is_written(level: str, written: list[str]) -> None:
    stream = io.StringIO()
    set_up(level, "json", stream)
    for name in ("debug", "info", "warning", "error"):
        LOGGER.log(logging.getLevelName(name.upper()), "x")
    assert [line["level"] for line in json_lines(stream)] == written


@pytest.mark.parametrize("style", ["json", "text"])
def test_an_exception_is_logged_with_type_and_location_but_not_its_text(style: Any) -> None:
    stream = io.StringIO()
    set_up("debug", style, stream)
    try:
        try:
            fail()
        except ValueError as exc:
            raise RuntimeError(f"again {SECRET}") from exc
    except RuntimeError:
        LOGGER.exception("it broke")
    try:
        fail()
    except ValueError as exc:
        LOGGER.warning("it broke", exc_info=exc, extra=extra(code=500))
    text = stream.getvalue()
    assert SECRET not in text
    assert "builtins.RuntimeError at " in text
    assert "builtins.ValueError at " in text
    assert "fail:" in text
    assert len(text.splitlines()) == 2


def test_without_an_exception_there_is_no_field_for_it() -> None:
    stream = io.StringIO()
    set_up("info", "json", stream)
    LOGGER.info("fine", exc_info=True)
    assert "exception" not in json_lines(stream)[0]


def test_values_that_json_cannot_hold_are_written_as_text() -> None:
    stream = io.StringIO()
    set_up("info", "json", stream)
    LOGGER.info("x", extra=extra(kinds={"a"}, error=ValueError, path=b"\xff"))
    assert json_lines(stream)[0]["kinds"] == "{'a'}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.text(), value=st.text())
def test_every_json_line_is_one_line_that_parses(message: str, value: str) -> None:
    stream = io.StringIO()
    set_up("info", "json", stream)
    LOGGER.info("%s", message, extra=extra(value=value))
    (line,) = json_lines(stream)
    assert (line["message"], line["value"]) == (message, value)


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\rb", "\n12:00:00 ERROR forged"])
def test_every_text_line_is_one_line(text: str) -> None:
    stream = io.StringIO()
    set_up("info", "text", stream)
    LOGGER.info("message %s", text, extra=extra(value=text))
    assert len(stream.getvalue().splitlines()) == 1


def test_a_line_is_written_whatever_the_encoding_of_the_stream() -> None:
    raw = io.BytesIO()
    set_up("info", "json", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    LOGGER.info("Türkiye", extra=extra(value="\udcff"))
    assert json.loads(raw.getvalue())["message"] == "Türkiye"


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_closed_stream_causes_no_traceback(capsys: pytest.CaptureFixture[str], style: Any) -> None:
    stream = io.StringIO()
    set_up("info", style, stream)
    stream.close()
    LOGGER.info("not written")
    LOGGER.error("not written either", exc_info=ValueError("x"))
    assert capsys.readouterr().err == ""  # no traceback


def test_a_line_that_cannot_be_formatted_causes_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    set_up("info", "json", io.StringIO())
    LOGGER.info("%d", "not a number")
    assert capsys.readouterr().err == ""


def test_other_libraries_are_logged_from_warnings_on_and_aiohttp_only_if_critical() -> None:
    stream = io.StringIO()
    set_up("debug", "json", stream)
    logging.getLogger("some.package").info("header: %s", SECRET)
    logging.getLogger("aiohttp.server").error("Error handling request", exc_info=ValueError(SECRET))
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    logging.getLogger("some.package").warning("heard")
    assert [line["message"] for line in json_lines(stream)] == ["Task exception was never retrieved", "heard"]


def test_a_second_set_up_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    set_up("info", "json", first)
    set_up("error", "json", second)
    LOGGER.error("once")
    assert (len(json_lines(first)), len(json_lines(second))) == (0, 1)


def test_the_default_stream_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    set_up("info", "json")
    LOGGER.info("here")
    captured = capsys.readouterr()
    assert (captured.out, json.loads(captured.err)["message"]) == ("", "here")


# Lines written by a thread.


class StalledStream(io.StringIO):
    """A stream that blocks writes until `resumes` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.resumes = threading.Event()

    def write(self, text: str) -> int:
        self.resumes.wait(10)
        return super().write(text)


def record(number: int) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, "", 0, f"line {number}", None, None)


def test_a_stalled_stream_delays_no_caller_and_dropped_lines_are_counted() -> None:
    stream = StalledStream()
    handler = BackgroundHandler(logging.StreamHandler(stream), "stalled", max_queued=5)
    before = dropped_lines["stalled"]
    for number in range(50):
        handler.handle(record(number))
    assert dropped_lines["stalled"] - before in {44, 45}  # the thread may have taken one from the queue
    stream.resumes.set()
    handler.flush()
    lines = stream.getvalue().splitlines()
    assert lines == [f"line {number}" for number in range(len(lines))]
    assert len(lines) in {5, 6}


def test_lines_that_a_stream_rejects_are_counted_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    stream.close()
    handler = BackgroundHandler(logging.StreamHandler(stream), "closed")
    for number in range(3):
        handler.handle(record(number))
    handler.flush()
    assert dropped_lines["closed"] == 3
    assert capsys.readouterr().err == ""


def test_queued_lines_are_written_by_flush() -> None:
    stream = io.StringIO()
    handler = BackgroundHandler(logging.StreamHandler(stream), "whole")
    for number in range(1000):
        handler.handle(record(number))
    handler.flush()
    assert len(stream.getvalue().splitlines()) == 1000
