"""Whose request is this, for which region, which operation, and with which kind of token?

The answer is one immutable Target, made once; everything that follows (usage plan, token, address) comes from it, so
that no two steps can disagree. Account and region each come from the first source that names them; two sources that
disagree are refused, never guessed about.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote_plus

from multidict import CIMultiDictProxy

from proxy.amazon.marketplaces import HOSTS, MARKETPLACE_PARAMETERS, MARKETPLACES
from proxy.amazon.operations import Operation, OperationTable
from proxy.amazon.personal_data import ALL_ELEMENTS, HARMLESS_WITHOUT_RDT
from proxy.amazon.placeholder_tokens import RDT_PREFIX, resources_in
from proxy.amazon.rdt import METHODS as RDT_METHODS
from proxy.config import REGIONS, Account, Config, DataElement, Environment, Listener, Region
from proxy.errors import (
    AccountRequired,
    BadOption,
    BadTarget,
    ConflictingSources,
    HeaderRequired,
    MalformedRequest,
    RegionNotConfigured,
    RegionRequired,
    RestrictedDataTokenInvalid,
    UnknownAccount,
    UnknownMarketplace,
    UnknownRegion,
)
from proxy.request.authentication import KEY_HEADER
from proxy.request.authorization import ALLOW_ALL, AccessPolicy
from proxy.request.validation import ValidatedTarget

TokenKind = Literal["lwa", "grantless", "rdt"]

ACCOUNT_HEADER = "x-sp-account"
REGION_HEADER = "x-sp-region"
ELEMENTS_HEADER = "x-sp-data-elements"
TOKEN_HEADER = "x-amz-access-token"  # noqa: S105 - a header's name
_CHOICES = frozenset({ACCOUNT_HEADER, REGION_HEADER, ELEMENTS_HEADER, KEY_HEADER})

# A restricted operation that answers without a Restricted Data Token too, only without the personal data.
_OPTIONAL = frozenset({"orders.v0.getOrders", "orders.v0.getOrder", "orders.v0.getOrderItems"})
_MAX_MARKETPLACES = 64
_MAX_ROUTES = 10_000
_MAX_KEY = 1000  # characters
_M, _BEHIND_ANOTHER = frozenset({"M", "m"}), ("&M", "&m")  # what stands before `arketplaceId` in a name
# What people write for a region: a country, a continent, a region of AWS.
_LIKE_A_REGION = re.compile(
    r"[a-z]{2}(-[a-z]+-\d)?|usa|europe|emea|asia|apac|japan|(north[-_]?)?america|far[-_]?east", re.IGNORECASE | re.ASCII
)
_REGIONS: dict[str, Region] = {region: region for region in REGIONS}


class TokenKey(NamedTuple):
    """Which token a request needs: everything that makes two tokens differ, so it is also the key they are kept by."""

    kind: TokenKind
    application: str
    account: str
    environment: Environment
    region: Region
    scope: str = ""
    method: str = ""
    path: str = ""
    data_elements: tuple[str, ...] = ()
    optional: bool = False  # the operation answers an ordinary token too, without the personal data
    is_shared: bool = True  # False where the path names one document: no other request will ask for this token


class RouteKey:
    """Stands for all requests that were decided alike, but for their paths: what holds for one holds for the others."""

    __slots__ = ()


UNCACHED = RouteKey()  # of requests that are decided anew each time


@dataclass(slots=True)
class Route:
    """What the proxy decided about one request; nobody changes it. Its fields are read often, and made once."""

    account: str
    account_source: str
    region: Region
    region_source: str
    environment: Environment
    application: str
    operation: Operation | None
    operation_name: str  # in metrics, logs and `x-sp-proxy`; `unknown` outside the table
    endpoint: str
    token_key: TokenKey
    elements_source: str
    key: RouteKey
    path_and_query: str


_ROUTE: Callable[..., Route] = Route
_DECIDING_HEADERS = attrgetter(*[field.name for field in fields(Route)][:-1])  # all but the path


class RouteCache:
    """What was decided by one listener before, so that the next request of the same kind is decided at once.

    Nothing is kept of a path or a query but the operation and the marketplaces, and nothing where the token is for one
    path alone.
    """

    def __init__(self, listener: Listener, config: Config, table: OperationTable) -> None:
        self._by = (listener, config, table)
        self._match = table.match
        self._choices = _CHOICES | {TOKEN_HEADER} if config.local_rdt else _CHOICES
        self._local_rdt = config.local_rdt
        self._routes: dict[tuple[object, ...], tuple[Any, ...]] = {}

    def get(
        self, method: str, validated: ValidatedTarget, headers: CIMultiDictProxy[str], caller: str, policy: AccessPolicy
    ) -> Route:
        """Return what `identify` returns, and raise what it raises."""
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
            if self._choices.isdisjoint(validated.names)
            else _choices(headers, _asked_by_token(headers, method, path, operation) if self._local_rdt else None),
            _marketplaces_as_written(query) if "arketplaceId" in query or "%" in query else (),
        )
        known = self._routes.get(key)
        if known is not None:
            if operation is None and account is not None and region is None:
                _refuse_unknown_region(method, path, self._by[2])  # of a path nothing is known
            return _ROUTE(*known, path_and_query)
        route = resolve(method, validated, headers, *self._by, policy)
        for_this_path = route.token_key.kind == "rdt" and not route.token_key.is_shared
        # What a query may bring is looked at anew each time where not all of it is allowed.
        if not for_this_path and policy.elements is None and len(str(key)) <= _MAX_KEY:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            self._routes[key] = _DECIDING_HEADERS(route)
            return route
        return replace(route, key=UNCACHED)

    def operation_at(self, method: str, target: str) -> str:
        """Return the name of the operation that a request would have been, whoever sent it; nothing where unknown."""
        try:
            path = split_prefix(target)[2].partition("?")[0]
        except BadTarget:
            return ""
        operation = self._match(method, path)
        return operation.name if operation is not None else ""


def _choices(headers: CIMultiDictProxy[str], asked: tuple[str, ...] | None) -> tuple[object, ...]:
    """Return what the headers say of those things that a decision looks at."""
    return (
        asked,
        tuple(headers.getall(ACCOUNT_HEADER, ())),
        tuple(headers.getall(REGION_HEADER, ())),
        tuple(headers.getall(ELEMENTS_HEADER, ())),
        KEY_HEADER in headers,
    )


class Sourced(NamedTuple):
    """A value and the words for where it came from."""

    value: str
    source: str


def resolve(
    method: str,
    validated: ValidatedTarget,
    headers: CIMultiDictProxy[str],
    listener: Listener,
    config: Config,
    table: OperationTable,
    policy: AccessPolicy = ALLOW_ALL,
) -> Route:
    """Return the Target of an admitted request; raise the error that says what is missing, contradictory or forbidden.

    What `permit` does not allow is refused before anything else is said of it.
    """
    prefix_account, prefix_region, path_and_query = split_prefix(validated.target)
    path, _, query = path_and_query.partition("?")
    account = _account(prefix_account, headers, listener, config, policy)
    operation = table.match(method, path)
    if operation is None and prefix_account is not None and prefix_region is None:
        _refuse_unknown_region(method, path, table)
    policy.check_operation(method, operation, query)
    settings = config.accounts[account.value]
    environment = config.environment_of(settings)
    region = _region(prefix_region, headers, listener, validated, query, account, settings, config)
    _check_environment(validated, environment, account)
    application, _ = config.application_of(settings)
    asked = _asked_by_token(headers, method, path, operation) if config.local_rdt else None
    elements, elements_source = _elements(headers, asked, settings, operation, policy)
    ordinary = access_token_key_of(application, account.value, environment, _known(region))
    credential = token_key(method, path, operation, ordinary, elements, config.sandbox_rdt)
    if credential.kind != "grantless" and region.value not in settings.refresh_tokens:
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
        token_key=credential,
        elements_source=elements_source,
        key=RouteKey(),
        path_and_query=path_and_query,
    )


def account_of(
    name: str, headers: CIMultiDictProxy[str], listener: Listener, config: Config, policy: AccessPolicy
) -> tuple[str, str]:
    """Return the account that a path names, and the words for where it came from; raise as `identify` does."""
    choice = _account(name, headers, listener, config, policy)
    return choice.value, choice.source


def endpoint_of(config: Config, environment: Environment, region: Region) -> str:
    """Return the base URL, without a trailing slash, of the region's host."""
    return getattr(config.endpoints, region) or f"https://{HOSTS[environment, region]}"


def access_token_key(token_key: TokenKey) -> TokenKey:
    """Return the credential of the ordinary token for the same account, with which a restricted one is asked for."""
    return access_token_key_of(token_key.application, token_key.account, token_key.environment, token_key.region)


@lru_cache(maxsize=4096)
def access_token_key_of(application: str, account: str, environment: Environment, region: Region) -> TokenKey:
    """Return the credential of an account's ordinary LWA token for a region; the same object each time."""
    return TokenKey("lwa", application, account, environment, region)


# Account.


def split_prefix(target: str) -> tuple[str | None, str | None, str]:
    """Return account, region and the remaining target of `/@ACCOUNT/REGION/…` or `/@ACCOUNT/…`."""
    if not target.startswith("/@"):
        return None, None, target
    account, slash, rest = target[2:].partition("/")
    if not slash or not account:
        raise BadTarget("nothing follows the account in the path", "Write /@ACCOUNT/ and then Amazon's own path.")
    region, slash, behind = rest.partition("/")
    if slash and region.lower() in REGIONS:
        rest = behind
    else:
        region = ""
    if rest.startswith("/"):
        raise BadTarget("a double slash follows the prefix", "Write /@ACCOUNT/REGION/ and then Amazon's own path.")
    return account, region.lower() or None, f"/{rest}"


def _account(
    prefix: str | None, headers: CIMultiDictProxy[str], listener: Listener, config: Config, policy: AccessPolicy
) -> Sourced:
    header = _single(headers, ACCOUNT_HEADER)
    if listener.require_header and header is None and KEY_HEADER not in headers:
        raise HeaderRequired(
            f"this listener takes only requests with {ACCOUNT_HEADER} or {KEY_HEADER}",
            f"Add the header {ACCOUNT_HEADER}: ACCOUNT.",
        )
    named = [
        Sourced(name, source)
        for name, source in (
            (listener.account, f"listener {listener.address}"),
            (prefix, "path prefix"),
            (header, f"header {ACCOUNT_HEADER}"),
        )
        if name is not None
    ]
    for choice in named:
        policy.check_account(choice.value)
        if choice.value not in config.accounts:
            raise UnknownAccount(
                f"the account that the {choice.source} names is not configured",
                "Check its spelling, or add it under accounts; `sp-api-proxy check` lists them.",
            )
    if (agreed := require_agreement(named, "account")) is not None:
        return agreed
    usual = _default_account(config, policy)
    policy.check_account(usual.value)
    return usual


def _default_account(config: Config, policy: AccessPolicy) -> Sourced:
    if policy.sole_account is not None:
        return Sourced(policy.sole_account, "the only account allowed here")
    if config.default_account is not None:
        return Sourced(config.default_account, "default_account")
    if len(config.accounts) == 1:
        return Sourced(next(iter(config.accounts)), "the only account")
    raise AccountRequired(
        "there are several accounts and the request names none",
        f"Add the header {ACCOUNT_HEADER}, or begin the path with /@ACCOUNT/, or set default_account.",
    )


def _single(headers: CIMultiDictProxy[str], name: str) -> str | None:
    """Return the header's value, None where it is absent; raise where it is given more than once."""
    if name not in headers:
        return None
    values = headers.getall(name)
    if len(values) > 1:
        raise MalformedRequest(f"the header {name} is given {len(values)} times", "Send it once.")
    return values[0].strip(" \t")


def require_agreement(choices: list[Sourced], what: str) -> Sourced | None:
    """Return the first choice, None where there is none; raise where two differ."""
    for other in choices[1:]:
        if other.value != choices[0].value:
            raise ConflictingSources(
                f"two sources name different {what}s: the {choices[0].source} says {choices[0].value}, "
                f"the {other.source} says {other.value}",
                f"Name the {what} once, or the same one everywhere.",
            )
    return choices[0] if choices else None


# Region.


def _region(
    prefix: str | None,
    headers: CIMultiDictProxy[str],
    listener: Listener,
    validated: ValidatedTarget,
    query: str,
    account: Sourced,
    settings: Account,
    config: Config,
) -> Sourced:
    header = _single(headers, REGION_HEADER)
    if header is not None and header.lower() not in REGIONS:
        raise UnknownRegion(f"the header {REGION_HEADER} names no region", f"Regions are {', '.join(REGIONS)}.")
    named = [
        Sourced(name, source)
        for name, source in (
            (listener.region, f"listener {listener.address}"),
            (prefix, "path prefix"),
            (header.lower() if header else None, f"header {REGION_HEADER}"),
            (validated.amazon[1] if validated.amazon else None, "Host"),
        )
        if name is not None
    ]
    marketplaces = []
    if query:
        marketplaces = _marketplaces(query, config, config.environment_of(settings), named_otherwise=bool(named))
    chosen = require_agreement(named + marketplaces, "region")
    return chosen or _default_region(account, settings)


def _refuse_unknown_region(method: str, path: str, table: OperationTable) -> None:
    """Raise UnknownRegion where a path, behind its account, is an operation's but for what looks like a region."""
    first, slash, rest = path[1:].partition("/")
    if slash and _LIKE_A_REGION.fullmatch(first) and table.match(method, f"/{rest}") is not None:
        raise UnknownRegion(
            "what stands between the account and Amazon's path is no region",
            f"Write /@ACCOUNT/REGION/ with one of the regions {', '.join(REGIONS)}, or leave REGION out.",
        )


def _marketplaces(query: str, config: Config, environment: Environment, *, named_otherwise: bool) -> list[Sourced]:
    """Return the region of each marketplace id in the query.

    An unknown id is refused where it alone would decide; where the region is named, Amazon judges it: it may have
    opened that marketplace yesterday. The sandbox takes literal test values in its place.
    """
    found: list[Sourced] = []
    for marketplace in _marketplace_ids(query):
        region = MARKETPLACES.get(marketplace) or config.marketplaces.get(marketplace)
        if region is not None:
            found.append(Sourced(region, f"marketplace {marketplace} in the query"))
        elif not named_otherwise and environment == "production":
            raise UnknownMarketplace(
                "the query names a marketplace that the proxy does not know",
                f"Check its id; if Amazon opened it recently, add the header {REGION_HEADER} or list it under "
                "marketplaces.",
            )
    return found


def _marketplace_ids(query: str) -> Iterator[str]:
    """Yield the ids of all four spellings of the parameter, whether repeated or joined by commas."""
    if "arketplaceId" not in query and "%" not in query:
        return
    count = 0
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if name not in MARKETPLACE_PARAMETERS and _decoded(name) not in MARKETPLACE_PARAMETERS:
            continue
        for marketplace in _decoded(value).split(","):
            count += 1
            if count > _MAX_MARKETPLACES:
                raise BadTarget("the query names too many marketplaces", f"Name at most {_MAX_MARKETPLACES}.")
            if marketplace.strip(" \t"):
                yield marketplace.strip(" \t")


def _marketplaces_as_written(query: str) -> str | tuple[str, ...]:
    """Return what decides which ids `_marketplace_ids` yields: the one value as it stands, or the ids.

    The two are of different types: an id may be written as a value is, with its `=`.
    """
    before, _, behind = query.partition("arketplaceId")
    if (
        (before in _M or before.endswith(_BEHIND_ANOTHER))
        and behind.startswith(("=", "s="))
        and "arketplaceId" not in behind
        and not ("%4" in query or "%5" in query or "%6" in query or "%7" in query)  # a letter, perhaps of a name
    ):
        return behind.partition("&")[0]
    return tuple(_marketplace_ids(query))


def _decoded(text: str) -> str:
    return unquote_plus(text) if "%" in text or "+" in text else text


def _default_region(account: Sourced, settings: Account) -> Sourced:
    regions = list(settings.refresh_tokens)
    if len(regions) == 1:
        return Sourced(regions[0], f"the only region of {account.value}")
    state = f"has several regions ({', '.join(regions)})" if regions else "has no refresh token for any region"
    raise RegionRequired(
        f"the account {account.value} {state} and the request names none",
        f"Add the header {REGION_HEADER}, or begin the path with /@{account.value}/REGION/, or name a marketplace, or "
        "set listen[N].region.",
    )


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


# Token.


def _asked_by_token(
    headers: CIMultiDictProxy[str], method: str, path: str, operation: Operation | None
) -> tuple[str, ...] | None:
    """Return the personal data that the app's placeholder for a Restricted Data Token asks for (`local_rdt`).

    None where it brings none, or one that was made for other calls: that has no say here.
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


def _elements(
    headers: CIMultiDictProxy[str],
    by_token: tuple[str, ...] | None,
    settings: Account,
    operation: Operation | None,
    policy: AccessPolicy,
) -> tuple[tuple[str, ...] | None, str]:
    """Return the personal data asked for (None: not even where it is free to ask), in Amazon's order, and who asked."""
    header = _single(headers, ELEMENTS_HEADER)
    if header is None and by_token is not None:
        policy.check_elements(set(by_token))
        if forbids_rdt(operation, policy):
            return None, "the policy"
        return canonical_order(set(by_token), operation), "the app's Restricted Data Token"
    if header is None:
        if forbids_rdt(operation, policy):
            return None, "the policy"
        wanted = settings.data_elements if policy.elements is None else policy.elements & set(settings.data_elements)
        return canonical_order(set(wanted), operation), "the setting data_elements"
    source = f"header {ELEMENTS_HEADER}"
    asked = {element.strip(" \t") for element in header.split(",")} - {""}
    if asked == {"none"}:
        return None, source
    if not asked <= set(ALL_ELEMENTS):
        raise BadOption(
            f"the header {ELEMENTS_HEADER} names something unknown",
            f"Elements are {', '.join(ALL_ELEMENTS)}, or none alone.",
        )
    policy.check_elements(asked)
    if forbids_rdt(operation, policy):
        return None, "the policy"
    return canonical_order(asked, operation), source


def forbids_rdt(operation: Operation | None, policy: AccessPolicy) -> bool:
    """Return whether all that may be had is what an ordinary token brings: no element of it can be left out."""
    if policy.elements is None or operation is None or operation.data_elements:
        return False
    return operation.name in HARMLESS_WITHOUT_RDT


def canonical_order(
    asked: Iterator[str] | set[str] | tuple[DataElement, ...], operation: Operation | None
) -> tuple[str, ...]:
    """Return what the operation knows of `asked`, always in one order, so that equal sets share one token."""
    if operation is None:
        return ()
    wanted = set(asked)
    return tuple(element for element in ALL_ELEMENTS if element in wanted and element in operation.data_elements)


def token_key(
    method: str,
    path: str,
    operation: Operation | None,
    ordinary: TokenKey,
    elements: tuple[str, ...] | None,
    sandbox_rdt: str,
) -> TokenKey:
    if operation is None:
        return ordinary
    if operation.scope:
        # A grantless token is the application's own: it names no account.
        return ordinary._replace(kind="grantless", account="", scope=operation.scope)
    if not needs_rdt(method, operation, ordinary.environment, elements, sandbox_rdt):
        return ordinary
    generic = operation.generic_path or "{" not in operation.template
    return ordinary._replace(
        kind="rdt",
        # Amazon's page wants the sandbox's restricted calls to bring a token made in production (DOC "Selling Partner
        # API Sandbox"); others found that none is needed, which is why it has to be asked for.
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
    """Return whether a Restricted Data Token is needed, or was asked for and can be had."""
    if not operation.restricted or method not in RDT_METHODS or elements is None:
        return False
    if environment == "sandbox" and sandbox_rdt == "none":
        return False
    return bool(elements) or operation.name not in _OPTIONAL


def describe_route(route: Route) -> dict[str, str]:
    """Return what was decided, in words for a person (`sp-api-proxy explain`)."""
    operation = route.operation
    return {
        "account": f"{route.account} (from {route.account_source})",
        "region": f"{route.region} (from {route.region_source})",
        "environment": route.environment,
        "application": route.application,
        "operation": f"{operation.name} ({operation.template})" if operation else "unknown: forwarded as it is",
        "usage plan": describe_plan(operation),
        "token": describe_token(route),
        "sent to": route.endpoint + route.path_and_query,
    }


def describe_plan(operation: Operation | None) -> str:
    if operation is None or operation.rate is None:
        return "none known: sent at once"
    return f"{operation.rate:g} calls per second, {operation.burst} at once, until Amazon's answers say otherwise"


def describe_token(route: Route) -> str:
    token_key, operation = route.token_key, route.operation
    if token_key.kind == "grantless":
        return f"grantless token, scope {token_key.scope}: the operation is the application's own"
    if token_key.kind == "rdt":
        named = ", ".join(token_key.data_elements)
        elements = f" with {named}, which {route.elements_source} asks for" if named else ""
        return f"Restricted Data Token: for {token_key.method} {token_key.path}{elements}"
    if operation is not None and operation.api == "tokens":
        return "ordinary access token: the app gets a token of Amazon's, which it needs not; see local_rdt"
    if operation is not None and operation.restricted:
        why = (
            "the sandbox takes it" if route.environment == "sandbox" else f"no personal data by {route.elements_source}"
        )
        return f"ordinary access token: {why}"
    return "ordinary access token: nothing more is needed"
