"""The events that the proxy logs, found in its source: message, level and fields of every logging call."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}


@dataclass(frozen=True, slots=True, order=True)
class Event:
    """One event; `level` is `varies` where the code chooses it at run time."""

    message: str
    level: str
    fields: tuple[str, ...]


def events(package: Path, logger: str = "LOGGER") -> list[Event]:
    """Return the events that the modules of a package log by `logger`, each once, sorted by message."""
    found: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for path in package.rglob("*.py"):
        for event in _events_of(ast.parse(path.read_text(encoding="utf-8")), logger):
            found.setdefault((event.message, event.fields), set()).add(event.level)
    return sorted(Event(message, " or ".join(sorted(levels)), fields) for (message, fields), levels in found.items())


def _events_of(module: ast.Module, logger: str) -> Iterator[Event]:
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        for call in ast.walk(function):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            owner = call.func.value
            if logger != (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")):
                continue
            method = call.func.attr
            if method not in {*_LEVELS, "log"}:
                continue
            message = call.args[1 if method == "log" else 0]
            extra = next((keyword.value for keyword in call.keywords if keyword.arg == "extra"), None)
            fields = tuple(_fields(extra, functions)) if isinstance(extra, ast.Call) else ()
            for text in _texts(message, function):
                yield Event(text, _LEVELS.get(method, "varies"), fields)


def _texts(message: ast.expr, function: ast.AST) -> Iterator[str]:
    """Yield the texts that a message can be; those of a variable are where the function assigns it."""
    if isinstance(message, ast.Name):
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and any(getattr(to, "id", "") == message.id for to in node.targets):
                yield from _texts(node.value, function)
    elif isinstance(message, ast.IfExp):
        yield from _texts(message.body, function)
        yield from _texts(message.orelse, function)
    elif isinstance(message, ast.Constant):
        yield str(message.value)


def _fields(extra: ast.Call, functions: list[ast.FunctionDef | ast.AsyncFunctionDef]) -> Iterator[str]:
    """Yield the names of the fields; those of `**function(…)` are the keys of the dict literals in that function."""
    for keyword in extra.keywords:
        if keyword.arg is not None:
            yield keyword.arg
            continue
        yield from _keys(keyword.value)
        for node in ast.walk(keyword.value):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                for function in functions:
                    if function.name == name:
                        yield from _keys(function)


def _keys(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            yield from (key.value for key in part.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
