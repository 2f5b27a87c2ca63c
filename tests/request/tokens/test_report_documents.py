"""Report documents: which need no Restricted Data Token is learnt from responses that pass, without changing them."""

import asyncio
import gzip
import json

import pytest

from proxy.request.token_selection import TokenKey
from proxy.request.tokens import report_documents as documents_module
from proxy.request.tokens.report_documents import MAX_READ, UnrestrictedReports
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.fake_upstream import FakeUpstream, Received, http_response
from tests.support.raw_client import call

REPORTS = "/reports/2021-06-30/reports"
DOCUMENTS = "/reports/2021-06-30/documents"

PLAIN, RESTRICTED = "GET_MERCHANT_LISTINGS_ALL_DATA", "GET_FLAT_FILE_ACTIONABLE_ORDER_DATA_SHIPPING"
LIST = json.dumps(
    {
        "reports": [
            {"reportId": "1", "reportType": PLAIN, "reportDocumentId": "plain"},
            {"reportId": "2", "reportType": RESTRICTED, "reportDocumentId": "secret"},
            {"reportId": "3", "reportType": PLAIN, "processingStatus": "IN_QUEUE"},
        ]
    }
).encode()
ONE = json.dumps({"reportId": "1", "reportType": PLAIN, "reportDocumentId": "plain"}).encode()


def responses(fake_upstream: FakeUpstream, body: bytes, **fields: str) -> None:
    """Let the far side answer the reports' addresses by `body`, and the documents' by themselves."""

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        is_report = received.target.startswith(REPORTS)
        writer.write(http_response("200 OK", body, **fields) if is_report else http_response("200 OK", b"document"))
        await writer.drain()

    fake_upstream.script = script


@pytest.mark.parametrize(("target", "body"), [(REPORTS, LIST), (f"{REPORTS}/1", ONE)])
async def test_a_type_that_passed_through_decides_about_its_document(
    proxy: RunningProxy, fake_upstream: FakeUpstream, target: str, body: bytes
) -> None:
    responses(fake_upstream, body)
    assert (await call(proxy.addresses[0], "GET", target)).body == body
    got = await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/plain")
    assert (got.status, got.decided["token"]) == (200, "lwa")
    assert not fake_upstream.minted
    got = await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/secret")
    assert (got.status, got.decided["token"]) == (200, "rdt")


async def test_a_packed_response_is_learnt_from_and_passed_on_packed(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    packed = gzip.compress(LIST, mtime=0)
    responses(fake_upstream, packed, content_encoding="gzip")
    assert (await call(proxy.addresses[0], "GET", REPORTS)).body == packed
    assert (await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/plain")).decided["token"] == "lwa"


async def test_a_chunked_response_is_learnt_from(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.target.startswith(REPORTS):
            half = len(ONE) // 2
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for part in (ONE[:half], ONE[half:], b""):
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                await writer.drain()
        else:
            writer.write(http_response("200 OK"))

    fake_upstream.script = script
    assert (await call(proxy.addresses[0], "GET", f"{REPORTS}/1")).body == ONE
    assert (await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/plain")).decided["token"] == "lwa"


async def test_one_accounts_documents_are_not_anothers(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}", "na": f"Atzr|{name}-na"}} for name in ("acme", "zeta")}
    proxy = await start_proxy(accounts=accounts)
    responses(fake_upstream, ONE)
    await call(proxy.addresses[0], "GET", f"{REPORTS}/1", x_sp_account="acme", x_sp_region="eu")
    tokens = [
        (await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/plain", x_sp_account=name, x_sp_region=region)).decided
        for name, region in (("acme", "eu"), ("acme", "na"), ("zeta", "eu"))
    ]
    assert [decided["token"] for decided in tokens] == ["lwa", "rdt", "rdt"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"reports": 5}', b'{"reports": [5, null]}', b'{"reportDocumentId": 5, "reportType": "x"}',
     b"[" * 9999, gzip.compress(LIST, mtime=0)[:40]],
)  # fmt: skip
async def test_nonsense_teaches_nothing_and_passes(
    proxy: RunningProxy, fake_upstream: FakeUpstream, body: bytes
) -> None:
    responses(fake_upstream, body, content_encoding="gzip" if body[:2] == b"\x1f\x8b" else "identity")
    assert (await call(proxy.addresses[0], "GET", REPORTS)).body == body
    assert (await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/plain")).decided["token"] == "rdt"


async def test_a_large_response_passes_unread(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    body = ONE[:-1] + b" " * MAX_READ + b"}"
    responses(fake_upstream, body)
    assert (await call(proxy.addresses[0], "GET", f"{REPORTS}/1")).body == body
    assert (await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/plain")).decided["token"] == "rdt"


async def test_a_large_response_in_chunks_passes_unread_too(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    body = ONE[:-1] + b" " * MAX_READ + b"}"

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.target.startswith(REPORTS):
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
        else:
            writer.write(http_response("200 OK"))
        await writer.drain()

    fake_upstream.script = script
    assert (await call(proxy.addresses[0], "GET", f"{REPORTS}/1")).body == body
    assert (await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/plain")).decided["token"] == "rdt"


async def test_a_document_that_amazon_refuses_without_a_restricted_token_brings_one_the_next_time(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.target.startswith(REPORTS):
            writer.write(http_response("200 OK", ONE))
        elif (received.get("x-amz-access-token") or "").startswith("Atz.sprdt"):
            writer.write(http_response("200 OK"))
        else:
            writer.write(http_response("403 Forbidden"))

    fake_upstream.script = script
    await call(proxy.addresses[0], "GET", f"{REPORTS}/1")
    first = await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/plain")
    second = await call(proxy.addresses[0], "GET", f"{DOCUMENTS}/plain")
    assert (first.status, first.decided["hint"]) == (403, "restricted_without_rdt")
    assert (second.status, second.decided["token"]) == (200, "rdt")


def token_key(account: str, document: str) -> TokenKey:
    return TokenKey("rdt", "main", account, "production", "eu", method="GET", path=f"{DOCUMENTS}/{document}")


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "MAX_KNOWN", 5)
    monkeypatch.setattr(documents_module, "MAX_ACCOUNTS", 3)
    documents = UnrestrictedReports()
    for account in range(10):
        for number in range(20):
            documents.add_unrestricted(token_key(f"a{account}", str(number)))
    known = [
        (account, number)
        for account in range(10)
        for number in range(20)
        if documents.is_unrestricted(token_key(f"a{account}", str(number)))
    ]
    assert known == [(account, number) for account in (7, 8, 9) for number in range(15, 20)]
