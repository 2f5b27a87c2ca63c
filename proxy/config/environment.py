"""Settings from environment variables: the proxy's own, and those of well-known client libraries.

`SP_API_PROXY_` plus the upper-case key overrides any setting. The names of the well-known client libraries fill in
what the file leaves out, and never override it. Every name also exists with `_FILE`: the value is in that file.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, get_args, get_origin

from proxy.config.model import Config, settings_in
from proxy.config.types import REGIONS
from proxy.config.values import is_list, is_mapping, is_user_keyed, kind_below, parse
from proxy.config.yaml_reader import KeyPath, Problem, Tree

PREFIX = "SP_API_PROXY_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
MAX_TRIED = 100  # names of accounts and the like that are compared with a misspelt one

# Kubernetes sets these in every pod of a namespace with a Service named sp-api-proxy ("Environment variables" of its
# Service documentation; the PORT_… forms are those of Docker links); they are not settings.
_KUBERNETES = re.compile(r"SP_API_PROXY_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_\d+_(TCP|UDP)(_.+)?)?)")

_CLIENT_ID = ("LWA_APP_ID", "LWA_CLIENT_ID", "SELLING_PARTNER_APP_CLIENT_ID", "SP_API_CLIENT_ID")
_CLIENT_SECRET = ("LWA_CLIENT_SECRET", "SELLING_PARTNER_APP_CLIENT_SECRET", "SP_API_CLIENT_SECRET")
_REFRESH_TOKEN = "SP_API_REFRESH_TOKEN"  # noqa: S105 - a variable's name
# AWS regions too: they were part of each request's signature, which Amazon required until 2023-10-02.
_REGION_NAMES: dict[str, str] = {
    **{str(region): str(region) for region in REGIONS},
    "us-east-1": "na",
    "eu-west-1": "eu",
    "us-west-2": "fe",
}

Found = tuple[KeyPath, Any, str]  # the key path, the value, the variable


def lookup(environ: Mapping[str, str], name: str) -> tuple[Any, str] | None:
    """Return the value and the variable of NAME or NAME_FILE (a `{file: …}`), or None where neither is set."""
    # Empty counts as unset: Docker Compose passes an unset ${NAME} on as an empty string.
    if environ.get(name):
        return environ[name], name
    if environ.get(f"{name}_FILE"):
        return {"file": environ[f"{name}_FILE"]}, f"{name}_FILE"
    return None


def _first_set(environ: Mapping[str, str], names: tuple[str, ...], suffix: str = "") -> tuple[Any, str] | None:
    return next((found for name in names if (found := lookup(environ, name + suffix))), None)


# Our own names: SP_API_PROXY_ and the upper-case key.


def overrides(environ: Mapping[str, str], tree: Tree) -> tuple[list[Found], list[Problem]]:
    """Return the settings of the `SP_API_PROXY_…` variables; account and application names are looked up in `tree`."""
    found: list[Found] = []
    problems: list[Problem] = []
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE or _KUBERNETES.fullmatch(variable):
            continue
        name = variable.removeprefix(PREFIX)
        if path := _find(Config, name, tree):
            value, wrong = parse(path, environ[variable], f"environment variable {variable}")
            problems += wrong
            found += [] if wrong else [(path, value, variable)]
        elif name.endswith("_FILE") and (path := _find(Config, name.removesuffix("_FILE"), tree)):
            found.append((path, {"file": environ[variable]}, variable))
        else:
            problems.append(Problem(variable, f"is not a setting; {_nearest(name, tree)}", "environment"))
    return sorted(found, key=_list_order), problems


def _list_order(found: Found) -> tuple[tuple[int, str], ...]:
    """Return a sort key: list items by number, so that item 10 follows item 2, and groups before their items."""
    return tuple((part, "") if isinstance(part, int) else (-1, part) for part in found[0])


def _find(kind: Any, name: str, tree: Any) -> KeyPath | None:
    """Return the key path that the upper-case `name` stands for below a value of type `kind`."""
    for part, below in _children(kind, name, tree):
        upper = _upper(part)
        if name == upper:
            return (part,)
        if name.startswith(f"{upper}_"):
            path = _find(below, name.removeprefix(f"{upper}_"), _at(tree, part))
            if path:
                return (part, *path)
    return None


def _upper(part: str | int) -> str:
    return re.sub(r"[^A-Z0-9]", "_", str(part).upper())


def _at(tree: Any, part: str | int) -> Any:
    return tree.get(part) if isinstance(tree, dict) else None


def _children(kind: Any, name: str, tree: Any) -> Iterator[tuple[str | int, Any]]:
    if is_list(kind):
        number = name.partition("_")[0]
        if number.isascii() and number.isdigit() and len(number) <= 4:
            yield int(number), kind_below(kind, 0)
    elif is_user_keyed(kind):
        value_kind = kind_below(kind, "")
        yield from ((key, value_kind) for key in (tree if isinstance(tree, dict) else ()))
        if not is_mapping(value_kind):
            yield name, value_kind  # such as a marketplace id, which is upper case
            return
        # A name that the file does not have: the shortest one that is followed by a known setting.
        words = name.lower().split("_")
        yield from (("_".join(words[:count]), value_kind) for count in range(1, len(words)))
    else:
        yield from ((key, kind_below(kind, key)) for key in _known_keys(kind))


def _known_keys(kind: Any) -> tuple[str, ...]:
    if settings := settings_in(kind):
        return tuple(settings.model_fields)
    return get_args(get_args(kind)[0]) if get_origin(kind) is dict else ()


def _nearest(name: str, tree: Tree) -> str:
    """Return a hint for an unknown variable: the similar one, or the rule for names."""
    new = name.upper().split("_")[1:2]  # may be the name of an account that the file does not have
    near = difflib.get_close_matches(name.upper(), list(_names(Config, tree, new)), n=1, cutoff=0.75)
    if near:
        return f"did you mean {PREFIX}{near[0]}?"
    return f"names are {PREFIX} and the key in upper case, such as {PREFIX}LIMITS_MAX_WAIT for limits.max_wait"


def _names(kind: Any, tree: Any, new: list[str]) -> Iterator[str]:
    """Yield the names of all settings and groups below a type; `new` are further user-chosen names to try."""
    keys: Iterable[str | int]
    if is_list(kind):
        keys = (0,) if is_mapping(kind_below(kind, 0)) else ()
    elif is_user_keyed(kind):
        keys = [*islice(tree if isinstance(tree, dict) else (), MAX_TRIED), *new]
    else:
        keys = _known_keys(kind)
    for key in keys:
        yield _upper(key)
        yield from (f"{_upper(key)}_{below}" for below in _names(kind_below(kind, key), _at(tree, key), new))


# Variables of other libraries.


def library_variables(environ: Mapping[str, str], tree: Tree) -> tuple[list[Found], list[Problem]]:
    """Return the application and the accounts of well-known variables, where `tree` has none."""
    tracing, wrong = _tracing(environ)
    found = [*_forward_proxy(environ, tree), *tracing, *_applications(environ, tree)]
    if tree.get("accounts"):
        return found, wrong
    accounts, problems = _accounts(environ)
    return found + accounts, wrong + problems


# OpenTelemetry's variables for the settings of `tracing`; the SDK reads all others itself.
_OTLP = ("OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_")
_SAMPLERS = {"always_on": "1", "always_off": "0", "traceidratio": None}  # None: the ratio is in OTEL_TRACES_SAMPLER_ARG


def _tracing(environ: Mapping[str, str]) -> tuple[list[Found], list[Problem]]:
    """Return the tracing settings of OpenTelemetry's variables; unlike other libraries' they override the file."""
    off = next((name for name, value in _OFF.items() if environ.get(name, "").lower() == value), None)
    if off is not None:
        return [(("tracing", "endpoint"), None, off)], []
    found: list[Found] = []
    problems: list[Problem] = []
    # OpenTelemetry's exporter specification: the endpoint for traces is complete, the general one is a base URL.
    for prefix, path in zip(_OTLP, ("", "/v1/traces"), strict=True):
        if not found and (endpoint := environ.get(f"{prefix}ENDPOINT")):
            found.append((("tracing", "endpoint"), endpoint.rstrip("/") + path, f"{prefix}ENDPOINT"))
    protocol = _first_set(environ, tuple(f"{prefix}PROTOCOL" for prefix in _OTLP))
    if found and protocol and protocol[0] != "http/protobuf":
        problems.append(
            Problem(protocol[1], "must be http/protobuf: other OTLP protocols are not supported", "environment")
        )
    if hit := _first_set(environ, tuple(f"{prefix}HEADERS" for prefix in _OTLP)):
        found.append((("tracing", "headers"), *hit))
    if name := environ.get("OTEL_SERVICE_NAME"):
        found.append((("tracing", "service_name"), name, "OTEL_SERVICE_NAME"))
    # An incoming traceparent decides in any case, so that parentbased_ changes nothing here.
    sampler = environ.get("OTEL_TRACES_SAMPLER", "").removeprefix("parentbased_")
    if sampler in _SAMPLERS:
        # 1 is the default of OTEL_TRACES_SAMPLER_ARG in OpenTelemetry's specification.
        share = _SAMPLERS[sampler] or environ.get("OTEL_TRACES_SAMPLER_ARG") or "1"
        found.append((("tracing", "sample"), share, "OTEL_TRACES_SAMPLER"))
    elif sampler:
        known = ", ".join(_SAMPLERS)
        problems.append(
            Problem(
                "OTEL_TRACES_SAMPLER", f"must be one of {known}, optionally with the prefix parentbased_", "environment"
            )
        )
    return found, problems


_OFF = {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "none"}


def _forward_proxy(environ: Mapping[str, str], tree: Tree) -> list[Found]:
    """Return the forward proxy of HTTPS_PROXY and NO_PROXY; HTTP_PROXY is ignored, as Amazon is reached by HTTPS."""
    pool = tree.get("pool")
    pool = {} if pool is None else pool
    if not isinstance(pool, dict) or "proxy" in pool:
        return []
    # Lower case first, as curl and Python's urllib.request.getproxies_environment do.
    hit = next((name for name in ("https_proxy", "HTTPS_PROXY") if environ.get(name)), None)
    if hit is None:
        return []
    found: list[Found] = [(("pool", "proxy"), environ[hit], hit)]
    exceptions = next((name for name in ("no_proxy", "NO_PROXY") if environ.get(name)), None)
    if exceptions is not None and "no_proxy" not in pool:
        names = [name.strip() for name in environ[exceptions].split(",") if name.strip()]
        found.append((("pool", "no_proxy"), names, exceptions))
    return found


def _applications(environ: Mapping[str, str], tree: Tree) -> list[Found]:
    """Return client id and secret for the only application, if it lacks them (`main` where none is configured)."""
    applications = tree.get("applications") or {}
    if not isinstance(applications, dict) or len(applications) > 1:
        return []
    name, settings = next(iter(applications.items()), ("main", {}))
    keys = (("client_id", _CLIENT_ID), ("client_secret", _CLIENT_SECRET))
    found: list[Found] = []
    for key, names in keys:
        if isinstance(settings or {}, dict) and key not in (settings or {}) and (hit := _first_set(environ, names)):
            found.append((("applications", name, key), *hit))
    return found


def _accounts(environ: Mapping[str, str]) -> tuple[list[Found], list[Problem]]:
    found: list[Found] = []
    problems: list[Problem] = []
    found += [
        (("accounts", "default", "refresh_tokens", region), *hit)
        for region in REGIONS
        if (hit := lookup(environ, f"{_REFRESH_TOKEN}_{region.upper()}"))
    ]
    if hit := lookup(environ, _REFRESH_TOKEN):
        # Never guessed: at another region's host a token gets a 403 that names no reason (models#4825).
        region_name = _region(environ, problems, needed_by=_REFRESH_TOKEN)
        if region_name:
            found.append((("accounts", "default", "refresh_tokens", region_name), *hit))
    has_default = bool(found)
    for suffix in _account_suffixes(environ):
        account, _, last = suffix.rpartition("_")
        if account and last.lower() in REGIONS:  # _ACME_NA: the account acme in na
            found += _suffixed_account(environ, account, last.lower(), variable=_REFRESH_TOKEN + suffix)
        else:
            region_name = _region(environ, problems, needed_by=_REFRESH_TOKEN + suffix)
            found += _suffixed_account(environ, suffix, region_name, variable=_REFRESH_TOKEN + suffix)
    if has_default and any(path[0] == "applications" for path, _, _ in found):
        # With several applications, the account without a suffix must name its own.
        found.append((("accounts", "default", "application"), "main", _REFRESH_TOKEN))
    return found, problems


def suggest_variable(wanted: Iterable[str], environ: Mapping[str, str]) -> str:
    """Return `; LWA_APPID is set: did you mean LWA_APP_ID?` for a set variable that is similar to a wanted one."""
    names = list(wanted)
    for variable in sorted(environ):
        near = next((name for name in names if _is_similar(variable, name)), None)
        if near is not None and variable not in names:
            return f"; {variable} is set: did you mean {near}?"
    return ""


def suggest_replacement(name: str, environ: Mapping[str, str]) -> str:
    """Return `; did you mean LWA_APP_ID?` for a set variable that is similar to `name`."""
    near = next((variable for variable in sorted(environ) if environ[variable] and _is_similar(name, variable)), None)
    return f"; did you mean {near}?" if near is not None else ""


def _is_similar(one: str, other: str) -> bool:
    """Return whether one name may be a misspelling of the other, and not that of another region or account."""
    if one.replace("_", "") == other.replace("_", ""):
        return True
    words, others = one.split("_"), other.split("_")
    if len(words) != len(others) or re.sub(r"\D", "", one) != re.sub(r"\D", "", other):
        return False
    return all(
        mine == theirs or difflib.SequenceMatcher(None, mine, theirs).ratio() > 0.7
        for mine, theirs in zip(words, others, strict=True)
    )


APPLICATION_NAMES = (*_CLIENT_ID, *_CLIENT_SECRET)
ACCOUNT_NAMES = (_REFRESH_TOKEN, *(f"{_REFRESH_TOKEN}_{region.upper()}" for region in REGIONS))


def _account_suffixes(environ: Mapping[str, str]) -> list[str]:
    """Return `_ACME` for SP_API_REFRESH_TOKEN_ACME: in python-amazon-sp-api, the suffix names the account."""
    reserved = {f"_{region.upper()}" for region in REGIONS}
    suffixes = {
        name.removeprefix(_REFRESH_TOKEN).removesuffix("_FILE")
        for name in environ
        if name.startswith(f"{_REFRESH_TOKEN}_") and environ[name]
    }
    return sorted(suffixes - reserved - {""})


def _suffixed_account(environ: Mapping[str, str], suffix: str, region: str | None, *, variable: str) -> list[Found]:
    account = suffix.removeprefix("_").lower()
    found: list[Found] = []
    if region and (hit := lookup(environ, variable)):
        found.append((("accounts", account, "refresh_tokens", region), *hit))
    client_id = _first_set(environ, _CLIENT_ID, suffix)
    client_secret = _first_set(environ, _CLIENT_SECRET, suffix)
    if client_id and client_secret:
        found.append((("applications", account, "client_id"), *client_id))
        found.append((("applications", account, "client_secret"), *client_secret))
        found.append((("accounts", account, "application"), account, client_id[1]))
    elif _first_set(environ, _CLIENT_ID):
        found.append((("accounts", account, "application"), "main", variable))
    return found


def _region(environ: Mapping[str, str], problems: list[Problem], needed_by: str) -> str | None:
    text = environ.get("SP_API_REGION", "").strip().lower()
    if text in _REGION_NAMES:
        return _REGION_NAMES[text]
    state = "is not set" if not text else "must be na, eu or fe"
    problems.append(
        Problem("SP_API_REGION", f"{state}: {needed_by} is valid in one region only, so name it here", "environment")
    )
    return None
