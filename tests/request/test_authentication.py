"""Who sends a request: callers by key, by certificate, by user id, and what a request without any of them gets."""

from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.config import Address, Config, Listener
from proxy.errors import CallerRefused, MalformedRequest
from proxy.request.authentication import ANONYMOUS, UNKNOWN_PEER, CallerAuthenticator, Peer
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy, config_from
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream
from tests.support.raw_client import call

ONE, TWO = "key-of-the-first-caller", "key-of-the-second-caller"
CLOSED = Listener(address=Address("127.0.0.1", 0))
OPEN = Listener(address=Address("127.0.0.1", 0), anonymous=True)
SELLERS = "/sellers/v1/marketplaceParticipations"


def config(folder: Path, callers: dict[str, Any]) -> Config:
    tls = {"certificate": "x", "key": "y", "client_ca": "z"}
    settings = {
        "listen": [{"address": "127.0.0.1:0", "tls": tls}, f"unix:{folder}/x.sock"],
        "applications": {"main": {"client_id": "c", "client_secret": "s"}},
        "accounts": {"acme": {"refresh_tokens": {"eu": "t"}}},
        "callers": callers,
    }
    return config_from(settings, folder)


CALLERS = {
    "first": {"key": ONE},
    "second": {"key": TWO, "uid": 1002},
    "third": {"certificate": "third.internal"},
    "fourth": {"certificate": "fourth.internal", "uid": 1004},
}


def who(
    callers: CallerAuthenticator, *fields: tuple[str, str], peer: Peer = UNKNOWN_PEER, listener: Listener = CLOSED
) -> str:
    return callers.authenticate(CIMultiDictProxy(CIMultiDict(fields)), peer, listener)


@pytest.fixture
def callers(tmp_path: Path) -> CallerAuthenticator:
    return CallerAuthenticator(config(tmp_path, CALLERS))


@pytest.mark.parametrize(
    ("fields", "peer", "name"),
    [
        ([("x-sp-key", ONE)], UNKNOWN_PEER, "first"),
        ([("X-SP-KEY", f" {TWO}\t")], UNKNOWN_PEER, "second"),
        ([("Authorization", f"Bearer {ONE}")], UNKNOWN_PEER, "first"),
        ([("authorization", f"bearer   {TWO}")], UNKNOWN_PEER, "second"),
        ([("x-sp-key", ONE), ("Authorization", "Bearer something-else")], UNKNOWN_PEER, "first"),
        ([("Authorization", "Basic x"), ("Authorization", f"Bearer {ONE}")], UNKNOWN_PEER, "first"),
        ([], Peer(names=frozenset({"third.internal", "other"})), "third"),
        ([], Peer(uid=1004), "fourth"),
        ([("x-sp-key", ONE)], Peer(uid=1004, names=frozenset({"third.internal"})), "first"),
        ([], Peer(uid=1004, names=frozenset({"third.internal"})), "third"),
        ([("Authorization", "Bearer of-the-apps-own")], Peer(uid=1002), "second"),
    ],
)
def test_a_caller_is_known_by_key_then_certificate_then_user(
    callers: CallerAuthenticator, fields: list[tuple[str, str]], peer: Peer, name: str
) -> None:
    assert who(callers, *fields, peer=peer) == name
    assert who(callers, *fields, peer=peer, listener=OPEN) == name


@pytest.mark.parametrize(
    ("fields", "peer"),
    [
        ([("x-sp-key", "wrong")], UNKNOWN_PEER),
        ([("x-sp-key", "")], UNKNOWN_PEER),
        ([("x-sp-key", ONE[:-1])], UNKNOWN_PEER),
        ([("x-sp-key", ONE + "x")], UNKNOWN_PEER),
        ([("x-sp-key", ONE.upper())], UNKNOWN_PEER),
        ([("x-sp-key", f"{ONE}\u2028")], UNKNOWN_PEER),
        ([("x-sp-key", "\udcff")], UNKNOWN_PEER),
        ([("x-sp-key", "wrong")], Peer(uid=1002)),
        ([("x-sp-key", f"{ONE} {TWO}")], UNKNOWN_PEER),
    ],
)
def test_a_wrong_key_is_refused_everywhere_whatever_else_is_known(
    callers: CallerAuthenticator, fields: list[tuple[str, str]], peer: Peer
) -> None:
    for listener in (CLOSED, OPEN):
        with pytest.raises(CallerRefused) as caught:
            who(callers, *fields, peer=peer, listener=listener)
        assert caught.value.status == 403
        assert ONE not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("fields", "peer"),
    [
        ([], UNKNOWN_PEER),
        ([("Authorization", f"Basic {ONE}")], UNKNOWN_PEER),
        ([("Authorization", f"Bearer{ONE}")], UNKNOWN_PEER),
        ([("Authorization", "Bearer")], UNKNOWN_PEER),
        ([("Authorization", "Bearer of-the-apps-own")], UNKNOWN_PEER),
        ([("x_sp_key", ONE)], UNKNOWN_PEER),
        ([], Peer(uid=0)),
        ([], Peer(names=frozenset({"unknown"}))),
    ],
)
def test_nobody_is_let_in_only_where_the_listener_says_so(
    callers: CallerAuthenticator, fields: list[tuple[str, str]], peer: Peer
) -> None:
    with pytest.raises(CallerRefused, match="only requests of known callers"):
        who(callers, *fields, peer=peer)
    assert who(callers, *fields, peer=peer, listener=OPEN) == ANONYMOUS


def test_two_keys_are_refused(callers: CallerAuthenticator) -> None:
    with pytest.raises(MalformedRequest):
        who(callers, ("x-sp-key", ONE), ("x-sp-key", ONE))
    with pytest.raises(MalformedRequest):
        who(callers, ("Authorization", f"Bearer {ONE}"), ("Authorization", f"Bearer {TWO}"))


def test_a_certificate_of_two_callers_is_refused(callers: CallerAuthenticator) -> None:
    with pytest.raises(CallerRefused, match="several callers"):
        who(callers, peer=Peer(names=frozenset({"third.internal", "fourth.internal"})))


def test_without_callers_everybody_is_nobody_in_particular(tmp_path: Path) -> None:
    callers = CallerAuthenticator(config(tmp_path, {}))
    assert who(callers, ("x-sp-key", "whatever")) == ANONYMOUS


def test_a_key_file_is_read_anew_and_may_hold_the_next_key_too(tmp_path: Path) -> None:
    file, clock = tmp_path / "key", FakeClock()
    file.write_text("first-key\n")
    file.chmod(0o600)
    callers = CallerAuthenticator(config(tmp_path, {"job": {"key": {"file": str(file)}}}), now=clock)
    assert who(callers, ("x-sp-key", "first-key")) == "job"
    file.write_text("first-key\nsecond-key\n")
    clock.advance(1.1)
    assert who(callers, ("x-sp-key", "second-key")) == who(callers, ("x-sp-key", "first-key")) == "job"
    file.write_text("second-key\n")
    clock.advance(1.1)
    assert who(callers, ("x-sp-key", "second-key")) == "job"
    with pytest.raises(CallerRefused):
        who(callers, ("x-sp-key", "first-key"))
    file.unlink()
    clock.advance(1.1)
    assert who(callers, ("x-sp-key", "second-key")) == "job", "a file in the middle of being replaced"


async def test_a_key_does_not_go_on_and_its_owner_is_in_the_log(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, log: Any
) -> None:
    proxy: RunningProxy = await start_proxy(callers={"job": {"key": ONE}})
    for fields in ({"x_sp_key": ONE}, {"authorization": f"Bearer {ONE}"}):
        got = await call(proxy.addresses[0], "GET", SELLERS, **fields)
        assert got.status == 200
    assert ONE not in str(fake_upstream.received)
    assert '"caller": "job"' in log.getvalue()
    assert ONE not in log.getvalue()
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.error) == (403, "CallerRefused")
