"""TLS of listeners: versions, client certificates, certificates that change; identities that connections prove."""

import asyncio
import contextlib
import os
import re
import shutil
import ssl
import warnings
from pathlib import Path
from typing import Any

import pytest

from proxy.config import Tls
from proxy.server.runtime import RunningProxy
from proxy.server.tls import ServerTls, validate
from tests.conftest import StartProxy, config_from, settings_for
from tests.support.certificates import Authority
from tests.support.fake_upstream import FakeUpstream, TokenHost
from tests.support.raw_client import Client, RawResponse, call, request

SELLERS = "/sellers/v1/marketplaceParticipations"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("authority"))


def tls_of(authority: Authority, folder: Path, *, clients: bool = False) -> dict[str, Any]:
    """Return the setting `tls` with files of the test's own, so that they can be changed."""
    certificate, key = authority.issue("localhost", alternative="DNS:localhost,IP:127.0.0.1")
    made = {"certificate": str(folder / "tls.crt"), "key": str(folder / "tls.key")}
    shutil.copy(certificate, made["certificate"])
    shutil.copy(key, made["key"])
    Path(made["key"]).chmod(0o600)
    return {**made, "client_ca": authority.certificate} if clients else made


async def ask(
    address: str,
    trusted: str,
    mine: tuple[str, str] | None = None,
    version: ssl.TLSVersion | None = None,
    **fields: str,
) -> RawResponse:
    """Send one request over TLS."""
    context = ssl.create_default_context(cafile=trusted)
    if mine is not None:
        context.load_cert_chain(*mine)
    if version is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that is what it is for
            context.minimum_version = context.maximum_version = version
        context.set_ciphers("DEFAULT@SECLEVEL=0")
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        client = Client(reader, writer)
        await client.send(request("GET", SELLERS, **fields))
        return await client.read_response()
    finally:
        writer.close()


async def served_with(proxy: RunningProxy, trusted: str) -> int:
    """Return the serial number of the certificate that is shown."""
    context = ssl.create_default_context(cafile=trusted)
    host, _, port = proxy.addresses[0].rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("peercert")
    writer.close()
    return int(shown["serialNumber"], 16)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_listener_speaks_tls(
    start_proxy: StartProxy, authority: Authority, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    proxy = await start_proxy(listen={"address": "127.0.0.1:0", "tls": tls_of(authority, tmp_path)})
    assert (await ask(proxy.addresses[0], authority.certificate, version=version)).status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
async def test_a_listener_does_not_speak_what_is_older(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, authority: Authority, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    proxy = await start_proxy(listen={"address": "127.0.0.1:0", "tls": tls_of(authority, tmp_path)})
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await ask(proxy.addresses[0], authority.certificate, version=version)
    assert not fake_upstream.received


def test_no_older_version_is_spoken_whatever_the_system_allows(authority: Authority, tmp_path: Path) -> None:
    tls = ServerTls(Tls(**tls_of(authority, tmp_path)))
    assert tls.context.minimum_version == tls._current.minimum_version == ssl.TLSVersion.TLSv1_2


async def test_plain_http_to_a_tls_listener_gets_nowhere(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, authority: Authority, tmp_path: Path
) -> None:
    proxy = await start_proxy(listen={"address": "127.0.0.1:0", "tls": tls_of(authority, tmp_path)})
    host, _, port = proxy.addresses[0].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request("GET", SELLERS))
    with contextlib.suppress(ConnectionError):
        assert b"HTTP" not in await reader.read()
    writer.close()
    assert not fake_upstream.received


async def test_only_certificates_of_the_client_ca_come_in(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, authority: Authority, tmp_path: Path
) -> None:
    proxy = await start_proxy(listen={"address": "127.0.0.1:0", "tls": tls_of(authority, tmp_path, clients=True)})
    address, trusted = proxy.addresses[0], authority.certificate
    assert (await ask(address, trusted, authority.issue("warehouse"))).status == 200
    stranger = Authority.made(tmp_path / "stranger").issue("warehouse")
    for mine in (None, stranger, authority.issue("old", expired=True)):
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await ask(address, trusted, mine)
    assert len(fake_upstream.received) == 1


async def test_the_name_in_a_certificate_is_a_callers(
    start_proxy: StartProxy, authority: Authority, tmp_path: Path
) -> None:
    callers = {
        "one": {"certificate": "warehouse", "operations": ["sellers.*"]},
        "two": {"certificate": "spiffe://internal/reports", "operations": ["reports.*"]},
    }
    tls = tls_of(authority, tmp_path, clients=True)
    proxy = await start_proxy(listen={"address": "127.0.0.1:0", "tls": tls}, callers=callers)
    address, trusted = proxy.addresses[0], authority.certificate
    assert (await ask(address, trusted, authority.issue("warehouse"))).status == 200
    got = await ask(address, trusted, authority.issue("reports", alternative="URI:spiffe://internal/reports"))
    assert (got.error, b"callers.two.operations" in got.body) == ("NotAllowed", True)
    got = await ask(address, trusted, authority.issue("somebody"))
    assert got.error == "CallerRefused"
    # A common name beside alternative names is no name.
    got = await ask(address, trusted, authority.issue("warehouse", alternative="DNS:elsewhere"))
    assert got.error == "CallerRefused"


async def test_the_user_at_the_end_of_a_unix_socket_is_a_callers(start_proxy: StartProxy, tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/x.sock"
    proxy = await start_proxy(listen=path, callers={"me": {"uid": os.getuid(), "operations": ["sellers.*"]}})
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
    assert (await call(proxy.addresses[0], "GET", "/orders/v0/orders")).error == "NotAllowed"
    other = await start_proxy(
        listen=f"unix:{tmp_path}/y.sock", callers={"other": {"uid": os.getuid() + 1}}, admin="127.0.0.1:0"
    )
    assert (await call(other.addresses[0], "GET", SELLERS)).error == "CallerRefused"


async def test_changed_certificates_count_for_new_connections_and_broken_ones_do_not(
    authority: Authority, tmp_path: Path, log: Any
) -> None:
    settings = tls_of(authority, tmp_path, clients=True)
    tls = ServerTls(Tls(**settings))

    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"come in")
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls.context)
    port = server.sockets[0].getsockname()[1]

    async def shown(mine: tuple[str, str]) -> int:
        context = ssl.create_default_context(cafile=authority.certificate)
        context.load_cert_chain(*mine)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        with contextlib.closing(writer):
            # A refusal of what was shown comes after the handshake in TLS 1.3.
            if await reader.read() != b"come in":
                raise ConnectionError
            return int(writer.get_extra_info("peercert")["serialNumber"], 16)

    mine = authority.issue("warehouse")
    first = await shown(mine)
    tls.reload_if_changed()
    assert await shown(mine) == first

    (tmp_path / "tls.crt").write_text("nonsense")
    tls.reload_if_changed()
    assert await shown(mine) == first, "what cannot be used changes nothing"
    assert "cannot be used" in log.getvalue()

    tls_of(authority, tmp_path, clients=True)
    tls.reload_if_changed()
    assert await shown(mine) != first

    # Another authority for clients: those of the old one are out.
    another = Authority.made(tmp_path / "another")
    tls._settings = Tls(**{**settings, "client_ca": another.certificate})
    tls.reload_if_changed()
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await shown(mine)
    await shown(another.issue("warehouse"))
    server.close()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"certificate": "/nowhere"}, "No such file"),
        ({"key": "/nowhere"}, "No such file"),
        ({"client_ca": "/nowhere"}, "No such file"),
        ({"key": "OTHER"}, "key values mismatch"),
        ({"certificate": "KEY"}, "pem lib|no start line|unsupported|not a certificate"),
    ],
)
def test_tls_files_that_cannot_be_used_are_a_mistake(
    fake_upstream: FakeUpstream,
    token_host: TokenHost,
    authority: Authority,
    tmp_path: Path,
    changed: dict[str, str],
    words: str,
) -> None:
    tls = tls_of(authority, tmp_path)
    stands_for = {"OTHER": authority.issue("other")[1], "KEY": tls["key"]}
    tls = {**tls, **{key: stands_for.get(value, value) for key, value in changed.items()}}
    config = config_from(
        settings_for(fake_upstream, token_host, listen={"address": "127.0.0.1:0", "tls": tls}), tmp_path
    )
    (problem,) = validate(config)
    (setting,) = changed
    assert problem.key == ("listen[0].tls" if changed[setting] in stands_for else f"listen[0].tls.{setting}")
    assert re.search(words, problem.message), problem.message
