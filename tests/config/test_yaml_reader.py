"""Which YAML texts are accepted, and the problems of those that are not."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import (
    Problem,
)
from proxy.config.yaml_reader import MAX_BYTES, read_yaml
from tests.config.loading import APPLICATIONS, BASE, load, problems


def test_a_key_given_twice_is_reported_with_both_lines(tmp_path: Path) -> None:
    text = BASE + "log:\n  level: info\n  format: json\n  level: debug\n"
    assert problems(tmp_path, text) == ["config.yaml:6: log.level: is given twice (first on line 4)"]


def test_an_account_given_twice_is_reported_with_both_lines(tmp_path: Path) -> None:
    text = APPLICATIONS + "accounts:\n  acme: {refresh_tokens: {eu: a}}\n  acme:\n    refresh_tokens: {na: b}\n"
    assert problems(tmp_path, text) == ["config.yaml:4: accounts.acme: is given twice (first on line 3)"]


def test_billion_laughs_end_at_the_first_alias(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    (found,) = problems(tmp_path, "\n".join(lines))
    assert found == "config.yaml:2: is not accepted: aliases (*name) are not accepted; write the value out"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("a: !!python/object/apply:os.system [id]", "tags (!name) are not accepted"),
        ("a: !!binary aGk=", "tags (!name) are not accepted"),
        ("a: !env HOME", "tags (!name) are not accepted"),
        ("a: &x 1\nb: *x", "aliases (*name) are not accepted; write the value out"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "aliases (*name) are not accepted; write the value out"),
        ("? [a, b]\n: c", "a key must be a plain string"),
        ("a: " + "[" * 20 + "]" * 20, "more than 12 levels deep"),
        ("a: " + "{b: " * 20 + "}" * 20, "more than 12 levels deep"),
        ("a: " + "[" * 100_000, "more than 12 levels deep"),
        ("a: [1, 2", "a list [ … ] is not closed or lacks a comma"),
        ("a: {b: ${NAME}}", 'needs quotes, as "${NAME}"'),
        ("a: [{b: 1}, c: ${NAME}]", 'needs quotes, as "${NAME}"'),
        ('a: "open', "a quote is not closed"),
        ("a: 'open\n---\nb: 1", "a quote or a bracket is not closed"),
        ("\ta: 1", "indent with spaces"),
        ("a: @b", "put it in quotes"),
        ("a:\n\t- b", "a tab"),
        ("a: b: c", "a colon is not allowed here"),
        ("a: - b", "a list item is not allowed here"),
        ("a:\n  b: 1\n c: 2", "keys of one group start in the same column"),
        ("a:\n  - b\n  c: d", "list items start in the same column"),
        ("a\nb: 1", "a key without a colon"),
        ('a: "C:\\Users"', "use single quotes"),
        ("a: \x07", "a control character"),
        ("a: |9x", "a bracket or a colon that is missing"),
    ],
)
def test_yaml_that_is_not_accepted_is_one_problem_with_its_line(tmp_path: Path, extra: str, message: str) -> None:
    (found,) = problems(tmp_path, BASE + extra + "\n")
    assert re.match(r"config\.yaml(:[3-7])?: is not (valid YAML|accepted): ", found)
    assert message in found


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "42\n", "[]\n"])
def test_a_file_that_is_no_mapping_is_one_problem(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text) == ["config.yaml: must be a mapping of settings"]


def test_several_documents_are_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, f"{BASE}---\n{BASE}") == ["config.yaml: must hold one YAML document, not several"]


@pytest.mark.parametrize("text", [f"---\n{BASE}", f"{BASE}...\n", f"\ufeff{BASE}", BASE.replace("\n", "\r\n")])
def test_the_marks_and_line_ends_of_one_document_are_fine(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).config == load(tmp_path, BASE).config


def test_a_file_that_is_not_utf_8_is_one_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, BASE.encode("utf-16")) == ["config.yaml: is not UTF-8"]


def test_a_file_over_four_mebibytes_is_one_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, BASE + "#" * MAX_BYTES) == ["config.yaml: is larger than 4 MiB"]


def test_values_stay_the_text_that_was_written(tmp_path: Path) -> None:
    text = APPLICATIONS.replace(
        "client_secret: hush", "client_secret: 0123, user_agent: {name: 1e3, version: 2.10}"
    ) + ("accounts: {no: {refresh_tokens: {eu: yes}}, on: {refresh_tokens: {eu: 2026-11-23}}}\ndefault_account: no\n")
    config = load(tmp_path, text).config
    application = config.applications["main"]
    assert application.client_secret.reveal() == "0123"
    assert (application.user_agent.name, application.user_agent.version) == ("1e3", "2.10")
    assert config.accounts["no"].refresh_tokens["eu"].reveal() == "yes"
    assert config.accounts["on"].refresh_tokens["eu"].reveal() == "2026-11-23"
    assert config.default_account == "no"


@given(
    st.recursive(
        st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8).filter(
            lambda text: text not in {"", "~", "null"}
        ),
        lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text("abc", min_size=1), below, max_size=3),
        max_leaves=8,
    )
)
def test_texts_lists_and_mappings_are_read_as_they_were_written(tree: Any) -> None:
    document = read_yaml(yaml.safe_dump({"top": tree}, allow_unicode=True), "x")
    assert (document.tree, document.problems) == ({"top": tree}, [])


@given(st.text(max_size=200))
def test_no_text_whatever_raises_in_the_reader(text: str) -> None:
    document = read_yaml(text, "x")
    assert isinstance(document.tree, dict)


def test_a_problem_reads_where_key_and_what() -> None:
    assert str(Problem("a.b", "is missing", "x.yaml:3")) == "x.yaml:3: a.b: is missing"
    assert str(Problem("a.b", "is missing")) == "a.b: is missing"
    assert str(Problem("", "is not UTF-8", "x.yaml")) == "x.yaml: is not UTF-8"
