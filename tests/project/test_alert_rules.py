"""Prometheus' rules and Grafana's dashboard: they ask for what there is, and alerts come when they should.

`python -m tests.project.test_alert_rules` writes docs/alerts.md anew from the rules.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.conftest import needs
from tests.support.paths import ROOT
from tests.support.promql import asked_for, exported, grouped, known, parsed

PROMETHEUS = ROOT / "config" / "prometheus"
DASHBOARD = ROOT / "config" / "grafana" / "dashboards" / "sp-api-proxy.json"
PROVISIONING = ROOT / "config" / "grafana" / "provisioning"
ALERTS_PAGE = ROOT / "docs" / "alerts.md"


def promtool(*arguments: str) -> tuple[int, str]:
    """Run promtool; return its exit code and what it said."""
    program = shutil.which("promtool")
    needs(program is not None, "promtool (Debian's package prometheus)")
    assert program is not None
    run = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)
    return run.returncode, run.stdout + run.stderr


def rules() -> list[dict[str, Any]]:
    """Return all rules, those that record first."""
    files = [PROMETHEUS / "rules" / name for name in ("recording.yml", "alerts.yml")]
    assert sorted(files) == sorted((PROMETHEUS / "rules").iterdir())
    groups = [group for path in files for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


RECORDED = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


@cache
def all_known() -> dict[str, set[str]]:
    """Return the labels of every series that may be asked for."""
    return known(RECORDED)


def cases() -> list[dict[str, Any]]:
    """Return every case of promtool's."""
    files = sorted((PROMETHEUS / "tests").glob("*.yml"))
    return [case for path in files for case in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Yield title and expression of every query of the dashboard, with its variables as they are for All."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], filled_in(target["expr"])


def filled_in(text: str) -> str:
    """Return an expression as Grafana sends it when All is chosen everywhere."""
    return re.sub(r"\$(?:job|instance|account|operation)\b", ".*", text.replace("$__rate_interval", "1m"))


def expressions() -> list[tuple[str, str]]:
    """Return every expression there is, and where it stands."""
    of_rules = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    return [*of_rules, *queries()]


# Rules.


def test_promtool_takes_the_configuration_and_the_rules() -> None:
    code, said = promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert (code, "2 rule files found" in said) == (0, True), said
    code, said = promtool("check", "rules", *map(str, sorted((PROMETHEUS / "rules").iterdir())))
    assert code == 0, said


@pytest.mark.parametrize("path", sorted((PROMETHEUS / "tests").iterdir()), ids=lambda path: path.stem)
def test_alerts_fire_when_they_should(path: Path) -> None:
    code, said = promtool("test", "rules", str(path))
    assert code == 0, said


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_has_a_case_where_it_fires_and_one_where_it_does_not(name: str) -> None:
    own = [case for case in cases() if case["name"].startswith(f"{name} ")]
    fires = [case for case in own if case["name"].startswith(f"{name} fires")]
    quiet = [case for case in own if case["name"].startswith(f"{name} does not fire")]
    assert fires
    assert quiet
    assert all(f'alertname="{name}"' in json.dumps(case).replace("\\", "") for case in fires)
    assert not any(f'alertname="{name}"' in json.dumps(case).replace("\\", "") for case in quiet)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert alert["annotations"]["summary"].endswith(".")
    assert len(alert["annotations"]["description"]) > 100
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in {heading.lower() for heading in headings}


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_speaks_only_of_labels_that_it_has(name: str) -> None:
    texts = " ".join(ALERTS[name]["annotations"].values())
    spoken_of = set(re.findall(r"\$labels\.(\w+)", texts))
    checks = [check for case in cases() for check in case["promql_expr_test"]]
    fired = [sample["labels"] for check in checks for sample in check["exp_samples"]]
    has = [set(re.findall(r'(\w+)="', labels)) for labels in fired if f'alertname="{name}"' in labels]
    assert has
    assert all(spoken_of <= labels for labels in has)


def test_the_page_of_alerts_says_what_the_rules_say() -> None:
    assert ALERTS_PAGE.read_text(encoding="utf-8") == alerts_page(), "run `python -m tests.project.test_alert_rules`"


# Rules and dashboard.


@pytest.mark.parametrize(("where", "text"), expressions())
def test_what_is_asked_for_exists(where: str, text: str) -> None:
    series = all_known()
    for asked in asked_for(text):
        assert asked.name in series, f"{where}: there is no {asked.name}"
        assert asked.labels <= series[asked.name], f"{where}: {asked.name} has no {asked.labels - series[asked.name]}"
    for labels, names in grouped(text):
        has = set().union(*(series[name] for name in names))
        assert labels <= has, f"{where}: none of {names} has {labels - has}"


def test_what_is_recorded_is_asked_for() -> None:
    asked = {one.name for _, text in expressions() for one in asked_for(text)}
    p50 = {name for name in RECORDED if name.endswith("p50_5m")}  # for people's own panels, beside the p99
    assert RECORDED.keys() - p50 <= asked


def test_promtool_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    made = [{"record": f"dashboard:{number}", "expr": text} for number, (_, text) in enumerate(queries())]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": made}]}), encoding="utf-8")
    code, said = promtool("check", "rules", str(path))
    assert (code, f"{len(made)} rules found" in said) == (0, True), said
    assert len(made) > 50


def test_every_series_of_the_proxy_is_on_the_dashboard() -> None:
    asked = {one.name for _, text in expressions() for one in asked_for(text)}
    ours = {name for name in exported() if name.startswith("spapi_proxy_")}
    parts = {name for name in ours if name.endswith(("_sum", "_count")) and f"{name.rpartition('_')[0]}_bucket" in ours}
    elsewhere = {"spapi_proxy_client_secret_expiry_timestamp_seconds"}  # its age is shown
    assert ours - parts - elsewhere <= asked


# The dashboard.


def test_grafanas_own_model_knows_all_that_the_dashboard_says() -> None:
    register_default_plugins()
    given = dashboard()
    understood = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(given)))
    assert list(_lost(given, understood)) == []


def _lost(given: Any, understood: Any, path: str = "") -> Iterator[str]:
    """Yield the place of whatever is not in `understood` as it is in `given`."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for key, value in given.items():
            yield from _lost(value, understood.get(key), f"{path}.{key}") if key in understood else (f"{path}.{key}",)
    elif isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        for index, (one, other) in enumerate(zip(given, understood, strict=True)):
            yield from _lost(one, other, f"{path}[{index}]")
    elif given != understood:
        yield path


def test_panels_have_their_own_place_and_say_what_they_show() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_the_dashboard_uses_the_variables_that_it_has() -> None:
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    used = {name for _, text in raw_queries() for name in re.findall(r"\$(\w+)", text)} - {"__rate_interval"}
    assert used | {"datasource"} == set(variables)
    assert {"instance", "account", "operation"} <= used
    for panel in dashboard()["panels"]:
        for one in (panel, *panel.get("targets", ())) if panel["type"] != "row" else ():
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for name in variables.keys() - {"datasource"}:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variables[name]["query"]["query"])
        assert match
        (asked,) = asked_for(filled_in(match[1]))
        assert {*asked.labels, match[2]} <= all_known()[asked.name]


def raw_queries() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    (source,) = _yaml(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    first = dashboard()["templating"]["list"][0]
    assert (first["type"], first["current"]["value"]) == ("datasource", source["uid"])
    assert source["jsonData"]["timeInterval"] == _yaml(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    (provider,) = _yaml(PROVISIONING / "dashboards" / "sp-api-proxy.yaml")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_a_wrong_name_or_label_would_be_found() -> None:
    with pytest.raises(AssertionError, match="there is no spapi_proxy_request_total"):
        test_what_is_asked_for_exists("x", "sum(rate(spapi_proxy_request_total[5m]))")
    with pytest.raises(AssertionError, match="has no"):
        test_what_is_asked_for_exists("x", 'spapi_proxy_errors_total{account="acme"}')
    with pytest.raises(AssertionError, match="none of"):
        test_what_is_asked_for_exists("x", "sum by (account) (rate(spapi_proxy_errors_total[5m]))")
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        parsed("sum(")


# The page of alerts.

_BEGINNING = """# Prometheus alerts

This page lists the alerts in [config/prometheus/rules/alerts.yml](../config/prometheus/rules/alerts.yml), each with its
remedy and its expression. `python -m tests.project.test_alert_rules` generates it from the rules.
`critical`: calls fail now or certainly will; `warning`: look at it today. The thresholds are a starting point: adjust
them to your apps.

The dashboard ([config/grafana/dashboards/sp-api-proxy.json](../config/grafana/dashboards/sp-api-proxy.json)) shows the
data behind each alert.
"""


def alerts_page() -> str:
    """Return docs/alerts.md as the rules have it."""
    rows = [f"| [{name}](#{name.lower()}) | {rule['labels']['severity']} | {_plain(rule['annotations']['summary'])} |"
            for name, rule in ALERTS.items()]  # fmt: skip
    contents = "\n".join(["| alert | severity | summary |", "| --- | --- | --- |", *rows])
    return f"{_BEGINNING}\n{contents}\n" + "".join(_section(name, rule) for name, rule in ALERTS.items())


def _section(name: str, rule: dict[str, Any]) -> str:
    lasting = f", for {rule['for']}" if "for" in rule else ""
    expression = rule["expr"].strip()
    return (
        f"\n## {name}\n\n{rule['labels']['severity']}{lasting}. {_plain(rule['annotations']['summary'])}\n\n"
        f"{_plain(rule['annotations']['description'])}\n\n```promql\n{expression}\n```\n"
    )


def _plain(text: str) -> str:
    """Return a text of an alert with capitals where its labels and its value will stand."""
    text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: match[1].upper(), text)
    return re.sub(r"\{\{ \$value( \| \w+)? \}\}", "N", text)


if __name__ == "__main__":
    ALERTS_PAGE.write_text(alerts_page(), encoding="utf-8")
