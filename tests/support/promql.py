"""Series and labels that PromQL expressions query, and those that the proxy exports."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import promql_parser as promql
from prometheus_client.metrics import MetricWrapperBase

from proxy.observability.collectors import CallbackCollector
from proxy.observability.metrics import Metrics

TARGET = {"job", "instance"}  # labels that Prometheus adds to every scraped series


@dataclass(frozen=True, slots=True)
class QueriedSeries:
    """A series that an expression queries, and the labels in its selector."""

    name: str
    labels: frozenset[str]


def exported() -> dict[str, set[str]]:
    """Return the labels of every series that a proxy exports, by name; a histogram has three series."""
    found: dict[str, set[str]] = {}
    registry = Metrics().registry
    for one in registry._collector_to_names:
        if isinstance(one, MetricWrapperBase):
            found |= _names(one._name, str(one._type), set(one._labelnames))
        elif isinstance(one, CallbackCollector):
            found |= _names(one.name.removesuffix("_total"), one.kind, set(one.labels))
    for family in registry.collect():
        if not family.name.startswith("spapi_proxy_"):
            found |= {sample.name: set(sample.labels) for sample in family.samples}
    return found


def _names(name: str, kind: str, labels: set[str]) -> dict[str, set[str]]:
    if kind == "histogram":
        return {f"{name}_bucket": {*labels, "le"}, f"{name}_sum": labels, f"{name}_count": labels}
    return {f"{name}_total" if kind == "counter" else name: labels}


@cache
def parsed(text: str) -> Any:
    """Return the syntax tree; raise ValueError where the text is not PromQL."""
    return promql.parse(text)


def queried(text: str) -> set[QueriedSeries]:
    """Return the series that an expression queries."""
    return {
        QueriedSeries(selector.name or "", frozenset(matcher.name for matcher in selector.matchers.matchers))
        for selector in _selectors(parsed(text))
    }


def _selectors(tree: Any) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)

    promql.walk(tree, visit)
    return found


def grouped(text: str) -> Iterator[tuple[set[str], set[str]]]:
    """Yield, for each `by (…)`, its labels and the names of the series that must have them."""
    groups: list[tuple[set[str], set[str]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            groups.append((set(node.modifier.labels), {one.name for one in _selectors(node.expr)}))

    promql.walk(parsed(text), visit)
    yield from groups


def labels_left(tree: Any) -> set[str]:
    """Return the labels in the result of a rule's expression: those of its outermost `by (…)`."""
    if isinstance(tree, promql.AggregateExpr):
        return set(tree.modifier.labels) if tree.modifier else set()
    if isinstance(tree, promql.BinaryExpr):
        return labels_left(tree.lhs)
    if isinstance(tree, promql.ParenExpr):
        return labels_left(tree.expr)
    if isinstance(tree, promql.Call):
        inner = labels_left(tree.args[-1])
        return inner - {"le"} if tree.func.name == "histogram_quantile" else inner
    return _LABELS_OF.get(_selectors(tree)[0].name, set()) if _selectors(tree) else set()


_LABELS_OF: dict[str, set[str]] = {}  # of recorded series, in the order of the rules


def known(rules: dict[str, str]) -> dict[str, set[str]]:
    """Return the labels of every existing series: the proxy's, Prometheus' own, and those that `rules` record."""
    found = {name: {*labels, *TARGET} for name, labels in {**exported(), "up": set()}.items()}
    _LABELS_OF.update(found)
    for name, expression in rules.items():
        found[name] = _LABELS_OF[name] = labels_left(parsed(expression))
    return found
