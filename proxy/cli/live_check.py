"""Does every account work right now, and if not, why not and what is to be done?

Asked by the proxy's own parts: the same exchanges, the same usage plans, the same connections, addresses and forward
proxy, so that what is found here is what an app would meet. Nothing is written, and of what Amazon answers only the
countries of the marketplaces are kept.
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
from proxy.amazon.error_response import Refusal, parse_object, parse_refusal
from proxy.amazon.headers import credential_headers
from proxy.amazon.operations import OperationTable, load_table
from proxy.cli.advice import (
    CLOCK,
    FAILING,
    NO_ELEMENTS,
    NO_MARKETPLACES,
    NO_ROLE,
    NO_SCOPE,
    NO_WAY_TO_LWA,
    NOWHERE,
    ODD,
    THROTTLED,
    WRONG_REGION,
    why_unreachable,
)
from proxy.cli.check_report import Finding, Place, Report, Result
from proxy.config import Config, Listener
from proxy.errors import ProxyError, TokenUnavailable, UsagePlanExhausted
from proxy.observability.metrics import Metrics
from proxy.request.forbidden_hints import HINTS, REFUSED, Experience
from proxy.request.ratelimit.limiter import RATE_HEADER, Claim, Limits
from proxy.request.routing import ACCOUNT_HEADER, REGION_HEADER, Credential, Target, endpoint_of, identify
from proxy.request.tokens.client import Grants
from proxy.request.tokens.provider import Token, Tokens
from proxy.request.tokens.report_documents import Documents
from proxy.request.upstream.connector import Origin
from proxy.request.upstream.forward import open_session
from proxy.request.upstream.http1 import Broken
from proxy.request.upstream.pool import Pool
from proxy.request.upstream.retry import RETRIED_STATUSES
from proxy.request.upstream.token_redaction import Mask, telling_part
from proxy.request.validation import Admitted
from proxy.server.runtime import open_lwa_session, user_agents
from proxy.store import MemoryStore

PARALLEL = 10  # accounts that are looked at at once
TRIES = 3  # of one call that fails for no reason of ours
MAX_WAIT = 90.0  # seconds for a place in a usage plan: getMarketplaceParticipations has one a minute
SILENCE = 30.0  # seconds for one answer, or timeouts.upstream_idle where that is shorter
GIVE_UP = 20  # accounts in a row that a host fails, after which the rest is not tried
MAX_ANSWER = 256 * 1024
SKEW = 60.0  # seconds by which this machine's clock may be wrong
CALL = "/sellers/v1/marketplaceParticipations"
RESTRICTED = "/orders/v0/orders"  # asked for personal data, never called
SCOPE = "sellingpartnerapi::notifications"

_COUNTRY = re.compile(r"[A-Z]{2}", re.ASCII)


def is_callable(path: str, table: OperationTable) -> bool:
    """Return whether a path, with its query, is of an operation that may be called to see whether an account works.

    It reads, for a selling partner, and brings no personal data that needs a token of its own.
    """
    if not (path.startswith("/") and path.isascii() and path.isprintable()) or {" ", "#"} & set(path):
        return False
    operation = table.match("GET", path.partition("?")[0])
    return operation is not None and not operation.restricted and not operation.scope


async def look(
    config: Config,
    report: Report,
    *,
    call: str = CALL,
    now: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    call_later: Callable[..., object] | None = None,
) -> None:
    """Look at all that `report` wants, and note what is found; who is cancelled leaves what was found till then.

    `call` is the path, with its query, that is called for each account.
    """
    async with _parts(config, now=now, wall=wall, call_later=call_later) as parts:
        looking = _Looking(config, parts, report, call, wall, sleep)
        await looking.at_connections()
        await looking.at_applications()
        await looking.at_places()
    report.is_whole = True


class _Parts(NamedTuple):
    """What a proxy would serve with."""

    amazon: Pool
    lwa: Pool
    tokens: Tokens
    limits: Limits
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
        limits = Limits(metrics, pace=True, now=now, call_later=call_later)
        amazon = await stack.enter_async_context(open_session(config, 2 * PARALLEL))
        lwa = await stack.enter_async_context(open_lwa_session(config, amazon.tls))
        grants = Grants(
            config,
            lwa_session=lwa,
            amazon_session=amazon,
            limits=limits,
            mint=table.match("POST", rdt.PATH),
            metrics=metrics,
            now=now,
        )
        # Never the store that replicas share: a token from there would say nothing about the refresh token.
        store = MemoryStore()
        stack.push_async_callback(store.close)
        tokens = Tokens(grants=grants, documents=Documents(), store=store, metrics=metrics, now=now, wall=wall)
        stack.push_async_callback(tokens.close)
        yield _Parts(amazon, lwa, tokens, limits, table)


class _Looking:
    """One look at everything."""

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
        self._experience = Experience(parts.table)
        self._agents = user_agents(config)
        self._unreachable: set[Origin] = set()
        self._failures: dict[Origin, int] = {}
        self._skews: list[float] = []

    # Connections: who cannot be reached is not asked for each account anew.

    async def at_connections(self) -> None:
        """Try a connection to Login with Amazon, and to each region that is wanted."""
        lwa = self._config.endpoints.lwa
        endpoints = {Origin.of(lwa): self._parts.lwa}
        for place in self._report.wanted:
            endpoints.setdefault(Origin.of(self._endpoint(place)), self._parts.amazon)
        found = await asyncio.gather(*(self._at_connection(origin, pool) for origin, pool in endpoints.items()))
        self._report.findings += found

    async def _at_connection(self, origin: Origin, pool: Pool) -> Finding:
        try:
            wire = await pool.take(origin, fresh=True)
        except OSError as exc:
            self._unreachable.add(origin)
            by_proxy = self._config.pool.proxy is not None
            code, said, advice = why_unreachable(exc, by_proxy=by_proxy)
            return Finding("connection", "failed", host=origin.authority, code=code, said=said, advice=advice)
        wire.abort()
        return Finding("connection", "ok", host=origin.authority)

    def _endpoint(self, place: Place) -> str:
        environment = self._config.environment_of(self._config.accounts[place.account])
        return endpoint_of(self._config, environment, place.region)

    def _is_reachable(self, url: str) -> bool:
        return Origin.of(url) not in self._unreachable

    def _fared(self, url: str, *, well: bool) -> None:
        """Learn how a host fared: one that fails everybody is given up, so that hundreds do not wait for it in turn."""
        origin = Origin.of(url)
        self._failures[origin] = 0 if well else self._failures.get(origin, 0) + 1
        if self._failures[origin] >= GIVE_UP:
            self._unreachable.add(origin)

    # Applications: a grantless token each.

    async def at_applications(self) -> None:
        """Get a grantless token for each application that the wanted accounts belong to."""
        first: dict[str, Place] = {}
        for place in self._report.wanted:
            name, _ = self._config.application_of(self._config.accounts[place.account])
            first.setdefault(name, place)
        found = await asyncio.gather(*(self._at_application(name, place) for name, place in first.items()))
        self._report.findings += found

    async def _at_application(self, name: str, place: Place) -> Finding:
        about = Finding("grantless", "ok", name)
        if not self._is_reachable(self._config.endpoints.lwa):
            return about._replace(result="not tried", code="unreachable", said=NO_WAY_TO_LWA)
        environment = self._config.environment_of(self._config.accounts[place.account])
        credential = Credential("grantless", name, "", environment, place.region, scope=SCOPE)
        try:
            await self._parts.tokens.get(credential)
        except ProxyError as error:
            reason = reason_of(error)
            # A vendor's application gets none, and needs none.
            result: Result = "warning" if reason in {"invalid_scope", "unauthorized_client"} else "failed"
            advice = NO_SCOPE if result == "warning" else _advice_on(error)
            return about._replace(result=result, code=reason, said=error.message, advice=advice)
        return about

    # Accounts.

    async def at_places(self) -> None:
        """Look at every account and region, a bounded number at a time."""
        waiting = iter(self._report.wanted)

        async def work() -> None:
            for place in waiting:
                found = await self._at_place(place)
                self._report.findings += found
                self._report.done += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(min(PARALLEL, len(self._report.wanted))):
                group.create_task(work())
        order = {(place.account, str(place.region)): number for number, place in enumerate(self._report.wanted)}
        found = sorted(self._report.findings, key=lambda one: order.get((one.account, one.region), -1))
        self._report.findings[:] = [self._with_hindsight(finding) for finding in found]
        self._at_clock()

    async def _at_place(self, place: Place) -> list[Finding]:
        name, _ = self._config.application_of(self._config.accounts[place.account])
        about = Finding("token", "not tried", name, place.account, place.region)
        ordinary, restricted = self._target(CALL, place), self._target(RESTRICTED, place)
        steps: list[Finding] = [about, about._replace(step="call")]
        wants_rdt = restricted.credential.kind == "rdt"
        if wants_rdt:
            steps.append(about._replace(step="rdt"))
        if not self._is_reachable(self._config.endpoints.lwa):
            return [step._replace(code="unreachable", said=NO_WAY_TO_LWA) for step in steps]
        try:
            token = await self._parts.tokens.get(ordinary.credential)
        except ProxyError as error:
            self._fared(self._config.endpoints.lwa, well=not isinstance(error, TokenUnavailable))
            steps[0] = _failed(about, error)
            return [
                steps[0],
                *(step._replace(code="token_missing", said="there is no token for it") for step in steps[1:]),
            ]
        self._fared(self._config.endpoints.lwa, well=True)
        steps[0] = about._replace(result="ok")
        if not self._is_reachable(ordinary.endpoint):
            unreachable = (step._replace(code="unreachable", said="no way to the region's host") for step in steps[1:])
            return [steps[0], *unreachable]
        try:
            target = self._target(self._call, place)
        except ProxyError as error:  # its query names a marketplace of another region
            steps[1] = _failed(steps[1], error)
        else:
            steps[1] = await self._at_call(steps[1], target, token)
        if wants_rdt:
            steps[2] = await self._at_rdt(steps[2], restricted)
        return steps

    def _target(self, path: str, place: Place) -> Target:
        """Return what a proxy would decide about an app's GET for this account and region."""
        headers = CIMultiDictProxy(CIMultiDict({ACCOUNT_HEADER: place.account, REGION_HEADER: place.region}))
        admitted = Admitted(path, "localhost", None, frozenset({ACCOUNT_HEADER, REGION_HEADER}))
        return identify("GET", admitted, headers, _anybody(), self._config, self._parts.table)

    async def _at_call(self, about: Finding, target: Target, token: Token) -> Finding:
        try:
            status, body = await self._called(target, token)
            if status in REFUSED and parse_refusal(body).blames_token:
                # As for an app: another token, once.
                another = await self._parts.tokens.replacement(target.credential, token)
                if another is not None:
                    token = another
                    status, body = await self._called(target, token)
        except UsagePlanExhausted as error:
            return about._replace(result="failed", code="throttled", said=error.message, advice=THROTTLED)
        except (Broken, OSError) as exc:
            self._fared(target.endpoint, well=False)
            code, said, advice = why_unreachable(exc, by_proxy=self._config.pool.proxy is not None)
            return about._replace(result="failed", code=code, said=said, advice=advice)
        self._fared(target.endpoint, well=status not in RETRIED_STATUSES)
        if status == 200 and self._call != CALL:
            return about._replace(result="ok")
        if status == 200:
            countries = countries_in(body)
            if not countries:
                return about._replace(result="failed", code="no_marketplaces", said=NOWHERE, advice=NO_MARKETPLACES)
            self._experience.note_worked(target)
            return about._replace(result="ok", countries=countries)
        refusal = parse_refusal(body)
        said = " ".join(filter(None, (f"Amazon answers {status}:", refusal.code, refusal.message, refusal.details)))
        code, advice = self._why_refused(status, target, token, refusal)
        return about._replace(result="failed", code=code, said=said.removesuffix(":"), advice=advice)

    def _why_refused(self, status: int, target: Target, token: Token, refusal: Refusal) -> tuple[str, str]:
        """Return a code and advice for an answer that is no success."""
        if status in REFUSED:
            hint = self._experience.hint("GET", target, token, refusal)
            return hint, HINTS[hint]
        if self._skews and abs(self._skews[-1]) > SKEW:
            return "clock", CLOCK
        if status in RETRIED_STATUSES:
            return "amazon_failing", FAILING
        return f"http_{status}", ODD

    async def _called(self, target: Target, token: Token) -> tuple[int, bytes]:
        """Make the call, at its place in its usage plan, and again where that may help; return status and body.

        Raises UsagePlanExhausted, Broken and OSError.
        """
        claim, wall = Claim(MAX_WAIT), self._wall
        url, agent = target.endpoint + target.path_and_query, self._agents[target.application]
        attempt = 0
        while True:
            attempt += 1
            waited = await self._parts.limits.admit(target, claim)
            headers = {**credential_headers(token.value, agent, wall()), "Accept": "application/json"}
            async with asyncio.timeout(min(SILENCE, self._config.timeouts.upstream_idle)):
                answer, body = await self._parts.amazon.ask("GET", url, headers, b"", MAX_ANSWER)
            body = Mask(telling_part(token.value.reveal())).whole(body)
            self._note_date(answer.first(b"date"))
            self._parts.limits.learn(target, answer.status, answer.first(RATE_HEADER), waited=waited > 0)
            if attempt >= TRIES or answer.status not in {429, *RETRIED_STATUSES}:
                if answer.status == 429:
                    raise UsagePlanExhausted(f"Amazon answered 429 {attempt} times")
                return answer.status, body
            if answer.status == 429:
                claim = replace(claim, max_wait=claim.max_wait - waited, first=True)
            else:
                await self._sleep(0.5 * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    async def _at_rdt(self, about: Finding, target: Target) -> Finding:
        """Get a Restricted Data Token, which is not used."""
        wanted = target.credential.data_elements
        try:
            token = await self._parts.tokens.get(target.credential)
        except ProxyError as error:
            return _failed(about, error)
        missing = [element for element in wanted if element not in token.data_elements]
        if not missing:
            return about._replace(result="ok")
        said = f"the application has no role for {', '.join(missing)}"
        return about._replace(result="failed", code="elements_refused", said=said, advice=NO_ELEMENTS)

    def _with_hindsight(self, finding: Finding) -> Finding:
        """Return what a refusal probably means, now that it is known how the application's other accounts fared."""
        if finding.code != "region_or_authorisation" or self._call != CALL:
            return finding
        others = [
            other
            for other in self._report.findings
            if other.step == "call" and other.application == finding.application and other.result == "ok"
        ]
        return finding._replace(advice=WRONG_REGION if others else NO_ROLE)

    # The clock.

    def _note_date(self, date: str | None) -> None:
        try:
            theirs = parsedate_to_datetime(date or "").timestamp()
        except (ValueError, OverflowError):
            return
        self._skews.append(self._wall() - theirs)

    def _at_clock(self) -> None:
        """Compare this machine's clock with the dates of Amazon's answers."""
        if not self._skews:
            return
        skew = sorted(self._skews)[len(self._skews) // 2]
        if abs(skew) <= SKEW:
            self._report.findings.append(Finding("clock", "ok"))
            return
        said = f"this machine's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} Amazon's"
        self._report.findings.append(Finding("clock", "warning", code="clock", said=said, advice=CLOCK))


def _anybody() -> Listener:
    """Return a listener that leaves the choice of account and region to the request."""
    return Config().listen[0]


def _failed(about: Finding, error: ProxyError) -> Finding:
    code, said = reason_of(error), error.message
    if code == "invalid_client":  # it is the application's, whichever account was asked for
        said = said.replace(f"account {about.account} in {about.region}", f"application {about.application}")
    return about._replace(result="failed", code=code, said=said, advice=_advice_on(error))


def _advice_on(error: ProxyError) -> str:
    # The error's own sends an app's author here.
    return FAILING if isinstance(error, TokenUnavailable) else error.hint


def reason_of(error: ProxyError) -> str:
    """Return a word for why there is no token: OAuth's own where Login with Amazon says one."""
    return error.reason or error.code


def countries_in(body: bytes) -> tuple[str, ...]:
    """Return the country codes of the marketplaces that an answer of getMarketplaceParticipations names, and no more.

    It names the store as well, which is nobody's business here.
    """
    payload = parse_object(body).get("payload")
    found = set()
    for row in payload if isinstance(payload, list) else ():
        marketplace = row.get("marketplace") if isinstance(row, dict) else None
        country = marketplace.get("countryCode") if isinstance(marketplace, dict) else None
        if isinstance(country, str) and _COUNTRY.fullmatch(country):
            found.add(country)
    return tuple(sorted(found))
