"""How is a running simulator told what to do, over HTTP?

Below `/_simulator` on the token host's port, JSON in and out:

    GET    /_simulator/state       counts of exchanges and answers, tokens in use
    GET    /_simulator/journal     what came in, the newest last; DELETE forgets it
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
                                   "client_id": "…"}: what a selling partner can authorise, at /apps/authorize/consent
    POST   /_simulator/elements    {"granted": ["buyerInfo"]}: the personal data the application has roles for
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from proxy.simulator.responses import Response, as_json
from proxy.simulator.state import DEMO_CLIENT, Fault, Seller, WebApplication

if TYPE_CHECKING:
    from proxy.simulator.server import Simulator

PATH = "/_simulator"


def respond(simulator: "Simulator", method: str, path: str, body: bytes) -> Response:
    """Return the answer to one order; a wrong one changes nothing and says what was wrong."""
    action = _ACTIONS.get((method, path.removeprefix(PATH)))
    if action is None:
        return as_json(
            404, {"error": f"no {method} {path} here", "see": sorted({f"{verb} {PATH}{at}" for verb, at in _ACTIONS})}
        )
    try:
        order = json.loads(body) if body else {}
        if not isinstance(order, dict):
            return as_json(400, {"error": "an order is a JSON object"})
        return as_json(200, action(simulator, order))
    except (ValueError, TypeError, KeyError) as exc:
        return as_json(400, {"error": f"{type(exc).__name__}: {exc}"})


def _state(simulator: "Simulator", _: dict[str, Any]) -> Any:
    state = simulator.state
    kinds = [token.kind for token in state.tokens.values() if token.expires_at > state.now() and not token.revoked]
    return {"counts": state.counts, "tokens": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}


def _journal(simulator: "Simulator", _: dict[str, Any]) -> Any:
    rows = [asdict(entry) for entry in simulator.journal]
    return [{**row, "body": row["body"].decode("utf-8", "replace")} for row in rows]


def _forget_journal(simulator: "Simulator", _: dict[str, Any]) -> Any:
    simulator.journal.clear()
    return {}


def _faults(simulator: "Simulator", _: dict[str, Any]) -> Any:
    return [asdict(fault) for fault in simulator.state.faults]


def _add_fault(simulator: "Simulator", order: dict[str, Any]) -> Any:
    kinds = {"latency", "hang", "status", "answer", "reset", "close", "truncate", "size"}
    fault = Fault(**order)
    if fault.kind not in kinds:
        raise ValueError(f"a fault's kind is one of {', '.join(sorted(kinds))}")
    simulator.state.faults.append(fault)
    return asdict(fault)


def _forget_faults(simulator: "Simulator", _: dict[str, Any]) -> Any:
    simulator.state.faults.clear()
    return {}


def _plan(simulator: "Simulator", order: dict[str, Any]) -> Any:
    if "enforce" in order:
        simulator.plans.enforced = bool(order["enforce"])
    if "path" in order:
        rate, burst = float(order["rate"]), float(order["burst"])
        simulator.plans.add(order["method"], order["path"], rate, burst, announce=bool(order.get("announce", True)))
    return {"enforced": simulator.plans.enforced}


def _tokens(simulator: "Simulator", order: dict[str, Any]) -> Any:
    if order["action"] not in {"expire", "revoke"}:
        raise ValueError("action is expire or revoke")
    changed = 0
    for token in simulator.state.tokens.values():
        if token.kind == order.get("kind", token.kind) and token.seller == order.get("seller", token.seller):
            changed += 1
            if order["action"] == "revoke":
                token.revoked = True
            else:
                token.expires_at = simulator.state.now()
    return {"changed": changed}


def _lifetime(simulator: "Simulator", order: dict[str, Any]) -> Any:
    simulator.state.lifetime = float(order["seconds"])
    return {"seconds": simulator.state.lifetime}


def _clients(simulator: "Simulator", order: dict[str, Any]) -> Any:
    client, secret = str(order["client_id"]), str(order["client_secret"])
    known = simulator.state.clients.get(client, set()) if order.get("keep_old") else set()
    simulator.state.clients[client] = {*known, secret}
    return {"client_id": client}


def _sellers(simulator: "Simulator", order: dict[str, Any]) -> Any:
    state, refresh_token = simulator.state, str(order["refresh_token"])
    if "name" in order:
        client = str(order.get("client_id", DEMO_CLIENT))
        state.sellers[refresh_token] = Seller(str(order["name"]), str(order["region"]), refresh_token, client)
    if order.get("revoked"):
        state.revoked_sellers.add(refresh_token)
    else:
        state.revoked_sellers.discard(refresh_token)
    return {"sellers": len(state.sellers), "revoked": len(state.revoked_sellers)}


def _applications(simulator: "Simulator", order: dict[str, Any]) -> Any:
    redirect_uris = tuple(map(str, order["redirect_uris"]))
    if not redirect_uris:
        raise ValueError("an application has a redirect_uri")
    client, is_draft = str(order.get("client_id", DEMO_CLIENT)), bool(order.get("draft", True))
    name = str(order["application_id"])
    simulator.state.applications[name] = WebApplication(client, redirect_uris, is_draft)
    return {"application_id": name}


def _elements(simulator: "Simulator", order: dict[str, Any]) -> Any:
    simulator.state.elements = set(map(str, order["granted"]))
    return {"granted": sorted(simulator.state.elements)}


_ACTIONS: dict[tuple[str, str], Callable[["Simulator", dict[str, Any]], Any]] = {
    ("GET", "/state"): _state,
    ("GET", "/journal"): _journal,
    ("DELETE", "/journal"): _forget_journal,
    ("GET", "/faults"): _faults,
    ("POST", "/faults"): _add_fault,
    ("DELETE", "/faults"): _forget_faults,
    ("POST", "/plans"): _plan,
    ("POST", "/tokens"): _tokens,
    ("POST", "/lifetime"): _lifetime,
    ("POST", "/clients"): _clients,
    ("POST", "/sellers"): _sellers,
    ("POST", "/applications"): _applications,
    ("POST", "/elements"): _elements,
}
