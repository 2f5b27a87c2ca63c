"""The series: names and types as Prometheus recommends, and label values that no client can multiply."""

import shutil
import subprocess
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from proxy import __version__
from proxy.observability.collectors import CallbackCollector
from proxy.observability.metrics import Metrics
from tests.conftest import needs

# Labels whose values are bounded: names of the configuration and the operation table, and words of the proxy's own.
LABELS = {"caller", "listener", "log",
          "account", "region", "operation", "method", "code", "token", "source", "fault", "reason", "kind", "result",
          "version", "python", "element", "hint", "application", "environment",
    # Of exceptions: names and places of code, 64 of them at most.
    "type",
    "place",
}  # fmt: skip


def series(metrics: Metrics) -> list[Any]:
    return [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]


def callback_collectors(metrics: Metrics) -> list[CallbackCollector]:
    return [one for one in metrics.registry._collector_to_names if isinstance(one, CallbackCollector)]


def filled(*, account_on_histograms: bool = False) -> Metrics:
    """Return metrics with a sample in every series."""
    metrics = Metrics(account_on_histograms=account_on_histograms)
    for one in series(metrics):
        child = one.labels(*("x" for _ in one._labelnames)) if one._labelnames else one
        if hasattr(child, "observe"):
            child.observe(0.5)
        else:
            child.inc()
    found = metrics.series_of(*"x" * 7)
    found.requests += 1
    found.traffic.sent += 1
    found.traffic.received += 1
    for durations in (found.duration, found.upstream_duration, metrics.limit_wait, metrics.token_wait):
        durations.observe(0.5)
    return metrics


@pytest.mark.parametrize("account_on_histograms", [False, True])
def test_promtool_accepts_the_series(account_on_histograms: bool) -> None:
    promtool = shutil.which("promtool")
    needs(promtool is not None, "promtool (Debian's package prometheus)")
    assert promtool is not None
    text = generate_latest(filled(account_on_histograms=account_on_histograms).registry)
    run = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False, timeout=30)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_every_series_has_the_prefix_or_is_of_the_process() -> None:
    families = list(text_string_to_metric_families(generate_latest(filled().registry).decode()))
    others = [f.name for f in families if not f.name.startswith(("spapi_proxy_", "process_", "python_"))]
    assert others == []
    assert (
        sum(family.name.startswith("spapi_proxy_") for family in families)
        == len([*series(Metrics()), *callback_collectors(Metrics())]) + 1
    )


def test_every_help_text_is_a_sentence() -> None:
    for family in filled().registry.collect():
        if family.name.startswith("spapi_proxy_"):
            assert family.documentation.endswith("."), family.name


def test_names_carry_their_unit_and_counters_end_in_total() -> None:
    for family in filled().registry.collect():
        if not family.name.startswith("spapi_proxy_"):
            continue
        if family.type == "histogram":
            assert family.name.endswith("_seconds"), family.name
        samples = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert samples == {f"{family.name}_total"}
        assert not any(name.endswith("_created") for name in samples)


def test_the_values_of_every_label_are_bounded() -> None:
    for one in series(Metrics(account_on_histograms=True)):
        assert set(one._labelnames) <= LABELS, one._name
    for collector in callback_collectors(Metrics(account_on_histograms=True)):
        assert set(collector.labels) <= LABELS, collector.name


@pytest.mark.parametrize(("wanted", "expected"), [(False, []), (True, ["request_duration", "upstream_duration"])])
def test_histograms_have_the_account_only_if_configured(wanted: bool, expected: list[str]) -> None:
    metrics = Metrics(account_on_histograms=wanted)
    found = [one.name for one in callback_collectors(metrics) if one.kind == "histogram" and "account" in one.labels]
    assert not [one for one in series(metrics) if one._type == "histogram" and "account" in one._labelnames]
    assert found == [f"spapi_proxy_{name}_seconds" for name in expected]


@pytest.mark.parametrize("account_on_histograms", [False, True])
def test_a_finished_request_counts_in_all_of_its_series(account_on_histograms: bool) -> None:
    metrics = Metrics(account_on_histograms=account_on_histograms)
    labels = ("acme", "eu", "orders.v0.getOrders", "GET", "200", "lwa", "amazon")
    found = metrics.series_of(*labels)
    assert metrics.series_of(*labels) is found
    assert metrics.series_of(*labels[:4], "429", *labels[5:]) is not found
    found.requests += 1
    found.duration.observe(0.1)
    found.upstream_duration.observe(0.1)
    found.traffic.sent += 10
    found.traffic.received += 20
    value = metrics.registry.get_sample_value
    where = {"account": "acme", "region": "eu", "operation": "orders.v0.getOrders"}
    request = {**where, "method": "GET", "code": "200", "token": "lwa", "source": "amazon"}
    by_operation = where if account_on_histograms else {k: v for k, v in where.items() if k != "account"}
    assert value("spapi_proxy_requests_total", request) == 1
    assert value("spapi_proxy_request_duration_seconds_count", by_operation) == 1
    assert value("spapi_proxy_upstream_duration_seconds_count", by_operation) == 1
    assert value("spapi_proxy_request_body_bytes_total", where) == 10
    assert value("spapi_proxy_response_body_bytes_total", where) == 20


def test_the_version_is_a_series_with_the_value_1() -> None:
    (info,) = [f for f in Metrics().registry.collect() if f.name == "spapi_proxy_build_info"]
    (sample,) = info.samples
    assert (sample.labels["version"], sample.value) == (__version__, 1)


def test_two_proxies_in_one_process_count_separately() -> None:
    one, other = Metrics(), Metrics()
    one.truncated.inc()
    assert one.registry.get_sample_value("spapi_proxy_answers_cut_off_total") == 1
    assert other.registry.get_sample_value("spapi_proxy_answers_cut_off_total") == 0


def test_the_series_can_be_parsed_as_openmetrics() -> None:
    text = generate_openmetrics(filled().registry).decode()  # type: ignore[no-untyped-call]  # not annotated there
    families = parse_openmetrics(text)  # type: ignore[no-untyped-call]  # not annotated there
    assert text.endswith("# EOF\n")
    assert {family.name for family in families} >= {"spapi_proxy_requests", "spapi_proxy_limit_wait_seconds"}


def test_the_buckets_range_from_a_rejection_to_a_slow_report() -> None:
    metrics = filled()
    waits = next(f for f in metrics.registry.collect() if f.name == "spapi_proxy_limit_wait_seconds")
    bounds = [s.labels["le"] for s in waits.samples if s.name.endswith("_bucket")]
    assert (bounds[0], bounds[-2:]) == ("0.001", ["60.0", "+Inf"])
