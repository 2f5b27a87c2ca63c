"""authorize: a seller consents at the simulator, the browser comes back, and a file keeps the refresh token."""

import asyncio
import os
import pty
import re
import signal
import stat
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.amazon.consent import (
    SELLER_CENTRALS,
    NotAuthorised,
    WrongState,
    consent_url,
    parse_redirect,
    seller_central_of,
)
from proxy.amazon.marketplaces import MARKETPLACES
from proxy.cli.consent_redirect import MAX_VISITS, wait_for_redirect
from proxy.cli.secret_file import CannotStore, ensure_writable, write_secret
from proxy.config import Secret, load_config
from proxy.simulator import Fault, Settings, Simulator
from proxy.simulator.consent_page import CODE_LIFETIME, SELLING_PARTNER
from proxy.simulator.state import DEMO_APPLICATION, DEMO_CLIENT, DEMO_SECRET
from tests.support.clock import FakeClock
from tests.support.paths import ROOT
from tests.support.proxy_process import _environment, command
from tests.support.terminal import shown_at

TIMEOUT = 30.0  # seconds
STATE = "state-of-this-request"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def simulator(clock: FakeClock) -> AsyncIterator[Simulator]:
    async with Simulator(Settings(), now=clock) as running:
        yield running


def write(simulator: Simulator, folder: Path, **changed: Any) -> Path:
    """Write a configuration whose account names a file that is not there yet."""
    path = folder / "authorize.yaml"
    path.touch(mode=0o600)
    content = {
        "applications": {"main": {"client_id": DEMO_CLIENT, "client_secret": DEMO_SECRET}},
        "accounts": {"acme": {"refresh_tokens": {"eu": {"file": str(folder / "acme_eu")}}}},
        "endpoints": {name: simulator.endpoints[name] for name in ("na", "eu", "fe", "lwa")},
        **changed,
    }
    path.write_text(yaml.safe_dump(content))
    return path


@dataclass
class Conversation:
    """The command, while it is talked to."""

    process: asyncio.subprocess.Process
    heard: str = ""

    async def until(self, pattern: str) -> str:
        """Read on until something is printed; return its first group."""
        assert self.process.stdout is not None
        async with asyncio.timeout(TIMEOUT):
            while not (found := re.search(pattern, self.heard)):
                data = await self.process.stdout.read(4096)
                assert data, f"it ended after {self.heard}"
                self.heard += data.decode()
        return found[1]

    async def ended(self, line: str | None = None) -> tuple[int, str, str]:
        """Write a line, where there is one, and return the exit code and what was printed and complained."""
        printed, complained = await asyncio.wait_for(
            self.process.communicate(f"{line}\n".encode() if line is not None else None), TIMEOUT
        )
        assert self.process.returncode is not None
        self.heard += printed.decode()
        return self.process.returncode, self.heard, (complained or b"").decode()


async def begun(simulator: Simulator, folder: Path, *flags: str) -> Conversation:
    """Start the command with what it always needs."""
    given = ["--config", str(write(simulator, folder)), "--output", str(folder / "acme_eu"), "--marketplace", "DE"]
    given += ["--application-id", DEMO_APPLICATION, "--central", _base(simulator), "--draft", *flags]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "authorize", *given),
        cwd=ROOT,
        env=_environment(None),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    return Conversation(process)


def _base(simulator: Simulator) -> str:
    return simulator.endpoints["eu"]


async def consented(url: str, button: str = "confirm") -> str:
    """Open the consent page, press a button, and return the address that the browser is led to."""
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as response:
            page = await response.text()
            assert response.status == 200, page
        link = re.search(f'id="{button}" href="([^"]+)"', page)
        assert link
        parts = urlsplit(url)
        async with session.get(f"http://{parts.netloc}{unescape(link[1])}", allow_redirects=False) as response:
            assert response.status == 302
            return response.headers["Location"]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


CONSENT_PAGE = r"(http://127\S+/apps/authorize/consent\S+)\s"


async def test_a_pasted_address_becomes_a_file_that_the_configuration_can_name(
    simulator: Simulator, tmp_path: Path
) -> None:
    talk = await begun(simulator, tmp_path, "--account", "acme", "--selling-partner", SELLING_PARTNER)
    url = await talk.until(CONSENT_PAGE)
    asked = parse_qs(urlsplit(url).query)
    assert (asked["application_id"], asked["version"]) == ([DEMO_APPLICATION], ["beta"])
    assert len(asked["state"][0]) >= 43
    led_to = await consented(url)
    assert led_to.startswith("https://app.example/redirect?")
    code, printed, complained = await talk.ended(led_to)
    assert (code, complained) == (0, "The address that it led to: ")
    kept = tmp_path / "acme_eu"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    refresh_token = kept.read_text().strip()
    assert refresh_token.startswith("Atzr|")
    for secret in (refresh_token, DEMO_SECRET, parse_qs(urlsplit(led_to).query)["spapi_oauth_code"][0]):
        assert secret not in printed + complained
    # What is printed is what the configuration needs, and it works.
    lines = printed.partition("In the configuration:\n")[2].partition("\nThen see")[0]
    accounts = yaml.safe_load(lines)
    path = write(simulator, tmp_path, **accounts)
    account = load_config(str(path), {}).config.accounts["acme"]
    assert account.refresh_tokens["eu"].reveal() == refresh_token
    code, printed, _ = await command("check", "--live", "--account", "acme", "--config", str(path))
    assert (code, "It works." in printed) == (0, True)
    assert names_in(tmp_path) == {"acme_eu", "authorize.yaml"}, "nothing else is left"


async def test_the_browser_may_return_to_this_machine_once(simulator: Simulator, tmp_path: Path) -> None:
    talk = await begun(simulator, tmp_path, "--port", "0")
    url = await talk.until(CONSENT_PAGE)
    port = await talk.until(r"Waiting on http://127\.0\.0\.1:(\d+) ")
    here = f"http://127.0.0.1:{port}/amazon"
    led_to = urlsplit(await consented(url))
    async with aiohttp.ClientSession() as session:

        async def visited(query: str, method: str = "GET", **headers: str) -> int:
            async with session.request(method, f"{here}?{query}", headers=headers) as response:
                text = await response.text()
                policy = response.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'none'")
                assert (response.headers["Referrer-Policy"], response.headers["Cache-Control"]) == (
                    *("no-referrer", "no-store"),
                )
                for told in parse_qs(led_to.query).values():
                    assert told[0] not in text, "the page holds nothing of its address"
                return response.status

        assert await visited("state=guessed&spapi_oauth_code=theirs") == 403
        assert await visited(led_to.query, Host="rebound.example") == 421
        assert await visited(led_to.query, "POST") == 405
        assert await visited("") == 403
        for query in ("amazon_callback_uri=https://evil.example/", "x&" * 100, "x" * 8000):  # by any web page
            assert await visited(query) == 403
        assert not (tmp_path / "acme_eu").exists()
        assert await visited(led_to.query) == 200
    code, _, complained = await talk.ended()
    assert (code, complained) == (0, "")
    assert (tmp_path / "acme_eu").read_text().startswith("Atzr|")


async def test_the_registered_redirect_address_goes_along_to_the_exchange(simulator: Simulator, tmp_path: Path) -> None:
    talk = await begun(simulator, tmp_path, "--redirect-uri", "https://app.example/redirect")
    code, _, _ = await talk.ended(await consented(await talk.until(CONSENT_PAGE)))
    assert code == 0
    (context,) = [entry for entry in simulator.journal if entry.service == "lwa"]
    fields = {name: values[0] for name, values in parse_qs(context.body.decode()).items()}
    assert fields["grant_type"] == "authorization_code"
    assert fields["redirect_uri"] == "https://app.example/redirect"
    assert fields["client_id"] == DEMO_CLIENT


async def test_nothing_pasted_is_said(simulator: Simulator, tmp_path: Path) -> None:
    code, _, complained = await (await begun(simulator, tmp_path)).ended("")
    assert (code, "nothing was pasted" in complained) == (1, True)


async def test_a_seller_who_does_not_consent_is_said(simulator: Simulator, tmp_path: Path) -> None:
    talk = await begun(simulator, tmp_path)
    code, _, complained = await talk.ended(await consented(await talk.until(CONSENT_PAGE), "cancel"))
    assert code == 1
    assert "did not consent (access_denied)" in complained
    assert not (tmp_path / "acme_eu").exists()


async def test_a_response_to_another_request_is_refused(simulator: Simulator, tmp_path: Path) -> None:
    talk = await begun(simulator, tmp_path)
    url = await talk.until(CONSENT_PAGE)
    foreign = await consented(url.replace(parse_qs(urlsplit(url).query)["state"][0], "another"))
    code, _, complained = await talk.ended(foreign)
    assert (code, "state is not the one" in complained) == (1, True)
    assert not [entry for entry in simulator.journal if entry.service == "lwa"], "nothing was exchanged"


async def test_another_seller_than_expected_is_refused(simulator: Simulator, tmp_path: Path) -> None:
    talk = await begun(simulator, tmp_path, "--selling-partner", "A2SOMEBODYELSE")
    code, _, complained = await talk.ended(await consented(await talk.until(CONSENT_PAGE)))
    assert (code, "somebody else consented" in complained) == (1, True)
    assert SELLING_PARTNER not in complained
    assert not (tmp_path / "acme_eu").exists()


async def test_a_code_that_is_too_old_or_was_used_is_said(
    simulator: Simulator, clock: FakeClock, tmp_path: Path
) -> None:
    talk = await begun(simulator, tmp_path)
    led_to = await consented(await talk.until(CONSENT_PAGE))
    clock.advance(CODE_LIFETIME)
    code, _, complained = await talk.ended(led_to)
    assert code == 1
    assert "invalid_grant. The code is more than five minutes old" in complained


async def test_faults_of_login_with_amazon_are_tried_again_and_then_said(simulator: Simulator, tmp_path: Path) -> None:
    simulator.state.faults.append(Fault("status", service="lwa", status=503, times=2))
    talk = await begun(simulator, tmp_path)
    assert (await talk.ended(await consented(await talk.until(CONSENT_PAGE))))[0] == 0
    simulator.state.faults.append(Fault("reset", service="lwa"))
    talk = await begun(simulator, tmp_path, "--force")
    code, _, complained = await talk.ended(await consented(await talk.until(CONSENT_PAGE)))
    assert (code, "did not answer properly (no connection)" in complained) == (1, True)
    assert "Traceback" not in complained
    assert (tmp_path / "acme_eu").exists(), "the file before it stays"


async def test_a_wrong_secret_is_said(simulator: Simulator, tmp_path: Path) -> None:
    simulator.state.clients[DEMO_CLIENT] = {"brand-new-secret"}
    talk = await begun(simulator, tmp_path)
    code, _, complained = await talk.ended(await consented(await talk.until(CONSENT_PAGE)))
    assert (code, "invalid_client. The client id or secret is wrong" in complained) == (1, True)


async def test_the_token_of_a_private_application_is_tried_before_it_is_kept(
    simulator: Simulator, tmp_path: Path
) -> None:
    talk = await begun(simulator, tmp_path, "--self-authorized")
    code, printed, complained = await talk.ended("Atzr|demo-eu")
    assert (code, complained) == (0, "The refresh token that Amazon shows: ")
    assert (tmp_path / "acme_eu").read_text() == "Atzr|demo-eu\n"
    assert "Atzr" not in printed
    for text in ("", "Atza|an-access-token"):
        talk = await begun(simulator, tmp_path, "--self-authorized", "--force")
        code, _, complained = await talk.ended(text)
        assert (code, "one begins with Atzr|" in complained) == (1, True)
    talk = await begun(simulator, tmp_path, "--self-authorized", "--force")
    code, _, complained = await talk.ended("Atzr|half")
    assert (code, "It is not whole, was revoked" in complained) == (1, True)
    assert "half" not in complained
    assert (tmp_path / "acme_eu").read_text() == "Atzr|demo-eu\n"


async def test_nobody_is_waited_for_without_end(simulator: Simulator, tmp_path: Path) -> None:
    for flags in (["--timeout", "50ms"], ["--timeout", "50ms", "--port", "0"]):
        talk = await begun(simulator, tmp_path, *flags)
        assert talk.process.stderr is not None
        complained = (await asyncio.wait_for(talk.process.stderr.read(), TIMEOUT)).decode()
        assert "nothing came within 50ms" in complained
        assert await asyncio.wait_for(talk.process.wait(), TIMEOUT) == 1


@pytest.mark.parametrize(("flags", "waits"), [([], r"(Paste it here)"), (["--port", "0"], r"(Otherwise: --paste)")])
async def test_ctrl_c_ends_it_plainly(simulator: Simulator, tmp_path: Path, flags: list[str], waits: str) -> None:
    talk = await begun(simulator, tmp_path, *flags)
    await talk.until(waits)
    talk.process.send_signal(signal.SIGINT)
    assert talk.process.stderr is not None
    complained = (await asyncio.wait_for(talk.process.stderr.read(), TIMEOUT)).decode()
    assert await asyncio.wait_for(talk.process.wait(), TIMEOUT) == 130
    assert complained.endswith("sp-api-proxy: interrupted\n")
    assert "Traceback" not in complained


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--application", "other"], "applications: main"),
        (["--marketplace", "XX"], "--marketplace must be one of CA, US"),
        (["--application-id", ""], "--application-id is needed"),
        (["--application-id", "amzn1.application-oa2-client.x"], "--application-id is the client id"),
        (["--redirect-uri", "http://app.example/"], "--redirect-uri must be an https address"),
        (["--central", "http://evil.example"], "--central must be an https address"),
        (["--port", "70000"], "--port must be a port"),
        (["--account", "a: b"], "--account must be a name"),
        (["--timeout", "soon"], "--timeout must be a duration"),
        (["--output", "/nonexistent/folder/file"], "there is no such folder"),
        (["--output", "/tmp"], "is a folder"),
        (["--output", "/etc/hostname"], "is there already; --force replaces it"),
        (["--open", "--no-browser"], "not allowed with argument"),
    ],
)
async def test_wrong_use_is_said_before_anybody_consents(
    simulator: Simulator, tmp_path: Path, flags: list[str], words: str
) -> None:
    talk = await begun(simulator, tmp_path, *flags)
    code, printed, complained = await talk.ended()
    assert (code, printed) == (2, "")
    assert words in complained
    assert "Traceback" not in complained


async def test_a_port_that_is_taken_is_said(simulator: Simulator, tmp_path: Path) -> None:
    taken = str(urlsplit(_base(simulator)).port)
    code, _, complained = await (await begun(simulator, tmp_path, "--port", taken)).ended()
    assert (code, f"cannot listen on 127.0.0.1:{taken}" in complained) == (1, True)


async def test_a_browser_that_is_opened_gets_the_address_and_no_secret(tmp_path: Path) -> None:
    browser, told = tmp_path / "browser", tmp_path / "told"
    browser.write_text(f'#!/bin/sh\nenv > "{told}"\necho "address=$1" >> "{told}"\n')
    browser.chmod(0o700)
    environment = {"BROWSER": str(browser), "LWA_CLIENT_SECRET": "distinctive-secret", "LWA_APP_ID": "client"}
    flags = ["--output", str(tmp_path / "new"), "--marketplace", "jp", "--application-id", "amzn1.sp.solution.x"]
    code, printed, _ = await command(
        "authorize", "--open", "--vendor", "--timeout", "1s", *flags, environment=environment
    )
    assert code == 1, "nobody pasted anything"
    text = told.read_text()
    assert (
        "address=https://vendorcentral.amazon.co.jp/apps/authorize/consent?application_id=amzn1.sp.solution.x" in text
    )
    assert "version=beta" not in text
    assert "distinctive-secret" not in text
    assert "https://vendorcentral.amazon.co.jp/" in printed


async def test_a_terminal_does_not_show_what_is_pasted_and_asks_again(simulator: Simulator, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    flags = ["--config", str(write(simulator, tmp_path)), "--output", str(tmp_path / "acme_eu"), "--marketplace", "GB"]
    flags += ["--application-id", DEMO_APPLICATION, "--central", _base(simulator), "--draft", "--no-browser"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "authorize", *flags),
        cwd=ROOT,
        env=_environment(None),
        stdin=theirs,
        stdout=asyncio.subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    talk = Conversation(process)
    led_to = await consented(await talk.until(CONSENT_PAGE))
    prompt = b"The address that it led to: "
    async with shown_at(os.dup(ours)) as terminal:
        said = await asyncio.wait_for(terminal.readuntil(prompt), TIMEOUT)
        os.write(ours, b"https://app.example/redirect?state=wrong\n")
        said += await asyncio.wait_for(terminal.readuntil(prompt), TIMEOUT)
        os.write(ours, f"{led_to}\n".encode())
        code, _, _ = await talk.ended()
    os.close(ours)
    assert code == 0
    assert b"That is not it: its state is not the one that was sent" in said
    assert b"app.example" not in said


async def test_a_listener_that_only_strangers_visit_gives_up() -> None:
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(wait_for_redirect(STATE, 0, port.set_result))
    async with aiohttp.ClientSession() as session:
        for _ in range(MAX_VISITS + 1):
            async with session.get(f"http://localhost:{await port}/?state=guessed") as response:
                assert response.status in {403, 410}
    with pytest.raises(NotAuthorised, match="none was an answer"):
        await asyncio.wait_for(waiting, TIMEOUT)


# What Amazon's addresses say.


def test_every_marketplace_has_a_seller_central_and_a_vendor_central() -> None:
    assert sorted(central.region for central in SELLER_CENTRALS.values()) == sorted(MARKETPLACES.values())
    for central in SELLER_CENTRALS.values():
        assert central.seller.startswith("sellercentral")
        assert "vendorcentral." in central.vendor
    assert seller_central_of("gb") is seller_central_of("UK") is SELLER_CENTRALS["UK"]
    assert seller_central_of("XX") is None


def test_the_consent_address_is_amazons() -> None:
    """DOC "Website Authorization Workflow"."""
    url = consent_url("https://sellercentral.amazon.com", "appidexample", "stateexample", None, is_draft=True)
    assert url == (
        "https://sellercentral.amazon.com/apps/authorize/consent"
        "?application_id=appidexample&state=stateexample&version=beta"
    )
    url = consent_url("https://sellercentral.amazon.com", "a&b", "s", "https://x.example/?y=1", is_draft=False)
    assert parse_qs(urlsplit(url).query) == {
        "application_id": ["a&b"],
        "state": ["s"],
        "redirect_uri": ["https://x.example/?y=1"],
    }


def test_a_consent_is_read_from_the_address() -> None:
    consent = parse_redirect(
        f" https://client-example.com?state={STATE}&selling_partner_id=A1B&spapi_oauth_code=Sx.y ", STATE
    )
    assert (consent.code.reveal(), consent.selling_partner) == ("Sx.y", "A1B")
    assert "Sx" not in repr(consent)


@pytest.mark.parametrize(
    ("query", "kind", "words"),
    [
        ("", WrongState, "state"),
        ("spapi_oauth_code=x", WrongState, "state"),
        ("state=&spapi_oauth_code=x", WrongState, "state"),
        (f"state={STATE}x&spapi_oauth_code=x", WrongState, "state"),
        (f"state={STATE}&state={STATE}&spapi_oauth_code=x", WrongState, "state"),
        ("state=other&error=access_denied", WrongState, "state"),
        (f"state={STATE}", NotAuthorised, "no spapi_oauth_code"),
        (f"state={STATE}&spapi_oauth_code=", NotAuthorised, "no spapi_oauth_code"),
        (f"state={STATE}&spapi_oauth_code=a&spapi_oauth_code=b", NotAuthorised, "no spapi_oauth_code"),
        (f"state={STATE}&spapi_oauth_code=a%0ab", NotAuthorised, "no spapi_oauth_code"),
        (f"state={STATE}&error=access_denied&spapi_oauth_code=x", NotAuthorised, "did not consent"),
        (f"state={STATE}&error=server_error", NotAuthorised, "server_error"),
        (f"state={STATE}&error=%1b[31mdistinctive", NotAuthorised, "Amazon returned an error"),
        ("amazon_callback_uri=https://amazon.com/x&amazon_state=y", WrongState, "Login URI"),
        ("x" * 9000, WrongState, "too long"),
        ("x&" * 100, WrongState, "not a URL"),
        ("é", WrongState, "not a URL"),
    ],
)
def test_what_is_no_consent_is_refused_with_a_reason(query: str, kind: type[NotAuthorised], words: str) -> None:
    with pytest.raises(NotAuthorised, match=words) as refused:
        parse_redirect(f"https://app.example/redirect?{query}", STATE)
    assert type(refused.value) is kind
    assert "distinctive" not in str(refused.value)


@given(st.text(max_size=200))
def test_any_text_is_a_refusal_and_nothing_worse(text: str) -> None:
    with pytest.raises(NotAuthorised):
        parse_redirect(text, STATE)


# The file.


def test_a_secret_file_is_written_whole_and_replaces_nothing_unasked(tmp_path: Path) -> None:
    path = tmp_path / "token"
    write_secret(path, Secret("first"), replace=False)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("first\n", 0o600)
    with pytest.raises(CannotStore, match="is there already"):
        write_secret(path, Secret("second"), replace=False)
    assert path.read_text() == "first\n"
    path.chmod(0o644)
    write_secret(path, Secret("second"), replace=True)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("second\n", 0o600)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    with pytest.raises(CannotStore, match="is there already"):
        ensure_writable(link, replace=False)
    with pytest.raises(CannotStore, match="is there already"):
        write_secret(link, Secret("secret"), replace=False)
    write_secret(link, Secret("secret"), replace=True)
    assert (target.read_text(), link.is_symlink()) == ("before", False)


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(CannotStore, match="No such file or directory"):
        write_secret(tmp_path / "missing" / "token", Secret("secret"), replace=False)
