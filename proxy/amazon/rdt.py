"""Requests for Restricted Data Tokens, and their responses (DOC "Tokens API", model tokens_2021-03-01)."""

import json
import re
from collections.abc import Mapping, Sequence

from proxy.amazon.error_response import AmazonError, parse_error, parse_object
from proxy.amazon.lwa import Post, TokenRequestFailed, TokenResponse, limited_post, parse_token_response

PATH = "/tokens/2021-03-01/restrictedDataToken"

# The methods that createRestrictedDataToken accepts; PATCH is not one of them.
METHODS = frozenset({"GET", "PUT", "POST", "DELETE"})

# Amazon's texts, because all these 400s have the same code, InvalidInput (jlevers/selling-partner-api#897 and #662;
# models#1723 for the elements).
_NOT_A_RESTRICTED_DOCUMENT = "Invalid or unsupported document ID found"
_ELEMENTS = re.compile(r"requested data elements: \[([^\]]*)\]")


class RdtRefused(Exception):
    """Amazon denies the token for this request; `refusal` is its error."""

    def __init__(self, status: int, amazon_error: AmazonError) -> None:
        super().__init__(f"{status} {amazon_error.message}")
        self.status = status
        self.refusal = amazon_error

    @property
    def means_unrestricted(self) -> bool:
        """Whether the report document is of a type that needs no RDT (the access token is enough)."""
        return self.status == 400 and _NOT_A_RESTRICTED_DOCUMENT in self.refusal.message

    @property
    def refused_elements(self) -> frozenset[str]:
        """The data elements that the application has no role for; a single one fails the whole request."""
        named = _ELEMENTS.search(self.refusal.message) if self.status == 400 else None
        return frozenset(name.strip() for name in named[1].split(",")) - {""} if named else frozenset()


async def create_restricted_data_token(
    post: Post,
    endpoint: str,
    headers: Mapping[str, str],
    method: str,
    path: str,
    data_elements: Sequence[str],
    target_application: str | None = None,
) -> TokenResponse:
    """Create an RDT for one method and path at the region's `endpoint`; `headers` carry the seller's access token.

    `path` has no query string and no trailing slash: Amazon compares it exactly, and has rejected a slash since
    2022-09-10 (docs#2553). With `target_application`, only that application can use the token (delegation). Raises
    RdtRefused, TokenRequestFailed, and what `post` raises.
    """
    resource: dict[str, object] = {"method": method, "path": path}
    # Only getOrders, getOrder and getOrderItems take dataElements (model tokens_2021-03-01).
    if data_elements:
        resource["dataElements"] = list(data_elements)
    request: dict[str, object] = {"restrictedResources": [resource]}
    # For delegation only: a user reports that naming the application itself breaks the token (docs#1201).
    if target_application:
        request["targetApplication"] = target_application
    body = json.dumps(request).encode()
    all_headers = {**headers, "Content-Type": "application/json", "Accept": "application/json"}
    return parse_response(*await limited_post(post, endpoint + PATH, all_headers, body))


def parse_response(status: int, body: bytes) -> TokenResponse:
    """Return the token response; raise RdtRefused for a denial and TokenRequestFailed for anything else."""
    response = parse_object(body)
    if status == 200:
        payload = response.get("payload")
        fields = payload if isinstance(payload, dict) else response  # old guides nest them in `payload` (models#1316)
        return parse_token_response(fields.get("restrictedDataToken"), fields.get("expiresIn"))
    # 429 and 5xx are left to TokenRequestFailed, because they say nothing about the permission.
    if status in {400, 401, 403, 404}:
        raise RdtRefused(status, parse_error(body))
    raise TokenRequestFailed(f"http_{status}")
