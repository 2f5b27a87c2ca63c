"""Configuration: YAML, environment and flags become one frozen, validated Config, or every problem at once.

Exports what the other packages use: `load_config` and its results, the groups of settings, and the types of their
values. Nobody else reads the configuration file or `os.environ`. Imports no other package of the proxy.
"""

from proxy.config.load import ConfigError, Loaded, admin_addresses, applications_config, load_config
from proxy.config.model import (
    Account,
    Application,
    Bounds,
    Caller,
    Config,
    Listener,
    Policy,
    Retry,
    Tls,
    Tracing,
    dump,
)
from proxy.config.secret import Secret
from proxy.config.store_address import StoreAddress
from proxy.config.types import (
    LOOPBACK_NAMES,
    REGIONS,
    Address,
    DataElement,
    Environment,
    Region,
    is_loopback,
    parse_duration,
)
from proxy.config.yaml_reader import KeyPath, Problem

__all__ = [
    "LOOPBACK_NAMES",
    "REGIONS",
    "Account",
    "Address",
    "Application",
    "Bounds",
    "Caller",
    "Config",
    "ConfigError",
    "DataElement",
    "Environment",
    "KeyPath",
    "Listener",
    "Loaded",
    "Policy",
    "Problem",
    "Region",
    "Retry",
    "Secret",
    "StoreAddress",
    "Tls",
    "Tracing",
    "admin_addresses",
    "applications_config",
    "dump",
    "is_loopback",
    "load_config",
    "parse_duration",
]
