"""Values of flags: lists, mappings and texts."""

from pathlib import Path

import pytest

from proxy.config import (
    ConfigError,
    load_config,
)
from tests.config.loading import BASE


@pytest.mark.parametrize(
    ("key", "value", "shown", "expected"),
    [
        ("allowed_hosts", "[a.test, b.test]", "allowed_hosts[1]", "b.test"),
        ("allowed_hosts", "a.test,b.test", "allowed_hosts[1]", "b.test"),
        ("marketplaces", "{A1: eu, A2: na}", "marketplaces.A2", "na"),
        ("marketplaces.A1", "eu", "marketplaces.A1", "eu"),
        ("limits", "{max_wait: 3s, pace: false}", "limits.pace", "false"),
        ("pool.max_connections", "7", "pool.max_connections", "7"),
        ("tracing.sample", "0.5", "tracing.sample", "0.5"),
        ("default_account", "acme", "default_account", "acme"),
        ("listen", "[127.0.0.1:1, {address: '127.0.0.1:2', region: eu}]", "listen[1].region", "eu"),
        ("listen", "{address: '127.0.0.1:2', region: eu}", "listen[0].region", "eu"),
        ("listen", "[::1]:8080", "listen[0].address", "[::1]:8080"),
        ("listen[0].region", "eu", "listen[0].region", "eu"),
        ("listen[1]", "127.0.0.1:2", "listen[1].address", "127.0.0.1:2"),
        ("listen[1].address", "127.0.0.1:2", "listen[1].address", "127.0.0.1:2"),
        ("listen[0].operations", "[READ *, feeds.*]", "listen[0].operations[1]", "feeds.*"),
        ("callers.job", "{key: k, accounts: [acme]}", "callers.job.accounts[0]", "acme"),
        ("accounts.acme.data_elements", "[buyerInfo]", "accounts.acme.data_elements[0]", "buyerInfo"),
        ("accounts.a.b.environment", "sandbox", "accounts.a.b.environment", "sandbox"),
    ],
)
def test_set_takes_lists_mappings_numbers_and_texts(
    tmp_path: Path, key: str, value: str, shown: str, expected: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BASE.replace("accounts: {", "accounts: {a.b: {refresh_tokens: {eu: t}}, "))
    loaded = load_config(str(path), {}, [(key, value, "--set")])
    rows = {name: (text, origin) for name, text, origin in loaded.rows()}
    assert rows[shown] == (expected, "--set")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("limits.max_wait", "soon", "--set: limits.max_wait: must be a duration such as 500ms, 10s, 2m or 1h"),
        ("limtis.max_wait", "1s", "--set: limtis: is not a setting; did you mean limits?"),
        (
            "listen[7].account",
            "acme",
            "--set: listen[7]: cannot be set: the last one is listen[0], the next one is listen[1]",
        ),
        (
            "listen.account",
            "acme",
            "--set: listen.account: cannot be set: it is a list, so name the item, such as listen[0]",
        ),
        ("listen[x].account", "acme", "--set: listen[x]: is not a setting; did you mean listen?"),
        ("callers.x.accounts", "acme", "--set: callers.x: needs a key, a certificate or a uid"),
        ("applications.other.client_id", "x", "--set: applications.other.client_secret: is missing"),
        ("marketplaces", "{A1: eu, A1: na}", "--set: marketplaces.A1: is given twice"),
    ],
)
def test_a_mistake_of_a_flag_is_blamed_on_the_flag(tmp_path: Path, key: str, value: str, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BASE)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), {}, [(key, value, "--set")])
    assert any(str(problem).startswith(expected) for problem in caught.value.problems)
