"""One request on its way to Amazon, with its route, its deadline and its replayable body."""

from collections.abc import AsyncIterator

from aiohttp import ClientError, web
from aiohttp.http import HttpVersion11

from proxy.errors import MalformedRequest
from proxy.request.context import RequestContext
from proxy.request.header_cache import HeaderBlock
from proxy.request.routing import Route
from proxy.request.upstream.deadlines import RequestDeadline
from proxy.request.upstream.token_redaction import NullRedactor, TokenRedactor

MAX_BUFFERED = 128 * 1024  # bytes of an app's body that are kept for another attempt

_NO_REDACTION = NullRedactor()


class UpstreamCall:
    """One request on its way to Amazon.

    The body is streamed as it arrives, and kept up to MAX_BUFFERED bytes so that it can be sent again.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        head: HeaderBlock,
        route: Route,
        context: RequestContext,
        deadline: RequestDeadline,
    ) -> None:
        self.request = request
        self.headers = head
        self.route = route
        self.context = context
        self.deadline = deadline
        self.has_account_slot = False  # of the account's concurrency limit at Amazon
        self.needs_fresh_connection = False  # the last attempt failed on a connection that had been idle
        self.redactor: TokenRedactor = _NO_REDACTION  # for the token that was sent with it
        self._kept: list[bytes] | None = []  # None once the body is larger than MAX_BUFFERED
        self._kept_size = 0
        self._is_read = not request.body_exists

    @property
    def is_replayable(self) -> bool:
        """Whether the whole body is buffered, so that it can be sent again."""
        return self._is_read and self._kept is not None

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body: as it arrives the first time, from the buffer after that.

        Raises MalformedRequest where its framing is wrong.
        """
        if self._is_read:
            for chunk in self._kept or ():
                yield chunk
            return
        send_100_continue(self.request)
        while chunk := await self._next():
            self._keep(chunk)
            self.context.request_bytes += len(chunk)
            yield chunk
        self._is_read = True

    def buffered_body(self) -> bytes | None:
        """Return the body where all of it has arrived, None where some is still to be waited for."""
        content = self.request.content
        if not self._is_read and content.is_eof() and content.exception() is None:
            self._is_read = True
            data = content.read_nowait()
            self._keep(data)
            self.context.request_bytes += len(data)
            return data
        return b"".join(self._kept) if self._is_read and self._kept is not None else None

    async def _next(self) -> bytes:
        self.deadline.wait_for_client(self.context.request_bytes)
        try:
            chunk = await self.request.content.readany()
        except (web.RequestPayloadError, ClientError, ValueError) as exc:
            error = MalformedRequest("the request's body is not well-formed", "Check its framing.")
            self.context.upload_error = error
            raise error from exc
        self.deadline.wait_for_upstream()
        return chunk

    def _keep(self, chunk: bytes) -> None:
        self._kept_size += len(chunk)
        if self._kept is not None and self._kept_size <= MAX_BUFFERED:
            self._kept.append(chunk)
        else:
            self._kept = None


def send_100_continue(request: web.BaseRequest) -> None:
    """Tell an app that waits for it to send its body (RFC 9110 section 10.1.1); all checks have passed by now."""
    expects = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
    if expects and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
