"""A YAML reader that records the line of every key.

PyYAML's own loaders expand aliases without limit ("billion laughs"), keep the last of two equal keys and turn `2.10`
into `2.1`. This reader builds plain values from the parser's events: every scalar stays the string that was written
(the settings' types interpret it), aliases and tags are rejected, and size and depth are limited.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 4 * 1024 * 1024
# Far below Python's recursion limit (1000): _Builder recurses once for each level.
MAX_DEPTH = 12

# libyaml's parser is about ten times faster, which matters with thousands of accounts.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MAX_NAME = 64  # characters: the maximum of names of accounts, applications and callers
# The prefixes of refresh tokens, access tokens and client secrets.
_SECRET = re.compile(r"(?:Atz[ra]\||amzn1\.oa2-cs\b).*", re.IGNORECASE | re.DOTALL)

KeyPath = tuple[str | int, ...]
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: the full key, the message, and the location (file and line, flag or variable; may be empty)."""

    key: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


def redact_name(name: str) -> str:
    """Return a user-chosen name, or `***` for one that is probably a secret in the wrong place."""
    return "***" if len(name) > MAX_NAME or _SECRET.search(name) else name


def without_secret(text: str) -> str:
    """Return a text with everything from the start of a token or a client secret replaced by `***`."""
    return _SECRET.sub("***", text)


def format_path(path: KeyPath) -> str:
    """Return `accounts.acme.refresh_tokens.eu` or `listen[0].address` for a path of keys, secrets as `***`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{redact_name(part)}" if text else redact_name(part)
    return without_secret(text)  # again: a secret with dots may be split over several parts


@dataclass(slots=True)
class Document:
    """The values of one YAML text, their locations, and the problems of the text."""

    name: str
    tree: Tree = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_yaml(text: str, name: str) -> Document:
    """Return the Document of `text`; errors are in its `problems`, none is raised."""
    document = Document(name)
    # Before the parser sees it: its work and its memory grow with the text.
    if len(text) > MAX_BYTES:
        document.problems.append(Problem("", f"is larger than {MAX_BYTES // 1024 // 1024} MiB", name))
        return document
    try:
        events = yaml.parse(text, Loader=_LOADER)
        next(events)  # StreamStartEvent
        _read_document(document, events)
    except yaml.YAMLError as exc:
        document.problems.append(_syntax_problem(name, exc))
    return document


def _syntax_problem(name: str, exc: yaml.YAMLError) -> Problem:
    mark = getattr(exc, "problem_mark", None)
    where = f"{name}:{mark.line + 1}" if mark else name
    if isinstance(exc, _Rejected):
        return Problem("", f"is not accepted: {exc.problem}", where)
    # The parser's full message quotes the line, which may hold a secret.
    found = str(getattr(exc, "problem", None) or getattr(exc, "reason", None) or "")
    advice = next((text for part, text in _ADVICE.items() if part in found), _GENERAL_ADVICE)
    opened = getattr(exc, "context_mark", None)
    if opened is not None and mark is not None and opened.line < mark.line and "not closed" in advice:
        where = f"{name}:{opened.line + 1}"  # the line of the opening bracket, not the end of the text
    return Problem("", f"is not valid YAML: {advice}", where)


_QUOTES = "a value with brackets, braces, '#' or ', ' needs quotes, as \"${NAME}\""
# The probable cause, by a part of the message of libyaml or PyYAML; the first match is used.
_ADVICE = {
    "cannot start any token": "a value cannot begin with a tab, @, ` or %: put it in quotes, and indent with spaces",
    "tab character": "a tab cannot indent: use spaces",
    "mapping values are not allowed": "a colon is not allowed here: quote a value that has ': ' in it, or check the "
    "indentation",
    "sequence entries are not allowed": "a list item is not allowed here: check the indentation of its '-'",
    "expected ':'": "a key without a colon: write KEY: VALUE, with a space after the colon",
    "',' or ']'": f"a list [ … ] is not closed or lacks a comma; {_QUOTES}",
    "',' or '}'": f"a mapping {{ … }} is not closed or lacks a comma; {_QUOTES}",
    "expected key": "the indentation does not fit the lines above: keys of one group start in the same column",
    "expected '-' indicator": "the indentation does not fit the lines above: list items start in the same column",
    "<block end>": "the indentation does not fit the lines above: everything in one group starts in the same column",
    "unexpected end of stream": "a quote is not closed",
    "document indicator": "a quote or a bracket is not closed",
    "escape": "an unknown backslash escape in double quotes: use single quotes",
    "hexdecimal": "an unknown backslash escape in double quotes: use single quotes",
    "characters are not allowed": "a control character: the text may be damaged",
}
_GENERAL_ADVICE = "look here and above for a quote, a bracket or a colon that is missing, and check the indentation"


def _read_document(document: Document, events: Iterator[Any]) -> None:
    if isinstance(next(events), yaml.StreamEndEvent):
        return
    value = _Builder(document, events).value((), next(events))
    if isinstance(value, dict):
        document.tree = value
    elif value is not None:
        document.problems.append(Problem("", "must be a mapping of settings", document.name))
    next(events)  # DocumentEndEvent
    if not isinstance(next(events), yaml.StreamEndEvent):
        document.problems.append(Problem("", "must hold one YAML document, not several", document.name))


class _Rejected(yaml.YAMLError):
    """Valid YAML that this reader rejects."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem)
        self.problem = problem
        self.problem_mark = mark


class _Builder:
    """Builds values from the events of one document and records the line of each."""

    def __init__(self, document: Document, events: Iterator[Any]) -> None:
        self.document = document
        self.events = events

    def location(self, event: Any) -> str:
        return f"{self.document.name}:{event.start_mark.line + 1}"

    def value(self, path: KeyPath, event: Any) -> Any:
        # Aliases multiply: nine levels of ten make 10^9 values ("billion laughs"). SafeLoader limits tags, not aliases.
        if isinstance(event, yaml.AliasEvent):
            raise _Rejected("aliases (*name) are not accepted; write the value out", event.start_mark)
        if len(path) > MAX_DEPTH:
            raise _Rejected(f"more than {MAX_DEPTH} levels deep", event.start_mark)
        # `!` alone is the non-specific tag (YAML 1.2.2 section 6.9.1): it says "a string", which every scalar is here.
        if event.tag is not None and event.tag != "!":
            raise _Rejected("tags (!name) are not accepted", event.start_mark)
        self.document.origins[path] = self.location(event)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        # Style: None from the Python parser, "" from libyaml's, for a scalar without quotes.
        is_null = event.style is None and event.value in {"", "~", "null"}
        is_plain_null = event.style == "" and event.value in {"", "~", "null"}
        return None if is_null or is_plain_null else event.value

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _Rejected("a key must be a plain string", event.start_mark)
            key, here = event.value, (*path, event.value)
            # YAML 1.2.2 section 3.2.1.1 requires unique keys; PyYAML 6.0.3 silently keeps the last one.
            if key in found:
                where = self.location(event)
                first = self.document.origins[here].rpartition(":")[2]
                self.document.problems.append(
                    Problem(format_path(here), f"is given twice (first on line {first})", where)
                )
                # Its events have to be consumed; another path keeps the first value's location.
                self.value((*path, f"{key} (again)"), next(self.events))
                continue
            found[key] = self.value(here, next(self.events))
            # After value(), which recorded the line of the value: a nested one begins a line later than its key.
            self.document.origins[here] = self.location(event)
        return found

    def sequence(self, path: KeyPath) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            found.append(self.value((*path, len(found)), event))
        return found
