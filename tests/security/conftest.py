"""One proxy process for all tests of a worker; what happened in one test is forgotten before the next."""

from collections.abc import Iterator

import pytest

from tests.security.harness import SECRETS, World, request


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The one process."""
    with World.made(tmp_path_factory.mktemp("world")) as world:
        yield world
        for path in ("/metrics", "/readyz?verbose", "/livez", "/", "/status", "/requests", "/nothing"):
            (page,) = world.send(request(path), address=world.admin)
            assert page.body
            assert not [secret for secret in SECRETS if secret.encode() in page.body]


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """The process, with nothing recorded; in the end, nothing improper may have arrived and no secret been told."""
    for server in (shared_world.api, shared_world.lwa):
        server.arrived.clear()
        server.improper.clear()
        server.scripts.clear()
    before = len(shared_world.log)
    shared_world.said.clear()
    yield shared_world
    assert not shared_world.api.improper
    assert not shared_world.lwa.improper
    told = b"".join(shared_world.said) + "".join(shared_world.log[before:]).encode()
    assert not [secret for secret in SECRETS if secret.encode() in told]
    assert shared_world.process.poll() is None
