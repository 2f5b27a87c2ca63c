"""In which words is it told that a setting is wrong? In those of a configuration file, whatever checked it."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from proxy.config.model import Listener, settings_in
from proxy.config.types import NAME, TARGET_APPLICATION
from proxy.config.values import is_user_keyed, kind_at
from proxy.config.yaml_reader import KeyPath, redact_name

MAX_NAMED = 10  # of the names that there are: there may be thousands of accounts

_PATTERNS = {
    f"^{NAME}$": "must be letters, digits, dots, hyphens and underscores, 64 at most, the first a letter or a digit",
    TARGET_APPLICATION: "must be the id of an application, such as amzn1.sp.solution.…",
}
_OWN_MESSAGES = {"setting", "secret"}  # errors that are in our own words already
_MAPPINGS = {"dict_type", "model_type"}
_EXPECTED = {  # by the beginning of the error's kind, with the values of its context
    "string_type": "must be a single value: a text or a number",
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
    """Return `a, b, c`, or the first of many and how many there are."""
    known = list(names)
    more = len(known) - MAX_NAMED
    shown = ", ".join(map(str, known[:MAX_NAMED]))
    return shown if more <= 0 else f"{shown} and {more} more"


def suggest(names: Iterable[str], wrong: str = "") -> str:
    """Return what there is instead of the name `wrong`: the one that was probably meant, and the others."""
    known = [redact_name(name) for name in names]
    if not known:
        return "there is none"
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"{'did you mean ' + near[0] + '? ' if near else ''}there is {join(known)}"


def message_of(error: Mapping[str, Any], path: KeyPath) -> str:
    """Return what is wrong with the setting at `path`, from an error of pydantic's; no value is quoted."""
    if error["type"] == "missing":
        return _MISSING.get(str(path[-1]), "is missing")
    if error["type"] == "extra_forbidden":
        return f"is no setting{_suggestion(path)}"
    if error["loc"][-1:] == ("[key]",):
        return f"cannot be a name here: {_requirement(error, path)}"
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
    wanted = next((words for known, words in _EXPECTED.items() if kind.startswith(known)), "cannot be used")
    return wanted.format(**context).replace("'", "")


def _mapping(path: KeyPath) -> str:
    kind = kind_at(path)
    if path[-1] == "refresh_tokens":
        return "must be a mapping such as {eu: …}, with a refresh token for each region"
    if path[-1] == "marketplaces":
        return "must be a mapping such as {A1EXAMPLE: eu}, with the region of each"
    settings = settings_in(kind)
    if settings is None or is_user_keyed(kind):
        return "must be a mapping such as {acme: {…}}, with a name of yours for each"
    if settings is Listener:
        return "must be an address such as 127.0.0.1:8080, or a mapping such as {address: 127.0.0.1:8080}"
    return f"must be a mapping of settings; known here: {join(settings.model_fields)}"


def _suggestion(path: KeyPath) -> str:
    """Return `; did you mean …?` for a key that is close to one that exists at that place, else which there are."""
    settings = settings_in(kind_at(path[:-1]))
    known = list(settings.model_fields) if settings else []
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(known)}" if known else ""
