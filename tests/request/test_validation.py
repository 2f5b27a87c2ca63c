"""What may come in at all: hosts, browsers, methods, framing and targets, as tables."""

import difflib
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.config import Account, Address, Application, Config, Listener, Secret
from proxy.errors import BadOption, BadTarget, BrowserRefused, HostRefused, MalformedRequest, MethodRefused, ProxyError
from proxy.request import authentication, request_options, token_selection
from proxy.request import target as request_target
from proxy.request.header_cache import HeaderBlock
from proxy.request.validation import (
    METHODS,
    PREFIX,
    REQUEST_HEADERS,
    AllowedHosts,
    ValidatedTarget,
    validate,
    validate_with,
)
from tests.conftest import config_from

ORDERS = "/orders/v0/orders"
EU = "sellingpartnerapi-eu.amazon.com"
AMAZON = {
    "sellingpartnerapi-na.amazon.com": ("production", "na"),
    "sellingpartnerapi-eu.amazon.com": ("production", "eu"),
    "sellingpartnerapi-fe.amazon.com": ("production", "fe"),
    "sandbox.sellingpartnerapi-na.amazon.com": ("sandbox", "na"),
    "sandbox.sellingpartnerapi-eu.amazon.com": ("sandbox", "eu"),
    "sandbox.sellingpartnerapi-fe.amazon.com": ("sandbox", "fe"),
}


def allowed_hosts_of(address: Address | None = None, allowed: tuple[str, ...] = ()) -> AllowedHosts:
    """Return the names of a listener, by default 127.0.0.1:8080."""
    config = Config(
        applications={"main": Application(client_id="c", client_secret=Secret("s"))},
        accounts={"acme": Account(refresh_tokens={"eu": Secret("t")})},
        allowed_hosts=allowed,
    )
    return AllowedHosts.from_config(Listener(address=address or Address("127.0.0.1", 8080)), config)


ALLOWED_HOSTS = allowed_hosts_of()

OUR_HEADERS = {
    value
    for module in (authentication, request_target, token_selection, request_options)
    for name, value in vars(module).items()
    if name.endswith("_HEADER") and isinstance(value, str) and value.startswith("x-sp-")
}


def let_in(
    target: str = ORDERS,
    *fields: tuple[str, str],
    method: str = "GET",
    allowed_hosts: AllowedHosts = ALLOWED_HOSTS,
    host: str | None = "localhost",
) -> ValidatedTarget:
    """Return what is admitted of a request; `host` is its Host header, None for none."""
    headers = CIMultiDict([*([] if host is None else [("Host", host)]), *fields])
    return validate(method, target, CIMultiDictProxy(headers), allowed_hosts)


# The proxy's own headers.


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("x-sp-acount", "x-sp-account"),
        ("X-SP-Acount", "x-sp-account"),
        ("x-sp-accounts", "x-sp-account"),
        ("x-sp-account-id", "x-sp-account"),
        ("x_sp_account", "x-sp-account"),
        ("x-sp_account", "x-sp-account"),
        ("x-sp-reigon", "x-sp-region"),
        ("x-sp-regions", "x-sp-region"),
        ("x-sp-data-element", "x-sp-data-elements"),
        ("x-sp-dataelements", "x-sp-data-elements"),
        ("x-sp-maxwait", "x-sp-max-wait"),
        ("x-sp-keys", "x-sp-key"),
        ("x-sp-time-out", "x-sp-timeout"),
        ("x-sp-retries", "x-sp-retry"),
        ("x-sp-prio", "x-sp-priority"),
        ("x-sp-clients", "x-sp-client"),
    ],
)
def test_a_header_of_ours_that_is_misspelt_is_refused_with_the_one_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(BadOption) as caught:
        let_in(ORDERS, ("x-sp-region", "eu"), (name, "distinctive"))
    assert f"did you mean {meant}?" in caught.value.message
    assert "distinctive" not in str(caught.value.body())


@pytest.mark.parametrize(
    "name",
    [*sorted(OUR_HEADERS), *map(str.upper, sorted(OUR_HEADERS)), "x-sp-proxy", "x-sp-proxy-error", "x-sp-session",
     "x-sp-trace", "x-sp-version", "x-sp-", "x-sp-" + "account" * 100, "x-spider", "x-account", "sp-account", "acount"],
)  # fmt: skip
def test_any_other_header_is_no_misspelt_one(name: str) -> None:
    assert let_in(ORDERS, (name, "x")).target == ORDERS


def test_the_names_of_all_headers_of_ours_are_known() -> None:
    assert {PREFIX + name for name in REQUEST_HEADERS} == OUR_HEADERS


def test_a_thousand_unknown_headers_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(name: str, *_: object, **__: object) -> list[str]:
        compared.append(name)
        return []

    monkeypatch.setattr(difflib, "get_close_matches", compare)
    let_in(ORDERS, *((f"x-sp-q{number}", "x") for number in range(1000)))
    assert 0 < len(compared) < 50


def test_a_misspelt_header_is_refused_each_time_and_a_foreign_host_first() -> None:
    head = HeaderBlock(CIMultiDictProxy(CIMultiDict([("Host", "localhost"), ("x-sp-acount", "acme")])))
    for _ in range(2):
        with pytest.raises(BadOption):
            validate_with(head, "GET", ORDERS, ALLOWED_HOSTS)
    with pytest.raises(HostRefused):
        let_in(ORDERS, ("x-sp-acount", "acme"), host="evil.test")


# Hosts.


@pytest.mark.parametrize(
    ("given_host", "means"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST", "localhost"),
        ("LocalHost:8080", "localhost"),
        ("localhost:1", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1:8080", "127.0.0.1"),
        ("127.0.0.1:65535", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:8080", "::1"),
    ],
)
def test_loopback_names_are_taken_in_any_case_and_with_any_port(given_host: str, means: str) -> None:
    validated = let_in(host=given_host)
    assert (validated.host, validated.amazon) == (means, None)


@pytest.mark.parametrize("host", sorted(AMAZON))
def test_a_host_of_amazon_says_environment_and_region(host: str) -> None:
    for written in (host, host.upper(), f"{host}:443"):
        validated = let_in(host=written)
        assert (validated.host, validated.amazon) == (host, AMAZON[host])


@pytest.mark.parametrize(
    ("address", "host", "is_taken"),
    [
        (Address("10.1.2.3", 8080), "10.1.2.3:8080", True),
        (Address("10.1.2.3", 8080), "10.1.2.4:8080", False),
        (Address("Proxy.Internal", 80), "proxy.internal", True),
        (Address("proxy.internal", 80), "PROXY.internal:80", True),
        (Address("127.8.8.8", 80), "127.8.8.8", True),
        (Address("127.0.0.1", 80), "127.8.8.8", False),
        (Address("fd00::1", 80), "[fd00::1]:80", True),
        (Address("fd00::1", 80), "[FD00::1]:80", True),
        (Address("0.0.0.0", 80), "0.0.0.0:80", False),
        (Address("::", 80), "[::]:80", False),
        (Address(path="/run/x.sock"), "localhost", True),
        (Address(path="/run/x.sock"), "x.sock", False),
    ],
)
def test_the_listener_accepts_its_own_address_but_no_wildcard(address: Address, host: str, is_taken: bool) -> None:
    allowed_hosts = allowed_hosts_of(address)
    if is_taken:
        assert let_in(host=host, allowed_hosts=allowed_hosts).amazon is None
    else:
        with pytest.raises(HostRefused):
            let_in(host=host, allowed_hosts=allowed_hosts)


def test_allowed_hosts_are_taken_too_and_nothing_near_them() -> None:
    allowed_hosts = allowed_hosts_of(allowed=("sp-proxy.internal", "10.0.0.5", "fd00::2"))
    for host in ("sp-proxy.internal", "SP-Proxy.Internal:8080", "10.0.0.5:1", "[fd00::2]", "localhost"):
        assert let_in(host=host, allowed_hosts=allowed_hosts).amazon is None
    for host in ("xsp-proxy.internal", "sp-proxy.internal.evil.test", "a.sp-proxy.internal", "10.0.0.50"):
        with pytest.raises(HostRefused):
            let_in(host=host, allowed_hosts=allowed_hosts)


@pytest.mark.parametrize(
    "host",
    ["evil.test", "evil.test:8080", "localhost.evil.test", "127.0.0.1.evil.test", "evil-localhost", "xlocalhost",
     "localhostx", "localhost.", "localhost..", ".localhost", "user@localhost", "localhost@evil.test",
     "user:pw@127.0.0.1", "0.0.0.0", "0.0.0.0:8080", "[::]", "0", "127.1", "2130706433", "0x7f.1", "127.0.0.2",
     "[::ffff:127.0.0.1]", "::1", "[::1", "::1]", "localhost:", "localhost:x", "localhost:-1", "localhost:123456",
     "localhost:80:80", "localhost:٣", "localhost/", "localhost/x", "localhost\\x", "local host", "localhost ",
     " localhost", "localhost,evil.test", "localhost#", "localhost?", "localhost%00", "local%68ost", "localhost\t",
     "ⓛocalhost", "",
     " ", ":", ":8080", "@", "[]", "[localhost]", "http://localhost", f"{EU}.evil.test", f"evil-{EU}", f"x.{EU}",
     f"{EU}@evil.test", "api.amazon.com", "amazon.com", "sellingpartnerapi-uk.amazon.com",
     "sandbox.sellingpartnerapi-uk.amazon.com", "sandbox.sandbox.sellingpartnerapi-eu.amazon.com"],
)  # fmt: skip
def test_any_other_host_is_refused(host: str) -> None:
    with pytest.raises(HostRefused) as caught:
        let_in(host=host)
    assert caught.value.status == 421
    for target in (f"http://{host}/orders", f"https://{host}/orders"):
        if "localhost/" in host or "localhost?" in host:
            continue  # there it ends the authority
        with pytest.raises((HostRefused, BadTarget)):
            let_in(target)


@pytest.mark.parametrize(
    "hosts", [(), ("localhost", "localhost"), ("localhost", "evil.test"), (EU, EU), ("", "localhost")]
)
def test_there_is_exactly_one_host_header(hosts: tuple[str, ...]) -> None:
    for target in (ORDERS, f"https://{EU}{ORDERS}"):
        with pytest.raises(MalformedRequest, match=f"there are {len(hosts)} Host headers"):
            let_in(target, *(("Host", host) for host in hosts), host=None)


@pytest.mark.parametrize(
    ("target", "host", "means"),
    [
        (f"https://{EU}/orders", "localhost", EU),
        (f"http://{EU}/orders", "localhost", EU),
        (f"HTTP://{EU.upper()}:443/orders", "localhost", EU),
        (f"https://{EU}/orders", EU, EU),
        ("http://localhost:8080/orders", EU, "localhost"),
        ("http://[::1]:8080/orders", "localhost", "::1"),
    ],
)
def test_an_absolute_target_decides_over_the_host_header(target: str, host: str, means: str) -> None:
    validated = let_in(target, host=host)
    assert (validated.target, validated.host) == ("/orders", means)


def test_an_absolute_target_does_not_excuse_a_foreign_host_header() -> None:
    with pytest.raises(HostRefused):
        let_in(f"https://{EU}{ORDERS}", host="evil.test")


def test_a_refusal_does_not_quote_the_host() -> None:
    with pytest.raises(HostRefused) as caught:
        let_in(host="secret-name.test")
    assert "secret-name" not in caught.value.body().decode()


# Browsers.


@pytest.mark.parametrize(
    "field",
    [
        ("Origin", "https://evil.test"),
        ("Origin", "null"),
        ("Origin", ""),
        ("Origin", "http://localhost:8080"),
        ("origin", "x"),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "same-site"),
        ("sec-fetch-site", "CROSS-SITE"),
        ("Sec-Fetch-Site", ""),
        ("Sec-Fetch-Site", "new-value"),
        ("Access-Control-Request-Method", "GET"),
        ("Access-Control-Request-Private-Network", "true"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_request_that_a_web_page_caused_is_refused_whatever_its_method(method: str, field: tuple[str, str]) -> None:
    with pytest.raises(BrowserRefused):
        let_in(ORDERS, field, method=method)


def test_a_second_sec_fetch_site_does_not_hide_behind_a_good_one() -> None:
    with pytest.raises(BrowserRefused):
        let_in(ORDERS, ("Sec-Fetch-Site", "none"), ("Sec-Fetch-Site", "cross-site"))


@pytest.mark.parametrize(
    "field",
    [
        ("Sec-Fetch-Site", "none"),
        ("Sec-Fetch-Site", "same-origin"),
        ("User-Agent", "Mozilla/5.0"),
        ("Accept-Language", "de"),
        ("Referer", "https://docs.test/"),
        ("Sec-Fetch-Mode", "cors"),
    ],
)
def test_what_programs_send_too_is_no_sign_of_a_web_page(field: tuple[str, str]) -> None:
    assert let_in(ORDERS, field).target == ORDERS


# Methods and framing.


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
def test_the_methods_of_the_api_are_admitted(method: str) -> None:
    assert let_in(method=method).target == ORDERS
    assert len(METHODS) == 6


@pytest.mark.parametrize(
    "method", ["OPTIONS", "TRACE", "CONNECT", "get", "Post", "", "GETS", "PROPFIND", "GET ", "X" * 9999, "ä", "G\r\nT"]
)
def test_any_other_method_is_refused_and_named_shortly(method: str) -> None:
    with pytest.raises(MethodRefused) as caught:
        let_in(method=method)
    assert caught.value.headers()["Allow"] == "GET, HEAD, POST, PUT, PATCH, DELETE"
    assert len(caught.value.message) < 60
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("coding", ["chunked", "Chunked", "CHUNKED", " chunked", "chunked\t"])
def test_chunked_is_the_one_transfer_coding(coding: str) -> None:
    assert let_in(ORDERS, ("Transfer-Encoding", coding), method="POST").target == ORDERS
    with pytest.raises(MalformedRequest, match="both"):
        let_in(ORDERS, ("Transfer-Encoding", coding), ("Content-Length", "0"), method="POST")


@pytest.mark.parametrize(
    "codings",
    [
        ("",),
        ("identity",),
        ("gzip",),
        ("gzip, chunked",),
        ("chunked, gzip",),
        ("chunked, chunked",),
        ("chunked", "chunked"),
        ("identity", "chunked"),
        ("chunked", ""),
        ("xchunked",),
        ("chunked;q=1",),
        ("chunked,",),
        (",chunked",),
        ("chunked\x0b",),
        ("chunked\x00",),
        ('"chunked"',),
        ("chun ked",),
        ("ｃhunked",),
        ("\u00a0chunked",),
        ("chun\u212aed",),  # the Kelvin sign, which lower() makes a k
    ],
)
def test_framing_that_two_readers_could_read_differently_is_refused(codings: tuple[str, ...]) -> None:
    with pytest.raises(MalformedRequest):
        let_in(ORDERS, *(("Transfer-Encoding", coding) for coding in codings), method="POST")


def test_a_content_length_alone_is_fine() -> None:
    assert let_in(ORDERS, ("Content-Length", "12"), method="POST").target == ORDERS


# Targets.


@pytest.mark.parametrize(
    "target",
    ["/", "/orders/v0/orders", "/a//b", "/a/", "/a/...", "/a/..b", "/a/b..", "/a/.b", "/.well-known/x", "/a/%2E%2E%2E",
     "/a/..%2e", "/a;b/c", "/a/;..", "/%20%00%ff%FF", "/%7E%41%2b+", "/a%2Fb", "/%zz%", "/a?b=..", "/a?b=/../c",
     "/a?//x", "/a?x=1&y=%2F&z=a%20b", "/a?", "/?", "/a??b", "/~!$&'()*+,;=:@-._", "/{orderId}", '/a"b<c>^`|',
     "/@acme/eu/orders", "/http://evil.test/x", "/a:b", "/" + "a" * 20_000],
)  # fmt: skip
def test_a_path_with_its_query_goes_on_as_it_was_written(target: str) -> None:
    assert let_in(target).target == target
    if not target.startswith("/@"):
        assert let_in(f"https://{EU}{target}").target == target


@pytest.mark.parametrize(
    ("target", "expected"), [(f"https://{EU}", "/"), (f"https://{EU}?a=b", "/?a=b"), (f"https://{EU}/", "/")]
)
def test_an_absolute_target_without_a_path_means_the_root(target: str, expected: str) -> None:
    assert let_in(target).target == expected


DOTS = [".", "..", "%2e", "%2E", "%2e%2e", "%2E%2e", ".%2e", "%2e.", ".%2E"]
PLACES = [
    "/{}",
    "/{}/",
    "/a/{}",
    "/a/{}/b",
    "/a/{}?x=1",
    "/{}/a",
    "/a//{}/b",
    "/a/{};x",
    "/a/{};x/b",
    "/a/{};/b",
    "/a/b/{};x=1;y/c?z",
    "/a%2F{}",
    "/a/b%2f{}%5Cc",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dots", DOTS)
def test_a_dot_segment_is_refused_in_every_spelling(dots: str, place: str) -> None:
    for target in (place.format(dots), f"https://{EU}{place.format(dots)}"):
        with pytest.raises(BadTarget, match="dot segment"):
            let_in(target)


@pytest.mark.parametrize("target", ["//", "//evil.test", "//evil.test/x", "///x", "//?x", f"https://{EU}//evil.test"])
def test_a_target_that_begins_with_two_slashes_is_refused(target: str) -> None:
    with pytest.raises(BadTarget, match="begins with //"):
        let_in(target)


@pytest.mark.parametrize(
    "character",
    ["\\", "#", " ", "\t", "\r", "\n", "\x00", "\x0b", "\x7f", "\x85", "\xa0", "ä", "店", "\udcff", "\u2028"],
)
def test_a_character_that_never_stands_raw_in_a_target_is_refused(character: str) -> None:
    for target in (f"/a{character}b", f"/a?b={character}", f"/{character}", f"/a{character}"):
        with pytest.raises(BadTarget, match="holds a space, control character"):
            let_in(target)


@pytest.mark.parametrize(
    "target",
    ["", "*", "orders", "?x=1", "evil.test:443", "localhost", "ftp://localhost/x", "https:/x", "https:x", "http//x",
     "javascript:x", "ws://localhost/", " /orders", "file:///etc/passwd"],
)  # fmt: skip
def test_a_target_of_another_form_is_refused(target: str) -> None:
    with pytest.raises(BadTarget):
        let_in(target)


ORIGIN_FORM = st.text(
    st.sampled_from(string.ascii_letters + string.digits + "/%.?&=;,:@!$'()*+-_~{}[]|^`\"<>"), max_size=60
).map(lambda text: f"/{text}")


@given(ORIGIN_FORM, st.sampled_from(sorted(METHODS)))
@example("/%2e%2E%2e", "GET")
@example("/a/..;b", "GET")
def test_an_admitted_target_comes_out_byte_for_byte(target: str, method: str) -> None:
    try:
        validated = let_in(target, method=method)
    except BadTarget:
        return
    assert validated.target == target


@given(ORIGIN_FORM)
def test_what_is_admitted_has_no_dot_segment_however_it_is_read_and_what_is_refused_has_a_reason(target: str) -> None:
    path = target.partition("?")[0]
    decoded = re.sub("%2e", ".", path, flags=re.IGNORECASE)
    has_dots = any(segment.partition(";")[0] in {".", ".."} for segment in decoded.split("/"))
    is_fit = not has_dots and not path.startswith("//")
    try:
        let_in(target)
    except BadTarget:
        assert not is_fit
    else:
        assert is_fit


@given(st.text(min_size=1), st.text(), st.text())
def test_nothing_whatever_raises_anything_but_an_error_of_ours(target: str, host: str, method: str) -> None:
    for written, name, verb in (
        (target, host, method),
        (f"/{target}", "localhost", "GET"),
        (f"http://{target}", "localhost", "GET"),
        (ORDERS, host, "GET"),
    ):
        try:
            validated = let_in(written, host=name, method=verb)
        except ProxyError:
            continue
        assert validated.target.startswith("/")
        assert validated.target.isascii()
        assert validated.host in ALLOWED_HOSTS.hosts | set(AMAZON)


def test_a_browser_is_refused_before_anything_else_is_said() -> None:
    with pytest.raises(BrowserRefused):
        let_in("//x", ("Origin", "x"), ("Transfer-Encoding", "x"), method="TRACE", host="evil.test")


def test_the_allowed_hosts_of_a_config_file_are_made_of_its_listener_and_allowed_hosts(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "listen": "localhost:0",
        "allowed_hosts": ["Proxy.Test"],
        "applications": {"main": {"client_id": "c", "client_secret": "s"}},
        "accounts": {"acme": {"refresh_tokens": {"eu": "t"}}},
    }
    config = config_from(settings, tmp_path)
    assert AllowedHosts.from_config(config.listen[0], config).hosts == {"localhost", "127.0.0.1", "::1", "proxy.test"}
