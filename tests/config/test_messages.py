"""Messages for invalid settings use the terms of a configuration file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config import (
    Config,
    KeyPath,
)
from proxy.config.load import _validated
from proxy.config.merge import MergedSettings
from proxy.config.model import settings_in
from proxy.config.values import is_list, is_mapping, kind_below
from tests.config.loading import BASE, problems


def test_where_names_of_ones_own_belong_it_is_said_so(tmp_path: Path) -> None:
    own, marketplaces = problems(tmp_path, f"{BASE}callers: job\nmarketplaces: A1\n")
    assert own == "config.yaml:3: callers: must be a mapping such as {acme: {…}}, with a name of your choice for each"
    assert marketplaces.endswith("must be a mapping such as {A1EXAMPLE: eu}, with a region for each marketplace")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("limtis: {pace: true}", "limtis: is not a setting; did you mean limits?"),
        ("limits: {max_wiat: 1s}", "limits.max_wiat: is not a setting; did you mean max_wait?"),
        ("limits: {zzz: 1s}", "limits.zzz: is not a setting; known: max_wait, pace, max_queue"),
        ("listen: [{adress: '127.0.0.1:1'}]", "listen[0].adress: is not a setting; did you mean address?"),
        ("endpoints: {uk: 'https://a.test'}", "endpoints.uk: is not a setting; known: na, eu, fe, lwa, documents"),
        ("Limits: {pace: true}", "Limits: is not a setting; did you mean limits?"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(tmp_path: Path, extra: str, expected: str) -> None:
    assert f"config.yaml:3: {expected}" in problems(tmp_path, BASE + extra + "\n")


@pytest.mark.parametrize("extra", ["limtis:", "limtis: ~", "limtis: null"])
def test_an_unknown_key_without_a_value_is_an_error_too(tmp_path: Path, extra: str) -> None:
    assert problems(tmp_path, f"{BASE}{extra}\n") == ["config.yaml:3: limtis: is not a setting; did you mean limits?"]


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ("pool: {max_connections: 0}", "pool.max_connections"),
        ("pool: {max_connections: 1.5}", "pool.max_connections"),
        ("pool: {max_connections: many}", "pool.max_connections"),
        ("log: {level: loud}", "log.level"),
        ("environment: prod", "environment"),
        ("store: redis", "store"),
        ("store: []", "store"),
        ("warm_up: maybe", "warm_up"),
        ("marketplaces: {A1: uk}", "marketplaces.A1"),
        ("limits: [1]", "limits"),
        ("limits: 1s", "limits"),
        ("listen: []", "listen"),
        ("listen: {}", "listen[0].address"),
        ("listen: [{address: '127.0.0.1:1', region: uk}]", "listen[0].region"),
        ("allowed_hosts: a.test", "allowed_hosts"),
        ("timeouts: {connect: [1s]}", "timeouts.connect"),
    ],
)
def test_a_value_of_the_wrong_kind_is_a_problem_of_its_key(tmp_path: Path, extra: str, key: str) -> None:
    assert any(line.startswith(f"config.yaml:3: {key}: ") for line in problems(tmp_path, BASE + extra + "\n"))


FOREIGN = re.compile(
    r"tuple|dict|instance|string|integer|boolean|Input|valid\b|parse|pattern|None|greater|less than|cannot be used"
)
SHAPES: list[Any] = [
    "",
    "x",
    "\t",
    "-1",
    "99999999999",
    "x" * 1000,
    [],
    ["x"],
    [["x"]],
    {},
    {"x": "y"},
    {"x": {"y": "z"}},
]
SHAPES += [None, {"x": None}, [None], "2026-99-99", "1e9999", "ä b", {"a b": {}}, "9" * 5000]


def keys_of(kind: Any = Config, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield a path to every setting and group there is, made-up names within."""
    if path:
        yield path
    if group := settings_in(kind):
        for name in group.model_fields:
            yield from keys_of(kind_below(kind, name), (*path, name))
    elif is_list(kind):
        yield from keys_of(kind_below(kind, 0), (*path, 0))
    elif is_mapping(kind):
        part = "eu" if path[-1] == "refresh_tokens" else "acme"
        yield from keys_of(kind_below(kind, part), (*path, part))


def test_every_mistake_is_told_in_the_words_of_a_configuration() -> None:
    paths = list(keys_of())
    assert len(paths) > 100
    told = set[str]()
    for path in paths:
        for shape in SHAPES:
            merged = MergedSettings(tree=yaml.safe_load(BASE))
            if path[0] == "listen" and len(path) > 1:
                merged.ensure_listener()
            merged.put(path, shape, "x")
            _validated(merged)
            told |= {problem.message for problem in merged.problems}
    assert len(told) > 30
    assert [message for message in told if FOREIGN.search(message)] == []
