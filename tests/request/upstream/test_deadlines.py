"""Why was a wait broken off? The first reason counts, whatever else goes on beside it."""

import asyncio

import pytest

from proxy.config import Config
from proxy.errors import ShuttingDown
from proxy.request.upstream.deadlines import Deadlines, Patience


async def test_a_phase_that_an_upload_begins_changes_nothing_of_the_reason() -> None:
    deadlines = Deadlines(Config(), asyncio.get_running_loop())

    async def exchange() -> None:
        with Patience(deadlines) as patience:

            def end() -> None:
                deadlines.break_off(ShuttingDown("over"))
                patience.for_app()  # as an upload does, whose task hears of the end after this

            patience.for_amazon()
            asyncio.get_running_loop().call_soon(end)
            await asyncio.Event().wait()

    with pytest.raises(ShuttingDown):
        await asyncio.wait_for(exchange(), 10)
