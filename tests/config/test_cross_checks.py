"""Problems that concern several settings."""

import re
from pathlib import Path
from typing import Any

import pytest

from proxy.config import (
    KeyPath,
)
from proxy.config.cross_checks import how_to_install
from tests.config.loading import ACCOUNTS, APPLICATIONS, BASE, load, problems


def test_what_is_missing_for_traces_is_installed_from_where_the_proxy_runs(tmp_path: Path) -> None:
    assert how_to_install(tmp_path) == "pip install 'sp-api-proxy[otel]'"
    (tmp_path / "pyproject.toml").touch()
    assert how_to_install(tmp_path).startswith(f"python -m pip install '.[otel]' in {tmp_path}")


def test_what_there_is_of_many_is_bounded(tmp_path: Path) -> None:
    text = (
        APPLICATIONS + "accounts: {" + ", ".join(f"shop{n}: {{}}" for n in range(3000)) + "}\ndefault_account: shp77\n"
    )
    (found,) = problems(tmp_path, text)
    assert "is not a configured account; did you mean shop77? known: shop0, shop1, " in found
    assert found.endswith("shop9 and 2990 more")


def test_nothing_at_all_says_what_is_needed_and_how_to_give_it(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "---\n", "~\n"):
        found = problems(tmp_path, text)
        assert len(found) == 2
        assert "accounts: is missing" in found[0]
        assert "SP_API_REFRESH_TOKEN" in found[0]
        assert "applications: is missing" in found[1]
        assert "LWA_APP_ID" in found[1]


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:8080", "'[::]:8080'", "10.0.0.1:80", "proxy.test:80", "{address: '0.0.0.0:80'}",
     "{address: '0.0.0.0:80', insecure_network: false}", "[127.0.0.1:1, '0.0.0.0:2']"],
)  # fmt: skip
def test_an_open_listener_is_refused_unless_it_is_meant(tmp_path: Path, listen: str) -> None:
    (found,) = problems(tmp_path, f"{BASE}listen: {listen}\n")
    assert re.match(r"config\.yaml:3: listen\[[01]\]\.address: can be reached by other machines", found)


@pytest.mark.parametrize("meant", ["true", "yes", "on", "'1'"])
def test_an_open_listener_that_is_meant_is_taken(tmp_path: Path, meant: str) -> None:
    config = load(tmp_path, f"{BASE}listen: {{address: '0.0.0.0:80', insecure_network: {meant}}}\n").config
    assert config.listen[0].insecure_network


@pytest.mark.parametrize("source", ["environment", "flag"])
def test_an_open_listener_is_refused_wherever_it_was_said(tmp_path: Path, source: str) -> None:
    environ = {"SP_API_PROXY_LISTEN": "127.0.0.1:1,0.0.0.0:2"} if source == "environment" else {}
    flags: dict[KeyPath, Any] = {("listen",): ["127.0.0.1:1", "0.0.0.0:2"]} if source == "flag" else {}
    (found,) = problems(tmp_path, BASE, environ, flags)
    assert "listen[1].address: can be reached by other machines" in found


@pytest.mark.parametrize("address", ["0.0.0.0:9090", "'[::]:9090'", "10.0.0.1:9090"])
def test_an_open_admin_address_is_refused_and_an_open_health_address_is_not(tmp_path: Path, address: str) -> None:
    (found,) = problems(tmp_path, f"{BASE}admin: {address}\n")
    assert found.startswith("config.yaml:3: admin: must be a loopback address; open `health` instead")
    assert load(tmp_path, f"{BASE}health: {address}\n").config.health is not None


NO_APPLICATION = "give a client_id and client_secret, or set LWA_APP_ID and LWA_CLIENT_SECRET"
SEVERAL = "applications: {a: {client_id: a, client_secret: a}, b: {client_id: b, client_secret: b}}\n"


def test_with_several_applications_an_account_says_which(tmp_path: Path) -> None:
    assert problems(tmp_path, SEVERAL + ACCOUNTS) == [
        "config.yaml:2: accounts.acme.application: is missing: choose one of a, b"
    ]
    config = load(tmp_path, SEVERAL + ACCOUNTS.replace("{refresh", "{application: b, refresh")).config
    assert config.application_of(config.accounts["acme"]) == ("b", config.applications["b"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE + "default_account: zeta\n", "config.yaml:3: default_account: is not a configured account; known: acme"),
        (
            BASE + "listen: [{address: '127.0.0.1:1', account: zeta}]\n",
            "config.yaml:3: listen[0].account: is not a configured account; known: acme",
        ),
        (
            APPLICATIONS + ACCOUNTS.replace("{refresh", "{application: x, refresh"),
            "config.yaml:2: accounts.acme.application: is not a configured application; known: main",
        ),
        (
            APPLICATIONS,
            "config.yaml: accounts: is missing: give an account with its refresh_tokens, or set SP_API_REFRESH_TOKEN",
        ),
        (
            ACCOUNTS,
            f"config.yaml: applications: is missing: {NO_APPLICATION}",
        ),
    ],
)
def test_a_name_that_stands_for_nothing_is_a_problem(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [expected]


OPEN = "{address: '0.0.0.0:80'"
SAME = "is the same as in callers.a: the two cannot be told apart"
NO_MODE = "must be three octal digits, such as 0600 or 0660"
NO_PATTERN = "must be a method and a name such as GET *, READ *, reports.* or POST feeds.2021-06-30.createFeed"
KEY = "callers: {job: {key: some-key-of-a-caller}}\n"


@pytest.mark.parametrize(
    ("listener", "callers", "is_fine"),
    [
        (f"{OPEN}}}", "", False),
        (f"{OPEN}}}", KEY, True),
        (f"{OPEN}, anonymous: true}}", KEY, False),
        (f"{OPEN}, anonymous: yes}}", KEY, False),
        (f"{OPEN}, tls: {{certificate: c, key: k}}}}", "", False),
        (f"{OPEN}, tls: {{certificate: c, key: k, client_ca: a}}}}", "", True),
        (f"{OPEN}, tls: {{certificate: c, key: k, client_ca: a}}, anonymous: true}}", KEY, True),
        (f"{OPEN}, tls: {{certificate: c, key: k, client_ca: a}}}}", "callers: {a: {certificate: a}}\n", True),
        ("['unix:/run/x', '0.0.0.0:80']", "callers: {a: {uid: 1}}\n", False),
        (f"{OPEN}, require_header: true}}", "", False),
        (f"{OPEN}, operations: ['GET *']}}", "", False),
    ],
)
def test_an_open_listener_needs_keys_or_client_certificates(
    tmp_path: Path, listener: str, callers: str, is_fine: bool
) -> None:
    text = f"{BASE}listen: {listener}\n{callers}"
    if is_fine:
        load(tmp_path, text)
    else:
        assert any("can be reached by other machines" in line for line in problems(tmp_path, text))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("callers: {a: {}}", "callers.a: needs a key, a certificate or a uid"),
        ("callers: {a: {accounts: [acme]}}", "callers.a: needs a key, a certificate or a uid"),
        (
            "callers: {a: {key: k}, b: {key: k}}",
            "callers.b.key: is the same as in callers.a: the two cannot be told apart",
        ),
        (
            "listen: 'unix:/run/x'\ncallers: {a: {uid: 1}, b: {uid: 1}}",
            "callers.b.uid: is the same as in callers.a: the two cannot be told apart",
        ),
        ("callers: {a: {certificate: x}}", "callers.a.certificate: can never match: no listener has tls.client_ca"),
        ("callers: {a: {uid: 1}}", "callers.a.uid: can never match: no listener is a Unix socket"),
        (
            "callers: {a: {key: k, accounts: [nobody]}}",
            "callers.a.accounts[0]: is not a configured account; known: acme",
        ),
        (
            "listen: {address: 'unix:/x', accounts: [acme, x]}",
            "listen[0].accounts[1]: is not a configured account; known: acme",
        ),
        (
            "callers: {a: {key: k, operations: ['FETCH *']}}",
            f"callers.a.operations[0]: {NO_PATTERN}",
        ),
        (
            "listen: {address: 'unix:/x', mode: '0999'}",
            "listen[0].mode: must be three octal digits, such as 0600 or 0660",
        ),
        ("callers: {a: {key: ''}}", "callers.a.key: must be a text and not empty"),
    ],
)
def test_a_mistake_about_callers_is_found_at_start(tmp_path: Path, extra: str, expected: str) -> None:
    found = problems(tmp_path, f"{BASE}{extra}\n")
    assert [line.partition(": ")[2] for line in found] == [expected]
