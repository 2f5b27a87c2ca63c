"""The environment alone is enough, under our own names and under those that people already have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy.config import Account, ConfigError, Loaded, load_config

BASE = """\
applications: {main: {client_id: file-client, client_secret: file-secret}}
accounts: {my-shop: {refresh_tokens: {eu: file-token}}, other: {refresh_tokens: {na: file-other}}}
default_account: other
"""
CREDENTIALS = {"LWA_APP_ID": "client", "LWA_CLIENT_SECRET": "hush"}
SECRET = "Atzr|never-quoted"
TOKEN = {"SP_API_REFRESH_TOKEN": "token", "SP_API_REGION": "eu"}


def load(environ: Mapping[str, str], folder: Path | None = None, text: str = BASE) -> Loaded:
    """Return what the environment means, alone or (with a folder) on top of a file."""
    if folder is None:
        return load_config(None, environ)
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(str(path), environ)


def problems(environ: Mapping[str, str], folder: Path | None = None, text: str = BASE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(environ, folder, text)
    return [str(problem) for problem in caught.value.problems]


def tokens(account: Account) -> dict[str, str]:
    return {str(region): secret.reveal() for region, secret in account.refresh_tokens.items()}


def accounts(loaded: Loaded) -> dict[str, dict[str, str]]:
    return {name: tokens(account) for name, account in loaded.config.accounts.items()}


def applications(loaded: Loaded) -> dict[str, tuple[str, str]]:
    return {
        name: (application.client_id, application.client_secret.reveal())
        for name, application in loaded.config.applications.items()
    }


# Names of other libraries.


@pytest.mark.parametrize(
    "client_id", ["LWA_APP_ID", "LWA_CLIENT_ID", "SELLING_PARTNER_APP_CLIENT_ID", "SP_API_CLIENT_ID"]
)
@pytest.mark.parametrize(
    "client_secret", ["LWA_CLIENT_SECRET", "SELLING_PARTNER_APP_CLIENT_SECRET", "SP_API_CLIENT_SECRET"]
)
def test_the_names_of_the_known_libraries_name_the_application(client_id: str, client_secret: str) -> None:
    loaded = load({client_id: "client", client_secret: "hush", **TOKEN})
    assert applications(loaded) == {"main": ("client", "hush")}
    origins = {key: origin for key, _, origin in loaded.rows()}
    assert origins["applications.main.client_id"] == f"environment variable {client_id}"
    assert origins["applications.main.client_secret"] == f"environment variable {client_secret}"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SP_API_REFRESH_TOKEN_NA": "a"}, {"default": {"na": "a"}}),
        ({"SP_API_REFRESH_TOKEN_EU": "a"}, {"default": {"eu": "a"}}),
        ({"SP_API_REFRESH_TOKEN_FE": "a"}, {"default": {"fe": "a"}}),
        (
            {"SP_API_REFRESH_TOKEN_NA": "a", "SP_API_REFRESH_TOKEN_EU": "b", "SP_API_REFRESH_TOKEN_FE": "c"},
            {"default": {"na": "a", "eu": "b", "fe": "c"}},
        ),
        ({"SP_API_REFRESH_TOKEN": "a", "SP_API_REGION": "fe"}, {"default": {"fe": "a"}}),
        (
            {"SP_API_REFRESH_TOKEN": "a", "SP_API_REGION": "fe", "SP_API_REFRESH_TOKEN_NA": "b"},
            {"default": {"na": "b", "fe": "a"}},
        ),
        ({"SP_API_REFRESH_TOKEN_ACME": "a", "SP_API_REGION": "eu"}, {"acme": {"eu": "a"}}),
        (
            {"SP_API_REFRESH_TOKEN_ACME": "a", "SP_API_REFRESH_TOKEN_MY_SHOP": "b", "SP_API_REGION": "na"},
            {"acme": {"na": "a"}, "my_shop": {"na": "b"}},
        ),
        (
            {"SP_API_REFRESH_TOKEN_ACME": "a", "SP_API_REFRESH_TOKEN_EU": "b", "SP_API_REGION": "na"},
            {"acme": {"na": "a"}, "default": {"eu": "b"}},
        ),
        ({"SP_API_REFRESH_TOKEN_NA": "a", "SP_API_REFRESH_TOKEN_EU": ""}, {"default": {"na": "a"}}),
        ({"SP_API_REFRESH_TOKEN_NA": "a", "SP_API_REFRESH_TOKEN_ACME": ""}, {"default": {"na": "a"}}),
    ],
)
def test_na_eu_and_fe_are_regions_and_every_other_suffix_is_an_account(
    environ: dict[str, str], expected: dict[str, dict[str, str]]
) -> None:
    assert accounts(load({**CREDENTIALS, **environ})) == expected


def test_an_account_with_its_own_client_has_its_own_application() -> None:
    loaded = load(
        {
            **CREDENTIALS,
            "SP_API_REGION": "eu",
            "SP_API_REFRESH_TOKEN_ACME": "a",
            "LWA_APP_ID_ACME": "acme-client",
            "LWA_CLIENT_SECRET_ACME": "acme-hush",
            "SP_API_REFRESH_TOKEN_ZETA": "z",
        }
    )
    assert applications(loaded) == {"main": ("client", "hush"), "acme": ("acme-client", "acme-hush")}
    config = loaded.config
    assert {name: config.application_of(account)[0] for name, account in config.accounts.items()} == {
        "acme": "acme",
        "zeta": "main",
    }


def test_every_account_may_have_its_own_client_and_there_be_no_other() -> None:
    names = ("ACME", "ZETA")
    environ = {f"SP_API_REFRESH_TOKEN_{name}": "t" for name in names} | {"SP_API_REGION": "eu"}
    environ |= {f"LWA_CLIENT_ID_{name}": name for name in names} | {
        f"SP_API_CLIENT_SECRET_{name}": name for name in names
    }
    assert applications(load(environ)) == {"acme": ("ACME", "ACME"), "zeta": ("ZETA", "ZETA")}


@pytest.mark.parametrize(
    "name",
    ["LWA_APP_ID", "LWA_CLIENT_SECRET", "SP_API_REFRESH_TOKEN", "SP_API_REFRESH_TOKEN_NA", "SP_API_REFRESH_TOKEN_ACME"],
)  # fmt: skip
def test_every_name_may_end_in_file(tmp_path: Path, name: str) -> None:
    environ = {**CREDENTIALS, **TOKEN, "SP_API_REFRESH_TOKEN_NA": "na", "SP_API_REFRESH_TOKEN_ACME": "acme"}
    expected = load(environ)
    (tmp_path / "secret").write_text(f"{environ.pop(name)}\n")
    environ[f"{name}_FILE"] = str(tmp_path / "secret")
    loaded = load(environ)
    assert (accounts(loaded), applications(loaded)) == (accounts(expected), applications(expected))
    assert any(f"environment variable {name}_FILE" in origin for _, _, origin in loaded.rows())


@pytest.mark.parametrize("name", ["LWA_APP_ID_ACME", "LWA_CLIENT_SECRET_ACME"])
def test_the_names_of_one_account_may_end_in_file_too(tmp_path: Path, name: str) -> None:
    environ = {"SP_API_REFRESH_TOKEN_ACME": "t", "SP_API_REGION": "eu"}
    environ |= {"LWA_APP_ID_ACME": "acme-client", "LWA_CLIENT_SECRET_ACME": "acme-hush"}
    (tmp_path / "secret").write_text(f"{environ.pop(name)}\n")
    environ[f"{name}_FILE"] = str(tmp_path / "secret")
    assert applications(load(environ)) == {"acme": ("acme-client", "acme-hush")}


def test_the_account_without_a_suffix_keeps_the_application_without_a_suffix() -> None:
    acme = {"SP_API_REFRESH_TOKEN_ACME": "a", "LWA_APP_ID_ACME": "acme-client", "LWA_CLIENT_SECRET_ACME": "acme-hush"}
    config = load({**CREDENTIALS, **TOKEN, **acme}).config
    assert {name: config.application_of(account)[0] for name, account in config.accounts.items()} == {
        "default": "main",
        "acme": "acme",
    }


def test_a_name_counts_before_its_file_and_an_empty_one_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-file")
    both = {**CREDENTIALS, **TOKEN, "LWA_CLIENT_SECRET_FILE": str(tmp_path / "secret")}
    assert applications(load(both)) == {"main": ("client", "hush")}
    assert applications(load({**both, "LWA_CLIENT_SECRET": ""})) == {"main": ("client", "from-file")}


def test_a_secret_file_that_is_missing_is_named_with_its_variable(tmp_path: Path) -> None:
    (found,) = problems({"LWA_APP_ID": "client", **TOKEN, "LWA_CLIENT_SECRET_FILE": str(tmp_path / "none")})
    assert found == (
        "environment variable LWA_CLIENT_SECRET_FILE: applications.main.client_secret: "
        f"file {tmp_path / 'none'}: No such file or directory"
    )


@pytest.mark.parametrize(
    ("written", "region"),
    [("na", "na"), ("EU", "eu"), (" fe ", "fe"), ("us-east-1", "na"), ("eu-west-1", "eu"), ("US-WEST-2", "fe")],
)
def test_the_region_may_be_written_as_ours_or_as_that_of_aws(written: str, region: str) -> None:
    assert accounts(load({**CREDENTIALS, "SP_API_REFRESH_TOKEN": "t", "SP_API_REGION": written})) == {
        "default": {region: "t"}
    }


@pytest.mark.parametrize("name", ["SP_API_REFRESH_TOKEN", "SP_API_REFRESH_TOKEN_ACME"])
@pytest.mark.parametrize(
    ("written", "state"),
    [
        (None, "is not set"),
        ("", "is not set"),
        ("uk", "must be na, eu or fe"),
        ("eu-central-1", "must be na, eu or fe"),
    ],
)
def test_a_token_whose_region_is_unknown_is_a_problem_that_says_so(name: str, written: str | None, state: str) -> None:
    environ = {**CREDENTIALS, name: "t"} | ({} if written is None else {"SP_API_REGION": written})
    assert f"environment: SP_API_REGION: {state}: {name} is valid in one region only, so name it here" in problems(
        environ
    )


def test_a_missing_part_of_the_application_is_one_problem() -> None:
    (found,) = problems({"LWA_APP_ID": "client", **TOKEN})
    missing = "applications.main.client_secret: is missing: give it here, or set LWA_CLIENT_SECRET"
    assert found == f"environment variable LWA_APP_ID: {missing}"


def test_known_names_fill_in_and_never_override_the_file(tmp_path: Path) -> None:
    everything = {**CREDENTIALS, **TOKEN, "SP_API_REFRESH_TOKEN_ACME": "t", "SP_API_REFRESH_TOKEN_NA": "t"}
    loaded = load(everything, tmp_path)
    assert applications(loaded) == {"main": ("file-client", "file-secret")}
    assert accounts(loaded) == {"my-shop": {"eu": "file-token"}, "other": {"na": "file-other"}}


def test_known_names_fill_in_what_the_file_leaves_out(tmp_path: Path) -> None:
    only_client = "applications: {ours: {client_id: file-client}}\nlimits: {max_wait: 1s}\n"
    loaded = load({**CREDENTIALS, **TOKEN}, tmp_path, only_client)
    assert applications(loaded) == {"ours": ("file-client", "hush")}
    assert accounts(loaded) == {"default": {"eu": "token"}}
    loaded = load({**CREDENTIALS, **TOKEN}, tmp_path, "limits: {max_wait: 1s}\n")
    assert applications(loaded) == {"main": ("client", "hush")}


def test_known_names_fill_in_none_of_several_applications(tmp_path: Path) -> None:
    text = "applications: {a: {client_id: a}, b: {client_id: b}}\n"
    text += "accounts: {x: {application: a, refresh_tokens: {eu: t}}}\n"
    found = problems(CREDENTIALS, tmp_path, text)
    assert [line.split(": ")[1] for line in found] == ["applications.a.client_secret", "applications.b.client_secret"]


# SP_API_PROXY_ and the key.


@pytest.mark.parametrize(
    ("name", "value", "key", "expected"),
    [
        ("LISTEN", "127.0.0.1:1", "listen[0].address", "127.0.0.1:1"),
        ("LISTEN", "127.0.0.1:1, unix:/run/a.sock", "listen[1].address", "unix:/run/a.sock"),
        ("LISTEN", "[127.0.0.1:1, {address: '127.0.0.1:2', account: other}]", "listen[1].account", "other"),
        ("LISTEN", "[::1]:8080", "listen[0].address", "[::1]:8080"),
        ("ADMIN", "127.0.0.1:2", "admin", "127.0.0.1:2"),
        ("ADMIN", "[::1]:2", "admin", "[::1]:2"),
        ("HEALTH", "0.0.0.0:9091", "health", "0.0.0.0:9091"),
        ("ALLOWED_HOSTS", "a.test,b.test", "allowed_hosts[1]", "b.test"),
        ("ALLOWED_HOSTS", "[a.test, b.test]", "allowed_hosts[0]", "a.test"),
        ("DEFAULT_ACCOUNT", "my-shop", "default_account", "my-shop"),
        ("ENVIRONMENT", "sandbox", "environment", "sandbox"),
        ("LIMITS_MAX_WAIT", "2s", "limits.max_wait", "2s"),
        ("LIMITS_PACE", "false", "limits.pace", "false"),
        ("TIMEOUTS_UPSTREAM_IDLE", "2s", "timeouts.upstream_idle", "2s"),
        ("ENDPOINTS_LWA", "http://127.0.0.1:3/t", "endpoints.lwa", "http://127.0.0.1:3/t"),
        ("POOL_MAX_CONNECTIONS", "7", "pool.max_connections", "7"),
        ("WARM_UP", "true", "warm_up", "true"),
        ("LOG_LEVEL", "debug", "log.level", "debug"),
        ("METRICS_ACCOUNT_ON_HISTOGRAMS", "yes", "metrics.account_on_histograms", "true"),
        ("APPLICATIONS_MAIN_CLIENT_ID", "env-client", "applications.main.client_id", "env-client"),
        ("APPLICATIONS_MAIN_USER_AGENT_NAME", "Tool", "applications.main.user_agent.name", "Tool"),
        ("ACCOUNTS_MY_SHOP_ENVIRONMENT", "sandbox", "accounts.my-shop.environment", "sandbox"),
        ("ACCOUNTS_MY_SHOP_APPLICATION", "main", "accounts.my-shop.application", "main"),
        ("ACCOUNTS_MY_SHOP_DATA_ELEMENTS", "buyerInfo, buyerInfo", "accounts.my-shop.data_elements[1]", "buyerInfo"),
        ("ACCOUNTS_MY_SHOP_REFRESH_TOKENS_EU", "t", "accounts.my-shop.refresh_tokens.eu", "***"),
        ("ACCOUNTS_NEW_REFRESH_TOKENS_FE", "t", "accounts.new.refresh_tokens.fe", "***"),
        ("LISTEN_0_ACCOUNT", "other", "listen[0].account", "other"),
        ("LISTEN_0", "127.0.0.1:1", "listen[0].address", "127.0.0.1:1"),
        ("LISTEN_1_ADDRESS", "127.0.0.1:1", "listen[1].address", "127.0.0.1:1"),
        ("LISTEN_0_OPERATIONS", "READ *,feeds.*", "listen[0].operations[1]", "feeds.*"),
        ("LISTEN_0_ACCOUNTS", "[other]", "listen[0].accounts[0]", "other"),
        ("MARKETPLACES_A1EXAMPLE", "eu", "marketplaces.A1EXAMPLE", "eu"),
        ("MARKETPLACES", "{A1EXAMPLE: eu}", "marketplaces.A1EXAMPLE", "eu"),
        ("CALLERS", "{job: {key: k, operations: [READ *]}}", "callers.job.operations[0]", "READ *"),
        ("ACCOUNTS_BRAND_NEW_REFRESH_TOKENS_FE", "t", "accounts.brand_new.refresh_tokens.fe", "***"),
    ],
)  # fmt: skip
def test_every_setting_is_overridden_by_its_upper_case_name(
    tmp_path: Path, name: str, value: str, key: str, expected: str
) -> None:
    rows = {key: shown for key, shown, _ in load({f"SP_API_PROXY_{name}": value}, tmp_path).rows()}
    assert rows[key] == expected


def test_a_token_of_an_account_is_overridden_alone(tmp_path: Path) -> None:
    loaded = load({"SP_API_PROXY_ACCOUNTS_MY_SHOP_REFRESH_TOKENS_NA": "new"}, tmp_path)
    assert accounts(loaded) == {"my-shop": {"eu": "file-token", "na": "new"}, "other": {"na": "file-other"}}


def test_a_whole_group_is_overridden_as_a_whole(tmp_path: Path) -> None:
    environ = {
        "SP_API_PROXY_ACCOUNTS": '{"acme": {"refresh_tokens": {"eu": "t"}}}',
        "SP_API_PROXY_DEFAULT_ACCOUNT": "acme",
    }
    assert accounts(load(environ, tmp_path)) == {"acme": {"eu": "t"}}


def test_an_override_may_end_in_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-file\n")
    environ = {"SP_API_PROXY_ACCOUNTS_MY_SHOP_REFRESH_TOKENS_EU_FILE": str(tmp_path / "secret")}
    assert accounts(load(environ, tmp_path))["my-shop"] == {"eu": "from-file"}
    (tmp_path / "client").write_text("client-from-file\n")
    environ = {"SP_API_PROXY_APPLICATIONS_MAIN_CLIENT_ID_FILE": str(tmp_path / "client")}
    assert applications(load(environ, tmp_path))["main"][0] == "client-from-file"


def test_ca_file_is_a_setting_and_not_the_file_of_another(tmp_path: Path) -> None:
    config = load({"SP_API_PROXY_POOL_CA_FILE": "/etc/ssl/ca.pem"}, tmp_path).config
    assert config.pool.ca_file == "/etc/ssl/ca.pem"


def test_an_override_stands_before_the_names_of_other_libraries() -> None:
    environ = {**CREDENTIALS, **TOKEN, "SP_API_PROXY_APPLICATIONS_MAIN_CLIENT_SECRET": "ours"}
    environ["SP_API_PROXY_ACCOUNTS_DEFAULT_DATA_ELEMENTS"] = "buyerInfo"
    loaded = load(environ)
    assert applications(loaded) == {"main": ("client", "ours")}
    assert loaded.config.accounts["default"].data_elements == ("buyerInfo",)


def test_our_own_names_alone_are_enough() -> None:
    loaded = load(
        {
            "SP_API_PROXY_APPLICATIONS_MAIN_CLIENT_ID": "client",
            "SP_API_PROXY_APPLICATIONS_MAIN_CLIENT_SECRET": "hush",
            "SP_API_PROXY_ACCOUNTS_ACME_REFRESH_TOKENS_EU": "token",
        }
    )
    assert (applications(loaded), accounts(loaded)) == ({"main": ("client", "hush")}, {"acme": {"eu": "token"}})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LIMTIS_MAX_WAIT", "LIMITS_MAX_WAIT"),
        ("LIMITS_MAX_WIAT", "LIMITS_MAX_WAIT"),
        ("limits_pace", "LIMITS_PACE"),
        ("ACCOUNT_MY_SHOP_REFRESH_TOKEN_NA", "ACCOUNTS_MY_SHOP_REFRESH_TOKENS_NA"),
        ("LISTEN_0_ADRESS", "LISTEN_0_ADDRESS"),
        ("LISTENER", "LISTEN"),
        ("ACCOUNTS_ACM_REFRESH_TOKEN_EU", "ACCOUNTS_ACM_REFRESH_TOKENS_EU"),
        ("CALLERS_JOB_KEI", "CALLERS_JOB_KEY"),
        ("X", None),
        ("", None),
        ("CONFIG_FILE", None),
    ],
)
def test_a_name_of_ours_that_means_nothing_is_a_problem_that_says_what_was_meant(
    tmp_path: Path, name: str, meant: str | None
) -> None:
    (found,) = problems({f"SP_API_PROXY_{name}": "x"}, tmp_path)
    problem, _, advice = found.partition("; ")
    assert problem == f"environment: SP_API_PROXY_{name}: is not a setting"
    if meant is not None:
        assert advice == f"did you mean SP_API_PROXY_{meant}?"
    else:
        assert advice.startswith("names are SP_API_PROXY_ and the key in upper case")


def test_a_misspelt_name_of_another_library_is_named_where_something_is_missing(tmp_path: Path) -> None:
    environ = {"LWA_APPID": SECRET, "SP_API_REFRESH_TOKN": SECRET, "LWA_CLIENT_SECERT": SECRET}
    accounts_, applications_ = problems(environ)
    assert accounts_.endswith("; SP_API_REFRESH_TOKN is set: did you mean SP_API_REFRESH_TOKEN?")
    assert applications_.endswith("; LWA_APPID is set: did you mean LWA_APP_ID?")
    text = BASE.replace("file-secret", "'${LWA_CLIENT_SECRET}'")
    (found,) = problems(environ, tmp_path, text)
    assert found.endswith("LWA_CLIENT_SECRET is not set; did you mean LWA_CLIENT_SECERT?")
    assert SECRET not in accounts_ + applications_ + found


@pytest.mark.parametrize(
    ("missing", "there", "is_near"),
    [
        ("LWA_CLIENT_IDD", "LWA_CLIENT_ID", True),
        ("LWA_APPID", "LWA_APP_ID", True),
        ("ACME_NA_TOKEN", "ACME_EU_TOKEN", False),
        ("ACME_FE_TOKEN", "ACME_EU_TOKEN", False),
        ("SHOP12_EU_TOKEN", "SHOP13_EU_TOKEN", False),
        ("SHOP_EU_TOKEN", "OTHER_EU_TOKEN", False),
        ("SHOP_EU_TOKEN", "SHOP_EU_TOKN", True),
    ],
)
def test_no_other_region_or_account_is_taken_for_what_was_meant(
    tmp_path: Path, missing: str, there: str, is_near: bool
) -> None:
    (found,) = problems({there: SECRET}, tmp_path, BASE.replace("file-token", f"'${{{missing}}}'"))
    assert (f"did you mean {there}?" in found) is is_near


@pytest.mark.parametrize(
    "name",
    ["SP_API_PROXY_SERVICE_HOST", "SP_API_PROXY_SERVICE_PORT", "SP_API_PROXY_SERVICE_PORT_HTTP", "SP_API_PROXY_PORT",
     "SP_API_PROXY_PORT_8080_TCP", "SP_API_PROXY_PORT_8080_TCP_PROTO", "SP_API_PROXY_PORT_8080_TCP_PORT",
     "SP_API_PROXY_PORT_8080_TCP_ADDR", "SP_API_PROXY_PORT_53_UDP", "SP_API_PROXY_CONFIG", "SP_PROXY_LISTEN", "LISTEN"],
)  # fmt: skip
def test_the_variables_of_a_kubernetes_service_and_those_of_others_are_no_settings(tmp_path: Path, name: str) -> None:
    assert load({name: "tcp://10.0.0.1:8080"}, tmp_path).config == load({}, tmp_path).config


@pytest.mark.parametrize("wrong", ["[{a: b}]", "text", "[x]", "{}", "", "{other: text}", "{other: [x]}"])
def test_an_override_of_what_the_file_has_wrong_is_still_a_problem_list(tmp_path: Path, wrong: str) -> None:
    text = f"applications: {{main: {{client_id: c, client_secret: s}}}}\naccounts: {wrong}\n"
    environ = {"SP_API_PROXY_ACCOUNTS_X_APPLICATION": "nowhere", "SP_API_PROXY_ACCOUNTS_X_REFRESH_TOKENS_EU": "t"}
    assert any(
        "accounts.x.application: is not a configured application" in line for line in problems(environ, tmp_path, text)
    )


@pytest.mark.parametrize("value", ["[", "{", "[a", "{a: b", "[a: *b]", "{a: !x b}"])
def test_a_value_that_only_looks_like_a_list_stays_a_text(tmp_path: Path, value: str) -> None:
    config = load({"SP_API_PROXY_APPLICATIONS_MAIN_CLIENT_SECRET": value}, tmp_path).config
    assert config.applications["main"].client_secret.reveal() == value


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("ALLOWED_HOSTS", "[a.test", "allowed_hosts"),
        ("LISTEN_0_ACCOUNTS", "[other", "listen[0].accounts"),
        ("LIMITS", "{max_wait: 1s", "limits"),
    ],
)
def test_a_list_that_is_not_closed_is_a_problem_that_shows_the_form(
    tmp_path: Path, name: str, value: str, key: str
) -> None:
    (found,) = problems({f"SP_API_PROXY_{name}": value}, tmp_path)
    assert found.startswith(f"environment variable SP_API_PROXY_{name}: {key}: is not valid YAML: ")
    assert found.endswith("; a list is [a, b], a mapping {key: value}")


def test_a_file_is_read_wherever_it_is_named_in_a_value(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-file\n")
    named = f"{{file: {tmp_path}/secret}}"
    for variable, value in (
        ("SP_API_PROXY_ACCOUNTS", f"{{my-shop: {{refresh_tokens: {{eu: {named}}}}}, other: {{}}}}"),
        ("SP_API_PROXY_ACCOUNTS_MY_SHOP_REFRESH_TOKENS", f"{{eu: {named}}}"),
        ("SP_API_PROXY_ACCOUNTS_MY_SHOP_REFRESH_TOKENS_EU", named),
    ):
        loaded = load({variable: value}, tmp_path)
        assert accounts(loaded)["my-shop"] == {"eu": "from-file"}
        origins = {key: origin for key, _, origin in loaded.rows()}
        assert origins["accounts.my-shop.refresh_tokens.eu"].startswith(f"environment variable {variable}, from file")


def test_listeners_given_by_number_are_taken_in_order_and_none_is_left_out(tmp_path: Path) -> None:
    environ = {f"SP_API_PROXY_LISTEN_{number}": f"127.0.0.1:{number + 1}" for number in range(12)}
    listen = load(environ, tmp_path).config.listen
    assert [one.address.port for one in listen] == list(range(1, 13))
    (found,) = problems({"SP_API_PROXY_LISTEN_2_ACCOUNT": "other"}, tmp_path)
    assert found == (
        "environment variable SP_API_PROXY_LISTEN_2_ACCOUNT: listen[2]: cannot be set: the last one is listen[0], "
        "the next one is listen[1]"
    )


def test_a_secret_that_begins_with_a_bracket_stays_a_text(tmp_path: Path) -> None:
    environ: dict[str, Any] = {"SP_API_PROXY_APPLICATIONS_MAIN_CLIENT_SECRET": "[x]"}
    assert load(environ, tmp_path).config.applications["main"].client_secret.reveal() == "[x]"


def test_a_suffix_may_name_account_and_region() -> None:
    environ = {"LWA_APP_ID": "id", "LWA_CLIENT_SECRET": "s"}
    tokens = {"SP_API_REFRESH_TOKEN_ACME_NA": "t-na", "SP_API_REFRESH_TOKEN_ACME_EU": "t-eu"}
    accounts = load_config(None, {**environ, **tokens}).config.accounts
    assert list(accounts) == ["acme"]
    assert {region: token.reveal() for region, token in accounts["acme"].refresh_tokens.items()} == {
        "na": "t-na",
        "eu": "t-eu",
    }
