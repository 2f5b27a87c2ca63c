"""Request handler: the only module that knows the order of the steps (see `proxy.request`)."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aiohttp import web

from proxy.amazon.error_response import AmazonError, parse_error
from proxy.config import Config, Listener
from proxy.errors import CallerRefused, InternalError, ProxyError
from proxy.observability.logging import LOGGER
from proxy.observability.metrics import Metrics
from proxy.observability.request_history import RequestHistory
from proxy.request.access_log import CLIENT_CLOSED_REQUEST, record_request
from proxy.request.authentication import ANONYMOUS, CallerAuthenticator, peer_of
from proxy.request.authorization import AccessPolicy
from proxy.request.context import RequestContext
from proxy.request.forbidden_hints import FORBIDDEN_STATUSES, SuccessHistory
from proxy.request.header_cache import HeaderBlock, HeaderCache
from proxy.request.ratelimit.concurrency import ConcurrencyLimiter
from proxy.request.ratelimit.limiter import RATE_HEADER, RateLimiter
from proxy.request.request_options import AdmissionRequest, RequestOptions, parse_options
from proxy.request.route_cache import RouteCache
from proxy.request.token import Token
from proxy.request.tokens.placeholder_endpoint import TokenEndpoint
from proxy.request.tokens.provider import TokenProvider
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.request.upstream.call import UpstreamCall
from proxy.request.upstream.circuit_breaker import CircuitBreakers
from proxy.request.upstream.content_coding import decompress
from proxy.request.upstream.deadlines import DeadlineTimer, RequestDeadline
from proxy.request.upstream.error_response import add_browser_hint, error_response
from proxy.request.upstream.forward import MAX_ERROR_BODY, Forwarder, peek
from proxy.request.upstream.http1 import Response
from proxy.request.upstream.request_headers import check_body
from proxy.request.upstream.response import ErrorResponse, PlaceholderResponse, UpstreamResponse
from proxy.request.upstream.retry import CONNECTION_ERRORS, RETRIED_STATUSES, RetryPolicies, RetryState
from proxy.request.validation import AllowedHosts, ValidatedTarget, check_message, validate_with

if TYPE_CHECKING:  # loaded only if they are configured
    from proxy.request.documents.relay_rewrite import DocumentRewriter  # needs `cryptography`
    from proxy.request.documents.relay_serve import DocumentServer  # as above
    from proxy.request.tracing import Tracer  # needs OpenTelemetry, an extra

# Longer than a look-up needs, much shorter than the safety margin of a token (2 s), which covers the time until then.
TOKEN_RECHECK_AFTER = 0.05  # seconds of waiting after which a token may have expired or been replaced


@dataclass(slots=True)
class Handler:
    """Serves the requests of one listener; never changed after it was made. `now` is a monotonic clock in seconds."""

    config: Config
    listener: Listener
    name: str  # of the listener, for metrics and logs
    allowed_hosts: AllowedHosts
    header_cache: HeaderCache
    authenticator: CallerAuthenticator
    policies: Mapping[str, AccessPolicy]  # by caller
    concurrency: ConcurrencyLimiter
    routes: RouteCache
    token_endpoint: TokenEndpoint
    rate_limiter: RateLimiter
    tokens: TokenProvider
    forwarder: Forwarder
    retry_policies: RetryPolicies
    circuit_breakers: CircuitBreakers
    unrestricted_reports: UnrestrictedReports
    success_history: SuccessHistory
    deadline_timer: DeadlineTimer
    metrics: Metrics
    tracer: "Tracer | None" = None
    document_rewriter: "DocumentRewriter | None" = None
    document_server: "DocumentServer | None" = None
    history: RequestHistory | None = None  # None without an admin address
    now: Callable[[], float] = time.monotonic
    # Settings that every request reads, without the attributes in between.
    _max_wait: float = field(init=False)
    _header_size: int = field(init=False)

    def __post_init__(self) -> None:
        self._max_wait = self.config.limits.max_wait
        self._header_size = self.config.bounds.header_size

    async def handle(self, request: web.BaseRequest) -> UpstreamResponse | PlaceholderResponse | ErrorResponse:
        """Serve one request: every outcome is counted and logged once.

        Raise ConnectionAbortedError for an error after the response has begun: a second response in its body would be
        taken for a part of it.
        """
        tracer, now = self.tracer, self.now
        # First: whatever happens below is counted and logged by the `finally`.
        context = RequestContext(request.method, now()) if tracer is None else tracer.begin(request.method, now())
        self.metrics.in_flight += 1
        # None until the slot is taken, so that the `finally` releases only a slot that this request has.
        counted_caller: str | None = None
        validated: ValidatedTarget | None = None
        response: UpstreamResponse | PlaceholderResponse | ErrorResponse
        try:
            head = self.header_cache.get(request.raw_headers, request.headers, getattr(request, "head_block", None))
            # Before the authentication: Host and browser checks come before anything that depends on a credential.
            validated = self._validate(request, head, context)
            if self.authenticator.is_configured:
                context.caller = self._authenticate(request, head, validated)
            # After the authentication, so that strangers cannot use up a caller's slots.
            self.concurrency.acquire_caller(context.caller or self.name)
            counted_caller = context.caller or self.name
            response = await self._respond(request, head, validated, context)
        except ProxyError as error:
            # What an unknown caller asked for is not looked up.
            if validated is not None and context.route is None and not isinstance(error, CallerRefused):
                context.local_operation = context.local_operation or self.routes.operation_at(
                    request.method, validated.target
                )
                add_browser_hint(error, request.method, validated.target, self.config.admin)
            response = error_response(request, error, context)
        except asyncio.CancelledError:
            # The client has left. CancelledError is a BaseException (Python 3.8, bpo-32528): `except Exception` below
            # does not catch it.
            context.status, context.error = CLIENT_CLOSED_REQUEST, "ClientLeft"
            raise
        except Exception as exc:  # noqa: BLE001 - a bug must not leave the client without a response
            LOGGER.error("internal error", exc_info=exc)
            response = error_response(
                request, InternalError("the proxy failed", "Its log says more; try again."), context
            )
        finally:
            self.metrics.in_flight -= 1
            if counted_caller is not None:
                self.concurrency.release_caller(counted_caller)
            record_request(context, now() - context.started, self.metrics, self.history, self.name)
            if tracer is not None:
                tracer.end(context, request.headers)
        return response

    def _validate(self, request: web.BaseRequest, head: HeaderBlock, context: RequestContext) -> ValidatedTarget:
        """Return the validated target; raise the error that says what is invalid."""
        if "x-request-id" in head.names:
            context.request_id = head.headers["x-request-id"]
        # First the size and the version, which are cheap and bound the work of the other checks.
        check_message(request, head, self._header_size)
        validated = validate_with(head, request.method, request.raw_path, self.allowed_hosts)
        check_body(request.method, head)
        return validated

    def _authenticate(self, request: web.BaseRequest, head: HeaderBlock, validated: ValidatedTarget) -> str:
        """Return the caller's name; raise CallerRefused."""
        try:
            return self.authenticator.authenticate(head.headers, peer_of(request), self.listener)
        except CallerRefused:
            # Libraries send token requests without the headers that they add to calls. A placeholder token is worthless
            # to a stranger, so anyone may have one.
            if validated.is_token_request:
                return ANONYMOUS
            raise

    async def _respond(
        self, request: web.BaseRequest, head: HeaderBlock, validated: ValidatedTarget, context: RequestContext
    ) -> UpstreamResponse | PlaceholderResponse:
        """Route, forward and stream; or serve a token request or a document, which need neither plan nor token."""
        headers, policy = head.headers, self.policies[context.caller]
        documents, rewriter = self.document_server, self.document_rewriter
        # Before the route: token requests and documents are no operations of SP-API.
        if request.method == "POST" and (operation := self.token_endpoint.match(validated.target)):
            context.local_operation = operation
            return await self.token_endpoint.respond(request, context, policy, self.deadline_timer)
        if documents is not None and documents.matches(validated.target):
            return await self._serve_document(documents, request, head, validated, context)
        # Only counted: the forwarder drops the client's token and sets its own (Envoy's credential injector:
        # `overwrite`).
        if "x-amz-access-token" in head.names:
            self.metrics.replaced_tokens.inc()
        context.route = route = self.routes.get(request.method, validated, headers, context.caller, policy)
        options = parse_options(headers, head.names, (self.name, context.caller), self._max_wait)
        with RequestDeadline(self.deadline_timer, options.timeout) as deadline:
            call = UpstreamCall(request, head, route, context, deadline)
            try:
                response, prefix = await self._send_with_retries(call, options)
                if rewriter is not None and rewriter.should_rewrite(route, response):
                    return await rewriter.rewrite(call, response, self.listener)
                tap = self.unrestricted_reports.tap(route, response)
                return await self.forwarder.stream(call, response, prefix=prefix, tap=tap)
            finally:
                # Only after the body: a slot counts a call until its response has been forwarded in full.
                if call.has_account_slot:
                    self.concurrency.release_account(route.account)
                if call.redactor.matched:
                    self.metrics.redacted_tokens.inc()

    async def _serve_document(
        self,
        documents: "DocumentServer",
        request: web.BaseRequest,
        head: HeaderBlock,
        validated: ValidatedTarget,
        context: RequestContext,
    ) -> UpstreamResponse:
        """Serve a document: without a token, and outside the usage plans."""
        policy = self.policies[context.caller]
        opened = documents.open(request.method, validated, head, self.listener, context.caller, policy)
        context.route, context.data_elements = opened.target, opened.elements
        options = parse_options(head.headers, head.names, (self.name, context.caller), self._max_wait)
        with RequestDeadline(self.deadline_timer, options.timeout) as deadline:
            call = UpstreamCall(request, head, opened.target, context, deadline)
            return await documents.fetch(call, decompress=opened.decompress)

    async def _send_with_retries(self, call: UpstreamCall, options: RequestOptions) -> tuple[Response, bytes]:
        """Admit, forward and judge a call, again while that is right; return the response and the start of its body.

        Raise the error of the last attempt where it had no response.
        """
        route, context, admission = call.route, call.context, options.admission
        # Once per request, not per attempt: retries are limited to a share of the requests.
        self.retry_policies.deposit(route)
        retry_state: RetryState | None = None
        while True:
            # Admit: not in a coroutine of its own, whose creation would cost time although calls rarely wait.
            self.circuit_breakers.check((route.environment, route.region))
            # The token comes first: a call that has its rate limit token must reach Amazon without another wait.
            token = self.tokens.cached(route.token_key) or await self._token(call)
            # The rate limit token before the slot: without capacity no slot is held while the call waits.
            has_capacity = self.rate_limiter.try_acquire(route, admission)
            if not has_capacity or not (call.has_account_slot or self.concurrency.try_acquire_account(route.account)):
                token = await self._wait_for_admission(call, admission, token, has_capacity=has_capacity)
            call.has_account_slot = True
            try:
                response = await self._forward(call, token)
            except CONNECTION_ERRORS:
                retry_state = retry_state or self.retry_policies.start(call, may_repeat=options.retry_enabled)
                backoff = retry_state.backoff_after_error(call)
                if backoff is None:
                    raise
            else:
                if response.status == 429:
                    # The client's limit is for all attempts together.
                    max_wait = options.admission.max_wait - context.rate_limit_wait
                    admission = replace(admission, max_wait=max_wait, is_retry=True)
                    backoff = self._throttle_backoff(call, admission, may_repeat=options.retry_enabled)
                elif response.status in RETRIED_STATUSES:
                    retry_state = retry_state or self.retry_policies.start(call, may_repeat=options.retry_enabled)
                    backoff = retry_state.backoff_after_status(response.status, call)
                elif response.status in FORBIDDEN_STATUSES:
                    return await self._handle_forbidden(call, response, token)
                else:
                    return response, b""
                if backoff is None:
                    return response, b""
                response.close()
            call.deadline.wait_for_proxy()
            await asyncio.sleep(backoff)
            call.deadline.wait_for_proxy()

    async def _wait_for_admission(
        self, call: UpstreamCall, admission: AdmissionRequest, token: Token, *, has_capacity: bool
    ) -> Token:
        """Wait for the usage plan and a slot of the account; return the token, or its successor after a long wait."""
        began = self.now()
        if not has_capacity:
            call.context.add_rate_limit_wait(await self.rate_limiter.acquire(call.route, admission))
        if not call.has_account_slot:
            await self.concurrency.acquire_account(call.route.account, admission.max_wait)
            call.has_account_slot = True
        return await self._token(call) if self.now() - began > TOKEN_RECHECK_AFTER else token

    async def _token(self, call: UpstreamCall) -> Token:
        began = self.now()
        token = await self.tokens.get(call.route.token_key)
        call.context.add_token_wait(self.now() - began)
        return token

    async def _forward(self, call: UpstreamCall, token: Token) -> Response:
        """Send the request with this token; return the response once its head is there, and learn from its status."""
        context, now, route = call.context, self.now, call.route
        context.set_token_type(token.kind, token.data_elements)
        sent, upstream = now(), (route.environment, route.region)
        try:
            response = await self.forwarder.send(call, token)
        except CONNECTION_ERRORS:
            self.circuit_breakers.record_failure(upstream, route.operation_name, answered=False)
            raise
        except asyncio.CancelledError:
            # Cancelled by the deadline and not by the client: Amazon did not respond, which counts against it.
            if call.deadline.upstream_timed_out:
                self.circuit_breakers.record_failure(upstream, route.operation_name, answered=False)
            raise
        status = response.status
        context.end_attempt(status, now() - sent)
        context.amazon_request_id = response.value(b"x-amzn-requestid")
        # A 429 or 4xx shows that the upstream works.
        if status >= 500:
            self.circuit_breakers.record_failure(upstream, route.operation_name, answered=True)
        else:
            self.circuit_breakers.record_success(upstream)
            if status not in FORBIDDEN_STATUSES:
                self.success_history.record(route)
        # Amazon sends the header with 20x, 400 and 404, never with a 429 (Amazon's guide "Usage Plans"). Calls without
        # any of these teach nothing.
        if status == 429 or RATE_HEADER in response.names.index or context.rate_limit_wait:
            waited = context.rate_limit_wait > 0
            self.rate_limiter.observe_response(route, status, response.first(RATE_HEADER), waited=waited)
        return response

    def _throttle_backoff(self, call: UpstreamCall, admission: AdmissionRequest, *, may_repeat: bool) -> float | None:
        """Return 0 where a call with a 429 is to be sent again, else None; Amazon did not execute it.

        The rate limiter delays the next attempt. Where there is none, tell the client when to try again.
        """
        wait = self.rate_limiter.retry_after(call.route, admission)
        in_time = wait <= min(admission.max_wait, call.deadline.remaining)
        # A 429 was not executed, so any method may be sent again, if its body is still there.
        if may_repeat and in_time and self.config.limits.pace and call.is_replayable:
            self.metrics.retries.labels("throttled").inc()
            return 0.0
        call.context.retry_after = wait
        return None

    async def _handle_forbidden(self, call: UpstreamCall, response: Response, token: Token) -> tuple[Response, bytes]:
        """Send a call with a 401 or 403 once more where another token may help; return as `_send_with_retries` does.

        Amazon did not execute it, so that holds for every method.
        """
        token_key = call.route.token_key
        prefix = await peek(call, response)
        amazon_error = _parse_amazon_error(response, prefix)
        # Amazon refuses an expired token with 403, not 401, and refuses unknown paths and missing roles with 403 too:
        # the text decides.
        if amazon_error.is_token_error and call.is_replayable:
            call.deadline.wait_for_proxy()
            # Once: on 2023-05-27 calls were rejected for 25 minutes with valid tokens (selling-partner-api-docs issue
            # 3153).
            another = await self.tokens.refresh_rejected(token_key, token)
            if another is not None:
                response.close()
                token = another
                self.metrics.retries.labels("token").inc()
                response = await self._forward(call, token)
                prefix = await peek(call, response) if response.status in FORBIDDEN_STATUSES else b""
                amazon_error = _parse_amazon_error(response, prefix)
                self.tokens.report_result(token_key, token, accepted=not amazon_error.is_token_error)
        if response.status in FORBIDDEN_STATUSES:
            self._record_hint(call, token, amazon_error)
        return response, prefix

    def _record_hint(self, call: UpstreamCall, token: Token, amazon_error: AmazonError) -> None:
        """Note the probable reason of a 401 or 403 of Amazon's."""
        route, context = call.route, call.context
        context.token_age = self.now() - token.issued_at
        context.hint = self.success_history.diagnose(call.request.method, route, token, amazon_error)
        self.metrics.forbidden.labels(route.account, route.region, route.operation_name, context.hint).inc()
        if token.kind == "lwa" and not route.token_key.is_shared:
            # It was sent with an access token because its report was thought to be unrestricted.
            self.unrestricted_reports.forget(route.token_key)


def _parse_amazon_error(response: Response, prefix: bytes) -> AmazonError:
    """Return the error in a response of Amazon's, whatever its content coding."""
    coding = response.first(b"content-encoding") or ""
    # Bounded: a few KiB of gzip may decompress to a thousand times as much.
    body = decompress(prefix, coding, MAX_ERROR_BODY * 4)
    return parse_error(body, response.first(b"x-amzn-errortype") or "")
