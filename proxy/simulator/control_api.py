"""The control API of a running simulator.

Below `/_simulator` on the token host's port, JSON in and out:

    GET    /_simulator/state       counts of token requests and responses, valid tokens
    GET    /_simulator/journal     received requests, the newest last; DELETE clears it
    POST   /_simulator/faults      {"kind": "status", "service": "eu", "path": "/orders/*", "status": 503, "times": 2}
                                   kinds: latency hang status answer reset close truncate size; GET, DELETE
    POST   /_simulator/plans       {"method": "GET", "path": "/orders/v0/orders", "rate": 5, "burst": 10,
                                   "announce": true, "enforce": true}
    POST   /_simulator/tokens      {"action": "expire" | "revoke", "kind": "lwa", "seller": "demo"}
    POST   /_simulator/lifetime    {"seconds": 3}
    POST   /_simulator/clients     {"client_id": "…", "client_secret": "…", "keep_old": true}
    POST   /_simulator/sellers     {"name": "…", "region": "eu", "refresh_token": "…", "client_id": "…"}
                                   or {"refresh_token": "…", "revoked": true}
    POST   /_simulator/applications {"application_id": "…", "redirect_uris": ["https://…"], "draft": true,
                                   "client_id": "…"}: an application that can be authorised at /apps/authorize/consent
    POST   /_simulator/elements    {"granted": ["buyerInfo"]}: the personal data the application has roles for
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from proxy.simulator.responses import Response, as_json
from proxy.simulator.state import DEMO_CLIENT, Fault, Seller, State, WebApplication
from proxy.simulator.usage_plans import Plans

PATH = "/_simulator"


def respond(state: State, plans: Plans, method: str, path: str, body: bytes) -> Response:
    """Return the response to one command; an invalid one changes nothing and gets 400 with the reason."""
    action = _ACTIONS.get((method, path.removeprefix(PATH)))
    if action is None:
        return as_json(
            404, {"error": f"no {method} {path} here", "see": sorted({f"{verb} {PATH}{at}" for verb, at in _ACTIONS})}
        )
    try:
        command = json.loads(body) if body else {}
        if not isinstance(command, dict):
            return as_json(400, {"error": "a command is a JSON object"})
        return as_json(200, action(state, plans, command))
    except (ValueError, TypeError, KeyError) as exc:
        return as_json(400, {"error": f"{type(exc).__name__}: {exc}"})


def _state(state: State, _: Plans, __: dict[str, Any]) -> Any:
    kinds = [token.kind for token in state.tokens.values() if token.expires_at > state.now() and not token.revoked]
    return {"counts": state.counts, "tokens": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}


def _journal(state: State, _: Plans, __: dict[str, Any]) -> Any:
    rows = [asdict(entry) for entry in state.journal]
    return [{**row, "body": row["body"].decode("utf-8", "replace")} for row in rows]


def _clear_journal(state: State, _: Plans, __: dict[str, Any]) -> Any:
    state.journal.clear()
    return {}


def _faults(state: State, _: Plans, __: dict[str, Any]) -> Any:
    return [asdict(fault) for fault in state.faults]


def _add_fault(state: State, _: Plans, command: dict[str, Any]) -> Any:
    kinds = {"latency", "hang", "status", "answer", "reset", "close", "truncate", "size"}
    fault = Fault(**command)
    if fault.kind not in kinds:
        raise ValueError(f"a fault's kind is one of {', '.join(sorted(kinds))}")
    state.faults.append(fault)
    return asdict(fault)


def _clear_faults(state: State, _: Plans, __: dict[str, Any]) -> Any:
    state.faults.clear()
    return {}


def _plan(_: State, plans: Plans, command: dict[str, Any]) -> Any:
    if "enforce" in command:
        plans.enforced = bool(command["enforce"])
    if "path" in command:
        rate, burst = float(command["rate"]), float(command["burst"])
        plans.add(command["method"], command["path"], rate, burst, announce=bool(command.get("announce", True)))
    return {"enforced": plans.enforced}


def _tokens(state: State, _: Plans, command: dict[str, Any]) -> Any:
    if command["action"] not in {"expire", "revoke"}:
        raise ValueError("action is expire or revoke")
    changed = 0
    for token in state.tokens.values():
        if token.kind == command.get("kind", token.kind) and token.seller == command.get("seller", token.seller):
            changed += 1
            if command["action"] == "revoke":
                token.revoked = True
            else:
                token.expires_at = state.now()
    return {"changed": changed}


def _lifetime(state: State, _: Plans, command: dict[str, Any]) -> Any:
    state.lifetime = float(command["seconds"])
    return {"seconds": state.lifetime}


def _clients(state: State, _: Plans, command: dict[str, Any]) -> Any:
    client, secret = str(command["client_id"]), str(command["client_secret"])
    known = state.clients.get(client, set()) if command.get("keep_old") else set()
    state.clients[client] = {*known, secret}
    return {"client_id": client}


def _sellers(state: State, _: Plans, command: dict[str, Any]) -> Any:
    refresh_token = str(command["refresh_token"])
    if "name" in command:
        client = str(command.get("client_id", DEMO_CLIENT))
        state.sellers[refresh_token] = Seller(str(command["name"]), str(command["region"]), refresh_token, client)
    if command.get("revoked"):
        state.revoked_sellers.add(refresh_token)
    else:
        state.revoked_sellers.discard(refresh_token)
    return {"sellers": len(state.sellers), "revoked": len(state.revoked_sellers)}


def _applications(state: State, _: Plans, command: dict[str, Any]) -> Any:
    redirect_uris = tuple(map(str, command["redirect_uris"]))
    if not redirect_uris:
        raise ValueError("an application has a redirect_uri")
    client, is_draft = str(command.get("client_id", DEMO_CLIENT)), bool(command.get("draft", True))
    name = str(command["application_id"])
    state.applications[name] = WebApplication(client, redirect_uris, is_draft)
    return {"application_id": name}


def _elements(state: State, _: Plans, command: dict[str, Any]) -> Any:
    state.elements = set(map(str, command["granted"]))
    return {"granted": sorted(state.elements)}


_ACTIONS: dict[tuple[str, str], Callable[[State, Plans, dict[str, Any]], Any]] = {
    ("GET", "/state"): _state,
    ("GET", "/journal"): _journal,
    ("DELETE", "/journal"): _clear_journal,
    ("GET", "/faults"): _faults,
    ("POST", "/faults"): _add_fault,
    ("DELETE", "/faults"): _clear_faults,
    ("POST", "/plans"): _plan,
    ("POST", "/tokens"): _tokens,
    ("POST", "/lifetime"): _lifetime,
    ("POST", "/clients"): _clients,
    ("POST", "/sellers"): _sellers,
    ("POST", "/applications"): _applications,
    ("POST", "/elements"): _elements,
}
