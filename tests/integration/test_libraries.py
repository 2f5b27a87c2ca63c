"""Libraries that apps bring along, unmodified, through a real proxy to a real simulator, each in a program of its own.

The programs are in `tests/integration/libraries/`: each makes the same calls, and differs from one that calls Amazon
in its addresses alone. `make test` installs what they need: `.venv-libraries` from `requirements-libraries.lock`, and
`tests/integration/libraries/node_modules` from its package-lock.json.
"""

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.conftest import needs
from tests.support.paths import ROOT
from tests.support.proxy_process import ProxyProcess, serving

PROGRAMS = ROOT / "tests" / "integration" / "libraries"
PYTHON = ROOT / ".venv-libraries" / "bin" / "python"
TIMEOUT = 120.0  # seconds

GOT = {
    "orders": ["902-0000000-0000000", "902-0000000-0000001"],
    "pages": 3,
    "destinations": 1,
    "city": "Köln",
    "buyer_by_token": "simulated@marketplace.example",
    "address_by_token": False,
    "buyer_by_setting": "simulated@marketplace.example",
    "feed": "1",
    "forbidden": [403, "Unauthorized"],
    "throttled": [429, "QuotaExceeded"],
    "elsewhere": "US",  # where a library can name another region
}
ERRORS = {"forbidden": 403, "throttled": 429}


@asynccontextmanager
async def simulating() -> AsyncIterator[dict[str, str]]:
    """Run a simulator that refuses and throttles one order each; yield its addresses."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "simulate", "--port", "0", "--json"), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        addresses: dict[str, str] = json.loads(await asyncio.wait_for(process.stdout.readline(), TIMEOUT))
        for name, status in ERRORS.items():
            error = {"code": GOT[name][1], "message": "made up", "details": ""}  # type: ignore[index] # a list
            fault = {"kind": "answer", "path": f"/orders/v0/orders/{name}", "status": status}
            fault |= {"headers": {"content-type": "application/json"}, "body": json.dumps({"errors": [error]})}
            await control(addresses, "/faults", fault)
        yield addresses
    finally:
        process.terminate()
        await process.wait()


async def control(addresses: dict[str, str], path: str, order: dict[str, Any] | None = None) -> Any:
    """Ask the simulator, or order something of it."""
    body = json.dumps(order).encode() if order is not None else None
    request = Request(addresses["control"] + path, body)
    return json.loads(await asyncio.to_thread(lambda: urlopen(request, timeout=TIMEOUT).read()))


def settings(simulator: dict[str, str]) -> dict[str, Any]:
    """Return the settings of a proxy with a listener for each account, and one for the path to say."""
    client = {"client_id": "amzn1.application-oa2-client.simulator", "client_secret": "amzn1.oa2-cs.v1.simulator"}
    tokens = {region: f"Atzr|demo-{region}" for region in ("na", "eu", "fe")}  # each call must say which
    return {
        "listen": [
            {"address": "127.0.0.1:0", "account": "demo"},
            {"address": "127.0.0.1:0", "account": "private"},
            "127.0.0.1:0",
        ],
        "admin": "127.0.0.1:0",
        "applications": {"main": client},
        "accounts": {
            "demo": {"refresh_tokens": dict(tokens)},
            "private": {"refresh_tokens": dict(tokens), "data_elements": ["buyerInfo", "shippingAddress"]},
        },
        "endpoints": {name: simulator[name] for name in ("na", "eu", "fe", "lwa")},
        "local_rdt": True,
        "limits": {"max_wait": "0s"},
    }


async def result_of(command: tuple[str | Path, ...], proxy: ProxyProcess) -> dict[str, Any]:
    """Run a program to its end and return what it printed."""
    named = zip(("PLAIN", "PRIVATE", "OPEN"), proxy.addresses, strict=True)
    environment = {name: f"http://{address}" for name, address in named}
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**kept, **environment, "PYTHONIOENCODING": "utf-8"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, complained = await asyncio.wait_for(process.communicate(), TIMEOUT)
    assert process.returncode == 0, complained.decode()
    found: dict[str, Any] = json.loads(printed)
    return found


def command_of(program: str) -> tuple[str | Path, ...]:
    """Return how a program is run; skip where what it needs is missing."""
    path = PROGRAMS / program
    if program == "with_curl.py":
        needs(shutil.which("curl") is not None, "curl")
        return sys.executable, path
    if path.suffix == ".py":
        needs((PYTHON.parents[1] / ".installed").exists(), "a library for Python (make libraries)")
        return PYTHON, path
    node = shutil.which("node")
    needs(node is not None, "Node")
    has_libraries = (PROGRAMS / "node_modules" / ".installed").exists()
    needs(program == "with_fetch.mjs" or has_libraries, "a library for Node (make libraries)")
    return node or "node", path


@pytest.mark.timeout(3 * TIMEOUT)
@pytest.mark.parametrize("program", sorted(path.name for path in PROGRAMS.glob("with_*")))
async def test_a_library_gets_by_the_proxy_what_it_got_from_amazon(program: str, tmp_path: Path) -> None:
    command = command_of(program)
    async with simulating() as simulator, serving(settings(simulator), tmp_path) as proxy:
        found = await result_of(command, proxy)
        # The simulator makes up a new name each time; python-amazon-sp-api does not show it.
        assert found.pop("document", "amzn1.tortuga.4.eu.").startswith("amzn1.tortuga.4.eu.")
        assert GOT | found == GOT
        journal = await control(simulator, "/journal")
    brought = [(entry["method"], entry["target"].partition("?")[0], entry["token_kind"]) for entry in journal]
    assert {
        ("GET", "/orders/v0/orders", "lwa"),
        ("GET", "/orders/v0/orders", "rdt"),
        ("GET", "/orders/v0/orders/902-1/address", "rdt"),
        ("GET", "/notifications/v1/destinations", "grantless"),
        ("POST", "/feeds/2021-06-30/feeds", "lwa"),
    } <= set(brought)
    # What the app brought went nowhere, and neither did any of its signatures.
    assert "the-apps-old" not in json.dumps(journal)
    assert "the-apps-old" not in "".join(proxy.log)
    headers = {name.lower() for entry in journal if entry["service"] == "eu" for name, _ in entry["headers"]}
    assert not headers & {"authorization", "x-amz-security-token", "x-amz-content-sha256"}
    # The app asked the proxy for its tokens, and Amazon was asked by the proxy alone.
    minted = [json.loads(entry["body"]) for entry in journal if entry["target"].startswith("/tokens/")]
    assert all(len(asked["restrictedResources"]) == 1 for asked in minted)
    own = [line for line in proxy.lines() if line.get("operation") == "tokens.2021-03-01.createRestrictedDataToken"]
    assert [line["attempts"] for line in own] == [0]


def test_the_document_names_every_program_and_the_version_of_every_library() -> None:
    document = (ROOT / "docs" / "moving.md").read_text(encoding="utf-8")
    programs = {path.name for path in PROGRAMS.glob("with_*")}
    assert set(re.findall(r"`tests/integration/libraries/(with_[\w.]+)`", document)) == programs
    lock = (ROOT / "requirements-libraries.lock").read_text(encoding="utf-8")
    pinned = re.findall(r"^(?:amzn-sp-api|python-amazon-sp-api)==(\S+)", lock, re.MULTILINE)
    pinned += json.loads((PROGRAMS / "package.json").read_text())["dependencies"].values()
    assert sorted(re.findall(r"version\s+(\d+\.\d+\.\d+)", document)) == sorted(pinned)
    assert len(pinned) == 4
