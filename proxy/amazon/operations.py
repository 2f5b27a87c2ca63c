"""The table of Amazon's operations, and matching of a request to one of them.

The table is part of the package (`operations.csv`); `catalog/rebuild.py` generates it from Amazon's models. Matching
walks a tree of path segments: its cost grows with the depth of a path and not with the number of operations, and no
path is cached, so that clients cannot fill the memory.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal
from urllib.parse import unquote

# The only path parameter that can contain slashes (model uploads_2020-11-01: a resource is itself a path).
GREEDY = frozenset({"/uploads/2020-11-01/uploadDestinations/{resource}"})

# A longer segment cannot be a percent-encoded literal: three characters for each of the literal's own, at most 100.
_MAX_DECODED = 3 * 100

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
    "app_burst",
    "only_reads",
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: its method and path, its usage plan, and the token that it requires.

    `rate` is in calls per second, `burst` in calls, both of one account and application; `app_rate` and `app_burst`
    are the limit over all accounts of an application. None where nothing is published. `rate_source` is the origin of
    the plan: the model or Amazon's SDK. `generic_path`: a Restricted Data Token may name the template instead
    of the real path. `scope` is that of a grantless operation. `removal_date` is YYYY-MM-DD or empty. `only_reads`: a
    POST that changes nothing, so that it can be retried.

    `name` is unique together with `method` only: the model shippingV2 has linkCarrierAccount twice, with two plans.
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
    app_burst: int | None
    restricted: bool
    restricted_certainty: str
    generic_path: bool
    data_elements: tuple[str, ...]
    scope: str | None
    deprecated: bool
    removal_date: str
    sandbox: Literal["static", "dynamic", ""]
    sandbox_only: bool
    only_reads: bool


def operation_of(row: Mapping[str, str]) -> Operation:
    """Return the Operation of one row of the table; raise ValueError or KeyError for an invalid row."""
    return Operation(
        name=f"{row['api']}.{row['version']}.{row['operationId']}",
        api=row["api"],
        version=row["version"],
        operation_id=row["operationId"],
        method=row["method"],
        template=row["path"],
        # 65 operations have no plan in their model; Amazon's SDK has values for most of those.
        rate=_rate(row["rate"] or row["fallback_rate"]),
        burst=_count(row["burst"] or row["fallback_burst"]),
        rate_source="model" if row["rate"] else "sdk" if row["fallback_rate"] else "",
        app_rate=_rate(row["app_rate"]),
        app_burst=_count(row["app_burst"]),
        restricted=row["restricted"] == "yes",
        restricted_certainty=row["restricted_certainty"],
        generic_path=row["rdt_generic_path_ok"] == "yes",
        data_elements=tuple(element for element in row["data_elements"].split(";") if element),
        scope=row["grantless_scope"] or None,
        deprecated=row["deprecated"] == "yes",
        removal_date=row["removal_date"],
        sandbox="static" if row["sandbox"] == "static" else "dynamic" if row["sandbox"] == "dynamic" else "",
        sandbox_only=row["sandbox_only"] == "yes",
        only_reads=row["only_reads"] == "yes",
    )


def _rate(text: str) -> float | None:
    return float(text) if text else None


def _count(text: str) -> int | None:
    return int(text) if text else None


@dataclass(slots=True)
class _Node:
    """One path segment: the segments that may follow it, and the operations that end here, by method."""

    literals: dict[str, "_Node"] = field(default_factory=dict)
    parameter: "_Node | None" = None
    greedy: "_Node | None" = None
    operations: dict[str, Operation] = field(default_factory=dict)
    is_ambiguous: bool = False  # the first match may be wrong: backtracking is needed


class OperationTable:
    """All known operations, matched by method and raw path."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._operations = tuple(operations)
        self._root = _Node()
        self._literal: dict[str, dict[str, Operation]] = {}  # by path, of those without a parameter
        self._max_depth = 0
        for operation in self._operations:
            self._add(operation)
        self._mark_ambiguous(self._root)

    def __iter__(self) -> Iterator[Operation]:
        return iter(self._operations)

    def __len__(self) -> int:
        return len(self._operations)

    def match(self, method: str, raw_path: str) -> Operation | None:
        """Return the operation of a request, None where the table has none.

        `raw_path` is the path as in the request line, without its query. It is split before it is decoded, so that
        `%2F`, as in a SKU with a slash (DOC "URL Encoding"), stays inside its segment. Literals win over
        parameters. A parameter matches one segment, the greedy one all remaining segments; no segment may be empty.
        Method and literals are compared with their case (RFC 9110 section 9.1, RFC 3986 section 6.2.2.1).
        """
        literal = self._literal.get(raw_path)
        # Without this method, a template with a parameter may still match: the tree decides.
        if literal is not None and method in literal:
            return literal[method]
        # Split no deeper than the table: a path of ten thousand slashes gets one segment more and matches nothing.
        # The limit also bounds the recursion of _find.
        segments = raw_path.split("/", self._max_depth + 1)
        # Anything before the first slash: an absolute form or a relative path, which is no operation.
        if segments[0]:
            return None
        # The loop below compares raw segments and never backtracks: escapes and empty segments need _find.
        if "%" in raw_path or "" in segments[1:]:
            return _find(self._root, method, segments, 1)
        node = self._root
        for segment in segments[1:]:
            if node.is_ambiguous:
                return _find(self._root, method, segments, 1)
            following = node.literals.get(segment) or node.parameter
            if following is None:
                return None
            node = following
        return node.operations.get(method)

    def _add(self, operation: Operation) -> None:
        segments = operation.template.split("/")[1:]
        self._max_depth = max(self._max_depth, len(segments))
        node = self._root
        for index, segment in enumerate(segments):
            if not segment.startswith("{"):
                node = node.literals.setdefault(segment, _Node())
            elif operation.template in GREEDY and index == len(segments) - 1:
                node.greedy = node = node.greedy or _Node()
            else:
                node.parameter = node = node.parameter or _Node()
        # Two models with the same method and path: the first by api and version wins, whatever the order of files.
        node.operations.setdefault(operation.method, operation)
        if "{" not in operation.template:
            self._literal[operation.template] = node.operations

    def _mark_ambiguous(self, node: _Node) -> None:
        node.is_ambiguous = node.greedy is not None or bool(node.literals and node.parameter)
        for following in (*node.literals.values(), node.parameter):
            if following is not None:
                self._mark_ambiguous(following)


def _find(node: _Node, method: str, segments: list[str], index: int) -> Operation | None:
    """Return the operation of the segments from `index` on; try the literal branch first, and backtrack."""
    if index == len(segments):
        return node.operations.get(method)
    segment = segments[index]
    if not segment:
        return None
    # RFC 3986 section 6.2.2.2: an escaped unreserved character is equivalent to the character itself. A literal that is
    # matched by its raw text only would let `/%6frders` pass as an unknown operation.
    literal = node.literals.get(_decoded(segment) if "%" in segment and node.literals else segment)
    found = _find(literal, method, segments, index + 1) if literal is not None else None
    if found is None and node.parameter is not None:
        found = _find(node.parameter, method, segments, index + 1)
    # Last: a greedy parameter would otherwise take paths that a longer template describes exactly.
    if found is None and node.greedy is not None and _has_no_empty_segment("/".join(segments[index:])):
        found = node.greedy.operations.get(method)
    return found


def _decoded(segment: str) -> str:
    # Decoding a segment of eight thousand escapes is wasted CPU: no literal is that long.
    return unquote(segment) if len(segment) <= _MAX_DECODED else segment


def _has_no_empty_segment(rest: str) -> bool:
    return "//" not in rest and not rest.endswith("/")


def read_rows(text: str) -> list[dict[str, str]]:
    """Return the rows of a table as CSV text; a column that the text lacks is empty."""
    return [{name: row.get(name) or "" for name in COLUMNS} for row in csv.DictReader(io.StringIO(text))]


def shipped_table() -> str:
    """Return the packaged table as CSV text."""
    return resources.files("proxy.amazon").joinpath("operations.csv").read_text(encoding="utf-8")


def load_table(text: str | None = None) -> OperationTable:
    """Return the packaged table, or the one in `text`."""
    return OperationTable(operation_of(row) for row in read_rows(text if text is not None else shipped_table()))
