"""The JSON Schema of a configuration file, for editors; includes the short forms and `{file: …}` and `${NAME}`."""

from typing import Any

from proxy.config.model import Config, Policy, Settings, default_as_written
from proxy.config.types import MIN_STORE_KEY

_FROM_FILE = {
    "type": "object",
    "properties": {"file": {"type": "string", "description": "The value is the content of this file."}},
    "required": ["file"],
    "additionalProperties": False,
}
_FROM_ENVIRONMENT = {
    "type": "string",
    "pattern": r"\$\{[^}]+\}",
    "description": "The value is that of an environment variable.",
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a configuration file."""
    schema = Config.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    kinds: list[type[Settings]] = [*Settings.__subclasses__(), *Policy.__subclasses__()]
    for kind in kinds:
        _write_defaults(kind, (schema if kind is Config else definitions.get(kind.__name__, {})).get("properties", {}))
    for group in (schema, *definitions.values()):
        group["properties"] = {name: _with_references(value) for name, value in group["properties"].items()}
    for name, field in Config.model_fields.items():
        # pydantic omits a description that equals the docstring of the group.
        schema["properties"][name]["description"] = field.description
    one: dict[str, Any] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Listener"}]}
    schema["properties"]["listen"] = {
        "description": schema["properties"]["listen"]["description"],
        "anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}],
    }
    key = {"type": "string", "minLength": MIN_STORE_KEY, "writeOnly": True}
    one = {"anyOf": [key, _FROM_ENVIRONMENT, _FROM_FILE]}
    schema["properties"]["store_key"] = {
        "description": schema["properties"]["store_key"]["description"],
        "anyOf": [*one["anyOf"], {"type": "array", "items": one}],
    }
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sp-api-proxy"}
    return {**title, **_without(schema, "title")}


def _write_defaults(kind: type[Settings], properties: dict[str, Any]) -> None:
    """Write defaults as in a file (`10s`), where the Config holds another form (10.0)."""
    for name, setting in properties.items():
        if isinstance(default := default_as_written(kind.model_fields[name]), int | float | str):
            setting["default"] = default


def _without(schema: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != key}


def _with_references(value: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value, allowing `{file: …}` and `${NAME}` for every single value."""
    if patterns := value.get("patternProperties"):
        ((pattern, kind),) = patterns.items()
        return {
            **_without(value, "patternProperties"),
            "propertyNames": {"pattern": pattern},
            "additionalProperties": kind,
        }
    extra = value.get("additionalProperties")
    if isinstance(extra, dict) and "$ref" not in extra:
        return {**value, "additionalProperties": _with_references(extra)}
    if "$ref" in value or value.get("type") in ("array", "object"):
        return value
    described: dict[str, Any] = {str(key): value[key] for key in ("description", "default") if key in value}
    return {**described, "anyOf": [_without(_without(value, "description"), "default"), _FROM_ENVIRONMENT, _FROM_FILE]}
