"""A secret that no log line, error, `repr` or dump can print."""

import hmac
from collections.abc import Callable
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class SourcedStr(str):
    """A string with a description of where it came from, `source`.

    `reread` returns the current value of that source, None where there is no usable one.
    """

    __slots__ = ("reread", "source")
    reread: Callable[[], str | None]
    source: str

    @classmethod
    def of(cls, text: str, reread: Callable[[], str | None], source: str) -> "SourcedStr":
        """Return `text` with its source."""
        sourced = cls(text)
        sourced.reread, sourced.source = reread, source
        return sourced


class Secret:
    """A string whose `repr`, `str` and serialised forms are `***`; only `reveal()` returns it.

    `source` names the file or the variable that it came from, empty for one that the configuration file holds itself.
    """

    __slots__ = ("_reread", "_text", "source")

    def __init__(self, text: str, reread: Callable[[], str | None] | None = None, source: str = "") -> None:
        self._text = text
        self._reread = reread
        self.source = source

    def refreshed(self) -> "Secret":
        """Return the secret with the current value of its file or variable; itself where that is missing or empty.

        A rotated secret is therefore used from the next token request on, without a reload.
        """
        text = self._reread() if self._reread is not None else None
        return Secret(text, self._reread, self.source) if text and text != self._text else self

    def reveal(self) -> str:
        """Return the secret itself, for the code that sends it."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> Any:
        # A pickle would hold the secret unencrypted, and `copy.deepcopy` falls back to this method.
        raise TypeError("a Secret is not pickled")

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, memo: object) -> "Secret":
        return self

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(lambda _: "***")
        )

    @classmethod
    def _validate(cls, value: object) -> "Secret":
        if isinstance(value, Secret):
            return value
        if isinstance(value, str) and value.strip():
            if isinstance(value, SourcedStr):
                return cls(value.strip(), value.reread, value.source)
            return cls(value.strip())
        # The message is printed: it must not hold the value.
        raise PydanticCustomError("secret", "must be a text and not empty")

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "writeOnly": True}
