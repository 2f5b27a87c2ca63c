"""Pseudo-terminal for commands that check whether they run in one."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def shown_at(descriptor: int) -> AsyncIterator[asyncio.StreamReader]:
    """Read what a terminal shows, from the end that `pty.openpty` returns first; close it at the end."""
    reader = asyncio.StreamReader()
    end = os.fdopen(descriptor, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), end)
    try:
        yield reader
    finally:
        transport.close()
        await asyncio.sleep(0)  # lets the transport close
