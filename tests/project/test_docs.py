"""What the documents state, compared with the code: settings, errors, metrics, files, commands, examples.

`python -m docs.generate` writes what the pages take from the code.
"""

import argparse
import ast
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest

from docs import generate
from docs.generate import NAMES, generated, settings
from docs.log_events import Event, events
from proxy.amazon.catalog import rebuild
from proxy.cli import common, main
from proxy.cli.options import settings_of
from proxy.config import environment, load_config
from proxy.config.model import Config
from proxy.errors import all_errors
from proxy.observability.metrics import Metrics
from proxy.request.forbidden_hints import HINTS, Hint
from proxy.request.validation import PREFIX, REQUEST_HEADERS, RESPONSE_HEADERS
from proxy.server.admin.app import Readiness, health_app
from proxy.server.handover import RESTART_ONLY
from proxy.simulator import cli as simulator_command
from proxy.simulator import control_api
from tests.support.paths import ROOT

REFERENCE = {name: f"docs/reference/{name}" for name in generate.BLOCKS}
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", *REFERENCE.values()]

ENVIRONMENT = dict.fromkeys(
    (
        *("LWA_CLIENT_ID", "LWA_CLIENT_SECRET", "ACME_NA_REFRESH_TOKEN", "ACME_EU_REFRESH_TOKEN"),
        "OTHER_FE_REFRESH_TOKEN",
    ),
    "made-up",
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def part(page: str, name: str) -> str:
    """Return a generated part of a reference page."""
    return generated(text_of(REFERENCE[page]), name)


def cells(table: str) -> list[list[str]]:
    """Return the rows of a table, without its head."""
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()[2:]]


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of("README.md"), re.MULTILINE | re.DOTALL)


# The tables.


def test_every_hint_has_a_meaning() -> None:
    assert set(HINTS) == set(get_args(Hint))


@pytest.mark.parametrize(("page", "name"), [(page, name) for page in REFERENCE for name in generate.BLOCKS[page]])
def test_the_tables_of_the_reference_say_what_the_code_does(page: str, name: str) -> None:
    assert part(page, name) == generate.BLOCKS[page][name](), "run `python -m docs.generate`"


def test_the_reference_has_every_setting_error_and_hint() -> None:
    for page, name, listed in (
        ("configuration.md", "settings", {key for key, _, _ in settings()}),
        ("errors.md", "errors", {error.code for error in all_errors()}),
        ("errors.md", "hints", set(get_args(Hint))),
    ):
        assert set(re.findall(r"^\| \[?`([^`]+)`", part(page, name), re.MULTILINE)) == listed


def test_every_setting_has_a_meaning() -> None:
    rows = list(settings())
    assert len(rows) > 40
    assert all(meaning for _, _, meaning in rows)


def test_no_remedy_breaks_the_table_of_errors() -> None:
    assert not [error.code for error in all_errors() if "|" in error.remedy]


def test_every_series_of_the_registry_is_in_the_reference() -> None:
    families = {family.name for family in Metrics().registry.collect() if family.name.startswith("spapi_proxy_")}
    listed = {name.strip("`").removesuffix("_total") for name, *_ in cells(part("metrics.md", "metrics"))}
    assert listed == families


# Files, addresses, headers, variables.


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    text = text_of(document)
    named = re.findall(r"`((?:proxy|tests|config|\.ci)/[\w./-]+)`", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert named or links or document in {"SECURITY.md", "CHANGELOG.md"}
    assert not [name for name in named if not (ROOT / name).exists()]
    assert not [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]


STEPS = ["validate", "authenticate", "route", "admit", "forward", "judge", "record"]


def test_the_life_of_a_request_is_the_same_everywhere() -> None:
    life = text_of("README.md").partition("\n## Life of a request\n")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d)\. \*\*(\w+)\*\*: ", life, re.MULTILINE) == [
        (str(number), step) for number, step in enumerate(STEPS, 1)
    ]
    layout = text_of("CONTRIBUTING.md").partition("\n## Layout\n")[2].partition("\n## ")[0]
    assert re.findall(r"\*\*(\w+)\*\*", layout) == STEPS
    for name in re.findall(r"`(proxy/request/[\w/.]+)`", life + layout):
        assert (ROOT / name).exists(), name


def test_the_layout_of_contributing_names_every_package() -> None:
    layout = text_of("CONTRIBUTING.md").partition("\n## Layout\n")[2].partition("```\n")[2].partition("```")[0]
    path: list[str] = []
    named = set()
    for line in layout.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth:] = [line.split()[0].rstrip("/")]
        named.add("/".join(path))
    proxy = ROOT / "proxy"
    packages = {path.parent.relative_to(ROOT).as_posix() for path in proxy.rglob("__init__.py")}
    modules = {path.relative_to(ROOT).as_posix() for path in proxy.glob("*.py")}
    there = (packages | modules) - {"proxy/__init__.py", "proxy/__main__.py"}
    assert {name for name in named if name.partition("/")[0] == "proxy"} == there
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_operations_page_names_every_health_address() -> None:
    app = health_app(Readiness(), Metrics(), Config)
    routes = {route.resource.canonical for route in app.router.routes() if route.resource}
    assert "/readyz" in routes
    assert not [route for route in routes if f"`{route}`" not in text_of("docs/operating.md")]


def test_the_reference_names_every_header_of_ours_and_no_other() -> None:
    sent, added = cells(part("headers.md", "request headers")), cells(part("headers.md", "response headers"))
    assert {name for name, _ in sent} == {f"`{PREFIX}{name}`" for name in REQUEST_HEADERS} | {"`x-request-id`"}
    assert {name for name, _ in added} == {f"`{name}`" for name in RESPONSE_HEADERS} | {"`Retry-After`"}
    assert all(meaning for _, meaning in (*sent, *added))


def test_the_variables_that_the_reference_names_are_read() -> None:
    named = set(re.findall(r"`(SP_API_PROXY_[A-Z0-9_]+)=", text_of(REFERENCE["configuration.md"])))
    assert len(named) > 2
    tree: dict[str, Any] = {"applications": {"main": {}}, "accounts": {"acme": {}}}
    found, problems = environment.overrides(dict.fromkeys(named, "x"), tree)
    assert not problems
    assert len(found) == len(named)


def test_a_value_means_the_same_by_flag_and_environment_as_the_reference_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("k" * 40)
    (tmp_path / "config.yaml").write_text((ROOT / "config" / "minimal.yaml").read_text())
    before = load_config("config.yaml", ENVIRONMENT).config
    rows = cells(
        "| a value |" + text_of(REFERENCE["configuration.md"]).partition("| a value |")[2].partition("\n\n")[0]
    )
    assert len(rows) > 5
    for _, flag, variable in rows:
        options = main._parser().parse_args(["check", *shlex.split(flag.strip("`"))])
        name, _, value = shlex.split(variable.strip("`"))[0].partition("=")
        by_flag = load_config("config.yaml", ENVIRONMENT, settings_of(options)).config
        assert by_flag == load_config("config.yaml", {**ENVIRONMENT, name: value}).config
        assert by_flag != before or "default_account" in flag


def test_the_keys_that_the_reference_says_need_a_restart_are_those_that_do() -> None:
    below = text_of(REFERENCE["configuration.md"]).partition("## Changing it while the proxy runs")[2]
    line = re.search(r"^- (.*) count from the next start on", below, re.MULTILINE)
    assert line is not None
    assert set(re.findall(r"`([\w.]+)`", line[1])) == {*RESTART_ONLY, "log.format"}
    assert set(RESTART_ONLY) < set(Config.model_fields)


def test_the_names_of_other_libraries_are_all_in_the_reference() -> None:
    known = {*environment._CLIENT_ID, *environment._CLIENT_SECRET, environment._REFRESH_TOKEN, "SP_API_REGION"}
    assert not [name for name in known if f"`{name}`" not in text_of(REFERENCE["configuration.md"])]


# Commands.


def command_lines() -> list[str]:
    text = "\n".join(text_of(name) for name in ("README.md", "CONTRIBUTING.md", "docs/testing.md"))
    inline = re.findall(r"`sp-api-proxy ([a-z][^`\n]*)`", text)
    own_line = re.findall(r"^sp-api-proxy (.+)$", text, re.MULTILINE)
    return sorted({*inline, *own_line} - {"…"})


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_of_the_documents_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "selling-partner-api-models" / "models").mkdir(parents=True)  # a reader has made this checkout
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


def test_the_reference_lists_every_command() -> None:
    groups = main._parser()._subparsers
    assert groups is not None
    commands = {name for action in groups._group_actions for name in action.choices or ()} | {"operations rebuild"}
    text = part("cli.md", "commands")
    assert set(re.findall(r"^### `([\w ]+)`$", text, re.MULTILINE)) == commands
    assert set(re.findall(r"^\| \[`([\w ]+)`\]", text, re.MULTILINE)) == commands


def test_every_flag_of_every_command_says_what_it_is_for() -> None:
    actions = [(parser.prog, action) for parser in (main._parser(), *generate.parsers()) for action in parser._actions]
    assert len(actions) > 60
    assert [
        (prog, action.metavar or action.option_strings)
        for prog, action in actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ] == []


def test_the_reference_has_every_flag_of_every_command() -> None:
    sections = re.split(r"^### `([\w ]+)`$", part("cli.md", "commands"), flags=re.MULTILINE)
    told = dict(zip(sections[1::2], sections[2::2], strict=True))
    shared = part("cli.md", "configuration flags")
    lacking = []
    for parser in generate.parsers():
        name = parser.prog.partition(" ")[2]
        text = told[name] + (shared if "(#configuration-flags): all" in told[name] else "")
        flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
        lacking += [f"{name} {flag}" for flag in flags if not re.search(rf"`{flag}[ `]", text)]
    assert len(told) > 12
    assert lacking == []


def test_the_reference_has_every_exit_code() -> None:
    codes = {int(code) for code, _ in cells(part("cli.md", "exit codes"))}
    assert codes == {common.OK, common.FAILED, common.USAGE, common.INTERRUPTED, 143}


def test_the_simulators_control_addresses_in_the_documents_exist() -> None:
    named = set(re.findall(rf"{control_api.PATH}(/\w+)", text_of("README.md") + text_of("docs/testing.md")))
    assert named
    assert named <= {path for _, path in control_api._ACTIONS}


# The log.


def test_every_event_is_found_with_its_level_and_fields(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        """
def one(self, result):
    text = "gone" if result else "back"
    logs.LOGGER.info("serving", extra=logs.fields(listen=1, **where()))
    LOGGER.log(LEVELS[result], text, extra=fields(reason=2, **({"look_at": 3} if result else {})))
    LOGGER.error("failed", exc_info=result)
    LOGGER.setLevel("INFO")

def where():
    return {"certificate": 1}
"""
    )
    assert events(tmp_path) == [
        Event("back", "varies", ("reason", "look_at")),
        Event("failed", "error", ()),
        Event("gone", "varies", ("reason", "look_at")),
        Event("serving", "info", ("listen", "certificate")),
    ]


def test_no_logging_call_of_the_proxy_is_overlooked() -> None:
    calls = [
        node
        for path in (ROOT / "proxy").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and re.search(r"\bLOGGER\.(debug|info|warning|error|exception|critical|log)$", ast.unparse(node.func))
    ]
    found = events(generate.SOURCE)
    assert len(calls) > 25
    for call in calls:
        texts = [
            node.value for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        of_variable = any(isinstance(argument, ast.Name) for argument in call.args)
        assert of_variable or any(event.message in texts for event in found), ast.unparse(call)
        named = {keyword.arg for node in ast.walk(call) if isinstance(node, ast.Call) for keyword in node.keywords}
        named -= {"extra", "exc_info", None, "strict"}
        assert any(named <= set(event.fields) for event in found), ast.unparse(call)


def test_the_reference_describes_every_field_of_the_log_and_no_other() -> None:
    used = {name for event in events(generate.SOURCE) if event.message != "request" for name in event.fields}
    assert set(generate.EVENT_FIELDS) == used
    assert {name.strip("`") for name, _ in cells(part("log-fields.md", "event fields"))} == used
    shown = {
        name.strip("`") for table in ("request line", "audit line") for name, _ in cells(part("log-fields.md", table))
    }
    assert set(generate.REQUEST_FIELDS) <= shown
    messages = {message for message, _, _ in cells(part("log-fields.md", "events"))}
    assert messages == {event.message for event in events(generate.SOURCE)} - {"request"}


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
