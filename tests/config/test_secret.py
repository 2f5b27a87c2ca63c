"""No form of a configuration and no error message holds a secret."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.config import (
    ConfigError,
    Secret,
    dump,
)
from tests.config.loading import APPLICATIONS, BASE, SECRET, load, problems


def test_secrets_are_stars_in_the_rows(tmp_path: Path) -> None:
    rows = {key: value for key, value, _ in load(tmp_path, BASE).rows()}
    assert rows["applications.main.client_secret"] == "***"
    assert rows["accounts.acme.refresh_tokens.eu"] == "***"
    assert rows["applications.main.client_id"] == "client"


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


def test_white_space_around_a_secret_is_not_part_of_it(tmp_path: Path) -> None:
    config = load(tmp_path, BASE.replace("token-eu", "'  Atzr|x  '")).config
    assert config.accounts["acme"].refresh_tokens["eu"].reveal() == "Atzr|x"


@pytest.mark.parametrize("written", ['""', '"  "', '"\\n"', "", "[]", "{}"])
def test_an_empty_secret_is_refused(tmp_path: Path, written: str) -> None:
    (found,) = problems(tmp_path, BASE.replace("token-eu", written))
    assert found == "config.yaml:2: accounts.acme.refresh_tokens.eu: must be a text and not empty"


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
