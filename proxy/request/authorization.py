"""Authorization: which accounts, operations and personal data a caller may use through a listener.

A listener and a caller may each have a policy. What one of them does not allow is refused, with the name of the rule.
"""

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass

from proxy.amazon.operations import Operation, OperationTable
from proxy.amazon.personal_data import ALL_ELEMENTS, implied_elements
from proxy.config import Config, KeyPath, Listener, Policy, Problem
from proxy.config.yaml_reader import format_path
from proxy.errors import NotAllowed

_READS = frozenset({"GET", "HEAD"})
UNKNOWN = "unknown"  # stands for every operation outside the table


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One pattern of operations: a method or READ (empty for any), and the names."""

    method: str
    names: re.Pattern[str]

    @classmethod
    def of(cls, text: str) -> "_Pattern":
        method, _, names = text.rpartition(" ")
        return cls(method.strip(), re.compile(fnmatch.translate(names)))

    def allows(self, method: str, operation: Operation | None) -> bool:
        name = operation.name if operation else UNKNOWN
        return self._allows_method(method, operation) and self.names.match(name) is not None

    def _allows_method(self, method: str, operation: Operation | None) -> bool:
        if self.method == "READ":
            return method in _READS or (operation is not None and operation.only_reads)
        # HEAD is GET without the body (RFC 9110 section 9.3.2).
        return not self.method or method == self.method or (method == "HEAD" and self.method == "GET")


@dataclass(frozen=True, slots=True)
class _Rules:
    """One compiled policy; `config_key` is its key in the configuration, `elements` None where all are allowed."""

    config_key: str
    accounts: frozenset[str] | None
    patterns: tuple[_Pattern, ...] | None
    elements: frozenset[str] | None

    @classmethod
    def of(cls, config_key: str, policy: Policy) -> "_Rules":
        elements = frozenset(policy.data_elements) if policy.data_elements is not None else None
        return cls(
            config_key,
            frozenset(policy.accounts) if policy.accounts is not None else None,
            tuple(map(_Pattern.of, policy.operations)) if policy.operations is not None else None,
            None if elements == frozenset(ALL_ELEMENTS) else elements,
        )


class AccessPolicy:
    """What one caller may do through one listener; created once for each pair.

    `elements` are the data elements that are allowed, None where all are.
    """

    def __init__(self, *rules: _Rules) -> None:
        self._rules = rules
        accounts = [rule.accounts for rule in rules if rule.accounts is not None]
        shared = frozenset.intersection(*accounts) if accounts else frozenset()
        self.sole_account = next(iter(shared)) if len(shared) == 1 else None
        elements = [rule.elements for rule in rules if rule.elements is not None]
        self.elements = frozenset.intersection(*elements) if elements else None

    def check_account(self, account: str) -> None:
        """Raise NotAllowed for an account that the policy does not list."""
        for rule in self._rules:
            if rule.accounts is not None and account not in rule.accounts:
                raise _denied(rule, "accounts", "the account")

    def check_operation(self, method: str, operation: Operation | None, query: str) -> None:
        """Raise NotAllowed for an operation that is not listed, or whose response has personal data that is not."""
        name = operation.name if operation else "an operation that is not in the table"
        for rule in self._rules:
            if rule.patterns is not None and not any(pattern.allows(method, operation) for pattern in rule.patterns):
                raise _denied(rule, "operations", f"{method} {name}")
            if rule.elements is not None and not rule.elements.issuperset(implied_elements(operation, query)):
                raise _denied(rule, "data_elements", f"{name}, which may bring personal data,")

    def check_elements(self, requested: set[str]) -> None:
        """Raise NotAllowed for requested data elements that are not listed."""
        for rule in self._rules:
            if rule.elements is not None and not requested <= rule.elements:
                raise _denied(rule, "data_elements", ", ".join(sorted(requested - rule.elements)))


ALLOW_ALL = AccessPolicy()


def _denied(rule: _Rules, key: str, what: str) -> NotAllowed:
    return NotAllowed(
        f"{rule.config_key}.{key} does not allow {what} here",
        f"Ask the operator of the proxy, or change {rule.config_key}.{key}.",
    )


def build_policies(config: Config, index: int) -> dict[str, AccessPolicy]:
    """Return the policies of the listener with this index by caller, including ANONYMOUS."""
    listener = _Rules.of(f"listen[{index}]", config.listen[index])
    found = {"": AccessPolicy(listener)}
    for name, caller in config.callers.items():
        found[name] = AccessPolicy(listener, _Rules.of(f"callers.{name}", caller))
    return found


def validate_policies(config: Config, table: OperationTable) -> Iterator[Problem]:
    """Yield a problem for every pattern that matches no operation of the table."""
    written: list[tuple[KeyPath, Listener | Policy]] = [
        *((("listen", index), listener) for index, listener in enumerate(config.listen)),
        *((("callers", name), caller) for name, caller in config.callers.items()),
    ]
    names = [operation.name for operation in table]
    for path, policy in written:
        for index, text in enumerate(policy.operations or ()):
            pattern = _Pattern.of(text)
            if not any(map(pattern.names.match, (*names, UNKNOWN))):
                key = format_path((*path, "operations", index))
                yield Problem(key, "matches no operation; `sp-api-proxy operations` lists their names")
