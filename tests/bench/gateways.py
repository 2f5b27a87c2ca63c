"""Setup of Caddy and Envoy for the same work as the other proxies, as fast as their documentation allows.

Each accepts plain HTTP/1.1, adds the token and forwards over persistent TLS 1.3 connections, and verifies the
upstream's certificate and name. No access log, no admin port, one worker.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.compared_proxies import BenchUpstream, ComparedProxy
from tests.bench.processes import HOST, Cores, free_port, started

_TOKEN_HEADER = "x-amz-access-token"
_TOKEN = "Atza|benchmark"
_TYPES = "type.googleapis.com/envoy.extensions"


@contextmanager
def caddy(program: str, upstream: BenchUpstream, cores: Cores, folder: Path) -> Iterator[ComparedProxy]:
    """Run Caddy with one thread for Go code."""
    port = free_port()
    path = folder / "caddy.json"
    path.write_text(json.dumps(_caddy_config(upstream, port)))
    environment = {"GOMAXPROCS": "1", "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    command = [program, "run", "--config", str(path)]
    with started("Caddy", command, port, cores.proxy, folder, environment) as process:
        yield ComparedProxy("Caddy", process, port)


def _caddy_config(upstream: BenchUpstream, port: int) -> dict[str, Any]:
    forward = {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": f"{HOST}:{upstream.api_port}"}],
        "headers": {"request": {"set": {_TOKEN_HEADER: [_TOKEN], "Host": ["localhost"]}}},
        "transport": {
            "protocol": "http",
            "versions": ["1.1"],
            "compression": False,
            "tls": {"root_ca_pem_files": [str(upstream.certificates.authority)], "server_name": "localhost"},
            "keep_alive": {"enabled": True, "max_idle_conns": 1000, "max_idle_conns_per_host": 1000},
        },
    }
    server = {
        "listen": [f"{HOST}:{port}"],
        "protocols": ["h1"],
        "automatic_https": {"disable": True},
        "routes": [{"handle": [forward]}],
    }
    return {
        "admin": {"disabled": True, "config": {"persist": False}},
        "logging": {"logs": {"default": {"level": "ERROR"}}},
        "apps": {"http": {"servers": {"bench": server}}},
    }


@contextmanager
def envoy(program: str, upstream: BenchUpstream, cores: Cores, folder: Path) -> Iterator[ComparedProxy]:
    """Run Envoy with one worker."""
    port = free_port()
    path = folder / "envoy.json"
    path.write_text(json.dumps(_envoy_config(upstream, port)))
    command = [program, "--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "-c", str(path)]
    with started("Envoy", command, port, cores.proxy, folder) as process:
        yield ComparedProxy("Envoy", process, port)


def _envoy_config(upstream: BenchUpstream, port: int) -> dict[str, Any]:
    return {
        "static_resources": {
            "secrets": [{"name": "token", "generic_secret": {"secret": {"inline_string": _TOKEN}}}],
            "listeners": [
                {"name": "bench", "address": _address(port), "filter_chains": [{"filters": [_connection_manager()]}]}
            ],
            "clusters": [_cluster(upstream)],
        }
    }


def _connection_manager() -> dict[str, Any]:
    generic = {"credential": {"name": "token"}, "header": _TOKEN_HEADER}
    injector = {
        "overwrite": True,
        "credential": _typed("generic", f"{_TYPES}.http.injected_credentials.generic.v3.Generic", generic),
    }
    injects = f"{_TYPES}.filters.http.credential_injector.v3.CredentialInjector"
    route = {"match": {"prefix": "/"}, "route": {"cluster": "amazon", "host_rewrite_literal": "localhost"}}
    manager = {
        "stat_prefix": "bench",
        "codec_type": "HTTP1",
        "generate_request_id": False,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            _typed("envoy.filters.http.credential_injector", injects, injector),
            _typed("envoy.filters.http.router", f"{_TYPES}.filters.http.router.v3.Router", {}),
        ],
    }
    manages = f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"
    return _typed("envoy.filters.network.http_connection_manager", manages, manager)


def _cluster(upstream: BenchUpstream) -> dict[str, Any]:
    name = {"san_type": "DNS", "matcher": {"exact": "localhost"}}
    authority = {
        "trusted_ca": {"filename": str(upstream.certificates.authority)},
        "match_typed_subject_alt_names": [name],
    }
    versions = {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"}
    tls = {"sni": "localhost", "common_tls_context": {"tls_params": versions, "validation_context": authority}}
    endpoint = {"endpoint": {"address": _address(upstream.api_port)}}
    return {
        "name": "amazon",
        "type": "STATIC",
        "load_assignment": {"cluster_name": "amazon", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "transport_socket": _typed(
            "envoy.transport_sockets.tls", f"{_TYPES}.transport_sockets.tls.v3.UpstreamTlsContext", tls
        ),
    }


def _typed(name: str, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": kind, **config}}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": HOST, "port_value": port}}
