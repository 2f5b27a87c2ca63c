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
from proxy.request.tokens.placeholder_endpoint import TokenEndpoint
from proxy.request.tokens.provider import Token, TokenProvider
from proxy.request.tokens.report_documents import UnrestrictedReports, decompress
from proxy.request.upstream.circuit_breaker import CircuitBreakers
from proxy.request.upstream.deadlines import DeadlineTimer, RequestDeadline
from proxy.request.upstream.forward import MAX_ERROR_BODY, Forwarder, UpstreamCall, check_body, peek
from proxy.request.upstream.http1 import Response
from proxy.request.upstream.response import ErrorResponse, PlaceholderResponse, UpstreamResponse
from proxy.request.upstream.retry import CONNECTION_ERRORS, RETRIED_STATUSES, RetryPolicies, RetryState
from proxy.request.validation import AllowedHosts, ValidatedTarget, check_message, is_token_request, validate_with

if TYPE_CHECKING:
    from proxy.request.documents.relay import DocumentRelay  # and what seals, for those who have documents relayed
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
    document_relay: "DocumentRelay | None" = None
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
        exchange = RequestContext(request.method, now()) if traces is None else traces.begin(request.method, now())
        self.metrics.in_flight += 1
        entered: str | None = None
        admitted: ValidatedTarget | None = None
        answer: UpstreamResponse | PlaceholderResponse | ErrorResponse
        try:
            head = self.header_cache.get(request.raw_headers, request.headers, getattr(request, "head_block", None))
            admitted = self._validate(request, head, exchange)
            self.concurrency.acquire_caller(exchange.caller or self.name)
            entered = exchange.caller or self.name
            answer = await self._route(request, head, admitted, exchange)
        except ProxyError as error:
            if exchange.response_started:
                # Half an answer is out: a second one behind it would be taken for its end.
                exchange.error, exchange.fault, exchange.truncated = error.code, error.fault, True
                raise ConnectionAbortedError(error.code) from error
            if admitted is not None and exchange.target is None:
                exchange.local_operation = exchange.local_operation or self.routes.operation_at(
                    request.method, admitted.target
                )
                if (request.method, admitted.target) == ("GET", "/") and isinstance(error, _NO_SUCH_RESOURCE):
                    error.hint = f"{_browser_hint(self.config.admin)} {error.hint}"
            answer = error_response(request, error, exchange)
        except asyncio.CancelledError:
            exchange.status, exchange.error = CLIENT_CLOSED_REQUEST, "ClientLeft"
            raise
        except Exception as exc:
            # The last net: the app gets an answer where none has begun, the log the place.
            LOGGER.error("internal error", exc_info=exc)
            if exchange.response_started:
                exchange.error, exchange.fault, exchange.truncated = InternalError.code, InternalError.fault, True
                raise ConnectionAbortedError(InternalError.code) from exc
            answer = error_response(
                request, InternalError("the proxy failed", "Its log says more; try again."), exchange
            )
        finally:
            self.metrics.in_flight -= 1
            if entered is not None:
                self.concurrency.release_caller(entered)
            self._log_request(exchange)
            if traces is not None:
                traces.end(exchange, request.headers)
        return answer

    def _validate(self, request: web.BaseRequest, head: HeaderBlock, exchange: RequestContext) -> ValidatedTarget:
        """Return what may come in, and note who sent it; nothing was looked up for it yet."""
        if "x-request-id" in head.names:
            exchange.request_id = head.headers["x-request-id"]
        check_message(request, head, self._header_size)
        admitted = validate_with(head, request.method, request.raw_path, self.allowed_hosts)
        check_body(request.method, head)
        if self.callers.is_configured:
            try:
                exchange.caller = self.callers.authenticate(head.headers, peer_of(request), self.listener)
            except CallerRefused:
                # Libraries fetch their token without the headers that they add to calls; it is good for nothing.
                if not is_token_request(request.method, admitted.target):
                    raise
        return admitted

    async def _route(
        self, request: web.BaseRequest, head: HeaderBlock, admitted: ValidatedTarget, exchange: RequestContext
    ) -> UpstreamResponse | PlaceholderResponse:
        headers, permit, relay = head.headers, self.policies[exchange.caller], self.document_relay
        if request.method == "POST" and (own := self.token_endpoint.match(admitted.target)):
            exchange.local_operation = own
            return await self.token_endpoint.respond(request, exchange, permit, self.deadline_timer)
        if relay is not None and relay.matches(admitted.target):
            return await self._relay(relay, request, head, admitted, exchange)
        if "x-amz-access-token" in head.names:
            self.metrics.replaced_tokens.inc()
        exchange.target = target = self.routes.get(request.method, admitted, headers, exchange.caller, permit)
        options = parse_options(headers, head.names, (self.name, exchange.caller), self._max_wait)
        with RequestDeadline(self.deadline_timer, options.timeout) as patience:
            call = UpstreamCall(request, head, target, exchange, patience)
            try:
                response, beginning = await self._send_with_retries(call, options)
                if relay is not None and relay.should_rewrite(target, response):
                    return await relay.rewrite(call, response, self.listener)
                reader = self.unrestricted_reports.tap(target, response)
                return await self.forwarder.stream(call, response, beginning=beginning, reader=reader)
            finally:
                if call.has_account_slot:
                    self.concurrency.release_account(target.account)
                if call.redactor.matched:
                    self.metrics.masked_tokens.inc()

    async def _relay(
        self,
        relay: "DocumentRelay",
        request: web.BaseRequest,
        head: HeaderBlock,
        admitted: ValidatedTarget,
        exchange: RequestContext,
    ) -> UpstreamResponse:
        """Serve a document; no usage plan is for it, and no token."""
        permit = self.policies[exchange.caller]
        opened = relay.open(request.method, admitted, head, self.listener, exchange.caller, permit)
        exchange.target, exchange.data_elements = opened.target, opened.elements
        options = parse_options(head.headers, head.names, (self.name, exchange.caller), self._max_wait)
        with RequestDeadline(self.deadline_timer, options.timeout) as patience:
            call = UpstreamCall(request, head, opened.target, exchange, patience)
            return await relay.fetch(call, unpack=opened.unpack)

    async def _send_with_retries(self, call: UpstreamCall, options: RequestOptions) -> tuple[Response, bytes]:
        """Send the call, again where that is right, until there is an answer to pass on; return it and its beginning.

        Raises the error that stands in for an answer.
        """
        target, exchange, claim = call.route, call.context, options.claim
        self.retry_policies.deposit(target)
        attempts: RetryState | None = None
        while True:
            if exchange.attempts:
                call.deadline.wait_for_proxy()
            self.circuit_breakers.check((target.environment, target.region))
            # Before the wait, so that no exchange delays a call that has its place: Amazon counts when it arrives.
            token = self.tokens.cached(target.credential) or await self._token(call)
            is_admitted = self.limits.try_acquire(target, claim)
            if not is_admitted or not (call.has_account_slot or self.concurrency.try_acquire_account(target.account)):
                token = await self._acquire_slots(call, claim, token, is_admitted=is_admitted)
            call.has_account_slot = True
            try:
                response = await self._send(call, token)
            except CONNECTION_ERRORS:
                attempts = attempts or self.retry_policies.start(call, may_repeat=options.retry_enabled)
                pause = attempts.backoff_after_error(call)
                if pause is None:
                    raise
            else:
                if response.status == 429:
                    claim = replace(claim, max_wait=options.claim.max_wait - exchange.rate_limit_wait, is_retry=True)
                    pause = self._throttle_backoff(call, claim, may_repeat=options.retry_enabled)
                elif response.status in RETRIED_STATUSES:
                    attempts = attempts or self.retry_policies.start(call, may_repeat=options.retry_enabled)
                    pause = attempts.backoff_after_status(response.status, call)
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
        self, call: UpstreamCall, claim: AdmissionRequest, token: Token, *, is_admitted: bool
    ) -> Token:
        """Wait for the places that a call needs; return its token, which may have aged in the queue."""
        began = self.now()
        if not is_admitted:
            call.context.rate_limit_wait += await self.limits.acquire(call.route, claim)
        if not call.has_account_slot:
            await self.concurrency.acquire_account(call.route.account, claim.max_wait)
            call.has_account_slot = True
        return await self._token(call) if self.now() - began > TOKEN_RECHECK_AFTER else token

    async def _token(self, call: UpstreamCall) -> Token:
        asked = self.now()
        token = await self.tokens.get(call.route.credential)
        call.context.token_wait += self.now() - asked
        return token

    def _throttle_backoff(self, call: UpstreamCall, claim: AdmissionRequest, *, may_repeat: bool) -> float | None:
        """Return the pause before a throttled call is sent again, None where it is passed on; it was not executed."""
        wait = self.limits.retry_after(call.route, claim)
        in_time = wait <= min(claim.max_wait, call.deadline.remaining)
        if may_repeat and in_time and self.config.limits.pace and call.is_replayable:
            self.metrics.retries.labels("throttled").inc()
            return 0.0  # its place in the queue is the pause
        call.context.retry_after = wait
        return None

    async def _send(self, call: UpstreamCall, token: Token) -> Response:
        """Send the request with this token, and note what the head of its answer says."""
        exchange = call.context
        now, target = self.now, call.route
        exchange.set_token_type(token.kind, token.data_elements)
        sent, where = now(), (target.environment, target.region)
        try:
            response = await self.forwarder.send(call, token)
        except CONNECTION_ERRORS:
            self.circuit_breakers.record_failure(where, target.operation_name, answered=False)
            raise
        except asyncio.CancelledError:
            if call.deadline.upstream_timed_out:
                self.circuit_breakers.record_failure(where, target.operation_name, answered=False)
            raise
        exchange.status = status = response.status
        exchange.upstream_duration = now() - sent
        exchange.amazon_request_id = response.value(b"x-amzn-requestid")
        if status >= 500:
            self.circuit_breakers.record_failure(where, target.operation_name, answered=True)
        else:
            self.circuit_breakers.record_success(where)
            if status not in FORBIDDEN_STATUSES:
                self.success_history.record(target)
        if status == 429 or RATE_HEADER in response.names.index or exchange.rate_limit_wait:
            self.limits.observe_response(
                target, status, response.first(RATE_HEADER), waited=exchange.rate_limit_wait > 0
            )
        return response

    async def _handle_forbidden(self, call: UpstreamCall, response: Response, token: Token) -> tuple[Response, bytes]:
        """Send a refused call once more where another token may help; return the answer that counts, and its beginning.

        What was refused was not executed, so any method may be sent again.
        """
        credential = call.route.credential
        beginning = await peek(call, response)
        refusal = error_in(response, beginning)
        if refusal.is_token_error and call.is_replayable:
            call.deadline.wait_for_proxy()
            another = await self.tokens.refresh_rejected(credential, token)
            if another is not None:
                response.close()
                token = another
                self.metrics.retries.labels("token").inc()
                response = await self._send(call, token)
                beginning = await peek(call, response) if response.status in FORBIDDEN_STATUSES else b""
                refusal = error_in(response, beginning)
                self.tokens.report_result(credential, token, accepted=not refusal.is_token_error)
        if response.status in FORBIDDEN_STATUSES:
            self._record_hint(call, token, refusal)
        return response, beginning

    def _record_hint(self, call: UpstreamCall, token: Token, refusal: AmazonError) -> None:
        """Note what is probably behind a refusal of Amazon's."""
        target, exchange = call.route, call.context
        exchange.token_age = self.now() - token.issued_at
        exchange.hint = self.success_history.diagnose(call.request.method, target, token, refusal)
        self.metrics.forbidden.labels(target.account, target.region, target.operation_name, exchange.hint).inc()
        if token.kind == "lwa" and not target.credential.is_shared:
            self.unrestricted_reports.forget(target.credential)  # it was taken for unrestricted

    def _log_request(self, exchange: RequestContext) -> None:
        """Count and log one finished request."""
        metrics, now, target, status = self.metrics, self.now, exchange.target, exchange.status
        duration = now() - exchange.started
        if exchange.truncated:
            metrics.truncated.inc()
        if exchange.fault is not None:
            metrics.errors.labels(exchange.error, exchange.fault).inc()
        account, region, operation = (
            (target.account, target.region, target.operation_name) if target is not None else exchange.labels()
        )
        source = "amazon" if not exchange.error and not exchange.local_operation else _source(exchange)
        labels = (account, region, operation, _method_label(exchange.method), str(status), exchange.token, source)
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
                    exchange.caller,
                    exchange.started,
                    duration,
                    exchange.rate_limit_wait,
                    exchange.token_wait,
                    exchange.upstream_duration,
                    exchange.attempts,
                    exchange.error,
                    exchange.hint,
                )
            )
        if target is not None:
            if exchange.rate_limit_wait:
                metrics.limit_wait.observe(exchange.rate_limit_wait)
            else:
                metrics.limit_wait.zero_count += 1
        if exchange.upstream_duration is not None:
            series.upstream_duration.observe(exchange.upstream_duration)
            if exchange.token_wait:
                metrics.token_wait.observe(exchange.token_wait)
            else:
                metrics.token_wait.zero_count += 1
            traffic = series.traffic
            traffic.sent += exchange.request_bytes
            traffic.received += exchange.response_bytes
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info("request", extra=extra(**_log_fields(exchange, duration)))
        if AUDIT.isEnabledFor(logging.INFO):
            AUDIT.info("request", extra=extra(listener=self.name, **_audit_fields(exchange)))


def error_in(response: Response, beginning: bytes) -> AmazonError:
    """Return what Amazon says in a refusal, whatever its content coding."""
    coding = response.first(b"content-encoding") or ""
    body = decompress(beginning, coding, MAX_ERROR_BODY * 4)
    return parse_error(body, response.first(b"x-amzn-errortype") or "")


def _source(exchange: RequestContext) -> str:
    """Return who answered where it was not Amazon: the proxy, or nobody, since the client had left."""
    return "client" if exchange.error and exchange.status == CLIENT_CLOSED_REQUEST else "proxy"


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


def _log_fields(exchange: RequestContext, duration: float) -> dict[str, object]:
    """Return the fields of a request's log line: nothing in it comes from the app but the method and a plain id."""
    upstream = exchange.upstream_duration
    return {
        "code": exchange.status,
        "method": _method_label(exchange.method),
        "caller": exchange.caller or None,
        "account": exchange.account,
        "region": exchange.region,
        "operation": exchange.operation,
        "token": exchange.token,
        "dropped": ",".join(exchange.dropped_elements) or None,
        "token_age": round(exchange.token_age) if exchange.hint else None,
        "hint": exchange.hint or None,
        "duration": round(duration, 4),
        "upstream": None if upstream is None else round(upstream, 4),
        "wait": round(exchange.rate_limit_wait, 3),
        "attempts": exchange.attempts,
        "amazon_request_id": _well_formed_id(exchange.amazon_request_id),
        "request_id": _well_formed_id(exchange.request_id),
        "error": exchange.error,
        "broken": exchange.truncated or None,
    }


def _audit_fields(exchange: RequestContext) -> dict[str, object]:
    """Return who did what, for the audit log: nothing in it is personal data."""
    return {
        "caller": exchange.caller or None,
        "account": exchange.account,
        "region": exchange.region,
        "method": _method_label(exchange.method),
        "operation": exchange.operation,
        "token": exchange.token,
        "data_elements": list(exchange.data_elements),
        "status": exchange.status,
        "error": exchange.error or None,
        "attempts": exchange.attempts,
        "amazon_request_id": _well_formed_id(exchange.amazon_request_id) or None,
        "request_id": _well_formed_id(exchange.request_id) or None,
    }


def error_response(request: web.BaseRequest, error: ProxyError, exchange: RequestContext) -> ErrorResponse:
    """Return the answer for an error of ours, and note it in the exchange."""
    exchange.status, exchange.error, exchange.fault = error.status, error.code, error.fault
    answer = ErrorResponse(error, exchange.summary(), with_body=request.method != "HEAD")
    if isinstance(error, _CLOSES_CONNECTION) or (request.body_exists and not request.content.at_eof()):
        answer.force_close()  # what follows on this connection is the unread body, or who knows what: not a request
    return answer
