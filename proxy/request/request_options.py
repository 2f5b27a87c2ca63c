"""Options of one call in `x-sp-…` headers: maximum wait, client, priority, retries, timeout."""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

from multidict import CIMultiDictProxy

from proxy.config import parse_duration
from proxy.errors import BadOption

MAX_WAIT_HEADER = "x-sp-max-wait"
PRIORITY_HEADER = "x-sp-priority"
CLIENT_HEADER = "x-sp-client"
RETRY_HEADER = "x-sp-retry"
TIMEOUT_HEADER = "x-sp-timeout"

OPTION_HEADERS = frozenset({MAX_WAIT_HEADER, PRIORITY_HEADER, CLIENT_HEADER, RETRY_HEADER, TIMEOUT_HEADER})
_MAX_WAIT = 3600.0  # seconds; a caller who asks for more has made a mistake
_CLIENT = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """How a call asks the rate limiter for admission: maximum wait in seconds, caller, rank in the queue."""

    max_wait: float
    caller: Hashable = ""
    background: bool = False
    is_retry: bool = False  # it already waited once, and Amazon's response was 429


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options of one call; `timeout` in seconds, None where the call sets none."""

    admission: AdmissionRequest
    retry_enabled: bool
    timeout: float | None


def parse_options(
    headers: CIMultiDictProxy[str], names: frozenset[str], listener: Hashable, max_wait: float
) -> RequestOptions:
    """Return the options in a request's headers; raise BadOption for an invalid value.

    `names` are the names of `headers` in lower case; `max_wait` is the default of `x-sp-max-wait` in seconds.
    """
    if OPTION_HEADERS.isdisjoint(names):
        return defaults(listener, max_wait)
    get = headers.get
    timeout = get(TIMEOUT_HEADER)
    admission = AdmissionRequest(
        parse_max_wait(get(MAX_WAIT_HEADER), max_wait),
        (listener, parse_client(get(CLIENT_HEADER))),
        parse_priority(get(PRIORITY_HEADER)),
    )
    return RequestOptions(
        admission, parse_retry(get(RETRY_HEADER)), None if timeout is None else parse_timeout(timeout)
    )


@lru_cache(maxsize=1024)
def defaults(listener: Hashable, max_wait: float) -> RequestOptions:
    """Return the options of a call that sets none; equal arguments give the same object."""
    return RequestOptions(AdmissionRequest(max_wait, (listener, "")), retry_enabled=True, timeout=None)


def parse_timeout(text: str) -> float:
    """Return how long the whole call may take, in seconds, from `x-sp-timeout`; raise BadOption."""
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise BadOption(f"the header {TIMEOUT_HEADER} is not a duration", "Write 500ms, 10s or 2m.")
    return seconds


def parse_max_wait(text: str | None, default: float) -> float:
    """Return how long a call may wait, in seconds, from `x-sp-max-wait`, at most an hour; raise BadOption."""
    if text is None:
        return default
    try:
        seconds = parse_duration(text)
    except ValueError as exc:
        raise BadOption(
            f"the header {MAX_WAIT_HEADER} is not a duration", "Write 500ms, 10s or 2m; 0 for no wait."
        ) from exc
    return min(seconds, _MAX_WAIT)


def parse_priority(text: str | None) -> bool:
    """Return whether a call has background priority, from `x-sp-priority`; raise BadOption."""
    if text is None or text == "normal":
        return False
    if text == "background":
        return True
    raise BadOption(f"the header {PRIORITY_HEADER} is not a priority", "Write background, or leave it out.")


def parse_client(text: str | None) -> str:
    """Return the client's name from `x-sp-client`; clients of one plan are served in turn. Raise BadOption."""
    if text is None:
        return ""
    if not _CLIENT.fullmatch(text):
        raise BadOption(
            f"the header {CLIENT_HEADER} is not a name", "Use up to 64 letters, digits, dots, hyphens and underscores."
        )
    return text


def parse_retry(text: str | None) -> bool:
    """Return whether a call may be sent again at all, from `x-sp-retry`; raise BadOption."""
    if text is None or text == "on":
        return True
    if text == "off":
        return False
    raise BadOption(f"the header {RETRY_HEADER} is neither on nor off", "Write off, or leave it out.")
