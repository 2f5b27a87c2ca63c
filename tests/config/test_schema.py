"""The JSON Schema accepts and rejects what the proxy does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config import (
    Config,
    Secret,
)
from proxy.config.schema import json_schema
from tests.config.loading import groups, load


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
