"""Threats 39 to 52, and faults: other clients are served and all resources are released.

Behaviour that depends only on time is tested with a fake clock (tests/request/tokens/test_provider.py,
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

from tests.security.harness import (
    SELLERS,
    TIMEOUT,
    Harness,
    ReceivedRequest,
    Stream,
    connect,
    http_response,
    request,
    until,
)

FEEDS = "/feeds/2021-06-30/feeds"
OK = b"HTTP/1.1 200 OK\r\n"


def assert_served(harness: Harness) -> None:
    (got,) = harness.send(request("/good"))
    assert (got.status, got.get("x-amzn-requestid")) == (200, "for-/good")


def wait_until_idle(harness: Harness) -> None:
    until(lambda: harness.metric("spapi_proxy_requests_in_flight") == 0, "a request stays in flight")


def is_rejected(address: str) -> bool:
    try:
        connect(address).close()
    except OSError:
        return True
    return False


def respond_when_set(held: threading.Event) -> Callable[[Stream, ReceivedRequest], None]:
    """Return a script that responds once the event is set."""

    def script(stream: Stream, _: ReceivedRequest) -> None:
        held.wait(TIMEOUT)
        stream.send(http_response())

    return script


def descriptors(harness: Harness) -> int:
    return len(os.listdir(f"/proc/{harness.process.pid}/fd"))  # noqa: PTH208 - their number alone


# Threats 39 to 42: load.


def test_39_a_slow_head_is_ended(harness: Harness) -> None:
    with harness.client() as stream:
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
    assert not harness.api.received


@pytest.mark.parametrize("said", [b"", b"GET", b"GET /x HTTP/1.1\r\n", b"GET /x HTTP/1.1\r\nHost: localhost\r\n"])
def test_39_200_incomplete_requests_are_ended_and_do_not_delay_others(harness: Harness, said: bytes) -> None:
    before = descriptors(harness)
    with ExitStack() as stack:
        streams = [stack.enter_context(harness.client()) for _ in range(200)]
        for stream in streams:
            if said:
                stream.send(said)
        assert_served(harness)
        output = [stream.rest() for stream in streams]
    assert {data[:12] for data in output} == ({b"HTTP/1.1 408"} if said else {b""})
    until(lambda: descriptors(harness) <= before + 3, "descriptors were not closed")


def test_39_a_stalled_body_is_ended(harness: Harness) -> None:
    with harness.client() as stream:
        stream.send(request(FEEDS, b"Content-Length: 1000", method="POST") + b"half")
        got = stream.rest()
    assert got.startswith(b"HTTP/1.1 408 ")
    assert not [one for one in harness.api.received if one.body]
    wait_until_idle(harness)


def test_39_an_endless_slow_body_is_ended(harness: Harness) -> None:
    with harness.client() as stream:
        stream.send(request(FEEDS, b"Content-Length: 100000", method="POST"))
        began = time.monotonic()
        try:
            while time.monotonic() - began < 15:
                stream.send(b"x")
                time.sleep(0.2)
        except ConnectionError:
            pass
        assert time.monotonic() - began < 10
    wait_until_idle(harness)
    assert_served(harness)


def test_39_a_client_that_reads_byte_by_byte_is_ended(harness: Harness) -> None:
    harness.api.scripts["/large"] = lambda stream, _: stream.send(http_response(b"x" * 50_000_000))
    with harness.client(receive=2048) as stream:
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
        assert harness.metric("spapi_proxy_requests_in_flight") == 0
        assert got < 1000
    assert_served(harness)


HEADS = [b"x: " + b"a" * 30_000_000, b"x: y\r\n" * 3_000_000, b"a" * 30_000_000, b"x-%d: y\r\n" * 300_000]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: repr(head[:10]))
@pytest.mark.parametrize("first", [b"GET /x HTTP/1.1\r\nHost: localhost\r\n", b"GET /", b""])
def test_40_an_endless_head_is_rejected_in_bounded_memory(harness: Harness, head: bytes, first: bytes) -> None:
    with harness.client() as stream:
        with suppress(ConnectionError):
            stream.send(first + head)
        got = stream.rest()
    assert got == b"" or got.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))
    assert not harness.api.received
    assert_served(harness)


def test_40_thousands_of_pipelined_requests_are_served_in_sequence(harness: Harness) -> None:
    data = request("/many", b"Connection: keep-alive") * 3000 + request("/last")
    with harness.client() as stream:
        sending = threading.Thread(target=stream.socket.sendall, args=(data,), daemon=True)
        sending.start()
        assert_served(harness)
        got = stream.rest()
        sending.join(TIMEOUT)
    assert got.count(b"HTTP/1.1 200 ") == 3001


def test_40_a_body_in_tiny_chunks_arrives_complete(harness: Harness) -> None:
    body = b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n"
    (got,) = harness.send(request(FEEDS, b"Transfer-Encoding: chunked", method="POST") + body)
    assert got.status == 200
    assert harness.api.received[0].body == b"x" * 50_000


def test_41_clients_that_disconnect_leave_no_request_in_flight(harness: Harness) -> None:
    held = threading.Event()
    closed = threading.Semaphore(0)

    def script(stream: Stream, _: ReceivedRequest) -> None:
        try:
            stream.socket.settimeout(TIMEOUT)
            stream.more()
        except OSError:
            pass
        closed.release()
        held.wait(TIMEOUT)

    harness.api.scripts["/held"] = script
    for _ in range(150):
        with harness.client() as stream:
            stream.send(request("/held"))
    until(lambda: harness.metric("spapi_proxy_requests_in_flight") == 0, "the calls of disconnected clients continue")
    assert_served(harness)
    for _ in range(len([one for one in harness.api.received if one.target == "/held"])):
        assert closed.acquire(timeout=TIMEOUT)
    held.set()


def test_42_f19_few_descriptors_are_enough(tmp_path: Path) -> None:
    with Harness.start(tmp_path, limit=64) as harness, ExitStack() as stack:
        for _ in range(150):
            try:
                stack.enter_context(harness.client())
            except OSError:
                break
        assert_served(harness)
        held = [stack.enter_context(harness.client()) for _ in range(30)]
        for stream in held:
            with suppress(OSError):
                stream.send(b"GET /x HT")
        assert_served(harness)
        assert descriptors(harness) <= 64
        stack.close()
        until(lambda: descriptors(harness) < 40, "descriptors were not closed")
        assert_served(harness)
        assert len(harness.log) < 300
        assert harness.metric("spapi_proxy_client_connections_closed_total") > 50


def test_42_a_new_connection_is_rejected_when_all_are_busy(tmp_path: Path) -> None:
    with Harness.start(tmp_path, bounds={"connections": 3}) as harness, ExitStack() as stack:
        held = threading.Event()
        harness.api.scripts["/held"] = respond_when_set(held)
        streams = [stack.enter_context(harness.client()) for _ in range(3)]
        for stream in streams:
            stream.send(request("/held"))
        until(lambda: harness.metric("spapi_proxy_requests_in_flight") == 3, "the requests do not arrive")
        (got,) = harness.send(b"")
        assert (got.status, got.error, got.get("retry-after")) == (503, "TooManyConnections", "1")
        held.set()
        assert all(stream.rest().startswith(b"HTTP/1.1 200 ") for stream in streams)
        assert_served(harness)


def test_a_caller_over_its_limit_is_rejected_and_others_are_served(tmp_path: Path) -> None:
    callers = {"greedy": {"key": "distinctive-key-one"}, "modest": {"key": "distinctive-key-two"}}
    with Harness.start(tmp_path, bounds={"requests": 5}, callers=callers) as harness, ExitStack() as stack:
        held = threading.Event()
        harness.api.scripts["/held"] = respond_when_set(held)
        streams = [stack.enter_context(harness.client()) for _ in range(5)]
        for stream in streams:
            stream.send(request("/held", b"x-sp-key: distinctive-key-one"))
        until(
            lambda: harness.metric('spapi_proxy_caller_requests_in_flight{caller="greedy"}') == 5,
            "the requests do not arrive",
        )
        (got,) = harness.send(request("/x", b"x-sp-key: distinctive-key-one"))
        assert (got.status, got.error, got.get("retry-after")) == (429, "CallerBusy", "1")
        (got,) = harness.send(request("/x", b"x-sp-key: distinctive-key-two"))
        assert got.status == 200
        held.set()
        assert all(stream.rest().startswith(b"HTTP/1.1 200 ") for stream in streams)


def test_an_account_at_its_limit_does_not_block_other_accounts(tmp_path: Path) -> None:
    with (
        Harness.start(tmp_path, bounds={"account_requests": 4}, limits={"max_wait": "1s"}) as harness,
        ExitStack() as stack,
    ):
        held = threading.Event()
        harness.api.scripts["/held"] = respond_when_set(held)
        streams = [stack.enter_context(harness.client()) for _ in range(4)]
        for stream in streams:
            stream.send(request("/held", b"x-sp-account: acme"))
        until(lambda: harness.metric("spapi_proxy_account_requests_in_flight") == 4, "the requests do not arrive")
        (got,) = harness.send(request("/x", b"x-sp-account: acme"))
        assert (got.status, got.error) == (503, "AccountBusy")
        (got,) = harness.send(request("/x", b"x-sp-account: zenith"))
        assert got.status == 200
        waiting = stack.enter_context(harness.client())
        waiting.send(request("/x", b"x-sp-account: acme", b"x-sp-max-wait: 10s"))
        held.set()
        assert waiting.rest().startswith(b"HTTP/1.1 200 ")
        assert all(stream.rest().startswith(b"HTTP/1.1 200 ") for stream in streams)


# Threats 50 to 52, faults 8 to 14: Amazon fails.


def ends(how: str) -> Callable[[Stream, ReceivedRequest], None]:
    def script(stream: Stream, _: ReceivedRequest) -> None:
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
def test_50_51_a_request_that_may_have_been_processed_is_not_sent_twice(tmp_path: Path, method: str, how: str) -> None:
    with Harness.start(tmp_path, retry={"attempts": 3}) as harness:
        harness.api.scripts["/broken"] = ends(how)
        (got,) = harness.send(
            request("/broken", b"x-sp-timeout: 6s", method=method, body=None if method == "GET" else b"{}")
        )
        count = len([one for one in harness.api.received if one.target == "/broken"])
    assert got.status in {502, 504}
    assert count == 1 if method in {"POST", "PATCH"} else count <= 3


def test_51_f13_dead_pooled_connections_fail_no_request_and_cause_few_retries(harness: Harness) -> None:
    for attempt_round in range(5):
        for number in range(5):
            harness.send(request(f"/warm/{attempt_round}/{number}"))
        for stream in harness.api._streams:
            stream.close()
        (got,) = harness.send(request("/after", method="GET"))
        assert got.status == 200
        (got,) = harness.send(request(FEEDS, method="POST", body=b"{}"))
        assert got.status in {200, 502}
    assert len([one for one in harness.api.received if one.target == "/after"]) <= 10


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_52_a_rejected_token_is_replaced_once(tmp_path: Path, status: str, always: bool) -> None:
    refusal = {
        "code": "Unauthorized",
        "message": "Access to requested resource is denied.",
        "details": "The access token you provided has expired.",
    }
    seen: list[str] = []

    def script(stream: Stream, received: ReceivedRequest) -> None:
        seen.append(received.get("x-amz-access-token") or "")
        refuse = always or seen[-1] == seen[0]
        stream.send(http_response(json.dumps({"errors": [refusal]}).encode(), status) if refuse else http_response())

    with Harness.start(tmp_path) as harness:
        harness.api.scripts["/refused"] = script
        (got,) = harness.send(request("/refused", method="POST", body=b"{}"))
        assert got.status == (int(status[:3]) if always else 200)
        assert len(seen) == len(set(seen)) == 2
        assert len(harness.lwa.received) == 2


def test_f8_an_upstream_that_recovers_is_used_immediately(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Harness.start(tmp_path) as behind:
        lwa = {"lwa": f"http://127.0.0.1:{behind.lwa.port}/auth/o2/token"}
        folder = tmp_path / "second"
        folder.mkdir()
        endpoints = {**dict.fromkeys(("na", "eu", "fe"), f"http://127.0.0.1:{port}"), **lwa}
        with Harness.start(folder, endpoints=endpoints) as harness:
            began = time.monotonic()
            (got,) = harness.send(request(SELLERS))
            assert (got.status, got.error) == (502, "UpstreamUnreachable")
            assert time.monotonic() - began < 4
            with socket.create_server(("127.0.0.1", port)) as server:

                def serve() -> None:
                    sock, _ = server.accept()
                    with sock:
                        stream = Stream(sock)
                        stream.until(b"\r\n\r\n")
                        stream.send(http_response())

                thread = threading.Thread(target=serve, daemon=True)
                thread.start()
                (got,) = harness.send(request(SELLERS))
                assert got.status == 200
                thread.join(TIMEOUT)


def test_f10_silence_before_a_response_is_a_504_and_within_it_a_truncated_one(harness: Harness) -> None:
    harness.api.scripts["/silent"] = lambda _stream, _: None
    (got,) = harness.send(request("/silent"))
    assert (got.status, got.error) == (504, "UpstreamTimeout")
    harness.api.scripts["/half"] = lambda stream, _: stream.send(OK + b"content-length: 10\r\n\r\nhalf")
    (got,) = harness.send(request("/half"))
    assert not got.complete
    assert_served(harness)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_f12_a_response_before_the_end_of_the_upload_arrives(harness: Harness, framing: str) -> None:
    harness.api.scripts["/early"] = lambda stream, _: stream.send(
        http_response(b"too large", "413 Content Too Large", b"connection: close")
    )
    with harness.client() as stream:
        if framing == "length":
            stream.send(request("/early", b"Content-Length: 50000000", method="POST") + b"hello")
        else:
            stream.send(request("/early", b"Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n")
        until(lambda: bool(harness.api.received), "nothing arrives")
        got = stream.rest()
    assert got.startswith(b"HTTP/1.1 413 ")
    assert b"too large" in got
    wait_until_idle(harness)
    assert_served(harness)


LEFT = {
    "head": b"POST /early/left HTTP/1.1\r\nHost: loc",
    "upload": request("/early/left", b"Content-Length: 100000", method="POST") + b"half",
    "waiting": request("/early/left", method="POST", body=b"{}"),
    "download": request("/early/left", method="POST", body=b"{}"),
}


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stage", list(LEFT))
def test_f15_a_client_that_disconnects_ends_its_call_and_affects_no_other(
    harness: Harness, stage: str, how: str
) -> None:
    gone = threading.Event()

    def script(stream: Stream, _: ReceivedRequest) -> None:
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

    harness.api.scripts["/early/left"] = script
    with harness.client() as stream:
        stream.send(LEFT[stage])
        if stage != "head":
            until(lambda: bool(harness.api.received), "nothing arrives")
        if stage == "download":
            stream.exactly(100_000)
        if how == "reset":
            stream.reset()
        else:
            stream.close()
    if stage != "head":
        assert gone.wait(5), "the call to Amazon goes on"
    wait_until_idle(harness)
    assert not [one for one in harness.api.received if one.body == b"half"]
    assert_served(harness)


def test_f16_a_half_closed_client_gets_a_response_or_is_closed(harness: Harness) -> None:
    with harness.client() as stream:
        stream.send(request("/x"))
        stream.socket.shutdown(socket.SHUT_WR)
        got = stream.rest()
    assert got == b"" or got.startswith(b"HTTP/1.1 200 ")
    wait_until_idle(harness)


def test_f18_a_fast_call_is_not_delayed_by_250_slow_ones(tmp_path: Path) -> None:
    held = threading.Event()
    with Harness.start(tmp_path, timeouts={"upstream_idle": "30s"}) as harness, ExitStack() as stack:
        harness.api.scripts["/slow"] = respond_when_set(held)
        streams = [stack.enter_context(harness.client()) for _ in range(250)]
        for stream in streams:
            stream.send(request("/slow"))
        until(lambda: harness.metric("spapi_proxy_requests_in_flight") >= 250, "the requests do not arrive")
        began = time.monotonic()
        assert_served(harness)
        took = time.monotonic() - began
        held.set()
        assert all(stream.rest().startswith(b"HTTP/1.1 ") for stream in streams)
    assert took < 1.0


def test_f20_sigterm_completes_requests_in_flight_and_exits(tmp_path: Path) -> None:
    with Harness.start(tmp_path) as harness, ExitStack() as stack:
        held = threading.Event()

        def script(stream: Stream, _: ReceivedRequest) -> None:
            stream.send(OK + b"content-length: 8\r\n\r\nhalf")
            held.wait(TIMEOUT)
            stream.send(b"done")

        harness.api.scripts["/drip"] = script
        idle = stack.enter_context(harness.client())
        idle.send(request("/x", b"Connection: keep-alive"))
        idle.until(b"payload")
        streams = [stack.enter_context(harness.client()) for _ in range(8)]
        for stream in streams:
            stream.send(request("/drip"))
        for stream in streams:
            stream.until(b"half")
        harness.process.send_signal(signal.SIGTERM)
        idle.rest()
        until(lambda: is_rejected(harness.addresses[0]), "it still listens")
        held.set()
        assert [stream.rest()[-4:] for stream in streams] == [b"done"] * 8
        assert harness.process.wait(TIMEOUT) == 0


def test_f21_a_killed_process_starts_again_with_one_exchange(tmp_path: Path) -> None:
    with Harness.start(tmp_path) as harness:
        assert_served(harness)
        harness.process.send_signal(signal.SIGKILL)
        assert harness.process.wait(TIMEOUT) == -signal.SIGKILL
    folder = tmp_path / "again"
    folder.mkdir()
    with Harness.start(folder) as harness:
        for _ in range(10):
            assert_served(harness)
        assert len(harness.lwa.received) == 1


def test_f25_a_replaced_secret_is_used_from_the_next_exchange(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old-secret-of-the-application")
    secret.chmod(0o600)
    applications = {"main": {"client_id": "c", "client_secret": {"file": str(secret)}}}
    with Harness.start(tmp_path, applications=applications) as harness:
        harness.send(request("/x", b"x-sp-account: acme"))
        secret.write_text("new-secret-of-the-application")
        harness.send(request("/x", b"x-sp-account: zenith"))
        harness.send(request("/x", b"x-sp-account: acme"))
        bodies = [one.body.decode() for one in harness.lwa.received]
    assert ["old-secret" in body for body in bodies] == [True, False]
    assert ["new-secret" in body for body in bodies] == [False, True]


def test_f31_a_log_pipe_that_is_not_read_blocks_no_request(tmp_path: Path) -> None:
    with Harness.start(tmp_path) as harness:
        # Standard error is a pipe; closing its read end simulates a log reader that has exited.
        assert harness.process.stderr is not None
        os.close(os.dup(harness.process.stderr.fileno()))
        for _ in range(50):
            assert_served(harness)


def test_f31_a_full_disk_blocks_no_request(tmp_path: Path) -> None:
    with Harness.start(tmp_path, audit="/dev/full") as harness:
        for _ in range(50):
            assert_served(harness)
        until(lambda: harness.metric('spapi_proxy_log_lines_lost_total{log="audit"}') >= 50, "the loss is not counted")


def test_f32_ipv4_and_ipv6_loopback_can_be_listened_on(tmp_path: Path) -> None:
    with Harness.start(tmp_path, listen=["127.0.0.1:0", "[::1]:0", f"unix:{tmp_path}/x.sock"]) as harness:
        for address in harness.addresses:
            assert [one.status for one in harness.send(request("/x"), address=address)] == [200]


def test_no_core_is_dumped_and_memory_cannot_be_read(harness: Harness) -> None:
    assert resource.prlimit(harness.process.pid, resource.RLIMIT_CORE) == (0, 0)
    # The files in /proc of a non-dumpable process belong to root (proc(5)); the test may run as root.
    limits = Path(f"/proc/{harness.process.pid}/limits").read_text()
    soft, hard = limits.partition("Max open files")[2].split()[:2]
    assert soft == hard


def test_45_no_secret_is_in_the_command_line(harness: Harness) -> None:
    line = Path(f"/proc/{harness.process.pid}/cmdline").read_bytes()
    assert b"distinctive" not in line
