"""Account and region of a request, from the path prefix, headers, listener, host name and marketplaces."""

import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote_plus

from multidict import CIMultiDictProxy

from proxy.amazon.marketplaces import MARKETPLACE_PARAMETERS, MARKETPLACES
from proxy.amazon.operations import OperationTable
from proxy.config import REGIONS, Account, Config, Environment, Listener
from proxy.errors import (
    AccountRequired,
    BadTarget,
    ConflictingSources,
    HeaderRequired,
    MalformedRequest,
    RegionRequired,
    UnknownAccount,
    UnknownMarketplace,
    UnknownRegion,
)
from proxy.request.authentication import KEY_HEADER
from proxy.request.authorization import AccessPolicy
from proxy.request.validation import ValidatedTarget

ACCOUNT_HEADER = "x-sp-account"
REGION_HEADER = "x-sp-region"

_MAX_MARKETPLACES = 64
# What people write instead of a region: a country, a continent, an AWS region.
_LIKE_A_REGION = re.compile(
    r"[a-z]{2}(-[a-z]+-\d)?|usa|europe|emea|asia|apac|japan|(north[-_]?)?america|far[-_]?east", re.IGNORECASE | re.ASCII
)


class Sourced(NamedTuple):
    """A value, and the words for where it came from."""

    value: str
    source: str


def split_prefix(target: str) -> tuple[str | None, str | None, str]:
    """Return account, region and the remaining target of `/@ACCOUNT/REGION/…` or `/@ACCOUNT/…`; raise BadTarget."""
    if not target.startswith("/@"):
        return None, None, target
    account, slash, rest = target[2:].partition("/")
    if not slash or not account:
        raise BadTarget("nothing follows the account in the path", "Write /@ACCOUNT/ and then Amazon's own path.")
    region, slash, remainder = rest.partition("/")
    if slash and region.lower() in REGIONS:
        rest = remainder
    else:
        region = ""
    if rest.startswith("/"):
        raise BadTarget("a double slash follows the prefix", "Write /@ACCOUNT/REGION/ and then Amazon's own path.")
    return account, region.lower() or None, f"/{rest}"


def account_of(
    prefix: str | None, headers: CIMultiDictProxy[str], listener: Listener, config: Config, policy: AccessPolicy
) -> Sourced:
    """Return the account that a request names, or the default one.

    Raise HeaderRequired, NotAllowed, UnknownAccount, ConflictingSources or AccountRequired.
    """
    header = single_value(headers, ACCOUNT_HEADER)
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
    default = _default_account(config, policy)
    policy.check_account(default.value)
    return default


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


def single_value(headers: CIMultiDictProxy[str], name: str) -> str | None:
    """Return the header's value, None where it is absent; raise MalformedRequest where it occurs more than once."""
    if name not in headers:
        return None
    values = headers.getall(name)
    if len(values) > 1:
        raise MalformedRequest(f"the header {name} is given {len(values)} times", "Send it once.")
    return values[0].strip(" \t")


def require_agreement(choices: list[Sourced], what: str) -> Sourced | None:
    """Return the first choice, None where there is none; raise ConflictingSources where two differ."""
    for other in choices[1:]:
        if other.value != choices[0].value:
            raise ConflictingSources(
                f"two sources name different {what}s: the {choices[0].source} says {choices[0].value}, "
                f"the {other.source} says {other.value}",
                f"Name the {what} once, or the same one everywhere.",
            )
    return choices[0] if choices else None


# Region.


def region_of(
    prefix: str | None,
    headers: CIMultiDictProxy[str],
    listener: Listener,
    validated: ValidatedTarget,
    query: str,
    account: Sourced,
    settings: Account,
    config: Config,
) -> Sourced:
    """Return the region that a request names, or the account's only one.

    Raise UnknownRegion, UnknownMarketplace, ConflictingSources or RegionRequired.
    """
    header = single_value(headers, REGION_HEADER)
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


def reject_unknown_region(method: str, path: str, table: OperationTable) -> None:
    """Raise UnknownRegion where the path is an operation's path preceded by a segment that looks like a region."""
    first, slash, rest = path[1:].partition("/")
    if slash and _LIKE_A_REGION.fullmatch(first) and table.match(method, f"/{rest}") is not None:
        raise UnknownRegion(
            "the segment between the account and Amazon's path is not a region",
            f"Write /@ACCOUNT/REGION/ with one of the regions {', '.join(REGIONS)}, or leave REGION out.",
        )


def _marketplaces(query: str, config: Config, environment: Environment, *, named_otherwise: bool) -> list[Sourced]:
    """Return the region of each marketplace id in the query.

    An unknown id is refused only where nothing else names the region. Otherwise Amazon decides: it may have opened that
    marketplace after this release. The sandbox expects literal test values in place of ids.
    """
    found: list[Sourced] = []
    for marketplace in marketplace_ids(query):
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


def marketplace_ids(query: str) -> Iterator[str]:
    """Yield the ids of all four spellings of the parameter, whether repeated or joined by commas; raise BadTarget."""
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
