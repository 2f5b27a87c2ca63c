"""Does the rebuild read Amazon's models, whatever their form, and say what changed?"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.amazon.catalog import rebuild
from proxy.amazon.catalog.overrides import BadInput, load_overrides
from proxy.amazon.catalog.swagger import model_of, rows_of_model
from proxy.amazon.catalog.usage_plan_tables import UsagePlan, parse_usage_plan
from proxy.amazon.operations import read_rows, shipped_table
from tests.conftest import MODELS, needs
from tests.support.paths import ROOT

PLAN = "Does it.\n\n**Usage Plan:**\n\n| Rate (requests per second) | Burst |\n| ---- | ---- |\n| 0.5 | 30 |\n\nMore."


class Outcome(NamedTuple):
    """What the command returned and said."""

    code: int
    out: str
    err: str


class Workshop:
    """A folder with models, facts and a table, and the command on them."""

    def __init__(self, folder: Path, capture: Callable[[], Iterable[str]]) -> None:
        self.models = folder / "models"
        self.facts = folder / "overrides.yaml"
        self.table = folder / "table.csv"
        self.output = folder / "output.csv"
        self._capture = capture
        self.models.mkdir()
        self.facts.write_text("operations: {}\n", encoding="utf-8")

    def model(self, file: str, paths: object, **top: object) -> None:
        path = self.models / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"swagger": "2.0", "paths": paths, **top}), encoding="utf-8")

    def run(self, *options: str) -> Outcome:
        where = [str(self.models), "--facts", str(self.facts), "--table", str(self.table)]
        code = rebuild.main([*where, *options])
        return Outcome(code, *self._capture())

    def rows(self) -> dict[str, dict[str, str]]:
        return {
            f"{row['api']}.{row['version']}.{row['operationId']}": row
            for row in read_rows(self.table.read_text(encoding="utf-8"))
        }


@pytest.fixture
def shop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workshop:
    return Workshop(tmp_path, capsys.readouterr)


def operation(name: str | None, description: object = PLAN, **more: object) -> dict[str, Any]:
    named = {"operationId": name} if name else {}
    return {"description": description, "responses": {}, **named, **more}


def orders(**more: object) -> dict[str, Any]:
    return {"/orders/v0/orders": {"get": operation("getOrders", **more)}}


# Against Amazon's own models.


def test_amazons_models_change_nothing_in_the_shipped_table(capsys: pytest.CaptureFixture[str]) -> None:
    needs(MODELS.exists(), "the folder of Amazon's models beside the checkout")
    assert rebuild.main([str(MODELS), "--check"]) == 0
    out, err = capsys.readouterr()
    assert out == "no change: 370 operations\n"
    # Five plans hold the letter n where numbers belong.
    assert err.count("no numbers can be read") == len(err.splitlines()) == 5


def test_from_nothing_amazons_models_give_the_rows_that_are_shipped_and_the_same_bytes_each_time(
    tmp_path: Path,
) -> None:
    needs(MODELS.exists(), "the folder of Amazon's models beside the checkout")
    tables = [tmp_path / "first.csv", tmp_path / "second.csv"]
    assert [rebuild.main([str(MODELS), "--table", str(table)]) for table in tables] == [0, 0]
    first, second = (table.read_bytes() for table in tables)
    assert first == second
    rows = read_rows(first.decode())
    modelled = {(row["api"], row["version"]) for row in rows}
    assert (len(rows), len(modelled)) == (289, 55)
    assert rows == [row for row in read_rows(shipped_table()) if (row["api"], row["version"]) in modelled]


# Amazon's file names, those of models that are not at hand too.
@pytest.mark.parametrize(
    ("file", "path", "name"),
    [
        ("customerFeedback_2024-06-01.json", "/customerFeedback/2024-06-01/x", "customerFeedback.2024-06-01"),
        ("externalFulfillmentShipments_2024-09-11.json", "/e/2024-09-11/x", "externalFulfillmentShipments.2024-09-11"),
        ("merchantFulfillmentV0.json", "/mfn/v0/x", "merchantFulfillment.v0"),
        ("notifications.json", "/notifications/v1/x", "notifications.v1"),
        ("orders_2026-01-01.json", "/orders/2026-01-01/x", "orders.2026-01-01"),
        ("sellerWallet_2024-03-01.json", "/finances/transfers/wallet/2024-03-01/x", "sellerWallet.2024-03-01"),
        ("services.json", "/service/v1/x", "services.v1"),
        ("shipping.json", "/shipping/v1/x", "shipping.v1"),
        ("tracking_2026-01-30.json", "/tracking/2026-01-30/x", "tracking.2026-01-30"),
        ("transfers_2024-06-01.json", "/finances/transfers/2024-06-01/x", "transfers.2024-06-01"),
        ("vendorOrders.json", "/vendor/orders/v1/x", "vendorOrders.v1"),
        ("InvoicesApiModel_2024-06-19.json", "/tax/invoices/2024-06-19/x", "invoices.2024-06-19"),
        ("deliveryShipmentInvoiceV2022-07-01.json", "/delivery/2022-07-01/x", "deliveryShipmentInvoice.2022-07-01"),
        ("replenishment-2022-11-07.json", "/replenishment/2022-11-07/x", "replenishment.2022-11-07"),
        ("sub/folder/ordersV0.json", "/orders/v0/x", "orders.v0"),
        ("shipping2.json", "/shipping/v2/x", "shipping2.v2"),
        ("some thing.json", "/something/x", "something.v1"),
    ],
)
def test_the_name_comes_from_the_file_and_the_version_from_the_paths(file: str, path: str, name: str) -> None:
    model = model_of({"paths": {path: {}}}, file, {})
    assert model is not None
    assert model.title == name


@pytest.mark.parametrize(
    ("tree", "file", "version"),
    [
        ({"info": {"version": "v3"}, "paths": {"/a/v1/x": {}, "/a/v2/y": {}}}, "aV9.json", "v3"),
        ({"info": {"version": "V2022-07-01"}, "paths": {"/a/x": {}}}, "a.json", "2022-07-01"),
        ({"info": {"version": "1.0.0"}, "paths": {"/a/x": {}}}, "a_2024-05-09.json", "2024-05-09"),
        ({"info": {"version": 2}, "paths": {"/a/x": {}}}, "aV7.json", "v7"),
        ({"info": [], "paths": {"/a/x": {}}}, "a.json", "v1"),
    ],
)
def test_where_the_paths_do_not_agree_the_version_is_the_stated_one_or_the_files(
    tree: dict[str, Any], file: str, version: str
) -> None:
    model = model_of(tree, file, {})
    assert model is not None
    assert model.version == version


def test_a_name_the_rule_gets_wrong_is_corrected_by_the_facts(shop: Workshop) -> None:
    shop.facts.write_text("names: {ordersModel: orders}\n", encoding="utf-8")
    shop.model("OrdersModelV0.json", orders())
    assert shop.run().code == 0
    assert list(shop.rows()) == ["orders.v0.getOrders"]


# Usage plans.


@pytest.mark.parametrize(
    ("description", "rate", "burst"),
    [
        (PLAN, "0.5", "30"),
        (PLAN.replace("\n", "\r\n"), "0.5", "30"),
        (PLAN.replace("\n", "\\n"), "0.5", "30"),
        (PLAN.replace("\n", "\\r\\n"), "0.5", "30"),
        ("| Rate (requests per second) | Burst |\n| ---- | ---- |\n| .5 | 1 |", "0.5", "1"),
        ("| Plan type | Rate | Burst |\n|--|--|--|\n|Default| 5 | 10 |\n|Selling partner specific| V | V |", "5", "10"),
        ("| Plan type | Rate | Burst |\n|--|--|--|\n| Special | 9 | 9 |\n| **Default** | 5 | 10 |", "5", "10"),
        ("| | Rate | Burst |\n|--|--|--|\n| | 5 | 10 |", "5", "10"),
        ("| Burst | Rate |\n|--|--|\n| 10 | 5 |", "5", "10"),
        ("| Burst rate | Rate |\n|--|--|\n| 10 | 5 |", "5", "10"),
        ("  |   **Rate** (requests  per second)|Burst|\n  |:--|--:|\n  |  **0.25**  |`7`|", "0.25", "7"),
        ("Rate (requests per second) | Burst\n--- | ---\n2 | 3", "2", "3"),
        ("| Rate (requests per second) | Burst\n| ---- | ----\n| 2 | 3", "2", "3"),
        ("| Rate (requests per second) | Burst |\n| ---- | ---- |\n| 1,000 | 12,500 |", "1000", "12500"),
        ("| Rate (requests per minute) | Burst |\n| ---- | ---- |\n| 1 | 20 |", "0.01667", "20"),
        ("| Rate (requests per minute) | Burst |\n| ---- | ---- |\n| 1,200 | 20 |", "20", "20"),
        ("| Requests per hour | Burst |\n| ---- | ---- |\n| 900 | 20 |", "0.25", "20"),
        ("| Rate (requests/day) | Burst |\n| ---- | ---- |\n| 1 | 1 |", "0.00001157", "1"),
        ("| Rate<br>(requests per second) | Burst |\n| ---- | ---- |\n| 2 | 3 |", "2", "3"),
        ("| Rate (requests per second) | Burst | Remarks |\n|--|--|--|\n| 2 | 3 | per account |", "2", "3"),
        ("<table><tr><th>Rate</th><th>Burst</th></tr><tr><td>2</td><td>3</td></tr></table>", "2", "3"),
        (
            "<TABLE>\n<THEAD><TR>\n<TH>Rate</TH>\n<TH>Burst</TH>\n</TR></THEAD>\n<TR>\n<TD>\n2\n</TD>\n<TD>3</TD></TR>",
            "2",
            "3",
        ),
        ('<table><tr><th class="a">Rate</th>\n<th>Burst</th></tr><tr><td><b>2</b></td><td>&nbsp;3</td></tr>', "2", "3"),
        ("| Code | Meaning |\n|--|--|\n| 1 | one |\n\n" + PLAN, "0.5", "30"),
        (PLAN + "\n\n| Rate | Burst |\n|--|--|\n| 9 | 9 |", "0.5", "30"),
        (PLAN + "\n\n| Plan | Rate | Burst |\n|--|--|--|\n| Default | 9 | 9 |", "0.5", "30"),
        (PLAN + "\n\n| Default | 7 |\n", "0.5", "30"),
        ("| Rate | Burst |\n|--|--|\n| 2 | 3 |\n\n| Plan | Rate | Burst |\n|--|--|--|\n| Default | 9 | 9 |", "2", "3"),
        ("| Rate | Burst |\n|--|--|\n| n | n |\n\nor\n\n| Rate | Burst |\n|--|--|\n| 9 | 9 |", "9", "9"),
    ],
)
def test_a_usage_plan_is_read_in_any_of_these_forms(description: str, rate: str, burst: str) -> None:
    assert parse_usage_plan(description) == UsagePlan(rate, burst)


@pytest.mark.parametrize(
    "row",
    ["| n | n |", "| 5 |", "", "| Variable | Variable |", "| 0 | 5 |", "| 5 | 0 |", "| 5 | 2.5 |", "| 0,5 | 1 |"],
)
def test_a_plan_without_usable_numbers_is_none_and_is_warned_about(shop: Workshop, row: str) -> None:
    shop.model("ordersV0.json", orders(description=f"| Rate | Burst |\n|--|--|\n{row}"))
    said = shop.run()
    getter = shop.rows()["orders.v0.getOrders"]
    assert (said.code, getter["rate"], getter["burst"]) == (0, "", "")
    assert said.err == "warning: orders.v0.getOrders: no numbers can be read from its usage plan\n"


@pytest.mark.parametrize(
    "text", ["", "Returns orders.", "rate | burst of speech", "| Code | Burst |\n|--|--|\n| 1 | 2 |"]
)
def test_a_description_without_a_plan_has_none(text: str) -> None:
    plan = parse_usage_plan(text)
    assert plan is None or not plan.stated


@given(st.text(alphabet="|-\n\\nRateBurst 0.5,<>/trdh", max_size=80))
def test_no_description_whatever_makes_reading_the_plan_fail(text: str) -> None:
    for plan in (parse_usage_plan(text), parse_usage_plan(f"| Rate | Burst |\n{text}")):
        if plan is not None and plan.stated:
            assert float(plan.rate) > 0
            assert int(plan.burst) >= 1


def test_a_plan_at_the_path_counts_for_operations_that_state_none(shop: Workshop) -> None:
    own = PLAN.replace("0.5", "7")
    shop.model("aV0.json", {"/a/v0/x": {"description": PLAN, "get": operation("x", ""), "put": operation("y", own)}})
    assert shop.run().code == 0
    assert {name: row["rate"] for name, row in shop.rows().items()} == {"a.v0.x": "0.5", "a.v0.y": "7"}


# What else a model says.


@pytest.mark.parametrize(
    ("top", "path"),
    [
        ({}, "/a/v0/x"),
        ({"basePath": "/"}, "/a/v0/x"),
        ({"basePath": "/base/"}, "/base/a/v0/x"),
        ({"basePath": "/a/v0"}, "/a/v0/x"),
        ({"basePath": "/a/v0/x"}, "/a/v0/x"),
        ({"basePath": "/a/v"}, "/a/v/a/v0/x"),
        ({"basePath": None}, "/a/v0/x"),
        ({"servers": [{"url": "https://sellingpartnerapi-na.amazon.com"}]}, "/a/v0/x"),
        ({"openapi": "3.0.1", "servers": [{"url": "https://sellingpartnerapi-na.amazon.com/base"}]}, "/base/a/v0/x"),
        ({"servers": [{"url": "https://[bad"}, "bad"]}, "/a/v0/x"),
        ({"servers": "bad"}, "/a/v0/x"),
    ],
)
def test_the_base_path_stands_before_paths_that_lack_it(shop: Workshop, top: dict[str, Any], path: str) -> None:
    shop.model("aV0.json", {"/a/v0/x": {"get": operation("x")}}, **top)
    assert shop.run().code == 0
    assert shop.rows()["a.v0.x"]["path"] == path


def test_where_a_model_tells_of_the_sandbox(shop: Workshop) -> None:
    static: dict[str, Any] = {"x-amzn-api-sandbox": {"static": []}}
    dynamic: dict[str, Any] = {"x-amzn-api-sandbox": {"dynamic": {}}}
    shop.model(
        "aV0.json",
        {
            "/a/v0/1": {"get": operation("inResponse", responses={"200": {}, "400": static})},
            "/a/v0/2": {"get": operation("atOperation", **dynamic)},
            "/a/v0/3": {"get": operation("atPath", responses={"200": static}), **dynamic},
            "/a/v0/4": {"get": operation("none", **{"x-amzn-api-sandbox": "?"}), "x-amzn-api-sandbox-only": True},
        },
    )
    shop.model("bV0.json", {"/b/v0/1": {"get": operation("x")}}, host="sandbox.sellingpartnerapi-na.amazon.com")
    assert shop.run().code == 0
    assert {name: (row["sandbox"], row["sandbox_only"]) for name, row in shop.rows().items()} == {
        "a.v0.inResponse": ("static", "no"),
        "a.v0.atOperation": ("dynamic", "no"),
        "a.v0.atPath": ("dynamic", "no"),
        "a.v0.none": ("", "yes"),
        "b.v0.x": ("", "yes"),
    }


def test_deprecated_operations_are_told_from_others(shop: Workshop) -> None:
    shop.model("aV0.json", {"/a/v0/x": {"GET": operation("old", deprecated=True), "put": operation("new")}})
    shop.run()
    assert {name: row["deprecated"] for name, row in shop.rows().items()} == {"a.v0.old": "yes", "a.v0.new": "no"}


def test_an_operation_without_a_name_gets_one_from_its_path(shop: Workshop) -> None:
    shop.model("aV0.json", {"/a/v0/things/{thingId}/parts": {"get": operation(None), "put": operation(" ")}})
    said = shop.run()
    assert said.code == 0
    assert list(shop.rows()) == ["a.v0.getThingsThingIdParts", "a.v0.putThingsThingIdParts"]
    assert "GET /a/v0/things/{thingId}/parts has no operationId, called getThingsThingIdParts" in said.err


# Malformed input.


@pytest.mark.parametrize(
    "content",
    [b"", b"no json", b"\xff\xfe", b"[]", b"{}", b'"paths"', b'{"paths": []}', b'{"paths": null}', b"[" * 100_000],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_is_no_model_is_named_and_skipped(shop: Workshop, content: bytes) -> None:
    shop.model("ordersV0.json", orders())
    (shop.models / "deep").mkdir()
    (shop.models / "deep" / "bad.json").write_bytes(content)
    said = shop.run()
    assert said.code == 1
    assert said.err.startswith("warning: skipped deep/bad.json: no")
    assert list(shop.rows()) == ["orders.v0.getOrders"], "the other models are read all the same"


def test_parts_of_a_model_that_are_no_operations_are_named_and_the_rest_is_read(shop: Workshop) -> None:
    shop.model("aV0.json", {"x-note": {"get": {}}, "/a/v0/1": [], "/a/v0/2": {"get": "?", "put": operation("x")}})
    said = shop.run()
    assert said.err == "warning: aV0.json: /a/v0/1 is no path item\nwarning: aV0.json: get of /a/v0/2 is no operation\n"
    assert (said.code, list(shop.rows())) == (0, ["a.v0.x"])


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(PLAN),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
operation_keys = ["operationId", "description", "deprecated", "responses", "x-amzn-api-sandbox"]
some_operations = st.dictionaries(st.sampled_from(operation_keys), anything) | anything
some_items = st.dictionaries(st.sampled_from(["get", "POST", "parameters", "description"]), some_operations) | anything
some_paths = st.dictionaries(st.sampled_from(["/", "", "/a/v0/x", "b", "//"]), some_items) | anything
top_keys = ["info", "host", "basePath", "servers"]


@given(st.dictionaries(st.sampled_from(top_keys), anything), some_paths)
def test_no_tree_whatever_makes_reading_a_model_fail(top: dict[str, Any], paths: object) -> None:
    model = model_of({**top, "paths": paths}, "a.json", {})
    if model is not None:
        for row in rows_of_model(model, []):
            assert all(isinstance(value, str) for value in row.values())
            assert row["path"].startswith("/")
            assert row["operationId"]


def test_a_folder_without_models_changes_nothing_even_when_pruned(shop: Workshop) -> None:
    shop.model("ordersV0.json", orders())
    shop.run()
    (shop.models / "ordersV0.json").write_text("?", encoding="utf-8")
    before = shop.table.read_bytes()
    said = shop.run("--prune")
    assert (said.code, shop.table.read_bytes()) == (1, before)
    assert "skipped ordersV0.json" in said.err
    assert "no operation could be read" in said.err
    assert rebuild.main([str(shop.models / "missing"), "--table", str(shop.table)]) == 1


@pytest.mark.parametrize(
    "content",
    ["api,version\norders,v0\n", "just\ntext\n", 'api,"\0', "x" * 200_000],
    ids=lambda content: repr(content[:12]),
)
def test_a_table_that_is_none_is_refused_and_left_alone(shop: Workshop, content: str) -> None:
    shop.model("ordersV0.json", orders())
    shop.table.write_text(content, encoding="utf-8")
    said = shop.run()
    assert said.code == 1
    assert said.err.startswith(f"error: {shop.table}: no")
    assert shop.table.read_text(encoding="utf-8") == content


def test_a_table_that_cannot_be_read_is_an_error_that_names_it(shop: Workshop) -> None:
    shop.model("ordersV0.json", orders())
    shop.table.mkdir()
    said = shop.run()
    assert said.code == 1
    assert said.err.startswith(f"error: {shop.table}: not readable")


def test_a_table_that_cannot_be_written_is_an_error_that_names_it(shop: Workshop) -> None:
    shop.model("ordersV0.json", orders())
    said = shop.run("--output", str(shop.output / "deeper.csv"))
    assert said.code == 1
    assert f"error: {shop.output / 'deeper.csv'}: cannot be written" in said.err


# Facts.


def test_facts_are_added_to_what_the_models_say(shop: Workshop) -> None:
    shop.facts.write_text(
        """
        operations:
          orders v0:
            getOrders: {restricted: certain, data_elements: [buyerInfo, shippingAddress], removed: 2027-03-27}
            getOrder: {restricted: likely, sdk_plan: [0.5, 30], app_rate: 100, app_burst: 7}
            getDocument: {restricted: certain, generic_path: false, scope: a-scope}
        """,
        encoding="utf-8",
    )
    paths = orders()
    paths["/orders/v0/orders/{orderId}"] = {"get": operation("getOrder", "")}
    paths["/orders/v0/documents/{documentId}"] = {"get": operation("getDocument")}
    shop.model("ordersV0.json", paths)
    assert shop.run().err == ""
    rows = shop.rows()
    columns = ["restricted", "restricted_certainty", "rdt_generic_path_ok", "data_elements", "grantless_scope"]
    columns += ["deprecated", "removal_date", "rate", "fallback_rate", "fallback_burst", "app_rate", "app_burst"]
    assert {name: [rows[f"orders.v0.{name}"][column] for column in columns] for name in ("getOrders", "getOrder")} == {
        "getOrders": [
            *("yes", "certain", "", "buyerInfo;shippingAddress", "", "yes", "2027-03-27", "0.5", "", "", "", "")
        ],
        "getOrder": ["yes", "likely", "yes", "", "", "no", "", "", "0.5", "30", "100", "7"],
    }
    document = rows["orders.v0.getDocument"]
    assert (document["rdt_generic_path_ok"], document["grantless_scope"]) == ("no", "a-scope")


def test_facts_are_applied_again_to_apis_without_a_model(shop: Workshop) -> None:
    shop.model("ordersV0.json", orders())
    shop.run()
    (shop.models / "ordersV0.json").unlink()
    shop.model("aV0.json", {"/a/v0/x": {"get": operation("x")}})
    shop.facts.write_text("operations: {orders v0: {getOrders: {restricted: certain}}}\n", encoding="utf-8")
    assert "~ orders.v0.getOrders restricted no -> yes\n" in shop.run().out


def test_facts_about_what_no_longer_exists_are_reported(shop: Workshop) -> None:
    shop.facts.write_text(
        "names: {a: gone}\noperations: {orders v0: {getOrderz: {app_rate: 5}}, orders v9: {x: {app_rate: 5}}}\n",
        encoding="utf-8",
    )
    shop.model("ordersV0.json", orders())
    assert shop.run().err.splitlines() == [
        "warning: the facts name the API orders v9, which the table does not have",
        "warning: the facts name orders.v0.getOrderz, which does not exist",
        "warning: the facts call an API gone, which the table does not have",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("operations: {a v0: {x: {restrcted: certain}}}", "a v0: x: restrcted is none of restricted, "),
        ("operations: {a v0: {x: {restricted: yes}}}", "restricted must be certain, likely or disputed, not True"),
        ("operations: {a v0: {x: {generic_path: no way}}}", "generic_path must be true or false"),
        ("operations: {a v0: {x: {data_elements: buyerInfo}}}", "data_elements must be a list of names"),
        ("operations: {a v0: {x: {scope: [a]}}}", "scope must be the name of a scope"),
        ("operations: {a v0: {x: {removed: soon}}}", "removed must be YYYY-MM-DD, not 'soon'"),
        ("operations: {a v0: {x: {sdk_plan: [0, 5]}}}", "sdk_plan must be [calls per second, burst]"),
        ("operations: {a v0: {x: {sdk_plan: 5}}}", "sdk_plan must be [calls per second, burst]"),
        ("operations: {a v0: {x: {app_rate: fast}}}", "app_rate must be calls per second"),
        ("operations: {a v0: {x: {app_burst: 1.5}}}", "app_burst must be a number of calls"),
        ("operations: {a v0: [x]}", "a v0 is no mapping"),
        ("operations: [a]", "operations is no mapping"),
        ("names: a", "names is no mapping"),
        ("opertions: {}", "opertions is neither names nor operations"),
        ("[]", "the file is no mapping"),
        ("a: [", "not readable as YAML"),
        (None, "not readable as YAML"),
    ],
)
def test_a_mistake_in_the_facts_is_named_and_nothing_is_written(
    shop: Workshop, text: str | None, complaint: str
) -> None:
    shop.model("ordersV0.json", orders())
    if text is None:
        shop.facts.unlink()
    else:
        shop.facts.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput):
        load_overrides(shop.facts)
    said = shop.run()
    assert said.code == 1
    assert said.err.startswith(f"error: {shop.facts}: ")
    assert complaint in said.err
    assert not shop.table.exists()


# What changed.


def test_new_gone_and_different_operations_have_a_line_each(shop: Workshop) -> None:
    shop.model("ordersV0.json", {**orders(), "/orders/v0/old": {"get": operation("getOld")}})
    first = shop.run()
    assert first.out == (
        "+ orders.v0.getOld GET /orders/v0/old\n"
        "+ orders.v0.getOrders GET /orders/v0/orders\n"
        "0 -> 2 operations: 2 new, 0 gone, 0 changes\n"
    )
    news = {"/orders/v0/new": {"post": operation("createNew")}}
    shop.model("ordersV0.json", {**orders(description=PLAN.replace("0.5", "0.02")), **news})
    second = shop.run()
    assert second.out == (
        "+ orders.v0.createNew POST /orders/v0/new\n"
        "- orders.v0.getOld GET /orders/v0/old\n"
        "~ orders.v0.getOrders rate 0.5 -> 0.02\n"
        "2 -> 2 operations: 1 new, 1 gone, 1 changes\n"
    )
    assert shop.run().out == "no change: 2 operations\n"


def test_an_api_without_a_model_keeps_its_rows_unless_pruned(shop: Workshop) -> None:
    shop.model("ordersV0.json", orders())
    shop.run()
    (shop.models / "ordersV0.json").unlink()
    shop.model("orders_2026-01-01.json", {"/orders/2026-01-01/orders": {"get": operation("searchOrders")}})
    shop.run()
    assert list(shop.rows()) == ["orders.2026-01-01.searchOrders", "orders.v0.getOrders"]
    assert "- orders.v0.getOrders GET /orders/v0/orders" in shop.run("--prune").out
    assert list(shop.rows()) == ["orders.2026-01-01.searchOrders"]


def test_pruning_drops_nothing_while_a_model_cannot_be_read(shop: Workshop) -> None:
    shop.model("ordersV0.json", orders())
    shop.run()
    (shop.models / "ordersV0.json").write_text("{", encoding="utf-8")
    shop.model("aV0.json", {"/a/v0/x": {"get": operation("x")}})
    said = shop.run("--prune")
    assert (said.code, list(shop.rows())) == (1, ["a.v0.x", "orders.v0.getOrders"])
    assert "--prune drops nothing" in said.err


def test_check_writes_nothing_and_fails_where_the_table_would_change(shop: Workshop) -> None:
    shop.model("ordersV0.json", orders())
    assert (shop.run("--check").code, shop.table.exists()) == (1, False)
    assert shop.run().code == 0
    assert shop.run("--check") == (0, "no change: 1 operations\n", "")
    shop.table.write_text(shop.table.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert shop.run("--check") == (1, "only order or form differ: 1 operations\n", "")


def test_the_output_may_go_elsewhere(shop: Workshop) -> None:
    shop.model("ordersV0.json", orders())
    assert shop.run("--output", str(shop.output)).code == 0
    assert shop.output.exists()
    assert not shop.table.exists()


def test_the_table_does_not_depend_on_the_order_inside_a_model(shop: Workshop) -> None:
    paths = {**orders(), "/orders/v0/a": {"put": operation("p"), "get": operation("g")}}
    shop.model("ordersV0.json", paths)
    shop.run()
    before = shop.table.read_bytes()
    assert b"\r" not in before
    shop.model("ordersV0.json", dict(reversed(paths.items())))
    assert (shop.run().code, shop.table.read_bytes()) == (0, before)


def test_of_two_models_with_one_operation_the_first_counts_and_a_warning_says_so(shop: Workshop) -> None:
    shop.model("1/ordersV0.json", orders())
    shop.model("2/ordersV0.json", orders(description=PLAN.replace("0.5", "9")))
    said = shop.run()
    assert shop.rows()["orders.v0.getOrders"]["rate"] == "0.5"
    assert "orders.v0.getOrders GET /orders/v0/orders is in two models" in said.err


def test_two_apis_with_one_path_are_warned_about(shop: Workshop) -> None:
    shop.model("ordersV0.json", orders())
    shop.model("copyV0.json", orders())
    said = shop.run()
    assert "orders.v0.getOrders has the method and path of copy.v0.getOrders" in said.err
    assert len(shop.rows()) == 2


def test_the_command_runs_as_a_module_and_explains_itself() -> None:
    command = [sys.executable, "-m", "proxy.amazon.catalog.rebuild", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    for word in ("MODELS_DIR", "--facts", "--table", "--output", "--check", "--prune", "Exit code 1"):
        assert word in done.stdout
