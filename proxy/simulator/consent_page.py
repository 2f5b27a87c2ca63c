"""The consent page of a selling partner (DOC "Website Authorization Workflow").

Amazon's consent page is on Seller Central; here it is on the port of each region, because authorisations are regional.
There is no sign-in: the selling partner is always the fictitious one.
"""

import secrets
from html import escape
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from proxy.simulator.responses import Response
from proxy.simulator.state import Code, State, WebApplication

PATH = "/apps/authorize/"
CODE_LIFETIME = 300.0  # seconds
SELLING_PARTNER = "A1SIMULATEDSELLER"

_CONSENT, _CONFIRM, _CANCEL = f"{PATH}consent", f"{PATH}confirm/", f"{PATH}cancel/"


def page(state: State, region: str, method: str, path: str, query: str) -> Response:
    """Return the consent page, or where its buttons lead: to the application's redirect address."""
    if method != "GET":
        return _page(405, "There is nothing to send here")
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        return _page(400, "Error Code: MD1000")
    if path == _CONSENT:
        return _consent(state, given)
    for prefix, response in ((_CONFIRM, _confirmed), (_CANCEL, _cancelled)):
        if path.startswith(prefix):
            application = state.applications.get(unquote(path.removeprefix(prefix)))
            if application is not None and given.get("redirect_uri") in application.redirect_uris:
                return response(state, region, application, given)
    return _page(404, "There is nothing here")


def _consent(state: State, given: dict[str, str]) -> Response:
    name = given.get("application_id", "")
    application = state.applications.get(name)
    if application is None or application.is_draft != (given.get("version") == "beta"):
        # A draft needs version=beta, a published application must not have it (amzn/selling-partner-api-docs#265).
        return _page(400, "Error Code: MD1000")
    redirect_uri = given.get("redirect_uri", application.redirect_uris[0])
    if redirect_uri not in application.redirect_uris:
        return _page(400, "Error Code: MD5101")
    query = urlencode({"state": given.get("state", ""), "redirect_uri": redirect_uri})
    links = (
        f'<a id="{button}" href="{escape(f"{path}{name}?{query}")}">{button.title()}</a>'
        for button, path in (("confirm", _CONFIRM), ("cancel", _CANCEL))
    )
    return _page(200, f"{escape(name)} asks for access to the made-up seller's data", " ".join(links))


def _confirmed(state: State, region: str, application: WebApplication, given: dict[str, str]) -> Response:
    code = f"S{secrets.token_urlsafe(16)}"
    state.codes[code] = Code(application.client_id, region, given["redirect_uri"], state.now() + CODE_LIFETIME)
    response = {"state": given.get("state", ""), "selling_partner_id": SELLING_PARTNER, "spapi_oauth_code": code}
    return _redirect(given["redirect_uri"], response)


def _cancelled(_: State, __: str, ___: WebApplication, given: dict[str, str]) -> Response:
    # As Login with Amazon does it (LWA "Authorization Code Grant"); Seller Central's own way is not documented.
    description = "The resource owner denied the request"
    response = {"state": given.get("state", ""), "error": "access_denied", "error_description": description}
    return _redirect(given["redirect_uri"], response)


def _redirect(to: str, response: dict[str, str]) -> Response:
    joint = "&" if urlsplit(to).query else "?"
    return Response(302, b"", {"Location": f"{to}{joint}{urlencode(response)}", "Referrer-Policy": "no-referrer"})


def _page(status: int, title: str, content: str = "") -> Response:
    text = f"<!doctype html><title>Simulator</title><h1>{title}</h1>{content}"
    return Response(status, text.encode(), {"Content-Type": "text/html; charset=utf-8"})
