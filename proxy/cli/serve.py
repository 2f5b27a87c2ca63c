"""`serve`: run the proxy."""

import argparse
import os
from collections.abc import Mapping

from proxy.cli import dependencies
from proxy.cli.common import FAILED, Command, print_err
from proxy.cli.configuration import config_path, load, reports_config_errors
from proxy.cli.options import add_config_flags
from proxy.cli.runner import logging_to, run, serve_until_signal
from proxy.observability import logging
from proxy.server import hardening

_CREDENTIAL_VARIABLES = ("SP_API_REFRESH_TOKEN", "LWA_APP_ID", "LWA_CLIENT_ID", "LWA_CLIENT_SECRET")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument(
        "--demo",
        action="store_true",
        help="if neither a file nor the environment gives credentials, run against the built-in simulator",
    )


@reports_config_errors
def _serve(options: argparse.Namespace) -> int:
    if options.demo and config_path(options) is None and not _has_credentials(os.environ):
        from proxy.cli.demo import demo  # noqa: PLC0415 - brings the simulator along

        return run(demo(options))
    environ = dict(os.environ)  # a copy from the start: a reload resolves ${VARIABLES} as the start did
    loaded = load(options, environ)
    wrong = dependencies.wrong_versions([dependencies.REDIS_RANGE]) if loaded.config.store is not None else []
    if wrong:
        print_err("\n".join(wrong))
        return FAILED
    hardening.harden()
    hardening.overwrite_environ(hardening.scrub_environment(os.environ, loaded.config))
    with logging_to(loaded.config.log, loaded.config.audit):
        for problem in loaded.warnings:
            logging.LOGGER.warning("configuration warning", extra=logging.extra(problem=str(problem)))
        serving = serve_until_signal(loaded, lambda: load(options, environ), is_demo=options.demo)
        del loaded  # so that its secrets are not kept after a reload
        return run(serving)


def _has_credentials(environ: Mapping[str, str]) -> bool:
    names = (*_CREDENTIAL_VARIABLES, "SP_API_PROXY_ACCOUNTS", "SP_API_PROXY_APPLICATIONS")
    return any(value and name.startswith(names) for name, value in environ.items())


COMMANDS = {"serve": Command("sp-api-proxy serve --config config.yaml", _add_flags, _serve)}
