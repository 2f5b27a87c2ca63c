"""Connection pools to Amazon and to Login with Amazon: created, replaced by a reload, closed at the end."""

import asyncio
from pathlib import Path
from typing import NamedTuple

from proxy.amazon.headers import user_agent_of
from proxy.config import Config
from proxy.request.upstream.connector import ResumingContext, tls_context
from proxy.request.upstream.pool import ConnectionPool, amazon_pool, lwa_pool


def user_agents(config: Config) -> dict[str, str]:
    """Return the `user-agent` of each application."""
    return {name: user_agent_of(application) for name, application in config.applications.items()}


class PreparedPools(NamedTuple):
    """The pools for a configuration, the settings that they depend on, and the limit of connections to Amazon."""

    settings: tuple[object, ...]
    pools: tuple[ConnectionPool, ConnectionPool]
    max_upstream: int
    is_new: bool


class UpstreamPools:
    """The pools to Amazon and to Login with Amazon, and those of earlier configurations that are still in use."""

    def __init__(self) -> None:
        self._settings: tuple[object, ...] = ()
        self._current: tuple[ConnectionPool, ...] = ()
        self._retired: list[ConnectionPool] = []
        self._tls: tuple[object, tuple[ResumingContext, ResumingContext]] | None = None

    async def prepare(self, config: Config, max_upstream: int) -> PreparedPools:
        """Return the pools for `config`: those in use, or new ones if their settings have changed.

        Raises OSError if `pool.ca_file` cannot be used. `activate` or `discard` follows.
        """
        trust = (config.pool.ca_file, _signature_of(config.pool.ca_file))
        # The limit is no part of it: it can change while connections are open.
        settings = (config.pool.model_copy(update={"max_connections": 0}), config.timeouts.connect, trust)
        if settings == self._settings:
            return PreparedPools(settings, (self._current[0], self._current[1]), max_upstream, is_new=False)
        tls = self._tls[1] if self._tls is not None and trust == self._tls[0] else None
        if tls is None:
            # Two of them: a TLS session is resumed by the name of its host. In a thread, because to load the system's
            # authorities blocks the loop.
            tls = await asyncio.to_thread(lambda: (tls_context(config), tls_context(config)))
        self._tls = trust, tls
        pools = amazon_pool(config, max_upstream, tls[0]), lwa_pool(config, tls[1])
        for pool in pools:
            await pool.__aenter__()
        return PreparedPools(settings, pools, max_upstream, is_new=True)

    def activate(self, prepared: PreparedPools) -> None:
        """Use these from now on; the previous ones close when no request uses them any more."""
        if prepared.is_new:
            for pool in self._current:
                pool.drain()
            self._retired = [*(pool for pool in self._retired if pool.is_in_use), *self._current]
            self._settings, self._current = prepared.settings, prepared.pools
        prepared.pools[0].limit = prepared.max_upstream

    async def discard(self, prepared: PreparedPools) -> None:
        """Close pools that were prepared and will not be used."""
        if prepared.is_new:
            for pool in prepared.pools:
                await pool.__aexit__(None, None, None)

    async def close(self) -> None:
        """Close all connections."""
        for pool in (*self._current, *self._retired):
            await pool.__aexit__(None, None, None)


def _signature_of(name: str | None) -> tuple[int, int] | None:
    if name is None:
        return None
    status = Path(name).stat()
    return status.st_ino, status.st_mtime_ns
