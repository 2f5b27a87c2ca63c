"""Cache of routing decisions, so that the next request of the same kind is routed by one lookup."""

from collections.abc import Callable
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

from multidict import CIMultiDictProxy

from proxy.amazon.operations import OperationTable
from proxy.config import Config, Listener
from proxy.errors import BadTarget
from proxy.request.authentication import KEY_HEADER
from proxy.request.authorization import AccessPolicy
from proxy.request.routing import UNCACHED, Route, resolve
from proxy.request.target import (
    ACCOUNT_HEADER,
    REGION_HEADER,
    marketplace_ids,
    reject_unknown_region,
    split_prefix,
)
from proxy.request.token_selection import ELEMENTS_HEADER, TOKEN_HEADER, elements_in_placeholder
from proxy.request.validation import ValidatedTarget

_DECIDING_HEADERS = frozenset({ACCOUNT_HEADER, REGION_HEADER, ELEMENTS_HEADER, KEY_HEADER})
_MAX_ROUTES = 10_000
_MAX_KEY = 1000  # characters: header values are the client's, so their length must not fill the memory
# What precedes `arketplaceId` where it is the name of the first parameter, or of a later one.
_FIRST, _LATER = frozenset({"M", "m"}), ("&M", "&m")

_ROUTE: Callable[..., Route] = Route  # called with a tuple of its fields, which mypy cannot check
_all_but_path = attrgetter(*[field.name for field in fields(Route)][:-1])  # `path_and_query` is the last field


class RouteCache:
    """Routing decisions of one listener, by everything that a decision depends on.

    Of paths and queries only the operation and the marketplaces are kept. Routes whose token is for one path alone are
    not cached.
    """

    def __init__(self, listener: Listener, config: Config, table: OperationTable) -> None:
        self._inputs = (listener, config, table)
        self._match = table.match
        self._deciding_headers = _DECIDING_HEADERS | {TOKEN_HEADER} if config.local_rdt else _DECIDING_HEADERS
        self._local_rdt = config.local_rdt
        self._routes: dict[tuple[object, ...], tuple[Any, ...]] = {}

    def get(
        self, method: str, validated: ValidatedTarget, headers: CIMultiDictProxy[str], caller: str, policy: AccessPolicy
    ) -> Route:
        """Return the route that `resolve` returns, and raise what it raises."""
        account, region, path_and_query = split_prefix(validated.target)
        path, _, query = path_and_query.partition("?")
        match = self._match
        operation = match(method, path)
        key = (
            method,
            operation.name if operation is not None else "",
            caller,
            account,
            region,
            validated.amazon,
            None
            if self._deciding_headers.isdisjoint(validated.names)
            else _header_values(
                headers, elements_in_placeholder(headers, method, path, operation) if self._local_rdt else None
            ),
            _marketplaces_key(query) if "arketplaceId" in query or "%" in query else (),
        )
        known = self._routes.get(key)
        if known is not None:
            if operation is None and account is not None and region is None:
                # The key holds nothing of a path outside the table, so this check is not covered by the cached route.
                reject_unknown_region(method, path, self._inputs[2])
            return _ROUTE(*known, path_and_query)
        route = resolve(method, validated, headers, *self._inputs, policy)
        for_this_path = route.token_key.kind == "rdt" and not route.token_key.is_shared
        # Where the policy excludes data elements, it also checks the query, of which the key holds too little.
        if not for_this_path and policy.elements is None and len(str(key)) <= _MAX_KEY:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            self._routes[key] = _all_but_path(route)
            return route
        return replace(route, key=UNCACHED)

    def operation_at(self, method: str, target: str) -> str:
        """Return the name of the operation at a target, whatever account it names; empty where none is known."""
        try:
            path = split_prefix(target)[2].partition("?")[0]
        except BadTarget:
            return ""
        operation = self._match(method, path)
        return operation.name if operation is not None else ""


def _header_values(headers: CIMultiDictProxy[str], by_placeholder: tuple[str, ...] | None) -> tuple[object, ...]:
    """Return the values of all headers that a decision depends on."""
    return (
        by_placeholder,
        tuple(headers.getall(ACCOUNT_HEADER, ())),
        tuple(headers.getall(REGION_HEADER, ())),
        tuple(headers.getall(ELEMENTS_HEADER, ())),
        KEY_HEADER in headers,
    )


def _marketplaces_key(query: str) -> str | tuple[str, ...]:
    """Return what determines the ids that `marketplace_ids` yields: the one value as it is written, or the ids.

    The common case, one parameter without escapes, needs no parsing. The two results differ in type, so that a raw
    value never equals a parsed id.
    """
    before, _, after = query.partition("arketplaceId")
    if (
        (before in _FIRST or before.endswith(_LATER))
        and after.startswith(("=", "s="))
        and "arketplaceId" not in after
        and not ("%4" in query or "%5" in query or "%6" in query or "%7" in query)  # escaped letters
    ):
        return after.partition("&")[0]
    return tuple(marketplace_ids(query))
