"""Validation of requests and their tokens.

In Amazon's order: its front end (DOC "API request validation for 400 errors with HTML response"),
the headers, the token, and what the token is for (DOC "Resolve Common HTTP and Authorization Error Codes").
"""

import re
from calendar import timegm
from collections.abc import Mapping, Sequence
from time import strptime

from proxy.simulator import rdt
from proxy.simulator.responses import Response, forbidden, html, invalid_input
from proxy.simulator.restricted_operations import grantless_scope, is_restricted_document, restricted
from proxy.simulator.state import Issued, State

_DATE = re.compile(r"\d{8}T\d{6}Z", re.ASCII)
_USER_AGENT = re.compile(r"(?:[^/\\]|\\.)+/(?:[^(\\]|\\.)+ \((?:[^)\\]|\\.)*Language=(?:[^)\\]|\\.)*\)")
_DATE_SKEW = 900.0  # seconds


def well_formed(method: str, names: Sequence[str]) -> Response | None:
    """Return the front end's page for a request that breaks HTTP's rules; `names` are its header names, lower-case."""
    # Stricter than RFC 9110 section 9.3.1, as Amazon is: its page names a body or its length on GET and HEAD.
    framing = {"content-length", "transfer-encoding"} & set(names)
    if method in {"GET", "HEAD"} and framing:
        return html(400, "Bad Request")
    # RFC 9112 sections 3.2 (one Host) and 6.1 (both framings: a sign of request smuggling).
    if names.count("host") != 1 or names.count("content-length") > 1 or len(framing) > 1:
        return html(400, "Bad Request")
    return None


def headers_in_order(state: State, headers: Mapping[str, str]) -> Response | None:
    """Return the refusal for a date or a user agent that is missing or malformed."""
    date, agent = headers.get("x-amz-date", ""), headers.get("user-agent", "")
    # Stricter than Amazon, which probably does not enforce it (its own SDKs send no x-amz-date): so that a proxy that
    # sends a wrong date fails its tests here.
    if not _DATE.fullmatch(date) or abs(_epoch(date) - state.wall()) > _DATE_SKEW:
        return invalid_input("x-amz-date must be the current time in UTC as YYYYMMDDTHHMMSSZ")
    # DOC "Include a User-Agent Header in All Requests"; Amazon enforces the length and probably not the form.
    if len(agent) > 500 or not _USER_AGENT.fullmatch(agent):
        return invalid_input("user-agent must be AppId/AppVersionId (Language=...) with at most 500 characters")
    return None


def _epoch(date: str) -> float:
    try:
        return float(timegm(strptime(date, "%Y%m%dT%H%M%SZ")))
    except ValueError:
        return 0.0  # digits that are no date: far from every clock, so that it is refused


def token_of(state: State, region: str, headers: Sequence[tuple[str, str]]) -> Issued | Response:
    """Return the token that a request brings, or the refusal of a missing, unknown, expired or foreign one."""
    given = [value for name, value in headers if name.lower() == "x-amz-access-token"]
    # Amazon's texts, which clients match: an expired or bad token gets 403 and not 401 (models#4122).
    if not given or not given[0]:
        return forbidden("Access token is missing in the request header.")
    token = state.tokens.get(given[0])
    if len(given) > 1 or token is None or token.revoked:
        return forbidden("The access token you provided is revoked, malformed or invalid.")
    if state.now() >= token.expires_at:
        return forbidden("The access token you provided has expired.")
    # With empty details, as Amazon (models#4825): the response does not tell the region from a missing role.
    if token.region and token.region != region:
        return forbidden()
    return token


def permitted(token: Issued, method: str, path: str) -> Response | None:
    """Return the refusal of a token that is not the kind that the operation wants, None where it is."""
    scope = grantless_scope(method, path)
    if scope is not None or token.kind == "grantless":
        return None if scope in token.scopes else forbidden()
    # An RDT is good for its own resources only (docs#2011).
    if token.kind == "rdt":
        return None if rdt.covers(token, method, path) else forbidden()
    operation = restricted(method, path)
    if operation is None or operation.optional:
        return None
    # getReportDocument: Amazon wants an RDT for documents of restricted report types only (docs#3432).
    if not operation.generic and not is_restricted_document(path):
        return None
    return forbidden()
