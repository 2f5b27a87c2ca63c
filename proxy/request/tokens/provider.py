"""Which token goes with this request: held, renewed before it expires, and fetched once for everybody who waits?

One exchange per credential at a time. A waiter who leaves cancels nothing. A token that is in use is renewed in the
background from about 85 % of its life; until its last seconds it is served while that goes on, or fails. How one
exchange is made stands in `grants.py`.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from proxy.config import Secret
from proxy.errors import ProxyError, RestrictedDataRefused, TokenUnavailable
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.request.token_selection import TokenKey, TokenKind, access_token_key
from proxy.request.tokens.client import (
    AccessTokenRejected,
    DataElementsDenied,
    FetchedToken,
    ReportUnrestricted,
    TokenClient,
)
from proxy.request.tokens.refresh_backoff import RefreshBackoff
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.request.upstream.token_redaction import secret_suffix
from proxy.store import Store, StoredToken

RENEW_AT = 0.85  # of a token's life
RENEW_JITTER = 0.05  # so that tokens fetched together are not renewed together
RENEW_LEAD = 1.5  # times what its exchange took: a slow token host is asked earlier
SAFETY_MARGIN = 2.0  # seconds before its expiry in which a token is not sent any more; for short lives a twentieth
IN_USE_WITHIN = 0.5  # of its life: a token that nobody asked for in that time is left to expire
CHECK_INTERVAL = 5.0  # seconds after which a renewal that failed is tried again

FIRST_PAUSE = 0.5  # seconds after a failed exchange; doubled with each further one
MAX_PAUSE = 5.0  # so that service is back within seconds of the token host's return
MAX_REJECTED_PAUSE = 300.0  # for refusals that only a person can mend
RECENT_FAILURE = 30.0  # seconds after a pause in which the trouble is taken to go on
PROBE_TIMEOUT = 1.0  # seconds that a caller waits for an exchange when the last one failed

SETTLED_AFTER = 3.0  # seconds after which a file that has changed is in force, or has changed back

MAX_CACHED = 50_000  # tokens; a report document's token has a key of its own
WARM_UP_PARALLEL = 20
REPLACED_PARALLEL = 20
ELEMENTS_REFUSED_FOR = 3600.0  # seconds for which an element is not asked for again
MAX_REFUSED_ELEMENTS = 10_000


@dataclass(slots=True, eq=False)
class Token:
    """A token in use. Moments are seconds of the monotonic clock; two tokens are equal only if they are the same."""

    value: Secret
    kind: TokenKind
    issued_at: float
    renew_at: float
    expires_at: float  # with a margin
    expires_hard: float  # without one: when there is no other
    used_at: float
    data_elements: tuple[str, ...] = ()
    # The lines of a request's head that it stands in, and the second of the wall clock that they name.
    lines: bytes = field(default=b"", repr=False)
    header_lines: int = -1
    source: str = ""  # the fingerprint of what it was fetched by; nothing where that is not certain
    secret_suffix: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.secret_suffix = secret_suffix(self.value.reveal())


@dataclass(slots=True)
class _Failure:
    """Why the last exchange failed, how many did in a row, with which secrets, and until when it is not tried again."""

    error: ProxyError
    count: int
    until: float
    secrets: tuple[Secret, ...]

    def is_recent(self, now: float) -> bool:
        """Whether the trouble probably goes on."""
        return self.error.retryable and now - self.until < RECENT_FAILURE


class TokenStatus(NamedTuple):
    """How the token of one credential stands; seconds from now."""

    token_key: TokenKey
    left: float | None  # for which the token that is held is good; None where none is
    age: float | None  # since it was asked for
    error: ProxyError | None  # why the last exchange failed, if it did
    failures: int  # in a row
    pause: float  # until an exchange is tried again


class TokenProvider:
    """The tokens of every credential that was asked for."""

    def __init__(
        self,
        *,
        token_client: TokenClient,
        unrestricted_reports: UnrestrictedReports,
        store: Store,
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        call_later: Callable[..., Any] | None = None,
    ) -> None:
        self._client = token_client
        self._documents = unrestricted_reports
        self._store = store
        self._metrics = metrics
        self._now = now
        self._wall = wall
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._tokens: dict[TokenKey, Token] = {}
        self._pending: dict[TokenKey, asyncio.Task[Token]] = {}
        self.superseded: set[asyncio.Task[Token]] = set()  # exchanges whose token nobody else is to get
        self._failed: dict[TokenKey, _Failure] = {}
        self._refused_elements: dict[tuple[TokenKey, str], float] = {}
        self._backoff = RefreshBackoff(now)
        self._replacing = asyncio.Semaphore(REPLACED_PARALLEL)
        self._closed = False

    async def get(self, token_key: TokenKey, *, rejected: Token | None = None) -> Token:
        """Return a token that is good now; `rejected` is one that Amazon has just refused.

        Where Amazon gives less than was asked for, the token's `kind` and `data_elements` say what it is good for.
        Raises TokenUnavailable, TokenRefused, RestrictedDataRefused or UsagePlanExhausted.
        """
        held = self.cached(token_key, rejected=rejected)
        return held if held is not None else await self.wait_for_token(self.effective_key(token_key), rejected)

    def cached(self, token_key: TokenKey, *, rejected: Token | None = None) -> Token | None:
        """Return the token that `get` would return without waiting, None where it would wait."""
        if token_key.kind == "rdt":
            token_key = self.effective_key(token_key)
        held, clock = self._tokens.get(token_key), self._now
        now = clock()
        if held is None or held is rejected or now >= held.expires_at:
            return None
        held.used_at = now
        if now >= held.renew_at and token_key not in self._pending and self._pause(token_key, now) <= 0:
            self.ensure_refresh(token_key, rejected)
        return held

    async def wait_for_token(self, token_key: TokenKey, rejected: Token | None) -> Token:
        """Wait for the exchange, or for several where the first one teaches what is to be asked for."""
        while True:
            pause, failure = self._pause(token_key, self._now()), self._failed.get(token_key)
            if failure is not None and pause > 0:
                return self.stale_token(token_key, rejected, _recur(failure.error, pause))
            task = self.ensure_refresh(token_key, rejected)
            # Who comes after a failure learns soon that it goes on, and is not kept for a timeout each.
            timeout = PROBE_TIMEOUT if failure is not None and failure.is_recent(self._now()) else None
            try:
                async with asyncio.timeout(timeout) as waited:
                    return await asyncio.shield(task)
            except TimeoutError:
                if not waited.expired() or failure is None:
                    raise
                return self.stale_token(token_key, rejected, _recur(failure.error, FIRST_PAUSE))
            except TokenUnavailable as error:
                return self.stale_token(token_key, rejected, error)
            except (ReportUnrestricted, DataElementsDenied):
                less = self.effective_key(token_key)
                if less == token_key:
                    raise
                token_key, rejected = less, None
                held = self._tokens.get(token_key)
                if held is not None and self._now() < held.expires_at:
                    return held

    def stale_token(self, token_key: TokenKey, rejected: Token | None, error: ProxyError) -> Token:
        """Return the token that is in its last seconds, where no other is to be had; raise `error` without one."""
        held = self._tokens.get(token_key)
        if held is None or held is rejected or self._now() >= held.expires_hard:
            raise error
        return held

    async def refresh_rejected(self, token_key: TokenKey, rejected: Token) -> Token | None:
        """Return another token for one that Amazon refused; None where there is none, or it is not worth fetching.

        Whoever gets one says by `judge` whether Amazon took it.
        """
        async with self._replacing:
            return await self._refresh_rejected(self.effective_key(token_key), rejected)

    async def _refresh_rejected(self, token_key: TokenKey, rejected: Token) -> Token | None:
        held = self._tokens.get(token_key)
        if held is not None and held is not rejected and self._now() < held.expires_at:
            return None if self._backoff.was_rejected(token_key, held) else held
        if not self._backoff.allows(token_key):
            return None
        try:
            return await self.get(token_key, rejected=rejected)
        except ProxyError:
            return None  # logged and counted where it arose; Amazon's own refusal is passed on

    def report_result(self, token_key: TokenKey, token: Token, *, accepted: bool) -> None:
        """Learn whether Amazon took a `token` that `replacement` gave."""
        self._backoff.record_result(self.effective_key(token_key), token, accepted=accepted)

    async def warm_up(self, token_keys: Iterable[TokenKey]) -> None:
        """Fetch these tokens, a bounded number at a time; failures are logged, not raised."""
        places = asyncio.Semaphore(WARM_UP_PARALLEL)

        async def fetch(token_key: TokenKey) -> None:
            async with places:
                try:
                    await self.get(token_key)
                except ProxyError:
                    return  # logged and counted where it arose

        await asyncio.gather(*(fetch(credential) for credential in token_keys))

    def invalidate(self, is_outdated: Callable[[TokenKey], bool]) -> None:
        """Use no token any more, held or on its way, whose credential is outdated; the next one is fetched anew."""
        known = {*self._tokens, *self._pending, *self._failed}
        for token_key in filter(is_outdated, known):
            self._tokens.pop(token_key, None)
            if task := self._pending.pop(token_key, None):
                self.superseded.add(task)  # for those who wait for it: they began before
            self._failed.pop(token_key, None)
            # Of one that goes on to be used, it comes back with the next token.
            self._metrics.token_expiry.remove(token_key.account, token_key.region, token_key.kind)
        # A seller who authorised anew may have been asked for more.
        kept = {key: until for key, until in self._refused_elements.items() if not is_outdated(key[0])}
        self._refused_elements = kept

    def statuses(self) -> Iterator[TokenStatus]:
        """Yield how each token stands that was asked for; without a change, and from any thread."""
        held, failed, pending = self._tokens.copy(), self._failed.copy(), self._pending.copy()
        now = self._now()
        for token_key in dict.fromkeys((*held, *failed, *pending)):
            token, failure = held.get(token_key), failed.get(token_key)
            is_good = token is not None and now < token.expires_hard
            yield TokenStatus(
                token_key,
                token.expires_at - now if token is not None and is_good else None,
                now - token.issued_at if token is not None and is_good else None,
                failure.error if failure is not None else None,
                failure.count if failure is not None else 0,
                max(0.0, failure.until - now) if failure is not None else 0.0,
            )

    async def close(self) -> None:
        """Cancel exchanges that are under way, and begin none."""
        self._closed = True
        tasks = [*self._pending.values(), *self.superseded]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # What Amazon gives: less than was asked for, where it said so before.

    def effective_key(self, token_key: TokenKey) -> TokenKey:
        """Return what is worth asking for in place of `credential`, by what Amazon's answers taught."""
        if token_key.kind != "rdt":
            return token_key
        if not token_key.is_shared and self._documents.is_unrestricted(token_key):
            return access_token_key(token_key)
        if token_key.data_elements and self._refused_elements:
            ordinary, now = access_token_key(token_key), self._now()
            left = tuple(
                element
                for element in token_key.data_elements
                if now >= self._refused_elements.get((ordinary, element), 0.0)
            )
            if not left and token_key.optional:
                return ordinary
            if left and left != token_key.data_elements:
                return token_key._replace(data_elements=left)
        return token_key

    def _record_refused_elements(self, token_key: TokenKey, elements: frozenset[str]) -> None:
        """Ask for these elements no more for a while: one of them fails every request that names it."""
        ordinary, now = access_token_key(token_key), self._now()
        for element in sorted(elements & set(token_key.data_elements)):
            if self._refused_elements.get((ordinary, element), 0.0) <= now:
                LOGGER.warning(
                    "data element not granted: left out for an hour; the application lacks its role",
                    extra=extra(account=token_key.account, region=token_key.region, element=element),
                )
            if len(self._refused_elements) >= MAX_REFUSED_ELEMENTS:
                del self._refused_elements[next(iter(self._refused_elements))]
            self._refused_elements[ordinary, element] = now + ELEMENTS_REFUSED_FOR
            self._metrics.refused_elements.labels(token_key.account, token_key.region, element).inc()

    # One exchange for everybody.

    def _pause(self, token_key: TokenKey, now: float) -> float:
        """Return for how many seconds no exchange is made, because the last one failed."""
        failure = self._failed.get(token_key)
        if failure is None or now >= failure.until:
            return 0.0
        if not failure.error.retryable and failure.secrets != self._client.secrets(token_key):
            return 0.0  # somebody mended it: a file or a variable holds another secret now
        return failure.until - now

    def ensure_refresh(self, token_key: TokenKey, rejected: Token | None) -> asyncio.Task[Token]:
        """Return the exchange that is under way for `credential`, starting it where there is none."""
        task = self._pending.get(token_key)
        if task is None:
            task = asyncio.create_task(self.refresh(token_key, rejected), name=f"token {token_key.kind}")
            self._pending[token_key] = task
            task.add_done_callback(lambda done: self._on_refreshed(token_key, done))
        return task

    def _on_refreshed(self, token_key: TokenKey, task: asyncio.Task[Token]) -> None:
        self.superseded.discard(task)
        if self._pending.get(token_key) is task:
            del self._pending[token_key]
        if not task.cancelled():
            task.exception()  # everybody who waited may have left; the failure was logged where it arose

    async def refresh(self, token_key: TokenKey, rejected: Token | None) -> Token:
        source = self._client.fingerprint(token_key)
        if not token_key.is_shared:
            token = await self.fetch(token_key, source)
        else:
            key = self._key(token_key, source)
            fits = partial(self._fits, token_key)
            refused = rejected.value if rejected is not None else None
            async with self._store.get_or_lock(key, fits, refused) as stored:
                if stored is not None:
                    token = self._from_store(token_key, stored)
                    token.source = source
                else:
                    token = await self.fetch(token_key, source)
        if not self._is_current_refresh(token_key):
            return token
        self._failed.pop(token_key, None)
        if token.expires_at > self._now():
            self._cache(token_key, token)
        return token

    async def fetch(self, token_key: TokenKey, source: str) -> Token:
        """Return a token that was fetched now, and kept for others where it certainly is of `source`."""
        ordinary = await self.get(access_token_key(token_key)) if token_key.kind == "rdt" else None
        secrets = self._client.secrets(token_key)
        try:
            granted = await self._accept(token_key, ordinary, secrets)
        except ProxyError as error:
            if self._is_current_refresh(token_key):
                self._record_failure(token_key, error, secrets)
            raise
        except ReportUnrestricted:
            self._documents.add_unrestricted(token_key)
            raise
        except DataElementsDenied as exc:
            self._record_refused_elements(token_key, exc.elements)
            if not token_key.optional and exc.elements >= set(token_key.data_elements):
                nothing_left = _no_token_left(token_key)
                self._record_failure(token_key, nothing_left, secrets)
                raise nothing_left from exc
            raise
        token = self._fresh(token_key, granted)
        # Files may have changed since, or between the ordinary token and the one that was minted with it.
        of_sent = ordinary.source if ordinary is not None else self._client.fingerprint(token_key, secrets)
        is_certain = source == of_sent == self._client.fingerprint(token_key)
        token.source = source if is_certain else ""
        if token_key.is_shared and is_certain and self._is_current_refresh(token_key):
            life = token.expires_at - self._now()
            if life > 0:
                stored = StoredToken(token.value, self._wall() + life)
                await self._store.put(self._key(token_key, source), stored, life)
        return token

    def _is_current_refresh(self, token_key: TokenKey) -> bool:
        """Return whether what the running task fetches is still wanted: nobody has forgotten the credential since."""
        return self._pending.get(token_key) is asyncio.current_task()

    async def _accept(self, token_key: TokenKey, ordinary: Token | None, secrets: tuple[Secret, ...]) -> FetchedToken:
        if ordinary is None:
            return await self._client.fetch_access_token(token_key, secrets)
        try:
            return await self._client.create_rdt(token_key, ordinary.value)
        except AccessTokenRejected as exc:
            another = await self._refresh_rejected(access_token_key(token_key), ordinary)
            if another is None:
                raise exc.error from exc
        try:
            granted = await self._client.create_rdt(token_key, another.value)
        except AccessTokenRejected as exc:
            self.report_result(access_token_key(token_key), another, accepted=False)
            raise exc.error from exc
        self.report_result(access_token_key(token_key), another, accepted=True)
        return granted

    def _record_failure(self, token_key: TokenKey, error: ProxyError, secrets: tuple[Secret, ...]) -> None:
        before = self._failed.pop(token_key, None)
        count = before.count + 1 if before is not None and before.secrets == secrets else 1
        longest = MAX_PAUSE if error.retryable else MAX_REJECTED_PAUSE
        pause = min(longest, FIRST_PAUSE * 2 ** min(count, 20)) * random.uniform(0.75, 1.0)  # noqa: S311 - jitter
        error.retry_after = pause if error.retryable else None
        if len(self._failed) >= MAX_CACHED:
            del self._failed[next(iter(self._failed))]
        now = self._now()
        until = now + pause
        held = self._tokens.get(token_key)
        if held is not None and now < held.expires_hard:
            # The moment it is needed, one more try: the token host may be back.
            until = min(until, held.expires_at if now < held.expires_at else held.expires_hard)
        self._failed[token_key] = _Failure(error, count, until, secrets)

    # Keeping.

    def _fits(self, token_key: TokenKey, stored: StoredToken) -> bool:
        """Return whether a token that was kept is worth having."""
        held = self._tokens.get(token_key)
        # Only what is fresher than what is held: a token that is due for renewal was kept here as well.
        return stored.expires_at - self._wall() > SAFETY_MARGIN and (held is None or held.value != stored.value)

    def _from_store(self, token_key: TokenKey, stored: StoredToken) -> Token:
        return self._token(token_key, stored.value, self._now(), stored.expires_at - self._wall(), took=0.0)

    def _key(self, token_key: TokenKey, source: str) -> str:
        """Return what the credential's token is kept by: it differs wherever another secret would give another token.

        So two fleets on one Redis that call different sellers by one name do not meet, nor does a new configuration
        meet what was kept for somebody else.
        """
        return f"{_key(token_key)}\x1f{source}"

    def _fresh(self, token_key: TokenKey, granted: FetchedToken) -> Token:
        # Counted from before the exchange: the token host's clock started no earlier than that.
        took = granted.received_at - granted.requested_at
        return self._token(token_key, granted.response.value, granted.requested_at, granted.response.expires_in, took)

    def _token(self, token_key: TokenKey, value: Secret, since: float, life: float, took: float) -> Token:
        expires_at = since + life - min(SAFETY_MARGIN, life / 20)
        share = RENEW_AT + random.uniform(-RENEW_JITTER, RENEW_JITTER)  # noqa: S311 - spreads load, hides nothing
        renew_at = min(since + life * share, expires_at - RENEW_LEAD * took)
        return Token(
            value, token_key.kind, since, renew_at, expires_at, since + life, self._now(), token_key.data_elements
        )

    def _cache(self, token_key: TokenKey, token: Token) -> None:
        self._tokens.pop(token_key, None)
        if len(self._tokens) >= MAX_CACHED:
            del self._tokens[next(iter(self._tokens))]  # the one that was fetched longest ago
        self._tokens[token_key] = token
        expires_at = self._wall() + token.expires_at - self._now()
        self._metrics.token_expiry.labels(token_key.account, token_key.region, token_key.kind).set(expires_at)
        self.schedule(token_key, token, at=token.renew_at)

        if not self._client.matches_config(token_key, token.source):
            self._call_later(SETTLED_AFTER, self.verify_source, token_key, token)

    def verify_source(self, token_key: TokenKey, token: Token) -> None:
        """Forget a token that was got by what a file held for a moment: it may be another seller's."""
        if self._tokens.get(token_key) is token and token.source != self._client.fingerprint(token_key):
            self.invalidate(lambda one: one == token_key)

    def schedule(self, token_key: TokenKey, token: Token, at: float) -> None:
        self._call_later(max(0.0, at - self._now()), self.refresh_if_due, token_key, token)

    def refresh_if_due(self, token_key: TokenKey, token: Token) -> None:
        """Renew a token that is in use, before anybody has to wait for it."""
        if self._closed or self._tokens.get(token_key) is not token:
            return
        now = self._now()
        if now >= token.expires_at:
            if not token_key.is_shared:
                del self._tokens[token_key]  # nobody will ask for that document's token again
            # Others stay: so the store's copy is known for the same one, whatever the wall clock says by then.
            return
        in_use = now - token.used_at <= IN_USE_WITHIN * (token.expires_at - token.issued_at)
        if not token_key.is_shared or not in_use:
            self.schedule(token_key, token, at=token.expires_at)
            return
        pause = self._pause(token_key, now)
        if pause <= 0:
            self.ensure_refresh(token_key, None)
        self.schedule(token_key, token, at=min(token.expires_at, now + max(pause, CHECK_INTERVAL)))


def _key(token_key: TokenKey) -> str:
    """Return a text that differs wherever two tokens do; no part of it can contain the separator's neighbours."""
    return "\x1f".join(
        (
            token_key.kind,
            token_key.application,
            token_key.account,
            token_key.environment,
            token_key.region,
            token_key.scope,
            token_key.method,
            token_key.path,
            ",".join(token_key.data_elements),
        )
    )


def _no_token_left(token_key: TokenKey) -> RestrictedDataRefused:
    return RestrictedDataRefused(
        f"the application has no role for any of the data elements asked for account {token_key.account} in "
        f"{token_key.region}: {', '.join(token_key.data_elements)}",
        "Get the role from Amazon and have the seller authorise anew, or ask for other elements.",
    )


def _recur(error: ProxyError, remaining: float) -> ProxyError:
    """Return the remembered error anew: one instance raised by many would grow a traceback for each."""
    return type(error)(
        error.message, error.hint, retry_after=remaining if error.retryable else None, reason=error.reason
    )
