"""Token requests to Login with Amazon, and their responses.

Single requests without a clock and without state: `request/tokens` caches and refreshes tokens.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from proxy.amazon.error_response import parse_object
from proxy.config import Secret

# A larger response is not a token response (an access token has at most 2048 bytes, LWA "Access Tokens").
MAX_RESPONSE = 64 * 1024
# Eight times the documented 2048 bytes of access and refresh tokens: Restricted Data Tokens are parsed here too, and
# Amazon publishes no size for them.
MAX_TOKEN = 16 * 1024

# Permanent errors: no retry succeeds until a person acts (LWA "Access Tokens", RFC 6749 section 5.2).
# access_denied is not in section 5.2: Amazon's Python SDK maps 403 to it. server_error and temporarily_unavailable are
# left out on purpose: they are outages (models#4997, 2025-10-20).
OAUTH_ERRORS = frozenset(
    {"invalid_grant", "invalid_client", "unauthorized_client", "invalid_scope", "invalid_request",
     "unsupported_grant_type", "access_denied"}
)  # fmt: skip


# Posts headers and a body to a URL; returns the status, and the body up to one byte more than the given limit, so that
# the caller can detect a longer one. It must not follow redirects: they would send the secrets to another host.
Post = Callable[[str, Mapping[str, str], bytes, int], Awaitable[tuple[int, bytes]]]


@dataclass(frozen=True, slots=True)
class TokenResponse:
    """A token response (RFC 6749 section 5.1); `expires_in` is the lifetime in seconds."""

    value: Secret
    expires_in: float


class OAuthError(Exception):
    """The credentials are rejected permanently. `reason` is an OAuth error code, `request_id` Amazon's request id."""

    def __init__(self, reason: str, request_id: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.request_id = request_id


class TokenRequestFailed(Exception):
    """The token request failed; a retry may succeed. `reason` is a short word for metrics and logs."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


async def refresh_token_grant(
    post: Post, url: str, client_id: str, client_secret: Secret, refresh_token: Secret
) -> TokenResponse:
    """Exchange a seller's refresh token for an access token (SEED "Request a Login with Amazon access token").

    Raises OAuthError, TokenRequestFailed, and what `post` raises.
    """
    form = {"grant_type": "refresh_token", "refresh_token": refresh_token.reveal()}
    return await _request_token(post, url, client_id, client_secret, form)


async def client_credentials_grant(
    post: Post, url: str, client_id: str, client_secret: Secret, scope: str
) -> TokenResponse:
    """Request a token for grantless operations (DOC "Grantless Operations"); raise as `refresh_token_grant` does."""
    form = {"grant_type": "client_credentials", "scope": scope}
    return await _request_token(post, url, client_id, client_secret, form)


async def authorization_code_grant(
    post: Post, url: str, client_id: str, client_secret: Secret, code: Secret, redirect_uri: str | None
) -> Secret:
    """Exchange an authorization code for a refresh token (DOC "Website Authorization Workflow").

    A code is valid once, within five minutes of the consent. Raises as `refresh_token_grant`.
    """
    # RFC 6749 section 4.1.3: redirect_uri must be sent, unchanged, if the authorization request had one.
    form = {"grant_type": "authorization_code", "code": code.reveal()}
    if redirect_uri is not None:
        form["redirect_uri"] = redirect_uri
    status, body = await _post_form(post, url, client_id, client_secret, form)
    # Called for its errors: an OAuth error must not be reported as a missing refresh token.
    parse_response(status, body)
    return parse_token(parse_object(body).get("refresh_token"))


async def _request_token(
    post: Post, url: str, client_id: str, client_secret: Secret, grant: Mapping[str, str]
) -> TokenResponse:
    return parse_response(*await _post_form(post, url, client_id, client_secret, grant))


async def _post_form(
    post: Post, url: str, client_id: str, client_secret: Secret, grant: Mapping[str, str]
) -> tuple[int, bytes]:
    # RFC 6749 section 2.3.1 prefers HTTP Basic; Amazon documents client id and secret in the form (SEED).
    form = {**grant, "client_id": client_id, "client_secret": client_secret.reveal()}
    headers = {"Content-Type": "application/x-www-form-urlencoded;charset=UTF-8", "Accept": "application/json"}
    # urlencode, because tokens contain `|` (`Atzr|…`), which has to be escaped in a form.
    return await limited_post(post, url, headers, urlencode(form).encode())


async def limited_post(post: Post, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
    """Return status and body of a response; raise TokenRequestFailed if it is longer than MAX_RESPONSE."""
    status, response = await post(url, headers, body, MAX_RESPONSE)
    if len(response) > MAX_RESPONSE:
        raise TokenRequestFailed("answer_too_large")
    return status, response


def parse_response(status: int, body: bytes) -> TokenResponse:
    """Return the token response of Login with Amazon; raise OAuthError or TokenRequestFailed."""
    response = parse_object(body)
    if status == 200:
        return parse_token_response(response.get("access_token"), response.get("expires_in"))
    reason = response.get("error")
    # No rate limit of the token host is published: a 429 is treated like a 503, never as a rejected credential.
    if 400 <= status < 500 and status != 429 and isinstance(reason, str) and reason in OAUTH_ERRORS:
        request_id = response.get("request_id")
        raise OAuthError(reason, request_id if isinstance(request_id, str) else "")
    raise TokenRequestFailed(f"http_{status}")


def parse_token_response(value: object, expires_in: object) -> TokenResponse:
    """Return the TokenResponse of a token and its lifetime; raise TokenRequestFailed if the token is malformed."""
    return TokenResponse(parse_token(value), parse_lifetime(expires_in))


def parse_token(value: object) -> Secret:
    """Return a token; raise TokenRequestFailed for a missing or malformed one."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TOKEN:
        raise TokenRequestFailed("no_token")
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise TokenRequestFailed("malformed_token")  # it is sent in a header: a line break would allow header injection
    return Secret(value)


def parse_lifetime(expires_in: object) -> float:
    """Return a lifetime in seconds, at most an hour (LWA "Access Tokens"); 0 (use once) for an invalid value."""
    # isascii: int() rejects some characters that isdigit accepts, such as `²`. The length bounds the cost of int()
    # (CVE-2020-10735).
    if isinstance(expires_in, str) and expires_in.isascii() and expires_in.isdigit() and len(expires_in) < 10:
        expires_in = int(expires_in)
    # bool is a subclass of int. `not … > 0` instead of `<= 0`: json.loads accepts NaN, which compares false.
    if isinstance(expires_in, bool) or not isinstance(expires_in, (int, float)) or not expires_in > 0:
        return 0.0
    return float(min(expires_in, 3600))
