"""The types of single settings: durations, addresses, URLs, names; each with its validator and its JSON Schema."""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxy.config.secret import Secret
from proxy.config.store_address import StoreAddress, parse_store

Region = Literal["na", "eu", "fe"]
Environment = Literal["production", "sandbox"]
REGIONS: tuple[Region, ...] = ("na", "eu", "fe")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# re.ASCII, here and below: without it, \d and \w match digits and letters of every script (aiohttp CVE-2025-69224).
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", re.ASCII)
URL_TEXT = re.compile(r"[\x21-\x7e]+")
DURATION_UNITS = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MIN_STORE_KEY = 32  # characters: the key is derived without stretching, so a short password could be guessed
# Also rejects float("inf").
MAX_DURATION = 366 * 86400.0
# At most 253 characters, which are the 255 octets of RFC 1035 section 2.3.4; a final dot is the root.
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\.?", re.ASCII)
OPERATIONS_PATTERN = re.compile(r"(?:(GET|HEAD|POST|PUT|PATCH|DELETE|READ) +)?([A-Za-z0-9._*?-]+)", re.ASCII)
# The format of OTEL_EXPORTER_OTLP_HEADERS. Names are tokens (RFC 9110 section 5.6.2); a value ends at a comma (\x2c).
HEADER_LIST = re.compile(
    r"[\w!#$%&'*+.^`|~-]+=[\x21-\x2b\x2d-\x7e]*(?:, *[\w!#$%&'*+.^`|~-]+=[\x21-\x2b\x2d-\x7e]*)*", re.ASCII
)
SOCKET_MODE = re.compile(r"0?[0-7]{3}", re.ASCII)
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# Such as amzn1.sellerapps.app.… or amzn1.sp.solution.… (model tokens_2021-03-01).
TARGET_APPLICATION = r"^amzn1\.[A-Za-z0-9._-]{1,200}$"


def setting_error(message: str) -> PydanticCustomError:
    """Return a validation error with this message, which must not quote the value: it may be a secret."""
    return PydanticCustomError("setting", message)


def parse_duration(value: object) -> float:
    """Return seconds for `10s`, `500ms`, `2m`, `1h`, `1d` or a plain number of seconds; raise a validation error."""
    # bool is a subclass of int; NaN fails the comparison.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        seconds = float(value)
    elif isinstance(value, str) and (match := DURATION.fullmatch(value.strip(" \t"))):
        seconds = float(match[1]) * DURATION_UNITS[match[2]]
    else:
        raise setting_error("must be a duration such as 500ms, 10s, 2m or 1h")
    if seconds > MAX_DURATION:
        raise setting_error("must not be longer than a year")
    return seconds


def show_duration(seconds: float) -> str:
    """Return `seconds` in the largest unit that divides it: `90.0` is `90s`, `3600.0` is `1h`."""
    for unit, size in (("h", 3600.0), ("m", 60.0)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    number, unit = (seconds * 1000, "ms") if 0 < seconds < 1 else (seconds, "s")
    return f"{number:.6f}".rstrip("0").rstrip(".") + unit


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise setting_error("must be longer than 0s")
    return seconds


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(show_duration),
    WithJsonSchema({"type": ["string", "number"], "examples": ["500ms", "10s", "2m"]}),
]
PositiveDuration = Annotated[Duration, BeforeValidator(lambda value: _positive(parse_duration(value)))]


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a listener: host and port (0: any free one), or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it: loopback or a Unix socket."""
        return bool(self.path) or is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether `host` is `localhost` or a loopback address (127.0.0.0/8, ::1)."""
    # By name and without a look-up: RFC 6761 section 6.3 reserves it for loopback addresses.
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_host(text: str) -> bool:
    """Return whether `text` is an IP address or could be a host name (RFC 1123 section 2.1)."""
    try:
        ip_address(text)
    except ValueError:
        return HOST_NAME.fullmatch(text) is not None
    return True


def parse_address(value: object) -> Address:
    """Return the Address of `127.0.0.1:8080`, `[::1]:8080`, `localhost:8080` or `unix:/path`."""
    if isinstance(value, Address):
        return value
    text = value if isinstance(value, str) else ""
    if text.startswith("unix:"):
        if not text.startswith("unix:/"):
            raise setting_error("a Unix socket needs an absolute path: unix:/run/sp-api-proxy.sock")
        return Address(path=text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not _is_host(host) or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise setting_error("must be an address such as 127.0.0.1:8080, [::1]:8080 or unix:/run/sp-api-proxy.sock")
    return Address(host=host, port=int(port))


ListenAddress = Annotated[
    Address,
    BeforeValidator(parse_address),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["127.0.0.1:8080", "unix:/run/sp-api-proxy/acme.sock"]}),
]


def _url_in(value: str) -> SplitResult | None:
    """Return the parts of an http or https URL with a host; None for anything else."""
    try:
        parts = urlsplit(value)
        # `.port` raises ValueError for a port that is no number or above 65535; 0 it accepts.
        is_url = parts.scheme in {"https", "http"} and _is_host(parts.hostname or "") and parts.port != 0
    except ValueError:
        return None
    # The text and not the parts: urlsplit silently removes tabs and line breaks (bpo-43882) and strips spaces.
    return parts if is_url and URL_TEXT.fullmatch(value) else None


def check_endpoint(value: str) -> str:
    """Return the base URL without a trailing slash; plain http only to this machine, no user info, query or path."""
    parts = _url_in(value)
    if parts is None:
        raise setting_error("must be a URL such as https://sellingpartnerapi-eu.amazon.com")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise setting_error(
            "must be https: plain http is allowed to a loopback address only, because requests carry tokens"
        )
    if parts.username is not None or "?" in value or "#" in value:
        raise setting_error("must have no user, query or fragment")
    return value.rstrip("/")


def _check_region_endpoint(value: str) -> str:
    url = check_endpoint(value)
    if urlsplit(url).path:
        raise setting_error("must have no path: the path of the request is appended")
    return url


def _check_public_url(value: str) -> str:
    """Return the base URL by which apps reach the proxy, without a trailing slash; http is fine, it gets no token."""
    parts = _url_in(value)
    if parts is None or "@" in parts.netloc or "?" in value or "#" in value:
        raise setting_error("must be a URL such as https://sp-api.example.com, without user, query or fragment")
    return value.rstrip("/")


Endpoint = Annotated[str, Field(min_length=8), BeforeValidator(lambda value: check_endpoint(str(value)))]
RegionEndpoint = Annotated[str, Field(min_length=8), BeforeValidator(lambda value: _check_region_endpoint(str(value)))]


def one_or_many(value: object) -> object:
    """Return a single value as a list of one, everything else as it is."""
    return [value] if isinstance(value, (str, dict)) else value


def address_alone(value: object) -> object:
    """Return the short form of a listener, its address, as the mapping it stands for."""
    return {"address": value} if isinstance(value, str) else value


def _check_host_name(value: str) -> str:
    host = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if not _is_host(host):
        raise setting_error("must be a bare host name or address, without a port, scheme or wildcard")
    return host.lower()


HostName = Annotated[str, BeforeValidator(lambda value: _check_host_name(str(value)))]
AccountName = Annotated[str, Field(pattern=f"^{NAME}$")]
DataElement = Literal["buyerInfo", "shippingAddress", "buyerTaxInformation"]
StoreSetting = Annotated[
    StoreAddress,
    BeforeValidator(parse_store),
    PlainSerializer(str),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": r"^(memory|(redis|rediss|unix)://.+)$",
            "examples": ["memory", "redis://127.0.0.1:6379/0", "rediss://proxy:password@redis.example.com:6379/0"],
        }
    ),
]


def _check_store_key(secret: Secret) -> Secret:
    if len(secret.reveal()) < MIN_STORE_KEY:
        raise setting_error(
            f"must be at least {MIN_STORE_KEY} random characters, such as the output of openssl rand -base64 32"
        )
    return secret


StoreKey = Annotated[Secret, AfterValidator(_check_store_key)]


def _check_pattern(value: object) -> object:
    if isinstance(value, str) and not OPERATIONS_PATTERN.fullmatch(value):
        raise setting_error(
            "must be a method and a name such as GET *, READ *, reports.* or POST feeds.2021-06-30.createFeed"
        )
    return value


OperationsPattern = Annotated[str, BeforeValidator(_check_pattern)]


def _check_mode(value: object) -> object:
    if isinstance(value, str) and SOCKET_MODE.fullmatch(value):
        return int(value, 8)
    raise setting_error("must be three octal digits, such as 0600 or 0660")


SocketMode = Annotated[
    int,
    BeforeValidator(_check_mode),
    PlainSerializer(lambda mode: f"0{mode:03o}"),
    WithJsonSchema({"type": "string", "pattern": "^0?[0-7]{3}$", "examples": ["0600", "0660"]}),
]


def _check_printable(value: object) -> object:
    if isinstance(value, str) and not (value.isascii() and value.isprintable()):
        raise setting_error("must hold printable ASCII characters only")
    return value


# Together at most 440 characters even if every one is escaped: Amazon refuses a user agent of more than 500
# (DOC "Include a User-Agent Header in All Requests").
HeaderText = Annotated[str, Field(min_length=1, max_length=40), BeforeValidator(_check_printable)]


def _check_forward_proxy(secret: Secret) -> Secret:
    """Check the URL of a forward proxy; a Secret because it may hold a password."""
    try:
        parts = urlsplit(secret.reveal())
        is_valid = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0 and parts.path in {"", "/"}
    except ValueError:
        is_valid = False
    if not is_valid:
        raise setting_error("must be http://host:port or http://user:password@host:port")
    return secret


def _check_collector(value: object) -> object:
    """Check the URL of a collector; append OTLP's path `/v1/traces` where it has none."""
    if not isinstance(value, str):
        return value
    try:
        parts = urlsplit(value)
        is_valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or not URL_TEXT.fullmatch(value) or "@" in parts.netloc or parts.query or parts.fragment:
        raise setting_error("must be http://host:port or https://host:port, with or without a path")
    return value if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1/traces"


def _check_header_list(secret: Secret) -> Secret:
    if not HEADER_LIST.fullmatch(secret.reveal()):
        raise setting_error("must be name=value, several separated by commas")
    return secret


PublicUrl = Annotated[str, BeforeValidator(lambda value: _check_public_url(str(value)))]
ProductName = Annotated[str, Field(min_length=1, max_length=100), BeforeValidator(_check_printable)]
ForwardProxyUrl = Annotated[Secret, AfterValidator(_check_forward_proxy)]
CollectorUrl = Annotated[str, BeforeValidator(_check_collector)]
HeaderList = Annotated[Secret, AfterValidator(_check_header_list)]
