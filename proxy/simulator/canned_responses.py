"""Plausible responses for operations without a model, about fictitious people."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, unquote

from proxy.simulator import rdt
from proxy.simulator.state import Issued

_PAGES = 3
_ADDRESS = {
    "Name": "Erika Mustermann",
    "AddressLine1": "Heidestraße 17",
    "City": "Köln",
    "PostalCode": "51147",
    "CountryCode": "DE",
}
_BUYER = {"BuyerEmail": "simulated@marketplace.example", "BuyerName": "Erika Mustermann"}

_ORDER = re.compile(r"/orders/v0/orders/([^/]+)")
_ORDER_PART = re.compile(r"/orders/v0/orders/([^/]+)/(address|buyerInfo|orderItems)")


def respond(token: Issued, method: str, path: str, query: str) -> tuple[int, Any]:
    """Return a status and JSON content for a call that may pass."""
    if method == "GET" and path == "/orders/v0/orders":
        return 200, {"payload": _orders(token, path, query)}
    if method == "GET" and (match := _ORDER.fullmatch(path)):
        return 200, {"payload": _order(token, path, unquote(match[1]))}
    if method == "GET" and (match := _ORDER_PART.fullmatch(path)):
        return 200, {"payload": _order_part(unquote(match[1]), match[2])}
    if (method, path) == ("GET", "/sellers/v1/marketplaceParticipations"):
        return 200, {"payload": [_participation(token.region)]}
    fixed = _FIXED.get((method, path))
    if fixed is not None:
        return fixed
    if method in {"POST", "PUT", "PATCH"}:
        return (202 if method == "POST" else 200), {"payload": {"status": "ACCEPTED"}}
    return 200, {"payload": {"simulated": True, "path": path}}


def _order(token: Issued, path: str, order_id: str) -> dict[str, Any]:
    order: dict[str, Any] = {
        "AmazonOrderId": order_id,
        "OrderStatus": "Shipped",
        "PurchaseDate": "2026-01-01T00:00:00Z",
        "LastUpdateDate": "2026-01-02T00:00:00Z",
    }
    resource = rdt.covers(token, "GET", path) if token.kind == "rdt" else None
    elements = resource.data_elements if resource else ()
    if "buyerInfo" in elements:
        order["BuyerInfo"] = _BUYER
    if "shippingAddress" in elements:
        order["ShippingAddress"] = _ADDRESS
    return order


def _orders(token: Issued, path: str, query: str) -> dict[str, Any]:
    page = int((parse_qs(query).get("NextToken") or ["page-1"])[0].rpartition("-")[2] or 1)
    numbers = range((page - 1) * 2, page * 2)
    orders = [_order(token, path, f"902-0000000-{number:07d}") for number in numbers]
    return {"Orders": orders, **({"NextToken": f"page-{page + 1}"} if page < _PAGES else {})}


def _order_part(order_id: str, part: str) -> Mapping[str, Any]:
    parts: dict[str, dict[str, Any]] = {
        "address": {"ShippingAddress": _ADDRESS},
        "buyerInfo": _BUYER,
        "orderItems": {"OrderItems": [{"ASIN": "B000000000", "OrderItemId": "1", "SellerSKU": "sku"}]},
    }
    return {"AmazonOrderId": order_id, **parts[part]}


_MARKETPLACES = {
    "na": ("ATVPDKIKX0DER", "Amazon.com", "US"),
    "eu": ("A1PA6795UKMFR9", "Amazon.de", "DE"),
    "fe": ("A1VC38T7YXB528", "Amazon.co.jp", "JP"),
}


def _participation(region: str) -> dict[str, Any]:
    identity, name, country = _MARKETPLACES[region]
    return {
        "marketplace": {"id": identity, "name": name, "countryCode": country},
        "participation": {"isParticipating": True, "hasSuspendedListings": False},
        "storeName": "Erika Mustermann",
    }


_FIXED: dict[tuple[str, str], tuple[int, Any]] = {
    ("GET", "/notifications/v1/destinations"): (
        200,
        {"payload": [{"name": "simulated", "destinationId": "d-1", "resource": {}}]},
    ),
    ("POST", "/reports/2021-06-30/reports"): (202, {"reportId": "1"}),
    ("POST", "/feeds/2021-06-30/feeds"): (202, {"feedId": "1"}),
    ("POST", "/applications/2023-11-30/clientSecret"): (204, None),
}
