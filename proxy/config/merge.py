"""The merged settings of all sources, with the origin of each value."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy.config.model import Config
from proxy.config.values import is_list, kind_at
from proxy.config.yaml_reader import KeyPath, Problem, Tree, format_path


@dataclass(slots=True)
class MergedSettings:
    """The merged settings before validation; `name` is the path of the file, if any."""

    name: str = ""
    tree: Tree = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    insecure_files: list[Problem] = field(default_factory=list)  # files with secrets that other users can read
    warnings: list[Problem] = field(default_factory=list)  # about settings that are valid but unwise
    files: list[Path] = field(default_factory=list)

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set one value and its origin; create the groups above it and forget the origins below it."""
        self.set_value(path, value, origin)
        self.origins = {known: text for known, text in self.origins.items() if known[: len(path)] != path}
        self._record_origin(path, value, origin)

    def set_value(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set one value and create the groups above it; the origins of the values within it stay."""
        here: Any = self.tree
        for depth, part in enumerate(path[:-1], start=1):
            kind = list if isinstance(path[depth], int) else dict
            below = _item(here, part)
            if not isinstance(below, kind):
                below = kind()
                _set_item(here, part, below)
                self.origins.setdefault(path[:depth], origin)
            here = below
        _set_item(here, path[-1], value)

    def _record_origin(self, path: KeyPath, value: Any, origin: str) -> None:
        self.origins[path] = origin
        below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in below:
            self._record_origin((*path, key), inner, origin)

    def location_of(self, path: KeyPath) -> str:
        """Return the origin of `path` or of the nearest group above it that has one, else the file's name."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.name)

    def list_listeners(self) -> None:
        """Normalise `listen` to a list of mappings, so that each key has a path and an origin."""
        listen = self.tree.get("listen")
        if isinstance(listen, str | dict):
            origins = {path: origin for path, origin in self.origins.items() if path[:1] == ("listen",)}
            self.origins |= {("listen", 0, *path[1:]): origin for path, origin in origins.items()}
            listen = [listen]
        if not isinstance(listen, list):
            return
        for index, listener in enumerate(listen):
            if isinstance(listener, str) and ("listen", index) in self.origins:
                self.origins["listen", index, "address"] = self.origins["listen", index]
        self.tree["listen"] = [{"address": one} if isinstance(one, str) else one for one in listen]

    def ensure_listener(self) -> None:
        """Add the default listener where none is configured, so that a single key of it can be set."""
        self.list_listeners()
        if self.tree.get("listen") is None:
            self.tree["listen"] = [{"address": str(one.address)} for one in Config.model_fields["listen"].default]

    def check_index(self, path: KeyPath, origin: str) -> Problem | None:
        """Return a problem for an index that is missing, or beyond the end of its list, None otherwise."""
        here: Any = self.tree
        for depth, part in enumerate(path):
            count = len(here) if isinstance(here, list) else 0
            if isinstance(part, int) and part > count:
                last = f"the last one is {format_path((*path[:depth], count - 1))}, " if count else ""
                message = f"cannot be set: {last}the next one is {format_path((*path[:depth], count))}"
                return Problem(format_path(path[: depth + 1]), message, origin)
            if isinstance(part, str) and isinstance(here, list) and is_list(kind_at(path[:depth])):
                number = format_path((*path[:depth], 0, *path[depth:]))
                return Problem(
                    format_path(path), f"cannot be set: it is a list, so name the item, such as {number}", origin
                )
            here = _item(here, part)
        return None


def _item(here: Any, part: str | int) -> Any:
    """Return the item of a list or a mapping, None where there is none."""
    if isinstance(here, dict):
        return here.get(part)
    return here[part] if isinstance(here, list) and isinstance(part, int) and part < len(here) else None


def _set_item(here: Any, part: str | int, value: Any) -> None:
    if isinstance(here, list) and part == len(here):
        here.append(value)
    else:
        here[part] = value


def mapping_at(tree: Tree, key: str) -> dict[str, Any]:
    """Return the mapping at a top-level key, an empty one where there is anything else."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def listeners_in(tree: Tree) -> Iterator[dict[str, Any]]:
    """Yield the raw settings of each listener."""
    listen = tree.get("listen")
    for listener in listen if isinstance(listen, list) else [listen]:
        yield listener if isinstance(listener, dict) else {"address": listener}


def is_true(value: object) -> bool:
    """Return whether pydantic reads a raw value as true."""
    return str(value).lower() in {"true", "t", "yes", "y", "on", "1"}
