"""What the documents state, held to the code: settings, errors, metrics, files, commands, examples.

`python -m tests.test_docs` writes the tables of the README anew.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel

from proxy.cli import _parser
from proxy.config import load_config
from proxy.config.model import Config, Endpoints, settings_in
from proxy.errors import all_errors
from proxy.metrics import Metrics

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

NAMES = {"applications": "NAME", "accounts": "NAME", "listen": "N", "refresh_tokens": "REGION", "marketplaces": "ID"}
ENVIRONMENT = dict.fromkeys(
    ("LWA_CLIENT_ID", "LWA_CLIENT_SECRET", "ACME_NA_REFRESH_TOKEN", "ACME_EU_REFRESH_TOKEN"), "made-up"
)


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, meaning) of every setting there is."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        below = settings_in(field.annotation) or _in_container(field.annotation)
        if below is None:
            yield f"{key}.{NAMES[name]}" if name in NAMES else key, default(field), field.description or ""
            continue
        inner = (
            f"{key}[{NAMES[name]}]." if name == "listen" else f"{key}.{NAMES[name]}." if name in NAMES else f"{key}."
        )
        yield from settings(below, inner)


def _in_container(kind: Any) -> type[BaseModel] | None:
    if get_origin(kind) in {dict, tuple}:
        return next((found for argument in get_args(kind) if (found := settings_in(argument))), None)
    return None


def default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in (None, (), {}):
        return ""
    if isinstance(value, float):
        return f"`{value:g}s`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def settings_table() -> str:
    rows = [f"| `{key}` | {value} | {meaning} |" for key, value, meaning in settings()]
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *rows])


def errors_table() -> str:
    rows = [
        f"| `{error.code}` | {error.status} | {error.fault} | {'yes' if error.retryable else 'no'} "
        f"| {(error.__doc__ or '').splitlines()[0]} |"
        for error in all_errors()
    ]
    return "\n".join(
        ["| code | status | whose fault | try again | meaning |", "| --- | --- | --- | --- | --- |", *rows]
    )


def metrics_table() -> str:
    rows = []
    for metric in vars(Metrics()).values():
        if not isinstance(metric, Counter | Gauge | Histogram):
            continue
        name = f"{metric._name}_total" if isinstance(metric, Counter) else metric._name
        labels = ", ".join(metric._labelnames)
        rows.append(f"| `{name}` | {type(metric).__name__.lower()} | {labels} | {metric._documentation} |")
    rows.append("| `spapi_proxy_build_info` | gauge | version, python | Which version is running; always 1. |")
    return "\n".join(["| series | kind | labels | meaning |", "| --- | --- | --- | --- |", *sorted(rows)])


TABLES = {"settings": settings_table, "errors": errors_table, "metrics": metrics_table}


def section(name: str) -> str:
    text = README.read_text(encoding="utf-8")
    return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0].strip()


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_readme_say_what_the_code_does(name: str) -> None:
    assert section(name) == TABLES[name](), "run `python -m tests.test_docs`"


def test_every_setting_has_a_meaning() -> None:
    rows = list(settings())
    assert len(rows) > 40
    assert all(meaning for _, _, meaning in rows)
    assert f"endpoints.{next(iter(Endpoints.model_fields))}" in {key for key, _, _ in rows}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_every_file_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`((?:proxy|tests|config|\.ci)/[\w./-]+)`", text)
    assert named or document == "SECURITY.md"
    assert not [name for name in named if not (ROOT / name).exists()]


def commands() -> list[str]:
    text = README.read_text(encoding="utf-8")
    found = re.findall(r"`sp-api-proxy ([a-z][^`]*)`", text) + re.findall(r"^sp-api-proxy (.+)$", text, re.MULTILINE)
    return sorted({line for line in found if not line.startswith("simulate")})


@pytest.mark.parametrize("line", commands())
def test_every_command_line_of_the_readme_is_understood(line: str) -> None:
    _parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("name", ["minimal.yaml", "example.yaml"])
def test_the_example_configurations_are_good(name: str) -> None:
    assert load_config(str(ROOT / "config" / name), ENVIRONMENT).config.accounts["acme"]


def test_the_example_shows_every_group_of_settings() -> None:
    text = (ROOT / "config" / "example.yaml").read_text(encoding="utf-8")
    assert not [name for name in Config.model_fields if not re.search(rf"^#? ?{name}:", text, re.MULTILINE)]


def write_tables() -> None:
    text = README.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        before, _, rest = text.partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- /{name} -->")[2]
        text = f"{before}<!-- {name} -->\n\n{table()}\n\n<!-- /{name} -->{after}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tables()
