"""Messages for invalid settings, in the terms of a configuration file instead of those of pydantic."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from proxy.config.model import Listener, settings_in
from proxy.config.types import NAME, TARGET_APPLICATION
from proxy.config.values import is_user_keyed, kind_at
from proxy.config.yaml_reader import KeyPath, redact_name

MAX_NAMED = 10  # names listed in one message: there may be thousands of accounts

_PATTERNS = {
    f"^{NAME}$": "must be letters, digits, dots, hyphens and underscores, 64 at most, the first a letter or a digit",
    TARGET_APPLICATION: "must be the id of an application, such as amzn1.sp.solution.…",
}
_OWN_MESSAGES = {"setting", "secret"}  # error types whose text is ours already
_MAPPINGS = {"dict_type", "model_type"}
_EXPECTED = {  # by the prefix of pydantic's error type; {…} are values of its context
    "string_type": "must be a single value: text or a number",
    "string_too_short": "must not be empty",
    "string_too_long": "must not be longer than {max_length} characters",
    "too_short": "must not be empty",
    "tuple_type": "must be a list: [one] or [one, another]",
    "bool_": "must be true or false",
    "int_": "must be a whole number",
    "float_": "must be a number",
    "date_": "must be a day such as 2026-11-23",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}
_MISSING = {
    "client_id": "is missing: give it here, or set LWA_APP_ID",
    "client_secret": "is missing: give it here, or set LWA_CLIENT_SECRET",
}


def join(names: Iterable[object]) -> str:
    """Return `a, b, c`; of more than MAX_NAMED names the first ones and the number of the others."""
    known = list(names)
    more = len(known) - MAX_NAMED
    shown = ", ".join(map(str, known[:MAX_NAMED]))
    return shown if more <= 0 else f"{shown} and {more} more"


def suggest(names: Iterable[str], wrong: str = "") -> str:
    """Return the names that are known, and the one that was probably meant by `wrong`."""
    known = [redact_name(name) for name in names]
    if not known:
        return "none is configured"
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"{'did you mean ' + near[0] + '? ' if near else ''}known: {join(known)}"


def message_of(error: Mapping[str, Any], path: KeyPath) -> str:
    """Return the message for one of pydantic's errors at `path`; it quotes no value, which may be a secret."""
    if error["type"] == "missing":
        return _MISSING.get(str(path[-1]), "is missing")
    if error["type"] == "extra_forbidden":
        return f"is not a setting{_suggestion(path)}"
    if error["loc"][-1:] == ("[key]",):
        return f"is not allowed as a name: {_requirement(error, path)}"
    if error["input"] is None and error["type"] in {"string_type", "tuple_type"}:
        return f"has no value: {_requirement(error, path)}"
    return _requirement(error, path)


def _requirement(error: Mapping[str, Any], path: KeyPath) -> str:
    kind, context = str(error["type"]), error.get("ctx", {})
    if kind in _OWN_MESSAGES:
        return str(error["msg"])
    if kind in _MAPPINGS:
        return _mapping(path)
    if kind == "string_pattern_mismatch":
        return _PATTERNS[context["pattern"]]
    requirement = next((words for known, words in _EXPECTED.items() if kind.startswith(known)), "cannot be used")
    return requirement.format(**context).replace("'", "")


def _mapping(path: KeyPath) -> str:
    kind = kind_at(path)
    if path[-1] == "refresh_tokens":
        return "must be a mapping such as {eu: …}, with a refresh token for each region"
    if path[-1] == "marketplaces":
        return "must be a mapping such as {A1EXAMPLE: eu}, with a region for each marketplace"
    settings = settings_in(kind)
    if settings is None or is_user_keyed(kind):
        return "must be a mapping such as {acme: {…}}, with a name of your choice for each"
    if settings is Listener:
        return "must be an address such as 127.0.0.1:8080, or a mapping such as {address: 127.0.0.1:8080}"
    return f"must be a mapping of settings; known: {join(settings.model_fields)}"


def _suggestion(path: KeyPath) -> str:
    """Return `; did you mean …?` for a key that is similar to one of its group, else the keys of the group."""
    settings = settings_in(kind_at(path[:-1]))
    known = list(settings.model_fields) if settings else []
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if known else ""
