"""Why was a wait broken off? The first reason counts, whatever else goes on beside it."""

import asyncio

import pytest

from proxy.config import Config
from proxy.errors import ShuttingDown
from proxy.request.patience import Deadlines, Patience


async def test_a_phase_that_an_upload_begins_changes_nothing_of_the_reason() -> None:
    deadlines = Deadlines(Config(), asyncio.get_running_loop())

    async def exchange() -> None:
        with Patience(deadlines) as patience:
            patience.for_amazon()
            # As the task of an upload does, which hears of its end after this.
            asyncio.get_running_loop().call_soon(
                lambda: (deadlines.break_off(ShuttingDown("over")), patience.for_app())
            )
            await asyncio.Event().wait()

    with pytest.raises(ShuttingDown):
        await asyncio.wait_for(exchange(), 10)
