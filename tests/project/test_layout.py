"""The layout of the package: which part may import which, and that files form no circle."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROXY = ROOT / "proxy"

# What each part may import besides itself and the version in proxy/__init__.py.
BASE = {"config", "errors", "observability"}
ARROWS: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"server", "request", "amazon", "store", "simulator", *BASE},
    "server": {"request", "amazon", "store", *BASE},
    "request": {"amazon", "store", *BASE},
    "amazon": BASE,
    "store": BASE,
    "config": set(),
    "observability": {"errors"},
    "errors": set(),
    "simulator": set(),
}

# The packages of proxy/request, and which of the others each may import. The files beside them import none of the four.
REQUEST: dict[str, set[str]] = {
    "ratelimit": set(),
    "upstream": set(),
    "tokens": {"ratelimit", "upstream"},
    "documents": {"tokens", "upstream"},
}
KNOWS_THE_ORDER = "handler"  # the file of proxy/request that may import all four

LIBRARIES_OF_THE_STORE = ("aiocache", "redis", "cryptography")


def module_of(path: Path, root: Path) -> str:
    """Return the dotted name of a file below the folder `root`, which is the package `proxy`."""
    parts = ("proxy", *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path, root: Path) -> Iterator[str]:
    """Yield the dotted names of the proxy's own modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "proxy")
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path} imports relatively")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "proxy":
            folder = root.joinpath(*node.module.split(".")[1:])
            for alias in node.names:
                is_module = (folder / f"{alias.name}.py").exists() or (folder / alias.name / "__init__.py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def graph_of(root: Path) -> dict[str, set[str]]:
    return {module_of(path, root): set(imports(path, root)) for path in sorted(root.rglob("*.py"))}


def part(module: str, root: Path) -> tuple[str, str]:
    """Return the part of the proxy that a module belongs to and, in `request`, its package or file."""
    names = module.split(".")[1:] or [""]
    if names[0] != "request" or len(names) == 1:
        return names[0], ""
    return "request", names[1] if len(names) > 2 or (root / "request" / names[1]).is_dir() else f"{names[1]}.py"


def wrong_arrows(root: Path) -> list[str]:
    """Return the imports between parts that ARROWS and REQUEST do not allow."""
    found = []
    for module, imported in graph_of(root).items():
        own, own_step = part(module, root)
        for other in sorted(imported):
            its, its_step = part(other, root)
            if its in {"", own} or its in ARROWS.get(own, ()):
                is_wrong = own == its == "request" and not _is_allowed_in_request(own_step, its_step)
            else:
                is_wrong = own != ""
            if is_wrong or (own == "" and its):
                found.append(f"{module} → {other}")
    return found


def _is_allowed_in_request(own: str, other: str) -> bool:
    if other not in REQUEST:
        return other != f"{KNOWS_THE_ORDER}.py" or own not in REQUEST
    return own in {other, f"{KNOWS_THE_ORDER}.py"} or other in REQUEST.get(own, ())


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules of which each reaches the others by imports (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(graph.get(module, ())):
            if other not in index:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def users_of(library: str, root: Path) -> set[str]:
    """Return the parts that import a library."""
    return {part(module_of(path, root), root)[0] for path in root.rglob("*.py") if _imports_library(path, library)}


def _imports_library(path: Path, library: str) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.partition(".")[0] == library for name in names)


def readers_of_the_environment(root: Path) -> set[str]:
    paths = (path for path in root.rglob("*.py") if "os.environ" in path.read_text(encoding="utf-8"))
    return {part(module_of(path, root), root)[0] for path in paths}


def things_in(folder: Path) -> set[str]:
    """Return what lies in a package's folder, without what every package has."""
    apart = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    return {path.name.removesuffix(".py") for path in folder.iterdir() if path.name not in apart}


def test_every_import_follows_an_arrow() -> None:
    assert wrong_arrows(PROXY) == []


def test_no_files_import_one_another_in_a_circle() -> None:
    assert circles(graph_of(PROXY)) == []


def test_the_package_holds_the_parts_of_the_table_and_no_more_than_nine() -> None:
    assert things_in(PROXY) == set(ARROWS) - {"__main__"}
    assert len(things_in(PROXY)) <= 9


def test_the_packages_of_request_are_those_of_the_table() -> None:
    assert {path.parent.name for path in (PROXY / "request").glob("*/__init__.py")} == set(REQUEST)


def test_the_tests_mirror_the_package() -> None:
    apart = {"support", "integration", "project", "security", "bench"}
    folders = {path.parent for path in (ROOT / "tests").rglob("__init__.py")} - {ROOT / "tests"}
    mirrored = {folder.relative_to(ROOT / "tests") for folder in folders}
    mirrored = {folder for folder in mirrored if folder.parts[0] not in apart}
    assert [folder for folder in mirrored if not (PROXY / folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("library", LIBRARIES_OF_THE_STORE)
def test_only_the_store_imports_what_it_keeps_things_in(library: str) -> None:
    assert users_of(library, PROXY) == {"store"}


def test_only_the_command_line_and_the_configuration_read_the_environment() -> None:
    assert readers_of_the_environment(PROXY) <= {"__main__", "cli", "config"}


# Each rule, seen to fail on a small package.


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("amazon/a.py", "from proxy.request import handler"),
        ("simulator/a.py", "from proxy.errors import E"),
        ("observability/a.py", "import proxy.config"),
        ("server/a.py", "def f():\n    from proxy.cli import main"),
        ("request/upstream/a.py", "from proxy.request.tokens import t"),
        ("request/step.py", "from proxy.request.ratelimit.limiter import Limiter"),
        ("request/documents/a.py", "from proxy.request import handler"),
        ("__init__.py", "from proxy.errors import E"),
    ],
)
def test_a_wrong_arrow_is_found(path: str, text: str, tmp_path: Path) -> None:
    write_package(tmp_path, {path: text})
    assert len(wrong_arrows(tmp_path)) == 1


def test_a_circle_is_found(tmp_path: Path) -> None:
    write_package(tmp_path, {"store/a.py": "from proxy.store import b", "store/b.py": "from proxy.store.a import x"})
    assert circles(graph_of(tmp_path)) == [["proxy.store.a", "proxy.store.b"]]


def test_a_relative_import_is_found(tmp_path: Path) -> None:
    write_package(tmp_path, {"store/a.py": "from . import b"})
    with pytest.raises(AssertionError, match="imports relatively"):
        graph_of(tmp_path)


def test_a_user_of_a_library_or_of_the_environment_is_found(tmp_path: Path) -> None:
    write_package(tmp_path, {"server/a.py": "import redis.asyncio", "amazon/a.py": "import os\nos.environ['A']"})
    assert users_of("redis", tmp_path) == {"server"}
    assert readers_of_the_environment(tmp_path) == {"amazon"}


def write_package(root: Path, files: Mapping[str, str]) -> None:
    there = {f"{name}/__init__.py": "" for name in ARROWS if name not in {"__main__", "errors"}}
    there |= {f"request/{name}/__init__.py": "" for name in REQUEST} | {"__init__.py": "", "errors.py": "class E: ..."}
    there |= {
        "request/handler.py": "",
        "request/tokens/t.py": "",
        "request/ratelimit/limiter.py": "",
        "cli/main.py": "",
    }
    for name, text in {**there, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
