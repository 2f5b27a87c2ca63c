"""Load the configuration: flags, environment, file and defaults become one frozen Config, or a list of all problems.

Precedence: flag, environment, file, default. No other module reads `os.environ` or the configuration file.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from proxy.config import environment, values
from proxy.config.cross_checks import record_violations
from proxy.config.merge import MergedSettings, is_true
from proxy.config.messages import MAX_NAMED, message_of
from proxy.config.model import Config, dump
from proxy.config.secret import SourcedStr
from proxy.config.secret_files import PLACEHOLDER, read_nested_files, read_secret_file, record_insecure_files
from proxy.config.types import Address, parse_address
from proxy.config.yaml_reader import (
    MAX_BYTES,
    Document,
    KeyPath,
    Problem,
    format_path,
    read_yaml,
    redact_name,
)

Flags = Sequence[tuple[str, Any, str]]  # the key, its value, the flag that set it
_VARIABLE = re.compile(r"\$(?:\$|\{([^}]*)\})")


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds all reasons."""

    def __init__(self, problems: list[Problem], files: Iterable[Path] = ()) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
        self.files = tuple(files)  # those that were read, and those that could not be read


@dataclass(frozen=True, slots=True)
class Loaded:
    """A Config, the origin of each value by its key path, and warnings about valid but doubtful settings."""

    config: Config
    origins: Mapping[KeyPath, str]
    warnings: tuple[Problem, ...] = ()
    files: tuple[Path, ...] = ()  # every file that was read: the reload watches them

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield key, value and origin of every effective setting, secrets as `***`."""
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
        """Return problems that were found after loading, with the file and line of their keys."""
        locations = {format_path(path): origin for path, origin in self.origins.items()}
        return [
            problem if problem.where else replace(problem, where=_locate(problem.key, locations))
            for problem in problems
        ]


def _locate(key: str, locations: Mapping[str, str]) -> str:
    while key and key not in locations:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return locations.get(key, "")


def load_config(path: str | None, environ: Mapping[str, str], flags: Flags = ()) -> Loaded:
    """Return the effective Config; `path` is the YAML file, if any, `flags` the settings of the command line.

    Raises ConfigError with all problems.
    """
    merged = _merge_sources(path, environ, flags)
    config = _validated(merged)
    if config is not None:
        merged.files += _named_files(config)
    record_violations(merged, environ)
    record_insecure_files(merged, path)
    if is_true(merged.tree.get("strict_permissions")):
        merged.problems += merged.insecure_files
    if merged.problems or config is None:
        raise ConfigError(_sorted_problems(merged.problems), merged.files)
    return Loaded(
        config, merged.origins, tuple(_sorted_problems(merged.insecure_files + merged.warnings)), tuple(merged.files)
    )


def admin_addresses(path: str | None, environ: Mapping[str, str], flags: Flags = ()) -> list[Address]:
    """Return the admin address and the health address, where there are any.

    Other settings are not validated: a running proxy may still use an earlier version of the file. Raises ConfigError
    where the file cannot be read or one of the two addresses is malformed.
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
    """Return a Config that holds only the applications and the settings for connections to Login with Amazon.

    The accounts are ignored: `authorize` runs before their refresh tokens exist. Raises ConfigError.
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
    """Yield the files that settings name and other modules read: certificates, keys and CA files."""
    for listener in config.listen:
        if listener.tls is not None:
            names = (listener.tls.certificate, listener.tls.key, listener.tls.client_ca)
            yield from (Path(name) for name in names if name is not None)
    if config.pool.ca_file is not None:
        yield Path(config.pool.ca_file)


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
        # Without a readable text, every required setting would be reported as missing.
        raise ConfigError(document.problems, merged.files)
    merged.problems += document.problems
    merged.origins = document.origins
    merged.origins.pop((), None)  # a missing key has no line: it must not get that of the whole document
    folder = Path(path).resolve().parent
    merged.tree = {
        key: _resolved(value, (key,), document, merged, environ, folder) for key, value in document.tree.items()
    }


def _resolved(
    value: Any, path: KeyPath, document: Document, merged: MergedSettings, environ: Mapping[str, str], folder: Path
) -> Any:
    """Return `value` with every `${NAME}` and `{file: …}` below it replaced by its value."""
    if isinstance(value, dict) and set(value) == {"file"} and isinstance(value["file"], str):
        name = _expanded(value["file"], path, document, merged, environ)
        return read_secret_file(folder / name, path, merged)
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
            # The search for a similar name is slow with thousands of problems and variables.
            hint = environment.suggest_replacement(name, environ) if len(merged.problems) < MAX_NAMED else ""
            state = "is empty" if name in environ else f"is not set{hint}"
            merged.problems.append(
                Problem(format_path(path), f"environment variable {redact_name(name) or '(no name)'} {state}", where)
            )
            return PLACEHOLDER
        merged.origins[path] = f"{where.partition(', from')[0]}, from environment variable {name}"
        return value

    expanded = _VARIABLE.sub(replace, text)
    whole = _VARIABLE.fullmatch(text)
    if whole and whole[1]:
        return SourcedStr.of(expanded, partial(environ.get, whole[1]), f"environment variable {whole[1]}")
    return expanded


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
    """Set one value of the environment or a flag, and read the files that it names."""
    if path[0] == "listen" and len(path) > 1:
        merged.ensure_listener()
    if problem := merged.check_index(path, origin):
        merged.problems.append(problem)
        return
    merged.put(path, value, origin)
    merged.set_value(path, read_nested_files(value, path, merged), origin)


# Checking.


def _validated(merged: MergedSettings) -> Config | None:
    # A group without a value (`limits:`) means its defaults; for `admin` and `health`, null means no listener.
    may_be_empty = set(Config.model_fields) - {"admin", "health"}
    tree = {key: value for key, value in merged.tree.items() if value is not None or key not in may_be_empty}
    try:
        return Config.model_validate(tree)
    except ValidationError as exc:
        for error in exc.errors(include_url=False):
            if error["type"] == "too_short" and len(error["loc"]) == 1 and tree.get(str(error["loc"][0])):
                continue  # the list has items, all of them invalid: each of them is reported
            path = tuple(part for part in error["loc"] if part != "[key]")
            message, where = message_of(error, path), merged.location_of(path)
            merged.problems.append(Problem(format_path(_without_misplaced_token(path)), message, where))
        return None


def _without_misplaced_token(path: KeyPath) -> KeyPath:
    """Return the path with `***` for a region that is too long for one: it may be the refresh token itself."""
    is_safe = [before != "refresh_tokens" or len(str(part)) <= 8 for before, part in pairwise(("", *path))]
    return tuple(part if safe else "***" for part, safe in zip(path, is_safe, strict=True))


def _sorted_problems(problems: list[Problem]) -> list[Problem]:
    """Return each problem once, in the order of the file's lines."""

    def line(problem: Problem) -> tuple[str, int, str]:
        name, _, number = problem.where.partition(", from")[0].rpartition(":")
        return (name, int(number), problem.key) if number.isdigit() else (problem.where, 0, problem.key)

    return sorted(dict.fromkeys(problems), key=line)
