"""Amazon's error responses (DOC "Resolve Common HTTP and Authorization Error Codes").

An expired token, a missing role, a wrong region and an unknown path are all 403. Only the texts differ, and the same
text has been observed in `message` and in `details`.
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
    """The first error of Amazon's error envelope; a missing text is empty."""

    code: str = ""
    message: str = ""
    details: str = ""
    error_type: str = ""  # the header x-amzn-ErrorType

    @property
    def is_token_error(self) -> bool:
        """Whether Amazon rejects the token itself as expired or revoked, so that a new one may be accepted."""
        return _TOKEN_ERROR.search(f"{self.message} {self.details}") is not None

    @property
    def is_unknown_path(self) -> bool:
        """Whether Amazon has no operation at that path."""
        return _UNKNOWN_PATH.search(f"{self.code} {self.error_type}") is not None

    @property
    def is_about_report_type(self) -> bool:
        """Whether the application has no role for the type of report."""
        return _REPORT_TYPE in self.message.lower()


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`, an empty one for anything else."""
    try:
        response = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return response if isinstance(response, dict) else {}


def parse_error(body: bytes, error_type: str = "") -> AmazonError:
    """Return the first error of the envelope in `body`, an empty AmazonError where there is none."""
    errors = parse_object(body).get("errors")
    first = errors[0] if isinstance(errors, list) and errors else None
    texts = first if isinstance(first, Mapping) else {}
    return AmazonError(
        _text(texts.get("code")), _text(texts.get("message")), _text(texts.get("details")), _text(error_type)
    )


def _text(value: object) -> str:
    """Return printable text of limited length: it is quoted in error messages of the proxy."""
    return "".join(character for character in value if character.isprintable())[:300] if isinstance(value, str) else ""
