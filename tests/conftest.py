"""Shared fixtures: a listening proxy, scripted fake upstreams, the log, and checks for every test."""

import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from proxy.config import Config, load_config
from proxy.observability.logging import LOGGER, set_up
from proxy.server import runtime
from proxy.server.runtime import RunningProxy
from tests.support.fake_upstream import FakeUpstream, TokenHost
from tests.support.site import build

MODELS = Path(__file__).parents[2] / "shared" / "spapi" / "models"


class StartProxy(Protocol):
    """Starts a proxy with the default settings of the tests, overridden by keywords."""

    def __call__(self, **settings: Any) -> Awaitable[RunningProxy]: ...


def settings_for(fake_upstream: FakeUpstream, token_host: TokenHost, **changed: Any) -> dict[str, Any]:
    """Return the settings of a proxy between the test and the fake upstreams."""
    endpoints: dict[str, str] = dict.fromkeys(("na", "eu", "fe"), fake_upstream.url)
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "applications": {"main": {"client_id": "client", "client_secret": "client-secret"}},
        "accounts": {"acme": {"refresh_tokens": {"eu": "Atzr|acme-eu"}}},
        "endpoints": {**endpoints, "lwa": token_host.url},
        **changed,
    }


def config_from(settings: dict[str, Any], folder: Path) -> Config:
    """Return the Config of `settings`, loaded from a file as a user's would be."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_config(str(path), {}).config


@pytest.fixture
async def fake_upstream() -> AsyncIterator[FakeUpstream]:
    """Amazon's API; responses are scripted by the test."""
    async with FakeUpstream() as server:
        yield server


@pytest.fixture
async def token_host() -> AsyncIterator[TokenHost]:
    """Login with Amazon; responses are scripted by the test."""
    async with TokenHost() as server:
        yield server


@pytest.fixture
async def start_proxy(fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path) -> AsyncIterator[StartProxy]:
    """Start proxies; they are stopped in reverse order when the test ends."""
    started: list[Any] = []

    async def start(**settings: Any) -> RunningProxy:
        context = runtime.start_proxy(config_from(settings_for(fake_upstream, token_host, **settings), tmp_path))
        proxy = await context.__aenter__()
        started.append(context)
        return proxy

    yield start
    for context in reversed(started):
        await context.__aexit__(None, None, None)


@pytest.fixture
async def proxy(start_proxy: StartProxy) -> RunningProxy:
    """A proxy with the default settings of the tests."""
    return await start_proxy()


@pytest.fixture
def log() -> Iterator[StringIO]:
    """The log output during a test."""
    root, stream = logging.getLogger(), StringIO()
    before, levels = root.handlers[:], (root.level, LOGGER.level)
    set_up("debug", "json", stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(levels[0])
    LOGGER.setLevel(levels[1])


# Tokens and secrets of the tests, which must be in no log line of any level.
_SECRETS = re.compile(r"Atz[ar]\|\S|sprdt\|\S|client-secret|distinctive-", re.ASCII)


class _RecordingHandler(logging.Handler):
    """Records every message with the full text of exceptions, as a careless log format would."""

    def __init__(self) -> None:
        super().__init__(level=0)
        self.setFormatter(logging.Formatter("%(name)s %(message)s %(fields)s", defaults={"fields": ""}))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(autouse=True)
def no_secret_is_logged() -> Iterator[None]:
    """Fail a test in which any logger of this process writes a secret, at any level, in a message or an exception."""
    recorder, root = _RecordingHandler(), logging.getLogger()
    level = root.level
    root.addHandler(recorder)
    root.setLevel(logging.DEBUG)
    yield
    root.removeHandler(recorder)
    root.setLevel(level)
    leaked = [line for line in recorder.lines if _SECRETS.search(line)]
    assert not leaked


@pytest.fixture(scope="session", name="site")
def built_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the documentation, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def needs(available: bool, what: str) -> None:
    """Skip the test if `what` is missing on this machine; in CI, fail, unless CI_MAY_LACK names it."""
    if available:
        return
    if os.environ.get("CI") and what not in os.environ.get("CI_MAY_LACK", "").split(";"):
        pytest.fail(f"{what} is missing, and CI must have it")
    pytest.skip(f"{what} is missing")
