"""Addresses of documents: who may use one, how long, and with which key."""

from pathlib import Path
from typing import Any

import pytest

from proxy.config import Secret
from proxy.request.documents import relay_rewrite
from proxy.store.encryption import DecryptionFailed, DocumentCipher
from tests.conftest import config_from, settings_for
from tests.request.documents.conftest import CONTENT, STORE_KEY, Start, Started, refused, serve
from tests.support.fake_upstream import FakeUpstream, RawServer, TokenHost, http_response
from tests.support.raw_client import call

# Who may use an address.


@pytest.mark.parametrize("where", [0, 1, 10, 40, -2])
async def test_an_address_that_was_changed_is_refused(relayed: Started, where: int) -> None:
    target = await relayed.document()
    head, slash, sealed = target.rpartition("/")
    letters = list(sealed)
    letters[where] = "B" if letters[where] != "B" else "C"
    assert await refused(relayed.address, "GET", head + slash + "".join(letters)) == (403, "DocumentRefused")
    assert not relayed.storage.received


@pytest.mark.parametrize("sealed", ["a", "abcd", "A" * 100, "_-" * 50, "A" * 15_000])
async def test_what_is_no_address_is_refused(relayed: Started, sealed: str) -> None:
    assert await refused(relayed.address, "GET", f"/@acme/-/documents/{sealed}") == (403, "DocumentRefused")


@pytest.mark.parametrize(
    "target",
    [
        "/@acme/-/documents/",
        "/@acme/-/documents/a/b",
        "/@acme/-/documents/a%41",
        "/@acme/-/documents/a?decompress=2",
        "/@acme/-/documents/a?x=1",
        "/@acme/-/documents/a=",
    ],
)
async def test_what_has_not_the_form_of_an_address_is_told(relayed: Started, target: str) -> None:
    assert await refused(relayed.address, "GET", target) == (400, "BadTarget")


async def test_a_query_that_holds_the_word_is_no_address(relayed: Started) -> None:
    got = await call(relayed.address, "GET", "/@acme/sellers/v1/marketplaceParticipations?a=/-/documents/b")
    assert got.error is None


async def test_another_account_may_not_use_it(start: Start) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("acme", "zeta")}
    started = await start(accounts=accounts)
    target = await started.document(x_sp_account="acme")
    other = target.replace("/@acme/", "/@zeta/")
    assert await refused(started.address, "GET", other) == (403, "DocumentRefused")
    assert await refused(started.address, "GET", target, x_sp_account="zeta") == (400, "ConflictingSources")
    unknown = target.replace("/@acme/", "/@nobody/")
    assert await refused(started.address, "GET", unknown) == (400, "UnknownAccount")
    assert not started.storage.received


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH"])
async def test_a_download_is_no_upload(relayed: Started, method: str) -> None:
    target = await relayed.document()
    assert await refused(relayed.address, method, target, b"x") == (403, "DocumentRefused")
    assert not relayed.storage.received


async def test_an_upload_is_no_download(relayed: Started) -> None:
    target = await relayed.upload()
    assert await refused(relayed.address, "GET", target) == (403, "DocumentRefused")
    got = await call(relayed.address, "HEAD", target)
    assert (got.status, got.error) == (403, "DocumentRefused")
    assert not relayed.storage.received


async def test_it_lasts_no_longer_than_the_url(relayed: Started) -> None:
    target = await relayed.document(query="X-Amz-Expires=0")
    assert await refused(relayed.address, "GET", target) == (403, "DocumentExpired")


async def test_it_lasts_no_longer_than_an_hour(relayed: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_rewrite, "MAX_LIFETIME", 0.0)
    target = await relayed.document(query="X-Amz-Expires=604800")
    assert await refused(relayed.address, "GET", target) == (403, "DocumentExpired")


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"host": "evil.test"}, "HostRefused"), ({"origin": "http://evil.test"}, "BrowserRefused")],
)
async def test_the_guard_stands_before_documents_too(relayed: Started, fields: dict[str, str], code: str) -> None:
    target = await relayed.document()
    assert (await call(relayed.address, "GET", target, None, **fields)).error == code
    assert not relayed.storage.received


async def test_a_caller_may_not_use_what_another_got(start: Start) -> None:
    callers = {name: {"key": f"key-of-{name}", "accounts": ["acme"]} for name in ("one", "two")}
    callers["three"] = {"key": "key-of-three", "accounts": ["zeta"]}
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("acme", "zeta")}
    started = await start(callers=callers, accounts=accounts)
    target = await started.document(x_sp_key="key-of-one", x_sp_account="acme")
    assert (await call(started.address, "GET", target, x_sp_key="key-of-one")).body == CONTENT
    assert await refused(started.address, "GET", target) == (403, "CallerRefused")
    assert await refused(started.address, "GET", target, x_sp_key="key-of-two") == (403, "DocumentRefused")
    assert await refused(started.address, "GET", target, x_sp_key="key-of-three") == (403, "NotAllowed")
    assert len(started.storage.received) == 1


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"operations": ["orders.*"]}, "NotAllowed"),
        ({"operations": ["reports.*"]}, None),
        ({"operations": ["READ *"]}, None),
        ({"accounts": ["zeta"]}, "NotAllowed"),
        ({"account": "zeta"}, "ConflictingSources"),
        ({"region": "na"}, "DocumentRefused"),
        ({"region": "eu", "account": "acme"}, None),
        ({"require_header": True}, "HeaderRequired"),
    ],
)
async def test_a_listener_serves_the_documents_of_what_may_be_called_there(
    start: Start, policy: dict[str, Any], code: str | None
) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}", "na": "Atzr|na"}} for name in ("acme", "zeta")}
    listen = [{"address": "127.0.0.1:0"}, {"address": "127.0.0.1:0", **policy}]
    started = await start(listen=listen, accounts=accounts)
    target = await started.document(x_sp_account="acme", x_sp_region="eu")
    got = await call(started.proxy.addresses[1], "GET", target)
    assert got.error == code
    assert len(started.storage.received) == (code is None)


async def test_a_document_with_personal_data_stays_with_those_who_may_have_some(start: Start) -> None:
    listen = [{"address": "127.0.0.1:0"}, {"address": "127.0.0.1:0", "data_elements": []}]
    started = await start(listen=listen)
    restricted = await started.document()
    assert started.fake_upstream.minted
    assert (await call(started.address, "GET", restricted)).body == CONTENT
    assert await refused(started.proxy.addresses[1], "GET", restricted) == (403, "NotAllowed")
    harmless = await started.document(address=started.proxy.addresses[1])
    assert (await call(started.proxy.addresses[1], "GET", harmless)).body == CONTENT
    assert (await call(started.address, "GET", harmless)).body == CONTENT


# Keys.


async def test_replicas_with_one_key_serve_each_others_addresses(start: Start) -> None:
    one, two = await start(store_key=STORE_KEY), await start(store_key=STORE_KEY)
    target = await one.document()
    assert (await call(two.address, "GET", target)).body == CONTENT


async def test_without_a_key_each_process_has_its_own(start: Start) -> None:
    one, two = await start(), await start()
    target = await one.document()
    assert await refused(two.address, "GET", target) == (403, "DocumentRefused")


def test_a_new_key_opens_what_the_old_one_sealed() -> None:
    def keys(*texts: str) -> tuple[Secret, ...]:
        return tuple(map(Secret, texts))

    old, both, new = (
        DocumentCipher(keys("o" * 32)),
        DocumentCipher(keys("n" * 32, "o" * 32)),
        DocumentCipher(keys("n" * 32)),
    )
    sealed = old.encrypt("acme", b"text")
    assert both.decrypt("acme", sealed) == b"text"
    assert new.decrypt("acme", both.encrypt("acme", b"text")) == b"text"
    assert old.encrypt("acme", b"text") != sealed
    for cipher, account in ((new, "acme"), (both, "zeta"), (DocumentCipher(()), "acme")):
        with pytest.raises(DecryptionFailed):
            cipher.decrypt(account, sealed)


async def test_an_address_outlives_a_reload(
    start: Start, fake_upstream: FakeUpstream, token_host: TokenHost, storage: RawServer, tmp_path: Path
) -> None:
    started = await start()
    target = await started.document()
    settings = settings_for(fake_upstream, token_host, documents="relay", warm_up=True)
    settings["endpoints"]["documents"] = storage.url
    assert (await started.proxy.apply_config(config_from(settings, tmp_path))).has_changed
    assert (await call(started.address, "GET", target)).body == CONTENT
    settings["documents"] = "direct"
    await started.proxy.apply_config(config_from(settings, tmp_path))
    serve(fake_upstream, http_response("404 Not Found"))
    assert (await call(started.address, "GET", target)).status == 404
    settings["documents"] = "relay"
    await started.proxy.apply_config(config_from(settings, tmp_path))
    assert (await call(started.address, "GET", target)).body == CONTENT
