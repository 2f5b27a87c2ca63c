"""Identifiers use the field's words: those that were retired do not come back."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# The retired word, and what is written instead.
RETIRED = {
    "answer": "response",
    "crowd": "concurrency",
    "dialler": "connector",
    "doorway": "allowed_hosts",
    "doubt": "backoff, rejection",
    "lately": "recent",
    "mend": "fix",
    "overview": "snapshot",
    "patience": "timeout, deadline",
    "permit": "policy",
    "seal": "encrypt, cipher",
    "tallies": "collectors",
    "unseal": "decrypt",
    "verdict": "diagnosis",
    "wire": "connection",
}
RETIRED_PAIRS = {"at_hand", "come_back", "give_up", "hand_over", "take_up", "way_back", "far_side", "near_side"}
RETIRED_BEGINNINGS = ("most_", "longest_", "MOST_", "LONGEST_")  # max_

PACKAGES = ("proxy", "tests", "docs")
NAMES_OF_OTHERS = {"most_common", "longest_pause"}  # collections.Counter; a configuration key
OTHERS = "integration/libraries"  # programs of other people's apps


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each identifier that a file binds or uses, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno


def words(identifier: str) -> list[str]:
    """Return the words of `snake_case`, `CamelCase` or `UPPER_CASE`, in lower case and the singular."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)
    return [word.lower().removesuffix("s") if word.lower() not in RETIRED else word.lower() for word in found]


def retired_in(identifier: str) -> list[str]:
    """Return the retired words of an identifier."""
    if identifier in NAMES_OF_OTHERS:
        return []
    found = [word for word in words(identifier) if word in RETIRED]
    lowered = identifier.lower()
    found += [pair for pair in RETIRED_PAIRS if re.search(rf"(?:^|_){pair}(?:$|_)", lowered)]
    found += [start for start in RETIRED_BEGINNINGS if identifier.lstrip("_").startswith(start)]
    return found


def files() -> list[Path]:
    return [path for name in PACKAGES for path in (ROOT / name).rglob("*.py") if OTHERS not in path.as_posix()]


def test_no_identifier_has_a_retired_word() -> None:
    found = []
    for path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {path.relative_to(ROOT).as_posix(): retired_in(path.stem)}
        named |= {f"{path.relative_to(ROOT)}:{line}: {name}": retired_in(name) for name, line in identifiers(tree)}
        found += [f"{where} ({', '.join(retired)})" for where, retired in named.items() if retired]
    assert found == []


@pytest.mark.parametrize("name", ["_answer_of", "Answers", "MOST_BYTES", "take_up", "is_at_hand", "doubts", "Doorway"])
def test_a_retired_word_is_found(name: str) -> None:
    assert retired_in(name)


@pytest.mark.parametrize("name", ["response", "almost_there", "permission", "sealevel", "hand_overhead", "wired"])
def test_other_words_are_not(name: str) -> None:
    assert not retired_in(name)
