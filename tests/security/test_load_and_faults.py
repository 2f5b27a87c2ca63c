"""Rows 39 to 52 of the threats, and the faults: whatever clients and Amazon do, others are served and nothing stays.

What is about time alone is looked at with a clock of the tests' own elsewhere (tests/request/tokens/test_provider.py,
tests/request/upstream/test_retry.py).
"""

import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.security.harness import PATIENCE, SELLERS, Arrived, Stream, World, answer, connect, request, until

FEEDS = "/feeds/2021-06-30/feeds"
OK = b"HTTP/1.1 200 OK\r\n"


def served(world: World) -> None:
    (got,) = world.send(request("/good"))
    assert (got.status, got.get("x-amzn-requestid")) == (200, "for-/good")


def nothing_in_flight(world: World) -> None:
    until(lambda: world.metric("spapi_proxy_requests_in_flight") == 0, "a request is in flight for ever")


def refuses(address: str) -> bool:
    try:
        connect(address).close()
    except OSError:
        return True
    return False


def held_until(held: threading.Event) -> Callable[[Stream, Arrived], None]:
    """Return a script that answers once it may."""

    def script(stream: Stream, _: Arrived) -> None:
        held.wait(PATIENCE)
        stream.send(answer())

    return script


def descriptors(world: World) -> int:
    return len(os.listdir(f"/proc/{world.process.pid}/fd"))  # noqa: PTH208 - their number alone


# Rows 39 to 42: load.


def test_39_a_head_that_drips_is_ended(world: World) -> None:
    with world.client() as stream:
        began = time.monotonic()
        try:
            for byte in request("/slow", b"x: " + b"a" * 5000):
                stream.send(bytes([byte]))
                if time.monotonic() - began > 10:
                    break
                time.sleep(0.01)
        except ConnectionError:
            pass
        assert time.monotonic() - began < 5
    assert not world.api.arrived


@pytest.mark.parametrize("said", [b"", b"GET", b"GET /x HTTP/1.1\r\n", b"GET /x HTTP/1.1\r\nHost: localhost\r\n"])
def test_39_200_connections_that_say_too_little_are_ended_and_hinder_nobody(world: World, said: bytes) -> None:
    before = descriptors(world)
    with ExitStack() as stack:
        streams = [stack.enter_context(world.client()) for _ in range(200)]
        for stream in streams:
            if said:
                stream.send(said)
        served(world)
        told = [stream.rest() for stream in streams]
    assert {data[:12] for data in told} == ({b"HTTP/1.1 408"} if said else {b""})
    until(lambda: descriptors(world) <= before + 3, "descriptors were left behind")


def test_39_a_body_that_stalls_is_ended(world: World) -> None:
    with world.client() as stream:
        stream.send(request(FEEDS, b"Content-Length: 1000", method="POST") + b"half")
        got = stream.rest()
    assert got.startswith(b"HTTP/1.1 408 ")
    assert not [one for one in world.api.arrived if one.body]
    nothing_in_flight(world)


def test_39_a_body_that_drips_for_ever_is_ended(world: World) -> None:
    with world.client() as stream:
        stream.send(request(FEEDS, b"Content-Length: 100000", method="POST"))
        began = time.monotonic()
        try:
            while time.monotonic() - began < 15:
                stream.send(b"x")
                time.sleep(0.2)
        except ConnectionError:
            pass
        assert time.monotonic() - began < 10
    nothing_in_flight(world)
    served(world)


def test_39_a_client_that_reads_by_the_byte_is_ended(world: World) -> None:
    world.api.scripts["/large"] = lambda stream, _: stream.send(answer(b"x" * 50_000_000))
    with world.client(receive=2048) as stream:
        stream.send(request("/large"))
        began = time.monotonic()
        got = 0
        try:
            while data := stream.socket.recv(1):
                got += len(data)
                time.sleep(0.1)
                if time.monotonic() - began > 15:
                    break
        except ConnectionError:
            pass
        assert world.metric("spapi_proxy_requests_in_flight") == 0
        assert got < 1000
    served(world)


HEADS = [b"x: " + b"a" * 30_000_000, b"x: y\r\n" * 3_000_000, b"a" * 30_000_000, b"x-%d: y\r\n" * 300_000]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: repr(head[:10]))
@pytest.mark.parametrize("first", [b"GET /x HTTP/1.1\r\nHost: localhost\r\n", b"GET /", b""])
def test_40_an_endless_head_is_refused_in_bounded_memory(world: World, head: bytes, first: bytes) -> None:
    with world.client() as stream:
        with suppress(ConnectionError):
            stream.send(first + head)
        got = stream.rest()
    assert got == b"" or got.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))
    assert not world.api.arrived
    served(world)


def test_40_thousands_of_pipelined_requests_are_served_one_by_one(world: World) -> None:
    data = request("/many", b"Connection: keep-alive") * 3000 + request("/last")
    with world.client() as stream:
        sending = threading.Thread(target=stream.socket.sendall, args=(data,), daemon=True)
        sending.start()
        served(world)
        got = stream.rest()
        sending.join(PATIENCE)
    assert got.count(b"HTTP/1.1 200 ") == 3001


def test_40_a_body_in_tiny_chunks_arrives_whole(world: World) -> None:
    body = b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n"
    (got,) = world.send(request(FEEDS, b"Transfer-Encoding: chunked", method="POST") + body)
    assert got.status == 200
    assert world.api.arrived[0].body == b"x" * 50_000


def test_41_clients_that_leave_leave_nothing_behind(world: World) -> None:
    held = threading.Event()
    closed = threading.Semaphore(0)

    def script(stream: Stream, _: Arrived) -> None:
        try:
            stream.socket.settimeout(PATIENCE)
            stream.more()
        except OSError:
            pass
        closed.release()
        held.wait(PATIENCE)

    world.api.scripts["/held"] = script
    for _ in range(150):
        with world.client() as stream:
            stream.send(request("/held"))
    until(lambda: world.metric("spapi_proxy_requests_in_flight") == 0, "the calls of clients that left go on")
    served(world)
    for _ in range(len([one for one in world.api.arrived if one.target == "/held"])):
        assert closed.acquire(timeout=PATIENCE)
    held.set()


def test_42_f19_few_descriptors_are_enough(tmp_path: Path) -> None:
    with World.made(tmp_path, limit=64) as world, ExitStack() as stack:
        for _ in range(150):
            try:
                stack.enter_context(world.client())
            except OSError:
                break
        served(world)
        held = [stack.enter_context(world.client()) for _ in range(30)]
        for stream in held:
            with suppress(OSError):
                stream.send(b"GET /x HT")
        served(world)
        assert descriptors(world) <= 64
        stack.close()
        until(lambda: descriptors(world) < 40, "descriptors were left behind")
        served(world)
        assert len(world.log) < 300
        assert world.metric("spapi_proxy_client_connections_closed_total") > 50


def test_42_where_all_are_busy_a_new_connection_is_told_so(tmp_path: Path) -> None:
    with World.made(tmp_path, bounds={"connections": 3}) as world, ExitStack() as stack:
        held = threading.Event()
        world.api.scripts["/held"] = held_until(held)
        streams = [stack.enter_context(world.client()) for _ in range(3)]
        for stream in streams:
            stream.send(request("/held"))
        until(lambda: world.metric("spapi_proxy_requests_in_flight") == 3, "they do not arrive")
        (got,) = world.send(b"")
        assert (got.status, got.error, got.get("retry-after")) == (503, "TooManyConnections", "1")
        held.set()
        assert all(stream.rest().startswith(b"HTTP/1.1 200 ") for stream in streams)
        served(world)


def test_a_caller_that_has_too_much_in_flight_is_told_so_and_others_are_served(tmp_path: Path) -> None:
    callers = {"greedy": {"key": "distinctive-key-one"}, "modest": {"key": "distinctive-key-two"}}
    with World.made(tmp_path, bounds={"requests": 5}, callers=callers) as world, ExitStack() as stack:
        held = threading.Event()
        world.api.scripts["/held"] = held_until(held)
        streams = [stack.enter_context(world.client()) for _ in range(5)]
        for stream in streams:
            stream.send(request("/held", b"x-sp-key: distinctive-key-one"))
        until(lambda: world.metric('spapi_proxy_caller_requests_in_flight{caller="greedy"}') == 5, "they do not arrive")
        (got,) = world.send(request("/x", b"x-sp-key: distinctive-key-one"))
        assert (got.status, got.error, got.get("retry-after")) == (429, "CallerBusy", "1")
        (got,) = world.send(request("/x", b"x-sp-key: distinctive-key-two"))
        assert got.status == 200
        held.set()
        assert all(stream.rest().startswith(b"HTTP/1.1 200 ") for stream in streams)


def test_an_account_that_fills_its_share_leaves_room_for_the_others(tmp_path: Path) -> None:
    with World.made(tmp_path, bounds={"account_requests": 4}, limits={"max_wait": "1s"}) as world, ExitStack() as stack:
        held = threading.Event()
        world.api.scripts["/held"] = held_until(held)
        streams = [stack.enter_context(world.client()) for _ in range(4)]
        for stream in streams:
            stream.send(request("/held", b"x-sp-account: acme"))
        until(lambda: world.metric("spapi_proxy_account_requests_in_flight") == 4, "they do not arrive")
        (got,) = world.send(request("/x", b"x-sp-account: acme"))
        assert (got.status, got.error) == (503, "AccountBusy")
        (got,) = world.send(request("/x", b"x-sp-account: zenith"))
        assert got.status == 200
        waiting = stack.enter_context(world.client())
        waiting.send(request("/x", b"x-sp-account: acme", b"x-sp-max-wait: 10s"))
        held.set()
        assert waiting.rest().startswith(b"HTTP/1.1 200 ")
        assert all(stream.rest().startswith(b"HTTP/1.1 200 ") for stream in streams)


# Rows 50 to 52, faults 8 to 14: Amazon fails.


def ends(how: str) -> Callable[[Stream, Arrived], None]:
    def script(stream: Stream, _: Arrived) -> None:
        if how == "reset":
            stream.reset()
        elif how == "close":
            stream.close()
        elif how == "half a head":
            stream.send(b"HTTP/1.1 200 OK\r\nx: y")
            stream.close()

    return script


@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT", "DELETE", "GET"])
@pytest.mark.parametrize("how", ["reset", "close", "half a head", "silence"])
def test_50_51_what_may_have_been_acted_on_is_not_sent_twice(tmp_path: Path, method: str, how: str) -> None:
    with World.made(tmp_path, retry={"attempts": 3}) as world:
        world.api.scripts["/broken"] = ends(how)
        (got,) = world.send(
            request("/broken", b"x-sp-timeout: 6s", method=method, body=None if method == "GET" else b"{}")
        )
        count = len([one for one in world.api.arrived if one.target == "/broken"])
    assert got.status in {502, 504}
    assert count == 1 if method in {"POST", "PATCH"} else count <= 3


def test_51_f13_connections_that_died_cost_no_call_and_no_crowd_of_repetitions(world: World) -> None:
    for round_ in range(5):
        for number in range(5):
            world.send(request(f"/warm/{round_}/{number}"))
        for stream in world.api._streams:
            stream.close()
        (got,) = world.send(request("/after", method="GET"))
        assert got.status == 200
        (got,) = world.send(request(FEEDS, method="POST", body=b"{}"))
        assert got.status in {200, 502}
    assert len([one for one in world.api.arrived if one.target == "/after"]) <= 10


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_52_a_refused_token_is_replaced_once(tmp_path: Path, status: str, always: bool) -> None:
    refusal = {
        "code": "Unauthorized",
        "message": "Access to requested resource is denied.",
        "details": "The access token you provided has expired.",
    }
    seen: list[str] = []

    def script(stream: Stream, arrived: Arrived) -> None:
        seen.append(arrived.get("x-amz-access-token") or "")
        refuse = always or seen[-1] == seen[0]
        stream.send(answer(json.dumps({"errors": [refusal]}).encode(), status) if refuse else answer())

    with World.made(tmp_path) as world:
        world.api.scripts["/refused"] = script
        (got,) = world.send(request("/refused", method="POST", body=b"{}"))
        assert got.status == (int(status[:3]) if always else 200)
        assert len(seen) == len(set(seen)) == 2
        assert len(world.lwa.arrived) == 2


def test_f8_a_far_side_that_comes_back_is_used_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with World.made(tmp_path) as behind:
        lwa = {"lwa": f"http://127.0.0.1:{behind.lwa.port}/auth/o2/token"}
        folder = tmp_path / "second"
        folder.mkdir()
        endpoints = {**dict.fromkeys(("na", "eu", "fe"), f"http://127.0.0.1:{port}"), **lwa}
        with World.made(folder, endpoints=endpoints) as world:
            began = time.monotonic()
            (got,) = world.send(request(SELLERS))
            assert (got.status, got.error) == (502, "UpstreamUnreachable")
            assert time.monotonic() - began < 4
            with socket.create_server(("127.0.0.1", port)) as server:

                def serve() -> None:
                    sock, _ = server.accept()
                    with sock:
                        stream = Stream(sock)
                        stream.until(b"\r\n\r\n")
                        stream.send(answer())

                thread = threading.Thread(target=serve, daemon=True)
                thread.start()
                (got,) = world.send(request(SELLERS))
                assert got.status == 200
                thread.join(PATIENCE)


def test_f10_silence_before_an_answer_is_a_504_and_within_it_a_broken_one(world: World) -> None:
    world.api.scripts["/silent"] = lambda _stream, _: None
    (got,) = world.send(request("/silent"))
    assert (got.status, got.error) == (504, "UpstreamTimeout")
    world.api.scripts["/half"] = lambda stream, _: stream.send(OK + b"content-length: 10\r\n\r\nhalf")
    (got,) = world.send(request("/half"))
    assert not got.complete
    served(world)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_f12_an_answer_before_the_end_of_the_upload_arrives(world: World, framing: str) -> None:
    world.api.scripts["/early"] = lambda stream, _: stream.send(
        answer(b"too large", "413 Content Too Large", b"connection: close")
    )
    with world.client() as stream:
        if framing == "length":
            stream.send(request("/early", b"Content-Length: 50000000", method="POST") + b"hello")
        else:
            stream.send(request("/early", b"Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n")
        until(lambda: bool(world.api.arrived), "nothing arrives")
        got = stream.rest()
    assert got.startswith(b"HTTP/1.1 413 ")
    assert b"too large" in got
    nothing_in_flight(world)
    served(world)


LEFT = {
    "head": b"POST /early/left HTTP/1.1\r\nHost: loc",
    "upload": request("/early/left", b"Content-Length: 100000", method="POST") + b"half",
    "waiting": request("/early/left", method="POST", body=b"{}"),
    "download": request("/early/left", method="POST", body=b"{}"),
}


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stage", list(LEFT))
def test_f15_a_client_that_leaves_ends_its_call_and_disturbs_nobody(world: World, stage: str, how: str) -> None:
    gone = threading.Event()

    def script(stream: Stream, _: Arrived) -> None:
        try:
            if stage == "download":
                stream.send(OK + b"content-length: 1000000000\r\n\r\n")
                while True:
                    stream.send(b"x" * 65536)
            while stream.more():
                pass
        except OSError:
            pass
        gone.set()

    world.api.scripts["/early/left"] = script
    with world.client() as stream:
        stream.send(LEFT[stage])
        if stage != "head":
            until(lambda: bool(world.api.arrived), "nothing arrives")
        if stage == "download":
            stream.exactly(100_000)
        if how == "reset":
            stream.reset()
        else:
            stream.close()
    if stage != "head":
        assert gone.wait(5), "the call to Amazon goes on"
    nothing_in_flight(world)
    assert not [one for one in world.api.arrived if one.body == b"half"]
    served(world)


def test_f16_a_client_that_ends_its_side_is_answered_or_let_go(world: World) -> None:
    with world.client() as stream:
        stream.send(request("/x"))
        stream.socket.shutdown(socket.SHUT_WR)
        got = stream.rest()
    assert got == b"" or got.startswith(b"HTTP/1.1 200 ")
    nothing_in_flight(world)


def test_f18_a_quick_call_is_not_behind_250_slow_ones(tmp_path: Path) -> None:
    held = threading.Event()
    with World.made(tmp_path, timeouts={"upstream_idle": "30s"}) as world, ExitStack() as stack:
        world.api.scripts["/slow"] = held_until(held)
        streams = [stack.enter_context(world.client()) for _ in range(250)]
        for stream in streams:
            stream.send(request("/slow"))
        until(lambda: world.metric("spapi_proxy_requests_in_flight") >= 250, "they do not arrive")
        began = time.monotonic()
        served(world)
        took = time.monotonic() - began
        held.set()
        assert all(stream.rest().startswith(b"HTTP/1.1 ") for stream in streams)
    assert took < 1.0


def test_f20_sigterm_finishes_what_is_in_flight_and_ends(tmp_path: Path) -> None:
    with World.made(tmp_path) as world, ExitStack() as stack:
        held = threading.Event()

        def script(stream: Stream, _: Arrived) -> None:
            stream.send(OK + b"content-length: 8\r\n\r\nhalf")
            held.wait(PATIENCE)
            stream.send(b"done")

        world.api.scripts["/drip"] = script
        idle = stack.enter_context(world.client())
        idle.send(request("/x", b"Connection: keep-alive"))
        idle.until(b"payload")
        streams = [stack.enter_context(world.client()) for _ in range(8)]
        for stream in streams:
            stream.send(request("/drip"))
        for stream in streams:
            stream.until(b"half")
        world.process.send_signal(signal.SIGTERM)
        idle.rest()
        until(lambda: refuses(world.addresses[0]), "it still listens")
        held.set()
        assert [stream.rest()[-4:] for stream in streams] == [b"done"] * 8
        assert world.process.wait(PATIENCE) == 0


def test_f21_a_killed_process_starts_again_with_one_exchange(tmp_path: Path) -> None:
    with World.made(tmp_path) as world:
        served(world)
        world.process.send_signal(signal.SIGKILL)
        assert world.process.wait(PATIENCE) == -signal.SIGKILL
    folder = tmp_path / "again"
    folder.mkdir()
    with World.made(folder) as world:
        for _ in range(10):
            served(world)
        assert len(world.lwa.arrived) == 1


def test_f25_a_replaced_secret_is_used_from_the_next_exchange_on(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old-secret-of-the-application")
    secret.chmod(0o600)
    applications = {"main": {"client_id": "c", "client_secret": {"file": str(secret)}}}
    with World.made(tmp_path, applications=applications) as world:
        world.send(request("/x", b"x-sp-account: acme"))
        secret.write_text("new-secret-of-the-application")
        world.send(request("/x", b"x-sp-account: zenith"))
        world.send(request("/x", b"x-sp-account: acme"))
        bodies = [one.body.decode() for one in world.lwa.arrived]
    assert ["old-secret" in body for body in bodies] == [True, False]
    assert ["new-secret" in body for body in bodies] == [False, True]


def test_f31_a_log_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    with World.made(tmp_path) as world:
        # Standard error is a pipe; a reader that is gone closes it.
        assert world.process.stderr is not None
        os.close(os.dup(world.process.stderr.fileno()))
        for _ in range(50):
            served(world)


def test_f31_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    with World.made(tmp_path, audit="/dev/full") as world:
        for _ in range(50):
            served(world)
        until(lambda: world.metric('spapi_proxy_log_lines_lost_total{log="audit"}') >= 50, "the loss is not counted")


def test_f32_both_loopbacks_can_be_listened_on(tmp_path: Path) -> None:
    with World.made(tmp_path, listen=["127.0.0.1:0", "[::1]:0", f"unix:{tmp_path}/x.sock"]) as world:
        for address in world.addresses:
            assert [one.status for one in world.send(request("/x"), address=address)] == [200]


def test_no_core_is_dumped_and_nobody_looks_inside(world: World) -> None:
    assert resource.prlimit(world.process.pid, resource.RLIMIT_CORE) == (0, 0)
    # What is not dumpable belongs to the administrator, whoever runs it; here they are one.
    limits = Path(f"/proc/{world.process.pid}/limits").read_text()
    soft, hard = limits.partition("Max open files")[2].split()[:2]
    assert soft == hard


def test_45_no_secret_stands_in_the_command_line(world: World) -> None:
    line = Path(f"/proc/{world.process.pid}/cmdline").read_bytes()
    assert b"distinctive" not in line
