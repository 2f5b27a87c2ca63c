"""Why was a wait broken off? The first reason counts, whatever else goes on beside it."""

import asyncio

import pytest

from proxy.config import Config
from proxy.errors import ShuttingDown
from proxy.request.upstream.deadlines import DeadlineTimer, RequestDeadline


async def test_a_phase_that_an_upload_begins_changes_nothing_of_the_reason() -> None:
    deadlines = DeadlineTimer(Config(), asyncio.get_running_loop())

    async def exchange() -> None:
        with RequestDeadline(deadlines) as patience:

            def end() -> None:
                deadlines.cancel_all(ShuttingDown("over"))
                patience.wait_for_client()  # as an upload does, whose task hears of the end after this

            patience.wait_for_upstream()
            asyncio.get_running_loop().call_soon(end)
            await asyncio.Event().wait()

    with pytest.raises(ShuttingDown):
        await asyncio.wait_for(exchange(), 10)
