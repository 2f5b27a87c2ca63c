"""Fetching one token: the request, its retries, and the errors when it fails.

Caching tokens, and deciding when one is fetched, is in `provider.py`.
"""

import asyncio
import logging
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple
from urllib.parse import urlsplit

from proxy.amazon import lwa, rdt
from proxy.amazon.headers import credential_headers, user_agent_of
from proxy.amazon.operations import Operation
from proxy.config import Config, Secret
from proxy.errors import ProxyError, RestrictedDataRefused, TokenRefused, TokenUnavailable
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.request.ratelimit.limiter import RateLimiter
from proxy.request.request_options import AdmissionRequest
from proxy.request.routing import UNCACHED, Route, endpoint_of
from proxy.request.token_selection import TokenKey, access_token_key, access_token_key_of
from proxy.request.upstream.http1 import RemoteProtocolError
from proxy.request.upstream.pool import ConnectionPool

TRIES = 3  # of one token request, within timeouts.token
FIRST_PAUSE = 0.2  # seconds between the first two tries, doubled for the next

_REMEDIES = {
    # Error codes of RFC 6749 section 5.2. `access_denied` is not among them; Amazon's Python SDK maps a 403 to it.
    "invalid_grant": "The refresh token is wrong, revoked or expired: authorise the application again and replace it.",
    "invalid_client": "The client id or secret is wrong, or the secret is past its rotation: replace it.",
    "unauthorized_client": "The refresh token belongs to another application: check which one the account names.",
    "invalid_scope": "The application is not entitled to this grantless scope: ask Amazon for its role.",
    "access_denied": "Login with Amazon denies the application: look at its state in Amazon's developer console.",
}
# These two concern the refresh token. `invalid_client` concerns the application, so every account that uses it.
_ACCOUNT_ERRORS = frozenset({"invalid_grant", "unauthorized_client"})


class ReportUnrestricted(Exception):
    """Amazon refuses a Restricted Data Token for this document because it needs none."""


class DataElementsDenied(Exception):
    """The application has no role for some of the requested data elements, those in `elements`."""

    def __init__(self, elements: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(elements)))
        self.elements = elements


class AccessTokenRejected(Exception):
    """Amazon rejects the access token that was sent to create a Restricted Data Token; `error` says so."""

    def __init__(self, error: ProxyError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True, slots=True)
class FetchedToken:
    """A token response, with the times of its request and arrival in seconds of the monotonic clock."""

    response: lwa.TokenResponse
    # The lifetime counts from here: `expires_in` is relative to the response (RFC 6749 section 5.1), whose time at
    # Amazon is unknown.
    requested_at: float
    received_at: float


class ClientSettings(NamedTuple):
    """What token requests are made with: a configuration and its connection pools."""

    config: Config
    lwa_session: ConnectionPool
    amazon_session: ConnectionPool


def access_token_keys(config: Config) -> Iterator[TokenKey]:
    """Yield the key of the access token of every account and region."""
    for name, account in config.accounts.items():
        application, _ = config.application_of(account)
        for region in account.refresh_tokens:
            yield access_token_key_of(application, name, config.environment_of(account), region)


def token_source(config: Config, token_key: TokenKey) -> tuple[object, ...] | None:
    """Return what identifies the grantee of a token for `token_key`; None where it is not configured.

    The client secret is not part of it: tokens fetched with an old one stay valid.
    """
    application = config.applications.get(token_key.application)
    if application is None:
        return None
    if token_key.kind == "grantless":
        return (application.client_id,)
    account = config.accounts.get(token_key.account)
    # A refresh token is issued to one client (RFC 6749 section 6): with another application it is another grantee.
    if account is None or config.application_of(account)[0] != token_key.application:
        return None
    refresh_token = account.refresh_tokens.get(token_key.region)
    if refresh_token is None:
        return None
    # Not compared with the key's environment: a sandbox account may need a token of production (sandbox_rdt).
    environment = config.environment_of(account)
    return (
        application.client_id,
        refresh_token,
        environment,
        account.target_application if token_key.kind == "rdt" else None,
    )


def _digest(config: Config | None, token_key: TokenKey, refresh_token: Secret | None) -> str:
    source = ""
    if config is not None:
        source = config.applications[token_key.application].client_id
        if refresh_token is not None:
            account = config.accounts[token_key.account]
            # A control character as separator, so that two different pairs cannot give the same text. A token that was
            # created for a target application can be used only by that one (Amazon's Tokens guide).
            source += f"\x1f{refresh_token.reveal()}\x1f{account.target_application or ''}"
    # A digest, because the fingerprint is held with each cached token and goes into the key of the store.
    return sha256(source.encode()).hexdigest()


class TokenClient:
    """Requests tokens of Login with Amazon and of Amazon's Tokens API; `mint` is createRestrictedDataToken."""

    def __init__(
        self,
        config: Config,
        *,
        lwa_session: ConnectionPool,
        amazon_session: ConnectionPool,
        rate_limiter: RateLimiter,
        mint: Operation | None,
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.settings = ClientSettings(config, lwa_session, amazon_session)
        # Earlier configurations, for requests that began under one; weak, because such a request keeps its own alive.
        self._earlier: list[weakref.ref[Config]] = []
        self._limits = rate_limiter
        self._rdt_operation = mint
        self._metrics = metrics
        self._now = now
        self._sleep = sleep

    def activate(self, config: Config, lwa_session: ConnectionPool, amazon_session: ConnectionPool) -> None:
        """Use another configuration from now on, except for keys that only an earlier one has."""
        # Dropped here, so that the list does not grow with the number of reloads.
        self._earlier = [earlier for earlier in self._earlier if earlier() is not None]
        self._earlier.insert(0, weakref.ref(self.settings.config))
        self.settings = ClientSettings(config, lwa_session, amazon_session)

    def _config_of(self, token_key: TokenKey) -> Config | None:
        """Return the newest configuration that has this key; None where none of those in use has it."""
        configs = (self.settings.config, *(earlier() for earlier in self._earlier))
        return next(
            (config for config in configs if config is not None and token_source(config, token_key) is not None), None
        )

    def secrets(self, token_key: TokenKey) -> tuple[Secret, ...]:
        """Return the secrets that a token request would send now, read again from their files and variables."""
        config = self._config_of(token_key)
        # createRestrictedDataToken takes no credentials of the application, only an access token.
        if token_key.kind == "rdt" or config is None:
            return ()
        secret = config.applications[token_key.application].client_secret.refreshed()
        if token_key.kind == "grantless":
            return (secret,)
        return secret, config.accounts[token_key.account].refresh_tokens[token_key.region].refreshed()

    def fingerprint(self, token_key: TokenKey, sent: tuple[Secret, ...] = ()) -> str:
        """Return a digest of what identifies the grantee of a token (`token_source`), with the secrets of now.

        Or with `sent`, the `secrets` of an earlier token request.
        """
        config = self._config_of(token_key)
        if config is None or token_key.kind == "grantless":
            return _digest(config, token_key, None)
        held = config.accounts[token_key.account].refresh_tokens[token_key.region]
        return _digest(config, token_key, sent[1] if len(sent) > 1 else held.refreshed())

    def matches_config(self, token_key: TokenKey, fingerprint: str) -> bool:
        """Return whether this is the fingerprint of the secrets as the configuration was loaded with them."""
        config = self._config_of(token_key)
        if config is None or token_key.kind == "grantless":
            return fingerprint == _digest(config, token_key, None)
        held = config.accounts[token_key.account].refresh_tokens[token_key.region]
        return fingerprint == _digest(config, token_key, held)

    async def fetch_access_token(self, token_key: TokenKey, secrets: tuple[Secret, ...]) -> FetchedToken:
        """Fetch an access token or a grantless token; raise TokenRefused or TokenUnavailable."""
        config = self._config_of(token_key)
        if config is None:
            raise not_configured(token_key)
        client = (config.applications[token_key.application].client_id, secrets[0])
        # One token host for all regions: SP-API uses only api.amazon.com.
        url, session = config.endpoints.lwa, self.settings.lwa_session

        def call() -> Awaitable[lwa.TokenResponse]:
            if token_key.kind == "grantless":
                return lwa.client_credentials_grant(session.post, url, *client, token_key.scope)
            return lwa.refresh_token_grant(session.post, url, *client, secrets[1])

        return await self.with_retries(token_key, url, call)

    async def create_rdt(self, token_key: TokenKey, access_token: Secret) -> FetchedToken:
        """Create a Restricted Data Token with an access token, within the operation's own usage plan.

        Raises ReportUnrestricted, DataElementsDenied, AccessTokenRejected, RestrictedDataRefused, TokenUnavailable and
        UsagePlanExhausted.
        """
        config = self._config_of(token_key)
        if config is None:
            raise not_configured(token_key)
        session, agent = self.settings.amazon_session, user_agent_of(config.applications[token_key.application])
        endpoint = endpoint_of(config, token_key.environment, token_key.region)
        route = self._rdt_route(token_key, endpoint)
        account = config.accounts[token_key.account]

        async def call() -> lwa.TokenResponse:
            # Inside `call`, because a retry needs its own x-amz-date.
            headers = credential_headers(access_token, agent, time.time())
            try:
                return await rdt.create_restricted_data_token(
                    session.post,
                    endpoint,
                    headers,
                    token_key.method,
                    token_key.path,
                    token_key.data_elements,
                    account.target_application,
                )
            except lwa.TokenRequestFailed as exc:
                # A 429 never carries x-amzn-RateLimit-Limit (Amazon's guide "Usage Plans"), hence no rate here.
                if exc.reason == "http_429":
                    self._limits.observe_response(route, 429, None)
                raise

        # Outside `with_retries`: a wait for the usage plan must not consume timeouts.token. The plan is 1 call per
        # second with a burst of 10 (DOC "Tokens API Rate Limits").
        await self._limits.acquire(route, AdmissionRequest(config.limits.max_wait))
        return await self.with_retries(token_key, endpoint, call)

    def _rdt_route(self, token_key: TokenKey, endpoint: str) -> Route:
        return Route(
            account=token_key.account,
            account_source="",
            region=token_key.region,
            region_source="",
            environment=token_key.environment,
            application=token_key.application,
            operation=self._rdt_operation,
            operation_name=self._rdt_operation.name if self._rdt_operation is not None else "unknown",
            endpoint=endpoint,
            token_key=access_token_key(token_key),
            elements_source="",
            key=UNCACHED,
            path_and_query=rdt.PATH,
        )

    async def with_retries(
        self, token_key: TokenKey, url: str, call: Callable[[], Awaitable[lwa.TokenResponse]]
    ) -> FetchedToken:
        """Make one token request to the host of `url`, up to TRIES times within `timeouts.token`.

        Raises TokenRefused, TokenUnavailable and what `_rdt_refused` returns.
        """
        started = self._now()
        reason = "timeout"
        try:
            # One timeout over all tries and pauses: callers wait for the sum.
            async with asyncio.timeout(self.settings.config.timeouts.token):
                for attempt in range(TRIES):
                    if attempt:
                        # Jitter, because replicas that lost the token host together would otherwise return to it
                        # together.
                        pause = FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
                        await self._sleep(pause)
                    started, reason = self._now(), "timeout"
                    try:
                        token_response = await call()
                    except lwa.TokenRequestFailed as exc:
                        reason = exc.reason
                    except (RemoteProtocolError, OSError) as exc:
                        # TimeoutError is an OSError: ETIMEDOUT of the kernel raises it too (PEP 3151).
                        reason = "timeout" if isinstance(exc, TimeoutError) else "connection"
                    else:
                        self._count(token_key, "ok", "", started)
                        return FetchedToken(token_response, started, self._now())
                    self._count(token_key, "failed", reason, started)
        # Outside the loop: the same credentials would be refused again (RFC 6749 section 5.2), so a refusal is not
        # retried.
        except lwa.OAuthError as exc:
            config = self._config_of(token_key)
            keys, source = ("", "") if config is None else config_keys(config, token_key, exc.reason)
            self._count(token_key, "refused", exc.reason, started, keys + source)
            raise _refused(token_key, exc, keys, has_source=bool(source)) from exc
        except rdt.RdtRefused as exc:
            raise self._rdt_refused(token_key, exc, started) from exc
        except TimeoutError as exc:
            self._count(token_key, "failed", "timeout", started)
            raise _unavailable(token_key, url, "timeout") from exc
        raise _unavailable(token_key, url, reason)

    def _rdt_refused(self, token_key: TokenKey, exc: rdt.RdtRefused, started: float) -> Exception:
        """Return the exception for a refusal of createRestrictedDataToken."""
        reason, refused = f"http_{exc.status}", _rdt_error(token_key, exc)
        error: Exception = refused
        # First: for a document, Amazon's 400 means that its report type needs no RDT (jlevers/selling-partner-api#897).
        if exc.means_unrestricted and not token_key.is_shared:
            reason, error = "not_restricted", ReportUnrestricted()
        # Only elements that were requested. Amazon refuses all where the role for one is missing and names that one in
        # the message (selling-partner-api-models issue 1723).
        elif exc.refused_elements & set(token_key.data_elements):
            reason, error = "elements", DataElementsDenied(exc.refused_elements)
        # A 403 is also the response to a missing role. Only the text tells an expired or revoked token from it.
        elif exc.refusal.is_token_error:
            reason, error = "token", AccessTokenRejected(refused)
        self._count(token_key, "refused", reason, started)
        return error

    def _count(self, token_key: TokenKey, result: str, reason: str, started: float, look_at: str = "") -> None:
        seconds = self._now() - started
        labels = (token_key.kind, token_key.account, token_key.region, result, reason)
        self._metrics.token_refreshes.labels(*labels).inc()
        self._metrics.token_refresh_duration.labels(token_key.kind).observe(seconds)
        LOGGER.log(
            logging.INFO if reason in _EXPECTED_ERRORS else _LEVELS[result],
            "token exchange",
            extra=extra(
                result=result,
                reason=reason,
                kind=token_key.kind,
                application=token_key.application,
                account=token_key.account,
                region=token_key.region,
                duration=round(seconds, 3),
                **({"look_at": look_at} if look_at else {}),
            ),
        )


_LEVELS = {"ok": logging.INFO, "refused": logging.ERROR, "failed": logging.WARNING}
_EXPECTED_ERRORS = frozenset({"not_restricted", "elements", "token"})  # the provider handles them


def _owner(token_key: TokenKey) -> str:
    if token_key.kind == "grantless":
        return f"application {token_key.application}"
    return f"account {token_key.account} in {token_key.region}"


def not_configured(token_key: TokenKey) -> TokenRefused:
    return TokenRefused(
        f"{_owner(token_key)} is not configured any more", "Put it back into the configuration, or call another one."
    )


_UNREACHABLE = {"connection": "could not be reached", "timeout": "did not respond in time"}


def _unavailable(token_key: TokenKey, url: str, reason: str) -> TokenUnavailable:
    # An RDT is created by the regional API, all other tokens by Login with Amazon.
    host, state = "Amazon" if token_key.kind == "rdt" else "Login with Amazon", "did not issue one"
    hint = "Nothing was sent to Amazon's API; try again after Retry-After."
    if reason in _UNREACHABLE:
        host, state = f"{host} at {urlsplit(url).hostname}", _UNREACHABLE[reason]
        hint += " `sp-api-proxy check --live` says why."
    return TokenUnavailable(
        f"no {token_key.kind} token for {_owner(token_key)}: {host} {state} ({reason})", hint, reason=reason
    )


def config_keys(config: Config, token_key: TokenKey, reason: str) -> tuple[str, str]:
    """Return the configuration keys that Login with Amazon refused, and where their secret comes from.

    The second text is for the operator alone, not for apps. Both are empty where no key of the configuration is
    concerned.
    """
    application, account = config.applications.get(token_key.application), config.accounts.get(token_key.account)
    if reason in _ACCOUNT_ERRORS and account is not None:
        token = account.refresh_tokens.get(token_key.region)
        keys = f"accounts.{token_key.account}.refresh_tokens.{token_key.region}"
        if reason == "unauthorized_client":
            keys = f"accounts.{token_key.account}.application and {keys}"
        return keys, describe_source(token)
    if reason == "invalid_client" and application is not None:
        keys = f"applications.{token_key.application}.client_id and client_secret"
        return keys, describe_source(application.client_secret)
    return "", ""


def describe_source(secret: Secret | None) -> str:
    """Return ` (from file /run/secrets/x)` for a secret that is not in the configuration file itself."""
    return f" (from {secret.source})" if secret is not None and secret.source else ""


def _refused(token_key: TokenKey, exc: lwa.OAuthError, keys: str, *, has_source: bool) -> TokenRefused:
    where = f" Look at {keys}{', in the place that the log names' if has_source else ''}." if keys else ""
    request_id = f" (Amazon's request id {exc.request_id})" if exc.request_id.isascii() and exc.request_id else ""
    return TokenRefused(
        f"Login with Amazon refuses {_owner(token_key)}: {exc.reason}{request_id}",
        _REMEDIES.get(exc.reason, "Check the application's and the account's credentials.") + where,
        reason=exc.reason,
    )


def _rdt_error(token_key: TokenKey, exc: rdt.RdtRefused) -> RestrictedDataRefused:
    details = " ".join(text for text in (exc.refusal.message or "no reason given", exc.refusal.details) if text)
    return RestrictedDataRefused(
        f"Amazon issues {_owner(token_key)} no Restricted Data Token for {token_key.method} {token_key.path}: "
        f"{exc.status} {details}",
        "Check that the application has the restricted role, and had it when the seller authorised it; "
        "x-sp-data-elements: none asks without personal data where that is possible.",
    )
