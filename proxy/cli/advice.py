"""Explanations and remedies for failures that `check --live` finds.

Errors of Login with Amazon are explained in request/tokens/client.py, Amazon's 403 in request/forbidden_hints.py.
"""

import socket
import ssl

from proxy.request.upstream.http1 import RemoteProtocolError

NO_SCOPE = (
    "Nothing to do where no app calls grantless operations (notification destinations, rotation of the secret). They "
    "are for seller applications alone; ask Amazon for the role otherwise."
)
THROTTLED = "Something else uses up this account's usage plan: try again in a few minutes."
LWA_UNREACHABLE = "no way to Login with Amazon"
NO_MARKETPLACE_DETAIL = "Amazon answers 200, and names no marketplace"
NO_MARKETPLACES = (
    "The refresh token is probably for another region: put it under that one. Else the account sells nowhere yet."
)
AMAZON_DOWN = "Amazon has trouble, not you: try again later; its health page may say more."
UNEXPECTED_RESPONSE = "Check the endpoints setting: this is no answer of the Selling Partner API."
FIX_CLOCK = "Set this machine's clock, and have it kept by NTP."
NO_ELEMENTS = (
    "Add the role in Amazon's developer console and have the seller authorise anew, or take the element out of "
    "data_elements. Until then the proxy asks without it."
)
WRONG_REGION = (
    "Other accounts of the application work: this one's refresh token is for another region (put it under that one), "
    "or its authorisation was withdrawn, or is older than the role (have the seller authorise anew: "
    "sp-api-proxy authorize)."
)
NO_ROLE = (
    "No account of the application works here. Either it lacks the role of the Sellers API (Selling Partner Insights), "
    "which sellers have to authorise anew after it is added, or the refresh token is for another region, or it is a "
    "vendor's: name a GET that vendors may call with --call."
)
CERTIFICATE = (
    "Where a proxy looks into TLS, give its CA as pool.ca_file. Else see whether the endpoint is right, and this "
    "machine's clock."
)


def diagnose_connection_error(exc: Exception, *, by_proxy: bool) -> tuple[str, str, str]:
    """Return a code, what happened, and the remedy for a connection that failed or broke.

    `by_proxy`: a forward proxy is in between.
    """
    forward = "pool.proxy or HTTPS_PROXY"
    way = (
        f"the forward proxy ({forward})" if by_proxy else f"a firewall; where a forward proxy leads out, set {forward}"
    )
    if isinstance(exc, ssl.SSLCertVerificationError):
        said = f"its TLS certificate is not trusted ({exc.verify_message})"
        return (
            "certificate",
            said,
            CERTIFICATE,
        )
    if isinstance(exc, ssl.SSLError):
        return "tls", "TLS does not come about", f"Check that the endpoint speaks TLS 1.2 or newer, and {way}."
    if isinstance(exc, socket.gaierror):
        return "name", "its name is not found", f"Check endpoints, the name servers of this machine, and {way}."
    if isinstance(exc, TimeoutError):
        return "timeout", "nothing came in time", f"Check the network, and {way}. Slow networks: timeouts.connect."
    if isinstance(exc, ConnectionRefusedError):
        said = "it, or the forward proxy, refuses the connection" if by_proxy else "it refuses the connection"
        return "refused", said, f"Check endpoints, and {way}."
    if isinstance(exc, (RemoteProtocolError, ConnectionError)):
        return "broken", "the connection broke", f"Try again; if it goes on, check {way}."
    reason = exc.strerror if isinstance(exc, OSError) else None
    return "unreachable", f"no connection ({reason or type(exc).__name__})", f"Check the network, and {way}."
