"""createRestrictedDataToken (model tokens_2021-03-01, DOC "Tokens API")."""

import json
from typing import Any

from proxy.simulator.responses import Response, as_json, invalid_input
from proxy.simulator.restricted_operations import is_restricted_document, restricted
from proxy.simulator.state import Issued, Resource, State, template_pattern

PATH = "/tokens/2021-03-01/restrictedDataToken"
METHODS = frozenset({"GET", "PUT", "POST", "DELETE"})


def create(state: State, caller: Issued, body: bytes) -> Response:
    """Return the answer to a seller's request for an RDT."""
    try:
        asked = json.loads(body)["restrictedResources"]
        resources = tuple(_resource(item) for item in asked)
    except (ValueError, KeyError, TypeError):
        return invalid_input("Invalid Input")
    if not 1 <= len(resources) <= 50:
        return invalid_input("Invalid Input")
    for resource in resources:
        refused = _refused(state, resource)
        if refused is not None:
            return refused
    issued = Issued(
        "rdt", caller.client_id, state.now() + state.lifetime, caller.seller, caller.region, resources=resources
    )
    state.count("exchanges.rdt")
    lifetime = int(state.lifetime) if state.lifetime == int(state.lifetime) else state.lifetime
    return as_json(200, {"restrictedDataToken": state.issue("Atz.sprdt|", issued), "expiresIn": lifetime})


def _resource(item: dict[str, Any]) -> Resource:
    return Resource(str(item["method"]), str(item["path"]), tuple(map(str, item.get("dataElements") or ())))


def _refused(state: State, resource: Resource) -> Response | None:
    operation = restricted(resource.method, resource.path)
    if resource.method not in METHODS or "?" in resource.path or operation is None:
        return invalid_input("Application do not have access to some or all requested resource")
    if not operation.generic and not is_restricted_document(resource.path):
        return invalid_input("Invalid or unsupported document ID found")
    if not set(resource.data_elements) <= set(operation.data_elements):
        return invalid_input("Invalid Input")
    denied = [element for element in resource.data_elements if element not in state.elements]
    if denied:
        message = "Application does not have access to one or more requested data elements"
        return invalid_input(f"{message}: [{', '.join(denied)}]")
    return None


def covers(token: Issued, method: str, path: str) -> Resource | None:
    """Return the resource of an RDT that a raw path is covered by; a placeholder stands for one segment."""
    for resource in token.resources:
        if resource.method == method and template_pattern(resource.path).fullmatch(path):
            return resource
    return None
