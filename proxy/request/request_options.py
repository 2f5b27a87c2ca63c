"""What does the app ask of this one call: how long it may wait, who it is, how urgent, whether to try again?"""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

from multidict import CIMultiDictProxy

from proxy.config import parse_duration
from proxy.errors import BadOption
from proxy.request.ratelimit.limiter import MAX_WAIT_HEADER, AdmissionRequest

PRIORITY_HEADER = "x-sp-priority"
CLIENT_HEADER = "x-sp-client"
RETRY_HEADER = "x-sp-retry"
TIMEOUT_HEADER = "x-sp-timeout"

OPTION_HEADERS = frozenset({MAX_WAIT_HEADER, PRIORITY_HEADER, CLIENT_HEADER, RETRY_HEADER, TIMEOUT_HEADER})
_MAX_WAIT = 3600.0  # seconds; a caller who asks for more has made a mistake
_CLIENT = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The wishes of one call; `timeout` in seconds, None for none of its own."""

    claim: AdmissionRequest
    retry_enabled: bool
    timeout: float | None


def parse_options(
    headers: CIMultiDictProxy[str], names: frozenset[str], listener: Hashable, max_wait: float
) -> RequestOptions:
    """Return the Options in an app's headers, of which `names` are the names; raise BadOption for a senseless one."""
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
    """Return the wishes of a call that names none."""
    return RequestOptions(AdmissionRequest(max_wait, (listener, "")), retry_enabled=True, timeout=None)


def parse_timeout(text: str) -> float:
    """Return how long the whole call may take, in seconds, by `x-sp-timeout`."""
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise BadOption(f"the header {TIMEOUT_HEADER} is no duration", "Write 500ms, 10s or 2m.")
    return seconds


def parse_max_wait(text: str | None, default: float) -> float:
    """Return how long this call may wait, in seconds: the header's value, or the setting's."""
    if text is None:
        return default
    try:
        seconds = parse_duration(text)
    except ValueError as exc:
        raise BadOption(f"the header {MAX_WAIT_HEADER} is no duration", "Write 500ms, 10s or 2m; 0 for none.") from exc
    return min(seconds, _MAX_WAIT)


def parse_priority(text: str | None) -> bool:
    """Return whether a call is a background one, by `x-sp-priority`."""
    if text is None or text == "normal":
        return False
    if text == "background":
        return True
    raise BadOption(f"the header {PRIORITY_HEADER} holds no priority", "Write background, or leave it out.")


def parse_client(text: str | None) -> str:
    """Return who sends a call, by `x-sp-client`: callers of one plan take turns."""
    if text is None:
        return ""
    if not _CLIENT.fullmatch(text):
        raise BadOption(
            f"the header {CLIENT_HEADER} is no name", "Use up to 64 letters, digits, dots, hyphens and underscores."
        )
    return text


def parse_retry(text: str | None) -> bool:
    """Return whether a call may be sent again at all, by `x-sp-retry`."""
    if text is None or text == "on":
        return True
    if text == "off":
        return False
    raise BadOption(f"the header {RETRY_HEADER} holds no answer", "Write off, or leave it out.")
