"""Exceptions that nothing handles: each is counted, and logged once by type and place, never by its text."""

import asyncio
import json
import re
from io import StringIO

import pytest
from prometheus_client import generate_latest

from proxy.observability.metrics import Metrics
from proxy.server import http_protocol, internal_errors
from proxy.server.internal_errors import InternalErrors
from tests.conftest import StartProxy
from tests.support.raw_client import connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"
MESSAGE = "internal error: an exception that nothing handles"


def counted(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Return the series by type and module."""
    text = generate_latest(metrics.registry).decode()
    series = r'^spapi_proxy_internal_errors_total\{place="([^"]*)",type="([^"]*)"\} (\S+)$'
    return {
        (kind, place.partition(":")[0]): float(count) for place, kind, count in re.findall(series, text, re.MULTILINE)
    }


def logged(log: StringIO) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in lines if line["message"] == MESSAGE]


@pytest.fixture
async def metrics() -> Metrics:
    """The series of a loop that is watched."""
    found = Metrics()
    InternalErrors(found).watch(asyncio.get_running_loop())
    return found


async def test_a_task_that_nobody_awaits_is_reported(metrics: Metrics, log: StringIO) -> None:
    async def fails() -> None:
        raise ValueError("distinctive-text")

    for _ in range(2):
        task = asyncio.create_task(fails())
        await asyncio.wait([task])
        del task
    assert counted(metrics) == {("builtins.ValueError", __name__): 2}
    (line,) = logged(log)
    assert (line["level"], line["type"]) == ("error", "builtins.ValueError")
    assert re.fullmatch(rf"{re.escape(__name__)}:\d+", line["place"])
    assert "distinctive" not in log.getvalue()


async def test_a_callback_that_fails_is_reported(metrics: Metrics, log: StringIO) -> None:
    asyncio.get_running_loop().call_soon(lambda: dict[str, str]()["distinctive-key"])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert counted(metrics) == {("builtins.KeyError", __name__): 1}
    assert len(logged(log)) == 1
    assert "distinctive" not in log.getvalue()


async def test_a_report_without_an_exception_is_counted_by_its_task(metrics: Metrics, log: StringIO) -> None:
    async def waits() -> None:
        """Do nothing."""

    task = asyncio.create_task(waits())
    asyncio.get_running_loop().call_exception_handler(
        {"message": "Task was destroyed but it is pending!", "task": task}
    )
    await task
    ((kind, _),) = counted(metrics)
    assert kind == "none"
    assert "waits" in logged(log)[0]["place"]


async def test_the_series_are_bounded(metrics: Metrics, log: StringIO) -> None:
    loop = asyncio.get_running_loop()
    for number in range(internal_errors.MAX_SERIES + 10):
        kind = type(f"Error{number}", (Exception,), {})
        loop.call_exception_handler({"message": "", "exception": kind()})
    found = counted(metrics)
    assert len(found) == internal_errors.MAX_SERIES + 1
    assert found["other", "other"] == 10
    assert len(logged(log)) == internal_errors.MAX_SERIES + 1


@pytest.mark.parametrize("method", ["data_received", "start"])
async def test_a_protocol_that_fails_closes_its_connection_and_is_reported(
    method: str, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch, log: StringIO
) -> None:
    proxy = await start_proxy()

    def data_received(_: object, __: bytes) -> None:
        raise AttributeError("distinctive-name")

    async def start(_: object) -> None:
        raise AttributeError("distinctive-name")

    monkeypatch.setattr(http_protocol.ProxyConnection, method, {"data_received": data_received, "start": start}[method])
    for _ in range(2):
        async with connect(proxy.addresses[0]) as client:
            try:
                await client.send(request("GET", SELLERS))
                assert await asyncio.wait_for(client.reader.read(), 5) == b""
            except ConnectionError:
                pass  # a reset is an end as well
    assert counted(proxy.metrics) == {("builtins.AttributeError", __name__): 2}
    assert len(logged(log)) == 1
    assert "distinctive" not in log.getvalue()


async def test_a_connection_that_ends_in_order_is_no_error(start_proxy: StartProxy, log: StringIO) -> None:
    proxy = await start_proxy()
    async with connect(proxy.addresses[0]) as client:
        assert (await client.request("GET", SELLERS)).status == 200
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS)[:20])
    async with connect(proxy.addresses[0]):
        pass
    assert counted(proxy.metrics) == {}
    assert logged(log) == []
