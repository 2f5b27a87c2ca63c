"""Values of single settings as strings, from the environment or `--set`.

Both use one syntax: YAML's flow form for a setting that is a list or a mapping, the plain string for all others.
"""

import re
from typing import Any, Literal, get_args, get_origin

from proxy.config.model import Config, settings_in
from proxy.config.yaml_reader import KeyPath, Problem, Tree, format_path, read_yaml

FORMS = "a list is [a, b], a mapping {key: value}"

_PART = re.compile(r"(.*?)((?:\[\d{1,4}\])*)", re.ASCII | re.DOTALL)
_FILE = re.compile(r"\{ *file *:")
# `[::1]:8080` starts with a bracket, as a list does.
_IPV6 = re.compile(r"\[[0-9A-Fa-f:.]+\]:\d", re.ASCII)


def kind_below(kind: Any, part: str | int) -> Any:
    """Return the type of the item at `part` of a value of type `kind`, None where there is no such item."""
    if get_origin(kind) in {dict, tuple}:
        return get_args(kind)[0 if get_origin(kind) is tuple else 1]
    settings = settings_in(kind)
    field = settings.model_fields.get(str(part)) if settings else None
    return unwrapped(field.annotation) if field else None


def unwrapped(kind: Any) -> Any:
    """Return `tuple[str, ...]` for `tuple[str, ...] | None`."""
    return next((one for one in get_args(kind) if get_origin(one) in {dict, tuple}), kind)


def kind_at(path: KeyPath) -> Any:
    """Return the type of the setting at a key path; None where there is no such setting."""
    kind: Any = Config
    for part in path:
        kind = kind_below(kind, part)
    return kind


def is_list(kind: Any) -> bool:
    """Return whether a setting of this type is written as a list."""
    return get_origin(kind) is tuple


def is_mapping(kind: Any) -> bool:
    """Return whether a setting of this type is written as a mapping, of user-chosen names or of settings."""
    return get_origin(kind) is dict or settings_in(kind) is not None


def is_user_keyed(kind: Any) -> bool:
    """Return whether the keys of a mapping of this type are names that the user chose."""
    return get_origin(kind) is dict and get_origin(get_args(kind)[0]) is not Literal


def key_path(text: str, tree: Tree) -> KeyPath:
    """Return the path of a key such as `listen[0].account`.

    Names may contain dots: the longest name that exists in `tree` is used.
    """
    parts = text.split(".")
    path: list[str | int] = []
    kind: Any = Config
    here: Any = tree
    while parts:
        count = 1
        if is_user_keyed(kind) and isinstance(here, dict):
            lengths = range(len(parts), 1, -1)
            count = next((length for length in lengths if ".".join(parts[:length]) in here), 1)
        name, numbers = ".".join(parts[:count]), ""
        if count == 1 and (match := _PART.fullmatch(name)):
            name, numbers = match[1], match[2]
        found: list[str | int] = [name, *map(int, re.findall(r"\d+", numbers))]
        for part in found:
            path.append(part)
            kind = kind_below(kind, part)
            here = _at(here, part)
        del parts[:count]
    return tuple(path)


def _at(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def parse(path: KeyPath, text: str, origin: str) -> tuple[Any, list[Problem]]:
    """Return the value of `text` for the setting at a key path, and the problems with it.

    A list is `[a, b]` or `a,b`, a mapping `{key: value}`, `null` no value. `{file: PATH}` is returned as it is; the
    caller reads the file. Everything else is the string itself, without quotes.
    """
    if text == "null":
        return None, []
    kind = kind_at(path)
    first = text.lstrip()[:1]
    is_structured = (is_list(kind) and first in {"[", "{"}) or (is_mapping(kind) and first == "{")
    if _FILE.match(text.lstrip()) or (is_structured and not (is_list(kind) and _IPV6.match(text.lstrip()))):
        return _flow(path, text, origin)
    if is_list(kind):
        return [part.strip() for part in text.split(",") if part.strip()], []
    return text, []


def _flow(path: KeyPath, text: str, origin: str) -> tuple[Any, list[Problem]]:
    document = read_yaml(f"value: {text}", origin)
    problems = [
        Problem(format_path(path) + problem.key.removeprefix("value"), _without_line(problem.message), origin)
        for problem in document.problems
    ]
    return document.tree.get("value"), problems


def _without_line(message: str) -> str:
    """Return a message of the YAML reader without its line number and its advice about `${NAME}`."""
    if "YAML" in message:
        return f"{message.partition(';')[0]}; {FORMS}"
    return message.partition(" (first on line ")[0]
