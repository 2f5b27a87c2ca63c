"""Precedence and origins of settings, environment references, and all problems at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy.config import (
    ConfigError,
    KeyPath,
    Problem,
    Secret,
    load_config,
)
from tests.config.loading import BASE, load, origins, problems, value_at


@pytest.mark.parametrize(
    ("path", "flag", "variable", "in_file", "default"),
    [
        (("listen", 0, "address"), ["127.0.0.1:1"], "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:8080"),
        (("admin",), "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:9090"),
        (("environment",), "sandbox", "production", "sandbox", "production"),
        (("log", "level"), "debug", "warning", "error", "info"),
        (("log", "format"), "text", "json", "text", "auto"),
        (("limits", "max_wait"), "1s", "2s", "3s", "10s"),
        (("limits", "pace"), "false", "true", "false", True),
        (("timeouts", "body_idle"), "1s", "2s", "3s", "30s"),
        (("pool", "max_connections"), "1", "2", "3", 1000),
        (("warm_up",), "true", "false", "true", False),
        (("metrics", "account_on_histograms"), "true", "false", "true", False),
        (("endpoints", "lwa"), "https://one.test", "https://two.test", "https://three.test", None),
    ],
)
def test_a_flag_overrides_the_environment_which_overrides_the_file_which_overrides_the_default(
    tmp_path: Path, path: KeyPath, flag: Any, variable: str, in_file: str, default: Any
) -> None:
    names = [str(part) for part in path if part not in (0, "address")]
    text = BASE + (f'{names[0]}: {{{names[1]}: "{in_file}"}}\n' if names[1:] else f'{names[0]}: "{in_file}"\n')
    environ = {f"SP_API_PROXY_{'_'.join(names).upper()}": variable}
    flags: dict[KeyPath, Any] = {tuple(names): flag}

    def seen(text: str, environ: Mapping[str, str], flags: Mapping[KeyPath, Any]) -> tuple[str, str]:
        loaded = load(tmp_path, text, environ, flags)
        key = next(key for key in origins(loaded, tmp_path) if key.replace("[0].address", "") == ".".join(names))
        return str(value_at(loaded.config, path)).lower(), origins(loaded, tmp_path)[key]

    flag_value = flag[0] if isinstance(flag, list) else flag
    assert seen(text, environ, flags) == (flag_value, "--set")
    assert seen(text, {}, flags) == (flag_value, "--set")
    assert seen(text, environ, {}) == (variable, f"environment variable {next(iter(environ))}")
    assert seen(text, {}, {}) == (in_file, "config.yaml:3")
    if default is not None:
        assert seen(BASE, {}, {}) == (str(default).lower(), "default")


def test_every_value_shows_where_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("Atzr|na\n")
    text = """\
applications:
  main:
    client_id: ${CLIENT}
    client_secret: hush
accounts:
  acme:
    refresh_tokens:
      na: {file: token}
      eu: plain
    data_elements: [buyerInfo]
limits:
  max_wait: 3s
"""
    environ = {"CLIENT": "client", "SP_API_PROXY_LIMITS_PACE": "false", "SP_API_PROXY_ALLOWED_HOSTS": "a.test,b.test"}
    seen = origins(load(tmp_path, text, environ, {("log", "level"): "debug"}), tmp_path)
    expected = {
        "applications.main.client_id": "config.yaml:3, from environment variable CLIENT",
        "applications.main.client_secret": "config.yaml:4",
        "accounts.acme.refresh_tokens.na": "config.yaml:8, from file token",
        "accounts.acme.refresh_tokens.eu": "config.yaml:9",
        "accounts.acme.data_elements[0]": "config.yaml:10",
        "limits.max_wait": "config.yaml:12",
        "limits.pace": "environment variable SP_API_PROXY_LIMITS_PACE",
        "allowed_hosts[1]": "environment variable SP_API_PROXY_ALLOWED_HOSTS",
        "log.level": "--set",
        "log.format": "default",
        "listen[0].address": "default",
    }
    assert {key: seen[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("SP_API_PROXY_LIMITS", "{max_wait: 5s}", "limits.max_wait"),
        ("SP_API_PROXY_LISTEN", "[{address: 127.0.0.1:1, account: acme}]", "listen[0].account"),
        ("SP_API_PROXY_ACCOUNTS", '{"acme": {"refresh_tokens": {"na": "t"}}}', "accounts.acme.refresh_tokens.na"),
    ],
)
def test_what_lies_within_a_value_from_the_environment_comes_from_the_environment_too(
    tmp_path: Path, variable: str, value: str, key: str
) -> None:
    seen = origins(load(tmp_path, BASE, {variable: value}), tmp_path)
    assert seen[key] == f"environment variable {variable}"


def test_a_wrong_value_of_a_variable_is_blamed_on_the_variable(tmp_path: Path) -> None:
    text = BASE + "limits: {max_wait: '${WAIT}'}\n"
    wait, pace = problems(tmp_path, text, {"WAIT": "soon", "SP_API_PROXY_LIMITS_PACE": "perhaps"})
    assert wait.startswith("config.yaml:3, from environment variable WAIT: limits.max_wait: must be a duration")
    assert pace == "environment variable SP_API_PROXY_LIMITS_PACE: limits.pace: must be true or false"


def test_what_is_found_later_has_its_place_too(tmp_path: Path) -> None:
    loaded = load(tmp_path, f"{BASE}listen:\n  - address: 127.0.0.1:1\n    operations: [a, b]\n")
    found = [Problem("listen[0].operations[1]", "x"), Problem("listen[0].tls", "y"), Problem("store", "z")]
    places = [str(problem).replace(f"{tmp_path}/", "") for problem in loaded.with_locations(found)]
    assert places == [
        "config.yaml:5: listen[0].operations[1]: x", "config.yaml:4: listen[0].tls: y", "store: z"
    ]  # fmt: skip


def test_a_file_may_be_left_out_altogether() -> None:
    environ = {"LWA_APP_ID": "a", "LWA_CLIENT_SECRET": "s", "SP_API_REFRESH_TOKEN_EU": "t"}
    loaded = load_config(None, environ)
    assert loaded.config.accounts["default"].refresh_tokens == {"eu": Secret("t")}


@pytest.mark.parametrize(
    ("written", "environ", "expected"),
    [
        ("${A}", {"A": "value"}, "value"),
        ("${A}-${B}", {"A": "one", "B": "two"}, "one-two"),
        ("${A}${A}", {"A": "x"}, "xx"),
        ("pa$$word", {}, "pa$word"),
        ("$${A}", {"A": "x"}, "${A}"),
        ("$A", {"A": "x"}, "$A"),
        ("cost$", {}, "cost$"),
        ("${A}", {"A": "${B}", "B": "x"}, "${B}"),
        ("${A}", {"A": "a: [b"}, "a: [b"),
        ("${A}", {"A": "{file: x}"}, "{file: x}"),
        ("${A}", {"A": "null"}, "null"),
    ],
)
def test_a_dollar_and_braces_stand_for_an_environment_variable(
    tmp_path: Path, written: str, environ: dict[str, str], expected: str
) -> None:
    loaded = load(tmp_path, BASE.replace("client_id: client", f'client_id: "{written}"'), environ)
    assert loaded.config.applications["main"].client_id == expected


@pytest.mark.parametrize(
    ("written", "environ", "message"),
    [
        ("${A}", {}, "environment variable A is not set"),
        ("${A}", {"A": ""}, "environment variable A is empty"),
        ("x-${A}-y", {"B": "1"}, "environment variable A is not set"),
        ("${}", {}, "environment variable (no name) is not set"),
    ],
)
def test_a_variable_that_is_not_there_is_named_with_key_and_line(
    tmp_path: Path, written: str, environ: dict[str, str], message: str
) -> None:
    text = BASE.replace("token-eu", f'"{written}"')
    assert problems(tmp_path, text, environ) == [f"config.yaml:2: accounts.acme.refresh_tokens.eu: {message}"]


def test_each_missing_variable_of_one_value_is_named(tmp_path: Path) -> None:
    found = problems(tmp_path, BASE.replace("token-eu", '"${A}${B}"'))
    assert [line.rpartition(": ")[2] for line in found] == [
        "environment variable A is not set",
        "environment variable B is not set",
    ]


def test_a_variable_works_for_numbers_switches_and_list_items_too(tmp_path: Path) -> None:
    text = (
        BASE + 'pool: {max_connections: "${N}"}\nwarm_up: ${YES}\nallowed_hosts: ["${HOST}"]\nlisten: ["${LISTEN}"]\n'
    )
    environ = {"N": "7", "YES": "true", "HOST": "Proxy.Test", "LISTEN": "127.0.0.1:1"}
    config = load(tmp_path, text, environ).config
    assert (config.pool.max_connections, config.warm_up, config.allowed_hosts) == (7, True, ("proxy.test",))
    assert str(config.listen[0].address) == "127.0.0.1:1"


def test_all_problems_are_reported_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = """\
listen: 0.0.0.0:8080
admin: nowhere
applications:
  main:
    client_id: ${MISSING}
    user_agent: {name: "", versoin: 1}
accounts:
  acme:
    application: other
    refresh_tokens:
      uk: t
      eu: {file: missing}
    data_elements: [buyerinfo]
default_account: zeta
limits:
  max_wait: soon
  pace: maybe
"""
    found = problems(tmp_path, text)
    keys = [line.split(": ")[:2] for line in found]
    assert keys == [
        ["config.yaml:1", "listen[0].address"],
        ["config.yaml:2", "admin"],
        ["config.yaml:4", "applications.main.client_secret"],
        ["config.yaml:5", "applications.main.client_id"],
        ["config.yaml:6", "applications.main.user_agent.name"],
        ["config.yaml:6", "applications.main.user_agent.versoin"],
        ["config.yaml:9", "accounts.acme.application"],
        ["config.yaml:11", "accounts.acme.refresh_tokens.uk"],
        ["config.yaml:12", "accounts.acme.refresh_tokens.eu"],
        ["config.yaml:13", "accounts.acme.data_elements[0]"],
        ["config.yaml:14", "default_account"],
        ["config.yaml:16", "limits.max_wait"],
        ["config.yaml:17", "limits.pace"],
    ]


def test_a_file_that_cannot_be_read_is_one_problem(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load_config(str(path), {})
        assert [str(problem) for problem in caught.value.problems] == [f"{path}: cannot be read: {reason}"]
