"""Check of the installed dependencies against the ranges that this version works with.

It imports nothing but the standard library: an import of our own against a wrong version may fail or hang. aiohttp
3.14.3, for one, accepts connections and answers none.
"""

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

# The same text as in pyproject.toml; tests/cli/test_dependencies.py compares them.
# redis is checked only where a store is configured.
RANGES = (
    "aiocache>=0.12.3,<1",
    "aiohappyeyeballs>=2.5",
    "aiohttp>=3.14.4,<3.15",
    "cryptography>=44",
    "httptools>=0.7.1",
    "multidict>=6.0.3",
    "prometheus-client>=0.22,<1",
    "pydantic>=2.11,<3",
    "PyYAML>=6.0.2",
    "uvloop>=0.21",
)
REDIS_RANGE = "redis>=7.2,<9"

_VERSION = re.compile(r"v?(?:\d+!)?(\d+(?:\.\d+)*)[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)?", re.IGNORECASE)


def wrong_versions(ranges: Iterable[str] = RANGES) -> list[str]:
    """Return one line for each installed package that is out of its range."""
    lines = []
    for requirement in ranges:
        name = re.split("[<>]", requirement, maxsplit=1)[0]
        bounds = requirement.removeprefix(name)
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # the import of what is missing says so; uvloop may be missing
        if not is_within(found, bounds):
            lines.append(
                f"sp-api-proxy: {name} {found} is installed; this version works with {name} {bounds}. "
                f"Fix: pip install '{requirement}'"
            )
    return lines


def is_within(found: str, bounds: str) -> bool:
    """Return whether a version is within bounds such as `>=3.14.4,<3.15`, as PEP 440 orders versions.

    A pre-release comes before its release, and a pre-release of an excluded upper bound is excluded with it.
    """
    match = _VERSION.match(found)
    if match is None:
        return False
    release, is_final = _numbers(match[1]), match[2] is None
    for bound in bounds.split(","):
        if bound.startswith(">="):
            lowest = _numbers(bound[2:])
            if (release, is_final) < (lowest, True):
                return False
        elif release >= _numbers(bound.removeprefix("<")):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a release without zeros at the end: 7.2 and 7.2.0 are the same."""
    return tuple(map(int, re.sub(r"(\.0+)+$", "", text).split(".")))
