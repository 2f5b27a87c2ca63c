"""The settings: their groups, defaults and descriptions.

The field descriptions are the single place where a setting is explained. The configuration reference and the JSON
Schema are generated from them.
"""

from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.fields import FieldInfo

from proxy.config.secret import Secret
from proxy.config.store_address import StoreAddress
from proxy.config.types import (
    TARGET_APPLICATION,
    AccountName,
    Address,
    CollectorUrl,
    DataElement,
    Duration,
    Endpoint,
    Environment,
    ForwardProxyUrl,
    HeaderList,
    HeaderText,
    HostName,
    ListenAddress,
    OperationsPattern,
    PositiveDuration,
    ProductName,
    PublicUrl,
    Region,
    RegionEndpoint,
    SocketMode,
    StoreKey,
    StoreSetting,
    address_alone,
    one_or_many,
    setting_error,
)


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

    name: ProductName = Field("sp-api-proxy", description="The application's name.")
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


class Pool(Settings):
    """The connections to Amazon."""

    max_connections: int = Field(1000, ge=1, description="Connections to all of Amazon's hosts together.")
    idle: PositiveDuration = Field(20.0, description="How long an unused connection is kept.")
    ca_file: str | None = Field(None, description="A PEM file of certificates to trust instead of the system's.")
    proxy: ForwardProxyUrl | None = Field(
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


class Tracing(Settings):
    """Where OpenTelemetry traces go, one span a request; needs the extra `otel`."""

    endpoint: CollectorUrl | None = Field(
        None,
        description="A collector that takes OTLP over HTTP, as http://127.0.0.1:4318; none: no traces. "
        "OTEL_EXPORTER_OTLP_ENDPOINT and its like count before the file.",
    )
    headers: HeaderList | None = Field(None, description="Headers that the collector wants, as name=value,name=value.")
    sample: float = Field(
        1.0, ge=0, le=1, description="The share of requests that is traced; those whose app traces them always are."
    )
    service_name: str = Field("sp-api-proxy", min_length=1, description="The name of this service in the traces.")


class Config(Settings):
    """Everything the proxy is told."""

    listen: Annotated[tuple[Annotated[Listener, BeforeValidator(address_alone)], ...], BeforeValidator(one_or_many)] = (
        Field(
            (Listener(address=Address("127.0.0.1", 8080)),),
            min_length=1,
            description="One or several addresses for the apps.",
        )
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
    documents_url: PublicUrl | None = Field(
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
    store_key: Annotated[tuple[StoreKey, ...], BeforeValidator(one_or_many)] = Field(
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
