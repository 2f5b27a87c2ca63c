"""What the tests share: a proxy that really listens, a far side that can be scripted, and a raw client."""

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
    """Starts a proxy whose settings are the defaults of the tests, changed by keywords."""

    def __call__(self, **settings: Any) -> Awaitable[RunningProxy]: ...


def settings_for(fake_upstream: FakeUpstream, token_host: TokenHost, **changed: Any) -> dict[str, Any]:
    """Return the settings of a proxy between the test and its far side."""
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
    """Return the Config of `settings`, by way of a real file, as a user's would come."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_config(str(path), {}).config


@pytest.fixture
async def fake_upstream() -> AsyncIterator[FakeUpstream]:
    """Amazon's API, answering what the test scripts."""
    async with FakeUpstream() as server:
        yield server


@pytest.fixture
async def token_host() -> AsyncIterator[TokenHost]:
    """Login with Amazon, answering what the test scripts."""
    async with TokenHost() as server:
        yield server


@pytest.fixture
async def start_proxy(fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path) -> AsyncIterator[StartProxy]:
    """Starts proxies that are stopped, in reverse order, when the test ends."""
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
    """A proxy with the tests' usual settings."""
    return await start_proxy()


@pytest.fixture
def log() -> Iterator[StringIO]:
    """What goes to the log while a test runs."""
    root, stream = logging.getLogger(), StringIO()
    before, levels = root.handlers[:], (root.level, LOGGER.level)
    set_up("debug", "json", stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(levels[0])
    LOGGER.setLevel(levels[1])


# What may stand in no line that any logger writes, whatever its level: the tests' tokens and secrets.
_SECRETS = re.compile(r"Atz[ar]\|\S|sprdt\|\S|client-secret|distinctive-", re.ASCII)


class _Overheard(logging.Handler):
    """Keeps what is said, with the whole text of exceptions, as a careless log would write it."""

    def __init__(self) -> None:
        super().__init__(level=0)
        self.setFormatter(logging.Formatter("%(name)s %(message)s %(fields)s", defaults={"fields": ""}))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(autouse=True)
def no_secret_is_logged() -> Iterator[None]:
    """Fail a test in which any logger of this process says a secret, at any level, in a message or an exception."""
    overheard, root = _Overheard(), logging.getLogger()
    level = root.level
    root.addHandler(overheard)
    root.setLevel(logging.DEBUG)
    yield
    root.removeHandler(overheard)
    root.setLevel(level)
    told = [line for line in overheard.lines if _SECRETS.search(line)]
    assert not told


@pytest.fixture(scope="session", name="site")
def built_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the documentation, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def needs(available: bool, what: str) -> None:
    """Skip the test where `what` is missing on this machine; in CI, fail, unless CI_MAY_LACK names it."""
    if available:
        return
    if os.environ.get("CI") and what not in os.environ.get("CI_MAY_LACK", "").split(";"):
        pytest.fail(f"{what} is missing, and CI must have it")
    pytest.skip(f"{what} is missing")
