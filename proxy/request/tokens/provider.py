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
from proxy.observability.logging import LOGGER, fields
from proxy.observability.metrics import Metrics
from proxy.request.routing import Credential, TokenKind, ordinary_of
from proxy.request.tokens.client import ElementsRefused, Granted, Grants, NotRestricted, OrdinaryTokenRefused
from proxy.request.tokens.refresh_backoff import Doubts
from proxy.request.tokens.report_documents import Documents
from proxy.request.upstream.token_redaction import telling_part
from proxy.store import Store, StoredToken

RENEW_AT = 0.85  # of a token's life
RENEW_JITTER = 0.05  # so that tokens fetched together are not renewed together
RENEW_LEAD = 1.5  # times what its exchange took: a slow token host is asked earlier
SAFETY_MARGIN = 2.0  # seconds before its expiry in which a token is not sent any more; for short lives a twentieth
IN_USE = 0.5  # of its life: a token that nobody asked for in that time is left to expire
LOOK_AGAIN = 5.0  # seconds after which a renewal that failed is tried again

FIRST_PAUSE = 0.5  # seconds after a failed exchange; doubled with each further one
LONGEST_PAUSE = 5.0  # so that service is back within seconds of the token host's return
LONGEST_REFUSED_PAUSE = 300.0  # for refusals that only a person can mend
RECENT = 30.0  # seconds after a pause in which the trouble is taken to go on
PROBE_PATIENCE = 1.0  # seconds that a caller waits for an exchange when the last one failed

SETTLED_AFTER = 3.0  # seconds after which a file that has changed is in force, or has changed back

MOST_HELD = 50_000  # tokens; a report document's token has a key of its own
WARM_UP_PARALLEL = 20
REPLACED_PARALLEL = 20
ELEMENTS_REFUSED_FOR = 3600.0  # seconds for which an element is not asked for again
MOST_REFUSED_ELEMENTS = 10_000


@dataclass(slots=True, eq=False)
class Token:
    """A token in use. Moments are seconds of the monotonic clock; two tokens are equal only if they are the same."""

    value: Secret
    kind: TokenKind
    since: float
    renew_at: float
    expires_at: float  # with a margin
    dies_at: float  # without one: when there is no other
    used_at: float
    data_elements: tuple[str, ...] = ()
    # The lines of a request's head that it stands in, and the second of the wall clock that they name.
    lines: bytes = field(default=b"", repr=False)
    lines_of: int = -1
    source: str = ""  # the fingerprint of what it was fetched by; nothing where that is not certain
    telling_part: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.telling_part = telling_part(self.value.reveal())


@dataclass(slots=True)
class _Failure:
    """Why the last exchange failed, how many did in a row, with which secrets, and until when it is not tried again."""

    error: ProxyError
    count: int
    until: float
    secrets: tuple[Secret, ...]

    def is_recent(self, now: float) -> bool:
        """Whether the trouble probably goes on."""
        return self.error.retryable and now - self.until < RECENT


class Standing(NamedTuple):
    """How the token of one credential stands; seconds from now."""

    credential: Credential
    left: float | None  # for which the token that is held is good; None where none is
    age: float | None  # since it was asked for
    error: ProxyError | None  # why the last exchange failed, if it did
    failures: int  # in a row
    pause: float  # until an exchange is tried again


class Tokens:
    """The tokens of every credential that was asked for."""

    def __init__(
        self,
        *,
        grants: Grants,
        documents: Documents,
        store: Store,
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        call_later: Callable[..., Any] | None = None,
    ) -> None:
        self._grants = grants
        self._documents = documents
        self._store = store
        self._metrics = metrics
        self._now = now
        self._wall = wall
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._held: dict[Credential, Token] = {}
        self._pending: dict[Credential, asyncio.Task[Token]] = {}
        self._overtaken: set[asyncio.Task[Token]] = set()  # exchanges whose token nobody else is to get
        self._failed: dict[Credential, _Failure] = {}
        self._refused_elements: dict[tuple[Credential, str], float] = {}
        self._doubts = Doubts(now)
        self._replacing = asyncio.Semaphore(REPLACED_PARALLEL)
        self._closed = False

    async def get(self, credential: Credential, *, rejected: Token | None = None) -> Token:
        """Return a token that is good now; `rejected` is one that Amazon has just refused.

        Where Amazon gives less than was asked for, the token's `kind` and `data_elements` say what it is good for.
        Raises TokenUnavailable, TokenRefused, RestrictedDataRefused or UsagePlanExhausted.
        """
        held = self.at_hand(credential, rejected=rejected)
        return held if held is not None else await self._fetched(self._to_be_had(credential), rejected)

    def at_hand(self, credential: Credential, *, rejected: Token | None = None) -> Token | None:
        """Return the token that `get` would return without waiting, None where it would wait."""
        if credential.kind == "rdt":
            credential = self._to_be_had(credential)
        held, clock = self._held.get(credential), self._now
        now = clock()
        if held is None or held is rejected or now >= held.expires_at:
            return None
        held.used_at = now
        if now >= held.renew_at and credential not in self._pending and self._pause(credential, now) <= 0:
            self._exchange(credential, rejected)
        return held

    async def _fetched(self, credential: Credential, rejected: Token | None) -> Token:
        """Wait for the exchange, or for several where the first one teaches what is to be asked for."""
        while True:
            pause, failure = self._pause(credential, self._now()), self._failed.get(credential)
            if failure is not None and pause > 0:
                return self._last_resort(credential, rejected, _again(failure.error, pause))
            task = self._exchange(credential, rejected)
            # Who comes after a failure learns soon that it goes on, and is not kept for a timeout each.
            patience = PROBE_PATIENCE if failure is not None and failure.is_recent(self._now()) else None
            try:
                async with asyncio.timeout(patience) as waited:
                    return await asyncio.shield(task)
            except TimeoutError:
                if not waited.expired() or failure is None:
                    raise
                return self._last_resort(credential, rejected, _again(failure.error, FIRST_PAUSE))
            except TokenUnavailable as error:
                return self._last_resort(credential, rejected, error)
            except (NotRestricted, ElementsRefused):
                less = self._to_be_had(credential)
                if less == credential:
                    raise
                credential, rejected = less, None
                held = self._held.get(credential)
                if held is not None and self._now() < held.expires_at:
                    return held

    def _last_resort(self, credential: Credential, rejected: Token | None, error: ProxyError) -> Token:
        """Return the token that is in its last seconds, where no other is to be had; raise `error` without one."""
        held = self._held.get(credential)
        if held is None or held is rejected or self._now() >= held.dies_at:
            raise error
        return held

    async def replacement(self, credential: Credential, rejected: Token) -> Token | None:
        """Return another token for one that Amazon refused; None where there is none, or it is not worth fetching.

        Whoever gets one says by `judge` whether Amazon took it.
        """
        async with self._replacing:
            return await self._replaced(self._to_be_had(credential), rejected)

    async def _replaced(self, credential: Credential, rejected: Token) -> Token | None:
        held = self._held.get(credential)
        if held is not None and held is not rejected and self._now() < held.expires_at:
            return None if self._doubts.is_refused(credential, held) else held
        if not self._doubts.permits(credential):
            return None
        try:
            return await self.get(credential, rejected=rejected)
        except ProxyError:
            return None  # logged and counted where it arose; Amazon's own refusal is passed on

    def judge(self, credential: Credential, token: Token, *, accepted: bool) -> None:
        """Learn whether Amazon took a `token` that `replacement` gave."""
        self._doubts.judge(self._to_be_had(credential), token, accepted=accepted)

    async def warm_up(self, credentials: Iterable[Credential]) -> None:
        """Fetch these tokens, a bounded number at a time; failures are logged, not raised."""
        places = asyncio.Semaphore(WARM_UP_PARALLEL)

        async def fetch(credential: Credential) -> None:
            async with places:
                try:
                    await self.get(credential)
                except ProxyError:
                    return  # logged and counted where it arose

        await asyncio.gather(*(fetch(credential) for credential in credentials))

    def forget(self, is_outdated: Callable[[Credential], bool]) -> None:
        """Use no token any more, held or on its way, whose credential is outdated; the next one is fetched anew."""
        known = {*self._held, *self._pending, *self._failed}
        for credential in filter(is_outdated, known):
            self._held.pop(credential, None)
            if task := self._pending.pop(credential, None):
                self._overtaken.add(task)  # for those who wait for it: they began before
            self._failed.pop(credential, None)
            # Of one that goes on to be used, it comes back with the next token.
            self._metrics.token_expiry.remove(credential.account, credential.region, credential.kind)
        # A seller who authorised anew may have been asked for more.
        kept = {key: until for key, until in self._refused_elements.items() if not is_outdated(key[0])}
        self._refused_elements = kept

    def standing(self) -> Iterator[Standing]:
        """Yield how each token stands that was asked for; without a change, and from any thread."""
        held, failed, pending = self._held.copy(), self._failed.copy(), self._pending.copy()
        now = self._now()
        for credential in dict.fromkeys((*held, *failed, *pending)):
            token, failure = held.get(credential), failed.get(credential)
            is_good = token is not None and now < token.dies_at
            yield Standing(
                credential,
                token.expires_at - now if token is not None and is_good else None,
                now - token.since if token is not None and is_good else None,
                failure.error if failure is not None else None,
                failure.count if failure is not None else 0,
                max(0.0, failure.until - now) if failure is not None else 0.0,
            )

    async def close(self) -> None:
        """Cancel exchanges that are under way, and begin none."""
        self._closed = True
        tasks = [*self._pending.values(), *self._overtaken]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # What Amazon gives: less than was asked for, where it said so before.

    def _to_be_had(self, credential: Credential) -> Credential:
        """Return what is worth asking for in place of `credential`, by what Amazon's answers taught."""
        if credential.kind != "rdt":
            return credential
        if not credential.reusable and self._documents.is_unrestricted(credential):
            return ordinary_of(credential)
        if credential.data_elements and self._refused_elements:
            ordinary, now = ordinary_of(credential), self._now()
            left = tuple(
                element
                for element in credential.data_elements
                if now >= self._refused_elements.get((ordinary, element), 0.0)
            )
            if not left and credential.optional:
                return ordinary
            if left and left != credential.data_elements:
                return credential._replace(data_elements=left)
        return credential

    def _note_refused_elements(self, credential: Credential, elements: frozenset[str]) -> None:
        """Ask for these elements no more for a while: one of them fails every request that names it."""
        ordinary, now = ordinary_of(credential), self._now()
        for element in sorted(elements & set(credential.data_elements)):
            if self._refused_elements.get((ordinary, element), 0.0) <= now:
                LOGGER.warning(
                    "data element not granted: left out for an hour; the application lacks its role",
                    extra=fields(account=credential.account, region=credential.region, element=element),
                )
            if len(self._refused_elements) >= MOST_REFUSED_ELEMENTS:
                del self._refused_elements[next(iter(self._refused_elements))]
            self._refused_elements[ordinary, element] = now + ELEMENTS_REFUSED_FOR
            self._metrics.refused_elements.labels(credential.account, credential.region, element).inc()

    # One exchange for everybody.

    def _pause(self, credential: Credential, now: float) -> float:
        """Return for how many seconds no exchange is made, because the last one failed."""
        failure = self._failed.get(credential)
        if failure is None or now >= failure.until:
            return 0.0
        if not failure.error.retryable and failure.secrets != self._grants.secrets(credential):
            return 0.0  # somebody mended it: a file or a variable holds another secret now
        return failure.until - now

    def _exchange(self, credential: Credential, rejected: Token | None) -> asyncio.Task[Token]:
        """Return the exchange that is under way for `credential`, starting it where there is none."""
        task = self._pending.get(credential)
        if task is None:
            task = asyncio.create_task(self._renew(credential, rejected), name=f"token {credential.kind}")
            self._pending[credential] = task
            task.add_done_callback(lambda done: self._finished(credential, done))
        return task

    def _finished(self, credential: Credential, task: asyncio.Task[Token]) -> None:
        self._overtaken.discard(task)
        if self._pending.get(credential) is task:
            del self._pending[credential]
        if not task.cancelled():
            task.exception()  # everybody who waited may have left; the failure was logged where it arose

    async def _renew(self, credential: Credential, rejected: Token | None) -> Token:
        source = self._grants.fingerprint(credential)
        if not credential.reusable:
            token = await self._exchanged(credential, source)
        else:
            key = self._key(credential, source)
            fits = partial(self._fits, credential)
            refused = rejected.value if rejected is not None else None
            async with self._store.turn(key, fits, refused) as stored:
                if stored is not None:
                    token = self._of_store(credential, stored)
                    token.source = source
                else:
                    token = await self._exchanged(credential, source)
        if not self._is_current_exchange(credential):
            return token
        self._failed.pop(credential, None)
        if token.expires_at > self._now():
            self._hold(credential, token)
        return token

    async def _exchanged(self, credential: Credential, source: str) -> Token:
        """Return a token that was fetched now, and kept for others where it certainly is of `source`."""
        ordinary = await self.get(ordinary_of(credential)) if credential.kind == "rdt" else None
        secrets = self._grants.secrets(credential)
        try:
            granted = await self._granted(credential, ordinary, secrets)
        except ProxyError as error:
            if self._is_current_exchange(credential):
                self._note_failure(credential, error, secrets)
            raise
        except NotRestricted:
            self._documents.note_unrestricted(credential)
            raise
        except ElementsRefused as exc:
            self._note_refused_elements(credential, exc.elements)
            if not credential.optional and exc.elements >= set(credential.data_elements):
                nothing_left = _nothing_left(credential)
                self._note_failure(credential, nothing_left, secrets)
                raise nothing_left from exc
            raise
        token = self._fresh(credential, granted)
        # Files may have changed since, or between the ordinary token and the one that was minted with it.
        of_sent = ordinary.source if ordinary is not None else self._grants.fingerprint(credential, secrets)
        is_certain = source == of_sent == self._grants.fingerprint(credential)
        token.source = source if is_certain else ""
        if credential.reusable and is_certain and self._is_current_exchange(credential):
            life = token.expires_at - self._now()
            if life > 0:
                stored = StoredToken(token.value, self._wall() + life)
                await self._store.put(self._key(credential, source), stored, life)
        return token

    def _is_current_exchange(self, credential: Credential) -> bool:
        """Return whether what the running task fetches is still wanted: nobody has forgotten the credential since."""
        return self._pending.get(credential) is asyncio.current_task()

    async def _granted(self, credential: Credential, ordinary: Token | None, secrets: tuple[Secret, ...]) -> Granted:
        if ordinary is None:
            return await self._grants.ask_lwa(credential, secrets)
        try:
            return await self._grants.mint(credential, ordinary.value)
        except OrdinaryTokenRefused as exc:
            another = await self._replaced(ordinary_of(credential), ordinary)
            if another is None:
                raise exc.error from exc
        try:
            granted = await self._grants.mint(credential, another.value)
        except OrdinaryTokenRefused as exc:
            self.judge(ordinary_of(credential), another, accepted=False)
            raise exc.error from exc
        self.judge(ordinary_of(credential), another, accepted=True)
        return granted

    def _note_failure(self, credential: Credential, error: ProxyError, secrets: tuple[Secret, ...]) -> None:
        before = self._failed.pop(credential, None)
        count = before.count + 1 if before is not None and before.secrets == secrets else 1
        longest = LONGEST_PAUSE if error.retryable else LONGEST_REFUSED_PAUSE
        pause = min(longest, FIRST_PAUSE * 2 ** min(count, 20)) * random.uniform(0.75, 1.0)  # noqa: S311 - jitter
        error.retry_after = pause if error.retryable else None
        if len(self._failed) >= MOST_HELD:
            del self._failed[next(iter(self._failed))]
        now = self._now()
        until = now + pause
        held = self._held.get(credential)
        if held is not None and now < held.dies_at:
            # The moment it is needed, one more try: the token host may be back.
            until = min(until, held.expires_at if now < held.expires_at else held.dies_at)
        self._failed[credential] = _Failure(error, count, until, secrets)

    # Keeping.

    def _fits(self, credential: Credential, stored: StoredToken) -> bool:
        """Return whether a token that was kept is worth having."""
        held = self._held.get(credential)
        # Only what is fresher than what is held: a token that is due for renewal was kept here as well.
        return stored.expires_at - self._wall() > SAFETY_MARGIN and (held is None or held.value != stored.value)

    def _of_store(self, credential: Credential, stored: StoredToken) -> Token:
        return self._token(credential, stored.value, self._now(), stored.expires_at - self._wall(), took=0.0)

    def _key(self, credential: Credential, source: str) -> str:
        """Return what the credential's token is kept by: it differs wherever another secret would give another token.

        So two fleets on one Redis that call different sellers by one name do not meet, nor does a new configuration
        meet what was kept for somebody else.
        """
        return f"{_key(credential)}\x1f{source}"

    def _fresh(self, credential: Credential, granted: Granted) -> Token:
        # Counted from before the exchange: the token host's clock started no earlier than that.
        took = granted.came - granted.asked
        return self._token(credential, granted.grant.value, granted.asked, granted.grant.expires_in, took)

    def _token(self, credential: Credential, value: Secret, since: float, life: float, took: float) -> Token:
        expires_at = since + life - min(SAFETY_MARGIN, life / 20)
        share = RENEW_AT + random.uniform(-RENEW_JITTER, RENEW_JITTER)  # noqa: S311 - spreads load, hides nothing
        renew_at = min(since + life * share, expires_at - RENEW_LEAD * took)
        return Token(
            value, credential.kind, since, renew_at, expires_at, since + life, self._now(), credential.data_elements
        )

    def _hold(self, credential: Credential, token: Token) -> None:
        self._held.pop(credential, None)
        if len(self._held) >= MOST_HELD:
            del self._held[next(iter(self._held))]  # the one that was fetched longest ago
        self._held[credential] = token
        expires_at = self._wall() + token.expires_at - self._now()
        self._metrics.token_expiry.labels(credential.account, credential.region, credential.kind).set(expires_at)
        self._look(credential, token, at=token.renew_at)

        if not self._grants.is_in_force(credential, token.source):
            self._call_later(SETTLED_AFTER, self._settle, credential, token)

    def _settle(self, credential: Credential, token: Token) -> None:
        """Forget a token that was got by what a file held for a moment: it may be another seller's."""
        if self._held.get(credential) is token and token.source != self._grants.fingerprint(credential):
            self.forget(lambda one: one == credential)

    def _look(self, credential: Credential, token: Token, at: float) -> None:
        self._call_later(max(0.0, at - self._now()), self._due, credential, token)

    def _due(self, credential: Credential, token: Token) -> None:
        """Renew a token that is in use, before anybody has to wait for it."""
        if self._closed or self._held.get(credential) is not token:
            return
        now = self._now()
        if now >= token.expires_at:
            if not credential.reusable:
                del self._held[credential]  # nobody will ask for that document's token again
            # Others stay: so the store's copy is known for the same one, whatever the wall clock says by then.
            return
        in_use = now - token.used_at <= IN_USE * (token.expires_at - token.since)
        if not credential.reusable or not in_use:
            self._look(credential, token, at=token.expires_at)
            return
        pause = self._pause(credential, now)
        if pause <= 0:
            self._exchange(credential, None)
        self._look(credential, token, at=min(token.expires_at, now + max(pause, LOOK_AGAIN)))


def _key(credential: Credential) -> str:
    """Return a text that differs wherever two tokens do; no part of it can contain the separator's neighbours."""
    return "\x1f".join(
        (
            credential.kind,
            credential.application,
            credential.account,
            credential.environment,
            credential.region,
            credential.scope,
            credential.method,
            credential.path,
            ",".join(credential.data_elements),
        )
    )


def _nothing_left(credential: Credential) -> RestrictedDataRefused:
    return RestrictedDataRefused(
        f"the application has no role for any of the data elements asked for account {credential.account} in "
        f"{credential.region}: {', '.join(credential.data_elements)}",
        "Get the role from Amazon and have the seller authorise anew, or ask for other elements.",
    )


def _again(error: ProxyError, remaining: float) -> ProxyError:
    """Return the remembered error anew: one instance raised by many would grow a traceback for each."""
    return type(error)(
        error.message, error.hint, retry_after=remaining if error.retryable else None, reason=error.reason
    )
