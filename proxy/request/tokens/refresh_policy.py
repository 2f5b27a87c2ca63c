"""When a token is renewed, when it expires, and when a failed refresh is tried again.

Arithmetic alone: no clock and no state. Times are seconds of the monotonic clock.
"""

import random
from dataclasses import dataclass

from proxy.config import Secret
from proxy.errors import ProxyError
from proxy.request.token import Token
from proxy.request.token_selection import TokenKey

RENEW_AT = 0.85  # of a token's lifetime
RENEW_JITTER = 0.05  # so that tokens fetched together are not renewed together
RENEW_LEAD = 1.5  # times the duration of its refresh: where the token host is slow, the renewal begins earlier
SAFETY_MARGIN = 2.0  # seconds before its expiry from which a token is not sent; for short lifetimes a twentieth
IN_USE_WITHIN = 0.5  # of its lifetime: a token that was not used for that long is left to expire
CHECK_INTERVAL = 5.0  # seconds after which a failed renewal is tried again

FIRST_PAUSE = 0.5  # seconds after a failed refresh; doubled with each further one
MAX_PAUSE = 5.0  # so that service resumes within seconds of the token host's return
MAX_REJECTED_PAUSE = 300.0  # for refusals that only a person can fix
RECENT_FAILURE = 30.0  # seconds after a pause in which the fault is assumed to persist


@dataclass(slots=True)
class Failure:
    """The last refresh that failed: its error, how many failed in a row, and with which secrets."""

    error: ProxyError
    count: int
    until: float  # no refresh before
    secrets: tuple[Secret, ...]

    def is_recent(self, now: float) -> bool:
        """Return whether the fault probably persists."""
        return self.error.retryable and now - self.until < RECENT_FAILURE


def new_token(
    token_key: TokenKey, value: Secret, *, issued_at: float, lifetime: float, fetch_time: float, now: float
) -> Token:
    """Return a token with the times of its renewal and expiry.

    `fetch_time` is what its refresh took, 0 where it comes from the store. The renewal time has a random part.
    """
    expires_at = issued_at + lifetime - min(SAFETY_MARGIN, lifetime / 20)
    share = RENEW_AT + random.uniform(-RENEW_JITTER, RENEW_JITTER)  # noqa: S311 - spreads load, hides nothing
    renew_at = min(issued_at + lifetime * share, expires_at - RENEW_LEAD * fetch_time)
    return Token(
        value, token_key.kind, issued_at, renew_at, expires_at, issued_at + lifetime, now, token_key.data_elements
    )


def is_in_use(token: Token, now: float) -> bool:
    """Return whether a token was used recently enough to be renewed before anyone asks for it."""
    return now - token.used_at <= IN_USE_WITHIN * (token.expires_at - token.issued_at)


def pause_after(error: ProxyError, failures: int) -> float:
    """Return the seconds until the next try, after so many failures in a row: doubling, bounded, with jitter."""
    longest = MAX_PAUSE if error.retryable else MAX_REJECTED_PAUSE
    return min(longest, FIRST_PAUSE * 2.0 ** min(failures, 20)) * random.uniform(0.75, 1.0)  # noqa: S311 - jitter


def retry_at(pause: float, token: Token | None, now: float) -> float:
    """Return when a failed refresh is tried again: after `pause`, or earlier, when `token` expires.

    The token host may be back by then, and without another try every caller would be refused until the pause ends.
    """
    if token is None or now >= token.expires_hard:
        return now + pause
    return min(now + pause, token.expires_at if now < token.expires_at else token.expires_hard)
