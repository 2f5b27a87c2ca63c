"""Which settings are there, of which kind, with which default, and what does each one mean?

The field descriptions here are the single place where a setting is explained: docs/reference/configuration.md and
the JSON Schema are made from them.
"""

import re
from dataclasses import dataclass
from datetime import date
from ipaddress import ip_address
from typing import Annotated, Any, Literal, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from proxy.config.secret import Secret
from proxy.config.store_address import StoreAddress, parse_store

Region = Literal["na", "eu", "fe"]
Environment = Literal["production", "sandbox"]

REGIONS: tuple[Region, ...] = ("na", "eu", "fe")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", re.ASCII)
URL_TEXT = re.compile(r"[\x21-\x7e]+")
DURATION_UNITS = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MIN_STORE_KEY = 32  # characters: its key is derived at once, so that a password would be guessed
MAX_DURATION = 366 * 86400.0
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\.?", re.ASCII)
OPERATIONS_PATTERN = re.compile(r"(?:(GET|HEAD|POST|PUT|PATCH|DELETE|READ) +)?([A-Za-z0-9._*?-]+)", re.ASCII)
HEADER_LIST = re.compile(
    r"[\w!#$%&'*+.^`|~-]+=[\x21-\x2b\x2d-\x7e]*(?:, *[\w!#$%&'*+.^`|~-]+=[\x21-\x2b\x2d-\x7e]*)*", re.ASCII
)
SOCKET_MODE = re.compile(r"0?[0-7]{3}", re.ASCII)
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
TARGET_APPLICATION = r"^amzn1\.[A-Za-z0-9._-]{1,200}$"


def setting_error(message: str) -> PydanticCustomError:
    """Return a validation error whose text is `message` alone; it must hold no value, a value may be a secret."""
    return PydanticCustomError("setting", message)


def parse_duration(value: object) -> float:
    """Return seconds for `10s`, `500ms`, `2m`, `1h`, `1d` or a plain number of seconds; raise a validation error."""
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
    """Return `seconds` in the unit a person would choose: `90.0` is `90s`, `3600.0` is `1h`."""
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
    """Where a listener listens: a host and a port (0: any free one), or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return bool(self.path) or is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether `host` is `localhost` or a loopback address (127.0.0.0/8, ::1)."""
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
        is_url = parts.scheme in {"https", "http"} and _is_host(parts.hostname or "") and parts.port != 0
    except ValueError:
        return None
    # urlsplit leaves white space and line breaks out without a word.
    return parts if is_url and URL_TEXT.fullmatch(value) else None


def check_endpoint(value: str) -> str:
    """Return the base URL without a trailing slash; plain http only to this machine, no user info, query or path."""
    parts = _url_in(value)
    if parts is None:
        raise setting_error("must be a URL such as https://sellingpartnerapi-eu.amazon.com")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise setting_error("must be https: a token is sent in the clear only to this machine's loopback")
    if parts.username is not None or "?" in value or "#" in value:
        raise setting_error("must have no user, query or fragment")
    return value.rstrip("/")


def _check_region_endpoint(value: str) -> str:
    url = check_endpoint(value)
    if urlsplit(url).path:
        raise setting_error("must have no path: the app's own path is sent as it is")
    return url


def _check_public_url(value: str) -> str:
    """Return the base URL under which apps reach the proxy, without a trailing slash; no token goes there."""
    parts = _url_in(value)
    if parts is None or "@" in parts.netloc or "?" in value or "#" in value:
        raise setting_error("must be a URL such as https://sp-api.example.com, without user, query or fragment")
    return value.rstrip("/")


Endpoint = Annotated[str, Field(min_length=8), BeforeValidator(lambda value: check_endpoint(str(value)))]
RegionEndpoint = Annotated[str, Field(min_length=8), BeforeValidator(lambda value: _check_region_endpoint(str(value)))]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, (str, dict)) else value


def _address_alone(value: object) -> object:
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
            f"must be at least {MIN_STORE_KEY} random characters, as openssl rand -base64 32 makes them"
        )
    return secret


StoreKey = Annotated[Secret, AfterValidator(_check_store_key)]


class Settings(BaseModel):
    """A frozen group of settings; a key it does not know is an error."""

    # `hide_input_in_errors`: a rejected value may be a secret in the wrong place.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True)


def default_as_written(field: FieldInfo) -> Any:
    """Return a setting's default as a file would have it (`10s`, `0600`); None where it has none."""
    if field.is_required():
        return None
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(kind).dump_python(field.get_default(call_default_factory=True), mode="json")


def settings_in(kind: Any) -> type[Settings] | None:
    """Return the group of settings that a field of type `kind` holds (`Limits`, `Account | None`), or None."""
    options = (kind, *get_args(kind))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Settings)), None)


class Tls(Settings):
    """How a listener speaks TLS; each file is read anew when it changes."""

    certificate: str = Field(min_length=1, description="A PEM file: the certificate, and those between it and its CA.")
    key: str = Field(min_length=1, description="A PEM file: the certificate's private key.")
    client_ca: str | None = Field(
        None, min_length=1, description="A PEM file: clients must show a certificate of one of these CAs."
    )


def _check_pattern(value: object) -> object:
    if isinstance(value, str) and not OPERATIONS_PATTERN.fullmatch(value):
        raise setting_error(
            "must be a method and a name such as GET *, READ *, reports.* or POST feeds.2021-06-30.createFeed"
        )
    return value


OperationsPattern = Annotated[str, BeforeValidator(_check_pattern)]


class Policy(Settings):
    """What one caller, or everybody who comes in by one listener, may do; what is left out is not restricted."""

    accounts: tuple[AccountName, ...] | None = Field(None, description="The accounts that may be used.")
    operations: tuple[OperationsPattern, ...] | None = Field(
        None,
        description="The operations that may be called: names with * and ?, a method before them or not; READ stands "
        "for whatever only reads.",
    )
    data_elements: tuple[DataElement, ...] | None = Field(
        None, description="The personal data that may be had; []: none, and no operation that always brings some."
    )


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


class Listener(Policy):
    """One address that apps send their requests to."""

    address: ListenAddress = Field(description="Where to listen: host:port, or unix:/path. Port 0 takes a free one.")
    mode: SocketMode = Field(0o600, description="The mode of a Unix socket.")
    owner: str | None = Field(None, min_length=1, description="The owner of a Unix socket, by name or number.")
    group: str | None = Field(None, min_length=1, description="The group of a Unix socket, by name or number.")
    tls: Tls | None = Field(None, description="Speak TLS here, 1.2 and newer.")
    anonymous: bool = Field(
        default=False, description="Where there are callers: let in also whoever is none of them, as this listener may."
    )
    account: AccountName | None = Field(None, description="Every request here is for this account.")
    region: Region | None = Field(None, description="Every request here is for this region.")
    require_header: bool = Field(
        default=False,
        description="Refuse requests without x-sp-account or x-sp-key: apps that fetch URLs for others cannot set "
        "headers.",
    )
    insecure_network: bool = Field(
        default=False,
        description="Accept an address that other machines can reach: whoever reaches it acts as the seller.",
    )


def _printable(value: object) -> object:
    if isinstance(value, str) and not (value.isascii() and value.isprintable()):
        raise setting_error("must hold printable ASCII characters only")
    return value


# Together at most 440 characters even if every one is escaped: Amazon refuses a user agent of more than 500
# (DOC "Include a User-Agent Header in All Requests").
HeaderText = Annotated[str, Field(min_length=1, max_length=40), BeforeValidator(_printable)]


class Caller(Policy):
    """Somebody who may come in, known by a key, a client certificate or the user id at the end of a Unix socket."""

    key: Secret | None = Field(None, description="What it sends as x-sp-key, or as Authorization: Bearer.")
    certificate: str | None = Field(
        None, min_length=1, description="The name in its client certificate: a subject alternative, or the common name."
    )
    uid: int | None = Field(None, ge=0, description="Its user id, where it comes by a Unix socket.")

    @model_validator(mode="after")
    def _is_known_by_something(self) -> "Caller":
        if self.key is None and self.certificate is None and self.uid is None:
            raise setting_error("needs a key, a certificate or a uid to be known by")
        return self


class UserAgent(Settings):
    """What `user-agent` tells Amazon about the application."""

    name: Annotated[str, Field(min_length=1, max_length=100), BeforeValidator(_printable)] = Field(
        "sp-api-proxy", description="The application's name."
    )
    version: HeaderText = Field("0.1", description="The application's version.")
    language: HeaderText | None = Field(None, description="Left out: Python and its version.")
    platform: HeaderText | None = Field(None, description="Left out: the operating system.")


class Retry(Settings):
    """When a call that failed is sent again: one that reads, or that does the same when it is done twice."""

    attempts: int = Field(3, ge=1, le=10, description="How often a call is sent at most; 1: never again.")
    first_pause: Duration = Field(0.1, description="The longest pause before the second attempt; doubled each time.")
    longest_pause: Duration = Field(2.0, description="The longest pause there is.")
    budget: int = Field(20, ge=0, le=100, description="Retries per hundred calls, so that an outage is not multiplied.")


class Application(Settings):
    """One application registered with Amazon."""

    client_id: str = Field(min_length=1, description="The LWA client identifier.")
    client_secret: Secret = Field(description="The LWA client secret.")
    user_agent: UserAgent = Field(default_factory=UserAgent, description="What Amazon is told about the application.")
    retry: Retry | None = Field(None, description="When calls are sent again, for this application alone.")
    rotated_at: date | None = Field(
        None, description="The day the client secret was made, as 2026-11-23: Amazon wants a new one every 180 days."
    )


class Account(Settings):
    """One seller or vendor account."""

    application: AccountName | None = Field(None, description="The application; may be left out when there is one.")
    refresh_tokens: dict[Region, Secret] = Field(
        default_factory=dict, description="A refresh token for each region (na, eu, fe)."
    )
    data_elements: tuple[DataElement, ...] = Field(
        (),
        description="Personal data to ask for where it is optional: buyerInfo, shippingAddress, buyerTaxInformation.",
    )
    target_application: str | None = Field(
        None,
        pattern=TARGET_APPLICATION,
        description="The id of the application that Restricted Data Tokens are made for (delegation); it alone can use "
        "them.",
    )
    environment: Environment | None = Field(None, description="production or sandbox, for this account alone.")


class Endpoints(Settings):
    """Other servers than Amazon's, for tests, simulators and private gateways."""

    na: RegionEndpoint | None = Field(None, description="Base URL for North America.")
    eu: RegionEndpoint | None = Field(None, description="Base URL for Europe.")
    fe: RegionEndpoint | None = Field(None, description="Base URL for the Far East.")
    lwa: Endpoint = Field("https://api.amazon.com/auth/o2/token", description="Login with Amazon's token address.")
    documents: RegionEndpoint | None = Field(
        None,
        description="Where documents may be besides Amazon's storage: scheme, host and port, for documents: relay.",
    )


class Limits(Settings):
    """How the proxy keeps to Amazon's usage plans."""

    max_wait: Duration = Field(10.0, description="How long a call may wait for its place before it is refused.")
    pace: bool = Field(default=True, description="false: send at once, and only learn the rates.")
    max_queue: int = Field(5000, ge=1, description="How many calls may wait for one usage plan.")


class Bounds(Settings):
    """How much of the proxy anybody may take up."""

    connections: int = Field(
        16384,
        ge=1,
        description="Client connections at once; fewer where the process may open fewer files. Beyond it the one "
        "that has been idle longest gives way.",
    )
    requests: int = Field(4096, ge=1, description="Requests in flight of one caller, or of one listener's anonymous.")
    account_requests: int = Field(
        500, ge=1, description="Requests of one account that are at Amazon at once; more wait for their turn."
    )
    header_size: int = Field(64 * 1024, ge=1024, le=1024 * 1024, description="Bytes of a request's header block.")
    header_fields: int = Field(128, ge=8, le=1000, description="Fields in a request's header block.")
    body_rate: int = Field(
        128,
        ge=0,
        description="Bytes per second that an app sends or reads at least, on average, once it has been waited for "
        "longer than timeouts.body_idle.",
    )


class Timeouts(Settings):
    """How long each thing may take; each running out is an error of its own name."""

    header: PositiveDuration = Field(10.0, description="A client's whole header block.")
    body_idle: PositiveDuration = Field(30.0, description="A client that stops sending, or stops reading the answer.")
    connect: PositiveDuration = Field(5.0, description="A connection to Amazon, its name and TLS included.")
    upstream_idle: PositiveDuration = Field(60.0, description="Amazon silent: before the answer, or within its body.")
    token: PositiveDuration = Field(10.0, description="One token exchange.")
    total: PositiveDuration = Field(3600.0, description="A whole exchange, both bodies included.")
    keep_alive: PositiveDuration = Field(75.0, description="An idle connection of a client.")
    shutdown_delay: Duration = Field(
        0.0, description="How long new requests are still taken after SIGTERM, while /readyz says 503."
    )
    shutdown: PositiveDuration = Field(
        20.0, description="How long requests may go on after that, before they are cut off."
    )


def _forward_proxy(secret: Secret) -> Secret:
    """Check the address of a forward proxy; it may hold a password."""
    try:
        parts = urlsplit(secret.reveal())
        is_right = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0 and parts.path in {"", "/"}
    except ValueError:
        is_right = False
    if not is_right:
        raise setting_error("must be http://host:port or http://user:password@host:port")
    return secret


class Pool(Settings):
    """The connections to Amazon."""

    max_connections: int = Field(1000, ge=1, description="Connections to all of Amazon's hosts together.")
    idle: PositiveDuration = Field(20.0, description="How long an unused connection is kept.")
    ca_file: str | None = Field(None, description="A PEM file of certificates to trust instead of the system's.")
    proxy: Annotated[Secret, AfterValidator(_forward_proxy)] | None = Field(
        None,
        description="A forward proxy on the way to Amazon, as http://[user:password@]host:port; HTTPS_PROXY where this "
        "is not set. Hosts of this machine are reached directly.",
    )
    no_proxy: tuple[str, ...] = Field(
        (), description="Hosts, and domains with all below them, that are reached directly; NO_PROXY where not set."
    )


class Log(Settings):
    """What goes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least level that is written.")
    format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, JSON otherwise.")


class MetricsSettings(Settings):
    """What the Prometheus series carry."""

    account_on_histograms: bool = Field(
        default=False, description="Put the account on histograms too: accounts x operations x buckets series."
    )


def _collector(value: object) -> object:
    """Check the address of a collector, and add OTLP's own path where there is none."""
    if not isinstance(value, str):
        return value
    try:
        parts = urlsplit(value)
        is_right = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or not URL_TEXT.fullmatch(value) or "@" in parts.netloc or parts.query or parts.fragment:
        raise setting_error("must be http://host:port or https://host:port, with or without a path")
    return value if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1/traces"


def _header_list(secret: Secret) -> Secret:
    if not HEADER_LIST.fullmatch(secret.reveal()):
        raise setting_error("must be name=value, several with commas between them")
    return secret


class Tracing(Settings):
    """Where OpenTelemetry traces go, one span a request; needs the extra `otel`."""

    endpoint: Annotated[str, BeforeValidator(_collector)] | None = Field(
        None,
        description="A collector that takes OTLP over HTTP, as http://127.0.0.1:4318; none: no traces. "
        "OTEL_EXPORTER_OTLP_ENDPOINT and its like count before the file.",
    )
    headers: Annotated[Secret, AfterValidator(_header_list)] | None = Field(
        None, description="Headers that the collector wants, as name=value,name=value."
    )
    sample: float = Field(
        1.0, ge=0, le=1, description="The share of requests that is traced; those whose app traces them always are."
    )
    service_name: str = Field("sp-api-proxy", min_length=1, description="The name of this service in the traces.")


class Config(Settings):
    """Everything the proxy is told."""

    listen: Annotated[
        tuple[Annotated[Listener, BeforeValidator(_address_alone)], ...], BeforeValidator(_one_or_many)
    ] = Field(
        (Listener(address=Address("127.0.0.1", 8080)),),
        min_length=1,
        description="One or several addresses for the apps.",
    )
    admin: ListenAddress | None = Field(
        Address("127.0.0.1", 9090), description="Metrics, health and status; this machine only. null: none."
    )
    quit: bool = Field(
        default=False, description="Let POST /quitquitquit on the admin address end the proxy, as SIGTERM does."
    )
    health: ListenAddress | None = Field(
        None, description="Health and metrics alone, at an address that may be opened to probes and Prometheus."
    )
    allowed_hosts: tuple[HostName, ...] = Field(
        (), description="Host names accepted besides loopback names and the listener's own address."
    )
    applications: dict[AccountName, Application] = Field(
        default_factory=dict, description="The applications registered with Amazon, by a name of yours."
    )
    accounts: dict[AccountName, Account] = Field(
        default_factory=dict, description="The seller and vendor accounts, by a name of yours."
    )
    default_account: AccountName | None = Field(
        None, description="For requests that name none; may be left out when there is one account."
    )
    environment: Environment = Field("production", description="production or sandbox.")
    sandbox_rdt: Literal["none", "production"] = Field(
        "none",
        description="What restricted operations bring in the sandbox: none, the ordinary token; production, a "
        "Restricted Data Token made in production.",
    )
    local_rdt: bool = Field(
        default=False,
        description="Answer apps that ask for a Restricted Data Token themselves with a placeholder, which says what "
        "the proxy is to ask for; false: they get one of Amazon's.",
    )
    endpoints: Endpoints = Field(default_factory=Endpoints, description="Other servers than Amazon's.")
    documents: Literal["direct", "relay"] = Field(
        "direct",
        description="How apps get at documents: direct, by Amazon's presigned URLs as they are; relay, through the "
        "proxy, for apps that reach nothing else.",
    )
    documents_url: Annotated[str, BeforeValidator(lambda value: _check_public_url(str(value)))] | None = Field(
        None,
        description="Where apps send the requests for relayed documents, as https://host[:port][/path]; none: where "
        "they sent the call, by its Host.",
    )
    marketplaces: dict[str, Region] = Field(
        default_factory=dict, description="Marketplace ids that Amazon added after this release, with their region."
    )
    callers: dict[AccountName, Caller] = Field(
        default_factory=dict, description="Who may come in and what each may do, by a name of yours; none: everybody."
    )
    strict_permissions: bool = Field(
        default=False, description="Refuse secrets in files that other users can read, instead of warning."
    )
    audit: str | None = Field(
        None, min_length=1, description="Where the audit log goes: stdout, stderr, or a file; one JSON line a request."
    )
    limits: Limits = Field(default_factory=Limits, description="Usage plans.")
    bounds: Bounds = Field(default_factory=Bounds, description="How much of the proxy anybody may take up.")
    retry: Retry = Field(default_factory=Retry, description="When a call that failed is sent again.")
    timeouts: Timeouts = Field(default_factory=Timeouts, description="How long each thing may take.")
    pool: Pool = Field(default_factory=Pool, description="Connections to Amazon.")
    store: StoreSetting = Field(
        StoreAddress(),
        description="Where tokens and usage plans are kept: memory, this process alone; or the Redis that replicas "
        "share, as redis://host:6379/0, rediss://user:password@host:6379/0 or unix:///run/redis.sock?db=0.",
    )
    store_key: Annotated[tuple[StoreKey, ...], BeforeValidator(_one_or_many)] = Field(
        (),
        description="What seals tokens in Redis, one or several: the first one seals, all of them unseal. "
        "openssl rand -base64 32 makes one.",
    )
    warm_up: bool = Field(
        default=False,
        description="Fetch every account's tokens at start, and be ready only then; those refused are logged.",
    )
    log: Log = Field(default_factory=Log, description="What goes to standard error.")
    metrics: MetricsSettings = Field(default_factory=MetricsSettings, description="What the series carry.")
    tracing: Tracing = Field(default_factory=Tracing, description="OpenTelemetry traces.")

    def application_of(self, account: Account) -> tuple[str, Application]:
        """Return the name and the settings of the application that `account` belongs to."""
        name = account.application or next(iter(self.applications))
        return name, self.applications[name]

    def environment_of(self, account: Account) -> Environment:
        """Return `production` or `sandbox` for `account`."""
        return account.environment or self.environment


def dump(config: Config) -> dict[str, Any]:
    """Return the configuration as plain values, every secret as `***`."""
    return config.model_dump(mode="json", exclude_none=True)
