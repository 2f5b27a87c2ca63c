"""Operations that need another token than the seller's access token (DOC "Tokens API", DOC "Grantless Operations")."""

from dataclasses import dataclass

from proxy.simulator.state import template_pattern

NOTIFICATIONS, ROTATION = "sellingpartnerapi::notifications", "sellingpartnerapi::client_credential:rotation"


@dataclass(frozen=True, slots=True)
class Restricted:
    """One restricted operation; `optional` ones answer an ordinary token too, without the personal data."""

    method: str
    template: str
    data_elements: tuple[str, ...] = ()
    optional: bool = False
    generic: bool = True

    def fits(self, method: str, path: str) -> bool:
        """Return whether a raw path is one of this operation's, the template itself included."""
        return method == self.method and template_pattern(self.template).fullmatch(path) is not None


_ALL = ("buyerInfo", "shippingAddress", "buyerTaxInformation")
_ORDER = "/orders/v0/orders/{orderId}"
_DF_ORDERS = "/vendor/directFulfillment/orders"
_DF_SHIPPING = "/vendor/directFulfillment/shipping"

RESTRICTED: tuple[Restricted, ...] = (
    Restricted("GET", "/orders/v0/orders", _ALL, optional=True),
    Restricted("GET", _ORDER, _ALL, optional=True),
    Restricted("GET", f"{_ORDER}/orderItems", ("buyerInfo",), optional=True),
    Restricted("GET", f"{_ORDER}/address"),
    Restricted("GET", f"{_ORDER}/buyerInfo"),
    Restricted("GET", f"{_ORDER}/orderItems/buyerInfo"),
    Restricted("GET", f"{_ORDER}/regulatedInfo"),
    Restricted("GET", "/reports/2021-06-30/documents/{reportDocumentId}", generic=False),
    Restricted("POST", "/mfn/v0/shipments"),
    Restricted("GET", "/mfn/v0/shipments/{shipmentId}"),
    Restricted("DELETE", "/mfn/v0/shipments/{shipmentId}"),
    Restricted("GET", "/fba/outbound/brazil/v0/shipments/{shipmentId}"),
    Restricted("GET", "/shipping/v1/shipments/{shipmentId}"),
    Restricted("POST", "/easyShip/2022-03-23/packages/bulk"),
    *(
        Restricted("GET", f"{_DF_ORDERS}/{version}/purchaseOrders{number}")
        for version in ("v1", "2021-12-28")
        for number in ("", "/{purchaseOrderNumber}")
    ),
    *(
        Restricted("GET", f"{_DF_SHIPPING}/{version}/{what}{number}")
        for version in ("v1", "2021-12-28")
        for what in ("shippingLabels", "packingSlips", "customerInvoices")
        for number in ("", "/{purchaseOrderNumber}")
    ),
    Restricted("POST", f"{_DF_SHIPPING}/2021-12-28/shippingLabels/{{purchaseOrderNumber}}"),
)

GRANTLESS: tuple[tuple[str, str, str], ...] = (
    ("GET", "/notifications/v1/destinations", NOTIFICATIONS),
    ("POST", "/notifications/v1/destinations", NOTIFICATIONS),
    ("GET", "/notifications/v1/destinations/{destinationId}", NOTIFICATIONS),
    ("DELETE", "/notifications/v1/destinations/{destinationId}", NOTIFICATIONS),
    ("GET", "/notifications/v1/subscriptions/{notificationType}/{subscriptionId}", NOTIFICATIONS),
    ("DELETE", "/notifications/v1/subscriptions/{notificationType}/{subscriptionId}", NOTIFICATIONS),
    ("POST", "/notifications/v1/subscriptions/{notificationType}/testNotification", NOTIFICATIONS),
    ("POST", "/applications/2023-11-30/clientSecret", ROTATION),
)

_GRANTLESS_PATTERNS = tuple((method, template_pattern(template), scope) for method, template, scope in GRANTLESS)


def restricted(method: str, path: str) -> Restricted | None:
    """Return the restricted operation that a raw path is of."""
    return next((operation for operation in RESTRICTED if operation.fits(method, path)), None)


def grantless_scope(method: str, path: str) -> str | None:
    """Return the scope that a grantless operation wants; None for all others."""
    found = (scope for verb, pattern, scope in _GRANTLESS_PATTERNS if verb == method and pattern.fullmatch(path))
    return next(found, None)


def is_restricted_document(path: str) -> bool:
    """Return whether a report document is of a restricted type: here those whose id begins with `restricted`."""
    return path.rpartition("/")[2].startswith("restricted")
