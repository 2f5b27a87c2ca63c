"""`explain`: what the proxy would do with a request, and why, without sending it."""

import argparse
import json
from collections.abc import Mapping

from multidict import CIMultiDict, CIMultiDictProxy

from proxy.amazon.operations import Operation
from proxy.cli.common import FAILED, OK, USAGE, Command, print_err, print_out
from proxy.cli.configuration import load, operation_table, reports_config_errors
from proxy.cli.options import REQUEST_FLAGS, add_config_flags, header, whole_number
from proxy.config import Config
from proxy.config.messages import join, suggest
from proxy.errors import ProxyError
from proxy.request.authentication import UNKNOWN_PEER, CallerAuthenticator
from proxy.request.authorization import build_policies
from proxy.request.header_cache import HeaderBlock
from proxy.request.routing import Route, resolve
from proxy.request.tokens import placeholder_endpoint
from proxy.request.tokens.placeholder_endpoint import TokenEndpoint
from proxy.request.upstream.request_headers import check_body, end_to_end_headers
from proxy.request.validation import AllowedHosts, validate


def _add_flags(parser: argparse.ArgumentParser) -> None:
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


@reports_config_errors
def _explain(options: argparse.Namespace) -> int:
    config = load(options).config
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
    table = operation_table()
    own = TokenEndpoint(table, serves_rdt=config.local_rdt).match(validated.target)
    if options.method == "POST" and own == placeholder_endpoint.LWA_TOKEN:
        return placeholder_endpoint.describe_token_request(own, validated.target)  # no caller key is needed for that
    caller = options.caller or CallerAuthenticator(config).authenticate(sent, UNKNOWN_PEER, listener)
    policy = build_policies(config, options.listener)[caller]
    if options.method == "POST" and own:
        return placeholder_endpoint.describe_token_request(own, validated.target)
    decided = describe_route(resolve(options.method, validated, sent, listener, config, table, policy))
    kept = end_to_end_headers(options.method, sent)
    dropped = [name for name in sent if name not in kept]
    who = {"caller": caller} if caller else {}
    return {**who, **decided, "headers kept": ", ".join(kept) or "none", "headers dropped": ", ".join(dropped)}


def describe_route(route: Route) -> dict[str, str]:
    """Return the decisions in a route as text."""
    operation = route.operation
    return {
        "account": f"{route.account} (from {route.account_source})",
        "region": f"{route.region} (from {route.region_source})",
        "environment": route.environment,
        "application": route.application,
        "operation": f"{operation.name} ({operation.template})" if operation else "unknown: forwarded as it is",
        "usage plan": describe_plan(operation),
        "token": describe_token(route),
        "sent to": route.endpoint + route.path_and_query,
    }


def describe_plan(operation: Operation | None) -> str:
    """Return the usage plan of an operation as text."""
    if operation is None or operation.rate is None:
        return "none known: sent at once"
    return f"{operation.rate:g} calls per second, {operation.burst} at once, until Amazon's responses say otherwise"


def describe_token(route: Route) -> str:
    """Return the kind of token of a route, and the reason, as text."""
    token_key, operation = route.token_key, route.operation
    if token_key.kind == "grantless":
        return f"grantless token, scope {token_key.scope}: the operation is the application's own"
    if token_key.kind == "rdt":
        named = ", ".join(token_key.data_elements)
        elements = f" with {named}, which {route.elements_source} asks for" if named else ""
        return f"Restricted Data Token: for {token_key.method} {token_key.path}{elements}"
    if operation is not None and operation.api == "tokens":
        return "ordinary access token: the app gets a token of Amazon's, which it does not need; see local_rdt"
    if operation is not None and operation.restricted:
        why = (
            "the sandbox takes it" if route.environment == "sandbox" else f"no personal data by {route.elements_source}"
        )
        return f"ordinary access token: {why}"
    return "ordinary access token: nothing more is needed"


COMMANDS = {
    "explain": Command(
        "sp-api-proxy explain GET '/orders/v0/orders?MarketplaceIds=A1PA6795UKMFR9' -H 'x-sp-account: acme'",
        _add_flags,
        _explain,
    )
}
