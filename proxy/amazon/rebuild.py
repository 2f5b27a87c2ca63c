"""How is the operation table rebuilt from a folder of Amazon's models? The maintainer's command.

The models say method, path, plan and sandbox; `facts.yaml`, kept by hand, says what they do not: restricted and
grantless operations, limits over all accounts, removal dates, and plans that stand in Amazon's SDK alone. The same
models and facts always give the same bytes.
"""

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from proxy.amazon.operations import COLUMNS, read_rows
from proxy.amazon.usage_plans import UsagePlan, parse_usage_plan

HERE = Path(__file__).parent
TABLE = HERE / "operations.csv"
FACTS = HERE / "facts.yaml"

METHODS = frozenset({"get", "head", "post", "put", "patch", "delete"})

Row = dict[str, str]
Key = tuple[str, str, str]  # method, path, operationId

# `ordersV0.json`, `orders_2026-01-01.json`, `replenishment-2022-11-07.json`, `InvoicesApiModel_2024-06-19.json`
_FILE_NAME = re.compile(r"(?P<api>[A-Za-z]+?)(?:ApiModel|Api)?[_-]?(?P<version>[vV]?\d{4}-\d{2}-\d{2}|[vV]\d+)?")
_DATE_OR_NUMBER = re.compile(r"v?\d{4}-\d{2}-\d{2}|v\d+", re.IGNORECASE)


def main(argv: list[str] | None = None) -> int:
    """Rebuild the table and say what changed; return 0, or 1 where a file could not be read or `--check` found news."""
    options = _parser().parse_args(argv)
    before = read_rows(options.table.read_text(encoding="utf-8")) if options.table.exists() else []
    facts = load_facts(options.facts)
    warnings: list[str] = []
    fresh = list(_rows_of_folder(options.models, facts, warnings))
    after = merged([] if options.prune else before, fresh, facts, warnings)
    news = list(changes(before, after))
    for line in [*news, _summary(before, after, news)]:
        sys.stdout.write(f"{line}\n")
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")
    if not options.check:
        (options.output or options.table).write_text(as_csv(after), encoding="utf-8")
    unreadable = not fresh or any(warning.startswith("skipped ") for warning in warnings)
    return 1 if unreadable or (options.check and news) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sp-api-proxy operations rebuild",
        description="Rebuild the operation table from a folder of Amazon's Swagger models, and say what changed.",
        epilog="Models are at https://github.com/amzn/selling-partner-api-models. APIs without a model in the folder "
        "keep their rows, unless --prune is given. Exit code 1: a file could not be read, or --check found changes.",
    )
    parser.add_argument("models", type=Path, metavar="MODELS_DIR", help="searched for *.json, subfolders included")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to compare with and to replace")
    parser.add_argument("--facts", type=Path, default=FACTS, help="what the models do not say")
    parser.add_argument("--output", type=Path, help="write here instead of over the table")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--prune", action="store_true", help="drop the rows of APIs without a model in the folder")
    return parser


# What the models say.


def _rows_of_folder(folder: Path, facts: "Facts", warnings: list[str]) -> Iterator[Row]:
    files = sorted(folder.rglob("*.json"))
    if not files:
        warnings.append(f"skipped {folder}: no *.json in it")
    for path in files:
        try:
            model = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as exc:
            warnings.append(f"skipped {path.name}: not readable as JSON ({type(exc).__name__})")
            continue
        if not isinstance(model, dict) or not isinstance(model.get("paths"), dict):
            warnings.append(f"skipped {path.name}: no Swagger model")
            continue
        yield from rows_of_model(model, path.name, facts, warnings)


def rows_of_model(model: Mapping[str, Any], file_name: str, facts: "Facts", warnings: list[str]) -> Iterator[Row]:
    """Yield a row for each operation of a Swagger 2 or OpenAPI 3 model; what cannot be read is warned about."""
    api, version = api_and_version(model, file_name, facts)
    for path, item in model["paths"].items():
        if not isinstance(item, dict):
            warnings.append(f"{file_name}: {path} is no path item")
            continue
        for method, operation in item.items():
            if method.lower() in METHODS and isinstance(operation, dict):
                yield _row(model, api, version, _joined(model, path), method.upper(), item, operation, warnings)


def api_and_version(model: Mapping[str, Any], file_name: str, facts: "Facts") -> tuple[str, str]:
    """Return `orders` and `v0` for `ordersV0.json`: the name from the file, the version from the model if it has one."""
    stem = file_name.removesuffix(".json")
    match = _FILE_NAME.fullmatch(stem)
    name = match["api"] if match else re.sub(r"\W+", "", stem)
    info = model.get("info")
    stated = str(info.get("version") or "") if isinstance(info, dict) else ""
    version = stated if _DATE_OR_NUMBER.fullmatch(stated) else (match and match["version"]) or stated or "v1"
    api = name[:1].lower() + name[1:]
    version = re.sub(r"(?i)^v(?=\d{4}-)", "", version)
    return facts.names.get(api, api), version[:1].lower() + version[1:]


def _joined(model: Mapping[str, Any], path: str) -> str:
    base = str(model.get("basePath") or "").rstrip("/")
    return path if not base or path == base or path.startswith(f"{base}/") else base + path


def _row(
    model: Mapping[str, Any],
    api: str,
    version: str,
    path: str,
    method: str,
    item: Mapping[str, Any],
    operation: Mapping[str, Any],
    warnings: list[str],
) -> Row:
    name = operation.get("operationId")
    if not isinstance(name, str) or not name:
        name = _derived_name(method, path)
        warnings.append(f"{api}.{version}: {method} {path} has no operationId, called {name}")
    plan = _stated_plan(item, operation)
    if plan is not None and not plan.stated:
        warnings.append(f"{api}.{version}.{name}: its usage plan states no numbers")
    row = dict.fromkeys(COLUMNS, "")
    row.update(api=api, version=version, operationId=name, method=method, path=path)
    row.update(rate=plan.rate if plan else "", burst=plan.burst if plan else "")
    row.update(restricted="no", deprecated=_yes(operation.get("deprecated")), sandbox=_sandbox(item, operation))
    row.update(sandbox_only=_yes(_is_sandbox_only(model, item, operation)))
    return row


def _derived_name(method: str, path: str) -> str:
    words = re.findall(r"[A-Za-z0-9]+", path)
    return method.lower() + "".join(word[:1].upper() + word[1:] for word in words[-3:])


def _stated_plan(item: Mapping[str, Any], operation: Mapping[str, Any]) -> UsagePlan | None:
    for place in (operation, item):
        text = place.get("description")
        if isinstance(text, str) and (plan := parse_usage_plan(text)):
            return plan
    return None


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _sandbox(item: Mapping[str, Any], operation: Mapping[str, Any]) -> str:
    """Return `dynamic` where the operation or its path says so, `static` where a response has examples."""
    responses = operation.get("responses")
    answers = list(responses.values()) if isinstance(responses, dict) else []
    forms = [_form(place) for place in (operation, item, *answers)]
    return next((form for form in ("dynamic", "static") if form in forms), "")


def _form(place: object) -> str:
    sandbox = place.get("x-amzn-api-sandbox") if isinstance(place, dict) else None
    if not isinstance(sandbox, dict):
        return ""
    return next((form for form in ("dynamic", "static") if form in sandbox), "")


def _is_sandbox_only(model: Mapping[str, Any], item: Mapping[str, Any], operation: Mapping[str, Any]) -> bool:
    only = operation.get("x-amzn-api-sandbox-only") or item.get("x-amzn-api-sandbox-only")
    return bool(only) or "sandbox" in str(model.get("host") or "")


# What the models do not say.


class Facts:
    """`facts.yaml`: names that the rule for file names gets wrong, and facts by operation."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.names: dict[str, str] = dict(tree.get("names") or {})
        self.operations: dict[tuple[str, str, str], dict[str, Any]] = {
            (*api.split(" "), operation): facts or {}
            for api, operations in (tree.get("operations") or {}).items()
            for operation, facts in operations.items()
        }

    def apply(self, row: Row) -> Row:
        """Return the row with everything that is known besides its model."""
        facts = self.operations.get((row["api"], row["version"], row["operationId"]), {})
        rate, burst = facts.get("sdk_plan") or ("", "")
        restricted = facts.get("restricted", "")
        generic = "" if not restricted or "{" not in row["path"] else _yes(facts.get("generic_path", True))
        known = {
            "restricted": _yes(restricted),
            "restricted_certainty": restricted,
            "rdt_generic_path_ok": generic,
            "data_elements": ";".join(facts.get("data_elements") or ()),
            "grantless_scope": facts.get("scope", ""),
            "removal_date": str(facts.get("removed", "")),
            "deprecated": _yes(facts.get("removed") or row["deprecated"] == "yes"),
            "fallback_rate": str(rate),
            "fallback_burst": str(burst),
            "app_rate": str(facts.get("app_rate", "")),
        }
        return {**row, **known}


def load_facts(path: Path) -> Facts:
    """Return the Facts of a file; raises what reading it raises: it is ours, and a mistake in it is ours to mend."""
    return Facts(yaml.safe_load(path.read_text(encoding="utf-8")) or {})


def merged(before: Iterable[Row], fresh: Iterable[Row], facts: Facts, warnings: list[str]) -> list[Row]:
    """Return the rows of the models, those kept of other APIs, and every fact, in the table's order."""
    fresh = list(fresh)
    modelled = {(row["api"], row["version"]) for row in fresh}
    kept = [row for row in before if (row["api"], row["version"]) not in modelled]
    rows = sorted((facts.apply(row) for row in [*kept, *fresh]), key=_order)
    known = {(row["api"], row["version"], row["operationId"]) for row in rows}
    apis = {key[:2] for key in known}
    for key in sorted(set(facts.operations) - known):
        if key[:2] in apis:
            warnings.append(f"the facts name {'.'.join(key)}, which no model has")
    return rows


def _order(row: Row) -> tuple[str, ...]:
    return (row["api"], row["version"], row["path"], row["method"])


def as_csv(rows: Iterable[Row]) -> str:
    """Return the table's text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# What changed.


def changes(before: Iterable[Row], after: Iterable[Row]) -> Iterator[str]:
    """Yield a line for each operation that is new, gone or different."""
    old, new = _by_key(before), _by_key(after)
    for key in sorted(old.keys() | new.keys(), key=lambda key: _order(new.get(key) or old[key])):
        if key not in old:
            yield f"+ {_name(new[key])} {key[0]} {key[1]}"
        elif key not in new:
            yield f"- {_name(old[key])} {key[0]} {key[1]}"
        else:
            yield from _differences(old[key], new[key])


def _by_key(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    return {(row["method"], row["path"], row["api"], row["version"]): row for row in rows}


def _name(row: Row) -> str:
    return f"{row['api']}.{row['version']}.{row['operationId']}"


def _differences(old: Row, new: Row) -> Iterator[str]:
    for column in COLUMNS:
        if old[column] != new[column]:
            yield f"~ {_name(new)} {column}: {old[column] or '(none)'} -> {new[column] or '(none)'}"


def _summary(before: list[Row], after: list[Row], news: list[str]) -> str:
    counts = {sign: sum(line.startswith(sign) for line in news) for sign in "+-~"}
    if not news:
        return f"no change: {len(after)} operations"
    return f"{len(before)} -> {len(after)} operations: {counts['+']} new, {counts['-']} gone, {counts['~']} changes"


if __name__ == "__main__":
    raise SystemExit(main())
