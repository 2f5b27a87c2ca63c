"""What the documents state, held to the code: settings, errors, metrics, files, commands, examples.

`python -m tests.project.test_docs` writes the tables of the README anew.
"""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

from proxy.amazon.catalog import rebuild
from proxy.cli import main, options
from proxy.cli.options import settings_of
from proxy.config import environment, load_config
from proxy.config.model import Config, default_as_written, settings_in
from proxy.errors import ProxyError, all_errors
from proxy.observability.collectors import CallbackCollector
from proxy.observability.metrics import Metrics
from proxy.remedies import REMEDIES
from proxy.request import routing
from proxy.request.forbidden_hints import HINTS, Hint
from proxy.request.ratelimit import limiter
from proxy.server.admin.app import Readiness, health_app
from proxy.server.handover import RESTART_ONLY
from proxy.simulator import cli as simulator_command
from proxy.simulator import control_api
from tests.support.paths import ROOT

README = ROOT / "README.md"
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]

# What stands for the names in a mapping, and for the number in a list of groups.
NAMES = {"refresh_tokens": "REGION", "marketplaces": "ID"}
ENVIRONMENT = dict.fromkeys(
    (
        *("LWA_CLIENT_ID", "LWA_CLIENT_SECRET", "ACME_NA_REFRESH_TOKEN", "ACME_EU_REFRESH_TOKEN"),
        "OTHER_FE_REFRESH_TOKEN",
    ),
    "made-up",
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(name: str) -> str:
    return text_of("README.md").partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0].strip()


def cells(table: str) -> list[list[str]]:
    """Return the rows of a table, without its head."""
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()[2:]]


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of("README.md"), re.MULTILINE | re.DOTALL)


def table(*rows: tuple[str, ...]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rest))


# The tables.


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, meaning) of every setting there is."""
    for name, field in model.model_fields.items():
        key, meaning = f"{prefix}{name}", field.description or ""
        below = settings_in(field.annotation) or _in_container(field.annotation)
        if below is None:
            yield f"{key}{_place(name, field)}", default(key, field), meaning
            continue
        if name == "listen":
            yield (
                key,
                f"`{Config().listen[0].address}`",
                f"{meaning} A plain address, or a mapping with the keys below.",
            )
        yield from settings(below, f"{key}{_place(name, field)}.")


def _place(name: str, field: Any) -> str:
    if get_origin(field.annotation) is dict:
        return f".{NAMES.get(name, 'NAME')}"
    return "[N]" if name == "listen" else ""


def _in_container(kind: Any) -> type[BaseModel] | None:
    if get_origin(kind) in {dict, tuple}:
        return next((found for argument in get_args(kind) if (found := settings_in(argument))), None)
    return None


def default(key: str, field: Any) -> str:
    if field.is_required():
        return "required"
    value = default_as_written(field)
    if value is None:
        return "Amazon's" if key.startswith("endpoints.") else "none"
    if value in ([], {}):
        return "none"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def settings_table() -> str:
    return table(("key", "default", "meaning"), *((f"`{key}`", value, meaning) for key, value, meaning in settings()))


def errors_table() -> str:
    return table(
        ("code", "status", "whose fault", "try again", "meaning", "what to do"),
        *(row(error) for error in sorted(all_errors(), key=lambda error: (error.status, error.code))),
    )


def row(error: type[ProxyError]) -> tuple[str, ...]:
    code, again = f"`{error.code}`", "yes" if error.retryable else "no"
    meaning = (error.__doc__ or "").splitlines()[0]
    return code, str(error.status), error.fault, again, meaning, REMEDIES[error.code]


def metrics_table() -> str:
    return table(("series", "kind", "labels", "meaning"), *sorted(series()))


def series() -> Iterator[tuple[str, str, str, str]]:
    # The registry tells labels only of what was counted already; its collectors know them from the start.
    for metric in Metrics().registry._collector_to_names:
        if isinstance(metric, MetricWrapperBase):
            kind = str(metric._type)
            name = f"{metric._name}_total" if kind == "counter" else metric._name
            yield f"`{name}`", kind, ", ".join(metric._labelnames), metric._documentation
        elif isinstance(metric, CallbackCollector):
            kind = metric.kind
            yield f"`{metric.name}`", kind, ", ".join(metric.labels), metric.documentation


def hints_table() -> str:
    return table(("hint", "what it means, and what to do"), *((f"`{hint}`", text) for hint, text in HINTS.items()))


TABLES = {"settings": settings_table, "errors": errors_table, "hints": hints_table, "metrics": metrics_table}


def test_every_hint_has_a_meaning() -> None:
    assert set(HINTS) == set(get_args(Hint))


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_readme_say_what_the_code_does(name: str) -> None:
    assert section(name) == TABLES[name](), "run `python -m tests.project.test_docs`"


def test_every_setting_has_a_meaning() -> None:
    rows = list(settings())
    assert len(rows) > 40
    assert all(meaning for _, _, meaning in rows)


def test_there_is_something_to_do_about_every_error_and_about_nothing_else() -> None:
    assert set(REMEDIES) == {error.code for error in all_errors()}
    assert all(remedy.endswith(".") and "|" not in remedy for remedy in REMEDIES.values())


def test_every_series_of_the_registry_is_in_the_readme() -> None:
    families = {family.name for family in Metrics().registry.collect() if family.name.startswith("spapi_proxy_")}
    listed = {name.strip("`").removesuffix("_total") for name, *_ in cells(section("metrics"))}
    assert listed == families


# Files, addresses, headers, variables.


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    text = text_of(document)
    named = re.findall(r"`((?:proxy|tests|config|\.ci)/[\w./-]+)`", text)
    named += [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert named or document in {"SECURITY.md", "CHANGELOG.md"}
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_life_of_a_request_names_every_step_there_is() -> None:
    life = text_of("README.md").partition("## Life of a request")[2].partition("\n## ")[0]
    named = {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", life)}
    assert named == {path.name for path in (ROOT / "proxy" / "request").glob("*.py")} - {"__init__.py"}


def test_the_layout_of_contributing_names_every_module() -> None:
    layout = text_of("CONTRIBUTING.md").partition("## Layout")[2].partition("```\n")[2].partition("```")[0]
    proxy = ROOT / "proxy"
    there = {path.name for path in proxy.glob("*.py")} | {path.name for path in (proxy / "request").glob("*.py")}
    there |= {f"{path.parent.name}/" for path in proxy.glob("*/__init__.py")} | {"proxy/"}
    assert {line.split()[0] for line in layout.splitlines()} == there - {"__init__.py", "__main__.py"}


def test_the_readme_names_every_health_address() -> None:
    app = health_app(Readiness(), Metrics(), Config)
    routes = {route.resource.canonical for route in app.router.routes() if route.resource}
    assert "/readyz" in routes
    assert not [route for route in routes if f"`{route}`" not in text_of("README.md")]


@pytest.mark.parametrize(
    "header",
    [routing.ACCOUNT_HEADER, routing.REGION_HEADER, routing.ELEMENTS_HEADER, limiter.MAX_WAIT_HEADER],
)
def test_the_readme_names_every_header_of_ours(header: str) -> None:
    assert f"| `{header}` |" in text_of("README.md")


def test_the_variables_that_the_readme_names_are_read() -> None:
    named = set(re.findall(r"`(SP_API_PROXY_[A-Z0-9_]+)=", text_of("README.md")))
    assert len(named) > 2
    tree: dict[str, Any] = {"applications": {"main": {}}, "accounts": {"acme": {}}}
    found, problems = environment.overrides(dict.fromkeys(named, "x"), tree)
    assert not problems
    assert len(found) == len(named)


def test_a_value_means_the_same_by_flag_and_environment_as_the_readme_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("k" * 40)
    (tmp_path / "config.yaml").write_text((ROOT / "config" / "minimal.yaml").read_text())
    before = load_config("config.yaml", ENVIRONMENT).config
    rows = cells("| a value |" + text_of("README.md").partition("| a value |")[2].partition("\n\n")[0])
    assert len(rows) > 5
    for _, flag, variable in rows:
        options = main._parser().parse_args(["check", *shlex.split(flag.strip("`"))])
        name, _, value = shlex.split(variable.strip("`"))[0].partition("=")
        by_flag = load_config("config.yaml", ENVIRONMENT, settings_of(options)).config
        assert by_flag == load_config("config.yaml", {**ENVIRONMENT, name: value}).config
        assert by_flag != before or "default_account" in flag


def test_the_keys_that_the_readme_says_need_a_restart_are_those_that_do() -> None:
    part = text_of("README.md").partition("### Changing it while the proxy runs")[2]
    line = re.search(r"^- (.*) count from the next start on", part, re.MULTILINE)
    assert line is not None
    assert set(re.findall(r"`([\w.]+)`", line[1])) == {*RESTART_ONLY, "log.format"}
    assert set(RESTART_ONLY) < set(Config.model_fields)


def test_the_names_of_other_libraries_are_all_in_the_readme() -> None:
    known = {*environment._CLIENT_ID, *environment._CLIENT_SECRET, environment._REFRESH_TOKEN, "SP_API_REGION"}
    assert not [name for name in known if f"`{name}`" not in text_of("README.md")]


# Commands.


def command_lines() -> list[str]:
    text = text_of("README.md") + text_of("CONTRIBUTING.md")
    inline = re.findall(r"`sp-api-proxy ([a-z][^`\n]*)`", text)
    own_line = re.findall(r"^sp-api-proxy (.+)$", text, re.MULTILINE)
    return sorted({*inline, *own_line} - {"…"})


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_of_the_documents_is_understood(line: str) -> None:
    parser, words = parser_for(shlex.split(line))
    if words[-1:] == ["--help"]:
        with pytest.raises(SystemExit, match=r"^0$"):
            parser.parse_args(words)
    else:
        parser.parse_args(words)


def parser_for(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    if words[0] == "simulate":
        return simulator_command._parser(), words[1:]
    if words[:2] == ["operations", "rebuild"]:
        return rebuild._parser(), words[2:]
    return main._parser(), words


def test_the_documents_hold_command_lines_of_the_simulator_too() -> None:
    assert len(command_lines()) > 8
    assert any(line.startswith("simulate ") for line in command_lines())


def test_the_readme_lists_every_command() -> None:
    groups = main._parser()._subparsers
    assert groups is not None
    commands = {name for action in groups._group_actions for name in action.choices or ()}
    part = text_of("README.md").partition("## Commands")[2]
    assert set(re.findall(r"^\| `(\w+)", part, re.MULTILINE)) == commands


def parsers(parser: argparse.ArgumentParser | None = None) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of every command."""
    if parser is None:
        yield from parsers(main._parser())
        yield from (simulator_command._parser(), rebuild._parser())
        return
    yield parser
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def test_every_flag_of_every_command_says_what_it_is_for() -> None:
    actions = [(parser.prog, action) for parser in parsers() for action in parser._actions]
    assert len(actions) > 60
    assert [
        (prog, action.metavar or action.option_strings)
        for prog, action in actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ] == []


def test_the_readmes_table_of_commands_has_every_flag_of_theirs() -> None:
    part = text_of("README.md").partition("## Commands")[2]
    told = dict(re.findall(r"^\| `(\w+)[^|]*(\|.*)$", part.replace("| `operations rebuild", ""), re.MULTILINE))
    lacking = []
    for parser in parsers(main._parser()):
        name = parser.prog.partition(" ")[2]
        own = {flag for action in parser._actions for flag in action.option_strings}
        own -= {"-h", "--help", "--version", "--url", *options.ALL_FLAGS}
        lacking += [f"{name} {flag}" for flag in own if f"`{flag}" not in told[name]]
    assert lacking == []


def test_the_simulators_control_addresses_in_the_readme_exist() -> None:
    named = set(re.findall(rf"{control_api.PATH}(/\w+)", text_of("README.md")))
    assert named
    assert named <= {path for _, path in control_api._ACTIONS}


# Examples.


@pytest.mark.parametrize("name", ["minimal.yaml", "example.yaml"])
def test_the_example_configurations_are_good(name: str) -> None:
    assert load_config(str(ROOT / "config" / name), ENVIRONMENT).config.accounts["acme"]


def test_the_example_shows_every_setting() -> None:
    text = text_of("config/example.yaml")
    assert not [name for name in Config.model_fields if not re.search(rf"^#? ?{name}:", text, re.MULTILINE)]
    last = {key.rpartition(".")[2] for key, _, _ in settings()} - {"NAME", *NAMES.values()}
    assert not [name for name in last if not re.search(rf"\b{name}:", text)]


@pytest.mark.parametrize("text", fenced("yaml"))
def test_the_configurations_in_the_readme_are_good(text: str, tmp_path: Path) -> None:
    for name in re.findall(r"\{file: /run/secrets/(\w+)\}", text):
        (tmp_path / name).write_text("made-up", encoding="utf-8")
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("/run/secrets", str(tmp_path)), encoding="utf-8")
    assert load_config(str(path), ENVIRONMENT).config.accounts


def test_the_readme_holds_a_configuration_and_python_that_compiles() -> None:
    assert len(fenced("yaml")) > 0
    assert [compile(text, "README.md", "exec") for text in fenced("python")]


def write_tables() -> None:
    text = text_of("README.md")
    for name, make in TABLES.items():
        before, _, rest = text.partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- /{name} -->")[2]
        text = f"{before}<!-- {name} -->\n\n{make()}\n\n<!-- /{name} -->{after}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tables()
