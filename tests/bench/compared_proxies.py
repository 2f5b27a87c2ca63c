"""Setup of the compared proxies: all forward to the same upstream over TLS with keep-alive."""

import http.client
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.certificates import Certificates, make_certificates
from tests.bench.processes import HOST, Cores, Started, free_port, python, started

PATH = "/orders/v0/orders?MarketplaceIds=A1PA6795UKMFR9&CreatedAfter=2026-01-01T00%3A00%3A00Z"  # what is requested
_WAITED = "spapi_proxy_limit_wait_seconds"
_FIRST_REQUESTS, _FIRST_PAUSE = 5, 0.1  # number of requests, and seconds between them

_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream amazon {{
        server 127.0.0.1:{upstream};
        keepalive 1000;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass https://amazon;
            proxy_http_version 1.1;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            proxy_set_header x-amz-access-token "Atza|benchmark";
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate {authority};
        }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class BenchUpstream:
    """The running upstream: its ports on the loopback address and its certificates."""

    api_port: int
    token_port: int
    large_port: int
    certificates: Certificates


@dataclass(frozen=True, slots=True)
class ComparedProxy:
    """A running proxy that listens on `port`."""

    name: str
    process: Started
    port: int
    admin: int | None = None  # port of its metrics, if it has any


@contextmanager
def bench_upstream(cores: Cores, folder: Path) -> Iterator[BenchUpstream]:
    """Run the upstream on the cores that are not reserved for the proxy."""
    upstream = BenchUpstream(free_port(), free_port(), free_port(), make_certificates(folder))
    ports = ("--api-port", upstream.api_port, "--token-port", upstream.token_port, "--large-port", upstream.large_port)
    files = ("--certificate", upstream.certificates.certificate, "--key", upstream.certificates.key)
    command = python("tests.bench.upstream", *ports, *files)
    with started("upstream", command, upstream.api_port, cores.other_cores, folder):
        yield upstream


@contextmanager
def sp_api_proxy(
    upstream: BenchUpstream,
    cores: Cores,
    folder: Path,
    *,
    large: bool = False,
    pace: bool = False,
    under: Sequence[str] = (),
) -> Iterator[ComparedProxy]:
    """Run sp-api-proxy.

    `large`: forward to the port for large bodies. `pace`: keep to usage plans; the rate that the upstream announces is
    learned before anything is measured. `under`: a command to run it under, such as a profiler.
    """
    port, admin = free_port(), free_port()
    path = folder / "proxy.yaml"
    # JSON is YAML.
    config = _proxy_config(upstream, port, upstream.large_port if large else upstream.api_port)
    config |= {"admin": f"{HOST}:{admin}", "limits": {"pace": pace}}
    path.write_text(json.dumps(config))
    path.chmod(0o600)
    command = [*under, *python("proxy", "serve", "--config", path)]
    with started("sp-api-proxy", command, port, cores.proxy, folder) as process:
        proxy = ComparedProxy("sp-api-proxy", process, port, admin)
        if pace:
            _learn_rate(proxy)
        yield proxy


def _learn_rate(proxy: ComparedProxy) -> None:
    """Send a few sequential requests, fewer than the plan's burst: the first response announces the rate."""
    for _ in range(_FIRST_REQUESTS):
        _get(proxy.port, PATH)
        time.sleep(_FIRST_PAUSE)


def plan_wait(proxy: ComparedProxy) -> tuple[float, int]:
    """Return the seconds that requests waited for their usage plan so far, and the number of requests."""
    if proxy.admin is None:
        return 0.0, 0
    text = _get(proxy.admin, "/metrics")
    total, count = (re.search(rf"^{_WAITED}_{part} (\S+)$", text, re.MULTILINE) for part in ("sum", "count"))
    if total is None or count is None:
        raise SystemExit(f"{proxy.name} has no metric {_WAITED}")
    return float(total[1]), int(float(count[1]))


def _get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
    finally:
        connection.close()
    if response.status != 200:
        raise SystemExit(f"GET {path}: {response.status} {body[:500]}")
    return body


def _proxy_config(upstream: BenchUpstream, port: int, api_port: int) -> dict[str, object]:
    return {
        "listen": f"{HOST}:{port}",
        "applications": {"bench": {"client_id": "amzn1.application-oa2-client.bench", "client_secret": "bench"}},
        "accounts": {"bench": {"refresh_tokens": {"eu": "Atzr|bench"}}},
        "endpoints": {
            "eu": f"https://localhost:{api_port}",
            "lwa": f"http://{HOST}:{upstream.token_port}/auth/o2/token",
        },
        "pool": {"ca_file": str(upstream.certificates.authority)},
        "log": {"level": "warning"},
    }


@contextmanager
def bare_aiohttp(
    upstream: BenchUpstream, cores: Cores, folder: Path, *, under: Sequence[str] = ()
) -> Iterator[ComparedProxy]:
    """Run the bare aiohttp proxy; `under` is a command to run it under."""
    port = free_port()
    arguments = ("--upstream", f"https://localhost:{upstream.api_port}", "--authority", upstream.certificates.authority)
    command = [*under, *python("tests.bench.bare", "--port", port, *arguments)]
    with started("bare aiohttp", command, port, cores.proxy, folder) as process:
        yield ComparedProxy("bare aiohttp", process, port)


@contextmanager
def nginx(program: str, upstream: BenchUpstream, cores: Cores, folder: Path) -> Iterator[ComparedProxy]:
    """Run nginx with one worker."""
    port = free_port()
    path = folder / "nginx.conf"
    authority = upstream.certificates.authority
    path.write_text(_NGINX.format(folder=folder, upstream=upstream.api_port, port=port, authority=authority))
    command = [program, "-e", "stderr", "-p", str(folder), "-c", str(path)]
    with started("nginx", command, port, cores.proxy, folder) as process:
        yield ComparedProxy("nginx", process, port)
