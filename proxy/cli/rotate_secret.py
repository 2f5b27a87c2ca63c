"""How does an application get a new client secret (DOC "Rotate your application's client secret")?

Amazon answers 204 and nothing else: the new secret comes by a message to the SQS queue that was registered for it. The
old one works for seven days more.
"""

import asyncio
import time

from proxy.amazon import lwa
from proxy.amazon.error_response import parse_error
from proxy.amazon.headers import credential_headers
from proxy.config import Config, Region
from proxy.request.routing import endpoint_of
from proxy.request.tokens.client import describe_source
from proxy.request.upstream.http1 import RemoteProtocolError
from proxy.request.upstream.pool import amazon_pool, lwa_pool
from proxy.server.runtime import user_agents

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
