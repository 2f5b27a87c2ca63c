"""The reason of a cancelled wait is the first one, whatever other tasks do."""

import asyncio

import pytest

from proxy.config import Config
from proxy.errors import ShuttingDown
from proxy.request.upstream.deadlines import DeadlineTimer, RequestDeadline


async def test_a_phase_that_an_upload_begins_does_not_change_the_error() -> None:
    deadlines = DeadlineTimer(Config(), asyncio.get_running_loop())

    async def wait() -> None:
        with RequestDeadline(deadlines) as deadline:

            def end() -> None:
                deadlines.cancel_all(ShuttingDown("over"))
                deadline.wait_for_client()  # as an upload does before its task is cancelled

            deadline.wait_for_upstream()
            asyncio.get_running_loop().call_soon(end)
            await asyncio.Event().wait()

    with pytest.raises(ShuttingDown):
        await asyncio.wait_for(wait(), 10)
