"""The tokens in use: cached, refreshed before they expire, and fetched once for all callers that wait.

At most one refresh per token key runs at a time; a caller that leaves does not cancel it. A token in use is renewed in
the background from about 85 % of its lifetime, and is sent until its last seconds while the renewal runs or fails.
How one token is fetched is in `client.py`, when one is renewed in `refresh_policy.py`.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from proxy.config import Secret
from proxy.errors import ProxyError, RestrictedDataRefused, TokenUnavailable
from proxy.observability.metrics import Metrics
from proxy.request.token import Token
from proxy.request.token_selection import TokenKey, access_token_key
from proxy.request.tokens.client import (
    AccessTokenRejected,
    DataElementsDenied,
    FetchedToken,
    ReportUnrestricted,
    TokenClient,
)
from proxy.request.tokens.denied_elements import DeniedElements
from proxy.request.tokens.refresh_backoff import RefreshBackoff
from proxy.request.tokens.refresh_policy import (
    CHECK_INTERVAL,
    FIRST_PAUSE,
    SAFETY_MARGIN,
    Failure,
    is_in_use,
    new_token,
    pause_after,
    retry_at,
)
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.store import Store, StoredToken

PROBE_TIMEOUT = 1.0  # seconds that a caller waits for a refresh when the last one failed
SETTLED_AFTER = 3.0  # seconds until a changed secret file is verified: it may have been changed back
# Amazon accepts no generic path in an RDT for getReportDocument (DOC "Retrieve a report"), hence a key per document.
MAX_CACHED = 50_000  # tokens; a report document's token has a key of its own
MAX_WARM_UPS = 20  # refreshes at a time
MAX_REPLACEMENTS = 20  # refreshes of rejected tokens at a time


class TokenStatus(NamedTuple):
    """The state of the token of one key; durations in seconds."""

    token_key: TokenKey
    left: float | None  # until the cached token expires; None without a valid one
    age: float | None  # since it was requested
    error: ProxyError | None  # of the last refresh, if it failed
    failures: int  # in a row
    pause: float  # until a refresh is tried again


class TokenProvider:
    """The tokens of every key that was requested.

    `now` is a monotonic clock, `wall` is Unix time, both in seconds.
    """

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
        self._reports = unrestricted_reports
        self._store = store
        self._metrics = metrics
        self._now = now
        self._wall = wall
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._tokens: dict[TokenKey, Token] = {}
        self._pending: dict[TokenKey, asyncio.Task[Token]] = {}
        # A set, because the event loop keeps only weak references to tasks (bpo-44665).
        self.superseded: set[asyncio.Task[Token]] = set()  # refreshes whose token is for their present waiters alone
        self._failed: dict[TokenKey, Failure] = {}
        self._denied_elements = DeniedElements(metrics, now)
        self._backoff = RefreshBackoff(now)
        self._replacing = asyncio.Semaphore(MAX_REPLACEMENTS)
        self._closed = False

    async def get(self, token_key: TokenKey, *, rejected: Token | None = None) -> Token:
        """Return a valid token; `rejected` is one that Amazon has just refused.

        Where Amazon grants less than was requested, the token's `kind` and `data_elements` say what it is good for.
        Raises TokenUnavailable, TokenRefused, RestrictedDataRefused or UsagePlanExhausted.
        """
        held = self.cached(token_key, rejected=rejected)
        return held if held is not None else await self.wait_for_token(self.effective_key(token_key), rejected)

    def cached(self, token_key: TokenKey, *, rejected: Token | None = None) -> Token | None:
        """Return the token that `get` returns without waiting, None where it would wait; renew it where that is due."""
        if token_key.kind == "rdt":
            token_key = self.effective_key(token_key)
        held, clock = self._tokens.get(token_key), self._now
        now = clock()
        # By identity: a caller that was refused with an earlier token must get its successor, not cause another
        # refresh.
        if held is None or held is rejected or now >= held.expires_at:
            return None
        held.used_at = now
        if now >= held.renew_at and token_key not in self._pending and self._pause(token_key, now) <= 0:
            self.ensure_refresh(token_key, rejected)
        return held

    async def wait_for_token(self, token_key: TokenKey, rejected: Token | None) -> Token:
        """Wait for the refresh, and for a second one where Amazon refuses the first and grants less.

        Raises as `get` does.
        """
        while True:
            pause, failure = self._pause(token_key, self._now()), self._failed.get(token_key)
            if failure is not None and pause > 0:
                return self.stale_token(token_key, rejected, _recur(failure.error, pause))
            task = self.ensure_refresh(token_key, rejected)
            # While the token host is down, callers fail after PROBE_TIMEOUT and not each after timeouts.token.
            timeout = PROBE_TIMEOUT if failure is not None and failure.is_recent(self._now()) else None
            try:
                async with asyncio.timeout(timeout) as waited:
                    # Without `shield`, the cancellation of one caller would cancel the refresh for all that wait for
                    # it.
                    return await asyncio.shield(task)
            except TimeoutError:
                # Since Python 3.11 asyncio.TimeoutError is the built-in one, which is an OSError too: the task may have
                # raised it.
                if not waited.expired() or failure is None:
                    raise
                return self.stale_token(token_key, rejected, _recur(failure.error, FIRST_PAUSE))
            except TokenUnavailable as error:
                return self.stale_token(token_key, rejected, error)
            except (ReportUnrestricted, DataElementsDenied):
                less = self.effective_key(token_key)
                # Nothing less can be requested. Without this check the loop would repeat the same refused request.
                if less == token_key:
                    raise
                token_key, rejected = less, None
                held = self._tokens.get(token_key)
                if held is not None and self._now() < held.expires_at:
                    return held

    def stale_token(self, token_key: TokenKey, rejected: Token | None, error: ProxyError) -> Token:
        """Return the cached token in its last seconds, where no other is available; raise `error` without one."""
        held = self._tokens.get(token_key)
        # `expires_hard` is without the safety margin: a token that Amazon may still accept is better than an error.
        if held is None or held is rejected or self._now() >= held.expires_hard:
            raise error
        return held

    async def refresh_rejected(self, token_key: TokenKey, rejected: Token) -> Token | None:
        """Return another token for one that Amazon rejected, None where the backoff allows none or fetching fails.

        The caller reports by `report_result` whether Amazon accepted it.
        """
        async with self._replacing:
            return await self._refresh_rejected(self.effective_key(token_key), rejected)

    async def _refresh_rejected(self, token_key: TokenKey, rejected: Token) -> Token | None:
        held = self._tokens.get(token_key)
        # Another caller has replaced the token already. None is fetched, so `allows` is not asked.
        if held is not None and held is not rejected and self._now() < held.expires_at:
            return None if self._backoff.was_rejected(token_key, held) else held
        if not self._backoff.allows(token_key):
            return None
        try:
            return await self.get(token_key, rejected=rejected)
        except ProxyError:
            return None  # logged and counted where it was raised; the app gets Amazon's own response

    def report_result(self, token_key: TokenKey, token: Token, *, accepted: bool) -> None:
        """Record whether Amazon accepted a `token` from `refresh_rejected`."""
        self._backoff.record_result(self.effective_key(token_key), token, accepted=accepted)

    async def warm_up(self, token_keys: Iterable[TokenKey]) -> None:
        """Fetch these tokens, a bounded number at a time; failures are logged, not raised."""
        slots = asyncio.Semaphore(MAX_WARM_UPS)

        async def fetch(token_key: TokenKey) -> None:
            async with slots:
                try:
                    await self.get(token_key)
                except ProxyError:
                    return  # logged and counted where it was raised

        await asyncio.gather(*(fetch(token_key) for token_key in token_keys))

    def invalidate(self, is_outdated: Callable[[TokenKey], bool]) -> None:
        """Stop using the tokens of outdated keys, cached or being fetched; the next request fetches a new one."""
        # A copy: the loop removes entries from these dicts.
        known = {*self._tokens, *self._pending, *self._failed}
        for token_key in filter(is_outdated, known):
            self._tokens.pop(token_key, None)
            if task := self._pending.pop(token_key, None):
                self.superseded.add(task)  # its waiters began under the earlier configuration, and still get its token
            self._failed.pop(token_key, None)
            # The next token sets the series again.
            self._metrics.token_expiry.remove(token_key.account, token_key.region, token_key.kind)
        self._denied_elements.invalidate(is_outdated)

    def statuses(self) -> Iterator[TokenStatus]:
        """Yield the state of each token that was requested; changes nothing, and may be called from any thread."""
        # Copied: a loop over the dicts would raise RuntimeError when the event loop's thread adds a key meanwhile.
        held, failed, pending = self._tokens.copy(), self._failed.copy(), self._pending.copy()
        now = self._now()
        for token_key in dict.fromkeys((*held, *failed, *pending)):
            token, failure = held.get(token_key), failed.get(token_key)
            is_valid = token is not None and now < token.expires_hard
            yield TokenStatus(
                token_key,
                token.expires_at - now if token is not None and is_valid else None,
                now - token.issued_at if token is not None and is_valid else None,
                failure.error if failure is not None else None,
                failure.count if failure is not None else 0,
                max(0.0, failure.until - now) if failure is not None else 0.0,
            )

    async def close(self) -> None:
        """Cancel the refreshes under way, and start none."""
        self._closed = True
        tasks = [*self._pending.values(), *self.superseded]
        for task in tasks:
            task.cancel()
        # Waits until each has released its lock in the store; otherwise replicas would wait for the lock to expire.
        await asyncio.gather(*tasks, return_exceptions=True)

    def effective_key(self, token_key: TokenKey) -> TokenKey:
        """Return the key to request instead: without the data elements and RDTs that Amazon refused lately."""
        if token_key.kind != "rdt":
            return token_key
        if not token_key.is_shared and self._reports.is_unrestricted(token_key):
            return access_token_key(token_key)
        if token_key.data_elements and self._denied_elements.until:
            remaining = self._denied_elements.remaining(token_key)
            if not remaining and token_key.optional:
                return access_token_key(token_key)
            if remaining and remaining != token_key.data_elements:
                return token_key._replace(data_elements=remaining)
        return token_key

    def _pause(self, token_key: TokenKey, now: float) -> float:
        """Return for how many seconds no refresh is started, because the last one failed."""
        failure = self._failed.get(token_key)
        if failure is None or now >= failure.until:
            return 0.0
        if not failure.error.retryable and failure.secrets != self._client.secrets(token_key):
            return 0.0  # the secret in its file or variable was replaced: the refusal was for the old one
        return failure.until - now

    def ensure_refresh(self, token_key: TokenKey, rejected: Token | None) -> asyncio.Task[Token]:
        """Return the refresh that is running for `token_key`, starting it where there is none."""
        task = self._pending.get(token_key)
        if task is None:
            task = asyncio.create_task(self.refresh(token_key, rejected), name=f"token {token_key.kind}")
            # The task's first step runs later, so `_is_current_refresh` finds it here. An eager task factory (Python
            # 3.12) would break that.
            self._pending[token_key] = task
            task.add_done_callback(lambda done: self._on_refreshed(token_key, done))
        return task

    def _on_refreshed(self, token_key: TokenKey, task: asyncio.Task[Token]) -> None:
        self.superseded.discard(task)
        # After `invalidate`, a later refresh of the same key may be registered.
        if self._pending.get(token_key) is task:
            del self._pending[token_key]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: all waiters may have left, and it is logged where it was raised

    async def refresh(self, token_key: TokenKey, rejected: Token | None) -> Token:
        """Return a new token, from the store where it has one, and cache it. Runs as the task of `ensure_refresh`."""
        # Read once, before the lock: the key in the store and the check after the fetch must be of the same
        # credentials.
        source = self._client.fingerprint(token_key)
        if not token_key.is_shared:
            token = await self.fetch(token_key, source)
        else:
            key = _store_key(token_key, source)
            is_usable = partial(self._is_usable, token_key)
            refused = rejected.value if rejected is not None else None
            async with self._store.get_or_lock(key, is_usable, refused) as stored:
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
        """Fetch a token; put it into the store where it was certainly fetched with the credentials of `source`."""
        # createRestrictedDataToken is itself called with the seller's access token (DOC "Tokens API").
        access_token = await self.get(access_token_key(token_key)) if token_key.kind == "rdt" else None
        # Read before the request and recorded with a failure: another secret in the file ends the pause (`_pause`).
        secrets = self._client.secrets(token_key)
        try:
            fetched = await self._request_token(token_key, access_token, secrets)
        except ProxyError as error:
            if self._is_current_refresh(token_key):
                self._record_failure(token_key, error, secrets)
            raise
        except ReportUnrestricted:
            self._reports.add_unrestricted(token_key)
            raise
        except DataElementsDenied as exc:
            self._denied_elements.record(token_key, exc.elements)
            if not token_key.optional and exc.elements >= set(token_key.data_elements):
                refused = _all_elements_denied(token_key)
                self._record_failure(token_key, refused, secrets)
                raise refused from exc
            raise
        token = self._fetched(token_key, fetched)
        # A secret file may have changed during the fetch, or between the access token and the RDT that it created.
        sent = access_token.source if access_token is not None else self._client.fingerprint(token_key, secrets)
        is_certain = source == sent == self._client.fingerprint(token_key)
        token.source = source if is_certain else ""
        if token_key.is_shared and is_certain and self._is_current_refresh(token_key):
            lifetime = token.expires_at - self._now()
            if lifetime > 0:
                # By wall clock: values of monotonic clocks of two processes cannot be compared (Python's
                # time.monotonic).
                stored = StoredToken(token.value, self._wall() + lifetime)
                await self._store.put(_store_key(token_key, source), stored, lifetime)
        return token

    def _is_current_refresh(self, token_key: TokenKey) -> bool:
        """Return whether the running task is the refresh of this key: `invalidate` has not superseded it."""
        return self._pending.get(token_key) is asyncio.current_task()

    async def _request_token(
        self, token_key: TokenKey, access_token: Token | None, secrets: tuple[Secret, ...]
    ) -> FetchedToken:
        """Fetch an access token, or with `access_token` an RDT; replace an access token that Amazon rejects, once."""
        if access_token is None:
            return await self._client.fetch_access_token(token_key, secrets)
        try:
            return await self._client.create_rdt(token_key, access_token.value)
        except AccessTokenRejected as exc:
            # Once, and within the backoff: on 2023-05-27 every call was rejected for 25 minutes with valid tokens
            # (selling-partner-api-docs issue 3153).
            another = await self._refresh_rejected(access_token_key(token_key), access_token)
            if another is None:
                raise exc.error from exc
        try:
            fetched = await self._client.create_rdt(token_key, another.value)
        except AccessTokenRejected as exc:
            self.report_result(access_token_key(token_key), another, accepted=False)
            raise exc.error from exc
        self.report_result(access_token_key(token_key), another, accepted=True)
        return fetched

    def _record_failure(self, token_key: TokenKey, error: ProxyError, secrets: tuple[Secret, ...]) -> None:
        # Removed and added again, so that the first entry of the dict is the oldest failure.
        before = self._failed.pop(token_key, None)
        # With other secrets it is another fault, whose pauses begin again with the shortest.
        count = before.count + 1 if before is not None and before.secrets == secrets else 1
        pause = pause_after(error, count)
        error.retry_after = pause if error.retryable else None
        if len(self._failed) >= MAX_CACHED:
            del self._failed[next(iter(self._failed))]
        until = retry_at(pause, self._tokens.get(token_key), self._now())
        self._failed[token_key] = Failure(error, count, until, secrets)

    def _is_usable(self, token_key: TokenKey, stored: StoredToken) -> bool:
        """Return whether a token of the store is valid and another than the cached one."""
        held = self._tokens.get(token_key)
        # A token that is due for renewal here is in the store as well: it must not come back as its own successor.
        return stored.expires_at - self._wall() > SAFETY_MARGIN and (held is None or held.value != stored.value)

    def _from_store(self, token_key: TokenKey, stored: StoredToken) -> Token:
        now = self._now()
        # From wall clock to monotonic clock once: a later jump of the wall clock does not change the token's lifetime.
        lifetime = stored.expires_at - self._wall()
        return new_token(token_key, stored.value, issued_at=now, lifetime=lifetime, fetch_time=0.0, now=now)

    def _fetched(self, token_key: TokenKey, fetched: FetchedToken) -> Token:
        # Its lifetime counts from the request: the token host cannot have issued it earlier.
        return new_token(
            token_key,
            fetched.response.value,
            issued_at=fetched.requested_at,
            lifetime=fetched.response.expires_in,
            fetch_time=fetched.received_at - fetched.requested_at,
            now=self._now(),
        )

    def _cache(self, token_key: TokenKey, token: Token) -> None:
        # Removed first: assigning to an existing key would leave it at its old place in the dict.
        self._tokens.pop(token_key, None)
        if len(self._tokens) >= MAX_CACHED:
            del self._tokens[next(iter(self._tokens))]  # dicts keep their order: the one fetched longest ago
        self._tokens[token_key] = token
        expires_at = self._wall() + token.expires_at - self._now()
        self._metrics.token_expiry.labels(token_key.account, token_key.region, token_key.kind).set(expires_at)
        self.schedule(token_key, token, at=token.renew_at)
        if not self._client.matches_config(token_key, token.source):
            self._call_later(SETTLED_AFTER, self.verify_source, token_key, token)

    def verify_source(self, token_key: TokenKey, token: Token) -> None:
        """Forget a token whose secret file has changed since: it may be another seller's."""
        if self._tokens.get(token_key) is token and token.source != self._client.fingerprint(token_key):
            self.invalidate(lambda other: other == token_key)

    def schedule(self, token_key: TokenKey, token: Token, at: float) -> None:
        """Call `refresh_if_due` at a moment of the monotonic clock."""
        self._call_later(max(0.0, at - self._now()), self.refresh_if_due, token_key, token)

    def refresh_if_due(self, token_key: TokenKey, token: Token) -> None:
        """Renew a token that is in use, before a request has to wait for it."""
        if self._closed or self._tokens.get(token_key) is not token:
            return
        now = self._now()
        if now >= token.expires_at:
            if not token_key.is_shared:
                del self._tokens[token_key]  # a document's token is not requested again after it has expired
            # Others stay: `_is_usable` compares the store's copy with them, even after a jump of the wall clock.
            return
        if not token_key.is_shared or not is_in_use(token, now):
            self.schedule(token_key, token, at=token.expires_at)
            return
        pause = self._pause(token_key, now)
        if pause <= 0:
            self.ensure_refresh(token_key, None)
        self.schedule(token_key, token, at=min(token.expires_at, now + max(pause, CHECK_INTERVAL)))


def _store_key(token_key: TokenKey, source: str) -> str:
    """Return the key of a token in the store; it differs wherever two tokens may differ.

    `source` is the fingerprint of the credentials. So two fleets on one Redis that give different sellers one name do
    not share tokens, nor does a new configuration find those of an earlier one for another seller. The separator is a
    control character, which no part contains.
    """
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
            source,
        )
    )


def _all_elements_denied(token_key: TokenKey) -> RestrictedDataRefused:
    return RestrictedDataRefused(
        f"the application has no role for any of the data elements asked for account {token_key.account} in "
        f"{token_key.region}: {', '.join(token_key.data_elements)}",
        "Get the role from Amazon and have the seller authorise the application again, or ask for other elements.",
    )


def _recur(error: ProxyError, remaining: float) -> ProxyError:
    """Return a copy of the recorded error: each raise of one instance appends to its traceback."""
    return type(error)(
        error.message, error.hint, retry_after=remaining if error.retryable else None, reason=error.reason
    )
