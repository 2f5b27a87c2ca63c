"""The address of the token store: `memory`, or a Redis URL in the usual form."""

from dataclasses import dataclass, replace
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pydantic_core import PydanticCustomError

from proxy.config.secret import Secret

FORMS = "memory, redis://host:6379/0, rediss://user:password@host:6379/0 or unix:///run/redis.sock?db=0"
DEFAULT_PORT = 6379
MAX_DATABASES = 10_000


def _error(message: str) -> PydanticCustomError:
    # The message must not quote the value, which may hold a password.
    return PydanticCustomError("setting", message)


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """`memory`, or a Redis server by `host` and `port` or by the `path` of its Unix socket."""

    kind: str = "memory"  # memory, redis, rediss or unix
    host: str = ""
    port: int = 0
    path: str = ""
    user: str | None = None
    password: Secret | None = None
    db: int = 0
    ca_certs: str | None = None  # a PEM file that replaces the system's CA certificates

    @property
    def is_shared(self) -> bool:
        """Whether other processes share the store."""
        return self.kind != "memory"

    def __str__(self) -> str:
        if not self.is_shared:
            return self.kind
        userinfo = self.user or ""
        userinfo = f"{userinfo}:***@" if self.password is not None else f"{userinfo}@" if userinfo else ""
        if self.kind == "unix":
            return f"unix://{userinfo}{self.path}?db={self.db}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}://{userinfo}{host}:{self.port}/{self.db}"


def parse_store(value: object) -> StoreAddress:
    """Return the StoreAddress of one of FORMS; raise a validation error that does not quote it."""
    if isinstance(value, StoreAddress):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if text == "memory":
        return StoreAddress()
    scheme, mark, _ = text.partition("://")
    if scheme.endswith(("sentinel", "cluster")):
        raise _error(
            "cannot be Sentinel or Cluster: give the address of one server, or of the service that follows the primary"
        )
    if not mark or scheme not in {"redis", "rediss", "unix"} or not text.isprintable() or " " in text or "#" in text:
        raise _error(f"must be {FORMS}")
    try:
        parts = urlsplit(text)
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        return _parsed(parts, parts.hostname or "", parts.port, options)
    except PydanticCustomError:
        raise
    except ValueError:
        raise _error(f"must be {FORMS}") from None


def _parsed(parts: SplitResult, host: str, port: int | None, options: dict[str, str]) -> StoreAddress:
    user = unquote(parts.username) if parts.username else None
    password = Secret(unquote(parts.password)) if parts.password else None
    if parts.scheme == "unix":
        if host or port or len(parts.path) < 2:
            raise _error("a Unix socket needs an absolute path: unix:///run/redis.sock?db=0")
        found = StoreAddress("unix", path=unquote(parts.path), user=user, password=password)
        return replace(found, db=_database(options.pop("db", "0"), options))
    if not host or port == 0:
        raise _error("needs a host: redis://host:6379/0")
    ca_certs = options.pop("ssl_ca_certs", None) if parts.scheme == "rediss" else None
    db = _database(parts.path.removeprefix("/") or "0", options)
    return StoreAddress(parts.scheme, host, port or DEFAULT_PORT, "", user, password, db, ca_certs)


def _database(text: str, options: dict[str, str]) -> int:
    """Return the number of a database; raise where an option is left."""
    if options:
        raise _error("has unknown options; known: db with unix://, ssl_ca_certs with rediss://")
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < MAX_DATABASES):
        raise _error("needs the number of a database: redis://host:6379/0")
    return int(text)
