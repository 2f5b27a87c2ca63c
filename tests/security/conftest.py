"""One proxy process for all tests of a pytest worker; its recorded state is reset before each test."""

from collections.abc import Iterator

import pytest

from tests.security.harness import SECRETS, Harness, request


@pytest.fixture(scope="session")
def shared_harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """The shared proxy process."""
    with Harness.start(tmp_path_factory.mktemp("world")) as harness:
        yield harness
        for path in ("/metrics", "/readyz?verbose", "/livez", "/", "/status", "/requests", "/nothing"):
            (page,) = harness.send(request(path), address=harness.admin)
            assert page.body
            assert not [secret for secret in SECRETS if secret.encode() in page.body]


@pytest.fixture
def harness(shared_harness: Harness) -> Iterator[Harness]:
    """The process with empty records; afterwards, no violation may be recorded and no secret visible."""
    for server in (shared_harness.api, shared_harness.lwa):
        server.received.clear()
        server.violations.clear()
        server.scripts.clear()
    before = len(shared_harness.log)
    shared_harness.client_output.clear()
    yield shared_harness
    assert not shared_harness.api.violations
    assert not shared_harness.lwa.violations
    output = b"".join(shared_harness.client_output) + "".join(shared_harness.log[before:]).encode()
    assert not [secret for secret in SECRETS if secret.encode() in output]
    assert shared_harness.process.poll() is None
