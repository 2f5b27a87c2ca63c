"""Why does Amazon refuse this call? Its answer says next to nothing, but the proxy knows what was sent.

Amazon's answer passes unchanged; what is found out here goes into `x-sp-proxy`, the log line and a metric.
"""

from typing import Literal

from proxy.amazon.error_response import AmazonError
from proxy.amazon.operations import OperationTable
from proxy.request.routing import Route
from proxy.request.token import Token

FORBIDDEN_STATUSES = frozenset({401, 403})  # 401 is documented here and there, and means the same

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

# What each hint means, and what to do (the README's table is made of this).
HINTS: dict[Hint, str] = {
    "token_refused": "Amazon calls the token expired, revoked or invalid; a new one did not help, or the body was too "
    "large to be sent again. If it goes on: the seller withdrew the authorisation, or Amazon has trouble.",
    "unencoded_slash": "The path has a segment too many for the operation that it resembles: write a / within a SKU or "
    "an id as %2F.",
    "path_unknown": "No operation is known at this path and method: check both, and the API's version.",
    "report_type": "The application's roles do not cover this type of report.",
    "elements_dropped": "Personal data was left out because the application has no role for it (`dropped` says which); "
    "the call may need it.",
    "restricted_without_rdt": "A restricted operation was called with the ordinary token: x-sp-data-elements: none, "
    "the sandbox, or a report document that was taken for unrestricted; the next call brings an RDT.",
    "restricted_role": "The Restricted Data Token was given, and refused here: the restricted role is missing, or was "
    "added after the seller authorised the application.",
    "grantless": "The operation is the application's own: it must be registered for sellers and have the role.",
    "region_or_authorisation": "No call for this account and region has worked yet: the refresh token is probably for "
    "another region, or its authorisation is gone.",
    "role": "Other calls of this account work: the application lacks the role for this operation, or got it after the "
    "seller authorised the application; have the seller authorise anew.",
}


class SuccessHistory:
    """Which accounts and regions have had an answer that was no refusal; bounded by the configuration."""

    def __init__(self, table: OperationTable) -> None:
        self._table = table
        self._worked: set[tuple[str, str]] = set()

    def record(self, route: Route) -> None:
        """Learn that Amazon let a call of this account and region through."""
        self._worked.add((route.account, route.region))

    def diagnose(self, method: str, route: Route, token: Token, amazon_error: AmazonError) -> Hint:
        """Return what is probably behind a refusal."""
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
        # One that takes data elements answers an ordinary token too, without them: the token is not to blame.
        if route.operation.restricted and not route.operation.data_elements:
            return "restricted_without_rdt"
        if token.kind == "grantless":
            return "grantless"
        return "role" if (route.account, route.region) in self._worked else "region_or_authorisation"

    def _has_surplus_segments(self, method: str, route: Route) -> bool:
        """Return whether the path, without its last few segments, is one of an operation that ends with an id."""
        segments = route.path_and_query.partition("?")[0].split("/")
        for count in range(len(segments) - 1, max(2, len(segments) - 4), -1):
            shorter = self._table.match(method, "/".join(segments[:count]))
            if shorter is not None and shorter.template.endswith("}"):
                return True
        return False
