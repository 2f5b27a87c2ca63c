"""What happens to one request, from its head to the last byte of its answer?

This is the only place that knows the order of the steps.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aiohttp import web

from proxy.amazon.error_response import AmazonError, parse_error
from proxy.config import Address, Config, Listener
from proxy.errors import (
    AccountRequired,
    CallerRefused,
    HeaderTooLarge,
    InternalError,
    MalformedRequest,
    ProxyError,
    RegionRequired,
    VersionRefused,
)
from proxy.observability.logging import AUDIT, LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.request.authentication import CallerAuthenticator, peer_of
from proxy.request.authorization import AccessPolicy
from proxy.request.context import RequestContext
from proxy.request.forbidden_hints import FORBIDDEN_STATUSES, SuccessHistory
from proxy.request.header_cache import HeaderBlock, HeaderCache
from proxy.request.ratelimit.concurrency import ConcurrencyLimiter
from proxy.request.ratelimit.limiter import RATE_HEADER, AdmissionRequest, RateLimiter
from proxy.request.request_options import RequestOptions, parse_options
from proxy.request.routing import RouteCache
from proxy.request.token import Token
from proxy.request.tokens.placeholder_endpoint import TokenEndpoint
from proxy.request.tokens.provider import TokenProvider
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.request.upstream.call import UpstreamCall
from proxy.request.upstream.circuit_breaker import CircuitBreakers
from proxy.request.upstream.content_coding import decompress
from proxy.request.upstream.deadlines import DeadlineTimer, RequestDeadline
from proxy.request.upstream.forward import MAX_ERROR_BODY, Forwarder, peek
from proxy.request.upstream.http1 import Response
from proxy.request.upstream.request_headers import check_body
from proxy.request.upstream.response import ErrorResponse, PlaceholderResponse, UpstreamResponse
from proxy.request.upstream.retry import CONNECTION_ERRORS, RETRIED_STATUSES, RetryPolicies, RetryState
from proxy.request.validation import AllowedHosts, ValidatedTarget, check_message, is_token_request, validate_with

if TYPE_CHECKING:
    from proxy.request.documents.relay_rewrite import DocumentRewriter  # need `cryptography`
    from proxy.request.documents.relay_serve import DocumentServer
    from proxy.request.spans import Tracer  # needs OpenTelemetry, an extra

_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)

# Errors after which it is not certain where the next request begins (RFC 9112 section 6.3).
_CLOSES_CONNECTION = (MalformedRequest, VersionRefused, HeaderTooLarge)

# What is answered where a request says nothing, as that of a person who only looks what is here.
_NO_SUCH_RESOURCE = (AccountRequired, RegionRequired)

TOKEN_RECHECK_AFTER = 0.05  # seconds of waiting after which a token is looked at again
CLIENT_CLOSED_REQUEST = 499  # as nginx logs it: there is nobody to answer


@dataclass(slots=True)
class Handler:
    """Serves the requests of one listener; `now` is a monotonic clock in seconds. Nobody changes it."""

    config: Config
    listener: Listener
    name: str  # of the listener, in metrics and log
    allowed_hosts: AllowedHosts
    header_cache: HeaderCache
    callers: CallerAuthenticator
    policies: Mapping[str, AccessPolicy]  # by caller
    concurrency: ConcurrencyLimiter
    routes: RouteCache
    token_endpoint: TokenEndpoint
    limits: RateLimiter
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
    now: Callable[[], float] = time.monotonic
    # Settings that every request asks for.
    _max_wait: float = field(init=False)
    _header_size: int = field(init=False)

    def __post_init__(self) -> None:
        self._max_wait = self.config.limits.max_wait
        self._header_size = self.config.bounds.header_size

    async def handle(self, request: web.BaseRequest) -> UpstreamResponse | PlaceholderResponse | ErrorResponse:
        """Answer one request; every outcome is counted and logged once."""
        traces, now = self.tracer, self.now
        context = RequestContext(request.method, now()) if traces is None else traces.begin(request.method, now())
        self.metrics.in_flight += 1
        entered: str | None = None
        validated: ValidatedTarget | None = None
        response: UpstreamResponse | PlaceholderResponse | ErrorResponse
        try:
            head = self.header_cache.get(request.raw_headers, request.headers, getattr(request, "head_block", None))
            validated = self._validate(request, head, context)
            self.concurrency.acquire_caller(context.caller or self.name)
            entered = context.caller or self.name
            response = await self._route(request, head, validated, context)
        except ProxyError as error:
            if context.response_started:
                # Half an answer is out: a second one behind it would be taken for its end.
                context.error, context.fault, context.truncated = error.code, error.fault, True
                raise ConnectionAbortedError(error.code) from error
            if validated is not None and context.target is None:
                context.local_operation = context.local_operation or self.routes.operation_at(
                    request.method, validated.target
                )
                if (request.method, validated.target) == ("GET", "/") and isinstance(error, _NO_SUCH_RESOURCE):
                    error.hint = f"{_browser_hint(self.config.admin)} {error.hint}"
            response = error_response(request, error, context)
        except asyncio.CancelledError:
            context.status, context.error = CLIENT_CLOSED_REQUEST, "ClientLeft"
            raise
        except Exception as exc:
            # The last net: the app gets an answer where none has begun, the log the place.
            LOGGER.error("internal error", exc_info=exc)
            if context.response_started:
                context.error, context.fault, context.truncated = InternalError.code, InternalError.fault, True
                raise ConnectionAbortedError(InternalError.code) from exc
            response = error_response(
                request, InternalError("the proxy failed", "Its log says more; try again."), context
            )
        finally:
            self.metrics.in_flight -= 1
            if entered is not None:
                self.concurrency.release_caller(entered)
            self._log_request(context)
            if traces is not None:
                traces.end(context, request.headers)
        return response

    def _validate(self, request: web.BaseRequest, head: HeaderBlock, context: RequestContext) -> ValidatedTarget:
        """Return what may come in, and note who sent it; nothing was looked up for it yet."""
        if "x-request-id" in head.names:
            context.request_id = head.headers["x-request-id"]
        check_message(request, head, self._header_size)
        validated = validate_with(head, request.method, request.raw_path, self.allowed_hosts)
        check_body(request.method, head)
        if self.callers.is_configured:
            try:
                context.caller = self.callers.authenticate(head.headers, peer_of(request), self.listener)
            except CallerRefused:
                # Libraries fetch their token without the headers that they add to calls; it is good for nothing.
                if not is_token_request(request.method, validated.target):
                    raise
        return validated

    async def _route(
        self, request: web.BaseRequest, head: HeaderBlock, validated: ValidatedTarget, context: RequestContext
    ) -> UpstreamResponse | PlaceholderResponse:
        headers, policy = head.headers, self.policies[context.caller]
        documents, rewriter = self.document_server, self.document_rewriter
        if request.method == "POST" and (own := self.token_endpoint.match(validated.target)):
            context.local_operation = own
            return await self.token_endpoint.respond(request, context, policy, self.deadline_timer)
        if documents is not None and documents.matches(validated.target):
            return await self._serve_document(documents, request, head, validated, context)
        if "x-amz-access-token" in head.names:
            self.metrics.replaced_tokens.inc()
        context.target = route = self.routes.get(request.method, validated, headers, context.caller, policy)
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
                if call.has_account_slot:
                    self.concurrency.release_account(route.account)
                if call.redactor.matched:
                    self.metrics.masked_tokens.inc()

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
        context.target, context.data_elements = opened.target, opened.elements
        options = parse_options(head.headers, head.names, (self.name, context.caller), self._max_wait)
        with RequestDeadline(self.deadline_timer, options.timeout) as deadline:
            call = UpstreamCall(request, head, opened.target, context, deadline)
            return await documents.fetch(call, decompress=opened.decompress)

    async def _send_with_retries(self, call: UpstreamCall, options: RequestOptions) -> tuple[Response, bytes]:
        """Send the call, again where that is right, until there is an answer to pass on; return it and its beginning.

        Raises the error that stands in for an answer.
        """
        route, context, admission = call.route, call.context, options.claim
        self.retry_policies.deposit(route)
        retry_state: RetryState | None = None
        while True:
            if context.attempts:
                call.deadline.wait_for_proxy()
            self.circuit_breakers.check((route.environment, route.region))
            # Before the wait, so that no exchange delays a call that has its place: Amazon counts when it arrives.
            token = self.tokens.cached(route.token_key) or await self._token(call)
            is_admitted = self.limits.try_acquire(route, admission)
            if not is_admitted or not (call.has_account_slot or self.concurrency.try_acquire_account(route.account)):
                token = await self._acquire_slots(call, admission, token, is_admitted=is_admitted)
            call.has_account_slot = True
            try:
                response = await self._send(call, token)
            except CONNECTION_ERRORS:
                retry_state = retry_state or self.retry_policies.start(call, may_repeat=options.retry_enabled)
                pause = retry_state.backoff_after_error(call)
                if pause is None:
                    raise
            else:
                if response.status == 429:
                    admission = replace(
                        admission, max_wait=options.claim.max_wait - context.rate_limit_wait, is_retry=True
                    )
                    pause = self._throttle_backoff(call, admission, may_repeat=options.retry_enabled)
                elif response.status in RETRIED_STATUSES:
                    retry_state = retry_state or self.retry_policies.start(call, may_repeat=options.retry_enabled)
                    pause = retry_state.backoff_after_status(response.status, call)
                else:
                    pause = None
                if pause is None:
                    return (
                        await self._handle_forbidden(call, response, token)
                        if response.status in FORBIDDEN_STATUSES
                        else (response, b"")
                    )
                response.close()
            call.deadline.wait_for_proxy()
            await asyncio.sleep(pause)

    async def _acquire_slots(
        self, call: UpstreamCall, admission: AdmissionRequest, token: Token, *, is_admitted: bool
    ) -> Token:
        """Wait for the places that a call needs; return its token, which may have aged in the queue."""
        began = self.now()
        if not is_admitted:
            call.context.rate_limit_wait += await self.limits.acquire(call.route, admission)
        if not call.has_account_slot:
            await self.concurrency.acquire_account(call.route.account, admission.max_wait)
            call.has_account_slot = True
        return await self._token(call) if self.now() - began > TOKEN_RECHECK_AFTER else token

    async def _token(self, call: UpstreamCall) -> Token:
        asked = self.now()
        token = await self.tokens.get(call.route.token_key)
        call.context.token_wait += self.now() - asked
        return token

    def _throttle_backoff(self, call: UpstreamCall, admission: AdmissionRequest, *, may_repeat: bool) -> float | None:
        """Return the pause before a throttled call is sent again, None where it is passed on; it was not executed."""
        wait = self.limits.retry_after(call.route, admission)
        in_time = wait <= min(admission.max_wait, call.deadline.remaining)
        if may_repeat and in_time and self.config.limits.pace and call.is_replayable:
            self.metrics.retries.labels("throttled").inc()
            return 0.0  # its place in the queue is the pause
        call.context.retry_after = wait
        return None

    async def _send(self, call: UpstreamCall, token: Token) -> Response:
        """Send the request with this token, and note what the head of its answer says."""
        context = call.context
        now, route = self.now, call.route
        context.set_token_type(token.kind, token.data_elements)
        sent, where = now(), (route.environment, route.region)
        try:
            response = await self.forwarder.send(call, token)
        except CONNECTION_ERRORS:
            self.circuit_breakers.record_failure(where, route.operation_name, answered=False)
            raise
        except asyncio.CancelledError:
            if call.deadline.upstream_timed_out:
                self.circuit_breakers.record_failure(where, route.operation_name, answered=False)
            raise
        context.status = status = response.status
        context.upstream_duration = now() - sent
        context.amazon_request_id = response.value(b"x-amzn-requestid")
        if status >= 500:
            self.circuit_breakers.record_failure(where, route.operation_name, answered=True)
        else:
            self.circuit_breakers.record_success(where)
            if status not in FORBIDDEN_STATUSES:
                self.success_history.record(route)
        if status == 429 or RATE_HEADER in response.names.index or context.rate_limit_wait:
            self.limits.observe_response(route, status, response.first(RATE_HEADER), waited=context.rate_limit_wait > 0)
        return response

    async def _handle_forbidden(self, call: UpstreamCall, response: Response, token: Token) -> tuple[Response, bytes]:
        """Send a refused call once more where another token may help; return the answer that counts, and its beginning.

        What was refused was not executed, so any method may be sent again.
        """
        token_key = call.route.token_key
        prefix = await peek(call, response)
        amazon_error = error_in(response, prefix)
        if amazon_error.is_token_error and call.is_replayable:
            call.deadline.wait_for_proxy()
            another = await self.tokens.refresh_rejected(token_key, token)
            if another is not None:
                response.close()
                token = another
                self.metrics.retries.labels("token").inc()
                response = await self._send(call, token)
                prefix = await peek(call, response) if response.status in FORBIDDEN_STATUSES else b""
                amazon_error = error_in(response, prefix)
                self.tokens.report_result(token_key, token, accepted=not amazon_error.is_token_error)
        if response.status in FORBIDDEN_STATUSES:
            self._record_hint(call, token, amazon_error)
        return response, prefix

    def _record_hint(self, call: UpstreamCall, token: Token, amazon_error: AmazonError) -> None:
        """Note what is probably behind a refusal of Amazon's."""
        route, context = call.route, call.context
        context.token_age = self.now() - token.issued_at
        context.hint = self.success_history.diagnose(call.request.method, route, token, amazon_error)
        self.metrics.forbidden.labels(route.account, route.region, route.operation_name, context.hint).inc()
        if token.kind == "lwa" and not route.token_key.is_shared:
            self.unrestricted_reports.forget(route.token_key)  # it was taken for unrestricted

    def _log_request(self, context: RequestContext) -> None:
        """Count and log one finished request."""
        metrics, now, route, status = self.metrics, self.now, context.target, context.status
        duration = now() - context.started
        if context.truncated:
            metrics.truncated.inc()
        if context.fault is not None:
            metrics.errors.labels(context.error, context.fault).inc()
        account, region, operation = (
            (route.account, route.region, route.operation_name) if route is not None else context.labels()
        )
        source = "amazon" if not context.error and not context.local_operation else _source(context)
        labels = (account, region, operation, _method_label(context.method), str(status), context.token, source)
        series = metrics.series_cache.get(labels) or metrics.series_of(*labels)
        series.requests += 1
        series.duration.observe(duration)
        recent = metrics.history
        if recent is not None:
            # Names and numbers alone: what else is known of the request ends with it.
            recent.append(
                (
                    recent.number(),
                    series.labels,
                    context.caller,
                    context.started,
                    duration,
                    context.rate_limit_wait,
                    context.token_wait,
                    context.upstream_duration,
                    context.attempts,
                    context.error,
                    context.hint,
                )
            )
        if route is not None:
            if context.rate_limit_wait:
                metrics.limit_wait.observe(context.rate_limit_wait)
            else:
                metrics.limit_wait.zero_count += 1
        if context.upstream_duration is not None:
            series.upstream_duration.observe(context.upstream_duration)
            if context.token_wait:
                metrics.token_wait.observe(context.token_wait)
            else:
                metrics.token_wait.zero_count += 1
            traffic = series.traffic
            traffic.sent += context.request_bytes
            traffic.received += context.response_bytes
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info("request", extra=extra(**_log_fields(context, duration)))
        if AUDIT.isEnabledFor(logging.INFO):
            AUDIT.info("request", extra=extra(listener=self.name, **_audit_fields(context)))


def error_in(response: Response, prefix: bytes) -> AmazonError:
    """Return what Amazon says in a refusal, whatever its content coding."""
    coding = response.first(b"content-encoding") or ""
    body = decompress(prefix, coding, MAX_ERROR_BODY * 4)
    return parse_error(body, response.first(b"x-amzn-errortype") or "")


def _source(context: RequestContext) -> str:
    """Return who answered where it was not Amazon: the proxy, or nobody, since the client had left."""
    return "client" if context.error and context.status == CLIENT_CLOSED_REQUEST else "proxy"


def _browser_hint(admin: Address | None) -> str:
    """Return what to tell a person who opened the apps' port in a browser: nothing of Amazon's is at `/`."""
    page = f"; the status page is at http://{admin}/" if admin is not None and admin.port else ""
    return f"This port is for apps{page}."


def _method_label(method: str) -> str:
    return method if method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} else "other"


def _well_formed_id(text: str | bytes | None) -> str:
    """Return an id of the app's or of Amazon's for the log; nothing where it is more than an id."""
    if isinstance(text, bytes):
        text = text.decode("latin-1").rstrip(" \t")
    return text if text is not None and _ID.fullmatch(text) else ""


def _log_fields(context: RequestContext, duration: float) -> dict[str, object]:
    """Return the fields of a request's log line: nothing in it comes from the app but the method and a plain id."""
    upstream = context.upstream_duration
    return {
        "code": context.status,
        "method": _method_label(context.method),
        "caller": context.caller or None,
        "account": context.account,
        "region": context.region,
        "operation": context.operation,
        "token": context.token,
        "dropped": ",".join(context.dropped_elements) or None,
        "token_age": round(context.token_age) if context.hint else None,
        "hint": context.hint or None,
        "duration": round(duration, 4),
        "upstream": None if upstream is None else round(upstream, 4),
        "wait": round(context.rate_limit_wait, 3),
        "attempts": context.attempts,
        "amazon_request_id": _well_formed_id(context.amazon_request_id),
        "request_id": _well_formed_id(context.request_id),
        "error": context.error,
        "broken": context.truncated or None,
    }


def _audit_fields(context: RequestContext) -> dict[str, object]:
    """Return who did what, for the audit log: nothing in it is personal data."""
    return {
        "caller": context.caller or None,
        "account": context.account,
        "region": context.region,
        "method": _method_label(context.method),
        "operation": context.operation,
        "token": context.token,
        "data_elements": list(context.data_elements),
        "status": context.status,
        "error": context.error or None,
        "attempts": context.attempts,
        "amazon_request_id": _well_formed_id(context.amazon_request_id) or None,
        "request_id": _well_formed_id(context.request_id) or None,
    }


def error_response(request: web.BaseRequest, error: ProxyError, context: RequestContext) -> ErrorResponse:
    """Return the answer for an error of ours, and note it in the exchange."""
    context.status, context.error, context.fault = error.status, error.code, error.fault
    response = ErrorResponse(error, context.summary(), with_body=request.method != "HEAD")
    if isinstance(error, _CLOSES_CONNECTION) or (request.body_exists and not request.content.at_eof()):
        response.force_close()  # what follows on this connection is the unread body, or who knows what: not a request
    return response
