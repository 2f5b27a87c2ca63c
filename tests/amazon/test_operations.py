"""Is a request matched to the right operation, and does the shipped table say what Amazon publishes?"""

import csv
import dataclasses
import gc
import os
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.amazon.operations import COLUMNS, GREEDY, Operation, OperationTable, load_table, read_rows, shipped_table
from tests.conftest import MODELS, needs
from tests.support.paths import ROOT

TABLE = load_table()
BY_NAME = {operation.name: operation for operation in TABLE}
REFERENCE = MODELS.parent / "operations.csv"

UPLOADS = "/uploads/2020-11-01/uploadDestinations"


def table_of(*methods_and_templates: str) -> OperationTable:
    """Return a table of `GET /a/{b}` and the like; each operation is called after its place in the list."""
    lines = [",".join(COLUMNS)]
    for index, line in enumerate(methods_and_templates):
        method, _, template = line.partition(" ")
        lines.append(f"api,v0,op{index},{method},{template}" + "," * (len(COLUMNS) - 5))
    return load_table("\n".join(lines))


def found(table: OperationTable, method: str, path: str) -> str | None:
    operation = table.match(method, path)
    return operation.operation_id if operation else None


# What the shipped table says.


def test_the_shipped_table_carries_every_fact_of_the_reference_column_by_column() -> None:
    needs(REFERENCE.exists(), "the reference material beside the checkout")
    with REFERENCE.open(encoding="utf-8", newline="") as file:
        wanted = {(row["method"], row["path"]): row for row in csv.DictReader(file)}
    shipped = {(row["method"], row["path"]): row for row in read_rows(shipped_table())}
    assert len(wanted) == 370
    assert shipped.keys() == wanted.keys()
    differing = [
        f"{' '.join(key)} {column}: {shipped[key][column]!r}, not {value!r}"
        for key, row in wanted.items()
        for column, value in row.items()
        if shipped[key][column] != value
    ]
    assert not differing


def test_every_operation_is_found_by_its_own_template_and_by_no_other_method() -> None:
    for operation in TABLE:
        assert TABLE.match(operation.method, operation.template) is operation
        assert TABLE.match("OPTIONS", operation.template) is None


def test_the_table_counts_and_lists_its_operations() -> None:
    assert len(TABLE) == len(list(TABLE)) == 370


def test_a_name_and_a_method_are_unique_but_a_name_alone_is_not() -> None:
    # The model shippingV2 gives POST and PUT of one path the same operationId, and each a plan of its own.
    assert len({(operation.name, operation.method) for operation in TABLE}) == 370
    shared = [operation for operation in TABLE if operation.name == "shipping.v2.linkCarrierAccount"]
    assert {(operation.method, operation.rate, operation.burst) for operation in shared} == {
        ("POST", 5.0, 10),
        ("PUT", 80.0, 100),
    }


def test_the_table_is_found_inside_a_package_that_is_no_folder(tmp_path: Path) -> None:
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as package:
        for name in ("__init__.py", "amazon/__init__.py", "amazon/operations.py", "amazon/operations.csv"):
            package.write(ROOT / "proxy" / name, f"proxy/{name}")
    program = "from proxy.amazon import operations; print(operations.__file__, len(operations.load_table()))"
    environment = {**os.environ, "PYTHONPATH": str(archive)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert str(archive) in done.stdout
    assert done.stdout.endswith(" 370\n")


@pytest.mark.parametrize(
    ("name", "rate", "burst", "source"),
    [
        ("orders.v0.getOrders", 0.0167, 20, "model"),
        ("productFees.v0.getMyFeesEstimates", 0.5, 1, "model"),
        ("sellerWallet.2024-03-01.createTransaction", 1.0, 10, "sdk"),
        ("fulfillmentInbound.2024-03-20.listPrepDetails", 2.0, 30, "sdk"),
        ("vendorDirectFulfillmentSandboxData.2021-10-28.generateOrderScenarios", None, None, ""),
    ],
)
def test_a_plan_is_the_models_or_else_the_sdks_or_unknown(
    name: str, rate: float | None, burst: int | None, source: str
) -> None:
    operation = BY_NAME[name]
    assert (operation.rate, operation.burst, operation.rate_source) == (rate, burst, source)


def test_every_known_plan_lets_a_call_through_some_day() -> None:
    for operation in TABLE:
        assert (operation.rate is None) == (operation.burst is None) == (operation.rate_source == "")
        assert operation.rate is None or operation.rate > 0
        assert operation.burst is None or operation.burst >= 1
        assert operation.app_rate is None or operation.app_rate > (operation.rate or 0)


def test_which_token_an_operation_wants() -> None:
    orders = BY_NAME["orders.v0.getOrders"]
    document = BY_NAME["reports.2021-06-30.getReportDocument"]
    address = BY_NAME["orders.v0.getOrderAddress"]
    destinations = BY_NAME["notifications.v1.getDestinations"]
    assert orders.restricted
    assert orders.data_elements == ("buyerInfo", "shippingAddress", "buyerTaxInformation")
    assert (document.restricted, document.generic_path) == (True, False)
    assert (address.restricted, address.generic_path, address.data_elements) == (True, True, ())
    assert (destinations.scope, destinations.restricted) == ("sellingpartnerapi::notifications", False)
    assert BY_NAME["notifications.v1.createSubscription"].scope is None


def test_the_limits_over_all_accounts_the_removals_and_the_sandbox_are_told() -> None:
    orders = BY_NAME["orders.v0.getOrders"]
    assert (orders.deprecated, orders.removal_date, orders.sandbox) == (True, "2027-03-27", "static")
    assert BY_NAME["listingsItems.2021-08-01.patchListingsItem"].app_rate == 500
    assert BY_NAME["fbaInventory.v1.addInventory"].sandbox_only
    assert (orders.app_rate, orders.app_burst, orders.sandbox_only) == (None, None, False)


def test_an_operation_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BY_NAME["orders.v0.getOrders"].rate = 100.0  # type: ignore[misc]  # the point of the test


def test_a_row_that_is_no_operation_is_an_error() -> None:
    with pytest.raises(ValueError, match="soon"):
        load_table(f"{','.join(COLUMNS)}\norders,v0,getOrders,GET,/orders/v0/orders,soon,20" + "," * 13)


# Matching.


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("GET", "/orders/v0/orders", "orders.v0.getOrders"),
        ("GET", "/orders/v0/orders/902-3159896-1390916", "orders.v0.getOrder"),
        ("GET", "/orders/v0/orders/902-3159896-1390916/orderItems/buyerInfo", "orders.v0.getOrderItemsBuyerInfo"),
        ("GET", "/listings/2021-08-01/items/A1/AB%2FCD%20%C3%A9", "listingsItems.2021-08-01.getListingsItem"),
        ("PATCH", "/listings/2021-08-01/items/A1/AB", "listingsItems.2021-08-01.patchListingsItem"),
        ("GET", "/%6Frders/v%30/orders", "orders.v0.getOrders"),
        ("GET", "/orders/v0/orders/%", "orders.v0.getOrder"),
        ("GET", "/orders/v0/orders/%zz%", "orders.v0.getOrder"),
        ("GET", "/orders/v0/orders/..", "orders.v0.getOrder"),
        ("POST", f"{UPLOADS}/messaging", "uploads.2020-11-01.createUploadDestinationForResource"),
        ("POST", f"{UPLOADS}/a/b%2Fc/{{d}}/e", "uploads.2020-11-01.createUploadDestinationForResource"),
        ("POST", f"{UPLOADS}{'/a' * 3000}", "uploads.2020-11-01.createUploadDestinationForResource"),
    ],
)
def test_a_path_is_matched_as_it_is_sent(method: str, path: str, name: str) -> None:
    operation = TABLE.match(method, path)
    assert operation is not None
    assert operation.name == name


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("HEAD", "/orders/v0/orders"),
        ("get", "/orders/v0/orders"),
        ("", "/orders/v0/orders"),
        ("POST", "/orders/v0/orders"),
        ("GET", "/Orders/v0/orders"),
        ("GET", "/orders/v0/orders/"),
        ("GET", "/orders//v0/orders"),
        ("GET", "//orders/v0/orders"),
        ("GET", "/orders/v0/orders//orderItems"),
        ("GET", "/orders%2Fv0/orders"),
        ("GET", "/orders/v0/orders/1/orderItems/buyerInfo/more"),
        ("GET", "/orders/v0/orders?MarketplaceIds=A1"),
        ("GET", "/orders/v0/./orders"),
        ("GET", "/orders/v0/orders%20"),
        ("GET", "/%256Frders/v0/orders"),
        ("GET", "orders/v0/orders"),
        ("GET", "x/orders/v0/orders"),
        ("GET", "https://sellingpartnerapi-eu.amazon.com/orders/v0/orders"),
        ("OPTIONS", "*"),
        ("GET", "/"),
        ("GET", ""),
        ("POST", UPLOADS),
        ("POST", f"{UPLOADS}/"),
        ("POST", f"{UPLOADS}/a/b/"),
        ("POST", f"{UPLOADS}/a//b"),
        ("POST", f"{UPLOADS}//a"),
        ("POST", f"{UPLOADS}/{'a/' * 3000}"),
        ("GET", f"{UPLOADS}/a"),
    ],
)
def test_what_amazon_would_not_know_is_not_matched(method: str, path: str) -> None:
    assert TABLE.match(method, path) is None


def test_a_literal_wins_over_a_parameter() -> None:
    table = table_of("GET /a/{b}", "GET /a/list", "GET /{a}/list")
    assert found(table, "GET", "/a/list") == "op1"
    assert found(table, "GET", "/a/l%69st") == "op1"
    assert found(table, "GET", "/a/other") == "op0"
    assert found(table, "GET", "/z/list") == "op2"


def test_a_literal_branch_that_leads_nowhere_is_left_again() -> None:
    table = table_of("GET /a/list/c", "GET /a/{b}/d", "GET /{a}/list/{c}/e")
    assert found(table, "GET", "/a/list/d") == "op1"
    assert found(table, "GET", "/a/list/d/e") == "op2"
    assert found(table, "GET", "/a/list/z") is None


def test_a_literal_of_another_method_does_not_hide_a_parameter() -> None:
    table = table_of("GET /a/{b}", "POST /a/list")
    assert found(table, "GET", "/a/list") == "op0"
    assert found(table, "POST", "/a/list") == "op1"
    assert found(table, "POST", "/a/other") is None


def test_a_greedy_parameter_is_the_last_choice() -> None:
    table = table_of(f"POST {UPLOADS}/{{resource}}", f"POST {UPLOADS}/{{one}}/literal", f"POST {UPLOADS}/known")
    assert found(table, "POST", f"{UPLOADS}/known") == "op2"
    assert found(table, "POST", f"{UPLOADS}/x/literal") == "op1"
    assert found(table, "POST", f"{UPLOADS}/known/x") == "op0"


def test_of_two_operations_with_one_method_and_template_the_first_row_is_found() -> None:
    table = table_of("GET /a/{b}", "GET /a/{c}", "GET /a/{b}")
    assert found(table, "GET", "/a/1") == "op0"
    assert len(table) == 3


# Hostile paths.


def calls_made(function: Callable[[], object]) -> int:
    """Return how many functions, Python's and C's, are called by `function`."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    "path",
    [
        "/" * 8000,
        "/a" * 4000,
        "/" + "%41" * 2700,
        "/orders/v0/orders/" + "%2F" * 2700,
        "/orders/v0/orders/1/" + "%41" * 2700,
        "/orders/v0" + "/orders" * 1000,
        "%" * 8000,
        UPLOADS + "/a" * 4000,
        UPLOADS + "//" * 4000,
    ],
    ids=lambda path: f"{path[:24]}…",
)
def test_the_work_for_a_path_does_not_grow_with_its_pieces(path: str) -> None:
    assert calls_made(lambda: TABLE.match("POST", path)) < 60
    tracemalloc.start()
    TABLE.match("POST", path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(path), "a few copies of the path, but no list of thousands of pieces"


def test_a_literal_in_escapes_is_short_enough_to_be_decoded() -> None:
    for operation in TABLE:
        escaped = "/".join(part if "{" in part else fully_escaped(part) for part in operation.template.split("/"))
        assert TABLE.match(operation.method, escaped) is operation


def fully_escaped(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def test_nothing_is_remembered_of_the_paths_that_were_seen() -> None:
    def see(count: int) -> None:
        for number in range(count):
            TABLE.match("GET", f"/orders/v0/orders/{number:0>500}")

    see(10)
    tracemalloc.start()
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    see(2000)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 100_000


# A slow and plain matcher, to agree with.


def reference_match(operations: Iterable[Operation], method: str, path: str) -> Operation | None:
    """Return the operation with the most literal template, compared segment by segment from the left."""
    ranked = [
        (rank, operation)
        for operation in operations
        if operation.method == method and (rank := rank_of(operation.template, path)) is not None
    ]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def rank_of(template: str, path: str) -> list[int] | None:
    """Return 0 for each literal, 1 for a parameter, 2 for a greedy one; None where the path is not of the template."""
    wanted, segments = template.split("/"), path.split("/")
    if segments[0] or "" in segments[1:]:
        return None
    if template in GREEDY and len(segments) > len(wanted):
        segments[len(wanted) - 1 :] = ["the rest"]
    if len(wanted) != len(segments):
        return None
    rank = []
    for want, segment in zip(wanted, segments, strict=True):
        is_parameter = want.startswith("{")
        if not is_parameter and unquote(segment) != want:
            return None
        rank.append(is_parameter + (is_parameter and template in GREEDY))
    return rank


@st.composite
def escaped(draw: st.DrawFn, text: str) -> str:
    """Escape what must be, and of the rest what the test's luck wants."""
    return "".join(
        fully_escaped(character) if quote(character, safe="") != character or draw(st.booleans()) else character
        for character in text
    )


values = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def requests_for(draw: st.DrawFn, operation: Operation) -> str:
    segments = []
    for part in operation.template.split("/")[1:]:
        is_parameter = part.startswith("{")
        count = draw(st.integers(1, 4)) if is_parameter and operation.template in GREEDY else 1
        segments += [draw(escaped(draw(values) if is_parameter else part)) for _ in range(count)]
    return "/" + "/".join(segments)


@given(st.data(), st.sampled_from(list(TABLE)))
def test_a_path_made_from_a_template_matches_it_or_a_more_literal_one(
    data: st.DataObject, operation: Operation
) -> None:
    path = data.draw(requests_for(operation))
    matched = TABLE.match(operation.method, path)
    assert matched is not None
    assert matched is reference_match(TABLE, operation.method, path)
    rank, own_rank = rank_of(matched.template, path), rank_of(operation.template, path)
    assert rank is not None
    assert own_rank is not None
    assert rank <= own_rank


parts = st.sampled_from(["a", "b", "{x}", "{y}"])
templates = st.builds(lambda some: "/" + "/".join(some), st.lists(parts, min_size=1, max_size=4))
greedy_ones = st.sampled_from([*GREEDY, f"{UPLOADS}/a", f"{UPLOADS}/{{x}}/b", "/uploads/{x}/{y}/a"])
lines = st.builds("{} {}".format, st.sampled_from(["GET", "POST"]), templates | greedy_ones)
pieces = st.lists(st.sampled_from(["a", "b", "c", "%61", "A", "", "%2F", "{x}"]), max_size=6)
paths = st.builds(lambda start, some: start + "/".join(some), st.sampled_from(["/", "", "//", f"{UPLOADS}/"]), pieces)


@given(st.lists(lines, max_size=8), paths)
def test_the_tree_agrees_with_a_linear_search_whatever_the_table(templates: list[str], path: str) -> None:
    table = table_of(*templates)
    assert table.match("GET", path) is reference_match(table, "GET", path)
    assert table.match("POST", path) is reference_match(table, "POST", path)


@given(st.sampled_from(["GET", "POST", "PUT"]), st.text(max_size=60) | paths)
def test_no_text_whatever_makes_matching_fail(method: str, path: str) -> None:
    assert TABLE.match(method, path) is reference_match(TABLE, method, path)
