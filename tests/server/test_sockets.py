"""Listening sockets: permissions of Unix sockets, shares of the descriptor limit, the parser that is required."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.config import Address, Bounds
from proxy.server.sockets import CannotListen, split_fd_limit
from tests.conftest import StartProxy, settings_for
from tests.support.fake_upstream import FakeUpstream, TokenHost

SELLERS = "/sellers/v1/marketplaceParticipations"


@pytest.mark.parametrize("setting", ["owner", "group"])
async def test_a_socket_for_nobody_that_there_is_is_an_error(
    start_proxy: StartProxy, tmp_path: Path, setting: str
) -> None:
    with pytest.raises(CannotListen, match="no such user or group"):
        await start_proxy(listen={"address": f"unix:{tmp_path}/x.sock", setting: "no-such-name-here"})


@pytest.mark.parametrize(
    ("available", "expected"),
    [(None, (16384, 1000)), (1_000_000, (16384, 1000)), (1024, (662, 330)), (64, (22, 10)), (40, (6, 2)), (10, (2, 2))],
)
def test_descriptors_are_shared_so_that_all_find_one(available: int | None, expected: tuple[int, int]) -> None:
    assert split_fd_limit(Bounds(), 1000, available) == expected


def test_an_address_is_shown_as_it_is_written() -> None:
    assert str(Address("::1", 80)) == "[::1]:80"


def test_without_the_strict_parser_nothing_is_listened_on(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings_for(fake_upstream, token_host)))
    command = [sys.executable, "-m", "proxy", "serve", "--config", str(path)]
    environment = {**os.environ, "AIOHTTP_NO_EXTENSIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=30)
    assert done.returncode == 1
    assert "aiohttp is installed without its C parser" in done.stderr
