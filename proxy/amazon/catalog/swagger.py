"""Reader of Amazon's published models: the operations of one Swagger 2 file (OpenAPI 3 is supported too).

Unexpected parts of a model are skipped with a warning, so that a new model does not stop a rebuild.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from proxy.amazon.catalog.usage_plan_tables import UsagePlan, parse_usage_plan
from proxy.amazon.operations import COLUMNS

METHODS = frozenset({"get", "head", "post", "put", "patch", "delete"})

Row = dict[str, str]

# `ordersV0`, `orders_2026-01-01`, `replenishment-2022-11-07`, `deliveryShipmentInvoiceV2022-07-01`,
# `InvoicesApiModel_2024-06-19`, `sales`
_FILE_NAME = re.compile(r"(?P<api>[A-Za-z]\w*?)(?:ApiModel|Api)?[_-]?(?P<version>[vV]?\d{4}-\d{2}-\d{2}|[vV]\d+)?")
_VERSION = re.compile(r"[vV]?(?P<date>\d{4}-\d{2}-\d{2})|[vV](?P<number>\d+)")


@dataclass(frozen=True, slots=True)
class Model:
    """The common properties of a model's operations; `file` is its name in warnings."""

    file: str
    api: str
    version: str
    base_path: str
    sandbox_host: bool
    paths: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The model's name in the table, `orders.v0`."""
        return f"{self.api}.{self.version}"


def model_of(tree: object, file: str, names: Mapping[str, str]) -> Model | None:
    """Return the Model of a parsed JSON file, None for other JSON; `names` corrects names made from file names."""
    if not isinstance(tree, dict) or not isinstance(tree.get("paths"), dict):
        return None
    servers = _servers(tree)
    base_path = tree.get("basePath") or (servers[0][1] if servers else "")
    paths = {path: item for path, item in tree["paths"].items() if not path.startswith("x-")}
    name = api_name(file)
    return Model(
        file=file,
        api=names.get(name, name),
        version=_version(tree, file, paths),
        base_path=str(base_path).strip("/"),
        sandbox_host=bool(servers) and all("sandbox" in host for host, _ in servers),
        paths=paths,
    )


def rows_of_model(model: Model, warnings: list[str]) -> Iterator[Row]:
    """Yield a row of the table for each operation; what cannot be read is reported in `warnings`."""
    for path, item in model.paths.items():
        if not isinstance(item, dict):
            warnings.append(f"{model.file}: {path} is no path item")
            continue
        for method, operation in item.items():
            if method.lower() not in METHODS:
                continue
            if isinstance(operation, dict):
                yield _row(model, method.upper(), _joined(model.base_path, path), item, operation, warnings)
            else:
                warnings.append(f"{model.file}: {method} of {path} is no operation")


# Names. Amazon names the file after the API, and puts the version into every path.


def api_name(file: str) -> str:
    """Return `orders` for `orders-api-model/ordersV0.json`: the file's name without its version."""
    stem = re.split(r"[/\\]", file)[-1].removesuffix(".json")
    match = _FILE_NAME.fullmatch(stem)
    name = match["api"] if match else re.sub(r"\W+", "", stem)
    return name[:1].lower() + name[1:]


def _version(tree: Mapping[str, Any], file: str, paths: Mapping[str, Any]) -> str:
    """Return `v0` or `2026-01-01`: the one of all paths, or else of `info.version`, or else of the file's name."""
    in_paths = {version for path in paths for segment in path.split("/") if (version := _plain_version(segment))}
    if len(in_paths) == 1:
        return in_paths.pop()
    info = tree.get("info")
    stated = str(info.get("version") or "") if isinstance(info, dict) else ""
    match = _FILE_NAME.fullmatch(re.split(r"[/\\]", file)[-1].removesuffix(".json"))
    in_name = match["version"] or "" if match else ""
    return _plain_version(stated) or _plain_version(in_name) or "v1"


def _plain_version(text: str) -> str:
    match = _VERSION.fullmatch(text)
    return (match["date"] or f"v{match['number']}") if match else ""


# Hosts and paths.


def _servers(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return host and path of each server of the model, as Swagger 2 or as OpenAPI 3 writes them."""
    if isinstance(tree.get("host"), str):
        return [(tree["host"], "")]
    listed = tree.get("servers")
    urls = [server.get("url") for server in listed if isinstance(server, dict)] if isinstance(listed, list) else []
    return [_split(url) for url in urls if isinstance(url, str)]


def _split(url: str) -> tuple[str, str]:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", ""
    return parts.netloc, parts.path


def _joined(base_path: str, path: str) -> str:
    path = f"/{path.lstrip('/')}"
    return path if not base_path or f"{path}/".startswith(f"/{base_path}/") else f"/{base_path}{path}"


# One operation.


def _row(
    model: Model, method: str, path: str, item: Mapping[str, Any], operation: Mapping[str, Any], warnings: list[str]
) -> Row:
    name = operation.get("operationId")
    if not isinstance(name, str) or not name.strip():
        name = _derived_name(method, path)
        warnings.append(f"{model.title}: {method} {path} has no operationId, called {name}")
    plan = _stated_plan(item, operation)
    if plan is not None and not plan.stated:
        warnings.append(f"{model.title}.{name}: no numbers can be read from its usage plan")
    row = dict.fromkeys(COLUMNS, "")
    row.update(api=model.api, version=model.version, operationId=name.strip(), method=method, path=path)
    row.update(rate=plan.rate if plan else "", burst=plan.burst if plan else "")
    row.update(deprecated=yes_or_no(operation.get("deprecated")), sandbox=_sandbox(item, operation))
    row.update(sandbox_only=yes_or_no(model.sandbox_host or _is_sandbox_only(item, operation)))
    return row


def _derived_name(method: str, path: str) -> str:
    words = re.findall(r"[A-Za-z0-9]+", path)
    return method.lower() + "".join(word[:1].upper() + word[1:] for word in words[-3:])


def _stated_plan(item: Mapping[str, Any], operation: Mapping[str, Any]) -> UsagePlan | None:
    """Return the plan of the operation's own description, or else of its path's."""
    texts = [source.get("description") for source in (operation, item)]
    plans = [parse_usage_plan(text) for text in texts if isinstance(text, str)]
    return next((plan for plan in plans if plan is not None), None)


def yes_or_no(value: object) -> str:
    """Return a truth value as in the table."""
    return "yes" if value else "no"


def _sandbox(item: Mapping[str, Any], operation: Mapping[str, Any]) -> str:
    """Return `dynamic` where the operation or its path says so, `static` where a response has examples."""
    responses = operation.get("responses")
    entries = list(responses.values()) if isinstance(responses, dict) else []
    forms = [_form(source) for source in (operation, item, *entries)]
    return next((form for form in ("dynamic", "static") if form in forms), "")


def _form(source: object) -> str:
    sandbox = source.get("x-amzn-api-sandbox") if isinstance(source, dict) else None
    if not isinstance(sandbox, dict):
        return ""
    return next((form for form in ("dynamic", "static") if form in sandbox), "")


def _is_sandbox_only(item: Mapping[str, Any], operation: Mapping[str, Any]) -> bool:
    return any(source.get("x-amzn-api-sandbox-only") for source in (operation, item))
