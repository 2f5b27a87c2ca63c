"""Access tokens in use: the value, what it is good for, and when it is renewed and expires."""

from dataclasses import dataclass, field

from proxy.config import Secret
from proxy.request.token_selection import TokenKind

_MIN_SUFFIX = 16  # characters that tell one token from another


def secret_suffix(token: str) -> bytes:
    """Return the part of a token by which it is recognised in a response.

    All tokens share a prefix (`Atza|`), which an echo may spell differently (`Atza%7C`): the prefix is left out.
    """
    suffix = token.partition("|")[2]
    return (suffix if len(suffix) >= _MIN_SUFFIX else token).encode()


@dataclass(slots=True, eq=False)
class Token:
    """A token in use. Times are seconds of the monotonic clock. Tokens compare by identity."""

    value: Secret
    kind: TokenKind
    issued_at: float
    renew_at: float
    expires_at: float  # minus the safety margin
    expires_hard: float  # without it, for when no other token is available
    used_at: float
    data_elements: tuple[str, ...] = ()
    # The credential header lines made from it, and the second of the wall clock that x-amz-date in them names.
    # Calls with the same token within one second share them.
    header_lines: bytes = field(default=b"", repr=False)
    header_lines_second: int = -1
    source: str = ""  # the fingerprint of the credentials it was fetched with; empty where that is not certain
    secret_suffix: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.secret_suffix = secret_suffix(self.value.reveal())
