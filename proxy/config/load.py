"""How do flags, environment, file and defaults become one frozen Config, or the list of everything wrong with them?

Precedence is flag > environment > file > default. Nobody else reads `os.environ` or the configuration file.
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from proxy.config import environment, values
from proxy.config.merge import MergedSettings
from proxy.config.messages import MAX_NAMED, join, message_of, suggest
from proxy.config.model import Address, Config, dump, is_loopback, parse_address
from proxy.config.secret import SourcedStr
from proxy.config.store_address import StoreAddress, parse_store
from proxy.config.yaml_reader import (
    MAX_BYTES,
    Document,
    KeyPath,
    Problem,
    Tree,
    format_path,
    read_yaml,
    redact_name,
    without_secret,
)

Flags = Sequence[tuple[str, Any, str]]  # a key as people write it, its value, the flag that said so
_VARIABLE = re.compile(r"\$(?:\$|\{([^}]*)\})")
_MAX_SECRET_FILE = 64 * 1024


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds every reason."""

    def __init__(self, problems: list[Problem], files: Iterable[Path] = ()) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
        self.files = tuple(files)  # those that were read, or should have been


@dataclass(frozen=True, slots=True)
class Loaded:
    """A Config, the origin of each value by its key path, and warnings about valid but doubtful settings."""

    config: Config
    origins: Mapping[KeyPath, str]
    warnings: tuple[Problem, ...] = ()
    files: tuple[Path, ...] = ()  # all that the configuration stands in: it changes when one of them does

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield (key, value, origin) for every setting in force, secrets as `***`."""
        yield from self._rows(dump(self.config), ())

    def _rows(self, value: Any, path: KeyPath) -> Iterator[tuple[str, str, str]]:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                yield from self._rows(below, (*path, key))
        elif isinstance(value, list) and value:
            for index, below in enumerate(value):
                yield from self._rows(below, (*path, index))
        else:
            yield (
                format_path(path),
                json.dumps(value) if isinstance(value, bool | list | dict) else str(value),
                self._origin(path),
            )

    def _origin(self, path: KeyPath) -> str:
        while path and path not in self.origins and isinstance(path[-1], int):
            path = path[:-1]
        return self.origins.get(path, "default")

    def with_locations(self, problems: Iterable[Problem]) -> list[Problem]:
        """Return what was found wrong with the Config later, with the places where it is written."""
        places = {format_path(path): origin for path, origin in self.origins.items()}
        return [
            problem if problem.where else replace(problem, where=_locate(problem.key, places)) for problem in problems
        ]


def _locate(key: str, places: Mapping[str, str]) -> str:
    while key and key not in places:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return places.get(key, "")


def load_config(path: str | None, environ: Mapping[str, str], flags: Flags = ()) -> Loaded:
    """Return the Config in force; `path` is the YAML file, if any, and `flags` what the command line set.

    Raises ConfigError with every problem there is.
    """
    merged = _merge_sources(path, environ, flags)
    config = _validated(merged)
    if config is not None:
        merged.files += _named_files(config)
    _cross_check(merged, environ)
    _record_insecure_files(merged, path)
    _record_insecure_store(merged)
    if _is_true(merged.tree.get("strict_permissions")):
        merged.problems += merged.insecure_files
    if merged.problems or config is None:
        raise ConfigError(_sorted_problems(merged.problems), merged.files)
    return Loaded(
        config, merged.origins, tuple(_sorted_problems(merged.insecure_files + merged.warnings)), tuple(merged.files)
    )


def admin_addresses(path: str | None, environ: Mapping[str, str], flags: Flags = ()) -> list[Address]:
    """Return where a proxy with this configuration says how it is: its admin address, its health address.

    Whatever else may be wrong with the configuration is not looked at: the proxy may be running with an earlier one.
    Raises ConfigError where it cannot be read.
    """
    merged = _merge_sources(path, environ, flags)
    found: list[Address] = []
    for key in ("admin", "health"):
        written = merged.tree.get(key, Config.model_fields[key].default)
        try:
            found += [] if written is None else [parse_address(written)]
        except ValueError as exc:
            problem = Problem(key, "must be an address such as 127.0.0.1:9090", merged.location_of((key,)))
            raise ConfigError([problem]) from exc
    return found


def applications_config(path: str | None, environ: Mapping[str, str], flags: Flags) -> Config:
    """Return a Config of the applications, and of how to reach Login with Amazon, alone.

    The accounts are not looked at: their refresh tokens may be what is still to be got. Raises ConfigError.
    """
    merged = _merge_sources(path, environ, flags)
    merged.tree = {key: merged.tree[key] for key in _FOR_APPLICATIONS if key in merged.tree}
    merged.problems = [
        problem for problem in merged.problems if not problem.key or problem.key.split(".")[0] in _FOR_APPLICATIONS
    ]
    config = _validated(merged)
    if merged.problems or config is None:
        raise ConfigError(_sorted_problems(merged.problems), merged.files)
    return config


_FOR_APPLICATIONS = ("applications", "endpoints", "pool", "timeouts")


def _merge_sources(path: str | None, environ: Mapping[str, str], flags: Flags) -> MergedSettings:
    merged = MergedSettings(path or "")
    if path is not None:
        _add_file(merged, path, environ)
    _add_environment(merged, environ)
    _add_flags(merged, flags)
    merged.list_listeners()
    return merged


def _named_files(config: Config) -> Iterator[Path]:
    """Yield the files that settings name and others read: certificates, and what to trust."""
    for listener in config.listen:
        if listener.tls is not None:
            names = (listener.tls.certificate, listener.tls.key, listener.tls.client_ca)
            yield from (Path(name) for name in names if name is not None)
    if config.pool.ca_file is not None:
        yield Path(config.pool.ca_file)


def _is_true(value: object) -> bool:
    """Return whether a raw value will be read as true."""
    return str(value).lower() in {"true", "t", "yes", "y", "on", "1"}


def _add_file(merged: MergedSettings, path: str, environ: Mapping[str, str]) -> None:
    merged.files.append(Path(path))
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as exc:
        problem = Problem("", f"cannot be read: {os.strerror(exc.errno or 0)}", path)
        raise ConfigError([problem], merged.files) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError([Problem("", "is not UTF-8", path)], merged.files) from exc
    document = read_yaml(text, path)
    if document.problems and not document.tree:
        # The text as a whole is not readable: what its settings might lack is noise.
        raise ConfigError(document.problems, merged.files)
    merged.problems += document.problems
    merged.origins = document.origins
    merged.origins.pop((), None)  # what nothing was written about has no line
    folder = Path(path).resolve().parent
    merged.tree = {
        key: _resolved(value, (key,), document, merged, environ, folder) for key, value in document.tree.items()
    }


def _resolved(
    value: Any, path: KeyPath, document: Document, merged: MergedSettings, environ: Mapping[str, str], folder: Path
) -> Any:
    """Return `value` with every `${NAME}` and `{file: …}` below it replaced by what it stands for."""
    if isinstance(value, dict) and set(value) == {"file"} and isinstance(value["file"], str):
        name = _expanded(value["file"], path, document, merged, environ)
        return _from_file(folder / name, path, merged)
    if isinstance(value, dict):
        return {key: _resolved(below, (*path, key), document, merged, environ, folder) for key, below in value.items()}
    if isinstance(value, list):
        return [
            _resolved(below, (*path, index), document, merged, environ, folder) for index, below in enumerate(value)
        ]
    return _expanded(value, path, document, merged, environ) if isinstance(value, str) else value


def _expanded(text: str, path: KeyPath, document: Document, merged: MergedSettings, environ: Mapping[str, str]) -> str:
    """Return `text` with `${NAME}` replaced by the variable and `$$` by a dollar sign."""

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return "$"
        value = environ.get(name, "")
        where = document.origins.get(path, document.name)
        if not value:
            # To look for what was meant takes its time where there are thousands of both.
            meant = environment.suggest_replacement(name, environ) if len(merged.problems) < MAX_NAMED else ""
            state = "is empty" if name in environ else f"is not set{meant}"
            merged.problems.append(
                Problem(format_path(path), f"environment variable {redact_name(name) or '(no name)'} {state}", where)
            )
            return "unset"  # stands in, so that the type is not complained about as well
        merged.origins[path] = f"{where.partition(', from')[0]}, from environment variable {name}"
        return value

    expanded = _VARIABLE.sub(replace, text)
    whole = _VARIABLE.fullmatch(text)
    if whole and whole[1]:
        return SourcedStr.of(expanded, partial(environ.get, whole[1]), f"environment variable {whole[1]}")
    return expanded


def _from_file(path: Path, key_path: KeyPath, merged: MergedSettings) -> str:
    """Return a secret file's text without the white space around it."""
    where, name = merged.origins.get(key_path, ""), without_secret(str(path))
    merged.files.append(path)
    try:
        text = _text_of(path)
    except OSError as exc:
        merged.problems.append(Problem(format_path(key_path), f"file {name}: {os.strerror(exc.errno or 0)}", where))
        return "unset"
    except ValueError:  # undecodable text, or a name that no file can have
        merged.problems.append(Problem(format_path(key_path), f"file {name} is not UTF-8 text", where))
        return "unset"
    if not text.strip() or len(text) > _MAX_SECRET_FILE:
        state = "is empty" if not text.strip() else f"is larger than {_MAX_SECRET_FILE // 1024} KiB"
        merged.problems.append(Problem(format_path(key_path), f"file {name} {state}", where))
        return "unset"
    merged.origins[key_path] = f"{where}, from file {path}" if where else f"file {path}"
    merged.insecure_files += _is_exposed(path, key_path, where)
    return SourcedStr.of(text.strip(), partial(_reread, path), f"file {path}")


_OTHER_READERS = stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP  # the group may read: so container platforms mount secrets


def _is_exposed(path: Path, key_path: KeyPath, where: str) -> list[Problem]:
    """Return what is wrong with the rights on a file that holds a secret; nothing where a system has no modes."""
    if os.name != "posix" or not path.stat().st_mode & _OTHER_READERS:
        return []
    return [
        Problem(format_path(key_path), f"file {path} holds a secret that others can read or change: chmod 600", where)
    ]


def _record_insecure_files(merged: MergedSettings, path: str | None) -> None:
    """Look at the files whose rights were not looked at when they were read: the configuration, and TLS keys."""
    written = next(
        (key for key in _secret_keys(merged.tree) if ", from" not in merged.origins.get(key, ", from")), None
    )
    if path is not None and written is not None and merged.origins[written].startswith(f"{path}:"):
        merged.insecure_files += _is_exposed(Path(path), written, merged.origins[written])
    for index, listener in enumerate(_listeners(merged.tree)):
        tls = listener.get("tls")
        key_file = tls.get("key") if isinstance(tls, dict) else None
        if isinstance(key_file, str) and Path(key_file).is_file():
            key_path: KeyPath = ("listen", index, "tls", "key")
            merged.insecure_files += _is_exposed(Path(key_file), key_path, merged.location_of(key_path))


def _secret_keys(tree: Tree) -> Iterator[KeyPath]:
    """Yield the key path of every secret."""
    for name, application in _mapping(tree, "applications").items():
        if isinstance(application, dict) and "client_secret" in application:
            yield ("applications", name, "client_secret")
    for name, account in _mapping(tree, "accounts").items():
        tokens = account.get("refresh_tokens") if isinstance(account, dict) else None
        regions = tokens if isinstance(tokens, dict) else ()
        yield from (("accounts", name, "refresh_tokens", region) for region in regions)
    for name, caller in _mapping(tree, "callers").items():
        if isinstance(caller, dict) and "key" in caller:
            yield ("callers", name, "key")
    if "store_key" in tree:
        keys = tree["store_key"]
        yield from (("store_key", index) for index in range(len(keys))) if isinstance(keys, list) else (("store_key",),)
    if _mapping(tree, "tracing").get("headers") is not None:
        yield ("tracing", "headers")


def _text_of(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return file.read(_MAX_SECRET_FILE + 1)


def _reread(path: Path) -> str | None:
    """Return the text of a secret file as it is now; None where it cannot be used."""
    try:
        text = _text_of(path)
    except (OSError, ValueError):
        return None  # in the middle of being replaced, perhaps
    return text.strip() if len(text) <= _MAX_SECRET_FILE else None


def _add_environment(merged: MergedSettings, environ: Mapping[str, str]) -> None:
    found, problems = environment.overrides(environ, merged.tree)
    filled, more = environment.library_variables(environ, merged.tree)
    merged.problems += problems + more
    for path, value, variable in [*filled, *found]:
        origin = f"environment variable {variable}"
        text = isinstance(value, str)
        _add(merged, path, SourcedStr.of(value, partial(environ.get, variable), origin) if text else value, origin)


def _add_flags(merged: MergedSettings, flags: Flags) -> None:
    for key, written, flag in flags:
        path = values.key_path(key, merged.tree)
        value, problems = values.parse(path, written, flag) if isinstance(written, str) else (written, [])
        merged.problems += problems
        if not problems:
            _add(merged, path, value, flag)


def _add(merged: MergedSettings, path: KeyPath, value: Any, origin: str) -> None:
    """Set one value from elsewhere than the file, and read the files that it names (from the working directory)."""
    if path[0] == "listen" and len(path) > 1:
        merged.ensure_listener()
    if problem := merged.check_index(path, origin):
        merged.problems.append(problem)
        return
    merged.put(path, value, origin)
    merged.place(path, _with_files(value, path, merged), origin)


def _with_files(value: Any, path: KeyPath, merged: MergedSettings) -> Any:
    """Return `value` with every `{file: …}` in it replaced by the file's text."""
    if isinstance(value, dict):
        if set(value) == {"file"} and isinstance(value["file"], str):
            return _from_file(Path(value["file"]), path, merged)
        return {key: _with_files(below, (*path, key), merged) for key, below in value.items()}
    if isinstance(value, list):
        return [_with_files(below, (*path, index), merged) for index, below in enumerate(value)]
    return value


# Checking.


def _validated(merged: MergedSettings) -> Config | None:
    # A group that is written with nothing below it (`limits:`) means its defaults.
    may_be_empty = set(Config.model_fields) - {"admin", "health"}
    tree = {key: value for key, value in merged.tree.items() if value is not None or key not in may_be_empty}
    try:
        return Config.model_validate(tree)
    except ValidationError as exc:
        for error in exc.errors(include_url=False):
            if error["type"] == "too_short" and len(error["loc"]) == 1 and tree.get(str(error["loc"][0])):
                continue  # it has items, but none that is good, and each says why
            path = tuple(part for part in error["loc"] if part != "[key]")
            message, where = message_of(error, path), merged.location_of(path)
            merged.problems.append(Problem(format_path(_without_misplaced_token(path)), message, where))
        return None


def _without_misplaced_token(path: KeyPath) -> KeyPath:
    """Return the path with what stands in place of a region hidden: it may be the refresh token itself."""
    is_region = [before != "refresh_tokens" or len(str(part)) <= 8 for before, part in pairwise(("", *path))]
    return tuple(part if fine else "***" for part, fine in zip(path, is_region, strict=True))


def _cross_check(merged: MergedSettings, environ: Mapping[str, str]) -> None:
    """Note the mistakes that no single setting shows; works on the raw tree, so that all problems come at once."""
    tree = merged.tree
    accounts, applications = _mapping(tree, "accounts"), _mapping(tree, "applications")
    problems = [
        *_missing_parts(accounts, applications, environ),
        *_wrong_applications(accounts, applications),
        *_wrong_account_names(tree, accounts),
        *_open_listeners(tree),
        *_wrong_callers(tree),
        *_wrong_store(tree),
        *_wrong_tracing(tree),
    ]
    merged.problems += [Problem(format_path(path), message, merged.location_of(path)) for path, message in problems]


Violations = Iterator[tuple[KeyPath, str]]


def _mapping(tree: Tree, key: str) -> dict[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _missing_parts(accounts: Tree, applications: Tree, environ: Mapping[str, str]) -> Violations:
    if not applications:
        meant = environment.suggest_variable(environment.APPLICATION_NAMES, environ)
        message = "is missing: give a client_id and client_secret, or set LWA_APP_ID and LWA_CLIENT_SECRET"
        yield ("applications",), message + meant
    if not accounts:
        meant = environment.suggest_variable(environment.ACCOUNT_NAMES, environ)
        yield ("accounts",), f"is missing: give an account with its refresh_tokens, or set SP_API_REFRESH_TOKEN{meant}"


def _wrong_applications(accounts: Tree, applications: Tree) -> Violations:
    for name, account in accounts.items():
        chosen = account.get("application") if isinstance(account, dict) else None
        path: KeyPath = ("accounts", name, "application")
        if chosen is None and len(applications) > 1:
            yield path, f"is missing: say which; there is {join(map(redact_name, applications))}"
        elif isinstance(chosen, str) and applications and chosen not in applications:
            yield path, f"names no application; {suggest(applications, chosen)}"


def _wrong_account_names(tree: Tree, accounts: Tree) -> Violations:
    named: list[tuple[KeyPath, Any]] = [(("default_account",), tree.get("default_account"))]
    for index, listener in enumerate(_listeners(tree)):
        named.append((("listen", index, "account"), listener.get("account")))
        named += _names_in(("listen", index, "accounts"), listener.get("accounts"))
    for caller, settings in _mapping(tree, "callers").items():
        if isinstance(settings, dict):
            named += _names_in(("callers", caller, "accounts"), settings.get("accounts"))
    wrong = [(path, name) for path, name in named if isinstance(name, str) and accounts and name not in accounts]
    for number, (path, name) in enumerate(wrong):
        yield path, f"names no account; {suggest(accounts, name if number < MAX_NAMED else '')}"


def _names_in(path: KeyPath, value: object) -> list[tuple[KeyPath, Any]]:
    return [((*path, index), name) for index, name in enumerate(value)] if isinstance(value, list) else []


def _wrong_callers(tree: Tree) -> Violations:
    """Two callers that cannot be told apart, and what no listener can see."""
    callers = {name: caller for name, caller in _mapping(tree, "callers").items() if isinstance(caller, dict)}
    for mark in ("key", "certificate", "uid"):
        seen: dict[str, str] = {}
        for name, caller in callers.items():
            if (value := caller.get(mark)) is None:
                continue
            first = seen.setdefault(str(value).strip(), name)
            if first != name:
                yield (
                    ("callers", name, mark),
                    f"is that of callers.{redact_name(first)} too: the two cannot be told apart",
                )
    listeners = list(_listeners(tree))
    if not any(isinstance(tls := one.get("tls"), dict) and tls.get("client_ca") for one in listeners):
        for name in (name for name, caller in callers.items() if caller.get("certificate") is not None):
            yield ("callers", name, "certificate"), "can never be seen: no listener has tls.client_ca"
    if not any(str(one.get("address", "")).startswith("unix:") for one in listeners):
        for name in (name for name, caller in callers.items() if caller.get("uid") is not None):
            yield ("callers", name, "uid"), "can never be seen: no listener is a Unix socket"


_NO_STORE_KEY = (
    "is missing: tokens are sealed before they go to Redis; make a key with openssl rand -base64 32, and give all "
    "replicas the same"
)


def _wrong_store(tree: Tree) -> Violations:
    """What others keep for us must be sealed."""
    if _store_of(tree).is_shared and not tree.get("store_key"):
        yield ("store_key",), _NO_STORE_KEY


def _store_of(tree: Tree) -> StoreAddress:
    try:
        return parse_store(tree.get("store", "memory"))
    except ValueError:
        return StoreAddress()  # no address at all, which is noted elsewhere


def _record_insecure_store(merged: MergedSettings) -> None:
    """Warn of a way to Redis that others can listen on: sealed tokens stay sealed, but a password goes in the clear."""
    store = _store_of(merged.tree)
    if store.kind == "redis" and not is_loopback(store.host):
        message = "goes over the network in the clear: use rediss:// where others can listen or interfere"
        merged.warnings.append(Problem("store", message, merged.location_of(("store",))))


def _wrong_tracing(tree: Tree) -> Violations:
    """Traces are wanted, and what makes them is not installed."""
    if _mapping(tree, "tracing").get("endpoint") is not None and not _is_installed(*_TRACING_NEEDS):
        yield ("tracing", "endpoint"), f"needs OpenTelemetry, which is not installed: {_how_to_install(_CHECKOUT)}"


_CHECKOUT = Path(__file__).parents[2]


def _how_to_install(folder: Path) -> str:
    """Return how OpenTelemetry comes to where the proxy runs from; a checkout is not known to pip by its name."""
    if (folder / "pyproject.toml").is_file():
        return f"python -m pip install '.[otel]' in {folder}, with the python that runs the proxy"
    return "pip install 'sp-api-proxy[otel]'"


_TRACING_NEEDS = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


def _is_installed(*modules: str) -> bool:
    try:
        return all(find_spec(module) is not None for module in modules)
    except ModuleNotFoundError:  # a package above it
        return False


def _listeners(tree: Tree) -> Iterator[dict[str, Any]]:
    listen = tree.get("listen")
    for listener in listen if isinstance(listen, list) else [listen]:
        yield listener if isinstance(listener, dict) else {"address": listener}


_OPEN_LISTENER = (
    "can be reached by other machines, and whoever reaches it acts as the seller: use 127.0.0.1 or a Unix socket, "
    "give it tls with a client_ca or the callers keys, or write {address: …, insecure_network: true} if the network "
    "itself keeps others out"
)


def _open_listeners(tree: Tree) -> Violations:
    """An address that other machines reach must be meant: whoever reaches the port acts as the seller."""
    callers = _mapping(tree, "callers").values()
    has_keys = any(isinstance(caller, dict) and caller.get("key") is not None for caller in callers)
    for index, listener in enumerate(_listeners(tree)):
        tls = listener.get("tls")
        wants_certificate = isinstance(tls, dict) and bool(tls.get("client_ca"))
        wants_key = has_keys and not _is_true(listener.get("anonymous"))
        meant = _is_true(listener.get("insecure_network"))
        if _is_open(listener.get("address")) and not (meant or wants_certificate or wants_key):
            yield ("listen", index, "address"), _OPEN_LISTENER
    if _is_open(tree.get("admin")):
        yield ("admin",), "must be a loopback address; open `health` instead for probes and Prometheus"


def _is_open(address: object) -> bool:
    try:
        return not parse_address(address).is_local
    except ValueError:
        return False  # not an address at all, which is noted elsewhere


def _sorted_problems(problems: list[Problem]) -> list[Problem]:
    """Return each problem once, in the order of the file's lines."""

    def line(problem: Problem) -> tuple[str, int, str]:
        name, _, number = problem.where.partition(", from")[0].rpartition(":")
        return (name, int(number), problem.key) if number.isdigit() else (problem.where, 0, problem.key)

    return sorted(dict.fromkeys(problems), key=line)
