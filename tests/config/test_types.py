"""The types of single settings: durations, addresses, URLs, host names, names."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.config import (
    is_loopback,
    parse_duration,
)
from proxy.config.types import check_endpoint, parse_address, show_duration
from tests.config.loading import BASE, load, problems


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("10s", 10.0),
        ("2m", 120.0),
        ("1h", 3600.0),
        ("1d", 86400.0),
        ("1.5s", 1.5),
        ("7", 7.0),
        (7, 7.0),
        (0.25, 0.25),
        ("0", 0.0),
        (" 3s ", 3.0),
        ("366d", 366 * 86400.0),
    ],
)
def test_a_duration_is_a_number_with_a_unit(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["-1s", "-0", "+1s", "1 s", "1S", "1min", "s", "", " ", "1e3", "NaN", "nan", "inf", "Infinity", "٣s", "１０s",
     "1,5s", ".5s", "5.s", "1_000", "0x10", "1s1s", "1s\n2s", "367d", "9" * 400, "9" * 5000, True, None, [], {},
     float("nan"), float("inf"), -1, b"1s"],
)  # fmt: skip
def test_anything_else_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_duration(text)


@given(st.integers(0, 366 * 86400 * 1000))
@example(1_234_567_000)
def test_a_duration_is_shown_as_one_that_means_the_same(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(show_duration(seconds)) == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize("text", ["0", "0s", "0ms", "0.0h"])
def test_a_timeout_is_longer_than_nothing_and_a_wait_need_not_be(tmp_path: Path, text: str) -> None:
    found = problems(tmp_path, f"{BASE}timeouts: {{connect: {text}}}\n")
    assert found == ["config.yaml:3: timeouts.connect: must be longer than 0s"]
    assert load(tmp_path, f"{BASE}limits: {{max_wait: {text}}}\n").config.limits.max_wait == 0


@pytest.mark.parametrize("text", ["0.01ms", "0.05ms", "0.1ms", "0.5ms"])
def test_a_very_short_timeout_is_a_timeout(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, f"{BASE}timeouts: {{connect: {text}}}\n").config
    assert 0 < config.timeouts.connect <= 0.0005


@pytest.mark.parametrize(
    ("text", "shown", "is_local"),
    [
        ("127.0.0.1:8080", "127.0.0.1:8080", True),
        ("127.8.9.10:1", "127.8.9.10:1", True),
        ("localhost:8080", "localhost:8080", True),
        ("[::1]:8080", "[::1]:8080", True),
        ("127.0.0.1:0", "127.0.0.1:0", True),
        ("127.0.0.1:65535", "127.0.0.1:65535", True),
        ("unix:/run/x.sock", "unix:/run/x.sock", True),
        ("0.0.0.0:8080", "0.0.0.0:8080", False),
        ("[::]:8080", "[::]:8080", False),
        ("10.1.2.3:80", "10.1.2.3:80", False),
        ("proxy.test:80", "proxy.test:80", False),
        ("127.0.0.1.evil.test:80", "127.0.0.1.evil.test:80", False),
        ("localhost.evil.test:80", "localhost.evil.test:80", False),
    ],
)
def test_an_address_is_a_host_with_a_port_or_a_unix_socket(text: str, shown: str, is_local: bool) -> None:
    address = parse_address(text)
    assert (str(address), address.is_local) == (shown, is_local)


@pytest.mark.parametrize(
    "text",
    ["", "8080", ":8080", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:-1", "127.0.0.1:65536", "a:8080 ",
     "127.0.0.1:٣", "unix:", "unix:run/x.sock", "unix:x", "a:" + "9" * 5000, None, 8080, [], {}],
)  # fmt: skip
def test_anything_else_is_no_address(text: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_address(text)


@pytest.mark.parametrize("text", ["http://127.0.0.1:8080", "127.0.0.1:8080/x", "[::1:8080", "a b:80"])
def test_an_address_that_nothing_can_listen_on_is_a_problem_before_the_start(tmp_path: Path, text: str) -> None:
    assert any(
        "listen" in line
        for line in problems(tmp_path, f'{BASE}listen: [{{address: "{text}", insecure_network: true}}]\n')
    )


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("128.0.0.1", False), ("example.test", False), ("", False), ("127.1", False), ("2130706433", False)],
)  # fmt: skip
def test_loopback_is_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("https://sellingpartnerapi-na.amazon.com", "https://sellingpartnerapi-na.amazon.com"),
        ("https://sellingpartnerapi-na.amazon.com/", "https://sellingpartnerapi-na.amazon.com"),
        ("https://gateway.test:8443", "https://gateway.test:8443"),
        ("http://127.0.0.1:1234", "http://127.0.0.1:1234"),
        ("http://localhost:1234/", "http://localhost:1234"),
        ("http://[::1]:1234", "http://[::1]:1234"),
    ],
)
def test_an_endpoint_is_https_or_on_this_machine(tmp_path: Path, written: str, kept: str) -> None:
    config = load(tmp_path, f'{BASE}endpoints: {{na: "{written}", lwa: "{written}"}}\n').config
    assert (config.endpoints.na, config.endpoints.lwa) == (kept, kept)


def test_only_the_token_address_has_a_path(tmp_path: Path) -> None:
    url = "https://gateway.test/auth/token"
    assert load(tmp_path, f"{BASE}endpoints: {{lwa: '{url}'}}\n").config.endpoints.lwa == url
    assert problems(tmp_path, f"{BASE}endpoints: {{eu: '{url}'}}\n") == [
        "config.yaml:3: endpoints.eu: must have no path: the path of the request is appended"
    ]


@pytest.mark.parametrize(
    "url",
    ["http://example.test", "http://0.0.0.0:1", "http://localhost.evil.test", "http://127.0.0.1.evil.test",
     "http://127.0.0.1@evil.test", "https://user@example.test", "https://user:pw@example.test", "https://@example.test",
     "ftp://example.test", "example.test", "//example.test", "https://", "https:///x", "https://example.test:0",
     "https://example.test:99999", "https://example.test:x", "https://example.test?x=1", "https://example.test#x",
     "https://[::1", "", "x", "null", "https://example.test?", "https://example.test#", "https://exa mple.test",
     "https://example.test/?", "https://exam\tple.test", "https://exam\nple.test", " https://example.test"],
)  # fmt: skip
def test_anything_else_is_no_endpoint(url: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        check_endpoint(url)


@pytest.mark.parametrize(
    ("name", "kept"),
    [("Proxy.Internal", "proxy.internal"), ("10.0.0.5", "10.0.0.5"), ("[fd00::1]", "fd00::1"), ("fd00::1", "fd00::1")],
)
def test_an_allowed_host_is_a_bare_name_or_address(tmp_path: Path, name: str, kept: str) -> None:
    assert load(tmp_path, f"{BASE}allowed_hosts: ['{name}']\n").config.allowed_hosts == (kept,)


@pytest.mark.parametrize(
    "name",
    ["*", "*.test", "http://a.test", "a.test:80", "a_b", "", "a b", "a/b", "a.test,b.test", "user@a", "ä.test",
     "[::1]:80", "10.0.0.5:8080", "cafe:80"],
)  # fmt: skip
def test_anything_else_is_no_allowed_host(tmp_path: Path, name: str) -> None:
    (found,) = problems(tmp_path, f"{BASE}allowed_hosts: ['{name}']\n")
    assert found == (
        "config.yaml:3: allowed_hosts[0]: must be a bare host name or address, without a port, scheme or wildcard"
    )


@pytest.mark.parametrize("name", ["a", "acme", "my-shop", "my_shop", "A.1", "0", "x" * 64])
def test_an_account_has_a_short_plain_name(tmp_path: Path, name: str) -> None:
    assert name in load(tmp_path, BASE.replace("acme", f"'{name}'")).config.accounts


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ä", "a\\n", "x" * 65, "a;b", "a@b"])
def test_another_name_is_refused(tmp_path: Path, name: str) -> None:
    assert any("is not allowed as a name" in line for line in problems(tmp_path, BASE.replace("acme", f'"{name}"')))
