"""Header fields that come over and over: what follows from them is worked out once, and only for the very same ones."""

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.request.header_cache import MAX_BLOCKS, MAX_BYTES, HeaderBlock, HeaderCache, Raw
from proxy.server.runtime import RunningProxy
from tests.support.fake_upstream import FakeUpstream
from tests.support.raw_client import call


def fields(*names_and_values: str) -> tuple[Raw, CIMultiDictProxy[str]]:
    pairs = [tuple(line.split(": ")) for line in names_and_values]
    raw = tuple((name.encode(), value.encode()) for name, value in pairs)
    return raw, CIMultiDictProxy(CIMultiDict((name, value) for name, value in pairs))


def test_the_same_fields_are_looked_at_once() -> None:
    heads = HeaderCache()
    first = heads.get(*fields("Host: localhost", "Accept: */*"))
    assert heads.get(*fields("Host: localhost", "Accept: */*")) is first
    assert first.names == {"host", "accept"}
    assert first.size == len("Host: localhost\r\nAccept: */*\r\n")


def test_another_value_case_or_order_is_another_head() -> None:
    heads = HeaderCache()
    spellings = [
        ("Host: localhost", "x-sp-account: acme"),
        ("Host: localhost", "x-sp-account: acmf"),
        ("Host: localhost", "X-sp-account: acme"),
        ("x-sp-account: acme", "Host: localhost"),
        ("Host: localhost", "x-sp-account: acme", "x-sp-account: acme"),
        ("Host: localhost",),
    ]
    found: list[HeaderBlock] = [heads.get(*fields(*spelling)) for spelling in spellings]
    assert len({id(head) for head in found}) == len(spellings)


@pytest.mark.parametrize(("value", "others"), [("", MAX_BLOCKS), ("l" * 10_000, MAX_BYTES // 40_000), ("", 1)])
def test_what_is_remembered_is_bounded(value: str, others: int) -> None:
    heads = HeaderCache()
    first = heads.get(*fields("x: first"))
    for number in range(others):
        heads.get(*fields(f"x: {number}{value}"))
    assert (heads.get(*fields("x: first")) is first) == (others == 1)
    last = heads.get(*fields("x: last"))
    assert heads.get(*fields("x: last")) is last


def test_a_head_that_is_larger_than_all_that_may_be_remembered_is_not() -> None:
    heads = HeaderCache()
    first, large = heads.get(*fields("x: first")), fields(f"x: {'l' * (MAX_BYTES // 4)}")
    assert heads.get(*large) is not heads.get(*large)
    assert heads.get(*fields("x: first")) is first


async def test_what_is_remembered_of_one_request_does_not_reach_another(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    at, path = proxy.addresses[0], "/orders/v0/orders"
    for method, body in (("GET", None), ("POST", b"abc"), ("GET", None), ("POST", b"abc"), ("DELETE", None)):
        assert (await call(at, method, path, body, x_mine="1", content_language="en")).status == 200
        sent = fake_upstream.received[-1]
        assert (sent.method, sent.get("x-mine"), sent.body) == (method, "1", body or b"")
    for method in ("GET", "PUT", "GET", "PUT"):
        await call(at, method, path, content_type="text/plain")
        assert (fake_upstream.received[-1].get("content-type") is None) is (method == "GET"), "not without a body"
    count = len(fake_upstream.received)
    assert (await call(at, "GET", path, x_mine="1", origin="https://evil.example")).error == "BrowserRefused"
    assert (await call(at, "TRACE", path, x_mine="1", content_language="en")).error == "MethodNotAllowed"
    assert (await call(at, "GET", "//orders", x_mine="1", content_language="en")).error == "BadTarget"
    assert (await call(at, "GET", "http://evil.example/", x_mine="1", content_language="en")).error == "HostRefused"
    assert len(fake_upstream.received) == count


async def test_a_length_that_connection_names_is_no_length_to_go_by(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    for _ in range(2):
        got = await call(proxy.addresses[0], "POST", "/feeds/2021-06-30/feeds", b"{}", connection="content-length")
        assert got.status == 200
        assert (fake_upstream.received[-1].body, fake_upstream.received[-1].get("content-length")) == (b"{}", None)
