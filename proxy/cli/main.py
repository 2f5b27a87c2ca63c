"""What can be done from the command line, and with which exit codes?

0: done. 1: a failure while running (an address in use). 2: wrong usage or configuration. 130 and 143: ended by SIGINT
or SIGTERM before the requests in flight were finished; 143 also where /quitquitquit ended it so.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from multidict import CIMultiDict, CIMultiDictProxy

from proxy import __version__
from proxy.amazon.catalog import rebuild
from proxy.amazon.operations import Operation, OperationTable, load_table
from proxy.cli import admin_client, dependencies, live_check, tail
from proxy.cli.authorize import add_flags, authorize
from proxy.cli.check_report import Progress, Report, as_json, as_text, select
from proxy.cli.options import (
    ADMIN_CLIENT_FLAGS,
    REQUEST_FLAGS,
    ROTATION_FLAGS,
    add_config_flags,
    address,
    day,
    duration,
    header,
    settings_of,
    whole_number,
)
from proxy.cli.rotate_secret import RotationFailed, rotate_client_secret
from proxy.config import (
    REGIONS,
    Address,
    Config,
    ConfigError,
    Loaded,
    Problem,
    Region,
    admin_addresses,
    applications_config,
    load_config,
)
from proxy.config.environment import CONFIG_VARIABLE
from proxy.config.messages import join, suggest
from proxy.config.model import Log
from proxy.config.schema import json_schema
from proxy.errors import ProxyError
from proxy.observability import logging
from proxy.request import authorization
from proxy.request.authentication import UNKNOWN_PEER, CallerAuthenticator
from proxy.request.header_cache import HeaderBlock
from proxy.request.routing import describe_route, resolve
from proxy.request.tokens import placeholder_endpoint
from proxy.request.tokens.placeholder_endpoint import TokenEndpoint
from proxy.request.upstream import connector
from proxy.request.upstream.request_headers import check_body, end_to_end_headers
from proxy.request.validation import AllowedHosts, validate
from proxy.server import hardening, sockets, systemd
from proxy.server.reload import ConfigWatcher, Result, file_signatures
from proxy.server.runtime import RunningProxy, start_proxy
from proxy.server.sockets import CannotListen

OK, FAILED, USAGE = 0, 1, 2
INTERRUPTED = 128 + signal.SIGINT
DEFAULT_CONFIG_FILE = "config.yaml"  # the Makefile's; no command takes a file that nobody named
FORCED_EXIT_DELAY = 1.0  # seconds between a second signal and the end of the process, whatever still hangs

T = TypeVar("T")

_EXIT_CODES = "Exit codes: 0 done, 1 failure while running, 2 wrong usage or configuration"

_CREDENTIAL_VARIABLES = ("SP_API_REFRESH_TOKEN", "LWA_APP_ID", "LWA_CLIENT_ID", "LWA_CLIENT_SECRET")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["simulate"]:
        # Apart from the rest, and with options of its own: it shares no code with the proxy.
        from proxy import simulator  # noqa: PLC0415 - only this command needs it

        return simulator.main(arguments[1:])
    if arguments[:2] == ["operations", "rebuild"]:
        return rebuild.main(arguments[2:])
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return USAGE
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except ConfigError as exc:
        print_err(f"{len(exc.problems)} problem{'s'[: len(exc.problems) != 1]} in the configuration:")
        for problem in exc.problems:
            print_err(f"  {problem}")
        if _config_path(options) is None and _has_unnamed_file(exc.problems):
            print_err(f"{DEFAULT_CONFIG_FILE} lies here: --config {DEFAULT_CONFIG_FILE}")
        return USAGE
    except KeyboardInterrupt:
        print_err("sp-api-proxy: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # `sp-api-proxy operations | head`: nobody reads any more, which is no failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    return code


def _has_unnamed_file(problems: Sequence[Problem]) -> bool:
    """Return whether the file that is taken by `make run` lies here, where what it would say is missing."""
    missing = [problem for problem in problems if problem.key in {"accounts", "applications"}]
    return any(problem.message.startswith("is missing") for problem in missing) and Path(DEFAULT_CONFIG_FILE).is_file()


def print_out(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")


def print_err(text: str) -> None:
    sys.stderr.write(f"{text}\n")


class _Parser(argparse.ArgumentParser):
    """Ends wrong usage with one line that says where help is."""

    def error(self, message: str) -> NoReturn:
        print_err(f"sp-api-proxy: {message} (see {self.prog} --help)")
        raise SystemExit(USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sp-api-proxy",
        description="A local authenticating reverse proxy for Amazon's Selling Partner API.",
        epilog=f"Try it without credentials: sp-api-proxy serve --demo. {_EXIT_CODES}.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sp-api-proxy {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_serve,
        _add_check,
        _add_explain,
        _add_operations,
        _add_schema,
        _add_simulate,
        _add_rotate,
        _add_authorize,
        _add_wait,
        _add_healthcheck,
        _add_shutdown,
        _add_requests,
        _add_version,
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str) -> Any:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _config_path(options: argparse.Namespace) -> str | None:
    path: str | None = options.config or os.environ.get(CONFIG_VARIABLE)
    return path


@cache
def _table() -> OperationTable:
    return load_table()


def _load(options: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Loaded:
    environ = os.environ if environ is None else environ
    loaded = load_config(options.config or environ.get(CONFIG_VARIABLE), environ, settings_of(options))
    return _checked(loaded)


def _checked(loaded: Loaded) -> Loaded:
    """Return the same, where it also holds against the operation table and this machine; raise ConfigError."""
    config = loaded.config
    found = [*authorization.validate_policies(config, _table()), *sockets.validate(config), *connector.validate(config)]
    if found:
        raise ConfigError(loaded.with_locations(found), loaded.files)
    return loaded


# serve


def _add_serve(commands: Any) -> None:
    parser = _command(commands, "serve", _serve, "run the proxy", "sp-api-proxy serve --config config.yaml")
    add_config_flags(parser)
    parser.add_argument(
        "--demo",
        action="store_true",
        help="where neither a file nor the environment gives credentials, run against the built-in simulator",
    )


def _serve(options: argparse.Namespace) -> int:
    if options.demo and _config_path(options) is None and not _has_credentials(os.environ):
        return _run(_demo(options))
    environ = dict(os.environ)  # as it was at the start: a reload resolves references as the start did
    loaded = _load(options, environ)
    wrong = dependencies.wrong_versions([dependencies.REDIS_RANGE]) if loaded.config.store is not None else []
    if wrong:
        print_err("\n".join(wrong))
        return FAILED
    hardening.harden()
    hardening.overwrite_environ(hardening.scrub_environment(os.environ, loaded.config))
    with _logging(loaded.config.log, loaded.config.audit):
        for problem in loaded.warnings:
            logging.LOGGER.warning("a setting should be mended", extra=logging.extra(problem=str(problem)))
        serving = _serve_until_signal(loaded, lambda: _load(options, environ), is_demo=options.demo)
        del loaded  # its secrets are to be kept no longer than it is in force
        return _run(serving)


@contextmanager
def _logging(log: Log, audit: str | None) -> Iterator[None]:
    """Set up the logs, written by threads of their own, and see to it in the end that nothing is left to write."""
    logging.set_up(log.level, log.format)
    behind = logging.start_background()
    try:
        if audit is not None:
            behind.append(_audit(audit))
        yield
    finally:
        for writer in behind:
            writer.flush()


def _audit(where: str) -> logging.BackgroundHandler:
    try:
        return logging.set_up_audit(where)
    except OSError as exc:
        raise ConfigError([Problem("audit", f"{where}: {sockets.describe_error(exc)}")]) from exc


def _has_credentials(environ: Mapping[str, str]) -> bool:
    names = (*_CREDENTIAL_VARIABLES, "SP_API_PROXY_ACCOUNTS", "SP_API_PROXY_APPLICATIONS")
    return any(value and name.startswith(names) for name, value in environ.items())


def _run(main_task: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where it exists, and return what it returns."""
    try:
        import uvloop  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        return asyncio.run(main_task)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main_task)


async def _serve_until_signal(
    loaded: Loaded,
    load: Callable[[], Loaded],
    after_start: Callable[[RunningProxy], None] | None = None,
    *,
    is_demo: bool = False,
) -> int:
    """Serve until SIGTERM, SIGINT or /quitquitquit; a second signal ends it at once. SIGHUP has `load` called."""
    seen = file_signatures(loaded.files)
    hardening.freeze_gc()
    told, service = SignalWaiter(), systemd.Service(os.environ.pop("NOTIFY_SOCKET", ""))
    try:
        async with start_proxy(loaded.config) as proxy:
            reloads = ConfigWatcher(
                loaded,
                load=load,
                hand_over=proxy.apply_config,
                reloading=proxy.reload_status,
                metrics=proxy.metrics,
                note=partial(_note_reload, service, proxy.has_started),
                seen=seen,
            )
            del loaded  # see _serve
            told.on_hangup, told.proxy = reloads.request_reload, proxy
            logging.LOGGER.info(
                "serving",
                extra=logging.extra(listen=list(proxy.addresses), admin=proxy.admin, health=proxy.health),
            )
            proxy.has_started.add_done_callback(partial(_note_start, service))
            if after_start:
                after_start(proxy)
            watching = asyncio.create_task(reloads.watch(), name="reload")
            because = await told.wait(proxy.quit)
            told.on_hangup = _is_ending
            watching.cancel()
            service.notify_stopping()
            logging.LOGGER.info("shutting down", extra=logging.extra(because=because))
    except CannotListen as exc:
        print_err(f"sp-api-proxy: {exc}")
        if is_demo:  # as `make run` starts it
            print_err('With make: make run ARGS="--listen 127.0.0.1:8081 --admin 127.0.0.1:9091"')
        return FAILED
    logging.LOGGER.info("ended", extra=logging.extra(cut_off=proxy.shutdown.aborted))
    return 128 + told.number if proxy.shutdown.aborted or proxy.shutdown.immediate.is_set() else OK


def _note_start(service: systemd.Service, start: "asyncio.Task[None]") -> None:
    if not start.cancelled():
        service.notify_ready()


def _note_reload(service: systemd.Service, start: "asyncio.Task[None]", result: Result | None) -> None:
    if not start.done():
        return  # ready is what it becomes with the last token that `warm_up` waits for
    if result is None:
        service.notify_reloading()
    else:
        service.notify_ready("the newest configuration was refused; its mistakes are in the log" * (result == "failed"))


def _is_ending() -> None:
    logging.LOGGER.warning("SIGHUP changes nothing any more: the process is shutting down")


class SignalWaiter:
    """Waits for the first signal; the second one ends the process without waiting for anything, the third at once."""

    def __init__(self) -> None:
        self._first_signal = asyncio.Event()
        self.number: int = signal.SIGTERM
        self.on_hangup: Callable[[], None] = lambda: None
        self.proxy: RunningProxy | None = None
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self.on_signal, number)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda told, _: loop.call_soon_threadsafe(self.on_signal, told))
        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, self.on_sighup)

    def on_sighup(self) -> None:
        self.on_hangup()  # which is another one later

    async def wait(self, quit_: asyncio.Event) -> str:
        """Wait for a signal, or for `quit_`; return which of them it was."""
        waits = [asyncio.create_task(event.wait()) for event in (self._first_signal, quit_)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not self._first_signal.is_set():
            self._first_signal.set()  # so that a signal is the second thing to be told
            return "/quitquitquit"
        return signal.Signals(self.number).name

    def on_signal(self, number: int) -> None:
        if not self._first_signal.is_set():
            self.number = number
            self._first_signal.set()
        elif self.proxy is None or self.proxy.shutdown.immediate.is_set():
            exit_now(128 + number, self.proxy)
        else:
            self.number = number
            logging.LOGGER.warning("told to end a second time: requests in flight are not waited for")
            self.proxy.shutdown.immediate.set()
            self._loop.call_later(FORCED_EXIT_DELAY, exit_now, 128 + number, self.proxy)


def exit_now(code: int, proxy: RunningProxy | None) -> None:
    """End the process where it stands, whatever still hangs, with the last line in its log."""
    logging.LOGGER.warning("ended", extra=logging.extra(cut_off=proxy.shutdown.aborted if proxy is not None else 0))
    logging.flush()
    os._exit(code)


# The demo: the proxy beside a simulator of Amazon.

_DEMO_SELLER = "demo"


async def _demo(options: argparse.Namespace) -> int:
    from proxy.simulator import Simulator  # noqa: PLC0415 - only the demo needs it

    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(Simulator())
        environ = demo_environment(os.environ, simulator)

        def load() -> Loaded:
            return _checked(load_config(None, environ, settings_of(options)))

        loaded = load()
        with _logging(loaded.config.log, loaded.config.audit):
            return await _serve_until_signal(loaded, load, _welcome, is_demo=True)


def demo_environment(environ: Mapping[str, str], simulator: Any) -> dict[str, str]:
    """Return the environment with the simulator's addresses and its made-up credentials added."""
    names = (*REGIONS, "lwa", "documents")
    endpoints = {f"SP_API_PROXY_ENDPOINTS_{name.upper()}": simulator.endpoints[name] for name in names}
    account = f"SP_API_PROXY_ACCOUNTS_{_DEMO_SELLER.upper()}_REFRESH_TOKENS_"
    tokens = {account + region.upper(): f"Atzr|demo-{region}" for region in REGIONS}
    application = {
        "LWA_APP_ID": "amzn1.application-oa2-client.simulator",
        "LWA_CLIENT_SECRET": "amzn1.oa2-cs.v1.simulator",
    }
    return {**environ, **endpoints, **tokens, **application}


def _welcome(proxy: RunningProxy) -> None:
    # All addresses are none that a request could be sent to: this machine's own is one of them.
    address = proxy.addresses[0].replace("0.0.0.0:", "127.0.0.1:")
    curl = (
        f"curl -si --unix-socket {address.removeprefix('unix:')} http://localhost"
        if address.startswith("unix:")
        else (f"curl -si http://{address}")
    )
    end = f"How it goes is at http://{proxy.admin}/ in a browser. " if proxy.admin else ""
    # Written at once: a line of the log, which another thread writes, must not come between.
    print_out(
        f"""\
No credentials were given, so the proxy runs against a simulator of Amazon on this machine. Try:

  # an ordinary call
  {curl}/sellers/v1/marketplaceParticipations -H 'x-sp-region: eu'
  # a grantless one
  {curl}/notifications/v1/destinations -H 'x-sp-region: eu'
  # one that needs a Restricted Data Token
  {curl}/orders/v0/orders/902-1845936-5435065/address -H 'x-sp-region: eu'

{end}Ctrl-C ends both."""
    )
    sys.stdout.flush()


# wait, healthcheck, shutdown: about a proxy that runs


def _add_admin_flags(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> Any:
    parser = _command(commands, name, run, text, example)
    parser.add_argument(
        "--url",
        metavar="URL",
        type=address,
        help="the proxy's admin or health address, such as http://127.0.0.1:9090; otherwise that of its configuration",
    )
    add_config_flags(parser, ADMIN_CLIENT_FLAGS)
    return parser


def _add_wait(commands: Any) -> None:
    parser = _add_admin_flags(
        commands, "wait", _wait, "wait until a proxy is ready", "sp-api-proxy wait --timeout 30s && my-job"
    )
    parser.add_argument(
        "--timeout", metavar="TIME", type=duration, default=30.0, help="how long at most, such as 30s or 2m (30s)"
    )


def _add_healthcheck(commands: Any) -> None:
    parser = _add_admin_flags(
        commands, "healthcheck", _healthcheck, "ask a proxy once whether it is ready", "sp-api-proxy healthcheck"
    )
    parser.add_argument("--live", action="store_true", help="ask whether it is alive, ready or not")


def _add_shutdown(commands: Any) -> None:
    _add_admin_flags(
        commands,
        "shutdown",
        _shutdown,
        "have a proxy finish its requests and end (its setting quit must be true)",
        "sp-api-proxy shutdown --url http://127.0.0.1:9090",
    )


def _add_requests(commands: Any) -> None:
    parser = _add_admin_flags(
        commands,
        "requests",
        _requests,
        "follow the requests that a proxy answers, as tail -f does",
        "sp-api-proxy requests --account acme --failed",
    )
    tail.add_flags(parser)


def _requests(options: argparse.Namespace) -> int:
    try:
        request_filter = tail.filter_from(options)
    except ValueError as exc:
        raise ConfigError([Problem("--status", str(exc), "command line")]) from None
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    with_colour = is_terminal and not os.environ.get("NO_COLOR")
    return tail.follow(admin_address(options), request_filter, sys.stdout, print_err, with_colour=with_colour)


def _wait(options: argparse.Namespace) -> int:
    return report_response(admin_client.wait_until_ready(admin_address(options), options.timeout))


def _healthcheck(options: argparse.Namespace) -> int:
    return report_response(admin_client.request(admin_address(options), "GET", "/livez" if options.live else "/readyz"))


def _shutdown(options: argparse.Namespace) -> int:
    # The health address ends nothing.
    return report_response(admin_client.request(admin_address(options), "POST", "/quitquitquit"))


def report_response(response: admin_client.AdminResponse) -> int:
    (print_out if response.ok else print_err)(response.text)
    return OK if response.ok else FAILED


def admin_address(options: argparse.Namespace) -> Address:
    if options.url is not None:
        asked: Address = options.url
        return asked
    addresses = admin_addresses(_config_path(options), os.environ, settings_of(options))
    if not addresses or not (addresses[0].path or addresses[0].port):
        raise ConfigError([Problem("admin", "says no address to ask at: give --url, or set admin or health")])
    return addresses[0]


# rotate


def _add_rotate(commands: Any) -> None:
    parser = _command(
        commands,
        "rotate",
        _rotate,
        "ask Amazon for a new client secret of an application",
        "sp-api-proxy rotate main --config config.yaml",
    )
    parser.add_argument("application", metavar="APPLICATION", help="its name in the configuration")
    parser.add_argument("--region", choices=REGIONS, default="na", help="whose host to ask (na, as Amazon's page does)")
    add_config_flags(parser, ROTATION_FLAGS)


def _rotate(options: argparse.Namespace) -> int:
    loaded = _load(options)
    name, applications = options.application, loaded.config.applications
    if name not in applications:
        print_err(f"sp-api-proxy: no application {name} in the configuration; {suggest(applications, name)}")
        return USAGE
    try:
        _run(_rotated(loaded.config, name, options.region))
    except RotationFailed as exc:
        print_err(f"sp-api-proxy: {exc}")
        return FAILED
    origin = loaded.origins.get(("applications", name, "client_secret"), "the configuration")
    print_out(f"Amazon makes a new client secret for {name}. It comes by a message to the SQS queue registered for it.")
    print_out(f"Put it where the old one is ({origin}) within seven days: so long the old one works.")
    print_out(
        "A proxy that reads it from a file takes it up by itself; one that has it from a variable needs a restart."
    )
    print_out("Then write the day into rotated_at.")
    return OK


async def _rotated(config: Config, name: str, region: Region) -> int:
    await rotate_client_secret(config, name, region)
    return OK


# authorize


def _add_authorize(commands: Any) -> None:
    parser = _command(
        commands,
        "authorize",
        _authorize,
        "get a refresh token: a selling partner consents at Amazon, and a file keeps it",
        "sp-api-proxy authorize --marketplace DE --application-id amzn1.sp.solution.x --output secrets/acme_eu\n"
        "a private application: sp-api-proxy authorize --self-authorized --marketplace DE --output secrets/acme_eu",
    )
    add_flags(parser)
    add_config_flags(parser)


def _authorize(options: argparse.Namespace) -> int:
    config = applications_config(_config_path(options), os.environ, settings_of(options))
    if not config.applications:
        missing = "is missing: give a client_id and client_secret, or set LWA_APP_ID and LWA_CLIENT_SECRET"
        raise ConfigError([Problem("applications", missing)])
    hardening.harden()
    hardening.scrub_environment(os.environ, config)  # a browser gets none of them
    # Where there is no screen, a browser may be one for the terminal, which would take it over.
    is_desktop = sys.platform in {"darwin", "win32"} or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return authorize(options, config, has_screen=is_desktop and sys.stdout.isatty(), run=_run)


# check, schema, explain


def _add_check(commands: Any) -> None:
    parser = _command(
        commands,
        "check",
        _check,
        "check the configuration and show what is in force, secrets hidden; with --live, see whether it works",
        "sp-api-proxy check --config config.yaml\n         sp-api-proxy check --live --account acme --region eu",
    )
    add_config_flags(parser)
    parser.add_argument("--json", action="store_true", help="JSON, for programs")
    asking = parser.add_argument_group(
        "asking Amazon",
        "Every account and region: an exchange of its refresh token, a call of getMarketplaceParticipations, and a "
        "Restricted Data Token where data_elements are set. What works, what does not, and what to do. "
        "Exit code 0 where all works, 1 where something does not, 2 where the configuration is wrong.",
    )
    asking.add_argument("--live", action="store_true", help="ask Login with Amazon and Amazon, not only the files")
    asking.add_argument("--account", metavar="NAME", action="append", default=[], help="this one; may be repeated")
    asking.add_argument("--region", choices=REGIONS, action="append", default=[], help="this one; may be repeated")
    asking.add_argument(
        "--call",
        metavar="PATH",
        default=live_check.CALL,
        help="another path to GET, such as '/vendor/orders/v1/purchaseOrders?limit=1': vendors have no participations",
    )


def _check(options: argparse.Namespace) -> int:
    if not options.live and (options.account or options.region or options.call != live_check.CALL):
        print_err("sp-api-proxy: --account, --region and --call belong to --live")
        return USAGE
    loaded = _load(options)
    if options.live:
        return _check_live(options, loaded)
    rows = list(loaded.rows())
    if options.json:
        print_out(json.dumps([{"key": key, "value": value, "from": origin} for key, value, origin in rows], indent=2))
        return OK
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        print_out(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}")
    print_out()
    for problem in loaded.warnings:
        print_err(f"warning: {problem}")
    print_out(f"The configuration is good: {_plural(len(loaded.config.accounts), 'account')}.")
    return OK


def _check_live(options: argparse.Namespace, loaded: Loaded) -> int:
    config = loaded.config
    unknown = [name for name in options.account if name not in config.accounts]
    wanted = select(config, options.account, options.region)
    if unknown or not wanted:
        print_err(f"sp-api-proxy: no account {', '.join(unknown) or 'with a refresh token there'} in the configuration")
        return USAGE
    if not live_check.is_callable(options.call, _table()):
        print_err("sp-api-proxy: --call must be the path of a GET in `operations`, neither restricted nor grantless")
        return USAGE
    for problem in loaded.warnings:
        print_err(f"warning: {problem}")
    hardening.harden()
    logging.LOGGER.setLevel("CRITICAL")  # what it would say is in the report
    report = Report(wanted)
    progress = Progress(report)
    try:
        _run(run_live_check(config, report, options.call, progress))
    finally:
        progress.clear()
    print_out(as_json(report) if options.json else as_text(report))
    if not report.is_complete:
        return INTERRUPTED
    return OK if report.ok else FAILED


async def run_live_check(config: Config, report: Report, call: str, progress: Progress) -> None:
    telling = asyncio.create_task(progress.run(), name="progress")
    # Ctrl-C cancels this: what was found till then is shown.
    with suppress(asyncio.CancelledError):
        await live_check.run_checks(config, report, call=call)
    telling.cancel()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _add_schema(commands: Any) -> None:
    _command(
        commands,
        "schema",
        _schema,
        "print the JSON Schema of the configuration, for editors",
        "sp-api-proxy schema > schema.json",
    )


def _schema(_: argparse.Namespace) -> int:
    print_out(json.dumps(json_schema(), indent=2))
    return OK


def _add_explain(commands: Any) -> None:
    parser = _command(
        commands,
        "explain",
        _explain,
        "say what the proxy would do with a request and why, without sending it",
        "sp-api-proxy explain GET '/orders/v0/orders?MarketplaceIds=A1PA6795UKMFR9' -H 'x-sp-account: acme'",
    )
    parser.add_argument("method", metavar="METHOD", help="GET, HEAD, POST, PUT, PATCH or DELETE")
    parser.add_argument("target", metavar="TARGET", help="path and query, as the app would send them")
    parser.add_argument(
        "-H",
        dest="headers",
        metavar="'NAME: VALUE'",
        type=header,
        action="append",
        default=[],
        help="a header of the request; may be repeated",
    )
    parser.add_argument(
        "--listener",
        type=whole_number,
        default=0,
        metavar="N",
        help="which listener it comes in by; 0 is the first (0)",
    )
    parser.add_argument("--caller", metavar="NAME", help="which of the callers sends it, instead of its key")
    parser.add_argument("--json", action="store_true", help="JSON, for programs")
    add_config_flags(parser, REQUEST_FLAGS)


def _explain(options: argparse.Namespace) -> int:
    config = _load(options).config
    if options.listener >= len(config.listen):
        listeners = join(f"{index} ({one.address})" for index, one in enumerate(config.listen))
        print_err(f"sp-api-proxy: --listener {options.listener}: no such listener; there is {listeners}")
        return USAGE
    if options.caller is not None and options.caller not in config.callers:
        known = suggest(config.callers, options.caller)
        print_err(f"sp-api-proxy: --caller {options.caller}: no such caller in the configuration; {known}")
        return USAGE
    try:
        decided = explain_request(options, config)
    except ProxyError as error:
        decided = {"refused": f"{error.status} {error.code}", "because": error.message, "do": error.hint}
    if options.json:
        print_out(json.dumps(decided, indent=2))
    else:
        width = max(map(len, decided))
        for name, text in decided.items():
            print_out(f"{name:<{width}}  {text}")
    return FAILED if "refused" in decided else OK


def explain_request(options: argparse.Namespace, config: Config) -> Mapping[str, str]:
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in options.headers:
        headers.add(name, value)
    headers.setdefault("Host", "localhost")
    listener = config.listen[options.listener]
    sent = CIMultiDictProxy(headers)
    validated = validate(options.method, options.target, sent, AllowedHosts.from_config(listener, config))
    check_body(options.method, HeaderBlock(sent))
    table = load_table()
    own = TokenEndpoint(table, answers_rdt=config.local_rdt).match(validated.target)
    if options.method == "POST" and own == placeholder_endpoint.LWA_TOKEN:
        return placeholder_endpoint.describe_token_request(
            own, validated.target
        )  # whoever asks: no key is needed for that
    caller = options.caller or CallerAuthenticator(config).authenticate(sent, UNKNOWN_PEER, listener)
    policy = authorization.build_policies(config, options.listener)[caller]
    if options.method == "POST" and own:
        return placeholder_endpoint.describe_token_request(own, validated.target)
    decided = describe_route(resolve(options.method, validated, sent, listener, config, table, policy))
    kept = end_to_end_headers(options.method, sent)
    dropped = [name for name in sent if name not in kept]
    who = {"caller": caller} if caller else {}
    return {**who, **decided, "headers kept": ", ".join(kept) or "none", "headers dropped": ", ".join(dropped)}


# operations


def _add_operations(commands: Any) -> None:
    parser = _command(
        commands,
        "operations",
        _operations,
        "list the operations the proxy knows",
        "sp-api-proxy operations orders --restricted\n"
        "maintainers: sp-api-proxy operations rebuild MODELS_DIR (see its --help)",
    )
    parser.add_argument("text", nargs="?", default="", help="part of a name or a path")
    parser.add_argument("--restricted", action="store_true", help="only those that need a Restricted Data Token")
    parser.add_argument("--grantless", action="store_true", help="only those without a selling partner")
    parser.add_argument("--removed-by", metavar="YYYY-MM-DD", type=day, help="only those Amazon removes by that day")
    parser.add_argument("--json", action="store_true", help="JSON, for programs")


def _operations(options: argparse.Namespace) -> int:
    chosen = list(_matches_filter(options))
    if options.json:
        print_out(json.dumps([_as_dict(operation) for operation in chosen], indent=2))
        return OK
    for operation in chosen:
        plan = f"{operation.rate:g}/s burst {operation.burst}" if operation.rate else "no known plan"
        columns = f"{operation.name:<58} {operation.method:<6} {operation.template:<90} {plan:<22} {_marks(operation)}"
        print_out(columns.rstrip())
    print_err(f"{len(chosen)} operations")
    return OK


def _matches_filter(options: argparse.Namespace) -> Iterator[Operation]:
    text = options.text.lower()
    for operation in load_table():
        if text not in operation.name.lower() and text not in operation.template.lower():
            continue
        if (options.restricted and not operation.restricted) or (options.grantless and not operation.scope):
            continue
        if options.removed_by and not (operation.removal_date and operation.removal_date <= options.removed_by):
            continue
        yield operation


def _marks(operation: Operation) -> str:
    marks = ["restricted"] * operation.restricted
    marks += ["grantless"] * bool(operation.scope)
    marks += [f"removed {operation.removal_date}"] * bool(operation.removal_date)
    return ", ".join(marks)


def _as_dict(operation: Operation) -> dict[str, Any]:
    return {name: getattr(operation, name) for name in ("name", *operation.__dataclass_fields__) if name != "_"}


# simulate (for --help alone; it runs before this parser), version


def _add_simulate(commands: Any) -> None:
    _command(
        commands,
        "simulate",
        lambda _: OK,
        "run a local SP-API and Login with Amazon for tests",
        "sp-api-proxy simulate --help",
    )


def _add_version(commands: Any) -> None:
    _command(commands, "version", _version, "print the version", "sp-api-proxy version")


def _version(_: argparse.Namespace) -> int:
    print_out(f"sp-api-proxy {__version__}")
    return OK


if __name__ == "__main__":
    raise SystemExit(main())
