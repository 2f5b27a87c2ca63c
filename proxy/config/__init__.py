"""YAML and environment, read in one place, become a frozen and validated Config."""

from proxy.config.load import ConfigError, Loaded, admin_addresses, applications_config, load_config
from proxy.config.model import (
    LOOPBACK_NAMES,
    REGIONS,
    Account,
    Address,
    Application,
    Bounds,
    Caller,
    Config,
    DataElement,
    Environment,
    Listener,
    Policy,
    Region,
    Retry,
    Tls,
    Tracing,
    dump,
    is_loopback,
    parse_duration,
)
from proxy.config.secret import Secret
from proxy.config.store_address import StoreAddress
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
