"""The static sandbox examples of Amazon's models, selected by the parameters of a request.

Each response of a model may have `x-amzn-api-sandbox.static`: pairs of named parameters and the response to them.
Parameters that are not named are not compared (DOC "Selling Partner API Sandbox").
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from proxy.simulator.usage_plans import stated_plan

METHODS = frozenset({"get", "head", "post", "put", "patch", "delete"})
CHOOSE = "x-simulator-example"  # a request header: the status of the example to prefer
_INVENTED = "simulated"


@dataclass(frozen=True, slots=True)
class Static:
    """One example: the parameters it names, and its status and content."""

    parameters: Mapping[str, Any]
    status: int
    content: Any


@dataclass(slots=True)
class ModelOperation:
    """One operation of a model: where its parameters are, its plan, and its examples in the order of the file."""

    file: str
    name: str
    method: str
    template: str
    places: dict[str, str] = field(default_factory=dict)
    multi: set[str] = field(default_factory=set)
    plan: tuple[float, float] | None = None
    statics: list[Static] = field(default_factory=list)

    @property
    def segments(self) -> list[str]:
        """The template's segments."""
        return self.template.split("/")[1:]


@dataclass(frozen=True, slots=True)
class Example:
    """A static example as a request: raw path and query, body, and the answer it must get.

    `reason` says why it cannot be replayed as it stands; it is empty where it can.
    """

    file: str
    operation: str
    method: str
    template: str
    path: str
    query: str
    body: bytes | None
    headers: Mapping[str, str]
    status: int
    content: Any
    reason: str = ""

    @property
    def target(self) -> str:
        """The request target."""
        return f"{self.path}?{self.query}" if self.query else self.path


def read_models(folder: Path) -> list[ModelOperation]:
    """Return the operations of every model in a folder, subfolders included; files that are no model are left out."""
    found: list[ModelOperation] = []
    for path in sorted(folder.rglob("*.json")):
        try:
            model = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError:
            continue
        if isinstance(model, dict) and isinstance(model.get("paths"), dict):
            found += _operations(model, path.name)
    return found


def _operations(model: Mapping[str, Any], file: str) -> Iterator[ModelOperation]:
    base = str(model.get("basePath") or "").rstrip("/")
    for path, item in model["paths"].items():
        template = path if not base or path.startswith(f"{base}/") else base + path
        for method, operation in item.items():
            if method in METHODS:
                yield _operation(model, file, method.upper(), template, item, operation)


def _operation(
    model: Mapping[str, Any],
    file: str,
    method: str,
    template: str,
    item: Mapping[str, Any],
    operation: Mapping[str, Any],
) -> ModelOperation:
    found = ModelOperation(file, operation.get("operationId", template), method, template)
    for entry in [*(item.get("parameters") or []), *(operation.get("parameters") or [])]:
        parameter = _resolved(model, entry)
        found.places[parameter["name"]] = parameter["in"]
        if parameter.get("collectionFormat") == "multi":
            found.multi.add(parameter["name"])
    found.plan = stated_plan(operation.get("description") or "")
    for status, entry in operation.get("responses", {}).items():
        sandbox = _resolved(model, entry).get("x-amzn-api-sandbox")
        for static in (sandbox.get("static") or []) if isinstance(sandbox, dict) else []:
            found.statics.append(_static(static, int(status)))
    return found


def _resolved(model: Mapping[str, Any], entry: Any) -> Any:
    for _ in range(10):
        if not (isinstance(entry, dict) and isinstance(entry.get("$ref"), str)):
            break
        reference, entry = entry["$ref"], model
        for key in reference.removeprefix("#/").split("/"):
            entry = entry[key.replace("~1", "/").replace("~0", "~")]
    return entry


def _static(static: Mapping[str, Any], status: int) -> Static:
    named = (static.get("request") or {}).get("parameters") or {}
    parameters = {
        name: value["value"] if isinstance(value, dict) and set(value) == {"value"} else value
        for name, value in named.items()
    }
    # `{}` and a null name a parameter without saying what it must be.
    stated = {name: value for name, value in parameters.items() if value is not None and value != {}}
    return Static(stated, status, static.get("response"))


# Answering a request.


@dataclass(slots=True)
class Models:
    """The operations of a folder of models, ready to answer."""

    operations: list[ModelOperation]

    def find(self, method: str, path: str) -> ModelOperation | None:
        """Return the operation of a raw path; the one with the most literal segments wins."""
        segments = path.split("/")[1:]
        fitting = [
            operation for operation in self.operations if operation.method == method and _fits(operation, segments)
        ]
        return min(fitting, key=lambda operation: operation.template.count("{"), default=None)

    def respond(
        self, operation: ModelOperation, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> Static | None:
        """Return the example that fits the request best: most parameters named, then 2xx, then the file's order."""
        request = _Request.of(operation, path, query, headers, body)
        fitting = [static for static in operation.statics if request.brings(static.parameters)]
        chosen = headers.get(CHOOSE, "")
        return max(
            fitting,
            key=lambda static: (len(static.parameters), str(static.status) == chosen, 200 <= static.status < 300),
            default=None,
        )


def _fits(operation: ModelOperation, segments: Sequence[str]) -> bool:
    wanted = operation.segments
    if _is_greedy(operation) and len(segments) >= len(wanted):
        segments = [*segments[: len(wanted) - 1], "/".join(segments[len(wanted) - 1 :])]
    return len(segments) == len(wanted) and all(
        (bool(given) and want.startswith("{")) or unquote(given) == want
        for want, given in zip(wanted, segments, strict=True)
    )


def _is_greedy(operation: ModelOperation) -> bool:
    return operation.template.startswith("/uploads/") and operation.template.endswith("{resource}")


@dataclass(slots=True)
class _Request:
    """What a request brings, by place and name."""

    operation: ModelOperation
    path: dict[str, str]
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: Any

    @classmethod
    def of(
        cls, operation: ModelOperation, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> "_Request":
        segments = path.split("/", len(operation.segments))[1:]
        named = {
            want[1:-1]: unquote(given)
            for want, given in zip(operation.segments, segments, strict=False)
            if want[:1] == "{"
        }
        pairs: dict[str, list[str]] = {}
        for name, value in parse_qsl(query, keep_blank_values=True):
            pairs.setdefault(name, []).append(value)
        try:
            content = json.loads(body) if body else None
        except ValueError:
            content = None
        return cls(operation, named, pairs, headers, content)

    def brings(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether every named parameter has the named value."""
        return all(self._has(name, value) for name, value in parameters.items())

    def _has(self, name: str, value: Any) -> bool:
        place = self.operation.places.get(name, "body" if name == "body" else "")
        if place == "body" or (not place and isinstance(value, dict)):
            return bool(self.body == value)
        if place == "path" or name in self.path:
            return self.path.get(name) == _text(value)
        if place == "header":
            return self.headers.get(name.lower()) == _text(value)
        return ",".join(self.query.get(name, ())) == _text(value) if name in self.query else False


def _text(value: Any) -> str:
    """Return a value as it stands in a path, query or header."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)


# The examples as requests, for tests.


def examples(folder: Path) -> Iterator[Example]:
    """Yield every static example of the models in a folder as a request that can be sent."""
    models = Models(read_models(folder))
    for operation in models.operations:
        for static in operation.statics:
            yield _example(models, operation, static)


def _example(models: Models, operation: ModelOperation, static: Static) -> Example:
    path = "/" + "/".join(_segment(operation, static, segment) for segment in operation.segments)
    query = "&".join(_query(operation, static))
    bodies = [value for name, value in static.parameters.items() if _is_body(operation, name, value)]
    body = json.dumps(bodies[0]).encode() if bodies else None
    headers = {
        name.lower(): _text(value)
        for name, value in static.parameters.items()
        if operation.places.get(name) == "header"
    }
    headers[CHOOSE] = str(static.status)
    reason = ""
    if body is not None and operation.method in {"GET", "HEAD"}:
        reason = f"it names a body for {operation.method}, which Amazon's front end refuses"
    elif models.find(operation.method, path) is not operation:
        reason = "its path is another operation's, by the models themselves"
    elif (found := models.respond(operation, path, query, headers, body or b"")) is None or (
        (found.status, found.content) != (static.status, static.content)
    ):
        reason = "another example names the same parameters with the same status"
    return Example(
        operation.file,
        operation.name,
        operation.method,
        operation.template,
        path,
        query,
        body,
        headers,
        static.status,
        static.content,
        reason,
    )


def _segment(operation: ModelOperation, static: Static, segment: str) -> str:
    if not segment.startswith("{"):
        return segment
    value = _text(static.parameters.get(segment[1:-1], _INVENTED)) or _INVENTED
    return quote(value, safe="/" if _is_greedy(operation) else "")


def _query(operation: ModelOperation, static: Static) -> Iterator[str]:
    for name, value in static.parameters.items():
        in_query = operation.places.get(name) == "query"
        if not in_query and (operation.places.get(name) or _is_body(operation, name, value)):
            continue
        values = value if isinstance(value, list) and name in operation.multi else [value]
        yield from (f"{quote(name, safe='')}={quote(_text(one), safe=',')}" for one in values)


def _is_body(operation: ModelOperation, name: str, value: Any) -> bool:
    place = operation.places.get(name, "")
    return place == "body" or (not place and (name == "body" or isinstance(value, dict)))
