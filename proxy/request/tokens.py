"""Which token goes with this request: held, renewed before it expires, and fetched once for everybody who waits?

One exchange per credential at a time. A waiter who leaves cancels nothing. A token is renewed in the background from
about 85 % of its life, by the requests that use it; until its last seconds it is served while that goes on, or fails.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import aiohttp

from proxy.amazon import lwa, rdt
from proxy.amazon.headers import credential_headers
from proxy.config import Config, Secret
from proxy.errors import ProxyError, RestrictedDataRefused, TokenRefused, TokenUnavailable
from proxy.logs import LOGGER, fields
from proxy.metrics import Metrics
from proxy.request.identify import Credential, TokenKind, endpoint_of, ordinary_credential
from proxy.store import Store, StoredToken

RENEW_AT = 0.85  # of a token's life
RENEW_JITTER = 0.05  # so that tokens fetched together are not renewed together
SAFETY_MARGIN = 2.0  # seconds before its expiry in which a token is not sent any more; for short lives a twentieth

FIRST_PAUSE = 0.5  # seconds after a failed exchange; doubled with each further one
LONGEST_PAUSE = 5.0  # so that service is back within seconds of the token host's return
LONGEST_REFUSED_PAUSE = 300.0  # for refusals that only a person can mend

MOST_HELD = 50_000  # tokens; a report document's token has a key of its own
WARM_UP_PARALLEL = 20

_WHAT_TO_DO = {
    "invalid_grant": "The refresh token is wrong, revoked or expired: authorise the application again and replace it.",
    "invalid_client": "The client id or secret is wrong, or the secret is past its rotation: replace it.",
    "unauthorized_client": "The refresh token belongs to another application: check which one the account names.",
    "invalid_scope": "The application is not entitled to this grantless scope: ask Amazon for its role.",
    "access_denied": "Login with Amazon denies the application: look at its state in Amazon's developer console.",
}


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """A token in use. Moments are seconds of the monotonic clock; two tokens are equal only if they are the same."""

    value: Secret
    kind: TokenKind
    renew_at: float
    expires_at: float


@dataclass(slots=True)
class _Failure:
    """Why the last exchange failed, how many did in a row, and until when it is not tried again."""

    error: ProxyError
    count: int
    until: float


class Tokens:
    """The tokens of every credential that was asked for."""

    def __init__(
        self,
        config: Config,
        *,
        lwa_session: aiohttp.ClientSession,
        amazon_session: aiohttp.ClientSession,
        user_agents: dict[str, str],
        store: Store,
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._lwa_session = lwa_session
        self._amazon_session = amazon_session
        self._user_agents = user_agents
        self._store = store
        self._metrics = metrics
        self._now = now
        self._wall = wall
        self._held: dict[Credential, Token] = {}
        self._pending: dict[Credential, asyncio.Task[Token]] = {}
        self._failed: dict[Credential, _Failure] = {}

    async def get(self, credential: Credential, *, rejected: Token | None = None) -> Token:
        """Return a token that is good now; `rejected` is one that Amazon has just refused.

        Raises TokenUnavailable, TokenRefused or RestrictedDataRefused.
        """
        held = self._held.get(credential)
        now = self._now()
        if held is not None and held is not rejected and now < held.expires_at:
            if now >= held.renew_at and not self._is_pausing(credential, now):
                self._exchange(credential, rejected)
            return held
        if self._is_pausing(credential, now):
            failure = self._failed[credential]
            raise _again(failure.error, failure.until - now)
        return await asyncio.shield(self._exchange(credential, rejected))

    async def warm_up(self) -> None:
        """Fetch the token of every account and region, a bounded number at a time; failures are logged, not raised."""
        places = asyncio.Semaphore(WARM_UP_PARALLEL)

        async def fetch(credential: Credential) -> None:
            async with places:
                try:
                    await self.get(credential)
                except ProxyError:
                    return  # logged and counted where it arose

        await asyncio.gather(*(fetch(credential) for credential in self._ordinary_credentials()))

    async def close(self) -> None:
        """Cancel exchanges that are under way."""
        tasks = list(self._pending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ordinary_credentials(self) -> Iterable[Credential]:
        for name, account in self._config.accounts.items():
            application, _ = self._config.application_of(account)
            for region in account.refresh_tokens:
                yield ordinary_credential(application, name, self._config.environment_of(account), region)

    def _is_pausing(self, credential: Credential, now: float) -> bool:
        failure = self._failed.get(credential)
        return failure is not None and now < failure.until

    def _exchange(self, credential: Credential, rejected: Token | None) -> asyncio.Task[Token]:
        """Return the exchange that is under way for `credential`, starting it where there is none."""
        task = self._pending.get(credential)
        if task is None:
            task = asyncio.create_task(self._renew(credential, rejected), name=f"token {credential.kind}")
            self._pending[credential] = task
            task.add_done_callback(lambda done: self._finished(credential, done))
        return task

    def _finished(self, credential: Credential, task: asyncio.Task[Token]) -> None:
        self._pending.pop(credential, None)
        if not task.cancelled():
            task.exception()  # everybody who waited may have left; the failure was logged where it arose

    async def _renew(self, credential: Credential, rejected: Token | None) -> Token:
        try:
            token = await self._from_store(credential, rejected) or await self._fetch(credential)
        except ProxyError as error:
            self._note_failure(credential, error)
            raise
        self._failed.pop(credential, None)
        if token.expires_at > self._now():
            self._hold(credential, token)
        return token

    def _hold(self, credential: Credential, token: Token) -> None:
        self._held.pop(credential, None)
        if len(self._held) >= MOST_HELD:
            del self._held[next(iter(self._held))]  # the one that was fetched longest ago
        self._held[credential] = token

    async def _from_store(self, credential: Credential, rejected: Token | None) -> Token | None:
        if not credential.reusable:
            return None
        stored = await self._store.get(_key(credential))
        if stored is None or (rejected is not None and stored.value == rejected.value):
            return None
        held = self._held.get(credential)
        life = stored.expires_at - self._wall()
        # Only what is fresher than what is held: a token that is due for renewal was kept here as well.
        if life <= SAFETY_MARGIN or (held is not None and held.value == stored.value):
            return None
        return self._token(credential.kind, stored.value, self._now(), life)

    def _token(self, kind: TokenKind, value: Secret, since: float, life: float) -> Token:
        margin = min(SAFETY_MARGIN, life / 20)
        share = RENEW_AT + random.uniform(-RENEW_JITTER, RENEW_JITTER)  # noqa: S311 - spreads load, hides nothing
        return Token(value, kind, renew_at=since + life * share, expires_at=since + life - margin)

    async def _fetch(self, credential: Credential) -> Token:
        """Make the exchange that `credential` calls for; translate whatever goes wrong into an error of ours."""
        ordinary: Token | None = None
        if credential.kind == "rdt":
            ordinary = await self.get(
                replace(credential, kind="lwa", method="", path="", data_elements=(), reusable=True)
            )
        started = self._now()
        result, reason = "failed", "unknown"
        try:
            async with asyncio.timeout(self._config.timeouts.token):
                grant = await self._grant(credential, ordinary)
            result, reason = "ok", ""
        except lwa.ExchangeRefused as exc:
            result, reason = "refused", exc.reason
            raise _refused(credential, exc) from exc
        except rdt.RdtRefused as exc:
            result, reason = "refused", f"http_{exc.status}"
            if exc.means_unrestricted and ordinary is not None:
                reason = "not_restricted"
                return ordinary
            raise _rdt_refused(credential, exc) from exc
        except lwa.ExchangeFailed as exc:
            reason = exc.reason
            raise _unavailable(credential, reason) from exc
        except TimeoutError as exc:
            reason = "timeout"
            raise _unavailable(credential, reason) from exc
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            reason = "connection"
            raise _unavailable(credential, reason) from exc
        finally:
            self._count(credential, result, reason, self._now() - started)
        return await self._keep(credential, grant, started)

    async def _grant(self, credential: Credential, ordinary: Token | None) -> lwa.Grant:
        config = self._config
        application = config.applications[credential.application]
        client = (application.client_id, application.client_secret)
        if credential.kind == "grantless":
            return await lwa.client_credentials_grant(
                self._lwa_session, config.endpoints.lwa, *client, credential.scope
            )
        if ordinary is None:
            refresh_token = config.accounts[credential.account].refresh_tokens[credential.region]
            return await lwa.refresh_token_grant(self._lwa_session, config.endpoints.lwa, *client, refresh_token)
        return await rdt.create_restricted_data_token(
            self._amazon_session,
            endpoint_of(config, credential.environment, credential.region),
            credential_headers(ordinary.value, self._user_agents[credential.application], self._wall()),
            credential.method,
            credential.path,
            credential.data_elements,
        )

    async def _keep(self, credential: Credential, grant: lwa.Grant, started: float) -> Token:
        # Counted from before the exchange: the token host's clock started no earlier than that.
        token = self._token(credential.kind, grant.value, started, grant.expires_in)
        life = token.expires_at - self._now()
        if life > 0:
            expires_at = self._wall() + life
            self._metrics.token_expiry.labels(credential.account, credential.region, credential.kind).set(expires_at)
            if credential.reusable:
                await self._store.put(_key(credential), StoredToken(grant.value, expires_at), life)
        return token

    def _count(self, credential: Credential, result: str, reason: str, seconds: float) -> None:
        labels = (credential.kind, credential.account, credential.region, result, reason)
        self._metrics.token_refreshes.labels(*labels).inc()
        self._metrics.token_refresh_duration.labels(credential.kind).observe(seconds)
        LOGGER.log(
            _LEVELS[result],
            "token exchange",
            extra=fields(
                result=result,
                reason=reason,
                kind=credential.kind,
                application=credential.application,
                account=credential.account,
                region=credential.region,
                duration=round(seconds, 3),
            ),
        )

    def _note_failure(self, credential: Credential, error: ProxyError) -> None:
        before = self._failed.get(credential)
        count = before.count + 1 if before else 1
        longest = LONGEST_PAUSE if error.retryable else LONGEST_REFUSED_PAUSE
        pause = min(longest, FIRST_PAUSE * 2 ** min(count, 20)) * random.uniform(0.75, 1.0)  # noqa: S311 - jitter
        error.retry_after = pause if error.retryable else None
        if len(self._failed) >= MOST_HELD:
            del self._failed[next(iter(self._failed))]
        self._failed[credential] = _Failure(error, count, self._now() + pause)


_LEVELS = {"ok": 20, "refused": 40, "failed": 30}  # of the logging module: info, error, warning


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


def _whose(credential: Credential) -> str:
    if credential.kind == "grantless":
        return f"application {credential.application}"
    return f"account {credential.account} in {credential.region}"


def _unavailable(credential: Credential, reason: str) -> TokenUnavailable:
    host = "Amazon" if credential.kind == "rdt" else "Login with Amazon"
    return TokenUnavailable(
        f"no {credential.kind} token for {_whose(credential)}: {host} did not give one ({reason})",
        "Nothing was sent to Amazon's API; try again after Retry-After.",
    )


def _refused(credential: Credential, exc: lwa.ExchangeRefused) -> TokenRefused:
    request_id = f" (Amazon's request id {exc.request_id})" if exc.request_id.isascii() and exc.request_id else ""
    return TokenRefused(
        f"Login with Amazon refuses {_whose(credential)}: {exc.reason}{request_id}",
        _WHAT_TO_DO.get(exc.reason, "Check the application's and the account's credentials."),
    )


def _rdt_refused(credential: Credential, exc: rdt.RdtRefused) -> RestrictedDataRefused:
    return RestrictedDataRefused(
        f"Amazon gives {_whose(credential)} no Restricted Data Token for {credential.method} {credential.path}: "
        f"{exc.status} {exc.message}",
        "Check that the application has the restricted role, and had it when the seller authorised it; "
        "x-sp-data-elements: none asks without personal data where that is possible.",
    )


def _again(error: ProxyError, remaining: float) -> ProxyError:
    """Return the remembered error anew: one instance raised by many would grow a traceback for each."""
    return type(error)(error.message, error.hint, retry_after=remaining if error.retryable else None)
