"""The route of a request: account, region, environment, operation, endpoint and token, decided once.

Every later step (usage plan, token, address) reads the same Route, so no two steps can disagree. Account and region
each come from the first source that names them; two sources that disagree are refused, never guessed about.
"""

from dataclasses import dataclass

from multidict import CIMultiDictProxy

from proxy.amazon.marketplaces import HOSTS
from proxy.amazon.operations import Operation, OperationTable
from proxy.config import REGIONS, Account, Config, Environment, Listener, Region
from proxy.errors import ConflictingSources, RegionNotConfigured
from proxy.request.authorization import ALLOW_ALL, AccessPolicy
from proxy.request.target import Sourced, account_of, region_of, reject_unknown_region, split_prefix
from proxy.request.token_selection import (
    TokenKey,
    access_token_key_of,
    elements_in_placeholder,
    requested_elements,
    select_token,
)
from proxy.request.validation import ValidatedTarget

_REGIONS: dict[str, Region] = {region: region for region in REGIONS}


class RouteKey:
    """Identity of one routing decision: requests with the same key differ in their paths and queries only.

    Later steps use it as a dictionary key for what depends on the decision alone. It has no contents: two keys are
    equal only if they are the same object.
    """

    __slots__ = ()


UNCACHED = RouteKey()  # of requests that are routed again each time


@dataclass(slots=True)
class Route:
    """What the proxy decided about one request; never changed after it was made.

    Not `frozen`: a frozen dataclass sets each field by `object.__setattr__`, and one is made for every request.
    """

    account: str
    account_source: str
    region: Region
    region_source: str
    environment: Environment
    application: str
    operation: Operation | None
    operation_name: str  # for metrics, logs and `x-sp-proxy`; `unknown` where the table has no such operation
    endpoint: str
    token_key: TokenKey
    elements_source: str
    key: RouteKey
    path_and_query: str


def resolve(
    method: str,
    validated: ValidatedTarget,
    headers: CIMultiDictProxy[str],
    listener: Listener,
    config: Config,
    table: OperationTable,
    policy: AccessPolicy = ALLOW_ALL,
) -> Route:
    """Return the route of a validated request; raise the error that says what is missing, contradictory or forbidden.

    What `policy` does not allow is refused before any other error could reveal something about it.
    """
    prefix_account, prefix_region, path_and_query = split_prefix(validated.target)
    path, _, query = path_and_query.partition("?")
    account = account_of(prefix_account, headers, listener, config, policy)
    operation = table.match(method, path)
    if operation is None and prefix_account is not None and prefix_region is None:
        reject_unknown_region(method, path, table)
    policy.check_operation(method, operation, query)
    settings = config.accounts[account.value]
    environment = config.environment_of(settings)
    region = region_of(prefix_region, headers, listener, validated, query, account, settings, config)
    _check_environment(validated, environment, account)
    application, _ = config.application_of(settings)
    by_placeholder = elements_in_placeholder(headers, method, path, operation) if config.local_rdt else None
    elements, elements_source = requested_elements(headers, by_placeholder, settings, operation, policy)
    access_token = access_token_key_of(application, account.value, environment, _known(region))
    token_key = select_token(method, path, operation, access_token, elements, config.sandbox_rdt)
    if token_key.kind != "grantless" and region.value not in settings.refresh_tokens:
        raise _no_refresh_token(account, region, settings)
    return Route(
        account=account.value,
        account_source=account.source,
        region=_known(region),
        region_source=region.source,
        environment=environment,
        application=application,
        operation=operation,
        operation_name=operation.name if operation is not None else "unknown",
        endpoint=endpoint_of(config, environment, _known(region)),
        token_key=token_key,
        elements_source=elements_source,
        key=RouteKey(),
        path_and_query=path_and_query,
    )


def endpoint_of(config: Config, environment: Environment, region: Region) -> str:
    """Return the base URL of the region's host, without a trailing slash."""
    return getattr(config.endpoints, region) or f"https://{HOSTS[environment, region]}"


def _known(region: Sourced) -> Region:
    return _REGIONS[region.value]


def _no_refresh_token(account: Sourced, region: Sourced, settings: Account) -> RegionNotConfigured:
    have = ", ".join(settings.refresh_tokens) or "none"
    return RegionNotConfigured(
        f"the account {account.value} has no refresh token for {region.value}, which the {region.source} names; "
        f"it has: {have}",
        f"Add accounts.{account.value}.refresh_tokens.{region.value}, or ask for another region.",
    )


def _check_environment(validated: ValidatedTarget, environment: Environment, account: Sourced) -> None:
    if validated.amazon and validated.amazon[0] != environment:
        raise ConflictingSources(
            f"the Host is of the {validated.amazon[0]} environment, "
            f"the account {account.value} is set to {environment}",
            "Use the other host name, or set environment for the account.",
        )
