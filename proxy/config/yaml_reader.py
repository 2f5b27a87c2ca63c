"""What does a YAML text say, key by key, and on which line does it say so?

PyYAML's own loaders expand aliases without bound, take the last of two equal keys and turn `2.10` into `2.1`. Here
the parser's events become plain values directly: every scalar stays the text that was written (the settings' types
decide what it means), aliases and tags are refused, and size and depth are bounded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 12

# libyaml's parser is some ten times faster: it matters with thousands of accounts.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MAX_NAME = 64  # characters; what is longer names nothing here
# How refresh tokens, access tokens and client secrets begin.
_SECRET = re.compile(r"(?:Atz[ra]\||amzn1\.oa2-cs\b).*", re.IGNORECASE | re.DOTALL)

KeyPath = tuple[str | int, ...]
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the full key, what is wrong with it, and where it was written (or nothing)."""

    key: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


def redact_name(name: str) -> str:
    """Return a name of the user's as it may be printed: `***` for what is probably a secret in the wrong place."""
    return "***" if len(name) > MAX_NAME or _SECRET.search(name) else name


def without_secret(text: str) -> str:
    """Return a text with `***` for all that follows where a token or a client secret begins."""
    return _SECRET.sub("***", text)


def format_path(path: KeyPath) -> str:
    """Return `accounts.acme.refresh_tokens.eu` or `listen[0].address` for a path of keys; no secret is shown."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{redact_name(part)}" if text else redact_name(part)
    return without_secret(text)  # one with dots may be several parts


@dataclass(slots=True)
class Document:
    """The values of one YAML text, where each was written, and what was wrong with the text."""

    name: str
    tree: Tree = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_yaml(text: str, name: str) -> Document:
    """Return the Document of `text`; every mistake is in its `problems`, none is raised."""
    document = Document(name)
    if len(text) > MAX_BYTES:
        document.problems.append(Problem("", f"is larger than {MAX_BYTES // 1024 // 1024} MiB", name))
        return document
    try:
        events = yaml.parse(text, Loader=_LOADER)
        next(events)  # the start of the stream
        _read_document(document, events)
    except yaml.YAMLError as exc:
        document.problems.append(_syntax_problem(name, exc))
    return document


def _syntax_problem(name: str, exc: yaml.YAMLError) -> Problem:
    mark = getattr(exc, "problem_mark", None)
    where = f"{name}:{mark.line + 1}" if mark else name
    if isinstance(exc, _Refused):
        return Problem("", f"is not accepted: {exc.problem}", where)
    # The parser's full message quotes the line, which may hold a secret.
    found = str(getattr(exc, "problem", None) or getattr(exc, "reason", None) or "")
    advice = next((words for part, words in _ADVICE.items() if part in found), _CONTEXT)
    begun = getattr(exc, "context_mark", None)
    if begun is not None and mark is not None and begun.line < mark.line and "not closed" in advice:
        where = f"{name}:{begun.line + 1}"  # where it was opened, not where the text ends without it
    return Problem("", f"is not valid YAML: {advice}", where)


_QUOTES = "what has a bracket, a brace, '#' or ', ' in it needs quotes there, as \"${NAME}\""
# What is probably wrong, by what libyaml or PyYAML complains of; the first that fits.
_ADVICE = {
    "cannot start any token": "a value cannot begin with a tab, @, ` or %: put it in quotes, and indent with spaces",
    "tab character": "a tab indents nothing: use spaces",
    "mapping values are not allowed": "a colon where none can be: put a text with ': ' in it in quotes, or look at the "
    "indentation",
    "sequence entries are not allowed": "a list item where none can be: look at the indentation of its '-'",
    "expected ':'": "a key without a colon: write KEY: VALUE, with a space after the colon",
    "',' or ']'": f"a list [ … ] that is not closed or lacks a comma; {_QUOTES}",
    "',' or '}'": f"a mapping {{ … }} that is not closed or lacks a comma; {_QUOTES}",
    "expected key": "the indentation does not fit the lines above: keys of one group begin in the same column",
    "expected '-' indicator": "the indentation does not fit the lines above: its items begin in the same column",
    "<block end>": "the indentation does not fit the lines above: what is of one group begins in the same column",
    "unexpected end of stream": "a quote that is not closed",
    "document indicator": "a quote or a bracket that is not closed",
    "escape": "a backslash that means nothing within double quotes: use single quotes",
    "hexdecimal": "a backslash that means nothing within double quotes: use single quotes",
    "characters are not allowed": "a control character: the text may be damaged",
}
_CONTEXT = "look here and above for a quote, a bracket or a colon that is missing, and at the indentation"


def _read_document(document: Document, events: Iterator[Any]) -> None:
    if isinstance(next(events), yaml.StreamEndEvent):
        return
    value = _Builder(document, events).value((), next(events))
    if isinstance(value, dict):
        document.tree = value
    elif value is not None:
        document.problems.append(Problem("", "must be a mapping of settings", document.name))
    next(events)  # the end of the document
    if not isinstance(next(events), yaml.StreamEndEvent):
        document.problems.append(Problem("", "must hold one YAML document, not several", document.name))


class _Refused(yaml.YAMLError):
    """A construct that is YAML and not accepted here."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem)
        self.problem = problem
        self.problem_mark = mark


class _Builder:
    """Turns the events of one document into values, noting the line of each."""

    def __init__(self, document: Document, events: Iterator[Any]) -> None:
        self.document = document
        self.events = events

    def place(self, event: Any) -> str:
        return f"{self.document.name}:{event.start_mark.line + 1}"

    def value(self, path: KeyPath, event: Any) -> Any:
        if isinstance(event, yaml.AliasEvent):
            raise _Refused("aliases (*name) are not accepted; write the value out", event.start_mark)
        if len(path) > MAX_DEPTH:
            raise _Refused(f"more than {MAX_DEPTH} levels deep", event.start_mark)
        if event.tag is not None and event.tag != "!":
            raise _Refused("tags (!name) are not accepted", event.start_mark)
        self.document.origins[path] = self.place(event)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        is_null = event.style is None and event.value in {"", "~", "null"}
        is_plain_null = event.style == "" and event.value in {"", "~", "null"}
        return None if is_null or is_plain_null else event.value

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _Refused("a key must be a plain text", event.start_mark)
            key, here = event.value, (*path, event.value)
            if key in found:
                where = self.place(event)
                first = self.document.origins[here].rpartition(":")[2]
                self.document.problems.append(
                    Problem(format_path(here), f"is given twice (first on line {first})", where)
                )
                self.value((*path, f"{key} (again)"), next(self.events))
                continue
            found[key] = self.value(here, next(self.events))
            self.document.origins[here] = self.place(event)
        return found

    def sequence(self, path: KeyPath) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            found.append(self.value((*path, len(found)), event))
        return found
