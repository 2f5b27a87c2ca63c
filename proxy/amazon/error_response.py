"""What does Amazon say when it refuses a call (DOC "Resolve Common HTTP and Authorization Error Codes")?

An expired token, a missing role, a wrong region and an unknown path are all 403; only the texts differ, and the same
text has been seen in `message` as well as in `details`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TOKEN_ERROR = re.compile(r"token\b.*\b(expired|revoked)", re.IGNORECASE | re.DOTALL)
_UNKNOWN_PATH = re.compile(r"MissingAuthenticationToken", re.IGNORECASE)
_REPORT_TYPE = "access to the resource is forbidden"


@dataclass(frozen=True, slots=True)
class AmazonError:
    """The first error of Amazon's envelope; each text empty where it is missing."""

    code: str = ""
    message: str = ""
    details: str = ""
    error_type: str = ""  # the header x-amzn-ErrorType

    @property
    def is_token_error(self) -> bool:
        """Whether the token itself is refused, as expired or revoked, so that another one may do."""
        return _TOKEN_ERROR.search(f"{self.message} {self.details}") is not None

    @property
    def is_unknown_path(self) -> bool:
        """Whether Amazon knows no operation at that path."""
        return _UNKNOWN_PATH.search(f"{self.code} {self.error_type}") is not None

    @property
    def is_about_report_type(self) -> bool:
        """Whether a type of report is not among the application's roles."""
        return _REPORT_TYPE in self.message.lower()


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of `body`, or an empty one where it is anything else."""
    try:
        response = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return response if isinstance(response, dict) else {}


def parse_error(body: bytes, error_type: str = "") -> AmazonError:
    """Return what the envelope in `body` says; nothing where there is none."""
    errors = parse_object(body).get("errors")
    first = errors[0] if isinstance(errors, list) and errors else None
    texts = first if isinstance(first, Mapping) else {}
    return AmazonError(
        _text(texts.get("code")), _text(texts.get("message")), _text(texts.get("details")), _text(error_type)
    )


def _text(value: object) -> str:
    """Return printable text of bounded length: it may end up in a message of ours."""
    return "".join(character for character in value if character.isprintable())[:300] if isinstance(value, str) else ""
