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
    """A frozen group of settings; an unknown key is an error."""

    # hide_input_in_errors: a rejected value may be a secret in the wrong place.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True)


def default_as_written(field: FieldInfo) -> Any:
    """Return a setting's default as in a file (`10s`, `0600`), None where it has none."""
    if field.is_required():
        return None
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(kind).dump_python(field.get_default(call_default_factory=True), mode="json")


def settings_in(kind: Any) -> type[Settings] | None:
    """Return the group of settings that a field of type `kind` holds (`Limits`, `Account | None`), or None."""
    options = (kind, *get_args(kind))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Settings)), None)


class Tls(Settings):
    """TLS of a listener; each file is reloaded when it changes."""

    certificate: str = Field(
        min_length=1, description="PEM file: the certificate and its intermediate CA certificates."
    )
    key: str = Field(min_length=1, description="PEM file: the private key of the certificate.")
    client_ca: str | None = Field(
        None,
        min_length=1,
        description="PEM file of CA certificates: clients must present a certificate that one of them issued.",
    )


class Policy(Settings):
    """What one caller, or every client of one listener, may do; what is left out is not restricted."""

    accounts: tuple[AccountName, ...] | None = Field(None, description="The accounts that may be used; by default all.")
    operations: tuple[OperationsPattern, ...] | None = Field(
        None,
        description="The operations that may be called, as patterns with * and ?, optionally after a method: GET *, "
        "reports.*. READ stands for every operation that only reads.",
    )
    data_elements: tuple[DataElement, ...] | None = Field(
        None,
        description="The personal data that may be requested; []: none, and no operation that always returns some.",
    )


class Listener(Policy):
    """One address on which the proxy accepts requests."""

    address: ListenAddress = Field(description="The address: host:port, or unix:/path. Port 0: any free port.")
    mode: SocketMode = Field(0o600, description="The file mode of a Unix socket.")
    owner: str | None = Field(None, min_length=1, description="The owner of a Unix socket, by name or number.")
    group: str | None = Field(None, min_length=1, description="The group of a Unix socket, by name or number.")
    tls: Tls | None = Field(None, description="Use TLS on this listener, version 1.2 or newer.")
    anonymous: bool = Field(
        default=False, description="Allow unauthenticated requests on this listener even if `callers` is set."
    )
    account: AccountName | None = Field(None, description="The account of every request on this listener.")
    region: Region | None = Field(None, description="The region of every request on this listener.")
    require_header: bool = Field(
        default=False,
        description="Reject requests without x-sp-account or x-sp-key. Protects against server-side request forgery: "
        "an app that is tricked into fetching a URL does not set these headers.",
    )
    insecure_network: bool = Field(
        default=False,
        description="Allow an address that other machines can reach without authentication: any client can then act as "
        "the seller.",
    )


class Caller(Policy):
    """A client that may send requests, authenticated by a key, a client certificate or the user id of a Unix socket."""

    key: Secret | None = Field(None, description="The key that it sends as x-sp-key, or as Authorization: Bearer.")
    certificate: str | None = Field(
        None,
        min_length=1,
        description="The name in its client certificate: a subject alternative name, or else the common name.",
    )
    uid: int | None = Field(None, ge=0, description="The user id of its process, for connections by a Unix socket.")

    @model_validator(mode="after")
    def _require_identity(self) -> "Caller":
        if self.key is None and self.certificate is None and self.uid is None:
            raise setting_error("needs a key, a certificate or a uid")
        return self


class UserAgent(Settings):
    """The application as described to Amazon in `user-agent`."""

    name: ProductName = Field("sp-api-proxy", description="The application's name.")
    version: HeaderText = Field("0.1", description="The application's version.")
    language: HeaderText | None = Field(
        None, description="The programming language; by default Python and its version."
    )
    platform: HeaderText | None = Field(
        None, description="The platform; by default the operating system and its version."
    )


class Retry(Settings):
    """Retries of failed requests that only read or are idempotent."""

    attempts: int = Field(
        3, ge=1, le=10, description="Maximum number of attempts, the first one included; 1: no retries."
    )
    first_pause: Duration = Field(
        0.1, description="Maximum backoff before the second attempt; doubled with each further attempt."
    )
    longest_pause: Duration = Field(2.0, description="Maximum backoff.")
    budget: int = Field(
        20,
        ge=0,
        le=100,
        description="Retry budget: retries per hundred requests, so that retries do not amplify an outage.",
    )


class Application(Settings):
    """One application registered with Amazon."""

    client_id: str = Field(min_length=1, description="The LWA client identifier.")
    client_secret: Secret = Field(description="The LWA client secret.")
    user_agent: UserAgent = Field(default_factory=UserAgent, description="The application as described to Amazon.")
    retry: Retry | None = Field(None, description="Retries for this application; by default the top-level `retry`.")
    rotated_at: date | None = Field(
        None,
        description="The day the client secret was created, as 2026-11-23: Amazon requires a new one every 180 days.",
    )


class Account(Settings):
    """One seller or vendor account."""

    application: AccountName | None = Field(
        None, description="The name of the application; may be left out if there is only one."
    )
    refresh_tokens: dict[Region, Secret] = Field(
        default_factory=dict, description="A refresh token for each region (na, eu, fe)."
    )
    data_elements: tuple[DataElement, ...] = Field(
        (),
        description="Personal data to request where it is optional: buyerInfo, shippingAddress, buyerTaxInformation.",
    )
    target_application: str | None = Field(
        None,
        pattern=TARGET_APPLICATION,
        description="The id of the application that Restricted Data Tokens are created for (delegation); no other can "
        "use them.",
    )
    environment: Environment | None = Field(
        None, description="production or sandbox, for this account; by default the top-level `environment`."
    )


class Endpoints(Settings):
    """Base URLs that replace Amazon's, for tests, simulators and private gateways."""

    na: RegionEndpoint | None = Field(None, description="Base URL for North America.")
    eu: RegionEndpoint | None = Field(None, description="Base URL for Europe.")
    fe: RegionEndpoint | None = Field(None, description="Base URL for the Far East.")
    lwa: Endpoint = Field("https://api.amazon.com/auth/o2/token", description="Token endpoint of Login with Amazon.")
    documents: RegionEndpoint | None = Field(
        None,
        description="Allowed origin of documents in addition to Amazon's storage, for documents: relay.",
    )


class Limits(Settings):
    """Rate limits according to Amazon's usage plans."""

    max_wait: Duration = Field(10.0, description="How long a request may wait for a rate limit before it is rejected.")
    pace: bool = Field(
        default=True,
        description="Delay requests to stay within the usage plans; false: send at once and only observe the rates.",
    )
    max_queue: int = Field(5000, ge=1, description="Maximum number of requests that wait for one usage plan.")


class Bounds(Settings):
    """Resource limits for clients."""

    connections: int = Field(
        16384,
        ge=1,
        description="Maximum number of client connections, less if the process may open fewer files. Beyond it, the "
        "connection that has been idle longest is closed.",
    )
    requests: int = Field(
        4096,
        ge=1,
        description="Maximum requests in flight of one caller, or of all unauthenticated clients of a listener.",
    )
    account_requests: int = Field(
        500, ge=1, description="Maximum number of concurrent requests to Amazon for one account; further ones wait."
    )
    header_size: int = Field(
        64 * 1024, ge=1024, le=1024 * 1024, description="Maximum size of a request's header block in bytes."
    )
    header_fields: int = Field(128, ge=8, le=1000, description="Maximum number of header fields of a request.")
    body_rate: int = Field(
        128,
        ge=0,
        description="Minimum average rate, in bytes per second, at which a client sends or reads a body once the proxy "
        "has waited for it longer than timeouts.body_idle.",
    )


class Timeouts(Settings):
    """Timeouts; each has its own error code."""

    header: PositiveDuration = Field(10.0, description="For a client to send a complete header block.")
    body_idle: PositiveDuration = Field(
        30.0, description="For a client that stops sending its request or reading the response."
    )
    connect: PositiveDuration = Field(5.0, description="For a connection to Amazon, including DNS and TLS.")
    upstream_idle: PositiveDuration = Field(
        60.0, description="For Amazon to send the next bytes of a response, the first ones included."
    )
    token: PositiveDuration = Field(10.0, description="For one token request.")
    total: PositiveDuration = Field(3600.0, description="For a whole request and its response, including both bodies.")
    keep_alive: PositiveDuration = Field(75.0, description="For an idle client connection to be closed.")
    shutdown_delay: Duration = Field(
        0.0, description="How long new requests are still accepted after SIGTERM, while /readyz returns 503."
    )
    shutdown: PositiveDuration = Field(
        20.0, description="How long requests in flight may continue after that, before they are aborted."
    )


class Pool(Settings):
    """The connection pool for Amazon."""

    max_connections: int = Field(
        1000, ge=1, description="Maximum number of connections to all hosts of Amazon together."
    )
    idle: PositiveDuration = Field(20.0, description="How long an idle connection is kept.")
    ca_file: str | None = Field(None, description="PEM file of CA certificates to trust instead of the system's.")
    proxy: ForwardProxyUrl | None = Field(
        None,
        description="Forward proxy for connections to Amazon, as http://[user:password@]host:port; by default "
        "HTTPS_PROXY. Loopback hosts are reached directly.",
    )
    no_proxy: tuple[str, ...] = Field(
        (),
        description="Hosts, and domains with their subdomains, that are reached without the forward proxy; by "
        "default NO_PROXY.",
    )


class Log(Settings):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="The minimum level.")
    format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, JSON otherwise.")


class MetricsSettings(Settings):
    """Labels of the Prometheus metrics."""

    account_on_histograms: bool = Field(
        default=False,
        description="Add the account label to histograms as well: accounts x operations x buckets series.",
    )


class Tracing(Settings):
    """OpenTelemetry traces, one span for each request; needs the extra `otel`."""

    endpoint: CollectorUrl | None = Field(
        None,
        description="URL of a collector for OTLP over HTTP, as http://127.0.0.1:4318; by default there are no traces. "
        "OTEL_EXPORTER_OTLP_ENDPOINT and the other OTEL_ variables override the file.",
    )
    headers: HeaderList | None = Field(None, description="Headers for the collector, as name=value,name=value.")
    sample: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Ratio of requests that are traced; requests with a sampled trace context always are.",
    )
    service_name: str = Field("sp-api-proxy", min_length=1, description="The service name in the traces.")


class Config(Settings):
    """The complete configuration."""

    listen: Annotated[tuple[Annotated[Listener, BeforeValidator(address_alone)], ...], BeforeValidator(one_or_many)] = (
        Field(
            (Listener(address=Address("127.0.0.1", 8080)),),
            min_length=1,
            description="One or more addresses on which the proxy accepts requests.",
        )
    )
    admin: ListenAddress | None = Field(
        Address("127.0.0.1", 9090), description="Loopback address of metrics, health and status; null: none."
    )
    quit: bool = Field(
        default=False, description="Allow POST /quitquitquit on the admin address to stop the proxy, as SIGTERM does."
    )
    health: ListenAddress | None = Field(
        None, description="Address of health and metrics only, which may be reachable for probes and Prometheus."
    )
    allowed_hosts: tuple[HostName, ...] = Field(
        (), description="Host names accepted in addition to loopback names and the address of the listener."
    )
    applications: dict[AccountName, Application] = Field(
        default_factory=dict, description="The applications registered with Amazon, by a name of your choice."
    )
    accounts: dict[AccountName, Account] = Field(
        default_factory=dict, description="The seller and vendor accounts, by a name of your choice."
    )
    default_account: AccountName | None = Field(
        None, description="The account of requests that name none; may be left out if there is only one."
    )
    environment: Environment = Field("production", description="production or sandbox.")
    sandbox_rdt: Literal["none", "production"] = Field(
        "none",
        description="The token for restricted operations in the sandbox: none, the access token; production, a "
        "Restricted Data Token created in production.",
    )
    local_rdt: bool = Field(
        default=False,
        description="Respond to createRestrictedDataToken with a placeholder that tells the proxy which personal data "
        "to request; false: forward the request to Amazon.",
    )
    endpoints: Endpoints = Field(default_factory=Endpoints, description="Base URLs that replace Amazon's.")
    documents: Literal["direct", "relay"] = Field(
        "direct",
        description="How apps fetch documents: direct, by Amazon's presigned URLs; relay, through the proxy, for apps "
        "without access to Amazon's storage.",
    )
    documents_url: PublicUrl | None = Field(
        None,
        description="Base URL of the proxy in the URLs of relayed documents, as https://host[:port][/path]; by default "
        "that of the request, by its Host.",
    )
    marketplaces: dict[str, Region] = Field(
        default_factory=dict, description="Regions of marketplace ids that Amazon added after this release."
    )
    callers: dict[AccountName, Caller] = Field(
        default_factory=dict,
        description="Clients that may send requests and their permissions, by a name of your choice; by default all.",
    )
    strict_permissions: bool = Field(
        default=False, description="Reject secrets in files that other users can read, instead of logging a warning."
    )
    audit: str | None = Field(
        None,
        min_length=1,
        description="Destination of the audit log: stdout, stderr or a file; one JSON line for each request.",
    )
    limits: Limits = Field(default_factory=Limits, description="Rate limits according to Amazon's usage plans.")
    bounds: Bounds = Field(default_factory=Bounds, description="Resource limits for clients.")
    retry: Retry = Field(default_factory=Retry, description="Retries of failed requests.")
    timeouts: Timeouts = Field(default_factory=Timeouts, description="Timeouts.")
    pool: Pool = Field(default_factory=Pool, description="The connection pool for Amazon.")
    store: StoreSetting = Field(
        StoreAddress(),
        description="Storage of tokens and usage plans: memory, for this process only; or a Redis server that replicas "
        "share, as redis://host:6379/0, rediss://user:password@host:6379/0 or unix:///run/redis.sock?db=0.",
    )
    store_key: Annotated[tuple[StoreKey, ...], BeforeValidator(one_or_many)] = Field(
        (),
        description="Keys that encrypt tokens in Redis: the first one encrypts, all of them decrypt. Create one with "
        "openssl rand -base64 32.",
    )
    warm_up: bool = Field(
        default=False,
        description="Fetch the tokens of all accounts at start and become ready afterwards; rejected ones are logged.",
    )
    log: Log = Field(default_factory=Log, description="The log on standard error.")
    metrics: MetricsSettings = Field(default_factory=MetricsSettings, description="Labels of the Prometheus metrics.")
    tracing: Tracing = Field(default_factory=Tracing, description="OpenTelemetry traces.")

    def application_of(self, account: Account) -> tuple[str, Application]:
        """Return the name and the settings of an account's application."""
        name = account.application or next(iter(self.applications))
        return name, self.applications[name]

    def environment_of(self, account: Account) -> Environment:
        """Return the environment of an account."""
        return account.environment or self.environment


def dump(config: Config) -> dict[str, Any]:
    """Return the configuration as plain values, every secret as `***`."""
    return config.model_dump(mode="json", exclude_none=True)
