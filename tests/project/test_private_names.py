"""Contract with other libraries: each private or undocumented name of theirs that the proxy uses.

Ruff's SLF001 finds `other._name` but not `self._name`, nor an override of a private name of a library's base class.
These tests do. aiohttp: test_aiohttp_internals.py has the list. redis-py: test_redis_internals.py.
"""

import ast
import asyncio
import importlib
import inspect
import logging.handlers
import pkgutil
import re
import ssl
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.utils import floatToGoString

import proxy
from proxy.request.upstream import connector
from proxy.request.upstream.response import ErrorResponse
from proxy.server.http_protocol import ServerConnection
from proxy.server.http_server import HttpServer

PROXY = Path(proxy.__file__).parent

DOCUMENTED = {"_asdict", "_fields", "_make", "_replace"}  # of typing.NamedTuple
OF_METACLASSES = {"_abc_impl", "_is_protocol", "_is_runtime_protocol"}
AIOHTTP_INTERNALS = "proxy.request.aiohttp_internals"  # the one module that may use private names of aiohttp
EXPECTED = {"logging": {"_open"}}


def classes() -> Iterator[type]:
    """Yield every class that the proxy defines."""
    for module in pkgutil.walk_packages(proxy.__path__, "proxy."):
        if not module.name.endswith("__main__"):
            loaded = importlib.import_module(module.name)
            yield from (
                kind for _, kind in inspect.getmembers(loaded, inspect.isclass) if kind.__module__ == module.name
            )


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED | OF_METACLASSES


def source_of(kind: type) -> str:
    try:
        return textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # made by C, or by a call such as NamedTuple's
        return ""


def private_names_of(kind: type) -> set[str]:
    """Return the private names that a class of a library has: those of the class, and those it sets on `self`."""
    return {name for name in (*vars(kind), *re.findall(r"\bself\.(_\w+)", source_of(kind))) if is_private(name)}


def private_names_used_by(kind: type) -> set[str]:
    """Return the private names that a class of the proxy defines, reads or sets on itself."""
    used = {name for name in vars(kind) if is_private(name)}
    for node in ast.walk(ast.parse(source_of(kind))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"self", "cls", "super()"}:
            used.add(node.attr)
    return {name for name in used if is_private(name)}


def inherited_private_names(kinds: Iterator[type]) -> dict[str, set[str]]:
    """Return, for each library, the private names of its classes that subclasses in the proxy use."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for kind in kinds:
        for base in kind.__mro__[1:-1]:
            library = base.__module__.partition(".")[0]
            names = private_names_used_by(kind) & private_names_of(base) if library != "proxy" else set()
            if names:
                found[library] |= names
    return dict(found)


def test_no_other_private_name_is_used_by_inheritance() -> None:
    assert inherited_private_names(kind for kind in classes() if kind.__module__ != AIOHTTP_INTERNALS) == EXPECTED


def test_one_module_uses_private_names_of_aiohttp() -> None:
    found = inherited_private_names(kind for kind in classes() if kind.__module__ == AIOHTTP_INTERNALS)
    assert set(found) == {"aiohttp"}
    assert {"_messages", "_waiter", "_prepare_headers", "_kwargs", "_protocol"} <= found["aiohttp"]


def test_a_use_of_aiohttp_by_way_of_our_own_base_class_is_found() -> None:
    class Reads(ServerConnection):
        def is_closing(self) -> bool:
            return self._force_close

    class Overrides(HttpServer):
        def _make_request(self, *_: object) -> None:  # type: ignore[override]  # it is never called
            """Do nothing."""

    class Hides(ErrorResponse):
        def __init__(self) -> None:
            self._start = 0.0  # type: ignore[method-assign, assignment]  # as above

    assert inherited_private_names(iter([Reads])) == {"aiohttp": {"_force_close"}}
    assert inherited_private_names(iter([Overrides])) == {"aiohttp": {"_make_request"}}
    assert inherited_private_names(iter([Hides])) == {"aiohttp": {"_start"}}


def test_a_use_by_inheritance_is_found() -> None:
    class Reads(logging.handlers.WatchedFileHandler):
        def stamp(self) -> None:
            self._statstream()

    class Overrides(logging.handlers.QueueListener):
        def _monitor(self) -> None:
            """Do nothing."""

    class Sets(asyncio.StreamReader):
        def close(self) -> None:
            self._eof = True

    assert inherited_private_names(iter([Reads])) == {"logging": {"_statstream"}}
    assert inherited_private_names(iter([Overrides])) == {"logging": {"_monitor"}}
    assert inherited_private_names(iter([Sets])) == {"asyncio": {"_eof"}}


def test_no_private_name_of_another_library_is_imported() -> None:
    found = set()
    for path in PROXY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("proxy"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found |= {(path.stem, name) for name in names if any(map(is_private, name.split(".")))}
    assert found == {("aiohttp_internals", "aiohttp.web_protocol._ErrInfo")}


def test_no_private_module_of_aiohttp_is_named() -> None:
    named = re.compile(r"aiohttp\._\w+")
    users = {path.stem for path in PROXY.rglob("*.py") if named.search(path.read_text(encoding="utf-8"))}
    assert users == {"aiohttp_internals"}


# Modules of aiohttp that its documentation does not describe, and what is imported from them outside the one file.
UNDOCUMENTED = {"aiohttp.web_protocol", "aiohttp.streams", "aiohttp.http_parser", "aiohttp.base_protocol"}


def test_one_module_imports_from_undocumented_modules_of_aiohttp() -> None:
    users = {
        path.stem
        for path in PROXY.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module in UNDOCUMENTED
    }
    assert users == {"aiohttp_internals"}


# prometheus_client


@pytest.mark.parametrize(
    ("number", "text"), [(0.001, "0.001"), (0.0025, "0.0025"), (60.0, "60.0"), (float("inf"), "+Inf")]
)
def test_prometheus_client_writes_a_bucket_bound_as_its_own_histograms_do(number: float, text: str) -> None:
    assert floatToGoString(number) == text  # type: ignore[no-untyped-call]  # not annotated there
    registry = CollectorRegistry()
    Histogram("h", "", registry=registry, buckets=(0.0001, number)).observe(0)
    assert f'h_bucket{{le="{text}"}} 1.0' in generate_latest(registry).decode()


# logging


def test_a_watched_file_opens_its_file_by_the_method_that_is_overridden() -> None:
    assert list(inspect.signature(logging.handlers.WatchedFileHandler._open).parameters) == ["self"]
    for uses in (logging.handlers.WatchedFileHandler.reopenIfNeeded, logging.FileHandler.emit):
        assert "self._open()" in inspect.getsource(uses)


# ssl and the event loops


def test_wrap_bio_is_overridden_with_the_parameters_it_has() -> None:
    assert list(inspect.signature(connector.ResumingContext.wrap_bio).parameters) == list(
        inspect.signature(ssl.SSLContext.wrap_bio).parameters
    )


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_an_event_loop_makes_the_tls_object_of_a_connection_by_wrap_bio(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    hosts = []

    class Context(ssl.SSLContext):
        def wrap_bio(
            self,
            incoming: ssl.MemoryBIO,
            outgoing: ssl.MemoryBIO,
            server_side: bool = False,
            server_hostname: str | bytes | None = None,
            session: ssl.SSLSession | None = None,
        ) -> ssl.SSLObject:
            hosts.append(server_hostname)
            return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)

    async def connect() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(OSError):  # noqa: PT011 - which one differs between loops
            await asyncio.open_connection(
                "127.0.0.1", port, ssl=Context(ssl.PROTOCOL_TLS_CLIENT), server_hostname="host.example"
            )
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(connect())
    assert hosts == ["host.example"]
