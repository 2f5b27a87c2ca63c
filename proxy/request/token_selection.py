"""Which token a request needs: an access token, a grantless one or a Restricted Data Token."""

from collections.abc import Collection
from functools import lru_cache
from typing import Literal, NamedTuple

from multidict import CIMultiDictProxy

from proxy.amazon.operations import Operation
from proxy.amazon.personal_data import ALL_ELEMENTS, HARMLESS_WITHOUT_RDT
from proxy.amazon.placeholder_tokens import RDT_PREFIX, resources_in
from proxy.amazon.rdt import METHODS as RDT_METHODS
from proxy.config import Account, Environment, Region
from proxy.errors import BadOption, RestrictedDataTokenInvalid
from proxy.request.authorization import AccessPolicy
from proxy.request.target import single_value

TokenKind = Literal["lwa", "grantless", "rdt"]

ELEMENTS_HEADER = "x-sp-data-elements"
TOKEN_HEADER = "x-amz-access-token"  # noqa: S105 - a header's name

# Restricted operations that also accept an access token; their responses then lack the personal data.
_OPTIONAL = frozenset({"orders.v0.getOrders", "orders.v0.getOrder", "orders.v0.getOrderItems"})


class TokenKey(NamedTuple):
    """Everything that makes two tokens differ: it describes the token to fetch and is the key of the token cache."""

    kind: TokenKind
    application: str
    account: str
    environment: Environment
    region: Region
    scope: str = ""
    method: str = ""
    path: str = ""
    data_elements: tuple[str, ...] = ()
    optional: bool = False  # the operation accepts an access token too, without the personal data
    is_shared: bool = True  # False where the path names one resource: no other request will need this token


def access_token_key(token_key: TokenKey) -> TokenKey:
    """Return the key of the same account's access token, which authorizes the request for a Restricted Data Token."""
    return access_token_key_of(token_key.application, token_key.account, token_key.environment, token_key.region)


@lru_cache(maxsize=4096)
def access_token_key_of(application: str, account: str, environment: Environment, region: Region) -> TokenKey:
    """Return the key of an account's LWA access token for a region; equal arguments give the same object."""
    return TokenKey("lwa", application, account, environment, region)


def elements_in_placeholder(
    headers: CIMultiDictProxy[str], method: str, path: str, operation: Operation | None
) -> tuple[str, ...] | None:
    """Return the data elements of the app's placeholder for a Restricted Data Token (`local_rdt`).

    None where the request has none, or one that was issued for other calls and so does not apply to this one. Raise
    RestrictedDataTokenInvalid for one that cannot be read.
    """
    if operation is None or not operation.restricted or TOKEN_HEADER not in headers:
        return None
    given = headers.getall(TOKEN_HEADER)
    if len(given) > 1 or not given[0].startswith(RDT_PREFIX):
        return None
    try:
        resources = resources_in(given[0])
    except ValueError as exc:
        raise RestrictedDataTokenInvalid(
            f"the Restricted Data Token in {TOKEN_HEADER} is {exc}", "Ask the proxy for a new one."
        ) from exc
    for resource in resources:
        if resource.method == method and resource.path in {path, operation.template}:
            return resource.data_elements
    return None


def requested_elements(
    headers: CIMultiDictProxy[str],
    by_placeholder: tuple[str, ...] | None,
    settings: Account,
    operation: Operation | None,
    policy: AccessPolicy,
) -> tuple[tuple[str, ...] | None, str]:
    """Return the requested data elements in Amazon's order, and the words for what requested them.

    None instead of the elements: use no Restricted Data Token at all. Raise BadOption for an unknown element and
    NotAllowed for one that the policy excludes.
    """
    header = single_value(headers, ELEMENTS_HEADER)
    if header is None and by_placeholder is not None:
        policy.check_elements(set(by_placeholder))
        if forbids_rdt(operation, policy):
            return None, "the policy"
        return canonical_order(by_placeholder, operation), "the app's Restricted Data Token"
    if header is None:
        if forbids_rdt(operation, policy):
            return None, "the policy"
        wanted = settings.data_elements if policy.elements is None else policy.elements & set(settings.data_elements)
        return canonical_order(wanted, operation), "the setting data_elements"
    source = f"header {ELEMENTS_HEADER}"
    requested = {element.strip(" \t") for element in header.split(",")} - {""}
    if requested == {"none"}:
        return None, source
    if not requested <= set(ALL_ELEMENTS):
        raise BadOption(
            f"the header {ELEMENTS_HEADER} names something unknown",
            f"Elements are {', '.join(ALL_ELEMENTS)}, or none alone.",
        )
    policy.check_elements(requested)
    if forbids_rdt(operation, policy):
        return None, "the policy"
    return canonical_order(requested, operation), source


def forbids_rdt(operation: Operation | None, policy: AccessPolicy) -> bool:
    """Return whether the policy excludes a Restricted Data Token: the operation has no data elements to leave out."""
    if policy.elements is None or operation is None or operation.data_elements:
        return False
    return operation.name in HARMLESS_WITHOUT_RDT


def canonical_order(requested: Collection[str], operation: Operation | None) -> tuple[str, ...]:
    """Return the requested elements that the operation has, in Amazon's order, so that equal sets share one token."""
    if operation is None:
        return ()
    return tuple(element for element in ALL_ELEMENTS if element in requested and element in operation.data_elements)


def select_token(
    method: str,
    path: str,
    operation: Operation | None,
    access_token: TokenKey,
    elements: tuple[str, ...] | None,
    sandbox_rdt: str,
) -> TokenKey:
    """Return the key of the token that a call needs; `access_token` is that of the account's LWA access token."""
    if operation is None:
        return access_token
    if operation.scope:
        # A grantless token comes from the application's client credentials alone: it belongs to no account.
        return access_token._replace(kind="grantless", account="", scope=operation.scope)
    if not needs_rdt(method, operation, access_token.environment, elements, sandbox_rdt):
        return access_token
    generic = operation.generic_path or "{" not in operation.template
    return access_token._replace(
        kind="rdt",
        # Amazon's page says that restricted calls to the sandbox need a token made in production (DOC "Selling Partner
        # API Sandbox"). Developers report that the sandbox needs none, hence the setting `sandbox_rdt`.
        environment="production",
        method=method,
        path=operation.template if generic else path,
        data_elements=elements or (),
        optional=operation.name in _OPTIONAL,
        is_shared=generic,
    )


def needs_rdt(
    method: str, operation: Operation, environment: Environment, elements: tuple[str, ...] | None, sandbox_rdt: str
) -> bool:
    """Return whether the call needs a Restricted Data Token, or requests data elements that need one."""
    if not operation.restricted or method not in RDT_METHODS or elements is None:
        return False
    if environment == "sandbox" and sandbox_rdt == "none":
        return False
    return bool(elements) or operation.name not in _OPTIONAL
