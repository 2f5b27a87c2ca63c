"""How are settings of several sources put into one tree, and where did each of them stand?"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy.config.model import Config
from proxy.config.values import is_list, kind_at
from proxy.config.yaml_reader import KeyPath, Problem, Tree, format_path


@dataclass(slots=True)
class MergedSettings:
    """The merged settings before they are checked; `name` is that of the file, if there is one."""

    name: str = ""
    tree: Tree = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    insecure_files: list[Problem] = field(default_factory=list)  # files with secrets that other users can read
    warnings: list[Problem] = field(default_factory=list)  # what works, but perhaps should not be so
    files: list[Path] = field(default_factory=list)

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set one value, making what is above it and forgetting what was below it."""
        self.place(path, value, origin)
        self.origins = {known: text for known, text in self.origins.items() if known[: len(path)] != path}
        self._record_origin(path, value, origin)

    def place(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set one value, making what is above it; what lies within it has its origins already."""
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
        """Return the place of the nearest key above `path` that was written somewhere; the file where none was."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.name)

    def list_listeners(self) -> None:
        """Write `listen` as a list of mappings, whichever of its shorter forms it has, so that each key has a place."""
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
        """See to it that there is a listener to change: the one that there is where nothing is said of any."""
        self.list_listeners()
        if self.tree.get("listen") is None:
            self.tree["listen"] = [{"address": str(one.address)} for one in Config.model_fields["listen"].default]

    def check_index(self, path: KeyPath, origin: str) -> Problem | None:
        """Return what is wrong with the number of an item, where there is none, or it would leave others out."""
        here: Any = self.tree
        for depth, part in enumerate(path):
            count = len(here) if isinstance(here, list) else 0
            if isinstance(part, int) and part > count:
                last = f"the last one is {format_path((*path[:depth], count - 1))}, " if count else ""
                message = f"cannot be set: {last}the next one {format_path((*path[:depth], count))}"
                return Problem(format_path(path[: depth + 1]), message, origin)
            if isinstance(part, str) and isinstance(here, list) and is_list(kind_at(path[:depth])):
                number = format_path((*path[:depth], 0, *path[depth:]))
                return Problem(
                    format_path(path), f"cannot be set: it is a list, so say which of it, as {number}", origin
                )
            here = _item(here, part)
        return None


def _item(here: Any, part: str | int) -> Any:
    """Return what is at `part` of a list or a mapping; None where there is nothing."""
    if isinstance(here, dict):
        return here.get(part)
    return here[part] if isinstance(here, list) and isinstance(part, int) and part < len(here) else None


def _set_item(here: Any, part: str | int, value: Any) -> None:
    if isinstance(here, list) and part == len(here):
        here.append(value)
    else:
        here[part] = value
