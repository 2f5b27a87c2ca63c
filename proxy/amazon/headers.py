"""The headers that Amazon requires on every request: access token, date and user agent."""

import platform
import re
import time
from functools import lru_cache

from proxy.config import Application, Secret

MAX_USER_AGENT = 500  # characters (DOC "Include a User-Agent Header in All Requests")

ACCESS_TOKEN = "x-amz-access-token"  # noqa: S105 - a header's name
DATE = "x-amz-date"
USER_AGENT = "user-agent"


def _escaped(text: str, characters: str) -> str:
    return re.sub(f"([{re.escape(characters)}])", r"\\\1", text)


def user_agent(name: str, version: str, language: str | None = None, system: str | None = None) -> str:
    """Return `Name/Version (Language=…; Platform=…)`, escaped (DOC "Include a User-Agent Header in All Requests").

    Backslashes are escaped everywhere, `/` in the name, `(` in the version, `)` and `;` in values. Raises ValueError
    if it is longer than Amazon accepts or has characters that a header may not contain.
    """
    language = language or f"Python/{platform.python_version()}"
    system = system or f"{platform.system()}/{platform.release()}"[:40]
    text = (
        f"{_escaped(name, chr(92) + '/')}/{_escaped(version, chr(92) + '(')} "
        f"(Language={_escaped(language, chr(92) + ');')}; Platform={_escaped(system, chr(92) + ');')})"
    )
    if len(text) > MAX_USER_AGENT:
        raise ValueError(f"is {len(text)} characters long; Amazon accepts {MAX_USER_AGENT}")
    if not text.isascii() or not text.isprintable():
        raise ValueError("must hold printable ASCII characters only")
    return text


def user_agent_of(application: Application) -> str:
    """Return the `user-agent` of an application."""
    settings = application.user_agent
    return user_agent(settings.name, settings.version, settings.language, settings.platform)


def amz_date(epoch: float) -> str:
    """Return `x-amz-date` for Unix time in seconds: UTC as `YYYYMMDDTHHMMSSZ` (SEED)."""
    return _date_of(int(epoch))


@lru_cache(maxsize=2)
def _date_of(second: int) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))


def credential_headers(token: Secret, agent: str, epoch: float) -> dict[str, str]:
    """Return the headers that Amazon requires on every request."""
    return {ACCESS_TOKEN: token.reveal(), DATE: amz_date(epoch), USER_AGENT: agent}
