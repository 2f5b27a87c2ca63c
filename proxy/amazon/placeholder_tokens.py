"""Placeholder tokens for libraries that insist on requesting tokens themselves.

A placeholder access token carries no information: the proxy replaces it with the real one. A placeholder Restricted
Data Token encodes which personal data was requested, for which operations. It is no secret and grants nothing: it is a
request, as the header `x-sp-data-elements` is. Any replica can decode it, and forging one gains nothing.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from proxy.amazon.personal_data import ALL_ELEMENTS

LWA_HOST = "api.amazon.com"
LWA_PATH = "/auth/o2/token"
LIFETIME = 3600  # seconds, as for Amazon's tokens; placeholders do not expire

# Amazon's prefixes: Atza| and Atzr| (LWA "Access Tokens", "Refresh Tokens"), Atc| of grantless tokens (seen in
# docs#432), Atz.sprdt| of Restricted Data Tokens (model tokens_2021-03-01).
ACCESS_TOKEN = "Atza|placeholder-of-sp-api-proxy-which-puts-the-real-token-in-its-place"  # noqa: S105 - no secret
GRANTLESS_TOKEN = "Atc|placeholder-of-sp-api-proxy-which-puts-the-real-token-in-its-place"  # noqa: S105 - no secret
REFRESH_TOKEN = "Atzr|placeholder-of-sp-api-proxy-which-keeps-the-real-token"  # noqa: S105 - no secret
RDT_PREFIX = "Atz.sprdt|sp-api-proxy."

# Characters of a placeholder, which is sent as a header field: HTTP libraries limit its size.
MAX_TOKEN = 8 * 1024
MAX_RESOURCES = 50  # in one request (model tokens_2021-03-01)

_GRANTS = ("refresh_token", "client_credentials")


class BadTokenRequest(Exception):
    """An invalid token request; `code` is an error code of RFC 6749 section 5.2."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Resource(NamedTuple):
    """One restricted resource of a token request: method, path or path template, and data elements."""

    method: str
    path: str
    data_elements: tuple[str, ...]


def access_token_response(content_type: str, body: bytes) -> dict[str, object]:
    """Return the token response of Login with Amazon with placeholders; raise BadTokenRequest.

    Only `grant_type` of the request is read (LWA "Access Tokens"; a form, or JSON).
    """
    grant = _grant_type(content_type, body)
    if grant is None:
        raise BadTokenRequest("invalid_request", "the token request has no grant_type")
    if grant not in _GRANTS:
        raise BadTokenRequest("unsupported_grant_type", "the proxy supports refresh_token and client_credentials only")
    response: dict[str, object] = {
        "access_token": ACCESS_TOKEN if grant == "refresh_token" else GRANTLESS_TOKEN,
        "token_type": "bearer",
        "expires_in": LIFETIME,
    }
    # Amazon returns the refresh token of the request, unchanged (SEED); the proxy must not repeat a real one.
    return response | ({"refresh_token": REFRESH_TOKEN} if grant == "refresh_token" else {})


def _grant_type(content_type: str, body: bytes) -> str | None:
    try:
        text = body.decode()
        # Amazon's Java SDK and the Node and PHP clients send JSON instead of the form of RFC 6749.
        if content_type.partition(";")[0].strip().lower() == "application/json":
            fields: Any = json.loads(text)
        else:
            # max_num_fields bounds the work for a body of separators (bpo-34866).
            fields = dict(parse_qsl(text, max_num_fields=100))
    # RecursionError: json.loads raises it for about a thousand nested brackets (Python's recursion limit).
    except (ValueError, RecursionError):
        return None
    grant = fields.get("grant_type") if isinstance(fields, dict) else None
    return grant if isinstance(grant, str) else None


def requested_resources(body: bytes) -> list[Resource]:
    """Return the resources of a createRestrictedDataToken request; raise ValueError without quoting the body."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ValueError("the body is not JSON") from exc
    requested = content.get("restrictedResources") if isinstance(content, dict) else None
    if not isinstance(requested, list) or not 1 <= len(requested) <= MAX_RESOURCES:
        raise ValueError(f"restrictedResources must be a list of 1 to {MAX_RESOURCES}")
    if content.get("targetApplication") is not None:
        raise ValueError("targetApplication needs a token of Amazon's, but local_rdt: true returns placeholders")
    return [_resource(f"restrictedResources[{index}]", item) for index, item in enumerate(requested)]


def _resource(where: str, item: object) -> Resource:
    fields = item if isinstance(item, dict) else {}
    method, path, elements = fields.get("method"), fields.get("path"), fields.get("dataElements") or []
    if not isinstance(method, str) or not isinstance(path, str) or not path.startswith("/"):
        raise ValueError(f"{where} must have a method and a path")
    if "?" in path:
        raise ValueError(f"{where}.path must be a path without a query")
    if not isinstance(elements, list) or not all(element in ALL_ELEMENTS for element in elements):
        raise ValueError(f"{where}.dataElements must be a list of {', '.join(ALL_ELEMENTS)}")
    # In the order of ALL_ELEMENTS, so that equal requests give equal placeholders.
    return Resource(method, path, tuple(element for element in ALL_ELEMENTS if element in elements))


def placeholder_for(resources: Iterable[Resource]) -> str:
    """Return the placeholder Restricted Data Token for resources; raise ValueError where it would be too long."""
    content = json.dumps(list(dict.fromkeys(resources)), separators=(",", ":")).encode()
    # RFC 4648 section 5: URL-safe, and the padding can be left out, because the length implies it.
    text = RDT_PREFIX + base64.urlsafe_b64encode(content).decode().rstrip("=")
    if len(text) > MAX_TOKEN:
        raise ValueError(
            "restrictedResources are too long for one token: name fewer, or use path templates with {orderId}"
        )
    return text


# At most 1 MiB of placeholders (128 of MAX_TOKEN); lru_cache does not keep exceptions, so malformed ones take no room.
@lru_cache(maxsize=128)
def resources_in(placeholder: str) -> Sequence[Resource]:
    """Return the resources of a placeholder Restricted Data Token; raise ValueError for a malformed one."""
    if len(placeholder) > MAX_TOKEN:
        raise ValueError("too long")
    text = placeholder.removeprefix(RDT_PREFIX)
    try:
        # validate: without it, b64decode ignores foreign characters, and many texts would be one placeholder.
        content: Any = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
        return tuple(_complete_resources(method, path, elements) for method, path, elements in content)
    except (binascii.Error, ValueError, TypeError, RecursionError) as exc:
        raise ValueError("malformed") from exc


def _complete_resources(method: object, path: object, elements: object) -> Resource:
    if not isinstance(method, str) or not isinstance(path, str) or not isinstance(elements, list):
        raise TypeError
    if not all(element in ALL_ELEMENTS for element in elements):
        raise ValueError
    return Resource(method, path, tuple(elements))
