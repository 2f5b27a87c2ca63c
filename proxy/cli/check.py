"""`check`: show the configuration in force; with --live, test it at Login with Amazon and Amazon."""

import argparse
import asyncio
import json
from contextlib import suppress

from proxy.cli import live_check
from proxy.cli.check_report import Progress, Report, as_json, as_text, select
from proxy.cli.common import FAILED, INTERRUPTED, OK, USAGE, Command, print_err, print_out
from proxy.cli.configuration import load, operation_table, reports_config_errors
from proxy.cli.options import add_config_flags
from proxy.cli.runner import run
from proxy.config import REGIONS, Config, Loaded
from proxy.observability.logging import LOGGER
from proxy.server import hardening


def _add_flags(parser: argparse.ArgumentParser) -> None:
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


@reports_config_errors
def _check(options: argparse.Namespace) -> int:
    if not options.live and (options.account or options.region or options.call != live_check.CALL):
        print_err("sp-api-proxy: --account, --region and --call belong to --live")
        return USAGE
    loaded = load(options)
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
    targets = select(config, options.account, options.region)
    if unknown or not targets:
        print_err(f"sp-api-proxy: no account {', '.join(unknown) or 'with a refresh token there'} in the configuration")
        return USAGE
    if not live_check.is_callable(options.call, operation_table()):
        print_err("sp-api-proxy: --call must be the path of a GET in `operations`, neither restricted nor grantless")
        return USAGE
    for problem in loaded.warnings:
        print_err(f"warning: {problem}")
    hardening.harden()
    LOGGER.setLevel("CRITICAL")  # the report has what would be logged
    report = Report(targets)
    progress = Progress(report)
    try:
        run(run_live_check(config, report, options.call, progress))
    finally:
        progress.clear()
    print_out(as_json(report) if options.json else as_text(report))
    if not report.is_complete:
        return INTERRUPTED
    return OK if report.ok else FAILED


async def run_live_check(config: Config, report: Report, call: str, progress: Progress) -> None:
    telling = asyncio.create_task(progress.run(), name="progress")
    # Ctrl-C cancels this; the results so far are shown.
    with suppress(asyncio.CancelledError):
        await live_check.run_checks(config, report, call=call)
    telling.cancel()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


COMMANDS = {
    "check": Command(
        "sp-api-proxy check --config config.yaml\n         sp-api-proxy check --live --account acme --region eu",
        _add_flags,
        _check,
    )
}
