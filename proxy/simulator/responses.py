"""Responses, and the error responses that Amazon sends."""

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from proxy.simulator.state import errors_body


@dataclass(slots=True)
class Response:
    """A status, headers and a body; `operation` and `token_kind` are for the journal."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def request_id() -> str:
    """Return an id such as Amazon gives every answer."""
    text = secrets.token_hex(16)
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def as_json(status: int, content: Any, **headers: str) -> Response:
    """Return a JSON answer with a request id; `error_type=` becomes `x-amzn-ErrorType`."""
    fixed = {"Content-Type": "application/json", "x-amzn-RequestId": request_id()}
    if error_type := headers.pop("error_type", ""):
        fixed["x-amzn-ErrorType"] = error_type
    return Response(status, json.dumps(content).encode(), {**fixed, **headers})


def forbidden(details: str = "") -> Response:
    """Return Amazon's refusal of a token, a role, a region or a path: always 403, told apart by `details` alone."""
    content = errors_body("Unauthorized", "Access to requested resource is denied.", details)
    return as_json(403, content, error_type="AccessDeniedException")


def invalid_input(message: str, details: str = "") -> Response:
    """Return Amazon's refusal of what was asked."""
    return as_json(400, errors_body("InvalidInput", message, details), error_type="InvalidInputException")


def html(status: int, text: str) -> Response:
    """Return the page that Amazon's front end answers before the API sees a request."""
    page = f"<html><head><title>{status} {text}</title></head><body><h1>{status} {text}</h1></body></html>"
    return Response(status, page.encode(), {"Content-Type": "text/html"})
