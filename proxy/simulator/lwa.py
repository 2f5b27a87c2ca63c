"""The token endpoint of Login with Amazon (LWA "Access Tokens", DOC "Grantless Operations")."""

import hmac
import json
import secrets
from urllib.parse import parse_qs

from proxy.simulator.responses import Response, as_json, request_id
from proxy.simulator.state import SCOPES, Issued, Seller, State

PATH = "/auth/o2/token"


def exchange(state: State, method: str, path: str, content_type: str, body: bytes) -> Response:
    """Return the answer to one token request."""
    if path != PATH:
        return _refused(404, "not_found", "There is nothing here")
    if method != "POST":
        return _refused(405, "invalid_request", "The token address takes POST")
    fields = _fields(content_type, body)
    if fields is None:
        return _refused(400, "invalid_request", "The request is missing a required parameter : grant_type")
    return _granted(state, fields)


def _fields(content_type: str, body: bytes) -> dict[str, str] | None:
    """Return the form's fields, or those of a JSON object: both are taken."""
    kind = content_type.partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            content = json.loads(body)
            return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else None
        if kind == "application/x-www-form-urlencoded":
            return {key: values[0] for key, values in parse_qs(body.decode()).items() if len(values) == 1}
    except (ValueError, UnicodeDecodeError):
        return None
    return None


def _granted(state: State, fields: dict[str, str]) -> Response:
    grant, client = fields.get("grant_type"), fields.get("client_id", "")
    if grant not in {"refresh_token", "client_credentials", "authorization_code"}:
        return _refused(400, "unsupported_grant_type", "The authorization grant type is not supported")
    secret = fields.get("client_secret", "")
    if not any(hmac.compare_digest(secret, known) for known in state.clients.get(client, ())):
        return _refused(401, "invalid_client", "Client authentication failed")
    if grant == "authorization_code":
        state.count(f"exchanges.{grant}")
        return _for_code(state, client, fields)
    if ("refresh_token" in fields) == ("scope" in fields):
        return _refused(400, "invalid_request", "The request takes either refresh_token or scope")
    if (grant == "refresh_token") != ("refresh_token" in fields):
        return _refused(400, "invalid_request", "The request is missing a required parameter")
    state.count(f"exchanges.{grant}")
    return _for_seller(state, client, fields) if grant == "refresh_token" else _for_scope(state, client, fields)


def _for_seller(state: State, client: str, fields: dict[str, str]) -> Response:
    refresh_token = fields["refresh_token"]
    seller = state.sellers.get(refresh_token)
    if seller is None or refresh_token in state.revoked_sellers:
        return _refused(400, "invalid_grant", "The request has an invalid grant parameter : refresh_token")
    if seller.client_id != client:
        return _refused(400, "unauthorized_client", "Not authorized for requested operation")
    issued = Issued("lwa", client, state.now() + state.lifetime, seller.name, seller.region)
    state.count(f"exchanges.seller.{seller.name}.{seller.region}")
    return as_json(200, {**_token(state, "Atza|", issued), "refresh_token": refresh_token})


def _for_code(state: State, client: str, fields: dict[str, str]) -> Response:
    """Exchange an authorization code, once, for a new authorisation (LWA "Authorization Code Grant")."""
    if not fields.get("code"):
        return _refused(400, "invalid_request", "The request is missing a required parameter : code")
    code = state.codes.pop(fields["code"], None)
    is_good = (
        code is not None
        and code.client_id == client
        and state.now() < code.expires_at
        and fields.get("redirect_uri", code.redirect_uri) == code.redirect_uri
    )
    if code is None or not is_good:
        return _refused(400, "invalid_grant", "The request has an invalid grant parameter : code")
    refresh_token = f"Atzr|{secrets.token_urlsafe(256)}"
    state.sellers[refresh_token] = Seller("authorised", code.region, refresh_token, client)
    issued = Issued("lwa", client, state.now() + state.lifetime, "authorised", code.region)
    return as_json(200, {**_token(state, "Atza|", issued), "refresh_token": refresh_token})


def _for_scope(state: State, client: str, fields: dict[str, str]) -> Response:
    scopes = tuple(fields["scope"].split(" "))
    if not set(scopes) <= set(SCOPES):
        return _refused(400, "invalid_scope", "The request has an invalid parameter : scope")
    issued = Issued("grantless", client, state.now() + state.lifetime, scopes=scopes)
    return as_json(200, _token(state, "Atc|", issued))


def _token(state: State, prefix: str, issued: Issued) -> dict[str, object]:
    lifetime = int(state.lifetime) if state.lifetime == int(state.lifetime) else state.lifetime
    return {"access_token": state.issue(prefix, issued), "token_type": "bearer", "expires_in": lifetime}


def _refused(status: int, error: str, description: str) -> Response:
    return as_json(status, {"error": error, "error_description": description, "request_id": request_id()})
