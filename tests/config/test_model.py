"""Defaults, descriptions and groups of settings."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from proxy.config import (
    dump,
)
from tests.config.loading import APPLICATIONS, BASE, groups, load, problems


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


@pytest.mark.parametrize(
    "extra",
    ["user_agent: {name: ''}", "user_agent: {name: 'ä'}", 'user_agent: {name: "a\\nb"}',
     f"user_agent: {{name: {'x' * 101}}}", f"user_agent: {{version: {'x' * 41}}}",
     f"user_agent: {{platform: {'x' * 41}}}", 'user_agent: {language: "\\r\\nx: y"}'],
)  # fmt: skip
def test_a_user_agent_that_no_header_can_hold_is_refused(tmp_path: Path, extra: str) -> None:
    (found,) = problems(tmp_path, BASE.replace("client_secret: hush", f"client_secret: hush, {extra}"))
    assert found.startswith("config.yaml:1: applications.main.user_agent.")


def test_with_one_application_an_account_need_not_say_which(tmp_path: Path) -> None:
    config = load(tmp_path, BASE).config
    assert config.application_of(config.accounts["acme"]) == ("main", config.applications["main"])


def test_an_account_may_have_an_environment_of_its_own(tmp_path: Path) -> None:
    text = (
        APPLICATIONS + "accounts: {a: {environment: sandbox, refresh_tokens: {eu: t}}, b: {refresh_tokens: {eu: t}}}\n"
    )
    config = load(tmp_path, text).config
    assert [config.environment_of(account) for account in config.accounts.values()] == ["sandbox", "production"]


def test_every_setting_has_a_description_that_ends_as_a_sentence() -> None:
    assert len(groups()) >= 11
    lacking = [
        f"{name}.{field}"
        for name, group in groups().items()
        for field, info in group.model_fields.items()
        if not (info.description or "").endswith((".", ")"))
    ]
    assert lacking == []


def test_a_socket_mode_is_octal_and_shown_as_it_is_written(tmp_path: Path) -> None:
    for text in ("0660", "660", "'0660'"):
        config = load(tmp_path, f"{BASE}listen: {{address: 'unix:/x', mode: {text}}}\n").config
        assert config.listen[0].mode == 0o660
        assert dump(config)["listen"][0]["mode"] == "0660"
