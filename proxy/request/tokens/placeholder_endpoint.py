"""The token endpoint of the proxy: token requests of apps get Amazon's response with a placeholder token.

An app with a library of its own needs only new addresses: the library still fetches tokens, and gets worthless ones.
Nothing that it sends for that, above all no secret, is stored, logged or forwarded.
"""

from collections.abc import Mapping

from aiohttp import ClientError, web

from proxy.amazon.operations import OperationTable
from proxy.amazon.placeholder_tokens import (
    LIFETIME,
    BadTokenRequest,
    Resource,
    access_token_response,
    placeholder_for,
    requested_resources,
)
from proxy.amazon.rdt import METHODS, PATH
from proxy.errors import BadTarget, MalformedRequest, RestrictedDataTokenInvalid, TokenRequestRefused
from proxy.request.authorization import AccessPolicy
from proxy.request.context import RequestContext
from proxy.request.target import split_prefix
from proxy.request.upstream.call import send_100_continue
from proxy.request.upstream.deadlines import DeadlineTimer, RequestDeadline
from proxy.request.upstream.response import PlaceholderResponse
from proxy.request.validation import is_token_request

# Operation names of the two token requests in logs and metrics; the operation table does not have the first one.
LWA_TOKEN = "lwa.token"  # noqa: S105 - a name, no secret
RDT = "tokens.2021-03-01.createRestrictedDataToken"

MAX_BODY = 64 * 1024  # bytes of a request for a token
_SUFFIXES = (PATH, "/auth/o2/token")


class TokenEndpoint:
    """Responds to the two token requests of apps; to the one for RDTs only with `local_rdt`."""

    def __init__(self, table: OperationTable, *, serves_rdt: bool) -> None:
        self._table = table
        self._serves_rdt = serves_rdt

    def match(self, target: str) -> str:
        """Return the operation name of a POST that is handled here, empty for one that is forwarded to Amazon."""
        path = target.partition("?")[0]
        if path.endswith(_SUFFIXES):
            if is_token_request("POST", target):
                return LWA_TOKEN
        elif "%" not in path:
            return ""
        # By the operation table, as Amazon accepts a path with percent-encoded letters, too.
        operation = self._table.match("POST", split_prefix(path)[2]) if self._serves_rdt else None
        return RDT if operation is not None and operation.name == RDT else ""

    async def respond(
        self, request: web.BaseRequest, context: RequestContext, policy: AccessPolicy, deadlines: DeadlineTimer
    ) -> PlaceholderResponse:
        """Return the response.

        Raises TokenRequestRefused, RestrictedDataTokenInvalid, MalformedRequest or NotAllowed.
        """
        with RequestDeadline(deadlines) as deadline:
            body = await _body(request, context, deadline)
        if context.local_operation == LWA_TOKEN:
            content = _access_token(request.headers.get("Content-Type", ""), body)
        else:
            content = self._restricted_data_token(body, policy)
        context.status = 200
        return PlaceholderResponse(content, context.summary())

    def _restricted_data_token(self, body: bytes, policy: AccessPolicy) -> Mapping[str, object]:
        """Return the response of createRestrictedDataToken (model tokens_2021-03-01).

        What it requests must be allowed now, and is checked again when the placeholder is used.
        """
        try:
            resources = [
                self._checked(index, resource, policy) for index, resource in enumerate(requested_resources(body))
            ]
            return {"restrictedDataToken": placeholder_for(resources), "expiresIn": LIFETIME}
        except ValueError as exc:
            raise RestrictedDataTokenInvalid(str(exc), "Send it as Amazon's Tokens API 2021-03-01 specifies.") from exc

    def _checked(self, index: int, resource: Resource, policy: AccessPolicy) -> Resource:
        """Return a resource with the path by which it will be called; raise ValueError or NotAllowed."""
        try:
            # Some libraries take the path from the URL that they call, with the account prefix.
            path = split_prefix(resource.path)[2]
        except BadTarget:
            path = resource.path
        operation = self._table.match(resource.method, path)
        if resource.method not in METHODS or operation is None or not operation.restricted:
            raise ValueError(f"restrictedResources[{index}] is not a restricted operation known to this proxy")
        policy.check_operation(resource.method, operation, "")
        policy.check_elements(set(resource.data_elements))
        is_generic = operation.generic_path and "{" in path
        return Resource(resource.method, operation.template if is_generic else path, resource.data_elements)


def _access_token(content_type: str, body: bytes) -> Mapping[str, object]:
    try:
        return access_token_response(content_type, body)
    except BadTokenRequest as exc:
        raise TokenRequestRefused(str(exc), "Send others to Login with Amazon itself.", error=exc.code) from exc


async def _body(request: web.BaseRequest, context: RequestContext, deadline: RequestDeadline) -> bytes:
    """Return the whole body; raise MalformedRequest, or an error of the endpoint for more than MAX_BODY bytes."""
    chunks: list[bytes] = []
    if not request.body_exists:
        return b""
    send_100_continue(request)
    while True:
        deadline.wait_for_client(context.request_bytes)
        try:
            chunk = await request.content.readany()
        except (web.RequestPayloadError, ClientError, ValueError) as exc:
            raise MalformedRequest("the request's body is not well-formed", "Check its framing.") from exc
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        context.request_bytes += len(chunk)
        if context.request_bytes > MAX_BODY:
            raise _too_large(context)


def _too_large(context: RequestContext) -> TokenRequestRefused | RestrictedDataTokenInvalid:
    message = f"the body is larger than {MAX_BODY} bytes"
    if context.local_operation == LWA_TOKEN:
        return TokenRequestRefused(message)
    return RestrictedDataTokenInvalid(message, "Name fewer resources.")


def describe_token_request(own: str, target: str) -> dict[str, str]:
    """Return what happens with a request that is answered here, in words for a person (`sp-api-proxy explain`)."""
    if own == LWA_TOKEN:
        what = "a placeholder: whatever the app sends as its token, the proxy puts the real one in its place"
        secrets = "not looked at, not kept, not passed on"
    else:
        what = (
            "a placeholder (local_rdt): calls that bring it get the proxy's own Restricted Data Token for what it names"
        )
        secrets = "none needed"
    return {
        "operation": own,
        "answered by": "the proxy itself; nothing is sent to Amazon",
        "token": what,
        "secrets of the app": secrets,
        "path": split_prefix(target)[2].partition("?")[0],
    }
