"""Which of Amazon's operations is a request, and what is known about it?

The table ships inside the package (`operations.csv`); `rebuild.py` makes it from Amazon's models. Matching walks a
tree of path segments, so its cost grows with the depth of a path and not with the number of operations, and nothing
is remembered of the paths that were seen.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal
from urllib.parse import unquote

# The one path parameter that holds slashes (model uploads_2020-11-01: a resource is itself a path).
GREEDY = frozenset({"/uploads/2020-11-01/uploadDestinations/{resource}"})

COLUMNS = (
    "api",
    "version",
    "operationId",
    "method",
    "path",
    "rate",
    "burst",
    "restricted",
    "rdt_generic_path_ok",
    "data_elements",
    "grantless_scope",
    "deprecated",
    "restricted_certainty",
    "removal_date",
    "sandbox",
    "sandbox_only",
    "fallback_rate",
    "fallback_burst",
    "app_rate",
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: how it is called, its usage plan, and which token it wants.

    `rate` is in calls per second, `burst` in calls, both of one account and application; `app_rate` is the limit over
    all accounts of an application. None where nothing is published. `rate_source` says whether the plan is the
    model's or that of Amazon's SDK.
    """

    name: str
    api: str
    version: str
    operation_id: str
    method: str
    template: str
    rate: float | None
    burst: int | None
    rate_source: Literal["model", "sdk", ""]
    app_rate: float | None
    restricted: bool
    restricted_certainty: str
    generic_path: bool
    data_elements: tuple[str, ...]
    scope: str
    deprecated: bool
    removal_date: str
    sandbox: str
    sandbox_only: bool


def operation_of(row: Mapping[str, str]) -> Operation:
    """Return the Operation of one row of the table; raise ValueError or KeyError where it is no such row."""
    source: Literal["model", "sdk", ""] = "model" if row["rate"] else "sdk" if row["fallback_rate"] else ""
    burst = _number(row["burst"] or row["fallback_burst"])
    return Operation(
        name=f"{row['api']}.{row['version']}.{row['operationId']}",
        api=row["api"],
        version=row["version"],
        operation_id=row["operationId"],
        method=row["method"],
        template=row["path"],
        rate=_number(row["rate"] or row["fallback_rate"]),
        burst=None if burst is None else int(burst),
        rate_source=source,
        app_rate=_number(row["app_rate"]),
        restricted=row["restricted"] == "yes",
        restricted_certainty=row["restricted_certainty"],
        generic_path=row["rdt_generic_path_ok"] == "yes",
        data_elements=tuple(element for element in row["data_elements"].split(";") if element),
        scope=row["grantless_scope"],
        deprecated=row["deprecated"] == "yes",
        removal_date=row["removal_date"],
        sandbox=row["sandbox"],
        sandbox_only=row["sandbox_only"] == "yes",
    )


def _number(text: str) -> float | None:
    return float(text) if text else None


@dataclass(slots=True)
class _Node:
    """One segment of the paths: what may follow it, and the operations that end here, by method."""

    literals: dict[str, "_Node"] = field(default_factory=dict)
    parameter: "_Node | None" = None
    greedy: "_Node | None" = None
    operations: dict[str, Operation] = field(default_factory=dict)


class OperationTable:
    """Every known operation, found by method and raw path."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._operations = tuple(operations)
        self._root = _Node()
        self._deepest = 0
        for operation in self._operations:
            self._add(operation)

    def __iter__(self) -> Iterator[Operation]:
        return iter(self._operations)

    def __len__(self) -> int:
        return len(self._operations)

    def match(self, method: str, raw_path: str) -> Operation | None:
        """Return the operation of a request, None where the table has none.

        `raw_path` is the path as it goes over the wire, without its query. It is split before it is decoded, so that
        `%2F` stays inside its segment; literals win over parameters; a parameter takes one segment that is not empty.
        """
        # No deeper than the table: a path of ten thousand slashes is one piece more, and matches nothing.
        segments = raw_path.split("/", self._deepest + 1)
        return _find(self._root, method, segments, 1) if segments[0] == "" else None

    def _add(self, operation: Operation) -> None:
        segments = operation.template.split("/")[1:]
        self._deepest = max(self._deepest, len(segments))
        node = self._root
        for index, segment in enumerate(segments):
            if not segment.startswith("{"):
                node = node.literals.setdefault(segment, _Node())
            elif operation.template in GREEDY and index == len(segments) - 1:
                node.greedy = node = node.greedy or _Node()
            else:
                node.parameter = node = node.parameter or _Node()
        # Two models with one method and path: the first by api and version stays, so that the order of files is moot.
        node.operations.setdefault(operation.method, operation)


def _find(node: _Node, method: str, segments: list[str], index: int) -> Operation | None:
    if index == len(segments):
        return node.operations.get(method)
    segment = segments[index]
    if not segment:
        return None
    literal = node.literals.get(unquote(segment) if "%" in segment else segment)
    found = _find(literal, method, segments, index + 1) if literal is not None else None
    if found is None and node.parameter is not None and "/" not in segment:
        found = _find(node.parameter, method, segments, index + 1)
    if found is None and node.greedy is not None:
        found = node.greedy.operations.get(method)
    return found


def read_rows(text: str) -> list[dict[str, str]]:
    """Return the rows of a table as CSV text; a column that the text lacks is empty."""
    return [{name: row.get(name) or "" for name in COLUMNS} for row in csv.DictReader(io.StringIO(text))]


def shipped_table() -> str:
    """Return the packaged table as CSV text."""
    return resources.files("proxy.amazon").joinpath("operations.csv").read_text(encoding="utf-8")


def load_table(text: str | None = None) -> OperationTable:
    """Return the table that ships with the package, or the one that `text` holds."""
    return OperationTable(operation_of(row) for row in read_rows(text if text is not None else shipped_table()))
