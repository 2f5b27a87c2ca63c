"""A token provider with a clock of the tests, a fake token host and a fake Amazon."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from proxy.amazon.operations import load_table
from proxy.observability.metrics import Metrics
from proxy.request.ratelimit.limiter import RateLimiter
from proxy.request.token_selection import TokenKey
from proxy.request.tokens.client import TokenClient
from proxy.request.tokens.provider import TokenProvider
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.request.upstream.pool import amazon_pool, lwa_pool
from proxy.store import MemoryStore
from tests.conftest import config_from, settings_for
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, TokenHost

TABLE = load_table()
ACME = TokenKey("lwa", "main", "acme", "production", "eu")
GRANTLESS = TokenKey("grantless", "main", "", "production", "eu", scope="sellingpartnerapi::notifications")
RDT = TokenKey("rdt", "main", "acme", "production", "eu", method="GET", path="/orders/v0/orders/{orderId}/address")
DOCUMENT = RDT._replace(path="/reports/2021-06-30/documents/d1", is_shared=False)


@asynccontextmanager
async def open_tokens(
    fake_upstream: FakeUpstream, token_host: TokenHost, folder: Path, clock: FakeClock, **settings: Any
) -> AsyncIterator[tuple[TokenProvider, Metrics]]:
    config = config_from(settings_for(fake_upstream, token_host, **{"limits": {"pace": False}, **settings}), folder)
    metrics, store = Metrics(), MemoryStore()
    async with lwa_pool(config) as lwa_session, amazon_pool(config, 10) as amazon_session:
        limits = RateLimiter(metrics, pace=config.limits.pace, now=clock)
        grants = TokenClient(
            config,
            lwa_session=lwa_session,
            amazon_session=amazon_session,
            rate_limiter=limits,
            mint=TABLE.match("POST", "/tokens/2021-03-01/restrictedDataToken"),
            metrics=metrics,
            now=clock,
            sleep=clock.sleep,
        )
        tokens = TokenProvider(
            token_client=grants,
            unrestricted_reports=UnrestrictedReports(),
            store=store,
            metrics=metrics,
            now=clock,
            wall=clock,
            call_later=clock.call_later,
        )
        yield tokens, metrics
        await tokens.close()
        await store.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def tokens(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> AsyncIterator[TokenProvider]:
    async with open_tokens(fake_upstream, token_host, tmp_path, clock) as (opened, _):
        yield opened


async def settle(tokens: TokenProvider) -> None:
    """Wait until no exchange is under way."""
    while tokens._pending:
        await asyncio.gather(*tokens._pending.values(), return_exceptions=True)
        await asyncio.sleep(0)


def form(body: bytes) -> dict[str, str]:
    return dict(parse_qsl(body.decode()))
