"""One Config from flag, environment, file and default, or every problem at once, and no secret in any of them."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from proxy.config import (
    Config,
    ConfigError,
    KeyPath,
    Loaded,
    Problem,
    Secret,
    dump,
    is_loopback,
    load_config,
    parse_duration,
)
from proxy.config.cross_checks import how_to_install
from proxy.config.load import _validated
from proxy.config.merge import MergedSettings
from proxy.config.model import Settings, settings_in
from proxy.config.schema import json_schema
from proxy.config.types import check_endpoint, parse_address, show_duration
from proxy.config.values import is_list, is_mapping, kind_below
from proxy.config.yaml_reader import MAX_BYTES, format_path, read_yaml

APPLICATIONS = "applications: {main: {client_id: client, client_secret: hush}}\n"
ACCOUNTS = "accounts: {acme: {refresh_tokens: {eu: token-eu}}}\n"
BASE = APPLICATIONS + ACCOUNTS
SECRET = "Atzr-LeakedSecret-9f3b"


def load(
    folder: Path,
    text: str | bytes,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[KeyPath, Any] | None = None,
) -> Loaded:
    """Return what a real file with `text` means."""
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(
        str(path), environ or {}, [(format_path(key), value, "--set") for key, value in (flags or {}).items()]
    )


def problems(
    folder: Path,
    text: str | bytes,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[KeyPath, Any] | None = None,
) -> list[str]:
    """Return the problems of a configuration that cannot be used, each without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, environ, flags)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def origins(loaded: Loaded, folder: Path) -> dict[str, str]:
    return {key: origin.replace(f"{folder}/", "") for key, _, origin in loaded.rows()}


def value_at(config: Config, path: KeyPath) -> Any:
    value: Any = dump(config)
    for part in path:
        value = value[part]
    return value


# Precedence and origins.


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


# Flags mean by a value what the environment means.


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


def test_set_changes_one_key_of_a_listener_and_leaves_the_rest(tmp_path: Path) -> None:
    for written in ("127.0.0.1:5", "{address: '127.0.0.1:5'}", "[127.0.0.1:5]", "[{address: '127.0.0.1:5'}]"):
        loaded = load(tmp_path, f"{BASE}listen: {written}\n", {}, {("listen", 0, "account"): "acme"})
        seen = origins(loaded, tmp_path)
        assert (seen["listen[0].address"], seen["listen[0].account"]) == ("config.yaml:3", "--set")
        assert loaded.config.listen[0].address.port == 5
    listen = load(tmp_path, BASE, {}, {("listen", 0, "account"): "acme"}).config.listen
    assert [(str(one.address), one.account) for one in listen] == [("127.0.0.1:8080", "acme")]


def test_set_reads_the_file_that_a_value_names(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-file\n")
    path: KeyPath = ("applications", "main", "client_secret")
    loaded = load(tmp_path, BASE, {}, {path: f"{{file: {tmp_path}/secret}}"})
    assert loaded.config.applications["main"].client_secret.reveal() == "from-file"
    assert origins(loaded, tmp_path)[".".join(map(str, path))].startswith("--set, from file")
    assert Path(tmp_path / "secret") in loaded.files


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


def test_a_wrong_value_of_a_variable_is_blamed_on_the_variable(tmp_path: Path) -> None:
    text = BASE + "limits: {max_wait: '${WAIT}'}\n"
    wait, pace = problems(tmp_path, text, {"WAIT": "soon", "SP_API_PROXY_LIMITS_PACE": "perhaps"})
    assert wait.startswith("config.yaml:3, from environment variable WAIT: limits.max_wait: must be a duration")
    assert pace == "environment variable SP_API_PROXY_LIMITS_PACE: limits.pace: must be true or false"


def test_each_key_of_a_single_listener_has_its_place(tmp_path: Path) -> None:
    seen = origins(load(tmp_path, f"{BASE}listen:\n  address: unix:/x\n  mode: '0660'\n"), tmp_path)
    assert (seen["listen[0].address"], seen["listen[0].mode"]) == ("config.yaml:4", "config.yaml:5")
    assert seen["listen[0].anonymous"] == "default"


def test_what_is_found_later_has_its_place_too(tmp_path: Path) -> None:
    loaded = load(tmp_path, f"{BASE}listen:\n  - address: 127.0.0.1:1\n    operations: [a, b]\n")
    found = [Problem("listen[0].operations[1]", "x"), Problem("listen[0].tls", "y"), Problem("store", "z")]
    places = [str(problem).replace(f"{tmp_path}/", "") for problem in loaded.with_locations(found)]
    assert places == [
        "config.yaml:5: listen[0].operations[1]: x", "config.yaml:4: listen[0].tls: y", "store: z"
    ]  # fmt: skip


def test_where_names_of_ones_own_belong_it_is_said_so(tmp_path: Path) -> None:
    own, marketplaces = problems(tmp_path, f"{BASE}callers: job\nmarketplaces: A1\n")
    assert own == "config.yaml:3: callers: must be a mapping such as {acme: {…}}, with a name of your choice for each"
    assert marketplaces.endswith("must be a mapping such as {A1EXAMPLE: eu}, with a region for each marketplace")


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


def test_secrets_are_stars_in_the_rows(tmp_path: Path) -> None:
    rows = {key: value for key, value, _ in load(tmp_path, BASE).rows()}
    assert rows["applications.main.client_secret"] == "***"
    assert rows["accounts.acme.refresh_tokens.eu"] == "***"
    assert rows["applications.main.client_id"] == "client"


def test_a_file_may_be_left_out_altogether() -> None:
    environ = {"LWA_APP_ID": "a", "LWA_CLIENT_SECRET": "s", "SP_API_REFRESH_TOKEN_EU": "t"}
    loaded = load_config(None, environ)
    assert loaded.config.accounts["default"].refresh_tokens == {"eu": Secret("t")}


def test_the_defaults_are_those_of_the_documents(tmp_path: Path) -> None:
    shown = dump(load(tmp_path, BASE).config)
    del shown["applications"], shown["accounts"]
    assert shown == {
        "listen": [
            {
                "address": "127.0.0.1:8080",
                "mode": "0600",
                "anonymous": False,
                "require_header": False,
                "insecure_network": False,
            }
        ],
        "admin": "127.0.0.1:9090",
        "quit": False,
        "allowed_hosts": [],
        "environment": "production",
        "local_rdt": False,
        "documents": "direct",
        "sandbox_rdt": "none",
        "callers": {},
        "strict_permissions": False,
        "bounds": {
            "connections": 16384,
            "requests": 4096,
            "account_requests": 500,
            "header_size": 65536,
            "header_fields": 128,
            "body_rate": 128,
        },
        "retry": {"attempts": 3, "first_pause": "100ms", "longest_pause": "2s", "budget": 20},
        "endpoints": {"lwa": "https://api.amazon.com/auth/o2/token"},
        "marketplaces": {},
        "limits": {"max_wait": "10s", "pace": True, "max_queue": 5000},
        "timeouts": {
            "header": "10s",
            "body_idle": "30s",
            "connect": "5s",
            "upstream_idle": "1m",
            "token": "10s",
            "total": "1h",
            "keep_alive": "75s",
            "shutdown_delay": "0s",
            "shutdown": "20s",
        },
        "pool": {"max_connections": 1000, "idle": "20s", "no_proxy": []},
        "store": "memory",
        "store_key": [],
        "warm_up": False,
        "log": {"level": "info", "format": "auto"},
        "metrics": {"account_on_histograms": False},
        "tracing": {"sample": 1.0, "service_name": "sp-api-proxy"},
    }


def test_a_group_with_nothing_below_it_means_its_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + "limits:\ntimeouts: ~\n").config == load(tmp_path, BASE).config


def test_null_for_admin_and_health_means_none(tmp_path: Path) -> None:
    config = load(tmp_path, BASE + "admin: null\nhealth:\n").config
    assert (config.admin, config.health) == (None, None)
    assert load(tmp_path, BASE, {"SP_API_PROXY_ADMIN": "null"}).config.admin is None


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = load(tmp_path, BASE).config
    for group, name in ((config, "environment"), (config.limits, "pace"), (config.accounts["acme"], "application")):
        with pytest.raises(ValidationError):
            setattr(group, name, None)


# ${ENV} and {file: …}.


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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"Atzr|x", "Atzr|x"),
        (b"Atzr|x\n", "Atzr|x"),
        (b"\n  Atzr|x\r\n\r\n", "Atzr|x"),
        (b"${HOME} $$", "${HOME} $$"),
        ("tür".encode(), "tür"),
        (b"\xef\xbb\xbfAtzr|x\r\n", "Atzr|x"),  # Windows editors put a mark before UTF-8 text
    ],
)
def test_a_file_gives_its_text_without_the_white_space_around_it(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "secret").write_bytes(content)
    config = load(tmp_path, BASE.replace("token-eu", "{file: secret}")).config
    assert config.accounts["acme"].refresh_tokens["eu"].reveal() == expected


def test_a_file_is_looked_for_beside_the_configuration_and_may_be_named_by_a_variable(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "eu").write_text("beside")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "na").write_text("absolute")
    tokens = f"{{eu: {{file: 'secrets/${{NAME}}'}}, na: {{file: '{elsewhere}/na'}}}}"
    config = load(tmp_path, BASE.replace("{eu: token-eu}", tokens), {"NAME": "eu"}).config
    assert config.accounts["acme"].refresh_tokens == {"eu": Secret("beside"), "na": Secret("absolute")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"x" * 65537, "is larger than 64 KiB"),
    ],
)
def test_a_file_that_cannot_serve_is_a_problem_that_names_key_and_file(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    (found,) = problems(tmp_path, BASE.replace("token-eu", "{file: secret}"))
    assert found.startswith("config.yaml:2: accounts.acme.refresh_tokens.eu: file secret")
    assert found.endswith(message)


def test_a_folder_in_place_of_a_file_is_a_problem(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, BASE.replace("token-eu", '{file: ""}'))
    assert found.endswith("Is a directory")


def test_a_file_name_that_no_file_can_have_is_a_problem(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, BASE.replace("token-eu", '{file: "a\\0b"}'))
    assert found.startswith("config.yaml:2: accounts.acme.refresh_tokens.eu: ")


@pytest.mark.parametrize("written", ["{file: }", "{file: [a]}", "{file: a, mode: b}", "{}", "{path: a}"])
def test_another_mapping_is_no_value(tmp_path: Path, written: str) -> None:
    (tmp_path / "a").write_text("x")
    assert any(
        "accounts.acme.refresh_tokens.eu" in line for line in problems(tmp_path, BASE.replace("token-eu", written))
    )


# Problems, all at once.


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


@pytest.mark.parametrize(
    "misplaced", ["Atzr|hush", "atza|hush", "amzn1.oa2-cs.v1.hush", "'  Atzr|hush'", "'\"Atzr|hush'", "hush" * 17]
)
@pytest.mark.parametrize(
    "text",
    [
        APPLICATIONS + "accounts: {acme: {refresh_tokens: {TOKEN}}}",
        APPLICATIONS + "accounts: {acme: {refresh_tokens: {TOKEN: x, eu: }}}",
        APPLICATIONS + "accounts: {TOKEN: {refresh_tokens: {eu: x}, wrong: x}}",
        APPLICATIONS + "accounts: {TOKEN: {refresh_tokens: {eu: ''}}}",
        APPLICATIONS + "accounts: {TOKEN: {refresh_tokens: {eu: x}}, TOKEN: }",
        APPLICATIONS + "accounts: {acme: {TOKEN}}",
        APPLICATIONS + "accounts: {TOKEN: }\ndefault_account: acme",
        APPLICATIONS + "accounts: {TOKEN: }\ndefault_account: 'amzn1.oa2-cs.v1.hus'",
        APPLICATIONS + "TOKEN: x\n",
        "applications: {TOKEN: {client_id: c, client_secret: s}}\naccounts: {acme: {application: main}}",
        "applications: {TOKEN: {client_id: c, client_secret: s}, b: }\naccounts: {acme: {refresh_tokens: {eu: x}}}",
        BASE + "marketplaces: {TOKEN: x}",
        BASE + "callers: {TOKEN: {key: secret}, b: {key: secret}}",
    ],
)
def test_a_secret_where_a_name_should_be_is_not_repeated(tmp_path: Path, text: str, misplaced: str) -> None:
    found = "\n".join(problems(tmp_path, text.replace("TOKEN", misplaced)))
    assert "hus" not in found
    assert "***" in found


def test_a_secret_in_the_place_of_a_files_or_a_variables_name_is_not_repeated(tmp_path: Path) -> None:
    for written in ("{file: 'Atzr|hush'}", "'${Atzr|hush}'", "'${amzn1.oa2-cs.v1.hush}'"):
        (found,) = problems(tmp_path, BASE.replace("token-eu", written))
        assert "hush" not in found
        assert "***" in found
    found = "\n".join(problems(tmp_path, BASE, {}, {("applications", "amzn1", "oa2-cs", "v1", "hush"): "x"}))
    assert "hush" not in found
    assert "***" in found


def test_a_key_given_twice_is_reported_with_both_lines(tmp_path: Path) -> None:
    text = BASE + "log:\n  level: info\n  format: json\n  level: debug\n"
    assert problems(tmp_path, text) == ["config.yaml:6: log.level: is given twice (first on line 4)"]


def test_an_account_given_twice_is_reported_with_both_lines(tmp_path: Path) -> None:
    text = APPLICATIONS + "accounts:\n  acme: {refresh_tokens: {eu: a}}\n  acme:\n    refresh_tokens: {na: b}\n"
    assert problems(tmp_path, text) == ["config.yaml:4: accounts.acme: is given twice (first on line 3)"]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("limtis: {pace: true}", "limtis: is not a setting; did you mean limits?"),
        ("limits: {max_wiat: 1s}", "limits.max_wiat: is not a setting; did you mean max_wait?"),
        ("limits: {zzz: 1s}", "limits.zzz: is not a setting; known: max_wait, pace, max_queue"),
        ("listen: [{adress: '127.0.0.1:1'}]", "listen[0].adress: is not a setting; did you mean address?"),
        ("endpoints: {uk: 'https://a.test'}", "endpoints.uk: is not a setting; known: na, eu, fe, lwa, documents"),
        ("Limits: {pace: true}", "Limits: is not a setting; did you mean limits?"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(tmp_path: Path, extra: str, expected: str) -> None:
    assert f"config.yaml:3: {expected}" in problems(tmp_path, BASE + extra + "\n")


@pytest.mark.parametrize("extra", ["limtis:", "limtis: ~", "limtis: null"])
def test_an_unknown_key_without_a_value_is_an_error_too(tmp_path: Path, extra: str) -> None:
    assert problems(tmp_path, f"{BASE}{extra}\n") == ["config.yaml:3: limtis: is not a setting; did you mean limits?"]


def test_nothing_at_all_says_what_is_needed_and_how_to_give_it(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "---\n", "~\n"):
        found = problems(tmp_path, text)
        assert len(found) == 2
        assert "accounts: is missing" in found[0]
        assert "SP_API_REFRESH_TOKEN" in found[0]
        assert "applications: is missing" in found[1]
        assert "LWA_APP_ID" in found[1]


# The text itself.


def test_billion_laughs_end_at_the_first_alias(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    (found,) = problems(tmp_path, "\n".join(lines))
    assert found == "config.yaml:2: is not accepted: aliases (*name) are not accepted; write the value out"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("a: !!python/object/apply:os.system [id]", "tags (!name) are not accepted"),
        ("a: !!binary aGk=", "tags (!name) are not accepted"),
        ("a: !env HOME", "tags (!name) are not accepted"),
        ("a: &x 1\nb: *x", "aliases (*name) are not accepted; write the value out"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "aliases (*name) are not accepted; write the value out"),
        ("? [a, b]\n: c", "a key must be a plain string"),
        ("a: " + "[" * 20 + "]" * 20, "more than 12 levels deep"),
        ("a: " + "{b: " * 20 + "}" * 20, "more than 12 levels deep"),
        ("a: " + "[" * 100_000, "more than 12 levels deep"),
        ("a: [1, 2", "a list [ … ] is not closed or lacks a comma"),
        ("a: {b: ${NAME}}", 'needs quotes, as "${NAME}"'),
        ("a: [{b: 1}, c: ${NAME}]", 'needs quotes, as "${NAME}"'),
        ('a: "open', "a quote is not closed"),
        ("a: 'open\n---\nb: 1", "a quote or a bracket is not closed"),
        ("\ta: 1", "indent with spaces"),
        ("a: @b", "put it in quotes"),
        ("a:\n\t- b", "a tab"),
        ("a: b: c", "a colon is not allowed here"),
        ("a: - b", "a list item is not allowed here"),
        ("a:\n  b: 1\n c: 2", "keys of one group start in the same column"),
        ("a:\n  - b\n  c: d", "list items start in the same column"),
        ("a\nb: 1", "a key without a colon"),
        ('a: "C:\\Users"', "use single quotes"),
        ("a: \x07", "a control character"),
        ("a: |9x", "a bracket or a colon that is missing"),
    ],
)
def test_yaml_that_is_not_accepted_is_one_problem_with_its_line(tmp_path: Path, extra: str, message: str) -> None:
    (found,) = problems(tmp_path, BASE + extra + "\n")
    assert re.match(r"config\.yaml(:[3-7])?: is not (valid YAML|accepted): ", found)
    assert message in found


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "42\n", "[]\n"])
def test_a_file_that_is_no_mapping_is_one_problem(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text) == ["config.yaml: must be a mapping of settings"]


def test_several_documents_are_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, f"{BASE}---\n{BASE}") == ["config.yaml: must hold one YAML document, not several"]


@pytest.mark.parametrize("text", [f"---\n{BASE}", f"{BASE}...\n", f"\ufeff{BASE}", BASE.replace("\n", "\r\n")])
def test_the_marks_and_line_ends_of_one_document_are_fine(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).config == load(tmp_path, BASE).config


def test_a_file_that_is_not_utf_8_is_one_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, BASE.encode("utf-16")) == ["config.yaml: is not UTF-8"]


def test_a_file_over_four_mebibytes_is_one_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, BASE + "#" * MAX_BYTES) == ["config.yaml: is larger than 4 MiB"]


def test_a_file_that_cannot_be_read_is_one_problem(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load_config(str(path), {})
        assert [str(problem) for problem in caught.value.problems] == [f"{path}: cannot be read: {reason}"]


def test_values_stay_the_text_that_was_written(tmp_path: Path) -> None:
    text = APPLICATIONS.replace(
        "client_secret: hush", "client_secret: 0123, user_agent: {name: 1e3, version: 2.10}"
    ) + ("accounts: {no: {refresh_tokens: {eu: yes}}, on: {refresh_tokens: {eu: 2026-11-23}}}\ndefault_account: no\n")
    config = load(tmp_path, text).config
    application = config.applications["main"]
    assert application.client_secret.reveal() == "0123"
    assert (application.user_agent.name, application.user_agent.version) == ("1e3", "2.10")
    assert config.accounts["no"].refresh_tokens["eu"].reveal() == "yes"
    assert config.accounts["on"].refresh_tokens["eu"].reveal() == "2026-11-23"
    assert config.default_account == "no"


@given(
    st.recursive(
        st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8).filter(
            lambda text: text not in {"", "~", "null"}
        ),
        lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text("abc", min_size=1), below, max_size=3),
        max_leaves=8,
    )
)
def test_texts_lists_and_mappings_are_read_as_they_were_written(tree: Any) -> None:
    document = read_yaml(yaml.safe_dump({"top": tree}, allow_unicode=True), "x")
    assert (document.tree, document.problems) == ({"top": tree}, [])


@given(st.text(max_size=200))
def test_no_text_whatever_raises_in_the_reader(text: str) -> None:
    document = read_yaml(text, "x")
    assert isinstance(document.tree, dict)


# Single kinds of values.


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


@pytest.mark.parametrize(
    "extra",
    ["user_agent: {name: ''}", "user_agent: {name: 'ä'}", 'user_agent: {name: "a\\nb"}',
     f"user_agent: {{name: {'x' * 101}}}", f"user_agent: {{version: {'x' * 41}}}",
     f"user_agent: {{platform: {'x' * 41}}}", 'user_agent: {language: "\\r\\nx: y"}'],
)  # fmt: skip
def test_a_user_agent_that_no_header_can_hold_is_refused(tmp_path: Path, extra: str) -> None:
    (found,) = problems(tmp_path, BASE.replace("client_secret: hush", f"client_secret: hush, {extra}"))
    assert found.startswith("config.yaml:1: applications.main.user_agent.")


def test_white_space_around_a_secret_is_not_part_of_it(tmp_path: Path) -> None:
    config = load(tmp_path, BASE.replace("token-eu", "'  Atzr|x  '")).config
    assert config.accounts["acme"].refresh_tokens["eu"].reveal() == "Atzr|x"


@pytest.mark.parametrize("written", ['""', '"  "', '"\\n"', "", "[]", "{}"])
def test_an_empty_secret_is_refused(tmp_path: Path, written: str) -> None:
    (found,) = problems(tmp_path, BASE.replace("token-eu", written))
    assert found == "config.yaml:2: accounts.acme.refresh_tokens.eu: must be a text and not empty"


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ("pool: {max_connections: 0}", "pool.max_connections"),
        ("pool: {max_connections: 1.5}", "pool.max_connections"),
        ("pool: {max_connections: many}", "pool.max_connections"),
        ("log: {level: loud}", "log.level"),
        ("environment: prod", "environment"),
        ("store: redis", "store"),
        ("store: []", "store"),
        ("warm_up: maybe", "warm_up"),
        ("marketplaces: {A1: uk}", "marketplaces.A1"),
        ("limits: [1]", "limits"),
        ("limits: 1s", "limits"),
        ("listen: []", "listen"),
        ("listen: {}", "listen[0].address"),
        ("listen: [{address: '127.0.0.1:1', region: uk}]", "listen[0].region"),
        ("allowed_hosts: a.test", "allowed_hosts"),
        ("timeouts: {connect: [1s]}", "timeouts.connect"),
    ],
)
def test_a_value_of_the_wrong_kind_is_a_problem_of_its_key(tmp_path: Path, extra: str, key: str) -> None:
    assert any(line.startswith(f"config.yaml:3: {key}: ") for line in problems(tmp_path, BASE + extra + "\n"))


FOREIGN = re.compile(
    r"tuple|dict|instance|string|integer|boolean|Input|valid\b|parse|pattern|None|greater|less than|cannot be used"
)
SHAPES: list[Any] = [
    "",
    "x",
    "\t",
    "-1",
    "99999999999",
    "x" * 1000,
    [],
    ["x"],
    [["x"]],
    {},
    {"x": "y"},
    {"x": {"y": "z"}},
]
SHAPES += [None, {"x": None}, [None], "2026-99-99", "1e9999", "ä b", {"a b": {}}, "9" * 5000]


def keys_of(kind: Any = Config, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield a path to every setting and group there is, made-up names within."""
    if path:
        yield path
    if group := settings_in(kind):
        for name in group.model_fields:
            yield from keys_of(kind_below(kind, name), (*path, name))
    elif is_list(kind):
        yield from keys_of(kind_below(kind, 0), (*path, 0))
    elif is_mapping(kind):
        part = "eu" if path[-1] == "refresh_tokens" else "acme"
        yield from keys_of(kind_below(kind, part), (*path, part))


def test_every_mistake_is_told_in_the_words_of_a_configuration() -> None:
    paths = list(keys_of())
    assert len(paths) > 100
    told = set[str]()
    for path in paths:
        for shape in SHAPES:
            merged = MergedSettings(tree=yaml.safe_load(BASE))
            if path[0] == "listen" and len(path) > 1:
                merged.ensure_listener()
            merged.put(path, shape, "x")
            _validated(merged)
            told |= {problem.message for problem in merged.problems}
    assert len(told) > 30
    assert [message for message in told if FOREIGN.search(message)] == []


# What no single setting shows.


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


def test_with_one_application_an_account_need_not_say_which(tmp_path: Path) -> None:
    config = load(tmp_path, BASE).config
    assert config.application_of(config.accounts["acme"]) == ("main", config.applications["main"])


def test_an_account_may_have_an_environment_of_its_own(tmp_path: Path) -> None:
    text = (
        APPLICATIONS + "accounts: {a: {environment: sandbox, refresh_tokens: {eu: t}}, b: {refresh_tokens: {eu: t}}}\n"
    )
    config = load(tmp_path, text).config
    assert [config.environment_of(account) for account in config.accounts.values()] == ["sandbox", "production"]


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


# Secrets.


def test_a_secret_is_never_printed_by_any_form_of_a_config(tmp_path: Path) -> None:
    text = BASE.replace("hush", SECRET).replace("token-eu", SECRET)
    loaded = load(tmp_path, text)
    config = loaded.config
    assert config.applications["main"].client_secret.reveal() == SECRET
    forms = [
        str(config), repr(config), f"{config}", config.model_dump_json(), json.dumps(dump(config)),
        str(config.model_dump()), repr(loaded), str(list(loaded.rows())), repr(config.model_copy(deep=True)),
    ]  # fmt: skip
    assert [form for form in forms if SECRET in form] == []


def test_a_secret_is_compared_and_copied_but_never_pickled_or_formatted() -> None:
    secret = Secret(SECRET)
    assert secret == Secret(SECRET)
    assert secret != Secret("other")
    assert secret != SECRET
    assert {secret: 1}[Secret(SECRET)] == 1
    assert [str(secret), repr(secret), f"{secret}", f"{secret:>5}", f"{secret!r}"] == [
        "***",
        "***",
        "***",
        "  ***",
        "***",
    ]
    with pytest.raises(TypeError, match="not pickled"):
        secret.__reduce__()


PLACES = [
    "listen", "listen.0.address", "listen.0.account", "listen.0.region", "listen.0.require_header", "admin", "health",
    "allowed_hosts", "allowed_hosts.0", "applications", "applications.main", "applications.main.client_id",
    "applications.main.client_secret", "applications.main.user_agent", "applications.main.user_agent.name",
    "applications.main.user_agent.version", "accounts", "accounts.acme", "accounts.acme.application",
    "accounts.acme.refresh_tokens", "accounts.acme.refresh_tokens.eu", "accounts.acme.data_elements",
    "accounts.acme.data_elements.0", "accounts.acme.environment", "default_account", "environment", "endpoints",
    "endpoints.na", "endpoints.lwa", "endpoints.documents", "documents", "documents_url",
    "marketplaces", "marketplaces.A1", "limits", "limits.max_wait", "limits.pace",
    "timeouts", "timeouts.token", "pool", "pool.max_connections", "pool.ca_file", "store", "store_key", "warm_up",
    "log", "log.level", "metrics", "metrics.account_on_histograms", "unknown", "limits.unknown",
]  # fmt: skip

FORMS: list[Any] = [
    SECRET, [SECRET], {"value": SECRET}, [[SECRET]], [{"address": SECRET}], {"file": [SECRET]}, f"https://{SECRET}.test/x",
    f"http://user:{SECRET}@example.test", f"https://[{SECRET}]", f"https://user:{SECRET}@ex℀mple.test", f"{SECRET}\n",
    f"https://example.test:{SECRET}", f"127.0.0.1:{SECRET}", f"unix:{SECRET}", f"[{SECRET}]:80", f"{SECRET}:80:80",
    f"${{A}}{SECRET}", f"é{SECRET}", SECRET * 20, f"-{SECRET}", f"{SECRET}\x00",
]  # fmt: skip

BREAKAGES = [
    "",
    "broken: [",
    'broken: "',
    "\tx",
    "broken: *",
    "broken: !x y",
    "- a",
    "a: b: c",
    "}",
    "@",
    "%",
    "---\nx",
]


def tree_with(place: str, value: Any) -> dict[str, Any]:
    """Return a whole configuration with `value` put at `place`."""
    tree: dict[str, Any] = yaml.safe_load(BASE)
    here: Any = tree
    *above, last = place.split(".")
    for key in above:
        if key == "0":
            here.append({})
            here = here[0]
        else:
            here = here.setdefault(key, [] if key in {"listen", "allowed_hosts", "data_elements"} else {})
    if last == "0":
        here.append(value)
    else:
        here[last] = value
    return tree


def said_about(text: str, folder: Path, environ: Mapping[str, str] | None = None) -> str:
    """Return everything that can be printed of a configuration that is refused (or, if it is taken, shown)."""
    try:
        loaded = load(folder, text.encode("utf-8", "replace"), environ)
    except ConfigError as exc:
        return "\n".join([str(exc), repr(exc), repr(exc.problems), *(problem.message for problem in exc.problems)])
    tokens = {"client_secret", "refresh_tokens"}
    return "\n".join(value for key, value, _ in loaded.rows() if tokens & set(re.split(r"[.\[]", key)))


@pytest.mark.parametrize("place", PLACES)
def test_no_error_quotes_the_value_wherever_it_was_put(tmp_path: Path, place: str) -> None:
    leaking = [
        form
        for form in FORMS
        if SECRET in said_about(yaml.safe_dump(tree_with(place, form), allow_unicode=True), tmp_path)
    ]
    assert leaking == []


def test_a_token_written_where_its_region_belongs_is_not_quoted(tmp_path: Path) -> None:
    assert SECRET not in said_about(BASE.replace("{eu: token-eu}", f"{{{SECRET}}}"), tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    place=st.sampled_from(PLACES), form=st.sampled_from(FORMS[:5]), breakage=st.sampled_from(BREAKAGES), data=st.data()
)
def test_no_error_quotes_the_value_near_broken_yaml(
    tmp_path: Path, place: str, form: Any, breakage: str, data: st.DataObject
) -> None:
    lines = yaml.safe_dump(tree_with(place, form)).splitlines()
    cut = data.draw(st.integers(0, len(lines)))
    text = "\n".join([*lines[:cut], breakage, *lines[cut:]])
    assert SECRET not in said_about(text, tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        f"a: !{SECRET} b", f"a: !{SECRET}!x b", f"a: &{SECRET} b", f"a: *{SECRET}", f"%{SECRET} 1\n---",
        f'a: "\\{SECRET}',
        f"a: '{SECRET}", f"a: [{SECRET}", f"{SECRET}\nb: c", f"a: @{SECRET}", f"a: `{SECRET}", f"a: {SECRET}\x07",
        f"a: b: {SECRET}", f"- {SECRET}", f"a: |9{SECRET}", f"a: >{SECRET}", f'a: "x"{SECRET}', f"? [{SECRET}]\n: x",
    ],
)  # fmt: skip
def test_no_error_quotes_the_yaml_that_is_broken(tmp_path: Path, extra: str) -> None:
    assert SECRET not in said_about(BASE + extra + "\n", tmp_path)
    assert SECRET not in said_about(extra + "\n" + BASE, tmp_path)


def test_a_file_that_is_not_utf_8_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, SECRET.encode() + b"\xff")
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize("place", [place for place in PLACES if "0" not in place and "A1" not in place])
def test_no_error_quotes_a_value_from_the_environment(tmp_path: Path, place: str) -> None:
    name = f"SP_API_PROXY_{place.replace('.', '_').upper()}"
    for value in (SECRET, f"[{SECRET}", f"{{{SECRET}", f"[{SECRET}]", f"https://[{SECRET}]", f"{{a: {SECRET}}}"):
        assert SECRET not in said_about(BASE, tmp_path, {name: value}).replace(name, "")


# What editors and documents are told.


def groups(kind: Any = Config) -> dict[str, type[Settings]]:
    """Return every group of settings by its name, found by walking the types of the fields."""
    found: dict[str, type[Settings]] = {}
    if group := settings_in(kind):
        found[group.__name__] = group
        for field in group.model_fields.values():
            found |= groups(field.annotation)
    for below in get_args(kind):
        found |= groups(below)
    return found


def test_every_setting_has_a_description_that_ends_as_a_sentence() -> None:
    assert len(groups()) >= 11
    lacking = [
        f"{name}.{field}"
        for name, group in groups().items()
        for field, info in group.model_fields.items()
        if not (info.description or "").endswith((".", ")"))
    ]
    assert lacking == []


def test_the_json_schema_has_defaults_as_a_file_would() -> None:
    schema = json_schema()
    assert schema["$defs"]["Listener"]["properties"]["mode"]["default"] == "0600"
    assert schema["$defs"]["Timeouts"]["properties"]["total"]["default"] == "1h"
    assert schema["properties"]["admin"]["default"] == "127.0.0.1:9090"
    for group in (schema, *schema["$defs"].values()):
        for setting in group["properties"].values():
            assert setting.get("default") is None or allowed(setting, setting["default"], schema)


def test_the_json_schema_is_json_and_holds_every_setting_with_its_description() -> None:
    schema = json.loads(json.dumps(json_schema(), allow_nan=False))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for name, group in groups().items():
        described = schema if group is Config else schema["$defs"][name]
        assert described["additionalProperties"] is False
        for field, info in group.model_fields.items():
            setting = described["properties"][field]
            group_below = schema["$defs"].get(setting.get("$ref", "").rpartition("/")[2], {})
            assert setting.get("description", group_below.get("description")) == info.description


KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def allowed(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Return whether `schema` allows a value, by the few words of JSON Schema that ours uses."""
    if "$ref" in schema:
        return allowed(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in schema:
        return any(allowed(one, value, root) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    if isinstance(value, dict):
        return schema.get("type") == "object" and allowed_mapping(schema, value, root)
    if isinstance(value, list):
        return schema.get("type") == "array" and all(allowed(schema["items"], item, root) for item in value)
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, KINDS.get(name, ())) for name in types):
        return False
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0) and bool(re.search(schema.get("pattern", ""), value))
    return value is None or bool(value >= schema.get("minimum", value))


def allowed_mapping(schema: dict[str, Any], value: dict[str, Any], root: dict[str, Any]) -> bool:
    names = schema.get("propertyNames", {}).get("enum", value)
    if any(key not in value for key in schema.get("required", ())) or any(key not in names for key in value):
        return False
    for key, item in value.items():
        patterns = schema.get("patternProperties", {})
        below = schema.get("properties", {}).get(key) or next(
            (one for pattern, one in patterns.items() if re.search(pattern, key)), schema.get("additionalProperties")
        )
        if not below or not allowed(below, item, root):
            return False
    return True


EXAMPLE = """\
listen: [127.0.0.1:8080, {address: unix:/run/sp-api-proxy/acme.sock, account: acme, region: eu}]
admin: 127.0.0.1:9090
allowed_hosts: []
applications:
  main:
    client_id: ${LWA_CLIENT_ID}
    client_secret: {file: /run/secrets/lwa_client_secret}
    user_agent: {name: My Selling Tool, version: "2.0"}
accounts:
  acme:
    application: main
    refresh_tokens: {na: "${ACME_NA}", eu: {file: /run/secrets/acme_eu}}
    data_elements: [buyerInfo, shippingAddress]
default_account: acme
environment: production
endpoints: {na: "https://sellingpartnerapi-na.amazon.com", lwa: "https://api.amazon.com/auth/o2/token"}
limits: {max_wait: 10s, pace: true}
timeouts: {header: 10s, body_idle: 30s, connect: 5s, upstream_idle: 60s, token: 10}
store: memory
"""


@pytest.mark.parametrize(
    ("change", "is_allowed"),
    [
        ({}, True),
        ({"listen": "127.0.0.1:1"}, True),
        ({"listen": {"address": "127.0.0.1:1", "region": "eu"}}, True),
        ({"admin": None}, True),
        ({"limits": {"pace": "${PACE}"}}, True),
        ({"limits": {"max_wait": {"file": "wait"}}}, True),
        ({"marketplaces": {"A1": "eu"}}, True),
        ({"pool": {"max_connections": 7}}, True),
        ({"limtis": {}}, False),
        ({"limits": {"max_wiat": "1s"}}, False),
        ({"limits": {"pace": "perhaps"}}, False),
        ({"limits": {"max_wait": {"path": "wait"}}}, False),
        ({"listen": [{"account": "acme"}]}, False),
        ({"listen": 8080}, False),
        ({"environment": "prod"}, False),
        ({"accounts": {"acme": {"refresh_tokens": {"uk": "t"}}}}, False),
        ({"accounts": {"acme": {"data_elements": ["buyerinfo"]}}}, False),
        ({"applications": {"main": {"client_id": "x"}}}, False),
        ({"pool": {"max_connections": 0}}, False),
        ({"store": "redis://h", "store_key": "0123456789abcdef0123456789abcdef"}, True),
        ({"store": "redis"}, False),
    ],
)
def test_the_json_schema_allows_what_the_documents_show_and_refuses_what_the_proxy_refuses(
    change: dict[str, Any], is_allowed: bool
) -> None:
    schema = json_schema()
    assert allowed(schema, {**yaml.safe_load(EXAMPLE), **change}, schema) is is_allowed


def test_the_example_of_the_documents_is_a_config(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hush")
    text = re.sub(r"/run/secrets/\w+", "secret", EXAMPLE)
    config = load(tmp_path, text, {"LWA_CLIENT_ID": "client", "ACME_NA": "Atzr|na"}).config
    assert config.listen[1].account == "acme"
    assert config.accounts["acme"].refresh_tokens == {"na": Secret("Atzr|na"), "eu": Secret("hush")}


def test_a_problem_reads_where_key_and_what() -> None:
    assert str(Problem("a.b", "is missing", "x.yaml:3")) == "x.yaml:3: a.b: is missing"
    assert str(Problem("a.b", "is missing")) == "a.b: is missing"
    assert str(Problem("", "is not UTF-8", "x.yaml")) == "x.yaml: is not UTF-8"


def test_a_secret_of_a_variable_or_a_file_is_read_anew(tmp_path: Path) -> None:
    (tmp_path / "refresh").write_text("old-refresh")
    environ = {"SECRET": "old-secret", "SP_API_PROXY_ACCOUNTS_ACME_REFRESH_TOKENS_NA": "old-na"}
    path = tmp_path / "config.yaml"
    path.write_text(
        "applications: {main: {client_id: c, client_secret: '${SECRET}'}}\n"
        "accounts: {acme: {refresh_tokens: {eu: {file: refresh}}}}\n"
    )
    config = load_config(str(path), environ).config
    secret = config.applications["main"].client_secret
    tokens = config.accounts["acme"].refresh_tokens
    assert [one.refreshed() for one in (secret, tokens["eu"], tokens["na"])] == [secret, tokens["eu"], tokens["na"]]
    environ |= {"SECRET": "new-secret", "SP_API_PROXY_ACCOUNTS_ACME_REFRESH_TOKENS_NA": "new-na"}
    (tmp_path / "refresh").write_text(" new-refresh \n")
    found = [one.refreshed().reveal() for one in (secret, tokens["eu"], tokens["na"])]
    assert found == ["new-secret", "new-refresh", "new-na"]
    assert secret.refreshed().refreshed().reveal() == "new-secret"
    environ.clear()
    (tmp_path / "refresh").write_bytes(b"\xff")
    assert [one.refreshed() for one in (secret, tokens["eu"], tokens["na"])] == [secret, tokens["eu"], tokens["na"]]


# Callers, policies and the listeners they come in by.

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


def test_the_key_of_a_listeners_certificate_is_a_secret_too(tmp_path: Path) -> None:
    key = tmp_path / "tls.key"
    key.write_text("key")
    key.chmod(0o644)
    text = f"{BASE}listen: {{address: '127.0.0.1:1', tls: {{certificate: c, key: '{key}'}}}}\n"
    assert any(problem.key == "listen[0].tls.key" for problem in load(tmp_path, text).warnings)


def test_a_socket_mode_is_octal_and_shown_as_it_is_written(tmp_path: Path) -> None:
    for text in ("0660", "660", "'0660'"):
        config = load(tmp_path, f"{BASE}listen: {{address: 'unix:/x', mode: {text}}}\n").config
        assert config.listen[0].mode == 0o660
        assert dump(config)["listen"][0]["mode"] == "0660"
