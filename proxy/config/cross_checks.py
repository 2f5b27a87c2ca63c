"""Checks that concern several settings at once.

They work on the raw tree and not on the validated Config, so that they are reported together with the problems of
single settings.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from proxy.config import environment
from proxy.config.merge import MergedSettings, is_true, listeners_in, mapping_at
from proxy.config.messages import MAX_NAMED, join, suggest
from proxy.config.store_address import StoreAddress, parse_store
from proxy.config.types import is_loopback, parse_address
from proxy.config.yaml_reader import KeyPath, Problem, Tree, format_path, redact_name

Violations = Iterator[tuple[KeyPath, str]]

_NO_STORE_KEY = (
    "is missing: tokens are encrypted before they are stored in Redis; create a key with openssl rand -base64 32 and "
    "give all replicas the same key"
)
_OPEN_LISTENER = (
    "can be reached by other machines, and any client of it can act as the seller: use 127.0.0.1 or a Unix socket, "
    "configure tls with a client_ca, give the callers keys, or write {address: …, insecure_network: true} if the "
    "network itself blocks other clients"
)
_TRACING_NEEDS = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
_CHECKOUT = Path(__file__).parents[2]


def record_violations(merged: MergedSettings, environ: Mapping[str, str]) -> None:
    """Append a problem for each rule that the settings break, and a warning for an unencrypted store."""
    tree = merged.tree
    accounts, applications = mapping_at(tree, "accounts"), mapping_at(tree, "applications")
    violations = [
        *_missing_parts(accounts, applications, environ),
        *_unknown_applications(accounts, applications),
        *_unknown_accounts(tree, accounts),
        *_open_listeners(tree),
        *_indistinct_callers(tree),
        *_missing_store_key(tree),
        *_missing_tracing_library(tree),
    ]
    merged.problems += [Problem(format_path(path), message, merged.location_of(path)) for path, message in violations]
    _warn_of_insecure_store(merged)


def _missing_parts(accounts: Tree, applications: Tree, environ: Mapping[str, str]) -> Violations:
    if not applications:
        hint = environment.suggest_variable(environment.APPLICATION_NAMES, environ)
        message = "is missing: give a client_id and client_secret, or set LWA_APP_ID and LWA_CLIENT_SECRET"
        yield ("applications",), message + hint
    if not accounts:
        hint = environment.suggest_variable(environment.ACCOUNT_NAMES, environ)
        yield ("accounts",), f"is missing: give an account with its refresh_tokens, or set SP_API_REFRESH_TOKEN{hint}"


def _unknown_applications(accounts: Tree, applications: Tree) -> Violations:
    for name, account in accounts.items():
        chosen = account.get("application") if isinstance(account, dict) else None
        path: KeyPath = ("accounts", name, "application")
        if chosen is None and len(applications) > 1:
            yield path, f"is missing: choose one of {join(map(redact_name, applications))}"
        elif isinstance(chosen, str) and applications and chosen not in applications:
            yield path, f"is not a configured application; {suggest(applications, chosen)}"


def _unknown_accounts(tree: Tree, accounts: Tree) -> Violations:
    named: list[tuple[KeyPath, Any]] = [(("default_account",), tree.get("default_account"))]
    for index, listener in enumerate(listeners_in(tree)):
        named.append((("listen", index, "account"), listener.get("account")))
        named += _names_in(("listen", index, "accounts"), listener.get("accounts"))
    for caller, settings in mapping_at(tree, "callers").items():
        if isinstance(settings, dict):
            named += _names_in(("callers", caller, "accounts"), settings.get("accounts"))
    wrong = [(path, name) for path, name in named if isinstance(name, str) and accounts and name not in accounts]
    for number, (path, name) in enumerate(wrong):
        # The search for a similar name is quadratic: with thousands of accounts it is limited to the first problems.
        yield path, f"is not a configured account; {suggest(accounts, name if number < MAX_NAMED else '')}"


def _names_in(path: KeyPath, value: object) -> list[tuple[KeyPath, Any]]:
    return [((*path, index), name) for index, name in enumerate(value)] if isinstance(value, list) else []


def _indistinct_callers(tree: Tree) -> Violations:
    """Two callers with the same identity, and identities that no listener can receive."""
    callers = {name: caller for name, caller in mapping_at(tree, "callers").items() if isinstance(caller, dict)}
    for identity in ("key", "certificate", "uid"):
        seen: dict[str, str] = {}
        for name, caller in callers.items():
            if (value := caller.get(identity)) is None:
                continue
            first = seen.setdefault(str(value).strip(), name)
            if first != name:
                yield (
                    ("callers", name, identity),
                    f"is the same as in callers.{redact_name(first)}: the two cannot be told apart",
                )
    listeners = list(listeners_in(tree))
    if not any(isinstance(tls := one.get("tls"), dict) and tls.get("client_ca") for one in listeners):
        for name in (name for name, caller in callers.items() if caller.get("certificate") is not None):
            yield ("callers", name, "certificate"), "can never match: no listener has tls.client_ca"
    if not any(str(one.get("address", "")).startswith("unix:") for one in listeners):
        for name in (name for name, caller in callers.items() if caller.get("uid") is not None):
            yield ("callers", name, "uid"), "can never match: no listener is a Unix socket"


def _missing_store_key(tree: Tree) -> Violations:
    if _store_of(tree).is_shared and not tree.get("store_key"):
        yield ("store_key",), _NO_STORE_KEY


def _store_of(tree: Tree) -> StoreAddress:
    try:
        return parse_store(tree.get("store", "memory"))
    except ValueError:
        return StoreAddress()  # not an address: reported by its own type


def _warn_of_insecure_store(merged: MergedSettings) -> None:
    """Warn of plain `redis://` to another host: tokens are encrypted, but the Redis password is not."""
    store = _store_of(merged.tree)
    if store.kind == "redis" and not is_loopback(store.host):
        message = "is not encrypted on the network: use rediss:// if others can read or change the traffic"
        merged.warnings.append(Problem("store", message, merged.location_of(("store",))))


def _missing_tracing_library(tree: Tree) -> Violations:
    if mapping_at(tree, "tracing").get("endpoint") is not None and not _is_installed(*_TRACING_NEEDS):
        yield ("tracing", "endpoint"), f"needs OpenTelemetry, which is not installed: {how_to_install(_CHECKOUT)}"


def how_to_install(folder: Path) -> str:
    """Return the command that installs OpenTelemetry; a checkout is not known to pip by the distribution's name."""
    if (folder / "pyproject.toml").is_file():
        return f"python -m pip install '.[otel]' in {folder}, with the python that runs the proxy"
    return "pip install 'sp-api-proxy[otel]'"


def _is_installed(*modules: str) -> bool:
    try:
        return all(find_spec(module) is not None for module in modules)
    except ModuleNotFoundError:  # raised by find_spec where a parent package is missing
        return False


def _open_listeners(tree: Tree) -> Violations:
    """Addresses that other machines can reach must be protected or marked as intended."""
    callers = mapping_at(tree, "callers").values()
    has_keys = any(isinstance(caller, dict) and caller.get("key") is not None for caller in callers)
    for index, listener in enumerate(listeners_in(tree)):
        tls = listener.get("tls")
        needs_certificate = isinstance(tls, dict) and bool(tls.get("client_ca"))
        needs_key = has_keys and not is_true(listener.get("anonymous"))
        is_intended = is_true(listener.get("insecure_network"))
        if _is_open(listener.get("address")) and not (is_intended or needs_certificate or needs_key):
            yield ("listen", index, "address"), _OPEN_LISTENER
    if _is_open(tree.get("admin")):
        yield ("admin",), "must be a loopback address; open `health` instead for probes and Prometheus"


def _is_open(address: object) -> bool:
    try:
        return not parse_address(address).is_local
    except ValueError:
        return False  # not an address: reported by its own type
