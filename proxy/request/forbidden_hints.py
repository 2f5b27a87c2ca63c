"""Diagnosis of a 401 or 403 of Amazon's: the probable reason, from what the proxy sent.

Amazon's error message rarely names the reason. Its response is passed on unchanged; the hint goes into `x-sp-proxy`,
the log line and a metric.
"""

from typing import Literal

from proxy.amazon.error_response import AmazonError
from proxy.amazon.operations import OperationTable
from proxy.request.routing import Route
from proxy.request.token import Token

FORBIDDEN_STATUSES = frozenset({401, 403})  # Amazon documents 401 for some operations, with the same meaning

Hint = Literal[
    "token_refused",
    "unencoded_slash",
    "path_unknown",
    "report_type",
    "elements_dropped",
    "restricted_without_rdt",
    "restricted_role",
    "grantless",
    "region_or_authorisation",
    "role",
]

# Meaning and remedy of each hint (docs/reference/errors.md is made from this).
HINTS: dict[Hint, str] = {
    "token_refused": "Amazon calls the token expired, revoked or invalid; a new one did not help, or the body was too "
    "large to send it again. If it persists, the seller withdrew the authorisation, or Amazon has a problem.",
    "unencoded_slash": "The path has one segment more than the operation that it resembles: write a / within a SKU or "
    "an id as %2F.",
    "path_unknown": "No operation is known at this path and method: check both, and the API's version.",
    "report_type": "The application's roles do not cover this type of report.",
    "elements_dropped": "Personal data was left out because the application has no role for it (`dropped` says which); "
    "the call may need it.",
    "restricted_without_rdt": "A restricted operation was called with an access token: because of x-sp-data-elements: "
    "none, in the sandbox, or for a report document that was thought to be unrestricted; the next call uses an RDT.",
    "restricted_role": "Amazon issued the Restricted Data Token but refused the call: the restricted role is missing, "
    "or was added after the seller authorised the application.",
    "grantless": "The operation is called with a grantless token: the application must be registered for sellers and "
    "have the role.",
    "region_or_authorisation": "No call for this account and region has succeeded yet: the refresh token is probably "
    "for another region, or its authorisation was withdrawn.",
    "role": "Other calls of this account succeed: the application lacks the role for this operation, or got it after "
    "the seller authorised the application; have the seller authorise it again.",
}


class SuccessHistory:
    """Accounts and regions with a call that Amazon did not refuse; bounded by the configuration."""

    def __init__(self, table: OperationTable) -> None:
        self._table = table
        self._accepted: set[tuple[str, str]] = set()

    def record(self, route: Route) -> None:
        """Note that Amazon accepted a call of this account and region."""
        self._accepted.add((route.account, route.region))

    def diagnose(self, method: str, route: Route, token: Token, amazon_error: AmazonError) -> Hint:
        """Return the probable reason of a 401 or 403."""
        if amazon_error.is_token_error:
            return "token_refused"
        if route.operation is None or amazon_error.is_unknown_path:
            return "unencoded_slash" if self._has_surplus_segments(method, route) else "path_unknown"
        if amazon_error.is_about_report_type:
            return "report_type"
        if set(token.data_elements) < set(route.token_key.data_elements):
            return "elements_dropped"
        if token.kind == "rdt":
            return "restricted_role"
        # An operation with data elements accepts an access token, too, so the token is not the reason.
        if route.operation.restricted and not route.operation.data_elements:
            return "restricted_without_rdt"
        if token.kind == "grantless":
            return "grantless"
        return "role" if (route.account, route.region) in self._accepted else "region_or_authorisation"

    def _has_surplus_segments(self, method: str, route: Route) -> bool:
        """Return whether the path without its last segments matches an operation that ends with an id."""
        segments = route.path_and_query.partition("?")[0].split("/")
        for count in range(len(segments) - 1, max(2, len(segments) - 4), -1):
            shorter = self._table.match(method, "/".join(segments[:count]))
            if shorter is not None and shorter.template.endswith("}"):
                return True
        return False
