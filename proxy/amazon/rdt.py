"""How is a Restricted Data Token asked for, and what do the answers mean (DOC "Tokens API", tokens_2021-03-01)?"""

import json
from collections.abc import Mapping, Sequence

import aiohttp

from proxy.amazon.lwa import MAX_ANSWER, ExchangeFailed, Grant, parse_grant, parse_object, read_bounded

PATH = "/tokens/2021-03-01/restrictedDataToken"

# The methods that createRestrictedDataToken takes; PATCH is not among them.
METHODS = frozenset({"GET", "PUT", "POST", "DELETE"})

_NOT_A_RESTRICTED_DOCUMENT = "Invalid or unsupported document ID found"


class RdtRefused(Exception):
    """Amazon refuses the token for this call; `message` is Amazon's own text, without personal data."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}")
        self.status = status
        self.message = message

    @property
    def means_unrestricted(self) -> bool:
        """Whether the report document is of a type that needs no RDT (the ordinary token serves)."""
        return self.status == 400 and _NOT_A_RESTRICTED_DOCUMENT in self.message


async def create_restricted_data_token(
    session: aiohttp.ClientSession,
    endpoint: str,
    headers: Mapping[str, str],
    method: str,
    path: str,
    data_elements: Sequence[str],
) -> Grant:
    """Mint an RDT for one method and path at the region's `endpoint`; `headers` carry the seller's ordinary token.

    `path` has no query string and no trailing slash. Raises RdtRefused, ExchangeFailed, and what the session raises.
    """
    resource: dict[str, object] = {"method": method, "path": path}
    if data_elements:
        resource["dataElements"] = list(data_elements)
    body = json.dumps({"restrictedResources": [resource]}).encode()
    all_headers = {**headers, "Content-Type": "application/json", "Accept": "application/json"}
    async with session.post(endpoint + PATH, data=body, headers=all_headers, allow_redirects=False) as response:
        return parse_answer(response.status, await read_bounded(response, MAX_ANSWER))


def parse_answer(status: int, body: bytes) -> Grant:
    """Return the Grant of an answer; raise RdtRefused for a refusal and ExchangeFailed for anything else."""
    answer = parse_object(body)
    if status == 200:
        payload = answer.get("payload")
        fields = payload if isinstance(payload, dict) else answer  # old guide pages nest them in `payload`
        return parse_grant(fields.get("restrictedDataToken"), fields.get("expiresIn"))
    if status in {400, 401, 403, 404}:
        raise RdtRefused(status, _message(answer))
    raise ExchangeFailed(f"http_{status}")


def _message(answer: Mapping[str, object]) -> str:
    errors = answer.get("errors")
    first = errors[0] if isinstance(errors, list) and errors else None
    message = first.get("message") if isinstance(first, dict) else None
    text = message if isinstance(message, str) else "no reason given"
    return "".join(character for character in text if character.isprintable())[:300]
