"""Which calls bring personal data of buyers, and which: for those who may not have it.

Restricted operations bring it with a Restricted Data Token (DOC "Tokens API"). Others bring it with any token, by the
application's role alone (DOC "Access Orders PII"); they are known by their API.
"""

import re
from urllib.parse import unquote_plus

from proxy.amazon.operations import Operation

ALL_ELEMENTS = ("buyerInfo", "shippingAddress", "buyerTaxInformation")

# What they bring is their name's.
_ONE_KIND = {
    "orders.v0.getOrderAddress": ("shippingAddress",),
    "orders.v0.getOrderBuyerInfo": ("buyerInfo",),
    "orders.v0.getOrderItemsBuyerInfo": ("buyerInfo",),
}

# They answer an ordinary token as well, and then without personal data: getReportDocument refuses the documents that
# have any.
HARMLESS_WITHOUT_RDT = frozenset(
    {
        "orders.v0.getOrders",
        "orders.v0.getOrder",
        "orders.v0.getOrderItems",
        "reports.2021-06-30.getReportDocument",
    }
)

# Their answers hold addresses, names or invoices of buyers without a Restricted Data Token, or they hand one out.
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

# What Orders 2026-01-01 is asked for by includedData.
_INCLUDED = {"BUYER": "buyerInfo", "RECIPIENT": "shippingAddress"}


def implied_elements(operation: Operation | None, query: str) -> tuple[str, ...]:
    """Return the data elements that a call may bring with an ordinary token, or with the only token it can have.

    An operation outside the table may bring anything.
    """
    if operation is None:
        return ALL_ELEMENTS
    if operation.name in HARMLESS_WITHOUT_RDT:
        return ()
    if operation.api == "orders" and not operation.restricted:
        return _included(query) if operation.version != "v0" else ()
    if operation.restricted:
        return _ONE_KIND.get(operation.name, ALL_ELEMENTS)
    return ALL_ELEMENTS if operation.api in _PERSONAL_APIS else ()


def _included(query: str) -> tuple[str, ...]:
    """Return what `includedData` asks for; read so that no spelling of it is missed."""
    words = set(re.split(r"[^A-Z]+", unquote_plus(query).upper()))
    return tuple(element for word, element in _INCLUDED.items() if word in words)
