"""`check --live`: test every account at Login with Amazon and at Amazon, and say what is wrong and what to do.

It uses the proxy's own parts: the same token requests, usage plans, connections, addresses and forward proxy, so that
an app would meet the same. It writes nothing, and of Amazon's responses it keeps only the countries of marketplaces.
"""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from multidict import CIMultiDict, CIMultiDictProxy

from proxy.amazon import rdt
from proxy.amazon.error_response import AmazonError, parse_error, parse_object
from proxy.amazon.headers import credential_headers
from proxy.amazon.operations import OperationTable, load_table
from proxy.cli.advice import (
    AMAZON_DOWN,
    FIX_CLOCK,
    LWA_UNREACHABLE,
    NO_ELEMENTS,
    NO_MARKETPLACE_DETAIL,
    NO_MARKETPLACES,
    NO_ROLE,
    NO_SCOPE,
    THROTTLED,
    UNEXPECTED_RESPONSE,
    WRONG_REGION,
    diagnose_connection_error,
)
from proxy.cli.check_report import AccountRegion, CheckResult, Report, Result
from proxy.config import Config, Listener
from proxy.errors import ProxyError, TokenUnavailable, UsagePlanExhausted
from proxy.observability.metrics import Metrics
from proxy.request.forbidden_hints import FORBIDDEN_STATUSES, HINTS, SuccessHistory
from proxy.request.ratelimit.limiter import RATE_HEADER, RateLimiter
from proxy.request.request_options import AdmissionRequest
from proxy.request.routing import Route, endpoint_of, resolve
from proxy.request.target import ACCOUNT_HEADER, REGION_HEADER
from proxy.request.token import Token, secret_suffix
from proxy.request.token_selection import TokenKey
from proxy.request.tokens.client import TokenClient
from proxy.request.tokens.provider import TokenProvider
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.request.upstream.connector import Origin
from proxy.request.upstream.http1 import RemoteProtocolError
from proxy.request.upstream.pool import ConnectionPool, amazon_pool, lwa_pool
from proxy.request.upstream.retry import RETRIED_STATUSES
from proxy.request.upstream.token_redaction import TokenRedactor
from proxy.request.validation import ValidatedTarget
from proxy.server.upstream_pools import user_agents
from proxy.store import MemoryStore

PARALLEL = 10  # accounts checked at the same time
TRIES = 3  # of one call that fails with a status of Amazon's servers
# 0.016 calls a second (model sellers) are one in 62.5 s.
MAX_WAIT = 90.0  # seconds to wait for a usage plan: getMarketplaceParticipations has one call a minute
CALL_TIMEOUT = 30.0  # seconds for one response, or timeouts.upstream_idle if that is shorter
HOST_FAILURE_LIMIT = 20  # accounts in a row for which a host failed, after which the rest is not tried
MAX_RESPONSE = 256 * 1024
SKEW = 60.0  # seconds by which this machine's clock may be wrong
CALL = "/sellers/v1/marketplaceParticipations"
# A Restricted Data Token's path has no query and no id here, so that no order has to exist.
RESTRICTED = "/orders/v0/orders"  # asked for personal data, never called
SCOPE = "sellingpartnerapi::notifications"

_COUNTRY = re.compile(r"[A-Z]{2}", re.ASCII)


def is_callable(path: str, table: OperationTable) -> bool:
    """Return whether a path, with its query, is of an operation that may be called to test an account.

    Such an operation only reads, is for a selling partner, and returns no personal data that needs a token of its own.
    """
    if not (path.startswith("/") and path.isascii() and path.isprintable()) or {" ", "#"} & set(path):
        return False
    operation = table.match("GET", path.partition("?")[0])
    return operation is not None and not operation.restricted and not operation.scope


async def run_checks(
    config: Config,
    report: Report,
    *,
    call: str = CALL,
    now: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    call_later: Callable[..., object] | None = None,
) -> None:
    """Check all targets of `report` and record the results; if cancelled, the results so far stay.

    `call` is the path, with its query, that is called for each account.
    """
    async with _parts(config, now=now, wall=wall, call_later=call_later) as parts:
        looking = LiveCheck(config, parts, report, call, wall, sleep)
        await looking.check_connections()
        await looking.check_applications()
        await looking.check_accounts()
    report.is_complete = True


class _Parts(NamedTuple):
    """The parts of a proxy that the checks use."""

    amazon: ConnectionPool
    lwa: ConnectionPool
    tokens: TokenProvider
    limits: RateLimiter
    table: OperationTable


@asynccontextmanager
async def _parts(
    config: Config,
    *,
    now: Callable[[], float],
    wall: Callable[[], float],
    call_later: Callable[..., object] | None,
) -> AsyncIterator[_Parts]:
    async with AsyncExitStack() as stack:
        metrics, table = Metrics(account_on_histograms=False), load_table()
        rate_limiter = RateLimiter(metrics, pace=True, now=now, call_later=call_later)
        amazon = await stack.enter_async_context(amazon_pool(config, 2 * PARALLEL))
        lwa = await stack.enter_async_context(lwa_pool(config, amazon.tls))
        token_client = TokenClient(
            config,
            lwa_session=lwa,
            amazon_session=amazon,
            rate_limiter=rate_limiter,
            mint=table.match("POST", rdt.PATH),
            metrics=metrics,
            now=now,
        )
        # Never the shared store: a token from there would say nothing about the refresh token.
        store = MemoryStore()
        stack.push_async_callback(store.close)
        tokens = TokenProvider(
            token_client=token_client,
            unrestricted_reports=UnrestrictedReports(),
            store=store,
            metrics=metrics,
            now=now,
            wall=wall,
        )
        stack.push_async_callback(tokens.close)
        yield _Parts(amazon, lwa, tokens, rate_limiter, table)


class LiveCheck:
    """One run of all checks."""

    def __init__(
        self,
        config: Config,
        parts: _Parts,
        report: Report,
        call: str,
        wall: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._config = config
        self._parts = parts
        self._report = report
        self._call = call
        self._wall = wall
        self._sleep = sleep
        self._experience = SuccessHistory(parts.table)
        self._agents = user_agents(config)
        self._unreachable: set[Origin] = set()
        self._failures: dict[Origin, int] = {}
        self._skews: list[float] = []

    # Connections: a host that cannot be reached is not tried again for each account.

    async def check_connections(self) -> None:
        """Test a connection to Login with Amazon and to each region of the targets."""
        lwa = self._config.endpoints.lwa
        endpoints = {Origin.of(lwa): self._parts.lwa}
        for target in self._report.targets:
            endpoints.setdefault(Origin.of(self._endpoint(target)), self._parts.amazon)
        found = await asyncio.gather(*(self._check_connection(origin, pool) for origin, pool in endpoints.items()))
        self._report.results += found

    async def _check_connection(self, origin: Origin, pool: ConnectionPool) -> CheckResult:
        try:
            connection = await pool.acquire(origin, fresh=True)
        except OSError as exc:
            self._unreachable.add(origin)
            by_proxy = self._config.pool.proxy is not None
            code, said, advice = diagnose_connection_error(exc, by_proxy=by_proxy)
            return CheckResult("connection", "failed", host=origin.authority, code=code, detail=said, advice=advice)
        # Only that a connection can be made is tested; nothing was sent on it.
        connection.abort()
        return CheckResult("connection", "ok", host=origin.authority)

    def _endpoint(self, target: AccountRegion) -> str:
        environment = self._config.environment_of(self._config.accounts[target.account])
        return endpoint_of(self._config, environment, target.region)

    def _is_reachable(self, url: str) -> bool:
        return Origin.of(url) not in self._unreachable

    def record_host_result(self, url: str, *, well: bool) -> None:
        """Record whether a host failed; after HOST_FAILURE_LIMIT failures in a row it is not tried again."""
        origin = Origin.of(url)
        self._failures[origin] = 0 if well else self._failures.get(origin, 0) + 1
        if self._failures[origin] >= HOST_FAILURE_LIMIT:
            self._unreachable.add(origin)

    # Applications: one grantless token each.

    async def check_applications(self) -> None:
        """Get a grantless token for each application of the targets' accounts."""
        first: dict[str, AccountRegion] = {}
        for target in self._report.targets:
            name, _ = self._config.application_of(self._config.accounts[target.account])
            first.setdefault(name, target)
        found = await asyncio.gather(*(self._check_application(name, place) for name, place in first.items()))
        self._report.results += found

    async def _check_application(self, name: str, target: AccountRegion) -> CheckResult:
        about = CheckResult("grantless", "ok", name)
        if not self._is_reachable(self._config.endpoints.lwa):
            return about._replace(result="not tried", code="unreachable", detail=LWA_UNREACHABLE)
        environment = self._config.environment_of(self._config.accounts[target.account])
        token_key = TokenKey("grantless", name, "", environment, target.region, scope=SCOPE)
        try:
            await self._parts.tokens.get(token_key)
        except ProxyError as error:
            reason = reason_of(error)
            # A vendor's application does not get one, and does not need one.
            # Amazon describes grantless operations for seller applications; a vendor was refused (docs#2979).
            result: Result = "warning" if reason in {"invalid_scope", "unauthorized_client"} else "failed"
            advice = NO_SCOPE if result == "warning" else _advice_on(error)
            return about._replace(result=result, code=reason, detail=error.message, advice=advice)
        return about

    # Accounts.

    async def check_accounts(self) -> None:
        """Check every account and region, PARALLEL at a time."""
        waiting = iter(self._report.targets)

        async def work() -> None:
            # One iterator for all tasks: taking the next target has no await, so that none is taken twice.
            for target in waiting:
                found = await self._check_account(target)
                self._report.results += found
                self._report.completed += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(min(PARALLEL, len(self._report.targets))):
                group.create_task(work())
        order = {(place.account, str(place.region)): number for number, place in enumerate(self._report.targets)}
        found = sorted(self._report.results, key=lambda one: order.get((one.account, one.region), -1))
        self._report.results[:] = [self.refine_advice(result) for result in found]
        self._check_clock()

    async def _check_account(self, place: AccountRegion) -> list[CheckResult]:
        name, _ = self._config.application_of(self._config.accounts[place.account])
        about = CheckResult("token", "not tried", name, place.account, place.region)
        ordinary, restricted = self._target(CALL, place), self._target(RESTRICTED, place)
        steps: list[CheckResult] = [about, about._replace(check="call")]
        wants_rdt = restricted.token_key.kind == "rdt"
        if wants_rdt:
            steps.append(about._replace(check="rdt"))
        if not self._is_reachable(self._config.endpoints.lwa):
            return [step._replace(code="unreachable", detail=LWA_UNREACHABLE) for step in steps]
        try:
            token = await self._parts.tokens.get(ordinary.token_key)
        except ProxyError as error:
            self.record_host_result(self._config.endpoints.lwa, well=not isinstance(error, TokenUnavailable))
            steps[0] = _failed(about, error)
            return [
                steps[0],
                *(step._replace(code="token_missing", detail="there is no token for it") for step in steps[1:]),
            ]
        self.record_host_result(self._config.endpoints.lwa, well=True)
        steps[0] = about._replace(result="ok")
        if not self._is_reachable(ordinary.endpoint):
            unreachable = (
                step._replace(code="unreachable", detail="no way to the region's host") for step in steps[1:]
            )
            return [steps[0], *unreachable]
        try:
            route = self._target(self._call, place)
        except ProxyError as error:  # its query names a marketplace of another region
            steps[1] = _failed(steps[1], error)
        else:
            steps[1] = await self._check_call(steps[1], route, token)
        if wants_rdt:
            steps[2] = await self._check_rdt(steps[2], restricted)
        return steps

    def _target(self, path: str, target: AccountRegion) -> Route:
        """Return the route of an app's GET for this account and region."""
        headers = CIMultiDictProxy(CIMultiDict({ACCOUNT_HEADER: target.account, REGION_HEADER: target.region}))
        validated = ValidatedTarget(path, "localhost", None, frozenset({ACCOUNT_HEADER, REGION_HEADER}))
        return resolve("GET", validated, headers, _any_account(), self._config, self._parts.table)

    async def _check_call(self, about: CheckResult, route: Route, token: Token) -> CheckResult:
        try:
            status, body = await self._send_call(route, token)
            if status in FORBIDDEN_STATUSES and parse_error(body).is_token_error:
                # As for an app: one other token, once.
                # Not more than once: on 2023-05-27 Amazon rejected good tokens for 25 minutes (docs#3153).
                another = await self._parts.tokens.refresh_rejected(route.token_key, token)
                if another is not None:
                    token = another
                    status, body = await self._send_call(route, token)
        except UsagePlanExhausted as error:
            return about._replace(result="failed", code="throttled", detail=error.message, advice=THROTTLED)
        except (RemoteProtocolError, OSError) as exc:
            self.record_host_result(route.endpoint, well=False)
            code, said, advice = diagnose_connection_error(exc, by_proxy=self._config.pool.proxy is not None)
            return about._replace(result="failed", code=code, detail=said, advice=advice)
        self.record_host_result(route.endpoint, well=status not in RETRIED_STATUSES)
        if status == 200 and self._call != CALL:
            return about._replace(result="ok")
        if status == 200:
            countries = countries_in(body)
            if not countries:
                return about._replace(
                    result="failed", code="no_marketplaces", detail=NO_MARKETPLACE_DETAIL, advice=NO_MARKETPLACES
                )
            # A call that worked excludes some causes of a later 403 of this account and region.
            self._experience.record(route)
            return about._replace(result="ok", countries=countries)
        amazon_error = parse_error(body)
        said = " ".join(
            filter(None, (f"Amazon answers {status}:", amazon_error.code, amazon_error.message, amazon_error.details))
        )
        code, advice = self._explain_refusal(status, route, token, amazon_error)
        return about._replace(result="failed", code=code, detail=said.removesuffix(":"), advice=advice)

    def _explain_refusal(self, status: int, route: Route, token: Token, amazon_error: AmazonError) -> tuple[str, str]:
        """Return a code and advice for a response that is no success."""
        if status in FORBIDDEN_STATUSES:
            hint = self._experience.diagnose("GET", route, token, amazon_error)
            return hint, HINTS[hint]
        if self._skews and abs(self._skews[-1]) > SKEW:
            return "clock", FIX_CLOCK
        if status in RETRIED_STATUSES:
            return "amazon_failing", AMAZON_DOWN
        return f"http_{status}", UNEXPECTED_RESPONSE

    async def _send_call(self, route: Route, token: Token) -> tuple[int, bytes]:
        """Send the call within its usage plan, with retries where they may help; return status and body.

        Raises UsagePlanExhausted, RemoteProtocolError and OSError.
        """
        admission, wall = AdmissionRequest(MAX_WAIT), self._wall
        url, agent = route.endpoint + route.path_and_query, self._agents[route.application]
        attempt = 0
        while True:
            attempt += 1
            waited = await self._parts.limits.acquire(route, admission)
            headers = {**credential_headers(token.value, agent, wall()), "Accept": "application/json"}
            async with asyncio.timeout(min(CALL_TIMEOUT, self._config.timeouts.upstream_idle)):
                response, body = await self._parts.amazon.request("GET", url, headers, b"", MAX_RESPONSE)
            # Before anything is read from it: Amazon's message is printed in the report.
            body = TokenRedactor(secret_suffix(token.value.reveal())).redact(body)
            self._note_date(response.first(b"date"))
            self._parts.limits.observe_response(route, response.status, response.first(RATE_HEADER), waited=waited > 0)
            if attempt >= TRIES or response.status not in {429, *RETRIED_STATUSES}:
                if response.status == 429:
                    raise UsagePlanExhausted(f"Amazon answered 429 {attempt} times")
                return response.status, body
            if response.status == 429:
                # No pause of its own: the limiter has seen the 429 and makes the retry wait.
                admission = replace(admission, max_wait=admission.max_wait - waited, is_retry=True)
            else:
                # DOC "Optimize Rate Limits for Application Workloads": exponential backoff with jitter.
                await self._sleep(0.5 * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    async def _check_rdt(self, about: CheckResult, route: Route) -> CheckResult:
        """Get a Restricted Data Token, without using it."""
        wanted = route.token_key.data_elements
        try:
            token = await self._parts.tokens.get(route.token_key)
        except ProxyError as error:
            return _failed(about, error)
        missing = [element for element in wanted if element not in token.data_elements]
        if not missing:
            return about._replace(result="ok")
        said = f"the application has no role for {', '.join(missing)}"
        return about._replace(result="failed", code="elements_refused", detail=said, advice=NO_ELEMENTS)

    def refine_advice(self, result: CheckResult) -> CheckResult:
        """Return what a 403 probably means, given the results of the application's other accounts."""
        if result.code != "region_or_authorisation" or self._call != CALL:
            return result
        others = [
            other
            for other in self._report.results
            if other.check == "call" and other.application == result.application and other.result == "ok"
        ]
        return result._replace(advice=WRONG_REGION if others else NO_ROLE)

    # The clock.

    def _note_date(self, date: str | None) -> None:
        try:
            # Since Python 3.10 it raises ValueError for an invalid date, also for an empty one.
            theirs = parsedate_to_datetime(date or "").timestamp()
        except (ValueError, OverflowError):
            return
        self._skews.append(self._wall() - theirs)

    def _check_clock(self) -> None:
        """Compare this machine's clock with the dates of Amazon's responses."""
        if not self._skews:
            return
        # The median: one wrong or late Date field must not report a wrong clock.
        skew = sorted(self._skews)[len(self._skews) // 2]
        if abs(skew) <= SKEW:
            self._report.results.append(CheckResult("clock", "ok"))
            return
        said = f"this machine's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} Amazon's"
        self._report.results.append(CheckResult("clock", "warning", code="clock", detail=said, advice=FIX_CLOCK))


def _any_account() -> Listener:
    """Return a listener that leaves the choice of account and region to the request."""
    return Config().listen[0]


def _failed(about: CheckResult, error: ProxyError) -> CheckResult:
    code, said = reason_of(error), error.message
    if code == "invalid_client":  # a fault of the application, whichever account it was asked for
        said = said.replace(f"account {about.account} in {about.region}", f"application {about.application}")
    return about._replace(result="failed", code=code, detail=said, advice=_advice_on(error))


def _advice_on(error: ProxyError) -> str:
    # The hint of the error itself points to this command.
    return AMAZON_DOWN if isinstance(error, TokenUnavailable) else error.hint


def reason_of(error: ProxyError) -> str:
    """Return a code for why there is no token: OAuth's error code if Login with Amazon gives one."""
    return error.reason or error.code


def countries_in(body: bytes) -> tuple[str, ...]:
    """Return only the country codes of the marketplaces in a response of getMarketplaceParticipations.

    The response also has the name of the store, which is not needed here.
    """
    payload = parse_object(body).get("payload")
    found = set()
    for row in payload if isinstance(payload, list) else ():
        marketplace = row.get("marketplace") if isinstance(row, dict) else None
        country = marketplace.get("countryCode") if isinstance(marketplace, dict) else None
        if isinstance(country, str) and _COUNTRY.fullmatch(country):
            found.add(country)
    return tuple(sorted(found))
