"""`authorize`: get a refresh token by a selling partner's consent at Amazon, and keep it in a file.

Amazon redirects the browser to the https address that the application is registered with. The user pastes that address
here, or the page redirects the browser on to a listener on this machine.
"""

import argparse
import asyncio
import json
import os
import re
import secrets
import shlex
import sys
import webbrowser
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from proxy.amazon import lwa
from proxy.amazon.consent import SELLER_CENTRALS, Consent, NotAuthorised, SellerCentral, consent_url, seller_central_of
from proxy.cli.common import FAILED, OK, USAGE, Command
from proxy.cli.configuration import config_path, reports_config_errors
from proxy.cli.consent_redirect import read_line, read_pasted_redirect, wait_for_redirect
from proxy.cli.options import add_config_flags, settings_of
from proxy.cli.runner import run
from proxy.cli.secret_file import CannotStore, ensure_writable, write_secret
from proxy.config import (
    Application,
    Config,
    ConfigError,
    Problem,
    Region,
    Secret,
    applications_config,
    is_loopback,
    parse_duration,
)
from proxy.config.types import NAME
from proxy.request.upstream.http1 import RemoteProtocolError
from proxy.request.upstream.pool import lwa_pool
from proxy.server import hardening

# A code is valid once (RFC 6749 section 4.1.2): where only the response was lost, the next try gets invalid_grant.
TRIES = 3  # of an exchange, within timeouts.token
RETRY_PAUSE = 0.5  # seconds between two of them

T = TypeVar("T")

_REMEDIES = {
    "invalid_grant": "The code is more than five minutes old, was used before, or was made for another application: "
    "begin again. Where that does not help, give the --redirect-uri that the application is registered with.",
    "invalid_client": "The client id or secret is wrong, or the secret is past its rotation: replace it.",
    "unauthorized_client": "The consent was for another application: check --application-id and --application.",
}
_TOKEN_REMEDIES = {
    **_REMEDIES,
    "invalid_grant": "It is not whole, was revoked, or belongs to another application.",
    "unauthorized_client": "It belongs to another application: check --application.",
}


class RunAsync(Protocol):
    """Runs a coroutine and returns its result."""

    def __call__(self, work: Coroutine[Any, Any, T], /) -> T:
        """Return the result of `work`."""


class AuthorizationFailed(Exception):
    """There is no refresh token; the message says why and what to do."""


class UsageError(Exception):
    """A flag is missing; the message says which."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `authorize` except those of the configuration."""
    what = parser.add_argument_group("whose consent")
    what.add_argument(
        "--application-id",
        metavar="ID",
        help="the application's own id at Amazon, such as amzn1.sp.solution.x: it stands in Amazon's list of "
        "applications, and is not the client id",
    )
    what.add_argument("--application", metavar="NAME", help="its name in the configuration, where there are several")
    what.add_argument(
        "--marketplace",
        metavar="COUNTRY",
        required=True,
        help="where the selling partner has the account; the authorisation is for its region: "
        + ", ".join(SELLER_CENTRALS),
    )
    what.add_argument("--vendor", action="store_true", help="a vendor consents, at Vendor Central")
    what.add_argument(
        "--draft", action="store_true", help="the application is a draft, not published (adds version=beta)"
    )
    what.add_argument(
        "--selling-partner", metavar="ID", help="store nothing where somebody else than this selling partner consents"
    )
    what.add_argument(
        "--self-authorized",
        action="store_true",
        help="a private application: Amazon shows the refresh token itself (Develop Apps, Authorize app); paste that",
    )
    back = parser.add_argument_group(
        "the way back",
        "Amazon leads the browser to an https address that the application is registered with. --paste works with "
        "every one, whatever it shows. --port works where that address sends the browser on to this machine, query "
        "and all.",
    )
    one = back.add_mutually_exclusive_group()
    one.add_argument("--paste", action="store_true", help="ask for the address that the browser was led to (default)")
    one.add_argument(
        "--port", type=int, metavar="PORT", help="wait for the browser on 127.0.0.1 instead; 0 takes a free port"
    )
    back.add_argument(
        "--redirect-uri", metavar="URL", help="which of the registered addresses; left out, it is the first of them"
    )
    back.add_argument("--timeout", metavar="TIME", default="10m", help="how long to wait for the consent (10m)")
    show = back.add_mutually_exclusive_group()
    show.add_argument("--open", action="store_true", help="open the consent page in a browser")
    show.add_argument(
        "--no-browser", action="store_true", help="print its address only; otherwise a desktop's terminal opens it too"
    )
    back.add_argument("--central", metavar="URL", help="another Seller Central than Amazon's, for tests")
    kept = parser.add_argument_group("where the refresh token goes")
    kept.add_argument(
        "--output", metavar="FILE", type=Path, required=True, help="a new file, of mode 0600, in a folder that is there"
    )
    kept.add_argument("--force", action="store_true", help="replace the file")
    kept.add_argument(
        "--account", metavar="NAME", default="my-account", help="the account's name, for the lines that are printed"
    )


def authorize(options: argparse.Namespace, config: Config, *, has_screen: bool, run: RunAsync) -> int:
    """Guide the user through the consent and return the exit code. `has_screen`: a browser can be opened."""
    try:
        name, central, timeout = _checked(options, config)
        # Before the consent: a code lives five minutes, so that an unwritable file must not be found out afterwards.
        ensure_writable(options.output, replace=options.force)
    except (UsageError, CannotStore) as exc:
        _print_err(str(exc))
        return USAGE
    try:
        if options.self_authorized:
            refresh_token = prompt_for_token(timeout)
            # Tested before it is stored: it was copied by hand and may be incomplete.
            run(check_refresh_token(config, config.applications[name], refresh_token))
        else:
            consent = _consent(options, central, timeout, has_screen=has_screen, run=run)
            verify_selling_partner(consent, options.selling_partner)
            work = refresh_token_of(config, config.applications[name], consent, options.redirect_uri)
            refresh_token = run(work)
        write_secret(options.output, refresh_token, replace=options.force)
    except (AuthorizationFailed, NotAuthorised, CannotStore) as exc:
        _print_err(str(exc))
        return FAILED
    except TimeoutError:
        _print_err(f"nothing came within {options.timeout}: begin again, or give it longer (--timeout)")
        return FAILED
    _print_out(f"The refresh token is in {options.output}, which nobody else can read. In the configuration:\n")
    _print_out(config_snippet(options.account, name, central.region, options.output))
    with_file = f" --config {shlex.quote(options.config)}" if options.config else ""
    _print_out(f"\nThen see whether it works: sp-api-proxy check --live --account {options.account}{with_file}")
    return OK


def _checked(options: argparse.Namespace, config: Config) -> tuple[str, SellerCentral, float]:
    """Return the application's name, the marketplace, and how long to wait in seconds; raise UsageError."""
    names = list(config.applications)
    name = options.application or (names[0] if len(names) == 1 else "")
    if name not in config.applications:
        there = ", ".join(names) or "none"
        raise UsageError(f"--application must be one of the configuration's applications: {there}")
    central = seller_central_of(options.marketplace)
    if central is None:
        raise UsageError(f"--marketplace must be one of {', '.join(SELLER_CENTRALS)}")
    if not options.self_authorized and not options.application_id:
        raise UsageError(
            "--application-id is needed, the id of the application at Amazon (such as amzn1.sp.solution.x)"
        )
    # The two ids are easily confused, and Amazon's consent page gets only this one.
    if (options.application_id or "").startswith("amzn1.application-oa2-client."):
        raise UsageError("--application-id is the client id: give the application's own, which is shown beside it")
    for flag, url in (("--redirect-uri", options.redirect_uri), ("--central", options.central)):
        if url is not None and not _is_safe(url):
            raise UsageError(f"{flag} must be an https address (http only to this machine)")
    if not re.fullmatch(NAME, options.account, re.ASCII):
        raise UsageError("--account must be a name of letters, digits, ., _ and -")
    if options.port is not None and not 0 <= options.port <= 65535:
        raise UsageError("--port must be a port: 0 to 65535")
    try:
        return name, central, parse_duration(options.timeout)
    except ValueError:
        raise UsageError("--timeout must be a duration such as 10m") from None


def prompt_for_token(timeout: float) -> Secret:
    """Return the refresh token that the user pastes."""
    text = read_line("The refresh token that Amazon shows: ", timeout)
    if not text.startswith("Atzr|") or not text.isascii() or not text.isprintable():
        raise AuthorizationFailed("that is no refresh token: one begins with Atzr|")
    return Secret(text)


def verify_selling_partner(consent: Consent, expected: str | None) -> None:
    if expected is not None and consent.selling_partner != expected:
        raise AuthorizationFailed("somebody else consented than --selling-partner names: nothing is stored")


def _is_safe(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    if not url.isascii() or not url.isprintable() or " " in url or parts.fragment or parts.username:
        return False
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    )


def _consent(
    options: argparse.Namespace,
    central: SellerCentral,
    timeout: float,
    *,
    has_screen: bool,
    run: RunAsync,
) -> Consent:
    """Ask the user for consent at Amazon and return it.

    Raises NotAuthorised, AuthorizationFailed and TimeoutError.
    """
    # Against CSRF (RFC 6749 section 10.12); 256 bits, where section 10.10 asks for at least 128.
    state = secrets.token_urlsafe(32)
    base = (options.central or f"https://{central.vendor if options.vendor else central.seller}").rstrip("/")
    url = consent_url(base, options.application_id, state, options.redirect_uri, is_draft=options.draft)
    is_opened = options.open or (has_screen and not options.no_browser)

    def send() -> None:
        _print_out("Have the selling partner open this address, sign in, and consent. It is good for one answer.\n")
        _print_out(f"  {url}\n")
        if is_opened and not webbrowser.open(url):
            _print_out("No browser could be opened here: open it yourself.")

    if options.port is None:
        send()
        _print_out("The browser is led to an address of the application's, whatever that shows. Paste it here, whole,")
        _print_out("within five minutes of the consent.")
        # Piped input cannot be corrected: the first wrong line is an error.
        again = sys.stdin.isatty()
        return read_pasted_redirect(state, lambda prompt: read_line(prompt, timeout), again=again)

    def listening(port: int) -> None:
        send()
        _print_out(f"Waiting on http://127.0.0.1:{port} for the browser. Amazon leads it to the https address that the")
        _print_out(
            "application is registered with, which has to send it on to here, query and all. Otherwise: --paste."
        )

    try:
        return run(_with_timeout(timeout, wait_for_redirect(state, options.port, listening)))
    # TimeoutError is a subclass of OSError (PEP 3151): without this clause it would be reported as "cannot listen".
    except TimeoutError:
        raise
    except OSError as exc:
        reason = exc.strerror or "it is not possible"
        raise AuthorizationFailed(f"cannot listen on 127.0.0.1:{options.port}: {reason}") from exc


async def _with_timeout(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    async with asyncio.timeout(seconds):
        return await work


# The exchange.


async def refresh_token_of(
    config: Config,
    application: Application,
    consent: Consent,
    redirect_uri: str | None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Secret:
    """Exchange the authorization code for a refresh token; raise AuthorizationFailed."""
    async with lwa_pool(config) as session:

        def call() -> Awaitable[Secret]:
            # Read again for each try: it may have been rotated since the start.
            secret = application.client_secret.refreshed()
            client = (application.client_id, secret)
            return lwa.authorization_code_grant(session.post, config.endpoints.lwa, *client, consent.code, redirect_uri)

        return await with_retries(call, config.timeouts.token, _REMEDIES, sleep)


async def check_refresh_token(
    config: Config,
    application: Application,
    refresh_token: Secret,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Test a refresh token by getting an access token with it; raise AuthorizationFailed."""
    async with lwa_pool(config) as session:

        def call() -> Awaitable[lwa.TokenResponse]:
            client = (application.client_id, application.client_secret.refreshed())
            return lwa.refresh_token_grant(session.post, config.endpoints.lwa, *client, refresh_token)

        await with_retries(call, config.timeouts.token, _TOKEN_REMEDIES, sleep)


async def with_retries(
    call: Callable[[], Awaitable[T]],
    seconds: float,
    advice: dict[str, str],
    sleep: Callable[[float], Awaitable[None]],
) -> T:
    reason = "timeout"
    try:
        # Outside the loop's own except OSError: asyncio.timeout raises TimeoutError, an OSError, when its block ends.
        async with asyncio.timeout(seconds):
            for attempt in range(TRIES):
                if attempt:
                    await sleep(RETRY_PAUSE)
                try:
                    return await call()
                except lwa.TokenRequestFailed as exc:
                    reason = exc.reason
                except (RemoteProtocolError, OSError) as exc:
                    reason = "timeout" if isinstance(exc, TimeoutError) else "no connection"
    except lwa.OAuthError as exc:
        what_to_do = advice.get(exc.reason, "Check the application's client id and secret.")
        raise AuthorizationFailed(f"Login with Amazon refuses: {exc.reason}. {what_to_do}") from exc
    except TimeoutError:
        pass
    raise AuthorizationFailed(f"Login with Amazon did not answer properly ({reason}): try again, from the beginning")


def config_snippet(account: str, application: str, region: Region, path: Path) -> str:
    """Return the YAML that names the file in the configuration."""
    return "\n".join(
        (
            "accounts:",
            f"  {account}:",
            f"    application: {application}",
            "    refresh_tokens:",
            # A JSON string is a YAML string.
            f"      {region}: {{file: {json.dumps(str(path.absolute()))}}}",
        )
    )


def _print_out(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()  # before a browser opens or a prompt waits


def _print_err(text: str) -> None:
    sys.stderr.write(f"sp-api-proxy: {text}\n")


def _add_all_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    add_config_flags(parser)


@reports_config_errors
def _authorize(options: argparse.Namespace) -> int:
    config = applications_config(config_path(options), os.environ, settings_of(options))
    if not config.applications:
        missing = "is missing: give a client_id and client_secret, or set LWA_APP_ID and LWA_CLIENT_SECRET"
        raise ConfigError([Problem("applications", missing)])
    hardening.harden()
    # webbrowser starts a child process with this process's environment.
    hardening.scrub_environment(os.environ, config)  # so that a browser does not inherit them
    # Without a screen, webbrowser may start a text browser that takes over the terminal.
    is_desktop = sys.platform in {"darwin", "win32"} or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return authorize(options, config, has_screen=is_desktop and sys.stdout.isatty(), run=run)


COMMANDS = {
    "authorize": Command(
        "sp-api-proxy authorize --marketplace DE --application-id amzn1.sp.solution.x --output secrets/acme_eu\n"
        "a private application: sp-api-proxy authorize --self-authorized --marketplace DE --output secrets/acme_eu",
        _add_all_flags,
        _authorize,
    )
}
