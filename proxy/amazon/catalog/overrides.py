"""Facts about operations that Amazon's models lack, read from `overrides.yaml` for the rebuild."""

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from proxy.amazon.catalog.swagger import Row, yes_or_no

Key = tuple[str, str, str]  # api, version, operationId


class BadInput(Exception):
    """An input file of the command cannot be used; the message has its name and the reason."""


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_positive(value)


def _is_plan(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_positive(value[0]) and _is_count(value[1])


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_day(value: object) -> bool:
    try:
        return dt.date.fromisoformat(str(value)).isoformat() == str(value)
    except ValueError:
        return False


# The facts of an operation: a description of the form, and its check.
_KINDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "restricted": ("certain, likely or disputed", lambda value: value in ("certain", "likely", "disputed")),
    "generic_path": ("true or false", lambda value: isinstance(value, bool)),
    "data_elements": ("a list of names", _is_names),
    "scope": ("the name of a scope", lambda value: isinstance(value, str)),
    "removed": ("YYYY-MM-DD", _is_day),
    "sdk_plan": ("[calls per second, burst]", _is_plan),
    "app_rate": ("calls per second", _is_positive),
    "app_burst": ("a number of calls", _is_count),
    "only_reads": ("true or false", lambda value: isinstance(value, bool)),
}


class Overrides:
    """Corrections of names made from file names, and facts by operation."""

    def __init__(self, names: Mapping[str, str], operations: Mapping[Key, Mapping[str, Any]]) -> None:
        self.names = names
        self.operations = operations

    def apply(self, row: Row) -> Row:
        """Return the row with the facts of its operation."""
        facts = self.operations.get((row["api"], row["version"], row["operationId"]), {})
        rate, burst = facts.get("sdk_plan", ("", ""))
        restricted = facts.get("restricted", "")
        has_generic = restricted and "{" in row["path"]
        return {
            **row,
            "restricted": yes_or_no(restricted),
            "restricted_certainty": restricted,
            "rdt_generic_path_ok": yes_or_no(facts.get("generic_path", True)) if has_generic else "",
            "data_elements": ";".join(facts.get("data_elements", ())),
            "grantless_scope": facts.get("scope", ""),
            "removal_date": str(facts.get("removed", "")),
            "deprecated": yes_or_no("removed" in facts or row["deprecated"] == "yes"),
            "fallback_rate": str(rate),
            "fallback_burst": str(burst),
            "app_rate": str(facts.get("app_rate", "")),
            "app_burst": str(facts.get("app_burst", "")),
            "only_reads": "yes" if facts.get("only_reads") else "",
        }

    def unmatched(self, rows: Iterable[Row]) -> Iterator[str]:
        """Yield a warning for each fact about an API or operation that the rows do not have."""
        known = {(row["api"], row["version"], row["operationId"]) for row in rows}
        versions = {key[:2] for key in known}
        for api, version in sorted({key[:2] for key in self.operations} - versions):
            yield f"the facts name the API {api} {version}, which the table does not have"
        for key in sorted(self.operations.keys() - known):
            if key[:2] in versions:
                yield f"the facts name {'.'.join(key)}, which does not exist"
        for name in sorted(set(self.names.values()) - {api for api, _ in versions}):
            yield f"the facts call an API {name}, which the table does not have"


def load_overrides(path: Path) -> Overrides:
    """Return the Overrides of a file; raise BadInput with the name of the malformed entry."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        raise BadInput(f"{path}: not readable as YAML: {exc}") from exc
    try:
        return _overrides_in(_mapping(tree, "the file"))
    except BadInput as exc:
        raise BadInput(f"{path}: {exc}") from exc


def _overrides_in(tree: Mapping[Any, Any]) -> Overrides:
    for section in tree.keys() - {"names", "operations"}:
        raise BadInput(f"{section} is neither names nor operations")
    names = _mapping(tree.get("names"), "names")
    operations: dict[Key, Mapping[str, Any]] = {}
    for api, entries in _mapping(tree.get("operations"), "operations").items():
        name, _, version = str(api).partition(" ")
        for operation, facts in _mapping(entries, str(api)).items():
            operations[name, version, str(operation)] = _checked(facts, f"{api}: {operation}")
    return Overrides({str(rule): str(name) for rule, name in names.items()}, operations)


def _checked(entry: object, where: str) -> Mapping[str, Any]:
    facts = _mapping(entry, where)
    for fact, value in facts.items():
        if fact not in _KINDS:
            raise BadInput(f"{where}: {fact} is none of {', '.join(_KINDS)}")
        form, is_valid = _KINDS[fact]
        if not is_valid(value):
            raise BadInput(f"{where}: {fact} must be {form}, not {value!r}")
    return facts


def _mapping(value: object, where: str) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadInput(f"{where} is no mapping")
    return value
