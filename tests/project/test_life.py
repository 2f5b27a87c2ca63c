"""The life of a request is told alike in `proxy.request`, the README and CONTRIBUTING, and is what the handler does."""

import ast
import re
from collections.abc import Iterator

import proxy.request
from tests.support.paths import ROOT

FOLDER = ROOT / "proxy" / "request"

# The call in handler.py with which each step begins.
CALLS = {
    "validate": "validate_with",
    "authenticate": "self.authenticator.authenticate",
    "route": "self.routes.get",
    "admit": "self.circuit_breakers.check",
    "forward": "self.forwarder.send",
    "judge": "self.circuit_breakers.record_success",
    "record": "record_request",
}


def steps_in(text: str) -> list[str]:
    """Return the names of a numbered list of steps."""
    return re.findall(r"^\d+\. \*\*(\w+)\*\*:", text, re.MULTILINE)


def calls_in(methods: dict[str, ast.AST], name: str) -> Iterator[str]:
    """Yield the calls in one of the handler's methods, in the order of the source, its own methods inlined."""
    calls = [node for node in ast.walk(methods[name]) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        called = ast.unparse(call.func)
        own = called.removeprefix("self.")
        if own != called and own in methods:
            yield from calls_in(methods, own)
        else:
            yield called


def test_the_handler_calls_the_steps_in_the_order_of_the_list() -> None:
    assert steps_in(proxy.request.__doc__ or "") == list(CALLS)
    tree = ast.parse((FOLDER / "handler.py").read_text(encoding="utf-8"))
    methods: dict[str, ast.AST] = {
        node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    made = list(calls_in(methods, "handle"))
    first = [made.index(call) for call in CALLS.values()]
    assert first == sorted(first)


def test_every_file_of_the_list_exists() -> None:
    named = re.findall(r"`([a-z_/]+(?:\.py|/))`", proxy.request.__doc__ or "")
    assert len(named) > len(CALLS)
    assert [name for name in named if not (FOLDER / name).exists()] == []


def test_readme_and_contributing_tell_the_same_steps() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Life of a request\n")[2]
    assert steps_in(readme.partition("\n## ")[0]) == list(CALLS)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sentence = contributing.partition("calls them in this order:")[2].partition(".")[0]
    assert re.findall(r"\*\*(\w+)\*\*", sentence) == list(CALLS)
