"""Which module may import which? The arrows of the design, held."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROXY = ROOT / "proxy"

GROUND = {"config", "errors", "metrics", "logs"}

# What each part may import, besides itself. The arrows: cli → app → request → amazon, store → the ground.
ARROWS: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "config": set(),
    "metrics": {"", "recent", "tallies"},
    "recent": set(),
    "tallies": set(),
    "logs": set(),
    "dependencies": set(),
    "amazon": GROUND,
    "process": GROUND,
    "store": GROUND,
    "request": {"amazon", "store", *GROUND},
    "listener": {"request", *GROUND},
    "sockets": {"listener", *GROUND},
    "overview": {"recent", "request", *GROUND},
    "remedies": set(),
    "verdict": {"overview", "recent", "remedies", "request", *GROUND},
    "page": {"overview", "recent", "verdict", *GROUND},
    "status": {"", "overview", "page", "recent", "request", "verdict", *GROUND},
    "ask": GROUND,
    "follow": {"ask", *GROUND},
    "flags": {"ask", *GROUND},
    "systemd": set(),
    "ports": {"request", "listener", "sockets", *GROUND},
    "app": {"", "recent", "replicas", "request", "listener", "sockets", "ports", "status", "amazon", "store", *GROUND},
    "reload": {"app", "process", "sockets", "status", *GROUND},
    "replicas": {"request", "store", *GROUND},
    "rotate": {"app", "request", "amazon", *GROUND},
    "report": GROUND,
    "advice": {"request"},
    "live": {"advice", "app", "report", "request", "amazon", "store", *GROUND},
    "secret_file": GROUND,
    "way_back": {"amazon", *GROUND},
    "authorize": {"app", "secret_file", "way_back", "request", "amazon", *GROUND},
    "simulator": set(),
    "cli": {
        *(
            "",
            "app",
            "ask",
            "authorize",
            "dependencies",
            "flags",
            "follow",
            "live",
            "process",
            "reload",
            "report",
            "rotate",
            "sockets",
            "systemd",
        ),
        *("request", "amazon", "simulator", *GROUND),
    },
    "__main__": {"cli", "dependencies"},
}

# The steps of a request, each of which may import those before it alone.
STEPS = [
    "heads",
    "misspelt",
    "guard",
    "callers",
    "policy",
    "identify",
    "exchange",
    "traces",
    "spans",
    "mask",
    "http1",
    "dial",
    "patience",
    "pool",
    "answers",
    "buckets",
    "limits",
    "shared_limits",
    "crowd",
    "options",
    "circuit",
    "documents",
    "grants",
    "doubts",
    "tokens",
    "forbidden",
    "upstream",
    "placeholders",
    "gunzip",
    "relay",
    "retries",
    "handler",
]


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names of the proxy's own modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "proxy")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "proxy":
                modules = {child.stem if child.is_file() else child.name for child in PROXY.iterdir()}
                yield from (f"proxy.{alias.name}" if alias.name in modules else "proxy" for alias in node.names)
            elif node.module and node.module.startswith("proxy."):
                folder = PROXY.parent / Path(*node.module.split("."))
                for alias in node.names:
                    is_module = (folder / f"{alias.name}.py").exists()
                    yield f"{node.module}.{alias.name}" if is_module else node.module


def part(dotted: str) -> str:
    """Return the part of the proxy that a module belongs to: `proxy.request.tokens.provider` is of `request`."""
    return dotted.split(".")[1] if "." in dotted else ""


def files() -> list[Path]:
    return sorted(PROXY.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PROXY)))
def test_every_import_follows_an_arrow(path: Path) -> None:
    relative = path.relative_to(PROXY)
    own = relative.parts[0].removesuffix(".py").removeprefix("__init__")
    allowed = ARROWS[own] | {own}
    wrong = {name for name in imports(path) if part(name) not in allowed}
    assert not wrong, f"{relative} must not import {sorted(wrong)}"


@pytest.mark.parametrize("step", STEPS)
def test_a_step_imports_no_later_step(step: str) -> None:
    later = {f"proxy.request.{name}" for name in STEPS[STEPS.index(step) :]}
    assert not later & set(imports(PROXY / "request" / f"{step}.py"))


def test_every_part_has_its_arrows_written_down() -> None:
    parts = {path.relative_to(PROXY).parts[0].removesuffix(".py") for path in files()} - {"__init__"}
    assert parts == set(ARROWS) - {""}
    assert {path.stem for path in (PROXY / "request").glob("*.py")} - {"__init__"} == set(STEPS)


@pytest.mark.parametrize("library", ["aiocache", "redis", "cryptography"])
def test_only_the_store_knows_what_it_keeps_things_in(library: str) -> None:
    users = {path.relative_to(PROXY).parts[0] for path in files() if _imports_from(path, library)}
    assert users == {"store"}


def _imports_from(path: Path, library: str) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.partition(".")[0] == library for name in names)


def test_only_the_command_line_reads_the_environment() -> None:
    users = {path.relative_to(PROXY).parts[0] for path in files() if "os.environ" in path.read_text(encoding="utf-8")}
    assert users <= {"cli.py", "config"}, "configuration comes from load_config alone"
