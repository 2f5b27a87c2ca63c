"""`rotate`: ask Amazon for a new client secret of an application (DOC "Rotate your application's client secret").

Amazon answers 204 and nothing else: the new secret comes by a message to the SQS queue that was registered for it. The
old one works for seven days more.
"""

import argparse
import asyncio
import time

from proxy.amazon import lwa
from proxy.amazon.error_response import parse_error
from proxy.amazon.headers import credential_headers
from proxy.cli.common import FAILED, OK, USAGE, Command, print_err, print_out
from proxy.cli.configuration import load, reports_config_errors
from proxy.cli.options import ROTATION_FLAGS, add_config_flags
from proxy.cli.runner import run
from proxy.config import REGIONS, Config, Region
from proxy.config.messages import suggest
from proxy.request.routing import endpoint_of
from proxy.request.tokens.client import describe_source
from proxy.request.upstream.http1 import RemoteProtocolError
from proxy.request.upstream.pool import amazon_pool, lwa_pool
from proxy.server.upstream_pools import user_agents

PATH = "/applications/2023-11-30/clientSecret"
SCOPE = "sellingpartnerapi::client_credential:rotation"

_REMEDIES = {
    400: "Check that the application is registered with Amazon for rotation, with a queue for the new secret.",
    403: "The application must be a seller application and own the secret; see Amazon's page on rotation.",
    429: "Amazon takes one rotation a minute: wait, and try again.",
}


class RotationFailed(Exception):
    """There is no new secret; the text says why, and what to do."""


async def rotate_client_secret(config: Config, name: str, region: Region) -> None:
    """Ask Amazon for a new client secret of the application `name`; raise RotationFailed."""
    application = config.applications[name]
    try:
        async with lwa_pool(config) as lwa_session, amazon_pool(config, 1) as session:
            secret = application.client_secret.refreshed()
            token_response = await lwa.client_credentials_grant(
                lwa_session.post, config.endpoints.lwa, application.client_id, secret, SCOPE
            )
            headers = credential_headers(token_response.value, user_agents(config)[name], time.time())
            url = endpoint_of(config, "production", region) + PATH
            async with asyncio.timeout(config.timeouts.upstream_idle):
                status, body = await session.post(url, headers, b"", lwa.MAX_RESPONSE)
    except lwa.OAuthError as exc:
        keys = f"applications.{name}.client_id and client_secret{describe_source(application.client_secret)}"
        raise RotationFailed(
            f"Login with Amazon refuses the application {name}: {exc.reason}. Look at {keys}."
        ) from exc
    except (lwa.TokenRequestFailed, RemoteProtocolError, OSError) as exc:
        raise RotationFailed("Amazon did not answer properly; it may or may not have made a new secret") from exc
    if status != 204:
        amazon_error = parse_error(body)
        said = " ".join(text for text in (amazon_error.code, amazon_error.message, amazon_error.details) if text)
        advice = _REMEDIES.get(status, "Try again later.")
        raise RotationFailed(f"Amazon answers {status}: {said or 'no reason given'}. {advice}")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("application", metavar="APPLICATION", help="its name in the configuration")
    parser.add_argument("--region", choices=REGIONS, default="na", help="whose host to ask (na, as Amazon's page does)")
    add_config_flags(parser, ROTATION_FLAGS)


@reports_config_errors
def _rotate(options: argparse.Namespace) -> int:
    loaded = load(options)
    name, applications = options.application, loaded.config.applications
    if name not in applications:
        print_err(f"sp-api-proxy: no application {name} in the configuration; {suggest(applications, name)}")
        return USAGE
    try:
        run(rotate_client_secret(loaded.config, name, options.region))
    except RotationFailed as exc:
        print_err(f"sp-api-proxy: {exc}")
        return FAILED
    origin = loaded.origins.get(("applications", name, "client_secret"), "the configuration")
    print_out(f"Amazon makes a new client secret for {name}. It comes by a message to the SQS queue registered for it.")
    print_out(f"Put it where the old one is ({origin}) within seven days: the old one works until then.")
    print_out("A proxy that reads it from a file reloads it; one that has it from a variable needs a restart.")
    print_out("Then set rotated_at to the day.")
    return OK


COMMANDS = {"rotate": Command("sp-api-proxy rotate main --config config.yaml", _add_flags, _rotate)}
