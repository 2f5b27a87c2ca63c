"""The personal data that an operation returns, for callers that may not receive it.

Restricted operations return it with a Restricted Data Token (DOC "Tokens API"). Others return it with any token if the
application has the role (DOC "Access Orders PII"); they are listed by their API.
"""

import re
from urllib.parse import unquote_plus

from proxy.amazon.operations import Operation

ALL_ELEMENTS = ("buyerInfo", "shippingAddress", "buyerTaxInformation")

# Restricted operations that return one kind of data.
# With an access token they returned partial addresses and relay e-mail addresses (models#1454, docs#1529).
_ONE_KIND = {
    "orders.v0.getOrderAddress": ("shippingAddress",),
    "orders.v0.getOrderBuyerInfo": ("buyerInfo",),
    "orders.v0.getOrderItemsBuyerInfo": ("buyerInfo",),
}

# Restricted operations that accept an access token too, and then return no personal data: getReportDocument rejects the
# documents that have any.
# The first three: Amazon staff in models#210. getReportDocument: 403 (docs#2087).
HARMLESS_WITHOUT_RDT = frozenset(
    {
        "orders.v0.getOrders",
        "orders.v0.getOrder",
        "orders.v0.getOrderItems",
        "reports.2021-06-30.getReportDocument",
    }
)

# APIs whose responses have addresses, names or invoices of buyers without a Restricted Data Token; `tokens` issues one.
# Chosen from the fields of the models; Amazon publishes no such list.
_PERSONAL_APIS = frozenset(
    {
        "deliveryShipmentInvoice",
        "easyShip",
        "externalFulfillmentReturns",
        "externalFulfillmentShipments",
        "fulfillmentOutbound",
        "invoices",
        "merchantFulfillment",
        "messaging",
        "services",
        "shipmentInvoicing",
        "shipping",
        "tokens",
    }
)

# Values of includedData in Orders 2026-01-01.
# Here the role and includedData decide and not the token (DOC "Access Orders PII"). PAYMENT and others have none.
_INCLUDED = {"BUYER": "buyerInfo", "RECIPIENT": "shippingAddress"}


def implied_elements(operation: Operation | None, query: str) -> tuple[str, ...]:
    """Return the data elements that a request may return with an access token, or with the only token it can use.

    An operation outside the table may return anything.
    """
    if operation is None:
        return ALL_ELEMENTS
    if operation.name in HARMLESS_WITHOUT_RDT:
        return ()
    # What is left of v0 are writes (confirmShipment, updateShipmentStatus, updateVerificationStatus).
    if operation.api == "orders" and not operation.restricted:
        return _included(query) if operation.version != "v0" else ()
    if operation.restricted:
        return _ONE_KIND.get(operation.name, ALL_ELEMENTS)
    return ALL_ELEMENTS if operation.api in _PERSONAL_APIS else ()


def _included(query: str) -> tuple[str, ...]:
    """Return the elements that `includedData` requests, whatever its case, escaping and separators."""
    # The whole query, not one parameter: a false match rejects a request, a missed one would return personal data.
    # It applies to each page: with a nextToken, includedData may differ from that of the first page.
    words = set(re.split(r"[^A-Z]+", unquote_plus(query).upper()))
    return tuple(element for word, element in _INCLUDED.items() if word in words)
