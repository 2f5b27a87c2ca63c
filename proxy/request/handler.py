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

from proxy.amazon.error_response import Refusal, parse_refusal
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
from proxy.observability.logging import AUDIT, LOGGER, fields
from proxy.observability.metrics import Metrics
from proxy.request.authentication import Callers, peer_of
from proxy.request.authorization import Permit
from proxy.request.context import Exchange
from proxy.request.forbidden_hints import REFUSED, Experience
from proxy.request.header_cache import Head, KnownHeads
from proxy.request.ratelimit.concurrency import Crowd
from proxy.request.ratelimit.limiter import RATE_HEADER, Claim, Limits
from proxy.request.request_options import Options, parse_options
from proxy.request.routing import Decisions
from proxy.request.tokens.placeholder_endpoint import Placeholders
from proxy.request.tokens.provider import Token, Tokens
from proxy.request.tokens.report_documents import Documents, unpacked
from proxy.request.upstream.circuit_breaker import Circuits
from proxy.request.upstream.deadlines import Deadlines, Patience
from proxy.request.upstream.forward import MOST_OF_REFUSAL, Call, Upstream, beginning_of, check_body
from proxy.request.upstream.http1 import Answer
from proxy.request.upstream.response import AmazonsAnswer, OwnAnswer, PlaceholderAnswer
from proxy.request.upstream.retry import NO_ANSWER, RETRIED_STATUSES, AllAttempts, Attempts
from proxy.request.validation import Admitted, Doorway, admit_with, asks_for_token, check_message

if TYPE_CHECKING:
    from proxy.request.documents.relay import Relay  # and what seals, for those who have documents relayed
    from proxy.request.spans import Traces  # needs OpenTelemetry, an extra

_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)

# Errors after which it is not certain where the next request begins (RFC 9112 section 6.3).
_UNCLEAR = (MalformedRequest, VersionRefused, HeaderTooLarge)

# What is answered where a request says nothing, as that of a person who only looks what is here.
_NAMES_NOTHING = (AccountRequired, RegionRequired)

AGED = 0.05  # seconds of waiting after which a token is looked at again
CLIENT_LEFT = 499  # as nginx logs it: there is nobody to answer


@dataclass(slots=True)
class Handler:
    """Serves the requests of one listener; `now` is a monotonic clock in seconds. Nobody changes it."""

    config: Config
    listener: Listener
    name: str  # of the listener, in metrics and log
    doorway: Doorway
    heads: KnownHeads
    callers: Callers
    permits: Mapping[str, Permit]  # by caller
    crowd: Crowd
    decisions: Decisions
    placeholders: Placeholders
    limits: Limits
    tokens: Tokens
    upstream: Upstream
    attempts: AllAttempts
    circuits: Circuits
    documents: Documents
    experience: Experience
    deadlines: Deadlines
    metrics: Metrics
    traces: "Traces | None" = None
    relay: "Relay | None" = None
    now: Callable[[], float] = time.monotonic
    # Settings that every request asks for.
    _max_wait: float = field(init=False)
    _header_size: int = field(init=False)

    def __post_init__(self) -> None:
        self._max_wait = self.config.limits.max_wait
        self._header_size = self.config.bounds.header_size

    async def handle(self, request: web.BaseRequest) -> AmazonsAnswer | PlaceholderAnswer | OwnAnswer:
        """Answer one request; every outcome is counted and logged once."""
        traces, now = self.traces, self.now
        exchange = Exchange(request.method, now()) if traces is None else traces.begin(request.method, now())
        self.metrics.in_flight += 1
        entered: str | None = None
        admitted: Admitted | None = None
        answer: AmazonsAnswer | PlaceholderAnswer | OwnAnswer
        try:
            head = self.heads.of(request.raw_headers, request.headers, getattr(request, "head_block", None))
            admitted = self._admitted(request, head, exchange)
            self.crowd.enter(exchange.caller or self.name)
            entered = exchange.caller or self.name
            answer = await self._serve(request, head, admitted, exchange)
        except ProxyError as error:
            if exchange.begun:
                # Half an answer is out: a second one behind it would be taken for its end.
                exchange.error, exchange.fault, exchange.broken = error.code, error.fault, True
                raise ConnectionAbortedError(error.code) from error
            if admitted is not None and exchange.target is None:
                exchange.own = exchange.own or self.decisions.operation_at(request.method, admitted.target)
                if (request.method, admitted.target) == ("GET", "/") and isinstance(error, _NAMES_NOTHING):
                    error.hint = f"{_for_browsers(self.config.admin)} {error.hint}"
            answer = refusal(request, error, exchange)
        except asyncio.CancelledError:
            exchange.status, exchange.error = CLIENT_LEFT, "ClientLeft"
            raise
        except Exception as exc:
            # The last net: the app gets an answer where none has begun, the log the place.
            LOGGER.error("internal error", exc_info=exc)
            if exchange.begun:
                exchange.error, exchange.fault, exchange.broken = InternalError.code, InternalError.fault, True
                raise ConnectionAbortedError(InternalError.code) from exc
            answer = refusal(request, InternalError("the proxy failed", "Its log says more; try again."), exchange)
        finally:
            self.metrics.in_flight -= 1
            if entered is not None:
                self.crowd.leave(entered)
            self._record(exchange)
            if traces is not None:
                traces.end(exchange, request.headers)
        return answer

    def _admitted(self, request: web.BaseRequest, head: Head, exchange: Exchange) -> Admitted:
        """Return what may come in, and note who sent it; nothing was looked up for it yet."""
        if "x-request-id" in head.names:
            exchange.request_id = head.headers["x-request-id"]
        check_message(request, head, self._header_size)
        admitted = admit_with(head, request.method, request.raw_path, self.doorway)
        check_body(request.method, head)
        if self.callers.has_any:
            try:
                exchange.caller = self.callers.who(head.headers, peer_of(request), self.listener)
            except CallerRefused:
                # Libraries fetch their token without the headers that they add to calls; it is good for nothing.
                if not asks_for_token(request.method, admitted.target):
                    raise
        return admitted

    async def _serve(
        self, request: web.BaseRequest, head: Head, admitted: Admitted, exchange: Exchange
    ) -> AmazonsAnswer | PlaceholderAnswer:
        headers, permit, relay = head.headers, self.permits[exchange.caller], self.relay
        if request.method == "POST" and (own := self.placeholders.answered(admitted.target)):
            exchange.own = own
            return await self.placeholders.answer(request, exchange, permit, self.deadlines)
        if relay is not None and relay.is_for(admitted.target):
            return await self._relay(relay, request, head, admitted, exchange)
        if "x-amz-access-token" in head.names:
            self.metrics.replaced_tokens.inc()
        exchange.target = target = self.decisions.target(request.method, admitted, headers, exchange.caller, permit)
        options = parse_options(headers, head.names, (self.name, exchange.caller), self._max_wait)
        with Patience(self.deadlines, options.timeout) as patience:
            call = Call(request, head, target, exchange, patience)
            try:
                response, beginning = await self._answered(call, options)
                if relay is not None and relay.concerns(target, response):
                    return await relay.pass_on(call, response, self.listener)
                reader = self.documents.reader(target, response)
                return await self.upstream.relay(call, response, beginning=beginning, reader=reader)
            finally:
                if call.has_place:
                    self.crowd.come_back(target.account)
                if call.mask.was_needed:
                    self.metrics.masked_tokens.inc()

    async def _relay(
        self, relay: "Relay", request: web.BaseRequest, head: Head, admitted: Admitted, exchange: Exchange
    ) -> AmazonsAnswer:
        """Serve a document; no usage plan is for it, and no token."""
        permit = self.permits[exchange.caller]
        opened = relay.opened(request.method, admitted, head, self.listener, exchange.caller, permit)
        exchange.target, exchange.elements = opened.target, opened.elements
        options = parse_options(head.headers, head.names, (self.name, exchange.caller), self._max_wait)
        with Patience(self.deadlines, options.timeout) as patience:
            call = Call(request, head, opened.target, exchange, patience)
            return await relay.fetched(call, unpack=opened.unpack)

    async def _answered(self, call: Call, options: Options) -> tuple[Answer, bytes]:
        """Send the call, again where that is right, until there is an answer to pass on; return it and its beginning.

        Raises the error that stands in for an answer.
        """
        target, exchange, claim = call.target, call.exchange, options.claim
        self.attempts.note_call(target)
        attempts: Attempts | None = None
        while True:
            if exchange.attempts:
                call.patience.for_proxy()
            self.circuits.check((target.environment, target.region))
            # Before the wait, so that no exchange delays a call that has its place: Amazon counts when it arrives.
            token = self.tokens.at_hand(target.credential) or await self._token(call)
            is_admitted = self.limits.admits_at_once(target, claim)
            if not is_admitted or not (call.has_place or self.crowd.goes_at_once(target.account)):
                token = await self._placed(call, claim, token, is_admitted=is_admitted)
            call.has_place = True
            try:
                response = await self._send(call, token)
            except NO_ANSWER:
                attempts = attempts or self.attempts.of(call, may_repeat=options.may_repeat)
                pause = attempts.after_no_answer(call)
                if pause is None:
                    raise
            else:
                if response.status == 429:
                    claim = replace(claim, max_wait=options.claim.max_wait - exchange.waited, first=True)
                    pause = self._after_429(call, claim, may_repeat=options.may_repeat)
                elif response.status in RETRIED_STATUSES:
                    attempts = attempts or self.attempts.of(call, may_repeat=options.may_repeat)
                    pause = attempts.after_status(response.status, call)
                else:
                    pause = None
                if pause is None:
                    return await self._refused(call, response, token) if response.status in REFUSED else (response, b"")
                response.close()
            call.patience.for_proxy()
            await asyncio.sleep(pause)

    async def _placed(self, call: Call, claim: Claim, token: Token, *, is_admitted: bool) -> Token:
        """Wait for the places that a call needs; return its token, which may have aged in the queue."""
        began = self.now()
        if not is_admitted:
            call.exchange.waited += await self.limits.admit(call.target, claim)
        if not call.has_place:
            await self.crowd.go(call.target.account, claim.max_wait)
            call.has_place = True
        return await self._token(call) if self.now() - began > AGED else token

    async def _token(self, call: Call) -> Token:
        asked = self.now()
        token = await self.tokens.get(call.target.credential)
        call.exchange.token_wait += self.now() - asked
        return token

    def _after_429(self, call: Call, claim: Claim, *, may_repeat: bool) -> float | None:
        """Return the pause before a throttled call is sent again, None where it is passed on; it was not executed."""
        wait = self.limits.retry_after(call.target, claim)
        in_time = wait <= min(claim.max_wait, call.patience.left)
        if may_repeat and in_time and self.config.limits.pace and call.can_be_sent_again:
            self.metrics.retries.labels("throttled").inc()
            return 0.0  # its place in the queue is the pause
        call.exchange.retry_after = wait
        return None

    async def _send(self, call: Call, token: Token) -> Answer:
        """Send the request with this token, and note what the head of its answer says."""
        exchange = call.exchange
        now, target = self.now, call.target
        exchange.note_token(token.kind, token.data_elements)
        sent, where = now(), (target.environment, target.region)
        try:
            response = await self.upstream.send(call, token)
        except NO_ANSWER:
            self.circuits.failed(where, target.operation_name, answered=False)
            raise
        except asyncio.CancelledError:
            if call.patience.amazon_was_silent:
                self.circuits.failed(where, target.operation_name, answered=False)
            raise
        exchange.status = status = response.status
        exchange.upstream_duration = now() - sent
        exchange.amazon_request_id = response.value(b"x-amzn-requestid")
        if status >= 500:
            self.circuits.failed(where, target.operation_name, answered=True)
        else:
            self.circuits.worked(where)
            if status not in REFUSED:
                self.experience.note_worked(target)
        if status == 429 or RATE_HEADER in response.names.at or exchange.waited:
            self.limits.learn(target, status, response.first(RATE_HEADER), waited=exchange.waited > 0)
        return response

    async def _refused(self, call: Call, response: Answer, token: Token) -> tuple[Answer, bytes]:
        """Send a refused call once more where another token may help; return the answer that counts, and its beginning.

        What was refused was not executed, so any method may be sent again.
        """
        credential = call.target.credential
        beginning = await beginning_of(call, response)
        refusal = refusal_of(response, beginning)
        if refusal.blames_token and call.can_be_sent_again:
            call.patience.for_proxy()
            another = await self.tokens.replacement(credential, token)
            if another is not None:
                response.close()
                token = another
                self.metrics.retries.labels("token").inc()
                response = await self._send(call, token)
                beginning = await beginning_of(call, response) if response.status in REFUSED else b""
                refusal = refusal_of(response, beginning)
                self.tokens.judge(credential, token, accepted=not refusal.blames_token)
        if response.status in REFUSED:
            self._explain(call, token, refusal)
        return response, beginning

    def _explain(self, call: Call, token: Token, refusal: Refusal) -> None:
        """Note what is probably behind a refusal of Amazon's."""
        target, exchange = call.target, call.exchange
        exchange.token_age = self.now() - token.since
        exchange.hint = self.experience.hint(call.request.method, target, token, refusal)
        self.metrics.forbidden.labels(target.account, target.region, target.operation_name, exchange.hint).inc()
        if token.kind == "lwa" and not target.credential.reusable:
            self.documents.forget(target.credential)  # it was taken for unrestricted

    def _record(self, exchange: Exchange) -> None:
        """Count and log one finished request."""
        metrics, now, target, status = self.metrics, self.now, exchange.target, exchange.status
        duration = now() - exchange.started
        if exchange.broken:
            metrics.cut_off.inc()
        if exchange.fault is not None:
            metrics.errors.labels(exchange.error, exchange.fault).inc()
        account, region, operation = (
            (target.account, target.region, target.operation_name) if target is not None else exchange.where()
        )
        source = "amazon" if not exchange.error and not exchange.own else _source(exchange)
        labels = (account, region, operation, _label(exchange.method), str(status), exchange.token, source)
        series = metrics.known_series.get(labels) or metrics.series_of(*labels)
        series.requests += 1
        series.duration.observe(duration)
        recent = metrics.recent
        if recent is not None:
            # Names and numbers alone: what else is known of the request ends with it.
            recent.keep(
                (
                    recent.number(),
                    series.labels,
                    exchange.caller,
                    exchange.started,
                    duration,
                    exchange.waited,
                    exchange.token_wait,
                    exchange.upstream_duration,
                    exchange.attempts,
                    exchange.error,
                    exchange.hint,
                )
            )
        if target is not None:
            if exchange.waited:
                metrics.limit_wait.observe(exchange.waited)
            else:
                metrics.limit_wait.none += 1
        if exchange.upstream_duration is not None:
            series.upstream_duration.observe(exchange.upstream_duration)
            if exchange.token_wait:
                metrics.token_wait.observe(exchange.token_wait)
            else:
                metrics.token_wait.none += 1
            traffic = series.traffic
            traffic.sent += exchange.request_bytes
            traffic.received += exchange.response_bytes
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info("request", extra=fields(**_line(exchange, duration)))
        if AUDIT.isEnabledFor(logging.INFO):
            AUDIT.info("request", extra=fields(listener=self.name, **_audit_line(exchange)))


def refusal_of(response: Answer, beginning: bytes) -> Refusal:
    """Return what Amazon says in a refusal, whatever its content coding."""
    coding = response.first(b"content-encoding") or ""
    body = unpacked(beginning, coding, MOST_OF_REFUSAL * 4)
    return parse_refusal(body, response.first(b"x-amzn-errortype") or "")


def _source(exchange: Exchange) -> str:
    """Return who answered where it was not Amazon: the proxy, or nobody, since the client had left."""
    return "client" if exchange.error and exchange.status == CLIENT_LEFT else "proxy"


def _for_browsers(admin: Address | None) -> str:
    """Return what to tell a person who opened the apps' port in a browser: nothing of Amazon's is at `/`."""
    page = f"; the status page is at http://{admin}/" if admin is not None and admin.port else ""
    return f"This port is for apps{page}."


def _label(method: str) -> str:
    return method if method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} else "other"


def _well_formed_id(text: str | bytes | None) -> str:
    """Return an id of the app's or of Amazon's for the log; nothing where it is more than an id."""
    if isinstance(text, bytes):
        text = text.decode("latin-1").rstrip(" \t")
    return text if text is not None and _ID.fullmatch(text) else ""


def _line(exchange: Exchange, duration: float) -> dict[str, object]:
    """Return the fields of a request's log line: nothing in it comes from the app but the method and a plain id."""
    upstream = exchange.upstream_duration
    return {
        "code": exchange.status,
        "method": _label(exchange.method),
        "caller": exchange.caller or None,
        "account": exchange.account,
        "region": exchange.region,
        "operation": exchange.operation,
        "token": exchange.token,
        "dropped": ",".join(exchange.dropped) or None,
        "token_age": round(exchange.token_age) if exchange.hint else None,
        "hint": exchange.hint or None,
        "duration": round(duration, 4),
        "upstream": None if upstream is None else round(upstream, 4),
        "wait": round(exchange.waited, 3),
        "attempts": exchange.attempts,
        "amazon_request_id": _well_formed_id(exchange.amazon_request_id),
        "request_id": _well_formed_id(exchange.request_id),
        "error": exchange.error,
        "broken": exchange.broken or None,
    }


def _audit_line(exchange: Exchange) -> dict[str, object]:
    """Return who did what, for the audit log: nothing in it is personal data."""
    return {
        "caller": exchange.caller or None,
        "account": exchange.account,
        "region": exchange.region,
        "method": _label(exchange.method),
        "operation": exchange.operation,
        "token": exchange.token,
        "data_elements": list(exchange.elements),
        "status": exchange.status,
        "error": exchange.error or None,
        "attempts": exchange.attempts,
        "amazon_request_id": _well_formed_id(exchange.amazon_request_id) or None,
        "request_id": _well_formed_id(exchange.request_id) or None,
    }


def refusal(request: web.BaseRequest, error: ProxyError, exchange: Exchange) -> OwnAnswer:
    """Return the answer for an error of ours, and note it in the exchange."""
    exchange.status, exchange.error, exchange.fault = error.status, error.code, error.fault
    answer = OwnAnswer(error, exchange.summary(), with_body=request.method != "HEAD")
    if isinstance(error, _UNCLEAR) or (request.body_exists and not request.content.at_eof()):
        answer.force_close()  # what follows on this connection is the unread body, or who knows what: not a request
    return answer
