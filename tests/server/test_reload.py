"""A changed file or SIGHUP becomes the configuration in force, whole or not at all, and everybody learns which."""

import asyncio
import gc
import json
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config import Config, ConfigError, Loaded, Problem, load_config
from proxy.server import reload
from proxy.server.reload import ConfigWatcher, Result, file_signatures
from proxy.server.runtime import RunningProxy, start_proxy
from tests.bench.reloads import run
from tests.conftest import StartProxy, config_from, settings_for
from tests.support.fake_upstream import FakeUpstream, TokenHost
from tests.support.raw_client import call

SELLERS = "/sellers/v1/marketplaceParticipations"


@dataclass
class Watched:
    """A proxy whose files are watched."""

    proxy: RunningProxy
    reloads: ConfigWatcher
    path: Path
    write: Callable[..., None]
    results: asyncio.Queue[Result] = field(default_factory=asyncio.Queue)

    async def result(self) -> Result:
        """Return how the next reload went, once it is over."""
        return await self.results.get()

    async def status(self) -> Any:
        assert self.proxy.admin is not None
        return json.loads((await call(self.proxy.admin, "GET", "/status")).body)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.proxy.metrics.registry.get_sample_value(f"spapi_proxy_config_{name}", labels)


@pytest.fixture
async def watched(start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path) -> Any:
    """Starts a proxy from a file of its own, whose secret is in another, and watches both."""
    path = tmp_path / "in use.yaml"
    secret = tmp_path / "secret"
    secret.write_text("client-secret", encoding="utf-8")
    secret.chmod(0o600)
    main = {"client_id": "client", "client_secret": {"file": "secret"}}

    def write(**changed: Any) -> None:
        path.write_text(yaml.safe_dump(settings_for(fake_upstream, token_host, applications={"main": main}, **changed)))

    write()
    load = partial(load_config, str(path), {})
    proxy = await start_proxy(applications={"main": main})
    here = Watched(proxy, None, path, write)  # type: ignore[arg-type]  # it comes with the next line
    here.reloads = ConfigWatcher(
        load(),
        load=load,
        apply_config=proxy.apply_config,
        status=proxy.reload_status,
        metrics=proxy.metrics,
        on_result=lambda result: here.results.put_nowait(result) if result else None,
        poll_interval=0.005,
    )
    watching = asyncio.create_task(here.reloads.watch())
    yield here
    watching.cancel()


async def test_a_changed_file_is_taken_up(watched: Watched, log: StringIO) -> None:
    watched.write(accounts={"other": {"refresh_tokens": {"eu": "Atzr|other-eu"}}})
    assert await watched.result() == "ok"
    assert (await call(watched.proxy.addresses[0], "GET", SELLERS)).decided["account"] == "other"
    assert watched.metric("reloads_total", result="ok") == 1
    assert '"because": "a file has changed"' in log.getvalue()


async def test_a_bad_file_changes_nothing_and_log_metric_and_status_say_so(watched: Watched, log: StringIO) -> None:
    before = await watched.status()
    watched.path.write_text("listen: nowhere\naccounts: {acme: {refresh_tokens: {eu: distinctive-secret}}}\n")
    assert await watched.result() == "failed"
    assert (await call(watched.proxy.addresses[0], "GET", SELLERS)).decided["account"] == "acme"
    assert watched.metric("reloads_total", result="failed") == 1
    assert watched.metric("last_reload_successful") == 0
    lines = [line for line in log.getvalue().splitlines() if "was rejected" in line]
    assert len(lines) == 1
    assert f"{watched.path}:1: listen[0].address: must be an address" in lines[0]
    told = (await watched.status())["configuration"]
    assert told["last_reload"]["result"] == "failed"
    assert any("listen[0].address" in problem for problem in told["problems"])
    assert told["good_since"] == before["configuration"]["good_since"]
    assert "distinctive" not in str(told)

    watched.write()
    assert await watched.result() == "unchanged"
    assert watched.metric("last_reload_successful") == 1
    assert (await watched.status())["configuration"]["problems"] == []


async def test_an_unchanged_file_is_a_no_op(watched: Watched, token_host: TokenHost) -> None:
    await call(watched.proxy.addresses[0], "GET", SELLERS)
    watched.reloads.request_reload()
    assert await watched.result() == "unchanged"
    os.utime(watched.path)
    assert await watched.result() == "unchanged"
    await call(watched.proxy.addresses[0], "GET", SELLERS)
    assert len(token_host.received) == 1
    assert watched.metric("reloads_total", result="ok") == 0
    assert watched.metric("reloads_total", result="unchanged") == 2


async def test_a_changed_secret_file_is_taken_up_and_the_tokens_serve_on(
    watched: Watched, token_host: TokenHost
) -> None:
    await call(watched.proxy.addresses[0], "GET", SELLERS)
    (watched.path.parent / "secret").write_text("client-secret-2", encoding="utf-8")
    assert await watched.result() == "ok"
    await call(watched.proxy.addresses[0], "GET", SELLERS)
    assert len(token_host.received) == 1


async def test_a_secret_file_that_is_gone_is_refused_and_waited_for(watched: Watched) -> None:
    secret = watched.path.parent / "secret"
    secret.rename(secret.with_name("elsewhere"))
    assert await watched.result() == "failed"
    secret.with_name("elsewhere").rename(secret)
    assert await watched.result() == "unchanged"


async def test_a_file_that_the_new_configuration_names_may_come_later(watched: Watched) -> None:
    accounts = {"acme": {"refresh_tokens": {"eu": {"file": "to-come"}}}}
    watched.write(accounts=accounts)
    assert await watched.result() == "failed"
    (watched.path.parent / "to-come").write_text("Atzr|acme-new", encoding="utf-8")
    assert await watched.result() == "ok"


async def test_what_kubernetes_swaps_by_a_link_is_taken_up(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    """A mounted ConfigMap: config.yaml → ..data/config.yaml, ..data → ..2026_01, the last of which is replaced."""
    mount = tmp_path / "mount"

    def fill(version: str, account: str) -> None:
        (mount / version).mkdir(parents=True)
        accounts = {account: {"refresh_tokens": {"eu": f"Atzr|{account}"}}}
        (mount / version / "config.yaml").write_text(
            yaml.safe_dump(settings_for(fake_upstream, token_host, accounts=accounts))
        )
        (mount / "..data_tmp").symlink_to(version)
        (mount / "..data_tmp").rename(mount / "..data")

    fill("..2026_01", "acme")
    (mount / "config.yaml").symlink_to("..data/config.yaml")
    proxy = await start_proxy()
    results: asyncio.Queue[Result] = asyncio.Queue()
    load = partial(load_config, str(mount / "config.yaml"), {})
    reloads = ConfigWatcher(
        load(),
        load=load,
        apply_config=proxy.apply_config,
        status=proxy.reload_status,
        metrics=proxy.metrics,
        on_result=lambda result: results.put_nowait(result) if result else None,
        poll_interval=0.005,
    )
    watching = asyncio.create_task(reloads.watch())
    fill("..2026_02", "other")
    assert await results.get() == "ok"
    assert (await call(proxy.addresses[0], "GET", SELLERS)).decided["account"] == "other"
    watching.cancel()


async def test_an_unchanged_file_leaves_the_moment_from_which_on_the_configuration_is_in_force(
    watched: Watched,
) -> None:
    before = (await watched.status())["configuration"]["good_since"]
    seen = watched.metric("last_reload_success_timestamp_seconds")
    watched.reloads.request_reload()
    assert await watched.result() == "unchanged"
    assert (await watched.status())["configuration"]["good_since"] == before
    assert (watched.metric("last_reload_success_timestamp_seconds") or 0) > (seen or 0)
    watched.write(limits={"max_queue": 9})
    assert await watched.result() == "ok"
    assert (await watched.status())["configuration"]["good_since"] > before


async def test_what_should_be_mended_is_said_once(watched: Watched, log: StringIO) -> None:
    (watched.path.parent / "secret").chmod(0o644)
    assert await watched.result() == "unchanged"
    watched.write(limits={"max_queue": 9})
    assert await watched.result() == "ok"
    lines = map(json.loads, log.getvalue().splitlines())
    said = [line["problem"] for line in lines if line["message"] == "configuration warning"]
    assert len(said) == 1
    assert "secret" in said[0]


async def test_files_that_a_refused_configuration_names_are_watched_too(watched: Watched, log: StringIO) -> None:
    """Its address cannot be listened on, which is found out after the files were read."""
    named = watched.path.parent / "named-first-there"
    named.write_text("Atzr|acme-1", encoding="utf-8")
    named.chmod(0o600)
    assert watched.proxy.admin is not None
    watched.write(
        listen=["127.0.0.1:0", watched.proxy.admin], accounts={"acme": {"refresh_tokens": {"eu": {"file": str(named)}}}}
    )
    assert await watched.result() == "failed"
    assert "Address already in use" in log.getvalue()
    named.write_text("Atzr|acme-22", encoding="utf-8")
    async with asyncio.timeout(10):
        assert await watched.result() == "failed"


async def test_the_tokens_of_accounts_that_come_are_fetched_at_once_where_warm_up_says_so(
    watched: Watched, token_host: TokenHost
) -> None:
    acme = {"acme": {"refresh_tokens": {"eu": "Atzr|acme-eu"}}}
    watched.write(warm_up=True, accounts=acme)
    assert await watched.result() == "ok"
    token_host.received.clear()
    token_host.arrived.clear()
    watched.write(warm_up=True, accounts={**acme, "other": {"refresh_tokens": {"eu": "Atzr|other-eu"}}})
    assert await watched.result() == "ok"
    async with asyncio.timeout(10):
        await token_host.arrived.wait()
    assert [b"other-eu" in received.body for received in token_host.received] == [True]


async def test_the_first_configuration_and_its_secrets_are_gone_when_another_took_its_place(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    first = config_from(settings_for(fake_upstream, token_host, health="127.0.0.1:0", warm_up=True), tmp_path)
    is_there = weakref.ref(first)
    async with start_proxy(first) as proxy:
        await proxy.has_started
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
        del first
        assert is_there() is not None
        second = {"accounts": {"acme": {"refresh_tokens": {"eu": "Atzr|acme-new"}}}, "health": "127.0.0.1:0"}
        await proxy.apply_config(config_from(settings_for(fake_upstream, token_host, **second), tmp_path))
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
        gc.collect()
        assert is_there() is None


async def test_a_listener_that_goes_takes_its_configuration_along(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    """Without the garbage collector, which leaves alone what was there when a reload ended."""

    def config(**settings: Any) -> Config:
        return config_from(settings_for(fake_upstream, token_host, **settings), tmp_path)

    async with start_proxy(config()) as proxy:
        both = config(listen=["127.0.0.1:0", "127.0.0.1:0"])
        is_there = weakref.ref(both)
        await proxy.apply_config(both)
        del both
        assert is_there() is not None
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
        gc.collect()
        gc.disable()
        try:
            await proxy.apply_config(config(limits={"max_queue": 9}))
            async with asyncio.timeout(10):
                while is_there() is not None:  # noqa: ASYNC110 - its connections are given a moment to end
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()


async def test_what_needs_a_restart_is_one_warning_and_stays_in_the_status(watched: Watched, log: StringIO) -> None:
    watched.write(store="memory", health="127.0.0.1:0", metrics={"account_on_histograms": True})
    assert await watched.result() == "unchanged"
    watched.reloads.request_reload()
    assert await watched.result() == "unchanged"
    warnings = [json.loads(line) for line in log.getvalue().splitlines() if "after a restart" in line]
    assert [line["keys"] for line in warnings] == [["health", "metrics"]]
    assert (await watched.status())["configuration"]["needs_restart"] == ["health", "metrics"]
    said = [json.loads(line)["message"] for line in log.getvalue().splitlines()]
    assert said.count("the settings that a reload can change are unchanged") == 2
    assert "the configuration is unchanged" not in said
    watched.path.write_text("listen: nowhere")
    assert await watched.result() == "failed"
    assert (await watched.status())["configuration"]["needs_restart"] == []
    watched.write()
    assert await watched.result() == "unchanged"
    assert (await watched.status())["configuration"]["needs_restart"] == []


async def test_what_is_refused_until_a_restart_is_told_with_its_line(watched: Watched) -> None:
    text = watched.path.read_text()
    watched.path.write_text(text.replace("lwa: http://", "lwa: http://127.0.0.1:9/not-"))
    line = 1 + text.splitlines().index(next(line for line in text.splitlines() if "lwa:" in line))
    assert await watched.result() == "failed"
    (problem,) = (await watched.status())["configuration"]["problems"]
    assert problem == f"{watched.path}:{line}: endpoints.lwa: cannot change while the proxy runs: restart it"


async def test_a_file_that_is_still_being_written_is_left_alone(watched: Watched) -> None:
    good = watched.path.read_text()
    for size in range(0, len(good), 20):
        watched.path.write_text(good[:size])
        await asyncio.sleep(0)  # as long as nothing stays as it is
    watched.path.write_text(good + "limits: {max_queue: 9}\n")
    assert await watched.result() == "ok"
    assert watched.metric("reloads_total", result="failed") == 0


async def test_files_that_hang_delay_nobody_and_are_given_up(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "READ_TIMEOUT", 0.05)
    release = threading.Event()

    def hang() -> Loaded:
        release.wait(30)
        raise AssertionError("nobody waits for this any more")

    watched.reloads._load = hang
    watched.reloads.request_reload()
    assert (await call(watched.proxy.addresses[0], "GET", SELLERS)).status == 200
    assert await watched.result() == "failed"
    release.set()
    assert "could not be read" in (await watched.status())["configuration"]["problems"][0]


async def test_a_fault_of_the_proxys_own_is_a_failed_reload_and_the_watch_goes_on(watched: Watched) -> None:
    def fail() -> Loaded:
        raise RuntimeError("what the log must not quote")

    load, watched.reloads._load = watched.reloads._load, fail
    watched.reloads.request_reload()
    assert await watched.result() == "failed"
    assert "quote" not in str(await watched.status())
    watched.reloads._load = load
    watched.reloads.request_reload()
    assert await watched.result() == "unchanged"


async def test_what_was_read_in_vain_is_let_go_without_the_garbage_collector(watched: Watched) -> None:
    errors: list[weakref.ref[ConfigError]] = []

    def refuse() -> Loaded:
        error = ConfigError([Problem("listen", "is refused")])
        errors.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    watched.reloads._load = refuse
    watched.reloads._gc_paused = nullcontext()  # type: ignore[assignment]  # it would collect what is young
    gc.disable()
    try:
        assert await watched.reloads.reload("a test") == "failed"
        await asyncio.sleep(0)  # the loop lets go of the step that it was in
        assert errors[0]() is None
    finally:
        gc.enable()


async def test_ten_reloads_under_load_half_of_them_broken_fail_no_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(10, 5, quiet_for=1.0) == 0, capsys.readouterr().out


def test_looking_at_many_files_is_cheap_and_never_fails(tmp_path: Path) -> None:
    assert file_signatures([tmp_path / "absent", Path("\0")]) == (None, None)
    (tmp_path / "file").write_text("x")
    first = file_signatures([tmp_path / "file"])
    (tmp_path / "new").write_text("y")
    (tmp_path / "new").rename(tmp_path / "file")
    assert file_signatures([tmp_path / "file"]) != first


async def test_a_configuration_in_force_says_all_its_files(tmp_path: Path) -> None:
    for name in ("secret", "token", "cert.pem", "key.pem", "ca.pem"):
        (tmp_path / name).write_text("x")
    settings = {
        "listen": {"address": "127.0.0.1:0", "tls": {"certificate": str(tmp_path / "cert.pem"), "key": "key.pem"}},
        "applications": {"main": {"client_id": "client", "client_secret": {"file": "secret"}}},
        "pool": {"ca_file": str(tmp_path / "ca.pem")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    environ = {"SP_API_REFRESH_TOKEN_EU_FILE": str(tmp_path / "token")}
    loaded = load_config(str(tmp_path / "config.yaml"), environ)
    assert isinstance(loaded.config, Config)
    assert {file.name for file in loaded.files} == {"config.yaml", "secret", "token", "cert.pem", "key.pem", "ca.pem"}
